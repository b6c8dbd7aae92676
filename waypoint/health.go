package waypoint

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

// observe counts how a try went, where a policy watches.
func (s *search) observe(to *pick, r result) {
	if to.host == nil || s.target.settings.Outliers == nil {
		return
	}
	s.target.cluster.observe(s.target.settings.Outliers, s.members, to.host, r, time.Now())
}

// observe counts a result of a member, and ejects it if it has failed too often.
func (c *cluster) observe(d *mesh.OutlierDetection, m *members, h *host, r result, now time.Time) {
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
	if d.SplitLocal && r.local {
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
