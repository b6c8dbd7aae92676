package waypoint

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/mistnet/mistnet/internal/lb"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/waypoint/route"
)

// serveTCP carries a connection that is not HTTP. accept gives the client's end once the other is there; refuse is called
// instead when it cannot be.
func (t *tunnel) serveTCP(ctx context.Context, accept func() (relay.Conn, error), refuse func()) {
	r := &record{start: time.Now(), client: &t.client, to: &t.to, flags: "-"}
	defer t.rep.close(r)
	p, limit := t.routeTCP(r)
	if p.endpoint == nil {
		refuse()
		return
	}
	p.endpoint.active.Add(1)
	defer p.endpoint.active.Add(-1)
	dialling, cancel := context.WithTimeout(ctx, limit)
	conn, err := t.up.dial(dialling, p, t.header())
	cancel()
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
	if err := relay.Pump(ctx, down, conn, &r.bytes); err != nil {
		r.fail("UC", err.Error())
	}
}

// routeTCP decides whether a connection may go through, where to, and how long connecting may take. An empty pick: r says
// why not.
func (t *tunnel) routeTCP(r *record) (p pick, limit time.Duration) {
	v := t.state.load()
	request := t.request()
	if ok, details := v.authorize(&request); !ok {
		r.fail("-", details)
		return p, 0
	}
	if t.to.service == "" {
		w := v.Workload(t.to.uid)
		if w == nil {
			r.fail("UH", "no_healthy_upstream")
			return p, 0
		}
		r.workload, r.upstream = w, t.to.addr
		return t.up.workload(w, t.to.addr), connectTimeout
	}
	rule := v.table.MatchStream(t.to.service, t.to.port, &route.Stream{
		Destination: t.to.addr.Addr(), Source: t.client.addr.Addr(), Port: t.to.port, SourceNamespace: t.client.namespace(),
	})
	if rule == nil || rule.Refuse != 0 {
		r.fail("NR", "route_not_found")
		return p, 0
	}
	r.route = rule
	b, status := rule.Backend(rand.Uint32())
	if status != 0 {
		r.fail("NC", "cluster_not_found")
		return p, 0
	}
	p, limit, err := t.pickTCP(v, b, r)
	switch {
	case errors.Is(err, errNoCluster):
		r.fail("NC", "cluster_not_found")
	case err != nil:
		r.fail("UH", err.Error())
	default:
		r.workload, r.upstream = p.workload, p.endpoint.key.addr
	}
	return p, limit
}

var errNoCluster = errors.New("no such backend")

func (t *tunnel) pickTCP(v *view, b *route.Backend, r *record) (pick, time.Duration, error) {
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
		return pick{}, 0, errNoCluster
	}
	r.service = svc
	settings, ok := v.settings(svc, t.cfg.Namespace, b.Ref.Subset, port)
	if !ok {
		return pick{}, 0, errNoCluster
	}
	balance := t.balance(v, svc, port)
	p, err := t.up.choose(&balance, nil)
	return p, timeoutOf(&settings), err
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
