package route_test

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/accesslog"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/route"
)

// headers is route.Header out of a map: several lines of one name are parted by a new line.
type headers map[string]string

// Fill knows of a request its headers only.
func (h headers) Fill(f *accesslog.Format) string {
	var b strings.Builder
	for _, p := range f.Parts {
		if p.Op == accesslog.Literal {
			b.WriteString(p.Text)
		} else if p.Op == accesslog.FromHeader {
			b.WriteString(h[f.Headers[p.At].Name])
		}
	}
	return b.String()
}

func (h headers) Value(name string) (string, bool) {
	v, ok := h[name]
	return strings.ReplaceAll(v, "\n", ","), ok
}

func (h headers) Next(name string, from int) (string, int) {
	v, ok := h[name]
	if !ok || from > len(v) {
		return "", -1
	}
	line, _, _ := strings.Cut(v[from:], "\n")
	return line, from + len(line) + 1
}

// candidate is one match of one route below a service, as the dumb matcher sees it.
type candidate struct {
	route   *mesh.Route
	match   mesh.HTTPMatch
	pos     int
	clients string
}

// candidates are all of them for a port of a service, in the order the package comment promises, found by sorting.
func candidates(routes []*mesh.Route, service string, port uint16) []candidate {
	var named, rest []candidate
	for _, r := range routes {
		for _, p := range r.Parents {
			if mesh.ServiceKey(p.Namespace, p.Hostname) != service {
				continue
			}
			matches := r.HTTP.Matches
			if len(matches) == 0 {
				matches = []mesh.HTTPMatch{{}}
			}
			for i, m := range matches {
				c := candidate{r, m, i, p.Clients}
				switch p.Port {
				case port:
					named = append(named, c)
				case 0:
					rest = append(rest, c)
				}
			}
		}
	}
	all := append(named, rest...)
	slices.SortStableFunc(all, func(a, b candidate) int {
		ga, gb := a.group(), b.group()
		if ga != gb {
			return ga - gb
		}
		if ga < 2 {
			pa, la := a.path()
			pb, lb := b.path()
			if n := cmp.Or(pa-pb, lb-la, isNil(a.match.Method)-isNil(b.match.Method),
				len(b.match.Headers)+len(b.match.WithoutHeaders)-len(a.match.Headers)-len(a.match.WithoutHeaders),
				len(b.match.QueryParams)-len(a.match.QueryParams)); n != 0 {
				return n
			}
		}
		return cmp.Or(a.route.Created.Compare(b.route.Created),
			strings.Compare(a.route.Namespace, b.route.Namespace), strings.Compare(a.route.Name, b.route.Name),
			int(a.route.Kind)-int(b.route.Kind), int(a.route.Rule)-int(b.route.Rule), a.pos-b.pos)
	})
	return all
}

func isNil(m *mesh.StringMatch) int {
	if m == nil {
		return 1
	}
	return 0
}

func (c candidate) group() int {
	if c.route.Kind == mesh.KindVirtualService {
		return 2
	}
	if c.clients != "" {
		return 0
	}
	return 1
}

func (c candidate) path() (kind, length int) {
	p := c.match.Path
	switch p.Kind {
	case mesh.PathExact:
		return 1, len(p.Value)
	case mesh.PathRegex:
		return 3, len(p.Value)
	case mesh.PathSegment:
		return 2, max(1, len(strings.TrimSuffix(p.Value, "/")))
	case mesh.PathPrefix:
		return 2, max(1, len(p.Value))
	}
	return 2, 1
}

func (c candidate) holds(r *route.Request) bool {
	m := c.match
	for _, t := range []struct {
		m *mesh.StringMatch
		v string
	}{{m.Method, r.Method}, {lowered(m.Scheme), strings.ToLower(r.Scheme)}, {lowered(m.Authority), strings.ToLower(r.Authority)}} {
		if t.m != nil && !dumbText(*t.m, t.v) {
			return false
		}
	}
	if !dumbPath(m.Path, r.Path) || m.Port != 0 && m.Port != r.Port || m.GRPC && !r.GRPC ||
		m.SourceNamespace != "" && m.SourceNamespace != r.SourceNamespace || c.clients != "" && c.clients != r.SourceNamespace {
		return false
	}
	for k, v := range m.SourceLabels {
		if got, ok := r.SourceLabels[k]; !ok || got != v {
			return false
		}
	}
	h := maps.Clone(r.Header.(headers))
	if h["host"] = r.Authority; r.Authority == "" {
		delete(h, "host")
	}
	for _, n := range m.Headers {
		if v, ok := h[n.Name]; !ok || !dumbLines(n.Match, v) {
			return false
		}
	}
	for _, n := range m.WithoutHeaders {
		if v, ok := h[n.Name]; (ok || n.Match.Kind != mesh.MatchPresence) && dumbLines(n.Match, v) {
			return false
		}
	}
	query, _ := url.ParseQuery(r.RawQuery)
	for _, n := range m.QueryParams {
		if !query.Has(n.Name) || !dumbText(n.Match, query.Get(n.Name)) && !dumbText(n.Match, asWritten(r.RawQuery, n.Name)) {
			return false
		}
	}
	return true
}

// asWritten is the first value of a parameter, with its escapes.
func asWritten(query, name string) string {
	for pair := range strings.SplitSeq(query, "&") {
		key, value, _ := strings.Cut(pair, "=")
		if plain, _ := url.QueryUnescape(key); plain == name {
			return value
		}
	}
	return ""
}

func lowered(m *mesh.StringMatch) *mesh.StringMatch {
	if m == nil || m.Kind == mesh.MatchRegex {
		return m
	}
	return &mesh.StringMatch{Kind: m.Kind, Value: strings.ToLower(m.Value)}
}

func dumbPath(m mesh.PathMatch, p string) bool {
	v := m.Value
	if m.IgnoreCase && m.Kind != mesh.PathRegex {
		v, p = strings.ToLower(v), strings.ToLower(p)
	}
	switch m.Kind {
	case mesh.PathExact:
		return v == p
	case mesh.PathPrefix:
		return strings.HasPrefix(p, v)
	case mesh.PathSegment:
		want := strings.FieldsFunc(v, func(r rune) bool { return r == '/' })
		got := strings.Split(strings.TrimPrefix(p, "/"), "/")
		return strings.HasPrefix(p, "/") && len(got) >= len(want) && slices.Equal(got[:len(want)], want)
	case mesh.PathRegex:
		return whole(v, p)
	}
	return true
}

// dumbLines is for headers of which any line will do.
func dumbLines(m mesh.StringMatch, v string) bool {
	return slices.ContainsFunc(strings.Split(v, "\n"), func(line string) bool { return dumbText(m, line) })
}

func dumbText(m mesh.StringMatch, v string) bool {
	switch m.Kind {
	case mesh.MatchExact:
		return v == m.Value
	case mesh.MatchPrefix:
		return strings.HasPrefix(v, m.Value)
	case mesh.MatchSuffix:
		return strings.HasSuffix(v, m.Value)
	case mesh.MatchRegex:
		return whole(m.Value, v)
	}
	return true
}

// expressions are the regexes of gen; sync.Map because tests run side by side.
var expressions sync.Map

func whole(expr, s string) bool {
	v, ok := expressions.Load(expr)
	if !ok {
		re := regexp.MustCompile(expr)
		re.Longest()
		v, _ = expressions.LoadOrStore(expr, re)
	}
	re := v.(*regexp.Regexp)
	loc := re.FindStringIndex(s)
	return loc != nil && loc[0] == 0 && loc[1] == len(s)
}

// gen makes random nouns out of few words, so that they meet.
type gen struct{ *rand.Rand }

func pick[T any](g gen, list ...T) T { return list[g.IntN(len(list))] }

func (g gen) one(in int) bool { return g.IntN(in) == 0 }

func (g gen) path() string {
	var b strings.Builder
	for range 1 + g.IntN(3) {
		b.WriteString("/" + pick(g, "a", "A", "ab", "b", "foo", "Foo", "foobar", ""))
	}
	return b.String()
}

func (g gen) text() mesh.StringMatch {
	v := pick(g, "", "a", "ab", "b", "a b")
	switch g.IntN(5) {
	case 0:
		return mesh.StringMatch{Kind: mesh.MatchPrefix, Value: v}
	case 1:
		return mesh.StringMatch{Kind: mesh.MatchRegex, Value: pick(g, ".*", "a.*", "a|b", "[ab]+")}
	case 2:
		return mesh.StringMatch{Kind: mesh.MatchPresence}
	case 3:
		return mesh.StringMatch{Kind: mesh.MatchSuffix, Value: v}
	}
	return mesh.StringMatch{Kind: mesh.MatchExact, Value: v}
}

func (g gen) named(odds int) []mesh.NamedMatch {
	if !g.one(odds) {
		return nil
	}
	return []mesh.NamedMatch{{Name: pick(g, "x", "y", "z", "host"), Match: g.text()}}
}

func (g gen) match() mesh.HTTPMatch {
	m := mesh.HTTPMatch{
		Path:    mesh.PathMatch{Kind: mesh.PathKind(g.IntN(5)), IgnoreCase: g.one(4)},
		Headers: g.named(4), WithoutHeaders: g.named(6), QueryParams: g.named(6), GRPC: g.one(10),
	}
	switch m.Path.Kind {
	case mesh.PathRegex:
		m.Path.Value = pick(g, "/.*", "/a.*", "/foo|/b", "/foo/(a|b)", ".*b", "(?i)/foo", "/a/?")
	case mesh.PathAny:
	case mesh.PathSegment:
		m.Path.Value = strings.ReplaceAll(g.path(), "//", "/")
		for strings.Contains(m.Path.Value, "//") {
			m.Path.Value = strings.ReplaceAll(m.Path.Value, "//", "/")
		}
	case mesh.PathExact, mesh.PathPrefix:
		m.Path.Value = g.path()
	}
	if g.one(4) {
		m.Method = &mesh.StringMatch{Kind: mesh.MatchExact, Value: pick(g, "GET", "POST")}
	}
	if g.one(8) {
		m.Authority = &mesh.StringMatch{Kind: mesh.MatchExact, Value: pick(g, "Shop", "cart")}
	}
	if g.one(8) {
		m.SourceLabels = map[string]string{"app": pick(g, "a", "b")}
	}
	if g.one(8) {
		m.SourceNamespace = pick(g, "ns1", "ns2")
	}
	if g.one(10) {
		m.Port = pick[uint16](g, 80, 81)
	}
	return m
}

func (g gen) routes(n int) []*mesh.Route {
	var rs []*mesh.Route
	for i := range n {
		r := &mesh.Route{
			Kind:      pick(g, mesh.KindVirtualService, mesh.KindHTTPRoute, mesh.KindGRPCRoute),
			Namespace: pick(g, "ns1", "ns2"), Name: pick(g, "x", "y", "z"), Rule: uint32(i), Protocol: mesh.RouteHTTP,
			Created: time.Unix(int64(g.IntN(3)), 0).UTC(), HTTP: &mesh.HTTPRule{},
			Parents: []mesh.RouteParent{{Namespace: "ns1", Hostname: "h", Port: pick[uint16](g, 0, 0, 80)}},
		}
		if g.one(3) && r.Kind != mesh.KindVirtualService {
			r.Parents[0].Clients = "ns2"
		}
		for range g.IntN(3) {
			r.HTTP.Matches = append(r.HTTP.Matches, g.match())
		}
		if len(r.HTTP.Matches) == 0 && !g.one(4) { // catch-alls end every story
			r.HTTP.Matches = append(r.HTTP.Matches, g.match())
		}
		rs = append(rs, r)
	}
	return rs
}

func (g gen) request() *route.Request {
	r := &route.Request{
		Method: pick(g, "GET", "POST", "OPTIONS"), Scheme: "http", Authority: pick(g, "shop", "SHOP", "cart"),
		Path: g.path(), Port: pick[uint16](g, 80, 81), SourceNamespace: pick(g, "ns1", "ns2", "ns3"),
		SourceLabels: map[string]string{"app": pick(g, "a", "b")}, GRPC: g.one(2), Header: headers{},
	}
	for _, name := range []string{"x", "y", "z"} {
		if g.one(2) {
			r.Header.(headers)[name] = pick(g, "", "a", "ab", "b", "a b", "a\nb", "b\n", "\nab\na")
		}
	}
	r.RawQuery = pick(g, "", "x=a", "x=a&y=b", "y=a+b&x", "%78=a%20b&x=b", "z=")
	return r
}

// TestMatchEqualsReadingFromTopToBottom compares the table with a matcher that sorts everything and tries each in turn.
// It also holds Compile to its word about hidden matches: a match it calls hidden never decides.
func TestMatchEqualsReadingFromTopToBottom(t *testing.T) {
	t.Parallel()
	decided, lost := 0, 0
	for seed := range uint64(150) {
		g := gen{rand.New(rand.NewPCG(seed, 7))}
		routes := g.routes(1 + g.IntN(20))
		table, problems := route.Compile(routes)
		hidden := make(map[string]bool)
		for _, p := range problems {
			if p.Kind != route.Hidden {
				t.Fatalf("seed %d: %v", seed, p)
			}
			hidden[fmt.Sprint(p.Route, p.Port, p.Match)] = true
			lost++
		}
		for range 60 {
			r := g.request()
			port := pick[uint16](g, 80, 81)
			got, _ := table.Match("ns1/h", port, r)
			all := candidates(routes, "ns1/h", port)
			i := slices.IndexFunc(all, func(c candidate) bool { return c.holds(r) })
			switch {
			case !slices.ContainsFunc(all, func(c candidate) bool {
				return (c.clients == "" || c.clients == r.SourceNamespace) && (c.match.Port == 0 || c.match.Port == r.Port)
			}):
				if got == nil || got.Route != nil {
					t.Fatalf("seed %d: without routes for the client and port Match = %v, want the default rule", seed, got)
				}
			case i < 0:
				if got != nil {
					t.Fatalf("seed %d: Match(%+v) = %s, want none", seed, r, got.Name())
				}
			case got == nil || got.Route != all[i].route:
				t.Fatalf("seed %d: Match(%+v) = %v, want %s", seed, r, got, all[i].route.Key())
			}
			if i < 0 {
				continue
			}
			decided++
			at := uint16(0)
			if slices.ContainsFunc(routes, func(x *mesh.Route) bool { return x.Parents[0].Port == port }) {
				at = port
			}
			key := all[i].route.Key()
			if hidden[fmt.Sprint(key, at, all[i].pos)] || hidden[fmt.Sprint(key, at, -1)] {
				t.Fatalf("seed %d: %s matches[%d] decides about %+v and was called hidden: %v", seed, key, all[i].pos, r, problems)
			}
		}
	}
	if decided < 2500 || lost < 250 {
		t.Errorf("%d requests were decided and %d matches hidden: the test is blind", decided, lost)
	}
}
