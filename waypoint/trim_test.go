package waypoint

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

// waste leaves garbage in pages that were written to.
func waste(n int) {
	b := make([]byte, n)
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	runtime.KeepAlive(b)
}

// TestTrimGivesMemoryBack when the heap has grown, but not when it has not, nor so soon after the last time that much of the time went
// into it: then it says when to ask again.
func TestTrimGivesMemoryBack(t *testing.T) {
	debug.FreeOSMemory()
	grown := max(64<<20, held()) // what is worth while depends on what other tests have left
	waste(int(grown))            // what was there in the beginning, and is not for long
	var m trimmer
	m.begin()
	debug.FreeOSMemory()
	now, least := time.Now(), held()
	trims := func(now time.Time) bool {
		t.Helper()
		before := held()
		if again := m.trim(now); again != 0 {
			t.Errorf("trim() = %v, want it now or never", again)
		}
		return held()+grown/4 < before
	}
	if trims(now) {
		t.Error("a heap that has not grown is trimmed")
	}
	waste(int(grown))
	if !trims(now) {
		t.Errorf("the heap holds %d bytes, %d at least before: not trimmed", held(), least)
	}
	waste(int(grown))
	soon := now.Add(time.Microsecond)
	if again := m.trim(soon); again != m.next.Sub(soon) {
		t.Errorf("trim() right after the last = %v, want %v", again, m.next.Sub(soon))
	}
	if !trims(m.next) {
		t.Error("not trimmed when its time has come")
	}
	if again := m.trim(m.next.Add(-1)); again != 0 {
		t.Errorf("trim() of what has been trimmed = %v, want nothing to ask again for", again)
	}
}

// guest is a connection that nothing is done with.
type guest struct{ endable }

// TestTidyAsksAgain when it was too early, though nobody comes meanwhile who would make it.
func TestTidyAsksAgain(t *testing.T) {
	debug.FreeOSMemory()
	var ss sessions
	ss.trimmer.begin()
	grown := max(64<<20, held())
	ss.trimmer.next = time.Now().Add(10 * dozeInterval)
	waste(int(grown))
	before := held()
	ss.add(guest{}, false)
	ss.remove(guest{})
	for end := time.Now().Add(time.Minute); held()+grown/4 > before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the heap still holds %d bytes of %d", held(), before)
		}
	}
}
