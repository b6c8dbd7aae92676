package route

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Problem is something the author of a route should know.
type Problem struct {
	Kind    ProblemKind
	Route   string // key of the rule
	Service string // key of the service below which it occurs; "": everywhere
	Port    uint16 // of the service; 0: those that no route names
	Match   int    // index of the match; -1: the whole rule
	By      string // key of the rule that comes first, when Kind is Hidden
	Reason  string // for people
}

// ProblemKind is what is wrong.
type ProblemKind uint8

// The kinds of problem.
const (
	Invalid ProblemKind = iota + 1 // the rule is not valid and refuses what it matches
	Hidden                         // the match is never reached: an earlier one takes all it would match
	Ignored                        // the rule has no effect
)

func (k ProblemKind) String() string {
	switch k {
	case Invalid:
		return "invalid"
	case Hidden:
		return "hidden"
	case Ignored:
		return "ignored"
	}
	return "unknown"
}

func (p Problem) String() string {
	s := p.Kind.String() + ": " + p.Route
	if p.Match >= 0 {
		s += fmt.Sprintf(" matches[%d]", p.Match)
	}
	if p.Service != "" {
		s += " for " + p.Service
		if p.Port != 0 {
			s += fmt.Sprintf(":%d", p.Port)
		}
	}
	return s + ": " + p.Reason
}

// HiddenRules says of the rules of which something is never reached, by their keys, what comes first.
func HiddenRules(routes []*mesh.Route) map[string][]string {
	_, problems := Compile(routes)
	hidden := make(map[string][]string)
	for _, p := range problems {
		if p.Kind == Hidden && !slices.Contains(hidden[p.Route], p.Reason) {
			hidden[p.Route] = append(hidden[p.Route], p.Reason)
		}
	}
	return hidden
}

func (c *compiler) problem(p Problem) { c.problems = append(c.problems, p) }

// sortProblems also drops those that the same rule has below several parents.
func (c *compiler) sortProblems() {
	slices.SortFunc(c.problems, func(a, b Problem) int {
		return cmp.Or(
			cmp.Compare(a.Route, b.Route), cmp.Compare(a.Service, b.Service), cmp.Compare(a.Port, b.Port),
			cmp.Compare(a.Match, b.Match), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.By, b.By), cmp.Compare(a.Reason, b.Reason),
		)
	})
	c.problems = slices.Compact(c.problems)
}

// maxComparisons bounds the search for hidden matches of one place. It finds all of them below a thousand matches on one
// path; beyond, it finds those that an early match hides.
const maxComparisons = 1 << 19

// hidden reports the matches that are never reached. A rule of which every match is hidden by others is reported once.
func (c *compiler) hidden(at place, s *Routes) {
	budget := maxComparisons
	by := make([]int, len(s.http))
	whole := make(map[*Rule]int) // matches not hidden
	for i := range s.http {
		by[i] = s.find.covering(s.http, i, &budget)
		if by[i] < 0 || s.http[by[i]].rule == s.http[i].rule {
			whole[s.http[i].rule]++
		}
	}
	for i := range s.http {
		if by[i] >= 0 {
			c.reportHidden(at, s.http[i].rule, s.http[by[i]].rule, s.http[i].pos, whole[s.http[i].rule] == 0)
		}
	}
	c.hiddenStreams(at, s.tls, &budget)
	c.hiddenStreams(at, s.tcp, &budget)
}

func (c *compiler) hiddenStreams(at place, list []streamEntry, budget *int) {
	by := make([]int, len(list))
	whole := make(map[*Rule]int) // matches not hidden
	for i := range list {
		by[i] = -1
		for j := 0; j < i && by[i] < 0 && *budget > 0; j++ {
			*budget--
			if list[j].covers(&list[i]) {
				by[i] = j
			}
		}
		if by[i] < 0 || list[by[i]].rule == list[i].rule {
			whole[list[i].rule]++
		}
	}
	for i := range list {
		if by[i] >= 0 {
			c.reportHidden(at, list[i].rule, list[by[i]].rule, list[i].pos, whole[list[i].rule] == 0)
		}
	}
}

func (c *compiler) reportHidden(at place, rule, by *Rule, pos int, whole bool) {
	p := Problem{
		Kind: Hidden, Route: rule.Route.Key(), Service: at.service, Port: at.port, Match: pos, By: by.Route.Key(),
		Reason: by.Route.Key() + " comes first and takes all of it",
	}
	if whole {
		p.Match = -1
	}
	c.problem(p)
}

// covering returns the first entry before i that takes everything i would match, or -1.
func (x *index) covering(entries []entry, i int, budget *int) int {
	p := &entries[i].cond.path
	best := int32(noMatch)
	try := func(positions []int32) {
		for _, j := range positions {
			if j >= min(int32(i), best) || *budget <= 0 {
				return
			}
			*budget--
			if entries[j].cond.covers(&entries[i].cond) {
				best = j
				return
			}
		}
	}
	key := p.value
	switch p.kind {
	case mesh.PathRegex:
		key = p.literal
	case mesh.PathSegment, mesh.PathAny:
		key += slash(key)
	case mesh.PathExact, mesh.PathPrefix:
	}
	folded := string(fold(nil, key))
	if p.kind == mesh.PathExact {
		try(x.foldExact[folded])
	}
	if p.kind == mesh.PathExact && !p.fold {
		try(x.exact[key])
	}
	if p.fold { // only a catch-all takes every spelling
		try(x.prefix.positions)
	} else {
		x.prefix.walk(key, try)
	}
	x.foldPrefix.walk(folded, try)
	if best != noMatch {
		return int(best)
	}
	return -1
}

// walk visits the positions of every prefix of key.
func (n *node) walk(key string, visit func([]int32)) {
	for {
		visit(n.positions)
		if key == "" {
			return
		}
		child := n.child(key)
		if child == nil {
			return
		}
		n, key = child, key[len(child.label):]
	}
}

// covers reports whether everything that matches d matches c. It may say no where a closer look would say yes.
func (c *conditions) covers(d *conditions) bool {
	return c.path.covers(&d.path) &&
		coversText(c.method, d.method) && coversText(c.scheme, d.scheme) && coversText(c.authority, d.authority) &&
		(c.port == 0 || c.port == d.port) &&
		(!c.grpc || d.grpc) &&
		(c.namespace == "" || c.namespace == d.namespace || c.namespace == d.clients) &&
		(c.clients == "" || c.clients == d.clients || c.clients == d.namespace) &&
		subset(c.labels, d.labels) &&
		subsetFields(c.headers, d.headers) && subsetFields(c.query, d.query) && subsetOfSame(c.without, d.without)
}

func (p *path) covers(q *path) bool {
	switch p.kind {
	case mesh.PathAny:
		return true
	case mesh.PathRegex:
		return q.kind == mesh.PathRegex && p.value == q.value || q.kind == mesh.PathExact && !q.fold && p.re.MatchString(q.value)
	case mesh.PathExact, mesh.PathPrefix, mesh.PathSegment:
	}
	if q.fold && !p.fold { // of q's paths, p takes only one spelling
		return false
	}
	switch q.kind {
	case mesh.PathExact:
		return p.match(q.value)
	case mesh.PathSegment, mesh.PathAny: // q.value and what follows a / behind it; OPTIONS * is too rare to tell them apart
		return p.kind == mesh.PathSegment && p.match(q.value+"/") || p.kind == mesh.PathPrefix && p.begins(q.value+slash(q.value))
	case mesh.PathPrefix:
		return p.kind == mesh.PathPrefix && p.begins(q.value) || p.kind == mesh.PathSegment && len(q.value) > len(p.value) && p.match(q.value)
	case mesh.PathRegex:
		return p.kind == mesh.PathPrefix && p.begins(q.literal) || p.kind == mesh.PathSegment && len(q.literal) > len(p.value) && p.match(q.literal)
	}
	return false
}

// slash is what every path of the segment prefix "" begins with.
func slash(value string) string {
	if value == "" {
		return "/"
	}
	return ""
}

func coversText(c, d *text) bool {
	return c == nil || d != nil && c.covers(d)
}

func (t *text) covers(u *text) bool {
	if t.kind == mesh.MatchPresence || t.kind == u.kind && t.value == u.value && t.fold == u.fold {
		return true
	}
	return u.kind == mesh.MatchExact && t.fold == u.fold && t.match(u.value)
}

func subset(c, d []label) bool {
	for _, l := range c {
		if !slices.Contains(d, l) {
			return false
		}
	}
	return true
}

// subsetFields reports whether each test of c is one of d, or is looser.
func subsetFields(c, d []field) bool {
	for i := range c {
		if !slices.ContainsFunc(d, func(f field) bool { return f.name == c[i].name && c[i].text.covers(&f.text) }) {
			return false
		}
	}
	return true
}

// subsetOfSame reports whether each test of c is one of d.
func subsetOfSame(c, d []field) bool {
	for i := range c {
		if !slices.ContainsFunc(d, func(f field) bool {
			return f.name == c[i].name && f.text.kind == c[i].text.kind && f.text.value == c[i].text.value
		}) {
			return false
		}
	}
	return true
}

func (e *streamEntry) covers(f *streamEntry) bool {
	if len(e.destinations) > 0 && !slices.Equal(e.destinations, f.destinations) ||
		len(e.sources) > 0 && !slices.Equal(e.sources, f.sources) ||
		e.port != 0 && e.port != f.port ||
		e.namespace != "" && e.namespace != f.namespace && e.namespace != f.clients ||
		e.clients != "" && e.clients != f.clients && e.clients != f.namespace ||
		!subset(e.labels, f.labels) {
		return false
	}
	if len(e.sni) == 0 {
		return true
	}
	for _, n := range f.sni {
		if !slices.ContainsFunc(e.sni, func(m string) bool { return m == n || sniMatch(m, n) }) {
			return false
		}
	}
	return len(f.sni) > 0
}

// literalPrefix is what everything begins with that a RE2 expression matches.
func literalPrefix(expr string) string {
	re, err := regexp.Compile(expr)
	if err != nil {
		return ""
	}
	literal, _ := re.LiteralPrefix()
	return literal
}
