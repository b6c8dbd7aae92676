package route

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Compile makes the table of all routes. Nothing of a route is looked at afterwards but what it is made of: the routes
// must not change. It never fails: what is wrong with a route is a Problem, and a rule that is not valid refuses the
// requests it would have matched.
func Compile(routes []*mesh.Route) (*Table, []Problem) {
	c := compiler{
		rules: make(map[*mesh.Route]*Rule, len(routes)), matches: make(map[*mesh.Route][]compiledMatch, len(routes)),
		invalid: make(map[*mesh.Route]bool),
	}
	parents := make(map[string][]attached)
	for _, r := range routes {
		for i := range r.Parents {
			p := &r.Parents[i]
			key := mesh.ServiceKey(p.Namespace, p.Hostname)
			parents[key] = append(parents[key], attached{r, p})
		}
		if len(r.Parents) == 0 {
			c.problem(Problem{Kind: Ignored, Route: r.Key(), Match: -1, Reason: "parents: names no service"})
		}
	}
	t := &Table{services: make(map[place]*Routes, len(parents))}
	for _, service := range slices.Sorted(maps.Keys(parents)) {
		all := parents[service]
		ports := map[uint16]bool{0: true}
		for _, a := range all {
			ports[a.parent.Port] = true
		}
		for _, port := range slices.Sorted(maps.Keys(ports)) {
			var here []attached
			for _, a := range all {
				if a.parent.Port == 0 || a.parent.Port == port {
					here = append(here, a)
				}
			}
			at := place{service, port}
			if len(here) > 0 || port == 0 && len(ports) > 1 {
				t.services[at] = c.routes(at, here)
			}
		}
	}
	c.sortProblems()
	return t, c.problems
}

// attached is a route below one of its parents.
type attached struct {
	route  *mesh.Route
	parent *mesh.RouteParent
}

type compiler struct {
	rules    map[*mesh.Route]*Rule
	matches  map[*mesh.Route][]compiledMatch
	invalid  map[*mesh.Route]bool
	problems []Problem
}

// routes builds the table of one place.
func (c *compiler) routes(at place, here []attached) *Routes {
	s := &Routes{}
	https := make([]ranked[entry], 0, len(here))
	var tls, tcp []ranked[streamEntry]
	for _, a := range here {
		rule := c.rule(a.route)
		switch a.route.Protocol {
		case mesh.RouteHTTP:
			for i, cond := range c.conditions(a.route) {
				cond.clients = a.parent.Clients
				e := &entry{rule: rule, cond: cond.conditions, at: cond.at, pos: i}
				https = append(https, ranked[entry]{e, rankHTTP(a, e)})
			}
		case mesh.RouteTLS, mesh.RouteTCP:
			for i, e := range streamEntries(a.route) {
				e.rule, e.clients, e.pos = rule, a.parent.Clients, i
				r := ranked[streamEntry]{&e, rankStream(a, &e)}
				if a.route.Protocol == mesh.RouteTLS {
					tls = append(tls, r)
				} else {
					tcp = append(tcp, r)
				}
			}
		case mesh.RouteProtocolUnknown:
		}
	}
	s.http, s.tls, s.tcp = inOrder(https), inOrder(tls), inOrder(tcp)
	for i := range s.http {
		s.find.add(i, &s.http[i].cond.path)
	}
	c.hidden(at, s)
	return s
}

// ranked is an entry and its place.
type ranked[E any] struct {
	entry *E
	rank  rank
}

// inOrder lays the entries side by side, the first first.
func inOrder[E any](list []ranked[E]) []E {
	slices.SortStableFunc(list, func(a, b ranked[E]) int { return a.rank.compare(&b.rank) })
	out := make([]E, len(list))
	for i := range list {
		out[i] = *list[i].entry
	}
	return out
}

// rank is the place of a match in the total order; see the package comment.
type rank struct {
	group   int // 0 consumer, 1 Gateway API, 2 VirtualService
	path    int // 0 exact, 1 prefix, 2 regex
	length  int // of the path
	method  bool
	headers int
	query   int
	route   *mesh.Route
	pos     int
}

func (r *rank) compare(o *rank) int {
	if n := cmp.Or(
		cmp.Compare(r.group, o.group),
		cmp.Compare(r.path, o.path),
		cmp.Compare(o.length, r.length),
		compareBool(r.method, o.method),
		cmp.Compare(o.headers, r.headers),
		cmp.Compare(o.query, r.query),
	); n != 0 {
		return n
	}
	if r.route == o.route {
		return cmp.Compare(r.pos, o.pos)
	}
	return cmp.Or(
		r.route.Created.Compare(o.route.Created),
		cmp.Compare(r.route.Namespace, o.route.Namespace),
		cmp.Compare(r.route.Name, o.route.Name),
		cmp.Compare(r.route.Kind, o.route.Kind),
		cmp.Compare(r.route.Rule, o.route.Rule),
		cmp.Compare(r.pos, o.pos),
	)
}

// compareBool puts true first.
func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}

func group(a attached) int {
	switch {
	case a.route.Kind == mesh.KindVirtualService:
		return 2
	case a.parent.Clients != "":
		return 0
	}
	return 1
}

func rankHTTP(a attached, e *entry) rank {
	r := rank{group: group(a), route: a.route, pos: e.pos}
	if r.group == 2 {
		return r
	}
	c := &e.cond
	switch c.path.kind {
	case mesh.PathExact:
		r.path, r.length = 0, len(c.path.value)
	case mesh.PathPrefix, mesh.PathSegment:
		r.path, r.length = 1, max(len(c.path.value), 1)
	case mesh.PathAny:
		r.path, r.length = 1, 1
	case mesh.PathRegex:
		r.path, r.length = 2, len(c.path.value)
	}
	r.method, r.headers, r.query = c.method != nil, len(c.headers)+len(c.without), len(c.query)
	return r
}

func rankStream(a attached, e *streamEntry) rank {
	r := rank{group: group(a), route: a.route, pos: e.pos}
	if a.route.Kind == mesh.KindTLSRoute {
		exact, length := e.longestSNI()
		r.length = length
		if !exact {
			r.path = 1
		}
	}
	return r
}

// compiledMatch is a mesh.HTTPMatch, ready to be matched.
type compiledMatch struct {
	conditions
	at Matched
}

// conditions compiles the matches of a route. What cannot be compiled is left out, which makes the match wider: the
// rule is invalid then and refuses.
func (c *compiler) conditions(r *mesh.Route) []compiledMatch {
	if out, ok := c.matches[r]; ok {
		return out
	}
	var matches []mesh.HTTPMatch
	if r.HTTP != nil {
		matches = r.HTTP.Matches
	}
	if len(matches) == 0 {
		matches = []mesh.HTTPMatch{{}}
	}
	out := make([]compiledMatch, len(matches))
	for i := range matches {
		m, err := compileMatch(&matches[i], r.Kind)
		if err != nil {
			c.refuse(r, fmt.Errorf("matches[%d].%w", i, err))
		}
		out[i] = m
	}
	c.matches[r] = out
	return out
}

func streamEntries(r *mesh.Route) []streamEntry {
	if r.Stream == nil || len(r.Stream.Matches) == 0 {
		return []streamEntry{{}}
	}
	out := make([]streamEntry, len(r.Stream.Matches))
	for i, m := range r.Stream.Matches {
		out[i] = compileStream(m)
	}
	return out
}

func compileMatch(m *mesh.HTTPMatch, kind mesh.RouteKind) (out compiledMatch, err error) {
	var errs []error
	fail := func(at string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", at, err))
		}
	}
	out.port, out.namespace, out.grpc, out.labels = m.Port, m.SourceNamespace, m.GRPC, compileLabels(m.SourceLabels)
	out.path, err = compilePath(m.Path)
	fail("path", err)
	out.at = Matched{Kind: out.path.kind, Name: m.Name}
	switch out.path.kind {
	case mesh.PathPrefix, mesh.PathSegment:
		out.at.Prefix = len(out.path.value)
	case mesh.PathAny: // the prefix / is what matched
		out.at.Kind = mesh.PathSegment
		if kind == mesh.KindVirtualService {
			out.at.Kind, out.at.Prefix = mesh.PathPrefix, 1
		}
	case mesh.PathExact, mesh.PathRegex:
	}
	for _, f := range []struct {
		name string
		from *mesh.StringMatch
		fold bool
		to   **text
	}{
		{"scheme", m.Scheme, true, &out.scheme},
		{"method", m.Method, false, &out.method},
		{"authority", m.Authority, true, &out.authority},
	} {
		if f.from == nil {
			continue
		}
		t, err := compileText(*f.from, f.fold)
		fail(f.name, err)
		if err == nil {
			*f.to = &t
		}
	}
	for _, f := range []struct {
		name   string
		from   []mesh.NamedMatch
		header bool
		to     *[]field
	}{
		{"headers", m.Headers, true, &out.headers},
		{"without_headers", m.WithoutHeaders, true, &out.without},
		{"query_params", m.QueryParams, false, &out.query},
	} {
		for i, n := range f.from {
			t, err := compileText(n.Match, false)
			if n.Name == "" {
				err = errors.New("name: is empty")
			}
			fail(fmt.Sprintf("%s[%d]", f.name, i), err)
			if err != nil {
				continue
			}
			joined := false
			if f.header {
				n.Name = strings.ToLower(n.Name)
				joined = oneValue(n.Name)
			}
			*f.to = append(*f.to, field{n.Name, t, joined})
		}
	}
	return out, errors.Join(errs...)
}

func compilePath(m mesh.PathMatch) (path, error) {
	p := path{kind: m.Kind, value: m.Value, fold: m.IgnoreCase}
	switch m.Kind {
	case mesh.PathAny:
		return path{}, nil
	case mesh.PathRegex:
		re, err := fullMatch(m.Value)
		if err != nil {
			return path{}, err
		}
		p.re, p.fold, p.literal = re, false, literalPrefix(m.Value)
		return p, nil
	case mesh.PathSegment:
		p.value = strings.TrimSuffix(p.value, "/")
	case mesh.PathExact, mesh.PathPrefix:
	default:
		return path{}, fmt.Errorf("kind: unknown value %d", m.Kind)
	}
	if p.fold {
		p.value = string(fold(nil, p.value))
	}
	return p, nil
}

func compileText(m mesh.StringMatch, folded bool) (text, error) {
	t := text{kind: m.Kind, value: m.Value, fold: folded}
	switch m.Kind {
	case mesh.MatchExact, mesh.MatchPrefix, mesh.MatchSuffix:
		if folded {
			t.value = string(fold(nil, t.value))
		}
		return t, nil
	case mesh.MatchPresence:
		return t, nil
	case mesh.MatchRegex:
		var err error
		t.re, err = fullMatch(m.Value)
		return t, err
	case mesh.MatchNever:
	}
	return t, fmt.Errorf("kind: unknown value %d", m.Kind)
}

func compileLabels(m map[string]string) []label {
	if len(m) == 0 {
		return nil
	}
	var out []label
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, label{k, m[k]})
	}
	return out
}
