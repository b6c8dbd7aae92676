package upstream

import (
	"slices"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/route"
)

// outlier is how an endpoint did lately. The mutex of its cluster guards it.
type outlier struct {
	errors, gateway, local uint32 // in a row
	times                  int    // it was ejected
}

// The defaults of outlier detection.
const (
	defaultConsecutive = 5
	defaultEjection    = 30 * time.Second
	maxEjection        = 300 * time.Second
	defaultMaxEjected  = 10 // per cent
	defaultInterval    = 10 * time.Second
)

// Result is how a try went, to outlier detection.
type Result struct {
	Status uint16 // 0: there was no response
	Local  bool   // there was no connection, or no response in time
}

// ResultOf is the result of a request's try.
func ResultOf(o route.Outcome) Result {
	if o.Reset == route.ResetNone {
		return Result{Status: o.Status}
	}
	return Result{Local: o.Reset != route.ResetProtocol}
}

// Observe counts how a try went, where a policy watches.
func (s *Search) Observe(to *Pick, r Result) {
	if to.host == nil || s.target.Settings.Outliers == nil {
		return
	}
	s.target.Cluster.observe(s.target.Settings.Outliers, s.members, to.host, r, time.Now())
}

// observe counts a result of a member, and ejects it if it has failed too often.
func (c *Cluster) observe(d *mesh.OutlierDetection, m *members, h *host, r Result, now time.Time) {
	failed, gateway := failure(d, r)
	c.mu.Lock()
	defer c.mu.Unlock()
	o := &h.outlier
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
	if d.SplitLocal && r.Local {
		eject = count(&o.local, true, d.ConsecutiveLocal, defaultConsecutive)
	} else {
		o.local = 0
		eject = count(&o.errors, failed, d.Consecutive5xx, defaultConsecutive)
		eject = count(&o.gateway, gateway, d.ConsecutiveGateway, 0) || eject
	}
	back := time.Unix(0, h.until.Load()) // the end of the last ejection
	if !eject || now.Before(back) || !mayEject(d, m, now) {
		return
	}
	interval := d.Interval
	if interval <= 0 {
		interval = defaultInterval
	}
	// Each interval in peace makes the next ejection shorter.
	o.times = max(0, o.times-int(min(now.Sub(back)/interval, time.Duration(o.times)))) + 1
	o.errors, o.gateway, o.local = 0, 0, 0
	base := d.BaseEjection
	if base <= 0 {
		base = defaultEjection
	}
	until := now.Add(min(base*time.Duration(o.times), max(maxEjection, base))).UnixNano()
	h.until.Store(until)
	for i := range c.members {
		if m := c.members[i].Load(); m != nil {
			m.worry(until)
		}
	}
	m.worry(until)
}

// failure says whether a result counts, and whether as that of a gateway, too. What failed here counts as 503.
func failure(d *mesh.OutlierDetection, r Result) (failed, gateway bool) {
	if r.Status == 0 {
		return true, true
	}
	if len(d.ErrorCodes) > 0 {
		failed = slices.Contains(d.ErrorCodes, r.Status)
	} else {
		failed = r.Status >= 500
	}
	return failed, r.Status >= 502 && r.Status <= 504
}

// mayEject: one endpoint always may be, more only up to a part of all.
func mayEject(d *mesh.OutlierDetection, m *members, now time.Time) bool {
	out := 0
	for _, h := range m.hosts {
		if h.until.Load() > now.UnixNano() {
			out++
		}
	}
	percent := int(d.MaxEjected)
	if percent == 0 {
		percent = defaultMaxEjected
	}
	return out+1 <= max(1, len(m.hosts)*percent/100)
}
