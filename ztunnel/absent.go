package ztunnel

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/ztunnel/nexthop"
)

const (
	// elsewhere is how often another waypoint is looked for: enough to find the only other one, and nothing beside a connection.
	elsewhere = 32
	// patience is how long a replica of a waypoint has to take a connection as long as there may be another: a second lost packet
	// of its beginning is noticed after 3 s (RFC 6298, 2.1 and 5.5).
	patience = 2 * time.Second
	// absence is how long a replica that did not is left alone, as long as there is another. Who knows better is istiod.
	absence = 30 * time.Second
)

// absentees are replicas of waypoints that are not there, of which istiod could not tell in time: as when the node that went away
// was istiod's, too. The zero value knows none.
type absentees struct {
	mu    sync.Mutex
	until map[netip.AddrPort]time.Time
}

func (a *absentees) has(addr netip.AddrPort) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return time.Now().Before(a.until[addr])
}

func (a *absentees) note(addr netip.AddrPort) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	if a.until == nil {
		a.until = make(map[netip.AddrPort]time.Time)
	}
	for addr, until := range a.until {
		if !now.Before(until) {
			delete(a.until, addr)
		}
	}
	a.until[addr] = now.Add(absence)
}

func (a *absentees) forget(addr netip.AddrPort) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.until, addr)
}

// reach connects to the next hop. A replica of a waypoint that takes no connection is passed over for another one: nothing was sent
// yet. Where there is no other, it is waited for as long as for anybody.
func (a *absentees) reach(decide func() (nexthop.Hop, error), open func(hop nexthop.Hop, wait time.Duration) (relay.Conn, error)) (relay.Conn, error) {
	var tried []netip.AddrPort
	var slow nexthop.Hop // that may only be slow, or was not tried
	var failed error
	for range elsewhere {
		hop, err := decide()
		if err != nil {
			return nil, err
		}
		if hop.Why != nexthop.ThroughServiceWaypoint && hop.Why != nexthop.ThroughWorkloadWaypoint {
			return open(hop, 0)
		}
		if slices.Contains(tried, hop.Addr) {
			continue
		}
		if a.has(hop.Addr) {
			slow = hop
			continue
		}
		next, err := open(hop, patience)
		if err == nil || !unmade(err) {
			return next, err
		}
		a.note(hop.Addr)
		if tried = append(tried, hop.Addr); isTimeout(err) {
			slow = hop
		} else {
			failed = err
		}
	}
	if !slow.Addr.IsValid() {
		return nil, failed
	}
	next, err := open(slow, 0)
	if err == nil {
		a.forget(slow.Addr)
	}
	return next, err
}

// unmade reports whether an error means that no connection came about: that nothing was sent on it.
func unmade(err error) bool {
	if _, ours := errors.AsType[identityError](err); ours {
		return false
	}
	stage, ok := errors.AsType[*hbone.StageError](err)
	return ok && (stage.Stage == hbone.StageDial || stage.Stage == hbone.StageTLS)
}
