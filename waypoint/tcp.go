package waypoint

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/mistnet/mistnet/internal/lb"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/waypoint/route"
)

// course is how a connection goes on.
type course struct {
	pick
	settings mesh.TrafficSettings
	cluster  *cluster // nil: nothing is bounded or watched
	total    int      // endpoints of the service
}

// serveTCP carries a connection that is not HTTP. accept gives the client's end once the other is there; refuse is called
// instead when it cannot be.
func (t *tunnel) serveTCP(ctx context.Context, accept func() (relay.Conn, error), refuse func()) {
	r := &record{start: time.Now(), client: &t.client, to: &t.to, flags: "-"}
	defer t.rep.close(r)
	ctx, p := t.passages.enter(ctx, t, nil)
	defer t.passages.leave(p)
	c := t.courseTCP(r)
	if c == nil {
		refuse()
		return
	}
	dialling, cancel := context.WithTimeout(ctx, timeoutOf(&c.settings))
	defer cancel()
	if bounded(c.settings.Pool) {
		if err := c.cluster.enter(dialling, c.settings.Pool); err != nil {
			r.fail("UO", err.Error())
			refuse()
			return
		}
		defer c.cluster.leave()
	}
	c.endpoint.active.Add(1)
	defer c.endpoint.active.Add(-1)
	conn, err := t.up.dial(dialling, c.pick, t.header(), "")
	if d := c.settings.Outliers; d != nil && c.workload != nil && ctx.Err() == nil {
		result := result{status: 200}
		if err != nil {
			result.status, result.local = 0, true
		}
		c.cluster.observe(d, c.workload.UID, result, c.total, time.Now())
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
	r.ended(relay.Pump(ctx, down, conn, &r.bytes))
}

// courseTCP decides whether a connection may go through, and where to. With nil, r says why not.
func (t *tunnel) courseTCP(r *record) *course {
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
		return &course{pick: t.up.workload(w, t.to.addr)}
	}
	rule := v.table.MatchStream(t.to.service, t.to.port, &route.Stream{
		Destination: t.to.addr.Addr(), Source: t.client.addr.Addr(), Port: t.to.port, SourceNamespace: t.client.namespace(), SourceLabels: t.client.labels(),
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
	return t.pickTCP(v, b, r)
}

func (t *tunnel) pickTCP(v *view, b *route.Backend, r *record) *course {
	key, port := t.to.service, t.to.port
	if b.Ref.Hostname != "" {
		key = b.Ref.Service()
	}
	if b.Ref.Port != 0 {
		port = b.Ref.Port
	}
	r.cluster(key, b.Ref.Subset, port)
	svc := v.Service(key)
	if svc == nil {
		r.fail("NC", "cluster_not_found")
		return nil
	}
	r.service = svc
	var c course
	var ok bool
	if c.settings, ok = v.settings(svc, t.cfg.Namespace, b.Ref.Subset, port); !ok {
		r.fail("NC", "cluster_not_found")
		return nil
	}
	balance := t.balance(v, svc, port)
	c.total = len(balance.Endpoints)
	if h := hashOf(c.settings.Balancer); h != nil && h.SourceIP {
		sticks(&balance, t.client.addr.Addr().String())
	}
	if bounded(c.settings.Pool) || c.settings.Outliers != nil {
		c.cluster = t.up.cluster(clusterKey{key, port})
	}
	if d := c.settings.Outliers; d != nil {
		balance.Endpoints = c.cluster.healthy(d, balance.Endpoints, time.Now())
	}
	var err error
	if c.pick, err = t.up.choose(&balance, originated(&c.settings), nil); err != nil {
		r.fail("UH", err.Error())
		return nil
	}
	r.workload, r.upstream = c.workload, c.endpoint.key.addr
	return &c
}

// balance is how an endpoint of a service is chosen for this client.
func (t *tunnel) balance(v *view, svc *mesh.Service, port uint16) lb.Request {
	r := lb.Request{
		Service: svc, Endpoints: v.Endpoints(svc.Key()), From: v.self, Dst: netip.AddrPortFrom(t.to.addr.Addr(), port),
	}
	if svc.LB.Sticky && t.client.workload != nil {
		r.From = t.client.workload // who is to keep to one endpoint
	}
	return r
}

func timeoutOf(s *mesh.TrafficSettings) time.Duration {
	if s.Pool != nil && s.Pool.ConnectTimeout > 0 {
		return s.Pool.ConnectTimeout
	}
	return connectTimeout
}
