package translate

import (
	"fmt"
	"regexp"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// GRPCRoute returns the routes of a GRPCRoute, one for each rule, and what its status is to say; nil where none of its
// parents is in the mesh. A method is a path, and only requests of gRPC match.
func GRPCRoute(cfg Config, o *gatewayv1.GRPCRoute, c Catalogue) (Routing, *RouteStatus) {
	g := newGatewayRoute(cfg, c, mesh.KindGRPCRoute, &o.ObjectMeta)
	if !g.attach(o.Spec.ParentRefs) {
		return g.done()
	}
	g.hostnames(o.Spec.Hostnames)
	for i := range o.Spec.Rules {
		in := &o.Spec.Rules[i]
		n := g.notes(i)
		rule := gatewayv1.HTTPRouteRule{Filters: httpFilters(in.Filters), SessionPersistence: in.SessionPersistence}
		for _, ref := range in.BackendRefs {
			rule.BackendRefs = append(rule.BackendRefs, gatewayv1.HTTPBackendRef{BackendRef: ref.BackendRef, Filters: httpFilters(ref.Filters)})
		}
		out := g.httpRule(n, &rule)
		for j := range in.Matches {
			out.Matches = append(out.Matches, grpcMatch(n, fmt.Sprintf("matches[%d]", j), &in.Matches[j]))
		}
		if len(out.Matches) == 0 {
			out.Matches = []mesh.HTTPMatch{{GRPC: true}}
		}
		g.rule(n, i, in.Name, out, nil)
	}
	return g.done()
}

// httpFilters are the same filters as an HTTPRoute has them.
func httpFilters(list []gatewayv1.GRPCRouteFilter) (out []gatewayv1.HTTPRouteFilter) {
	for _, f := range list {
		out = append(out, gatewayv1.HTTPRouteFilter{
			Type: gatewayv1.HTTPRouteFilterType(f.Type), RequestHeaderModifier: f.RequestHeaderModifier,
			ResponseHeaderModifier: f.ResponseHeaderModifier, RequestMirror: f.RequestMirror, ExtensionRef: f.ExtensionRef,
		})
	}
	return out
}

func grpcMatch(n *ruleNotes, at string, m *gatewayv1.GRPCRouteMatch) mesh.HTTPMatch {
	out := mesh.HTTPMatch{GRPC: true}
	if m.Method != nil {
		out.Path = methodMatch(n, at+".method", m.Method)
	}
	seen := make(map[string]bool)
	for i, h := range m.Headers {
		name := strings.ToLower(string(h.Name))
		if seen[name] {
			continue // the first of a name counts
		}
		seen[name] = true
		out.Headers = appendNamed(n, fmt.Sprintf("%s.headers[%d]", at, i), out.Headers, name, string(valueOf(h.Type)), h.Value, true)
	}
	return out
}

// methodMatch is the path of a method, /service/method.
func methodMatch(n *ruleNotes, at string, m *gatewayv1.GRPCMethodMatch) mesh.PathMatch {
	const any = "[^/]+"
	service, method := valueOf(m.Service), valueOf(m.Method)
	if service == "" && method == "" {
		return mesh.PathMatch{}
	}
	switch t := valueOf(m.Type); t {
	case "", gatewayv1.GRPCMethodMatchExact:
		switch {
		case service == "":
			return mesh.PathMatch{Kind: mesh.PathRegex, Value: "/" + any + "/" + regexp.QuoteMeta(method)}
		case method == "":
			return mesh.PathMatch{Kind: mesh.PathPrefix, Value: "/" + service + "/"}
		}
		return mesh.PathMatch{Kind: mesh.PathExact, Value: "/" + service + "/" + method}
	case gatewayv1.GRPCMethodMatchRegularExpression:
		part := func(field, expr string) (string, bool) {
			if expr == "" {
				return any, true
			}
			return "(?:" + expr + ")", compiles(n, at+field, expr)
		}
		s, ok := part(".service", service)
		m, both := part(".method", method)
		if ok && both && compiles(n, at, "/"+s+"/"+m) {
			return mesh.PathMatch{Kind: mesh.PathRegex, Value: "/" + s + "/" + m}
		}
	default:
		n.refuse(at+".type", "%q is not known", t)
	}
	return mesh.PathMatch{}
}
