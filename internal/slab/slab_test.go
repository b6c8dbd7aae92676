package slab_test

import (
	"testing"

	"github.com/mistnet/mistnet/internal/slab"
)

func TestList(t *testing.T) {
	l := slab.New(8, 2)
	a, b, c := l.Get(), l.Get(), l.Get()
	for i, s := range [][]byte{a, b, c} {
		if len(s) != 8 {
			t.Fatalf("Get returned %d bytes, want 8", len(s))
		}
		s[0] = byte(i)
	}
	l.Put(make([]byte, 16)) // not one of its own
	l.Put(a[:1])
	l.Put(b)
	l.Put(c) // one too many
	if got := l.Get(); len(got) != 8 || got[0] != 1 {
		t.Errorf("Get returned %v, want the one put last that was kept", got)
	}
	if got := l.Get(); len(got) != 8 || got[0] != 0 {
		t.Errorf("Get returned %v, want the first one, whole again", got)
	}
	s := l.Get()
	if n := testing.AllocsPerRun(100, func() { l.Put(s); s = l.Get() }); n > 0 {
		t.Errorf("putting and getting allocates %v times", n)
	}
}
