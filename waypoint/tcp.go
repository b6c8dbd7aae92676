package waypoint

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/waypoint/route"
)

// course is how a connection goes on.
type course struct {
	pick
	target *target // nil when a workload was asked for
	search search
	key    clusterKey // of the target
}

// serveTCP carries a connection that is not HTTP. accept gives the client's end once the other is there; refuse is called
// instead when it cannot be.
func (t *tunnel) serveTCP(ctx context.Context, accept func() (relay.Conn, error), refuse func()) {
	r := &record{start: time.Now(), client: &t.client, hostname: t.to.hostname, local: t.to.addr, sni: t.sni, flags: "-"}
	defer t.rep.close(r)
	ctx, p := t.passages.enter(ctx, t, nil)
	defer t.passages.leave(p)
	c := t.courseTCP(ctx, r)
	if c == nil {
		refuse()
		return
	}
	within := connectTimeout
	if c.target != nil {
		t.passages.lead(p, r.route, c.key, nil)
		p.recheck(t.state.load()) // they may have changed meanwhile
		within = c.target.connect
	}
	dialling, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if c.target != nil && bounded(&c.target.settings) {
		if err := c.target.cluster.enter(dialling, c.target.settings.Pool); err != nil {
			r.fail("UO", err.Error())
			refuse()
			return
		}
		defer c.target.cluster.leave()
	}
	c.endpoint.active.Add(1)
	defer c.endpoint.active.Add(-1)
	conn, err := t.up.dial(dialling, c.pick, t.header(), "")
	if err == nil && c.settings != nil && c.settings.Tunnel != nil {
		conn, err = ask(dialling, conn, c.settings.Tunnel)
	}
	if c.host != nil && c.target.settings.Outliers != nil && ctx.Err() == nil {
		result := result{status: 200}
		if err != nil {
			result.status, result.local = 0, true
		}
		c.target.cluster.observe(c.target.settings.Outliers, c.search.members, c.host, result, time.Now())
	}
	if err != nil {
		r.fail("UF", err.Error())
		refuse()
		return
	}
	down, err := accept()
	if err != nil {
		r.fail("DC", err.Error())
		_ = conn.Close()
		return
	}
	t.rep.open(r)
	ctx, stop := lifetime(ctx, c.limits(), &r.bytes)
	defer stop()
	noteEnd(r, relay.Pump(ctx, down, conn, &r.bytes))
}

// noteEnd notes how the joining of two connections ended.
func noteEnd(r *record, err error) {
	if err == nil {
		return
	}
	if changed, ok := errors.AsType[*policyChangedError](err); ok {
		r.fail("-", changed.details)
		return
	}
	switch err {
	case errTooOld:
		r.fail("DT", err.Error())
	case errIdle:
		r.fail("SI", err.Error())
	default:
		r.fail("UC", err.Error())
	}
}

// courseTCP decides whether a connection may go through, and where to. With nil, r says why not.
func (t *tunnel) courseTCP(ctx context.Context, r *record) *course {
	v := t.state.load()
	if d := t.authorize(v, nil); !d.ok {
		r.fail("-", d.details)
		return nil
	}
	if t.to.service == "" {
		w := v.Workload(t.to.uid)
		if w == nil {
			r.fail("UH", "no_healthy_upstream")
			return nil
		}
		r.workload, r.upstream = w, t.to.addr
		return &course{pick: t.up.workload(v.self, w, t.to.addr)}
	}
	rule := v.table.MatchStream(t.to.service, t.to.port, &route.Stream{
		SNI: t.sni, Destination: t.to.addr.Addr(), Source: t.client.Addr.Addr(), Port: t.to.port,
		SourceNamespace: t.client.Namespace(), SourceLabels: t.client.Labels(),
	})
	if rule == nil || rule.Refuse != 0 {
		r.fail("NR", "route_not_found")
		return nil
	}
	r.route = rule
	b, status := rule.Backend(rand.Uint32())
	if status != 0 {
		r.fail("NC", "cluster_not_found")
		return nil
	}
	return t.pickTCP(ctx, v, b, r)
}

func (t *tunnel) pickTCP(ctx context.Context, v *view, b *route.Backend, r *record) *course {
	key := t.to.cluster(b.Service, &b.Ref)
	r.cluster(key.service, key.subset, key.port)
	if d := t.authorizeLead(v, r.route, key, nil); !d.ok {
		r.fail("-", d.details)
		return nil
	}
	r.service = v.Service(key.service)
	c := course{target: v.target(t.up, t.cfg.Namespace, key), key: key}
	if c.target == nil {
		r.fail("NC", "cluster_not_found")
		return nil
	}
	hash := ""
	if c.target.hash != nil && c.target.hash.SourceIP {
		hash = t.client.Addr.Addr().String()
	}
	c.search.begin(t.up, c.target, &t.client, t.to.addr, hash)
	if c.target.service.Dynamic {
		host := askedHost(t.sni)
		if !c.target.service.Covers(host) {
			r.fail("NR", "route_not_found")
			return nil
		}
		var err error
		if c.search.at, err = c.target.locate(ctx, t.up, host); err != nil {
			r.fail("DF", "dns_resolution_failure{"+err.Error()+"}")
			return nil
		}
	}
	var ok bool
	if c.pick, ok = c.search.next(t.up, time.Now()); !ok {
		r.fail("UH", c.search.fault().Error())
		return nil
	}
	r.workload, r.upstream = c.workload, c.endpoint.key.addr
	return &c
}
