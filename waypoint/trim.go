package waypoint

import (
	"runtime/debug"
	goruntime "runtime/metrics"
	"time"
)

// Bounds of trimming.
const (
	trimBytes = 4 << 20 // the heap must have grown by, and by a quarter
	trimShare = 200     // one part in so many of the time may be spent on it
)

// trimmer gives the memory back that is held for nothing when there is nothing to do. The collector lets the heap grow to twice what
// is in use and works when that is reached: after thousands of connections have come and been parked, it is not, and what they
// took meanwhile would stay for minutes. Who is busy is not held up: it is called when nobody is served, by one at a time.
type trimmer struct {
	left uint64    // bytes that the heap held after the last time, or at the beginning
	next time.Time // not before
}

// begin notes how much there is before anybody was served.
func (t *trimmer) begin() { t.left = held() }

// trim gives memory back if that is worth while; when it is too early for that, it returns after how long to ask again. It takes some
// 20 ms for 20 MiB.
func (t *trimmer) trim(now time.Time) (again time.Duration) {
	grown := held()
	t.left = min(t.left, grown) // the collector may have given some back itself
	switch {
	case grown < t.left+max(trimBytes, t.left/4):
		return 0
	case now.Before(t.next):
		return t.next.Sub(now)
	}
	debug.FreeOSMemory()
	t.left = held()
	t.next = now.Add(trimShare * time.Since(now))
	return 0
}

// held is how many bytes the heap has from the system and keeps, used or not.
func held() (n uint64) {
	kinds := [...]goruntime.Sample{
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/unused:bytes"}, {Name: "/memory/classes/heap/free:bytes"},
	}
	goruntime.Read(kinds[:])
	for _, k := range kinds {
		n += k.Value.Uint64()
	}
	return n
}
