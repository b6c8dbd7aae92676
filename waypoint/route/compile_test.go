package route_test

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/route"
)

// TestCompileRefusesWhatItDoesNotKnow: a table is made of nouns of any origin, and what it does not understand it refuses.
func TestCompileRefusesWhatItDoesNotKnow(t *testing.T) {
	t.Parallel()
	text := &mesh.StringMatch{Kind: 77}
	for name, tc := range map[string]struct {
		edit func(r *mesh.Route)
		why  string
	}{
		"a kind of route":       {func(r *mesh.Route) { r.Kind = 77 }, "kind: unknown value 77"},
		"no kind":               {func(r *mesh.Route) { r.Kind = 0 }, "kind: unknown value 0"},
		"no action":             {func(r *mesh.Route) { r.HTTP = nil }, "protocol: http does not fit"},
		"both actions":          {func(r *mesh.Route) { r.Stream = &mesh.StreamRule{} }, "protocol: http does not fit"},
		"a kind of path":        {func(r *mesh.Route) { r.HTTP.Matches[0].Path.Kind = 77 }, "matches[0].path: kind: unknown value 77"},
		"a kind of text":        {func(r *mesh.Route) { r.HTTP.Matches[0].Method = text }, "matches[0].method: kind: unknown value 77"},
		"a text that never is":  {func(r *mesh.Route) { r.HTTP.Matches[0].Scheme = new(mesh.StringMatch) }, "matches[0].scheme: kind"},
		"a header without name": {func(r *mesh.Route) { r.HTTP.Matches[0].Headers = []mesh.NamedMatch{{Match: *text}} }, "matches[0].headers[0]: name: is empty"},
		"a stray parenthesis": {
			func(r *mesh.Route) { r.HTTP.Matches[0].Path = mesh.PathMatch{Kind: mesh.PathRegex, Value: "a)|(b"} }, "matches[0].path: error parsing regexp",
		},
		"a kind of rewrite": {func(r *mesh.Route) { r.HTTP.Rewrite = &mesh.Rewrite{Path: mesh.PathEdit{Kind: 77}} }, "rewrite.path.kind: unknown value 77"},
		"a backslash at the end": {
			func(r *mesh.Route) {
				r.HTTP.Rewrite = &mesh.Rewrite{Path: mesh.PathEdit{Kind: mesh.ReplaceRegex, Regex: "a", Value: `b\`}}
			}, `rewrite.path.value: ends in a \`,
		},
		"a source of the port": {func(r *mesh.Route) { r.HTTP.Redirect = &mesh.Redirect{Status: 301, PortFrom: 77} }, "redirect.port_from: unknown value 77"},
		"a backend's redirect": {func(r *mesh.Route) { r.HTTP.Backends[0].Redirect = &mesh.Redirect{} }, "backends[0].redirect.status: 0"},
		"a backend's header": {
			func(r *mesh.Route) {
				r.HTTP.Backends[0].Headers.Response.Set = []mesh.Header{{Name: "x", Value: "a\nb"}}
			},
			"backends[0].headers.response.set: value of \"x\" holds a control character",
		},
		"an origin": {func(r *mesh.Route) { r.HTTP.CORS = &mesh.CORS{AllowOrigins: []mesh.StringMatch{*text}} }, "cors.allow_origins[0]: kind"},
		"weights that overflow": {
			func(r *mesh.Route) {
				r.HTTP.Backends = append(r.HTTP.Backends, mesh.Backend{Weight: math.MaxUint32}, mesh.Backend{Weight: math.MaxUint32})
			}, "backends: the weights add up",
		},
	} {
		r := &mesh.Route{
			Kind: mesh.KindHTTPRoute, Namespace: "shop", Name: "cart", Protocol: mesh.RouteHTTP,
			Parents: []mesh.RouteParent{{Namespace: "shop", Hostname: "cart"}},
			HTTP:    &mesh.HTTPRule{Matches: []mesh.HTTPMatch{{}}, Backends: []mesh.Backend{{Weight: 1}}},
		}
		tc.edit(r)
		table, problems := route.Compile([]*mesh.Route{r})
		if len(problems) != 1 || problems[0].Kind != route.Invalid || !strings.Contains(problems[0].Reason, tc.why) {
			t.Errorf("%s: problems %v, want one about %q", name, problems, tc.why)
			continue
		}
		rule, _ := table.Match("shop/cart", 80, &route.Request{Path: "/"})
		if rule == nil || rule.Refuse != 500 || rule.Why != problems[0].Reason {
			t.Errorf("%s: Match = %+v, want a rule that refuses with 500", name, rule)
		}
	}
}

func TestCompileSaysWhatHasNoEffect(t *testing.T) {
	t.Parallel()
	table, problems := route.Compile([]*mesh.Route{{Kind: mesh.KindHTTPRoute, Namespace: "a", Name: "b", Protocol: mesh.RouteHTTP, HTTP: &mesh.HTTPRule{}}})
	if len(problems) != 1 || problems[0].Kind != route.Ignored || len(table.List()) != 0 {
		t.Errorf("a route without parents: %v, %v", problems, table.List())
	}
	var none *route.Table
	if rule, _ := none.Match("a/b", 80, &route.Request{Path: "/"}); rule == nil || rule.Route != nil {
		t.Errorf("Match of no table = %v, want the default rule", rule)
	}
}

func TestParentsShareTheRule(t *testing.T) {
	t.Parallel()
	r := &mesh.Route{
		Kind: mesh.KindHTTPRoute, Namespace: "a", Name: "b", Protocol: mesh.RouteHTTP, HTTP: &mesh.HTTPRule{},
		Parents: []mesh.RouteParent{{Namespace: "a", Hostname: "x"}, {Namespace: "a", Hostname: "y", Port: 80}},
	}
	table, _ := route.Compile([]*mesh.Route{r})
	x, _ := table.Match("a/x", 1, &route.Request{Path: "/"})
	y, _ := table.Match("a/y", 80, &route.Request{Path: "/"})
	z, _ := table.Match("a/y", 81, &route.Request{Path: "/"})
	if x != y || x.Route != r || z.Route != nil {
		t.Errorf("rules are %v, %v and %v; want one rule for both parents, and none for another port", x, y, z)
	}
}

// TestBackoffStaysWithinItsBounds: longest ones must not overflow either.
func TestBackoffStaysWithinItsBounds(t *testing.T) {
	t.Parallel()
	for _, base := range []time.Duration{1, time.Millisecond, time.Hour, math.MaxInt64 / 3, math.MaxInt64} {
		table, _ := route.Compile([]*mesh.Route{{
			Kind: mesh.KindVirtualService, Namespace: "a", Name: "b", Protocol: mesh.RouteHTTP,
			Parents: []mesh.RouteParent{{Namespace: "a", Hostname: "x"}},
			HTTP:    &mesh.HTTPRule{Retry: &mesh.Retry{Attempts: 9, Backoff: base}},
		}})
		rule, _ := table.Match("a/x", 80, &route.Request{Path: "/"})
		for n := range uint32(40) {
			last := time.Duration(-1)
			for _, random := range []uint32{0, 1, 1 << 16, 1 << 31, math.MaxUint32} {
				d := rule.Retry.Backoff(n+1, random)
				if d < last || base < math.MaxInt64/10 && d > 10*base {
					t.Errorf("Backoff(%d, %d) of base %v = %v after %v", n+1, random, base, d, last)
				}
				last = d
			}
		}
	}
}

// TestHiddenRulesNameWhatComesFirst: the older of two that say the same, below every service.
func TestHiddenRulesNameWhatComesFirst(t *testing.T) {
	t.Parallel()
	rule := func(name string, born int64, path string) *mesh.Route {
		return &mesh.Route{
			Kind: mesh.KindVirtualService, Namespace: "shop", Name: name, Protocol: mesh.RouteHTTP, Created: time.Unix(born, 0),
			Parents: []mesh.RouteParent{{Namespace: "shop", Hostname: "api"}, {Namespace: "shop", Hostname: "cart"}},
			HTTP: &mesh.HTTPRule{Matches: []mesh.HTTPMatch{{Path: mesh.PathMatch{Kind: mesh.PathPrefix, Value: path}}},
				Direct: &mesh.DirectResponse{Status: 200}},
		}
	}
	got := route.HiddenRules([]*mesh.Route{rule("young", 2, "/a/b"), rule("old", 1, "/a"), rule("other", 3, "/b")})
	why := got["VirtualService/shop/young/http/0"]
	if len(got) != 1 || len(why) != 1 || !strings.Contains(why[0], "VirtualService/shop/old/http/0 comes first") {
		t.Errorf("hidden = %q, want young's rule alone, once, by old's", got)
	}
}
