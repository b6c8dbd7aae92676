package http1

import "github.com/mistnet/mistnet/internal/slab"

// A small slab holds most heads with their small bodies, and is all that an idle tunnel keeps. A large one holds the
// largest head, and bulk.
const (
	smallBytes = 4 << 10
	largeBytes = 64 << 10
)

var (
	smallSlabs = slab.New(smallBytes, 1024)
	largeSlabs = slab.New(largeBytes, 128)
)

// borrow returns a slab of at least n bytes, its length its capacity.
func borrow(n int) []byte {
	switch {
	case n <= smallBytes:
		return smallSlabs.Get()
	case n <= largeBytes:
		return largeSlabs.Get()
	}
	return make([]byte, n)
}

// giveBack takes a slab that nobody will touch again; slices of other sizes are left to the collector.
func giveBack(b []byte) {
	switch cap(b) {
	case smallBytes:
		smallSlabs.Put(b)
	case largeBytes:
		largeSlabs.Put(b)
	}
}
