package authz

import (
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// list is the policies of one action in the order given, and an index over them. Most policies of a large mesh name
// their callers exactly, so a caller is compared only with those that name it and those that do not name callers; of these,
// many are about paths. All index lists hold ascending positions in policies.
type list struct {
	policies []policy

	any         []int32 // policies that can be told apart neither by the caller nor by the path
	byPath      paths   // of those that cannot be told apart by the caller
	byPrincipal map[mesh.Identity][]int32
	byAccount   map[mesh.ServiceAccount][]int32
	byNamespace map[string][]int32
}

// first returns the first policy that matches, or nil.
func (l *list) first(c *connection) *policy {
	best := len(l.policies)
	best = l.scan(l.any, best, c)
	if len(l.byPath.all) > 0 {
		best = l.scanPaths(best, c)
	}
	if c.known {
		if len(l.byPrincipal) > 0 {
			best = l.scan(l.byPrincipal[c.peer], best, c)
		}
		if len(l.byAccount) > 0 {
			best = l.scan(l.byAccount[mesh.ServiceAccount{Namespace: c.peer.Namespace, Name: c.peer.ServiceAccount}], best, c)
		}
		if len(l.byNamespace) > 0 {
			best = l.scan(l.byNamespace[c.peer.Namespace], best, c)
		}
	}
	if best == len(l.policies) {
		return nil
	}
	return &l.policies[best]
}

func (l *list) scanPaths(best int, c *connection) int {
	if c.http == nil {
		return l.scan(l.byPath.all, best, c)
	}
	for i := l.byPath.longest(c.http.Path); i >= 0; i = l.byPath.parent[i] {
		best = l.scan(l.byPath.on[i], best, c)
	}
	return best
}

// scan returns the first of candidates below best that matches, else best.
func (l *list) scan(candidates []int32, best int, c *connection) int {
	for _, i := range candidates {
		if int(i) >= best {
			return best
		}
		if l.policies[i].matches(c) {
			return int(i)
		}
	}
	return best
}

func (l *list) index() {
	l.byPrincipal = make(map[mesh.Identity][]int32)
	l.byAccount = make(map[mesh.ServiceAccount][]int32)
	l.byNamespace = make(map[string][]int32)
	var onPaths []int32
	byStart := make(map[string][]int32)
	for i := range l.policies {
		callers, ok := callersOf(&l.policies[i])
		if !ok {
			starts, ok := startsOf(&l.policies[i])
			if !ok {
				l.any = append(l.any, int32(i))
				continue
			}
			onPaths = append(onPaths, int32(i))
			for _, s := range starts {
				add(byStart, s, int32(i))
			}
			continue
		}
		for _, c := range callers {
			switch {
			case c.TrustDomain != "":
				add(l.byPrincipal, c, int32(i))
			case c.ServiceAccount != "":
				add(l.byAccount, mesh.ServiceAccount{Namespace: c.Namespace, Name: c.ServiceAccount}, int32(i))
			default:
				add(l.byNamespace, c.Namespace, int32(i))
			}
		}
	}
	l.byPath = indexPaths(onPaths, byStart)
}

func add[K comparable](m map[K][]int32, k K, i int32) {
	if on := m[k]; len(on) > 0 && on[len(on)-1] == i {
		return
	}
	m[k] = append(m[k], i)
}

// callersOf lists who p can possibly match; a part that is "" stands for any. ok is false when it may match a caller
// that is not listed. A policy without groups is listed nowhere, as it never matches.
func callersOf(p *policy) (callers []mesh.Identity, ok bool) {
	if p.invalid {
		return nil, false
	}
	for _, g := range p.groups {
		named, ok := callersOfGroup(g)
		if !ok {
			return nil, false
		}
		callers = append(callers, named...)
	}
	return callers, true
}

// callersOfGroup uses the first clause that names its callers: since all clauses must match, one is enough.
func callersOfGroup(g group) ([]mesh.Identity, bool) {
	for _, cl := range g {
		if named, ok := callersOfClause(cl); ok {
			return named, true
		}
	}
	return nil, false
}

func callersOfClause(cl clause) (callers []mesh.Identity, ok bool) {
	for i := range cl {
		named, ok := callersOfMatch(&cl[i].only)
		if !ok {
			return nil, false
		}
		callers = append(callers, named...)
	}
	return callers, true
}

func callersOfMatch(m *mesh.Match) ([]mesh.Identity, bool) {
	if ids, ok := exactPrincipals(m.Principals); ok {
		return ids, true
	}
	var ids []mesh.Identity
	for _, a := range m.ServiceAccounts {
		if a.Namespace == "" || a.Name == "" {
			return nil, false // "" would be read as any
		}
		ids = append(ids, mesh.Identity{Namespace: a.Namespace, ServiceAccount: a.Name})
	}
	if len(ids) > 0 {
		return ids, true
	}
	for _, n := range m.Namespaces {
		if n.Kind != mesh.MatchExact {
			return nil, false
		}
		ids = append(ids, mesh.Identity{Namespace: n.Value})
	}
	return ids, len(ids) > 0
}

func exactPrincipals(ms []mesh.StringMatch) ([]mesh.Identity, bool) {
	ids := make([]mesh.Identity, 0, len(ms))
	for _, m := range ms {
		id, ok := splitPrincipal(m.Value)
		if m.Kind != mesh.MatchExact || !ok {
			return nil, false
		}
		ids = append(ids, id)
	}
	return ids, len(ids) > 0
}

// splitPrincipal is the one Identity whose Principal is p. No part of a verified Identity holds a slash
// (mesh.ParseIdentity), so there is no other.
func splitPrincipal(p string) (mesh.Identity, bool) {
	parts := strings.Split(p, "/")
	if len(parts) != 5 || parts[1] != "ns" || parts[3] != "sa" || parts[0] == "" || parts[2] == "" || parts[4] == "" {
		return mesh.Identity{}, false
	}
	return mesh.Identity{TrustDomain: parts[0], Namespace: parts[2], ServiceAccount: parts[4]}, true
}
