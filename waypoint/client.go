package waypoint

import (
	"cmp"
	"net/netip"
	"strings"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/route"
)

// client is who a tunnel was opened for: the one whose certificate was shown, or the workload a gateway speaks for.
type client struct {
	id       mesh.Identity
	addr     netip.AddrPort
	workload *mesh.Workload // nil: not known
	gateway  *speaker       // nil: the client speaks for itself
	told     *source        // what it says of itself, where workload is nil; for telemetry only. nil: nothing
}

// speaker is a gateway of the mesh that opened a tunnel for somebody else.
type speaker struct {
	id   mesh.Identity
	addr netip.AddrPort
}

func (c *client) namespace() string {
	if c.workload != nil {
		return c.workload.Namespace
	}
	return c.id.Namespace
}

func (c *client) labels() map[string]string {
	if c.workload == nil {
		return nil
	}
	return c.workload.Labels
}

// identify finds out who stands behind a certificate at an address, from what the CONNECT says. An address says less than a
// certificate, and a header less than either: of those who speak for others only the gateways that are trusted to are heard.
func (s *state) identify(v *view, c *client, h hbone.Header) {
	if w := v.WorkloadAt(mesh.NetworkAddr{Network: s.cfg.Network, Addr: c.addr.Addr()}); w != nil && w.Identity() == c.id {
		c.workload = w
	}
	network := cmp.Or(h.ForwardedNetwork, s.cfg.Network)
	if c.workload == nil && !strings.EqualFold(network, s.cfg.Network) {
		c.told = parseBaggage(h.Baggage) // a workload of another network, whose mesh may not be known here
	}
	from, ok := forwardedFor(h.Forwarded)
	if !ok || from.Addr() == c.addr.Addr() {
		return
	}
	w := v.WorkloadAt(mesh.NetworkAddr{Network: network, Addr: from.Addr()})
	switch {
	case c.workload == nil && w != nil && w.Identity() == c.id:
		c.workload, c.addr, c.told = w, from, nil // the tunnel came through a gateway that did not open it
	case s.mayForward(c):
		c.gateway = &speaker{c.id, c.addr}
		c.addr = from
		if w != nil {
			c.id, c.workload, c.told = w.Identity(), w, nil
		}
	}
}

// labelGateway is on the pods of a Gateway.
const labelGateway = "gateway.networking.k8s.io/gateway-name"

// mayForward reports whether a client may say for whom it speaks. A gateway may in this waypoint's own namespace, where who
// can start one can start this waypoint as well, and in the root namespace; elsewhere who was named to be trusted may.
func (s *state) mayForward(c *client) bool {
	if s.trusted[c.id] {
		return true
	}
	if c.workload == nil || c.id.TrustDomain != s.cfg.TrustDomain {
		return false
	}
	_, gateway := c.workload.Labels[labelGateway]
	return gateway && (c.id.Namespace == s.cfg.Namespace || c.id.Namespace == mesh.RootNamespace)
}

// forwardedFor is the address that a Forwarded header (RFC 7239) begins with: whoever came first.
func forwardedFor(h string) (netip.AddrPort, bool) {
	first, _, _ := strings.Cut(h, ",")
	for pair := range strings.SplitSeq(first, ";") {
		name, value, _ := strings.Cut(strings.TrimSpace(pair), "=")
		if !strings.EqualFold(name, "for") {
			continue
		}
		value = strings.Trim(value, `"`)
		if at, err := netip.ParseAddrPort(value); err == nil {
			return mesh.Unmap(at), true
		}
		addr, err := netip.ParseAddr(strings.Trim(value, "[]"))
		return netip.AddrPortFrom(addr.Unmap(), 0), err == nil
	}
	return netip.AddrPort{}, false
}

// source is what a workload says of itself in the baggage of a CONNECT.
type source struct{ workload, service, revision, namespace, cluster string }

// parseBaggage reads what ztunnels write (W3C Baggage). Only names that could be names of Kubernetes objects are taken.
func parseBaggage(h string) *source {
	if len(h) > 4096 {
		return nil
	}
	var s source
	for member := range strings.SplitSeq(h, ",") {
		member, _, _ = strings.Cut(member, ";") // properties
		key, value, _ := strings.Cut(member, "=")
		if value = strings.TrimSpace(value); !isName(value) {
			continue
		}
		switch strings.TrimSpace(key) {
		case "k8s.cluster.name":
			s.cluster = value
		case "k8s.namespace.name":
			s.namespace = value
		case "k8s.deployment.name", "k8s.cronjob.name", "k8s.pod.name", "k8s.job.name":
			s.workload = value
		case "service.name":
			s.service = value
		case "service.version":
			s.revision = value
		}
	}
	if s == (source{}) {
		return nil
	}
	return &s
}

// isName reports whether s could be a name or a label's value in Kubernetes.
func isName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for i := range len(s) {
		if c := s[i]; !unreserved(c) || c == '~' {
			return false
		}
	}
	return true
}

// authorize decides whether a connection, or a request if there is one, may go through by what v knows. Where a gateway speaks for
// the client, neither may be denied, and one of them must be let in: policies may mean either.
func (t *tunnel) authorize(v *view, http *authz.HTTP) verdict {
	return t.authorizeTo(v, t.to.service, t.to.port, http)
}

// authorizeTo is authorize for a port of another service.
func (t *tunnel) authorizeTo(v *view, service string, port uint16, http *authz.HTTP) verdict {
	r := authz.Request{Peer: t.client.id, Src: t.client.addr, Dst: netip.AddrPortFrom(t.to.addr.Addr(), port), HTTP: http}
	d := v.authorize(service, &r)
	if t.client.gateway == nil || d.denied {
		return d
	}
	r.Peer, r.Src = t.client.gateway.id, t.client.gateway.addr
	if other := v.authorize(service, &r); other.denied || !d.ok {
		return other
	}
	return d
}

// authorizeLead decides whether a rule may lead to another service what it was asked for. Who writes rules in the namespace of that service
// may. Those of others are not to bring anybody past its policies: its pods let this waypoint in, which stands before them.
func (t *tunnel) authorizeLead(v *view, rule *route.Rule, to clusterKey, http *authz.HTTP) verdict {
	if rule.Route == nil || to.service == t.to.service {
		return verdict{ok: true}
	}
	svc := v.Service(to.service)
	if svc == nil || svc.Namespace == rule.Route.Namespace || !t.state.serves(v, svc) {
		return verdict{ok: true}
	}
	return t.authorizeTo(v, to.service, to.port, http)
}
