package translate

import (
	"fmt"
	"regexp"
	"strings"
	"time"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// HTTPRoute returns the routes of an HTTPRoute, one for each rule, and what its status is to say; nil where none of its
// parents is in the mesh.
func HTTPRoute(cfg Config, o *gatewayv1.HTTPRoute, c Catalogue) (Routing, *RouteStatus) {
	g := newGatewayRoute(cfg, c, mesh.KindHTTPRoute, &o.ObjectMeta)
	if !g.attach(o.Spec.ParentRefs) {
		return g.done()
	}
	g.hostnames(o.Spec.Hostnames)
	for i := range o.Spec.Rules {
		in := &o.Spec.Rules[i]
		n := g.notes(i)
		out := g.httpRule(n, in)
		for j := range in.Matches {
			out.Matches = append(out.Matches, routeMatch(n, fmt.Sprintf("matches[%d]", j), &in.Matches[j]))
		}
		g.rule(n, i, in.Name, out, nil)
	}
	return g.done()
}

// hostnames: a service is known by its own.
func (g *gatewayRoute) hostnames(list []gatewayv1.Hostname) {
	if len(list) > 0 {
		g.add(Ignored, "hostnames: have no effect below a service, which is known by its own")
	}
}

// httpRule returns a rule without its matches.
func (g *gatewayRoute) httpRule(n *ruleNotes, in *gatewayv1.HTTPRouteRule) *mesh.HTTPRule {
	out := &mesh.HTTPRule{Persistence: persistence(n, in.SessionPersistence)}
	f := g.filters(n, "filters", in.Filters, true)
	out.Headers, out.Redirect, out.Rewrite, out.CORS, out.Mirrors = f.headers, f.redirect, f.rewrite, f.cors, f.mirrors
	if in.Retry == nil {
		out.Retry, out.TryTimeout = g.cfg.Retry, g.cfg.TryTimeout
	}
	if t := in.Timeouts; t != nil {
		out.Timeout = routeDuration(n, "timeouts.request", t.Request)
		if t.BackendRequest != nil {
			out.TryTimeout = routeDuration(n, "timeouts.backendRequest", t.BackendRequest)
		}
	}
	if r := in.Retry; r != nil {
		out.Retry = routeRetry(n, r)
	}
	for i := range in.BackendRefs {
		ref := &in.BackendRefs[i]
		at := fmt.Sprintf("backendRefs[%d]", i)
		b := mesh.Backend{Ref: g.backendRef(n, at, ref.BackendObjectReference), Weight: share(n, at, ref.Weight)}
		f := g.filters(n, at+".filters", ref.Filters, false)
		b.Headers, b.Redirect, b.Rewrite, b.Mirrors = f.headers, f.redirect, f.rewrite, f.mirrors
		if f.invalid != "" && b.Ref.Invalid == "" {
			b.Ref.Invalid = f.invalid
		}
		out.Backends = append(out.Backends, b)
	}
	return out
}

func routeMatch(n *ruleNotes, at string, m *gatewayv1.HTTPRouteMatch) (out mesh.HTTPMatch) {
	if m.Path != nil {
		out.Path = pathMatch(n, at+".path", m.Path)
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
	clear(seen)
	for i, q := range m.QueryParams {
		if seen[string(q.Name)] {
			continue
		}
		seen[string(q.Name)] = true
		out.QueryParams = appendNamed(n, fmt.Sprintf("%s.queryParams[%d]", at, i), out.QueryParams, string(q.Name), string(valueOf(q.Type)), q.Value, false)
	}
	if m.Method != nil {
		out.Method = &mesh.StringMatch{Kind: mesh.MatchExact, Value: string(*m.Method)}
	}
	return out
}

func pathMatch(n *ruleNotes, at string, p *gatewayv1.HTTPPathMatch) mesh.PathMatch {
	value := "/"
	if p.Value != nil {
		value = *p.Value
	}
	switch t := valueOf(p.Type); t {
	case "", gatewayv1.PathMatchPathPrefix:
		return mesh.PathMatch{Kind: mesh.PathSegment, Value: value}
	case gatewayv1.PathMatchExact:
		return mesh.PathMatch{Kind: mesh.PathExact, Value: value}
	case gatewayv1.PathMatchRegularExpression:
		if compiles(n, at+".value", value) {
			return mesh.PathMatch{Kind: mesh.PathRegex, Value: value}
		}
	default:
		n.refuse(at+".type", "%q is not known", t)
	}
	return mesh.PathMatch{}
}

// The types of a match of HTTPRoutes are those of GRPCRoutes too.
const (
	matchExact = string(gatewayv1.HeaderMatchExact)
	matchRegex = string(gatewayv1.HeaderMatchRegularExpression)
)

// appendNamed adds the test on a header or query parameter.
func appendNamed(n *ruleNotes, at string, list []mesh.NamedMatch, name, kind, value string, header bool) []mesh.NamedMatch {
	m := mesh.NamedMatch{Name: name, Match: mesh.StringMatch{Kind: mesh.MatchExact, Value: value}}
	switch kind {
	case "", matchExact:
	case matchRegex:
		m.Match.Kind = mesh.MatchRegex
		if !compiles(n, at+".value", value) {
			return list
		}
	default:
		n.refuse(at+".type", "%q is not known", kind)
		return list
	}
	if name == "" || header && !mesh.IsHeaderName(name) {
		n.refuse(at+".name", "%q is not the name of one", name)
		return list
	}
	return append(list, m)
}

// durationFormat is that of GEP-2257.
var durationFormat = regexp.MustCompile(`^([0-9]{1,5}(h|m|s|ms)){1,4}$`)

// routeDuration is 0 where there is none.
func routeDuration(n *ruleNotes, field string, d *gatewayv1.Duration) time.Duration {
	if d == nil {
		return 0
	}
	out, err := time.ParseDuration(string(*d))
	if err != nil || !durationFormat.MatchString(string(*d)) {
		n.refuse(field, "%q is not a duration such as 1m30s", *d)
		return 0
	}
	return out
}

// routeAttempts is how often a request is tried again where retry does not say.
const routeAttempts = 2

func routeRetry(n *ruleNotes, in *gatewayv1.HTTPRouteRetry) *mesh.Retry {
	out := &mesh.Retry{
		Attempts: routeAttempts, Backoff: routeDuration(n, "retry.backoff", in.Backoff),
		On: mesh.RetryOnConnectFailure | mesh.RetryOnRefusedStream | mesh.RetryOnUnavailable | mesh.RetryOnCancelled,
	}
	if in.Attempts != nil {
		out.Attempts = uint32(max(0, min(*in.Attempts, 1<<16)))
	}
	for i, code := range in.Codes {
		if code < 100 || code > 599 {
			n.refuse(fmt.Sprintf("retry.codes[%d]", i), "%d is not 100 to 599", code)
			continue
		}
		out.On |= mesh.RetryOnStatusCodes
		out.Codes = append(out.Codes, uint16(code))
	}
	return out
}

func persistence(n *ruleNotes, in *gatewayv1.SessionPersistence) *mesh.SessionPersistence {
	if in == nil {
		return nil
	}
	out := &mesh.SessionPersistence{Absolute: routeDuration(n, "sessionPersistence.absoluteTimeout", in.AbsoluteTimeout)}
	name := valueOf(in.SessionName)
	switch t := valueOf(in.Type); t {
	case "", gatewayv1.CookieBasedSessionPersistence:
		out.Cookie = name
		if c := in.CookieConfig; c != nil && valueOf(c.LifetimeType) == gatewayv1.PermanentCookieLifetimeType {
			if out.Absolute == 0 {
				n.note(Unsupported, "sessionPersistence.cookieConfig.lifetimeType", "Permanent needs an absoluteTimeout: the cookie is for the browser's session")
				break
			}
			out.Permanent = true
		}
	case gatewayv1.HeaderBasedSessionPersistence:
		if out.Header = strings.ToLower(name); out.Header == "" {
			out.Header = defaultSessionHeader
		}
		if !mesh.IsHeaderName(out.Header) {
			n.refuse("sessionPersistence.sessionName", "%q is not the name of a header", name)
			out.Header = ""
		}
	default:
		n.refuse("sessionPersistence.type", "%q is not known", t)
	}
	return out
}
