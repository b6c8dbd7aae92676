package hbone_test

import (
	"context"
	"io"
	"testing"

	"github.com/mistnet/mistnet/internal/hbone"
)

// keeping is a server whose streams outlast their handlers.
func keeping(t *testing.T, maxStreams int) (*hbone.Server, *hbone.Pool, func() (near, far *hbone.Stream)) {
	kept := make(chan *hbone.Stream, 1)
	srv := &hbone.Server{MaxStreams: maxStreams, Handle: func(_ context.Context, r *hbone.Request) {
		s, err := r.Accept("")
		if err != nil {
			t.Error(err)
			return
		}
		s.Keep()
		kept <- s
	}}
	addr := serve(t, srv)
	p := newPool(t, nil)
	return srv, p, func() (near, far *hbone.Stream) {
		near = open(t, p, addr)
		return near, <-kept
	}
}

// TestNotify: it is told once of what comes, of what is there, and of every end.
func TestNotify(t *testing.T) {
	t.Parallel()
	for name, come := range map[string]func(p *hbone.Pool, s *hbone.Stream) error{
		"bytes":                func(_ *hbone.Pool, s *hbone.Stream) error { _, err := s.Write([]byte("x")); return err },
		"the peer's end":       func(_ *hbone.Pool, s *hbone.Stream) error { return s.CloseWrite() },
		"a reset":              func(_ *hbone.Pool, s *hbone.Stream) error { return s.Reset() },
		"a close":              func(_ *hbone.Pool, s *hbone.Stream) error { return s.Close() },
		"the connection's end": func(p *hbone.Pool, _ *hbone.Stream) error { return p.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, p, pair := keeping(t, 0)
			near, far := pair()
			defer far.Done()
			told := make(chan string, 10)
			far.Notify(func() { told <- "replaced" })
			far.Notify(func() { told <- "first" })
			select {
			case got := <-told:
				t.Fatalf("%s is told of nothing", got)
			default:
			}
			if err := come(p, near); err != nil {
				t.Fatal(err)
			}
			if got := <-told; got != "first" {
				t.Errorf("%s was told, want the callback that was set last", got)
			}
			far.Notify(func() { told <- "of what is there" })
			if got := <-told; got != "of what is there" {
				t.Errorf("then %s was told", got)
			}
			select {
			case got := <-told:
				t.Errorf("%s was told once more", got)
			default:
			}
		})
	}
}

// TestKeptStreamsOutlastTheirHandlers: they work, count as streams, keep Shutdown waiting, and end with Done.
func TestKeptStreamsOutlastTheirHandlers(t *testing.T) {
	t.Parallel()
	srv, _, pair := keeping(t, 1)
	near, far := pair()
	for range 2 {
		if _, err := io.WriteString(near, "ping"); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4)
		if _, err := io.ReadFull(far, b); err != nil {
			t.Fatal(err)
		}
		if _, err := far.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(near, b); err != nil || string(b) != "ping" {
			t.Fatalf("answer %q, %v", b, err)
		}
	}
	near2, far2 := pair() // on another connection: this one has its one stream
	if near.LocalAddr().String() == near2.LocalAddr().String() {
		t.Error("a stream that was kept does not count")
	}
	far2.Done()
	if n, err := near2.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read after Done: %d bytes, %v, want EOF", n, err)
	}
	shut := make(chan error, 1)
	go func() { shut <- srv.Shutdown(context.Background()) }()
	if _, err := io.WriteString(near, "late"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(far, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-shut:
		t.Fatalf("Shutdown() = %v while a stream is kept", err)
	default:
	}
	far.Done()
	_ = near.Close()
	if err := <-shut; err != nil {
		t.Errorf("Shutdown() = %v", err)
	}
}
