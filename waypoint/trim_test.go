package waypoint

import (
	"runtime"
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

// TestTrimGivesMemoryBack when the heap has grown, and then not for a thousand times as long as that took, nor when it has not.
func TestTrimGivesMemoryBack(t *testing.T) {
	const grown = 64 << 20
	runtime.GC()
	var m trimmer
	m.begin()
	now := time.Now()
	if m.trim(now) {
		t.Error("trim() of a heap that has not grown = true")
	}
	waste(grown)
	before := held()
	if !m.trim(now) {
		t.Errorf("trim() of a heap that has grown from %d to %d bytes = false", m.left, before)
	}
	if after := held(); after+grown/4 > before {
		t.Errorf("the heap holds %d bytes of %d after trim(), want %d less", after, before, grown/4)
	}
	waste(grown)
	if m.trim(now.Add(time.Microsecond)) {
		t.Error("trim() right after the last = true")
	}
	if !m.trim(m.next) {
		t.Error("trim() when its time has come = false")
	}
}
