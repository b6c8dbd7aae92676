package route_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/route"
)

// many makes n rules, each for a path of its own, of the kinds given in turn.
func many(n int, kinds ...mesh.PathKind) []*mesh.Route {
	var rs []*mesh.Route
	for i := range n {
		rs = append(rs, &mesh.Route{
			Kind: mesh.KindVirtualService, Namespace: "shop", Name: "cart", Rule: uint32(i), Protocol: mesh.RouteHTTP,
			Parents: []mesh.RouteParent{{Namespace: "shop", Hostname: "cart"}},
			HTTP: &mesh.HTTPRule{
				Matches: []mesh.HTTPMatch{{Path: mesh.PathMatch{
					Kind: kinds[i%len(kinds)], Value: fmt.Sprintf("/api/v1/resource-%d", i*7919%n),
				}}},
				Backends: []mesh.Backend{{Ref: mesh.BackendRef{Namespace: "shop", Hostname: "a"}, Weight: 1}},
			},
		})
	}
	return rs
}

// TestDecisionsDoNotAllocate is the budget of the request path.
func TestDecisionsDoNotAllocate(t *testing.T) {
	rs := many(1000, mesh.PathExact, mesh.PathPrefix, mesh.PathSegment)
	full := &mesh.Route{
		Kind: mesh.KindHTTPRoute, Namespace: "shop", Name: "full", Protocol: mesh.RouteHTTP,
		Parents: []mesh.RouteParent{{Namespace: "shop", Hostname: "cart"}},
		HTTP: &mesh.HTTPRule{
			Matches: []mesh.HTTPMatch{{
				Path:           mesh.PathMatch{Kind: mesh.PathRegex, Value: "/full/[a-z]+/.*"},
				Method:         &mesh.StringMatch{Kind: mesh.MatchExact, Value: "GET"},
				Authority:      &mesh.StringMatch{Kind: mesh.MatchSuffix, Value: ".EXAMPLE"},
				Headers:        []mesh.NamedMatch{{Name: "x-user", Match: mesh.StringMatch{Kind: mesh.MatchRegex, Value: "a.*"}}},
				WithoutHeaders: []mesh.NamedMatch{{Name: "x-not", Match: mesh.StringMatch{Kind: mesh.MatchPresence}}},
				QueryParams:    []mesh.NamedMatch{{Name: "q", Match: mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "1"}}},
				SourceLabels:   map[string]string{"app": "web"}, SourceNamespace: "web",
			}},
			Backends: []mesh.Backend{{Weight: 1}, {Weight: 2}},
			Fault:    &mesh.Fault{Delay: mesh.Delay{Percent: mesh.Fraction{Numerator: 1, Denominator: 2}, Fixed: 1}},
			CORS:     &mesh.CORS{AllowOrigins: []mesh.StringMatch{{Kind: mesh.MatchPresence}}},
			Headers:  mesh.HeaderEdits{Request: mesh.HeaderOps{Set: []mesh.Header{{Name: "a", Value: "b"}}}},
			Mirrors:  []mesh.Mirror{{Percent: mesh.Fraction{Numerator: 1, Denominator: 2}}},
		},
	}
	folded := &mesh.Route{
		Kind: mesh.KindVirtualService, Namespace: "shop", Name: "folded", Protocol: mesh.RouteHTTP,
		Parents: []mesh.RouteParent{{Namespace: "shop", Hostname: "cart"}},
		HTTP: &mesh.HTTPRule{Matches: []mesh.HTTPMatch{
			{Path: mesh.PathMatch{Kind: mesh.PathExact, Value: "/Folded", IgnoreCase: true}},
			{Path: mesh.PathMatch{Kind: mesh.PathPrefix, Value: "/FoldedPrefix/", IgnoreCase: true}},
		}},
	}
	tls := &mesh.Route{
		Kind: mesh.KindTLSRoute, Namespace: "shop", Name: "tls", Protocol: mesh.RouteTLS,
		Parents: []mesh.RouteParent{{Namespace: "shop", Hostname: "cart"}},
		Stream:  &mesh.StreamRule{Matches: []mesh.StreamMatch{{SNI: []string{"*.example"}}}, Backends: []mesh.Backend{{Weight: 1}}},
	}
	table, problems := route.Compile(append(rs, full, folded, tls))
	for _, p := range problems {
		if p.Kind != route.Hidden {
			t.Fatal(p)
		}
	}
	h := headers{"x-user": "ann", "origin": "https://a.example"}
	for name, r := range map[string]*route.Request{
		"exact":                        {Path: "/api/v1/resource-0"},
		"prefix":                       {Path: "/api/v1/resource-919/items"},
		"folded exact":                 {Path: "/FOLDED"},
		"folded prefix":                {Path: "/FOLDEDprefix/a"},
		"no rule":                      {Path: "/nothing"},
		"regex and every condition":    {Method: "GET", Authority: "shop.example", Path: "/full/of/it", RawQuery: "a=b&q=12", Header: h, SourceNamespace: "web", SourceLabels: map[string]string{"app": "web"}},
		"long path, none ignores case": {Path: strings.Repeat("/a", 500)},
	} {
		var hit *route.Rule
		if n := testing.AllocsPerRun(200, func() {
			rule, at := table.Match("shop/cart", 80, r)
			if hit = rule; rule == nil || rule.Refuse != 0 {
				return
			}
			b, _ := rule.Backend(1 << 31)
			rule.Fault(1, 1, false)
			if r.Header != nil {
				rule.CORS.Decide(r)
			}
			rule.Rewrite(b, at, r)
			rule.Timeouts("100m")
			rule.Retry.Retriable(route.Outcome{Status: 503})
			rule.Retry.Backoff(2, 77)
		}); n != 0 {
			t.Errorf("%s: %v allocations, want none", name, n)
		}
		if none := strings.Contains(name, "no"); (hit == nil) != none {
			t.Errorf("%s: rule %v: the measurement is of something else", name, hit)
		}
	}
	s := &route.Stream{SNI: "A.example", Port: 80}
	if n := testing.AllocsPerRun(200, func() { table.MatchStream("shop/cart", 80, s) }); n != 0 {
		t.Errorf("stream: %v allocations, want none", n)
	}
}

// BenchmarkMatch shows that a thousand rules cost what one does.
func BenchmarkMatch(b *testing.B) {
	for _, kind := range []mesh.PathKind{mesh.PathExact, mesh.PathPrefix, mesh.PathSegment} {
		for _, n := range []int{1, 1000} {
			b.Run(fmt.Sprintf("%v/%d", kind, n), func(b *testing.B) {
				table, _ := route.Compile(many(n, kind))
				r := &route.Request{Method: "GET", Path: "/api/v1/resource-0", Port: 80}
				routes := table.Lookup("shop/cart", 80)
				for b.Loop() {
					if rule, _ := routes.Match(r); rule == nil {
						b.Fatal("no rule")
					}
				}
			})
		}
	}
}

// BenchmarkCompile is what one change of configuration costs.
func BenchmarkCompile(b *testing.B) {
	rs := many(10_000, mesh.PathExact, mesh.PathPrefix)
	for b.Loop() {
		route.Compile(rs)
	}
}
