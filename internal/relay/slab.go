package relay

import "sync"

// freelist keeps byte slices of one size for reuse. Unlike sync.Pool it has a cap and survives garbage collection.
type freelist struct {
	size int // bytes of each slice
	keep int // slices kept at most

	mu   sync.Mutex
	free [][]byte
}

func (f *freelist) get() []byte {
	f.mu.Lock()
	n := len(f.free)
	if n == 0 {
		f.mu.Unlock()
		return make([]byte, f.size)
	}
	b := f.free[n-1]
	f.free[n-1] = nil
	f.free = f.free[:n-1]
	f.mu.Unlock()
	return b
}

func (f *freelist) put(b []byte) {
	f.mu.Lock()
	if len(f.free) < f.keep {
		f.free = append(f.free, b)
	}
	f.mu.Unlock()
}

// A connection starts with small slabs, and moves to large ones when a read fills one. A large one carries four frames
// of the tunnel, each of which fills whole TLS records.
const (
	smallBytes = 64 << 10
	largeBytes = 256<<10 - 4*9
)

var (
	smallSlabs = freelist{size: smallBytes, keep: 256}
	largeSlabs = freelist{size: largeBytes, keep: 64}
)
