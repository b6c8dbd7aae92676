package waypoint

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/route"
)

// errOverflow refuses what is beyond the bounds of a traffic policy.
var errOverflow = errors.New("overflow")

// clusterKey is a port of a service: what is bounded and watched together.
type clusterKey struct {
	service string
	port    uint16
}

// cluster counts what is under way to one, and remembers which of its endpoints fail. There is one only where a traffic
// policy asks for it.
type cluster struct {
	mu       sync.Mutex
	active   uint32
	waiting  []chan struct{} // closed when their turn has come; the oldest first
	outliers map[string]*outlier
}

// outlier is how an endpoint does, by its workload's UID.
type outlier struct {
	errors, gateway, local uint32 // in a row
	times                  int    // it was ejected
	until                  time.Time
}

// The defaults of outlier detection.
const (
	defaultConsecutive = 5
	defaultEjection    = 30 * time.Second
	maxEjection        = 300 * time.Second
	defaultMaxEjected  = 10 // per cent
)

func (u *upstreams) cluster(key clusterKey) *cluster {
	u.mu.Lock()
	defer u.mu.Unlock()
	c := u.clusters[key]
	if c == nil {
		c = &cluster{outliers: make(map[string]*outlier)}
		u.clusters[key] = c
	}
	return c
}

// bounded reports whether a pool has a bound on what is under way.
func bounded(p *mesh.ConnectionPool) bool {
	return p != nil && (p.MaxConnections > 0 || p.MaxRequests > 0)
}

// enter begins a request or connection; leave ends it. It waits, if it may, until a connection is free: HTTP/1.1 carries one
// request on each.
func (c *cluster) enter(ctx context.Context, p *mesh.ConnectionPool) error {
	c.mu.Lock()
	if p.MaxRequests > 0 && c.active+uint32(len(c.waiting)) >= p.MaxRequests {
		c.mu.Unlock()
		return errOverflow
	}
	if p.MaxConnections == 0 || c.active < p.MaxConnections {
		c.active++
		c.mu.Unlock()
		return nil
	}
	if p.MaxPending > 0 && uint32(len(c.waiting)) >= p.MaxPending {
		c.mu.Unlock()
		return errOverflow
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
		c.leave()
	}
	return ctx.Err()
}

func (c *cluster) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.waiting) > 0 {
		close(c.waiting[0])
		c.waiting = slices.Delete(c.waiting, 0, 1)
		return
	}
	c.active--
}

// result is how a try went, to outlier detection.
type result struct {
	status uint16 // 0: there was no response
	local  bool   // there was no connection, or no response in time
}

func resultOf(o route.Outcome) result {
	if o.Reset == route.ResetNone {
		return result{status: o.Status}
	}
	return result{local: o.Reset != route.ResetProtocol}
}

// observe counts a result, and ejects the endpoint if it has failed too often. total is how many endpoints there are.
func (c *cluster) observe(d *mesh.OutlierDetection, uid string, r result, total int, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.outliers[uid]
	failed, gateway := failure(d, r)
	if o == nil {
		if !failed && !gateway {
			return
		}
		o = new(outlier)
		c.outliers[uid] = o
	}
	count := func(n *uint32, failed bool, limit *uint32, fallback uint32) bool {
		if !failed {
			*n = 0
			return false
		}
		*n++
		most := fallback
		if limit != nil {
			most = *limit
		}
		return most > 0 && *n >= most
	}
	var eject bool
	if d.SplitLocal && r.local {
		eject = count(&o.local, true, d.ConsecutiveLocal, defaultConsecutive)
	} else {
		o.local = 0
		eject = count(&o.errors, failed, d.Consecutive5xx, defaultConsecutive)
		eject = count(&o.gateway, gateway, d.ConsecutiveGateway, 0) || eject
	}
	if !eject || now.Before(o.until) || !c.mayEject(d, total, now) {
		return
	}
	o.times++
	o.errors, o.gateway, o.local = 0, 0, 0
	base := d.BaseEjection
	if base <= 0 {
		base = defaultEjection
	}
	o.until = now.Add(min(base*time.Duration(o.times), max(maxEjection, base)))
}

// failure says whether a result counts, and whether as that of a gateway, too. What failed here counts as 503.
func failure(d *mesh.OutlierDetection, r result) (failed, gateway bool) {
	if r.status == 0 {
		return true, true
	}
	if len(d.ErrorCodes) > 0 {
		failed = slices.Contains(d.ErrorCodes, r.status)
	} else {
		failed = r.status >= 500
	}
	return failed, r.status >= 502 && r.status <= 504
}

// mayEject: one endpoint always may be, more only up to a part of all.
func (c *cluster) mayEject(d *mesh.OutlierDetection, total int, now time.Time) bool {
	out := 0
	for _, o := range c.outliers {
		if now.Before(o.until) {
			out++
		}
	}
	percent := int(d.MaxEjected)
	if percent == 0 {
		percent = defaultMaxEjected
	}
	return out+1 <= max(1, total*percent/100)
}

// healthy leaves out the endpoints that are ejected, unless too few would be left. It returns eps itself when none is.
func (c *cluster) healthy(d *mesh.OutlierDetection, eps []mesh.Endpoint, now time.Time) []mesh.Endpoint {
	c.mu.Lock()
	defer c.mu.Unlock()
	gone := func(ep mesh.Endpoint) bool {
		o := c.outliers[ep.Workload.UID]
		return o != nil && now.Before(o.until)
	}
	if !slices.ContainsFunc(eps, gone) {
		return eps
	}
	left := slices.DeleteFunc(slices.Clone(eps), gone)
	if uint32(len(left)*100) < d.MinHealthy*uint32(len(eps)) {
		return eps
	}
	return left
}
