package relay

import "github.com/mistnet/mistnet/internal/slab"

// A connection starts with small slabs, and moves to large ones when a read fills one. A large one carries four frames
// of the tunnel, each of which fills whole TLS records.
const (
	smallBytes = 64 << 10
	largeBytes = 256<<10 - 4*9
)

var (
	smallSlabs = slab.New(smallBytes, 256)
	largeSlabs = slab.New(largeBytes, 64)
)
