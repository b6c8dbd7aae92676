package explain

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// unseenCallers are the policies that ask pods who their callers are, while those come through a waypoint: pods see its identity
// alone, and the policies do not speak of it. A policy with targetRefs is the waypoint's, and one that names the waypoint is
// about just that.
func (m *Mesh) unseenCallers() (all []Problem) {
	said := make(map[string]bool)
	for _, key := range slices.Sorted(maps.Keys(m.nouns.Workloads)) {
		w := m.nouns.Workloads[key]
		for _, at := range w.Services {
			svc := m.nouns.Services[at.Service]
			if svc == nil || svc.Waypoint.Hostname == "" {
				continue
			}
			name, _, _ := strings.Cut(svc.Waypoint.Hostname, ".")
			waypoint := mesh.Identity{TrustDomain: w.TrustDomain, Namespace: svc.Waypoint.Namespace, ServiceAccount: name}
			for _, policy := range w.Policies {
				p := m.nouns.Policies[policy]
				if p == nil || p.Scope != mesh.ScopeWorkload || said[policy] || !asksForOthers(p, waypoint) {
					continue
				}
				said[policy] = true
				all = append(all, Problem{
					Object: "AuthorizationPolicy " + policy, Reason: "BehindWaypoint",
					What: fmt.Sprintf("none of its sources is waypoint %s/%s, and whoever calls Service %s/%s comes as that one: "+
						"name the Service by targetRefs, instead of selector, to have the waypoint judge its callers",
						waypoint.Namespace, name, svc.Namespace, svc.Name),
				})
			}
		}
	}
	return all
}

// asksForOthers reports whether a policy lists callers, and never the one that is given.
func asksForOthers(p *mesh.Policy, caller mesh.Identity) bool {
	lists := false
	for _, g := range p.Groups {
		for _, c := range g.Clauses {
			for _, m := range c.Matches {
				if len(m.Principals)+len(m.Namespaces)+len(m.ServiceAccounts) == 0 {
					continue
				}
				lists = true
				if matchesAny(m.Principals, strings.TrimPrefix(caller.String(), "spiffe://")) || matchesAny(m.Namespaces, caller.Namespace) ||
					slices.Contains(m.ServiceAccounts, mesh.ServiceAccount{Namespace: caller.Namespace, Name: caller.ServiceAccount}) {
					return false
				}
			}
		}
	}
	return lists
}

func matchesAny(ms []mesh.StringMatch, text string) bool {
	return slices.ContainsFunc(ms, func(m mesh.StringMatch) bool {
		switch m.Kind {
		case mesh.MatchExact:
			return text == m.Value
		case mesh.MatchPrefix:
			return strings.HasPrefix(text, m.Value)
		case mesh.MatchSuffix:
			return strings.HasSuffix(text, m.Value)
		case mesh.MatchPresence:
			return text != ""
		default:
			return false
		}
	})
}
