package translate

import (
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// TCPRoute returns the routes of a TCPRoute, one for each rule, and what its status is to say; nil where none of its parents
// is in the mesh.
func TCPRoute(cfg Config, o *gatewayv1.TCPRoute, c Catalogue) (Routing, *RouteStatus) {
	g := newGatewayRoute(cfg, c, mesh.KindTCPRoute, &o.ObjectMeta)
	if !g.attach(o.Spec.ParentRefs) {
		return g.done()
	}
	for i := range o.Spec.Rules {
		in := &o.Spec.Rules[i]
		n := g.notes(i)
		g.rule(n, i, in.Name, nil, &mesh.StreamRule{Backends: g.streamBackends(n, in.BackendRefs)})
	}
	return g.done()
}

// TLSRoute is TCPRoute for connections that begin with a TLS handshake: its hostnames are those that the client names there.
func TLSRoute(cfg Config, o *gatewayv1.TLSRoute, c Catalogue) (Routing, *RouteStatus) {
	g := newGatewayRoute(cfg, c, mesh.KindTLSRoute, &o.ObjectMeta)
	if !g.attach(o.Spec.ParentRefs) {
		return g.done()
	}
	for i := range o.Spec.Rules {
		in := &o.Spec.Rules[i]
		n := g.notes(i)
		match := mesh.StreamMatch{}
		for j, h := range o.Spec.Hostnames {
			name := strings.ToLower(string(h))
			if name == "" || strings.Contains(strings.TrimPrefix(name, "*"), "*") {
				n.refuse("", "hostnames[%d]: %q is neither a name nor *.suffix", j, h)
				continue
			}
			match.SNI = append(match.SNI, name)
		}
		if len(match.SNI) == 0 {
			match.SNI = []string{"*"}
		}
		g.rule(n, i, in.Name, nil, &mesh.StreamRule{Matches: []mesh.StreamMatch{match}, Backends: g.streamBackends(n, in.BackendRefs)})
	}
	return g.done()
}
