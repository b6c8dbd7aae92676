package route_test

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
	"github.com/mistnet/mistnet/waypoint/route"
)

// sent are the lines of one header of a request; of the first there is none.
var sent = [][]string{nil, {"a"}, {"b"}, {"a", "b"}, {"b", "a"}, {"a,b"}, {"a", "", "b"}, {"", "a"}, {""}, {"", ""}}

// linesOf makes a table of one match on a header, or without it.
func linesOf(t *testing.T, name string, without bool, m mesh.StringMatch) *route.Table {
	t.Helper()
	match := mesh.HTTPMatch{Headers: []mesh.NamedMatch{{Name: name, Match: m}}}
	if without {
		match.Headers, match.WithoutHeaders = nil, match.Headers
	}
	table, problems := route.Compile([]*mesh.Route{{
		Kind: mesh.KindVirtualService, Namespace: "shop", Name: "cart", Protocol: mesh.RouteHTTP,
		Parents: []mesh.RouteParent{{Namespace: "shop", Hostname: "cart"}},
		HTTP:    &mesh.HTTPRule{Matches: []mesh.HTTPMatch{match}, Backends: []mesh.Backend{{Weight: 1}}},
	}})
	if len(problems) != 0 {
		t.Fatal(problems)
	}
	return table
}

func withLines(name string, lines []string) *route.Request {
	h := headers{}
	if lines != nil {
		h[name] = strings.Join(lines, "\n")
	}
	return &route.Request{Path: "/", Port: 80, Header: h}
}

// TestHeadersInSeveralLines: what Envoy 1.40 answered to each of these, of a header it matches line by line and of one it joins, in
// HTTP/1.1 and in HTTP/2 alike. One sign for each of sent.
func TestHeadersInSeveralLines(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		kind             mesh.MatchKind
		value            string
		x, notX          string // of x: - is no match, Y is one
		accept, noAccept string
	}{
		{mesh.MatchExact, "a", "-Y-YY-YY--", "Y-Y--Y--YY", "-Y-----Y--", "Y-YYYYY-YY"},
		{mesh.MatchExact, "a,b", "-----Y----", "YYYYY-YYYY", "---Y-YY---", "YYY-Y--YYY"},
		{mesh.MatchExact, "b", "--YYY-Y---", "YY---Y-YYY", "--Y-------", "YY-YYYYYYY"},
		{mesh.MatchExact, "", "------YYYY", "-YYYYY----", "--------YY", "-YYYYYYY--"},
		{mesh.MatchPrefix, "a", "-Y-YYYYY--", "Y-Y-----YY", "-Y-Y-YYY--", "Y-Y-Y---YY"},
		{mesh.MatchPrefix, "b", "--YYY-Y---", "YY---Y-YYY", "--Y-Y-----", "YY-Y-YYYYY"},
		{mesh.MatchSuffix, "b", "--YYYYY---", "YY-----YYY", "--YY-YY---", "YY--Y--YYY"},
		{mesh.MatchSuffix, "a", "-Y-YY-YY--", "Y-Y--Y--YY", "-Y--Y--Y--", "Y-YY-YY-YY"},
		{mesh.MatchRegex, "a", "-Y-YY-YY--", "Y-Y--Y--YY", "-Y-----Y--", "Y-YYYYY-YY"},
		{mesh.MatchRegex, "a,b", "-----Y----", "YYYYY-YYYY", "---Y-YY---", "YYY-Y--YYY"},
		{mesh.MatchRegex, "a.*", "-Y-YYYYY--", "Y-Y-----YY", "-Y-Y-YYY--", "Y-Y-Y---YY"},
		{mesh.MatchRegex, ".*b", "--YYYYY---", "YY-----YYY", "--YY-YY---", "YY--Y--YYY"},
		{mesh.MatchRegex, ".*", "-YYYYYYYYY", "----------", "-YYYYYYYYY", "----------"},
		{mesh.MatchPresence, "", "-YYYYYYYYY", "Y---------", "-YYYYYYYYY", "Y---------"},
	} {
		for _, w := range []struct {
			name    string
			without bool
			want    string
		}{{"x", false, c.x}, {"x", true, c.notX}, {"Accept", false, c.accept}, {"accept", true, c.noAccept}} {
			table := linesOf(t, w.name, w.without, mesh.StringMatch{Kind: c.kind, Value: c.value})
			got := ""
			for _, lines := range sent {
				if rule, _ := table.Match("shop/cart", 80, withLines(strings.ToLower(w.name), lines)); rule != nil {
					got += "Y"
				} else {
					got += "-"
				}
			}
			if diff := cmp.Diff(w.want, got); diff != "" {
				t.Errorf("%v %q, %s, without: %v (-Envoy +got):\n%s", c.kind, c.value, w.name, w.without, diff)
			}
		}
	}
}

// TestJoinedLinesAreMatchedInPlace compares what is matched piece by piece with the same matched as one text.
func TestJoinedLinesAreMatchedInPlace(t *testing.T) {
	t.Parallel()
	g := gen{rand.New(rand.NewPCG(7, 11))}
	for range 20_000 {
		m := mesh.StringMatch{Kind: pick(g, mesh.MatchExact, mesh.MatchPrefix), Value: pick(g, "", "a", "a,", "a,b", "a,a,b", ",", ",a", "ab", "a,b,")}
		var lines, full []string
		for range 1 + g.IntN(4) {
			line := pick(g, "", "a", "b", "ab", "a,b", ",")
			if lines = append(lines, line); line != "" {
				full = append(full, line)
			}
		}
		rule, _ := linesOf(t, "via", false, m).Match("shop/cart", 80, withLines("via", lines))
		if want := dumbText(m, strings.Join(full, ",")); want != (rule != nil) {
			t.Fatalf("%v %q of %q: %v, want %v", m.Kind, m.Value, lines, rule != nil, want)
		}
	}
}

// TestSeveralLinesDoNotAllocate, but where an expression is for a header whose lines are one value.
func TestSeveralLinesDoNotAllocate(t *testing.T) {
	lines := []string{"a", "b", "c", "d"}
	for _, m := range []mesh.StringMatch{
		{Kind: mesh.MatchExact, Value: "a,b,c,d"}, {Kind: mesh.MatchPrefix, Value: "a,b"}, {Kind: mesh.MatchExact, Value: "d"},
		{Kind: mesh.MatchRegex, Value: "d"}, {Kind: mesh.MatchSuffix, Value: "d"}, {Kind: mesh.MatchPresence},
	} {
		for _, name := range []string{"x", "accept"} {
			if name == "accept" && (m.Kind == mesh.MatchRegex || m.Kind == mesh.MatchSuffix) {
				continue
			}
			if meshtest.Race && m.Kind == mesh.MatchRegex { // the pools of package regexp forget
				continue
			}
			table, r := linesOf(t, name, false, m), withLines(name, lines)
			if n := testing.AllocsPerRun(100, func() { table.Match("shop/cart", 80, r) }); n != 0 {
				t.Errorf("%v %q of %s: %v allocations, want none", m.Kind, m.Value, name, n)
			}
		}
	}
}

// TestManyLinesCostWhatTheyAre: who sends as many lines as fit is not looked at again and again for each of them.
func TestManyLinesCostWhatTheyAre(t *testing.T) {
	t.Parallel()
	h := &counting{headers: headers{"x": strings.Repeat("a\n", 99) + "b"}}
	table := linesOf(t, "x", false, mesh.StringMatch{Kind: mesh.MatchExact, Value: "b"})
	if rule, _ := table.Match("shop/cart", 80, &route.Request{Path: "/", Port: 80, Header: h}); rule == nil || h.asked != 100 {
		t.Errorf("100 lines: %d questions, rule %v", h.asked, rule)
	}
}

// counting counts the lines that are asked for.
type counting struct {
	headers
	asked int
}

func (c *counting) Next(name string, from int) (string, int) {
	c.asked++
	return c.headers.Next(name, from)
}
