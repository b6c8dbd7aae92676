package upstream

import (
	"container/heap"
	"context"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Bounds of health checks.
const (
	maxChecks   = 64                     // under way at a time; the others wait for their turn
	checksEvery = 100 * time.Millisecond // at most, it is looked whom to ask
)

// vitalsKey is what is asked: a port of an endpoint, on behalf of a service.
type vitalsKey struct {
	service, uid string
	port         uint16 // of the service; 0: one port stands for all, which the policy names
}

// vitals is what came of asking. Balancing reads it, the checker writes.
type vitals struct {
	failing atomic.Bool
	last    atomic.Pointer[checkDump] // nil: never asked
}

// checkDump is what came of it as /config_dump shows it.
type checkDump struct {
	Failing bool      `json:"failing"`
	Since   time.Time `json:"since"`
	At      time.Time `json:"at"`              // of the last check
	Error   string    `json:"error,omitempty"` // of that; "": it passed
}

// vitalsOf are those of the members of a target, by their place.
func (u *Pool) vitalsOf(t *Target, hosts []*host) []*vitals {
	key := vitalsKey{service: t.Service.Key(), port: t.port}
	if t.Settings.Health.Port != 0 {
		key.port = 0
	}
	out := make([]*vitals, len(hosts))
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, h := range hosts {
		key.uid = h.Workload.UID
		if u.vitals[key] == nil {
			u.vitals[key] = new(vitals)
		}
		out[i] = u.vitals[key]
	}
	return out
}

// keepVitals remembers those that are being asked for, and forgets those of endpoints that are gone.
func (u *Pool) keepVitals(want map[vitalsKey]asked, gone func(vitalsKey) bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for key, a := range want {
		u.vitals[key] = a.vitals
	}
	for key := range u.vitals {
		if _, wanted := want[key]; !wanted && gone(key) {
			delete(u.vitals, key)
		}
	}
}

// asked is an endpoint to be asked. It never changes.
type asked struct {
	to      Pick
	how     *mesh.HealthCheck
	service *mesh.Service
	http2   bool // instead of HTTP/1.1
	vitals  *vitals
}

// like reports whether it is the same to ask a or b.
func (a *asked) like(b *asked) bool {
	return a.to.endpoint.key == b.to.endpoint.key && a.service == b.service && a.http2 == b.http2 && a.vitals == b.vitals &&
		*a.to.Settings == *b.to.Settings
}

// check is an endpoint that is asked again and again.
type check struct {
	asked
	began  time.Time
	due    time.Time
	place  int                // in the queue; -1: it is not there
	cancel context.CancelFunc // of the one under way; nil: none is
	gone   bool               // nobody waits for the result any more
	row    uint32             // results in a row that are not what is known
}

// outcome is the result of a check.
type outcome struct {
	of  *check
	err error // nil: the endpoint is well
}

// Checker asks endpoints whether they are well, as policies say. The goroutine that runs it knows when whom to ask, and owns what
// has no lock; each check under way is another goroutine, of which there are only so many.
type Checker struct {
	up   *Pool
	log  *zap.Logger
	want func() map[vitalsKey]asked          // whom to ask now
	ask  func(context.Context, *asked) error // once

	wake   chan struct{} // has room for one: there is something new to look at
	done   chan outcome  // has room for all under way, so that none waits to end
	work   sync.WaitGroup
	active int
	checks map[vitalsKey]*check
	queue  checkQueue

	checkCounts
}

// NewChecker makes one that sends from an address, for the services that now tells of.
func NewChecker(up *Pool, from netip.Addr, now func() (v *View, concerns func(*mesh.Service) bool), log *zap.Logger) *Checker {
	w := wanting{now: now, up: up, from: netip.AddrPortFrom(from, 0)}
	c := &Checker{up: up, log: log, want: w.all, ask: up.ask}
	c.wake, c.done = make(chan struct{}, 1), make(chan outcome, maxChecks)
	c.checks, c.checkCounts = make(map[vitalsKey]*check), newCheckCounts()
	return c
}

// Look makes the checker find out whom to ask. It never waits.
func (c *Checker) Look() {
	select {
	case c.wake <- struct{}{}:
	default: // it will, anyway
	}
}

// Run asks until ctx is done. What was found out until then holds on.
func (c *Checker) Run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer c.work.Wait()
	defer cancel()
	timer := time.NewTimer(0)
	defer timer.Stop()
	stale, looked := true, time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
			stale = true
		case o := <-c.done:
			c.settle(o, time.Now())
		case <-timer.C:
		}
		now := time.Now()
		if stale && now.Sub(looked) >= checksEvery {
			c.refresh(now)
			stale, looked = false, now
		}
		c.start(ctx, now)
		rest := time.Hour
		if len(c.queue) > 0 && c.active < maxChecks {
			rest = c.queue[0].due.Sub(now)
		}
		if stale {
			rest = min(rest, looked.Add(checksEvery).Sub(now))
		}
		timer.Reset(rest)
	}
}

// start begins the checks that are due, as long as there is room.
func (c *Checker) start(ctx context.Context, now time.Time) {
	for c.active < maxChecks && len(c.queue) > 0 && !c.queue[0].due.After(now) {
		k := heap.Pop(&c.queue).(*check)
		ctx, cancel := context.WithTimeout(ctx, k.how.Timeout)
		k.began, k.cancel = now, cancel
		c.active++
		c.work.Go(func() {
			defer cancel()
			c.done <- outcome{k, c.ask(ctx, &k.asked)}
		})
	}
}

// settle takes a result in, and has the endpoint asked again in time.
func (c *Checker) settle(o outcome, now time.Time) {
	c.active--
	k := o.of
	if k.cancel = nil; k.gone {
		return
	}
	c.count(k, o.err)
	failing := k.vitals.failing.Load()
	if k.row++; failing == (o.err != nil) {
		k.row = 0
	}
	limit := k.how.Unhealthy
	if failing {
		limit = k.how.Healthy
	}
	d := checkDump{Failing: failing, Since: now, At: now}
	if last := k.vitals.last.Load(); last != nil {
		d.Since = last.Since
	}
	if o.err != nil {
		d.Error = o.err.Error()
	}
	if k.row >= limit {
		k.row = 0
		d.Failing, d.Since = !failing, now
		c.turn(k, o.err)
	}
	k.vitals.last.Store(&d)
	k.due = k.began.Add(k.how.Interval*9/10 + rand.N(k.how.Interval/5)) // so that they do not fall into step
	heap.Push(&c.queue, k)
}

// turn takes an endpoint out, because of err, or back.
func (c *Checker) turn(k *check, err error) {
	if k.vitals.failing.Swap(err != nil) == (err != nil) {
		return
	}
	log := c.log.With(zap.String("dst.service", k.service.Hostname), zap.String("dst.workload", k.to.Workload.Name),
		zap.Stringer("dst.addr", k.to.endpoint.key.addr))
	if err != nil {
		c.up.failing.Add(1)
		c.failing(k, 1)
		log.Warn("endpoint fails its health check", zap.Error(err))
		return
	}
	c.up.failing.Add(-1)
	c.failing(k, -1)
	log.Info("endpoint passes its health check or has none any more")
}

// refresh compares whom it asks with whom to ask.
func (c *Checker) refresh(now time.Time) {
	want := c.want()
	for key, k := range c.checks {
		a, ok := want[key]
		if ok && k.like(&a) {
			continue
		}
		next := &check{asked: a, due: k.due, row: k.row, place: -1}
		if k.gone = true; k.place >= 0 {
			heap.Remove(&c.queue, k.place)
		} else {
			k.cancel()
			next.due = now
		}
		delete(c.checks, key)
		if !ok || a.to.endpoint.key != k.to.endpoint.key || a.vitals != k.vitals { // what is known is another's
			c.turn(k, nil)
			k.vitals.last.Store(nil)
			continue
		}
		c.checks[key] = next
		heap.Push(&c.queue, next)
	}
	for key, a := range want {
		if c.checks[key] == nil {
			k := &check{asked: a, due: now.Add(rand.N(a.how.Interval)), place: -1}
			c.checks[key] = k
			heap.Push(&c.queue, k)
		}
	}
}

// checkQueue is a heap of checks by when they are due.
type checkQueue []*check

// Len implements heap.Interface.
func (q checkQueue) Len() int { return len(q) }

// Less implements heap.Interface.
func (q checkQueue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }

// Swap implements heap.Interface.
func (q checkQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].place, q[j].place = i, j
}

// Push implements heap.Interface.
func (q *checkQueue) Push(k any) {
	k.(*check).place = len(*q)
	*q = append(*q, k.(*check))
}

// Pop implements heap.Interface.
func (q *checkQueue) Pop() any {
	last := len(*q) - 1
	k := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	k.place = -1
	return k
}

// wanting finds out whom to ask: the endpoints of services that concern this waypoint, where a policy says so.
type wanting struct {
	now  func() (v *View, concerns func(*mesh.Service) bool)
	up   *Pool
	from netip.AddrPort    // whom a PROXY header names
	last map[*Cluster]bool // whose endpoints are asked
}

func (w *wanting) all() map[vitalsKey]asked {
	v, concerns := w.now()
	out, clusters := make(map[vitalsKey]asked), make(map[*Cluster]bool)
	for _, p := range v.Traffic {
		if p.Settings.Health == nil || p.Invalid != "" {
			continue
		}
		svc := v.Service(mesh.ServiceKey(p.Namespace, p.Hostname))
		if svc == nil || svc.LB.Mode == mesh.LBPassthrough || v.TrafficFor(svc) != p || !concerns(svc) {
			continue
		}
		for _, port := range svc.Ports {
			t := v.Target(w.up, ClusterKey{Service: svc.Key(), Port: port.ServicePort})
			if t == nil {
				continue
			}
			clusters[t.Cluster] = true
			w.members(out, t)
		}
	}
	for c := range w.last {
		c.checked.Store(clusters[c])
	}
	for c := range clusters {
		c.checked.Store(true)
	}
	w.last = clusters
	w.up.keepVitals(out, func(key vitalsKey) bool {
		svc := v.Service(key.service)
		if svc == nil || v.Workload(key.uid) == nil {
			return true
		}
		p := v.TrafficFor(svc)
		return p == nil || p.Settings.Health == nil
	})
	return out
}

// members adds those of a target.
func (w *wanting) members(out map[vitalsKey]asked, t *Target) {
	how := t.Settings.Health
	m := t.members(w.up, len(t.Service.VIPs) == 0 || t.Service.VIPs[0].Prefix.Addr().Is4())
	for i, h := range m.hosts {
		key := vitalsKey{t.Service.Key(), h.Workload.UID, t.port}
		a := asked{to: h.Pick, how: how, service: t.Service, vitals: m.vitals[i]}
		a.to.Settings = &t.Settings
		if a.http2 = t.App.HTTP2(); how.Port != 0 {
			key.port, a.http2 = 0, false
			at := h.endpoint.key
			at.addr = netip.AddrPortFrom(at.addr.Addr(), how.Port)
			a.to.endpoint = &endpoint{key: at}
		}
		if a.http2 = a.http2 || how.Protocol == mesh.HealthGRPC; w.from.Addr().IsValid() {
			a.to.from, a.to.dialled = w.from, a.to.endpoint.key.addr
		}
		if _, ok := out[key]; !ok {
			out[key] = a
		}
	}
}
