package waypoint

import (
	"context"
	"errors"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/relay"
)

var (
	errTooOld = errors.New("the connection has lasted as long as its service allows (maxConnectionDuration)")
	errIdle   = errors.New("nothing has passed for as long as the service allows (idleTimeout)")
)

// lifetime ends a connection when its service says so. stop must be called when it is over.
func lifetime(ctx context.Context, p *mesh.ConnectionPool, n *relay.Counters) (_ context.Context, stop func()) {
	var longest time.Duration
	if p != nil {
		longest = p.MaxConnectionDuration
	}
	idle := p.IdleTimeout()
	if longest == 0 && idle == 0 {
		return ctx, func() {}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var timers []*time.Timer
	if longest > 0 {
		timers = append(timers, time.AfterFunc(longest, func() { cancel(errTooOld) }))
	}
	if idle > 0 {
		timers = append(timers, idleTimer(idle, n, func() { cancel(errIdle) }))
	}
	return ctx, func() {
		for _, t := range timers {
			t.Stop()
		}
		cancel(nil)
	}
}

// idleTimer calls end when the counters have stood still for d, at the earliest, and a quarter of it more at the latest.
func idleTimer(d time.Duration, n *relay.Counters, end func()) *time.Timer {
	const looks = 4
	every := max(d/looks, time.Millisecond)
	last, still := int64(-1), 0
	var t *time.Timer
	ready := make(chan struct{})
	t = time.AfterFunc(every, func() {
		<-ready
		if now := n.AToB.Load() + n.BToA.Load(); now != last {
			last, still = now, 0
		} else if still++; still >= looks {
			end()
			return
		}
		t.Reset(every)
	})
	close(ready)
	return t
}
