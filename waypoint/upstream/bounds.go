package upstream

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// ErrOverflow refuses what is beyond the bounds of a traffic policy.
var ErrOverflow = errors.New("overflow")

// ClusterKey is a port of a service, or of a subset of it: what is balanced, bounded and watched together.
type ClusterKey struct {
	Service string
	Subset  string
	Port    uint16
}

// Cluster is what outlasts views of one: who its members are and how they do, and what is under way to it.
type Cluster struct {
	members [2]atomic.Pointer[members] // by the family that clients dialled: IPv6, IPv4
	turn    atomic.Uint64              // of round robin
	used    atomic.Bool                // since the last look at whether it is
	checked atomic.Bool                // endpoints are asked whether they are well

	mu      sync.Mutex
	active  uint32
	waiting []chan struct{} // closed when their turn has come; the oldest first

	retries  uint32 // under way
	requests rate   // that began
	retried  rate
}

func (u *Pool) cluster(key ClusterKey) *Cluster {
	u.mu.Lock()
	defer u.mu.Unlock()
	c := u.clusters[key]
	if c == nil {
		c = &Cluster{}
		u.clusters[key] = c
	}
	return c
}

// forgettable reports that nothing is lost with a cluster that is not used.
func (c *Cluster) forgettable(now time.Time) bool {
	if c.used.Swap(false) || c.checked.Load() {
		return false
	}
	for i := range c.members {
		if m := c.members[i].Load(); m != nil && m.troubled.Load() > now.UnixNano() {
			return false
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.active == 0 && len(c.waiting) == 0 && c.retries == 0
}

// Bounded reports whether the policy has a bound that depends on what is under way.
func (t *Target) Bounded() bool {
	s := &t.Settings
	return s.RetryBudget != nil || s.Pool != nil && (s.Pool.MaxConnections > 0 || s.Pool.MaxRequests > 0)
}

// Enter begins a request or connection; Leave ends it. It waits, if it may, until a connection is free: HTTP/1.1 carries one
// request on each. p may be nil.
func (c *Cluster) Enter(ctx context.Context, p *mesh.ConnectionPool) error {
	var none mesh.ConnectionPool
	if p == nil {
		p = &none
	}
	c.mu.Lock()
	if p.MaxRequests > 0 && c.active+uint32(len(c.waiting)) >= p.MaxRequests {
		c.mu.Unlock()
		return ErrOverflow
	}
	if p.MaxConnections == 0 || c.active < p.MaxConnections {
		c.active++
		c.mu.Unlock()
		return nil
	}
	if p.MaxPending > 0 && uint32(len(c.waiting)) >= p.MaxPending {
		c.mu.Unlock()
		return ErrOverflow
	}
	turn := make(chan struct{})
	c.waiting = append(c.waiting, turn)
	c.mu.Unlock()
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
	}
	c.mu.Lock()
	i := slices.Index(c.waiting, turn)
	if i >= 0 {
		c.waiting = slices.Delete(c.waiting, i, i+1)
	}
	c.mu.Unlock()
	if i < 0 { // its turn came meanwhile
		c.Leave()
	}
	return ctx.Err()
}

// Leave ends what Enter began: whoever waits longest has his turn.
func (c *Cluster) Leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.waiting) > 0 {
		close(c.waiting[0])
		c.waiting = slices.Delete(c.waiting, 0, 1)
		return
	}
	c.active--
}

// The defaults of a retry budget.
const (
	defaultRetryPercent     = 20
	defaultRetryConcurrency = 3
)

// Begun counts a request for a retry budget.
func (c *Cluster) Begun(b *mesh.RetryBudget, now time.Time) {
	if b == nil || b.Interval == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests.add(now, b.Interval)
}

// Retry begins a retry, if the policy has room for one; RetryOver ends it. A budget stands instead of maxRetries.
func (c *Cluster) Retry(s *mesh.TrafficSettings, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch b := s.RetryBudget; {
	case b != nil && !c.within(b, now):
		return false
	case b == nil && s.Pool != nil && s.Pool.MaxRetries > 0 && c.retries >= s.Pool.MaxRetries:
		return false
	}
	c.retries++
	return true
}

// RetryOver ends what Retry began.
func (c *Cluster) RetryOver() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.retries--
}

// within spends one retry of a budget: a part of the requests, and a few in any case.
func (c *Cluster) within(b *mesh.RetryBudget, now time.Time) bool {
	part := float64(defaultRetryPercent) / 100
	if b.Percent.Denominator > 0 {
		part = float64(b.Percent.Numerator) / float64(b.Percent.Denominator)
	}
	few := b.MinConcurrency
	if few == 0 && b.MinRate == 0 {
		few = defaultRetryConcurrency
	}
	ok := float64(c.retries)+1 <= max(part*float64(c.active+uint32(len(c.waiting))), float64(few))
	interval := max(b.Interval, b.MinRateInterval, time.Second)
	if b.Interval > 0 {
		ok = c.retried.count(now, b.Interval)+1 <= part*c.requests.count(now, b.Interval) || c.retries < few
	}
	if !ok && b.MinRate > 0 {
		every := b.MinRateInterval
		if every == 0 {
			every = time.Second
		}
		ok = c.retried.count(now, every)+1 <= float64(b.MinRate)
	}
	if ok {
		c.retried.add(now, interval)
	}
	return ok
}

// rate counts what happened lately, in slots, of which the oldest is used again.
type rate struct {
	slots [rateSlots]float64
	slot  int64 // number of the newest
	width time.Duration
}

const rateSlots = 16

func (r *rate) turn(now time.Time, interval time.Duration) {
	width := max(interval/(rateSlots-1), 1)
	if r.width != width {
		*r = rate{width: width}
	}
	slot := now.UnixNano() / int64(width)
	for n := min(slot-r.slot, rateSlots); n > 0; n-- {
		r.slots[(slot-n+1)%rateSlots] = 0
	}
	r.slot = max(r.slot, slot)
}

// add counts one. Of different intervals only the longest must be added with.
func (r *rate) add(now time.Time, interval time.Duration) {
	r.turn(now, interval)
	r.slots[r.slot%rateSlots]++
}

// count is how often there was an add within the interval.
func (r *rate) count(now time.Time, interval time.Duration) float64 {
	if r.width == 0 {
		return 0
	}
	r.turn(now, r.width*(rateSlots-1))
	n := 0.0
	for back := range min(int64((interval+r.width-1)/r.width)+1, rateSlots) {
		n += r.slots[(r.slot-back)%rateSlots]
	}
	return n
}

// ClusterDump is a cluster as /config_dump shows it.
type ClusterDump struct {
	Service   string       `json:"service"`
	Subset    string       `json:"subset,omitempty"`
	Port      uint16       `json:"port"`
	Active    uint32       `json:"active"`  // requests and connections, where a bound counts them
	Waiting   int          `json:"waiting"` // for a connection
	Retries   uint32       `json:"retries"` // under way
	Endpoints []memberDump `json:"endpoints"`
}

type memberDump struct {
	Workload     string     `json:"workload"`
	Address      string     `json:"address"`
	Active       int64      `json:"active"` // from all clusters
	EjectedUntil *time.Time `json:"ejectedUntil,omitempty"`
	Check        *checkDump `json:"healthCheck,omitempty"`
}

// Dump is every cluster that is in use, in order.
func (u *Pool) Dump(now time.Time) []ClusterDump {
	u.mu.Lock()
	clusters := maps.Clone(u.clusters)
	u.mu.Unlock()
	all := make([]ClusterDump, 0, len(clusters))
	for key, c := range clusters {
		d := ClusterDump{Service: key.Service, Subset: key.Subset, Port: key.Port, Endpoints: []memberDump{}}
		c.mu.Lock()
		d.Active, d.Waiting, d.Retries = c.active, len(c.waiting), c.retries
		c.mu.Unlock()
		for i := range c.members {
			m := c.members[i].Load()
			if m == nil || len(d.Endpoints) > 0 { // those of one family are those of the other
				continue
			}
			for i, h := range m.hosts {
				e := memberDump{Workload: h.Workload.UID, Address: h.endpoint.key.addr.String(), Active: h.endpoint.active.Load()}
				if until := time.Unix(0, h.until.Load()).UTC(); until.After(now) {
					e.EjectedUntil = &until
				}
				if m.vitals != nil {
					e.Check = m.vitals[i].last.Load()
				}
				d.Endpoints = append(d.Endpoints, e)
			}
		}
		all = append(all, d)
	}
	slices.SortFunc(all, func(a, b ClusterDump) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Subset, b.Subset))
	})
	return all
}
