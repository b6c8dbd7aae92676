package hbone

import "sync"

// freelist keeps byte slices of one size for reuse. Unlike sync.Pool it has a cap and survives garbage collection, and
// it hands out the most recently returned slice first, which is the one still in the processor's cache.
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

// put takes b back. The caller must not touch it again. Slices of another capacity are left to the collector.
func (f *freelist) put(b []byte) {
	if cap(b) != f.size {
		return
	}
	f.mu.Lock()
	if len(f.free) < f.keep {
		f.free = append(f.free, b[:f.size])
	}
	f.mu.Unlock()
}

// Sizes of the slices in use. batchBytes holds 16 full TLS records of 16 406 bytes, which carry four 64 KB frames.
const (
	batchBytes = 272 << 10
	largeBytes = 64 << 10
	smallBytes = 4 << 10
)

// The freelists are shared by all connections: what is idle holds nothing, so few slices serve many connections.
var (
	batchSlabs = freelist{size: batchBytes, keep: 64}
	largeSlabs = freelist{size: largeBytes, keep: 256}
	smallSlabs = freelist{size: smallBytes, keep: 256}
)

func putBuffered(b []byte) {
	if cap(b) == smallBytes {
		smallSlabs.put(b)
		return
	}
	largeSlabs.put(b)
}
