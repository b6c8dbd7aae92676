package route_test

import (
	"math/rand/v2"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/route"
)

// FuzzMatch lets a client choose all it can choose of a request. What the table says must equal reading from top to bottom.
func FuzzMatch(f *testing.F) {
	var tables []*route.Table
	var lists [][]*mesh.Route
	for seed := range uint64(8) {
		g := gen{rand.New(rand.NewPCG(seed, 3))}
		rs := g.routes(30)
		table, _ := route.Compile(rs)
		tables, lists = append(tables, table), append(lists, rs)
	}
	f.Add("GET", "shop", "/foo/a", "x=a&y=b", "a", "1S")
	f.Add("OPTIONS", "[::1]:80", "*", "%zz&%78=a+b", "", "99999999H")
	f.Add("POST", "SHOP:", "", "=&&x", "https://a", "0n")
	f.Fuzz(func(t *testing.T, method, authority, path, query, header, timeout string) {
		r := &route.Request{
			Method: method, Authority: authority, Path: path, RawQuery: query, Port: 80,
			Header: headers{"x": header, "origin": header, "access-control-request-method": header},
		}
		if d, ok := route.ParseGRPCTimeout(timeout); ok && d <= 0 {
			t.Errorf("ParseGRPCTimeout(%q) = %v", timeout, d)
		}
		plain := func(s string) bool { return strings.IndexFunc(s, func(r rune) bool { return r >= 0x80 }) < 0 }
		_, err := url.ParseQuery(query)
		comparable := err == nil && plain(path) && plain(authority) && plain(query)
		for i, table := range tables {
			got, at := table.Match("ns1/h", 80, r)
			if got != nil {
				b, _ := got.Backend(7)
				got.Rewrite(b, at, r)
			}
			if !comparable {
				continue
			}
			all := candidates(lists[i], "ns1/h", 80)
			j := slices.IndexFunc(all, func(c candidate) bool { return c.holds(r) })
			if j < 0 && got != nil && got.Route != nil || j >= 0 && (got == nil || got.Route != all[j].route) {
				t.Errorf("table %d: Match(%+v) = %v, want candidate %d", i, r, got, j)
			}
		}
	})
}

// FuzzLocation: whatever the client writes, a redirect is one line and leads where the rule says.
func FuzzLocation(f *testing.F) {
	var tables []*route.Table
	for _, d := range []mesh.Redirect{
		{Status: 301, Scheme: "https"},
		{Status: 302, Authority: "shop.example", PortFrom: mesh.RedirectPortRequest},
		{Status: 308, Path: mesh.PathEdit{Kind: mesh.ReplacePrefix, Value: "/x"}},
		{Status: 308, PortFrom: mesh.RedirectPortFixed, Port: 8443, Path: mesh.PathEdit{Kind: mesh.ReplaceRegex, Regex: "a+", Value: `<\0>`}},
	} {
		table, problems := route.Compile([]*mesh.Route{{
			Kind: mesh.KindHTTPRoute, Namespace: "a", Name: "b", Protocol: mesh.RouteHTTP,
			Parents: []mesh.RouteParent{{Namespace: "ns1", Hostname: "h"}}, HTTP: &mesh.HTTPRule{Redirect: &d},
		}})
		if len(problems) > 0 {
			f.Fatal(problems)
		}
		tables = append(tables, table)
	}
	f.Add("shop:80", "/a", "x=1")
	f.Add("[fd00::1]", "", "")
	f.Add("fd00::1", "//evil.example/", "")
	f.Fuzz(func(t *testing.T, authority, path, query string) {
		for i, table := range tables {
			r := &route.Request{Scheme: "http", Authority: authority, Path: path, RawQuery: query, Port: 8080}
			rule, at := table.Match("ns1/h", 80, r)
			loc := rule.Redirect.Location(at, r)
			if !strings.HasPrefix(loc, "http") || i == 0 && !strings.HasPrefix(loc, "https://") {
				t.Errorf("Location = %q", loc)
			}
			if i == 1 && !strings.HasPrefix(loc, "http://shop.example:8080/") {
				t.Errorf("Location = %q, want it at shop.example", loc)
			}
		}
	})
}
