package waypoint

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/mistnet/mistnet/waypoint/upstream"

	"github.com/mistnet/mistnet/waypoint/report"

	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/waypoint/route"
)

// course is how a connection goes on.
type course struct {
	upstream.Pick
	target *upstream.Target // nil when a workload was asked for
	search upstream.Search
	key    upstream.ClusterKey // of the target
}

// serveTCP carries a connection that is not HTTP. accept gives the client's end once the other is there; refuse is called
// instead when it cannot be.
func (t *tunnel) serveTCP(ctx context.Context, accept func() (relay.Conn, error), refuse func()) {
	r := &report.Record{Start: time.Now(), Client: &t.client, Hostname: t.to.hostname, Local: t.to.addr, SNI: t.sni, Flags: "-"}
	defer t.rep.Close(r)
	ctx, p := t.passages.enter(ctx, t, nil)
	defer t.passages.leave(p)
	c := t.courseTCP(ctx, r)
	if c == nil {
		refuse()
		return
	}
	within := upstream.ConnectTimeout
	if c.target != nil {
		t.passages.lead(p, r.Route, c.key, nil)
		p.recheck(t.state.load()) // they may have changed meanwhile
		within = c.target.Connect
	}
	dialling, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if c.target != nil && c.target.Bounded() {
		if err := c.target.Cluster.Enter(dialling, c.target.Settings.Pool); err != nil {
			r.Fail("UO", err.Error())
			refuse()
			return
		}
		defer c.target.Cluster.Leave()
	}
	c.Begin()
	defer c.End()
	conn, err := t.up.Dial(dialling, c.Pick, t.header(), "")
	if err == nil && c.Settings != nil && c.Settings.Tunnel != nil {
		conn, err = upstream.AskForward(dialling, conn, c.Settings.Tunnel)
	}
	if ctx.Err() == nil {
		result := upstream.Result{Status: 200}
		if err != nil {
			result.Status, result.Local = 0, true
		}
		c.search.Observe(&c.Pick, result)
	}
	if err != nil {
		r.Fail("UF", err.Error())
		refuse()
		return
	}
	down, err := accept()
	if err != nil {
		r.Fail("DC", err.Error())
		_ = conn.Close()
		return
	}
	t.rep.Open(r)
	ctx, stop := lifetime(ctx, c.Limits(), &r.Bytes)
	defer stop()
	noteEnd(r, relay.Pump(ctx, down, conn, &r.Bytes))
}

// noteEnd notes how the joining of two connections ended.
func noteEnd(r *report.Record, err error) {
	if err == nil {
		return
	}
	if changed, ok := errors.AsType[*policyChangedError](err); ok {
		r.Fail("-", changed.details)
		return
	}
	switch err {
	case errTooOld:
		r.Fail("DT", err.Error())
	case errIdle:
		r.Fail("SI", err.Error())
	default:
		r.Fail("UC", err.Error())
	}
}

// courseTCP decides whether a connection may go through, and where to. With nil, r says why not.
func (t *tunnel) courseTCP(ctx context.Context, r *report.Record) *course {
	v := t.state.load()
	if d := t.authorize(v, nil); !d.ok {
		r.Fail("-", d.details)
		return nil
	}
	if t.to.service == "" {
		w := v.Workload(t.to.uid)
		if w == nil {
			r.Fail("UH", "no_healthy_upstream")
			return nil
		}
		r.Workload, r.Upstream = w, t.to.addr
		return &course{Pick: t.up.Workload(v.Self, w, t.to.addr)}
	}
	rule := v.table.MatchStream(t.to.service, t.to.port, &route.Stream{
		SNI: t.sni, Destination: t.to.addr.Addr(), Source: t.client.Addr.Addr(), Port: t.to.port,
		SourceNamespace: t.client.Namespace(), SourceLabels: t.client.Labels(),
	})
	if rule == nil || rule.Refuse != 0 {
		r.Fail("NR", "route_not_found")
		return nil
	}
	r.Route = rule
	b, status := rule.Backend(rand.Uint32())
	if status != 0 {
		r.Fail("NC", "cluster_not_found")
		return nil
	}
	return t.pickTCP(ctx, v, b, r)
}

func (t *tunnel) pickTCP(ctx context.Context, v *view, b *route.Backend, r *report.Record) *course {
	key := t.to.cluster(b.Service, &b.Ref)
	r.Cluster(key.Subset, key.Port)
	if d := t.authorizeLead(v, r.Route, key, nil); !d.ok {
		r.Fail("-", d.details)
		return nil
	}
	r.Service = v.Service(key.Service)
	c := course{target: v.Target(t.up, key), key: key}
	if c.target == nil {
		r.Fail("NC", "cluster_not_found")
		return nil
	}
	hash := ""
	if c.target.Hash != nil && c.target.Hash.SourceIP {
		hash = t.client.Addr.Addr().String()
	}
	c.search.Begin(t.up, c.target, &t.client, t.to.addr, hash)
	if c.target.Service.Dynamic {
		host := upstream.HostOf(t.sni)
		if !c.target.Service.Covers(host) {
			r.Fail("NR", "route_not_found")
			return nil
		}
		if err := c.search.Locate(ctx, t.up, host); err != nil {
			r.Fail("DF", "dns_resolution_failure{"+err.Error()+"}")
			return nil
		}
	}
	var ok bool
	if c.Pick, ok = c.search.Next(t.up, time.Now()); !ok {
		r.Fail("UH", c.search.Fault().Error())
		return nil
	}
	r.Workload, r.Upstream = c.Workload, c.Addr()
	return &c
}
