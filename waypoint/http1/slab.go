package http1

import "sync"

// freelist keeps byte slices of one size for reuse, most recently used first. Unlike sync.Pool it has a cap and survives
// garbage collection.
type freelist struct {
	size, keep int

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
		f.free = append(f.free, b[:f.size])
	}
	f.mu.Unlock()
}

// A small slab holds most heads with their small bodies, and is all that an idle connection keeps. A large one holds the
// largest head, and bulk.
const (
	smallBytes = 4 << 10
	largeBytes = 64 << 10
)

var (
	smallSlabs = freelist{size: smallBytes, keep: 1024}
	largeSlabs = freelist{size: largeBytes, keep: 128}
)

// borrow returns a slab of at least n bytes, its length its capacity.
func borrow(n int) []byte {
	switch {
	case n <= smallBytes:
		return smallSlabs.get()
	case n <= largeBytes:
		return largeSlabs.get()
	}
	return make([]byte, n)
}

// giveBack takes a slab that nobody will touch again; slices of other sizes are left to the collector.
func giveBack(b []byte) {
	switch cap(b) {
	case smallBytes:
		smallSlabs.put(b)
	case largeBytes:
		largeSlabs.put(b)
	}
}
