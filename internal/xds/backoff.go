package xds

import (
	"math/rand/v2"
	"time"
)

// How long a client waits before it connects again, and how long a stream must live to count as healthy.
const (
	minBackoff    = 10 * time.Millisecond
	maxBackoff    = 15 * time.Second
	healthyStream = time.Second
)

// backoff doubles from minBackoff to maxBackoff. The zero value is ready.
type backoff struct{ last time.Duration }

// next returns how long to wait now: between half and the whole of the step, so that clients that lost the same server
// do not come back together.
func (b *backoff) next(r *rand.Rand) time.Duration {
	b.last = min(max(2*b.last, minBackoff), maxBackoff)
	half := b.last / 2
	return half + time.Duration(r.Int64N(int64(half)+1))
}

// reset starts over after a healthy stream.
func (b *backoff) reset() { b.last = 0 }
