package hbone

import "github.com/mistnet/mistnet/internal/slab"

// Sizes of the slices in use. batchBytes holds 16 full TLS records of 16 406 bytes, which carry four 64 KB frames.
const (
	batchBytes = 272 << 10
	largeBytes = 64 << 10
	smallBytes = 4 << 10
)

// The lists are shared by all connections: what is idle holds nothing, so few slices serve many connections.
var (
	batchSlabs = slab.New(batchBytes, 64)
	largeSlabs = slab.New(largeBytes, 256)
	smallSlabs = slab.New(smallBytes, 256)
)

func putBuffered(b []byte) {
	if cap(b) == smallBytes {
		smallSlabs.Put(b)
		return
	}
	largeSlabs.Put(b)
}
