package authz

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// connection is a Request in the form matches read.
type connection struct {
	peer     mesh.Identity
	known    bool // the peer has an identity
	src, dst netip.Addr
	port     uint16
	http     *HTTP
	unseen   bool // what an Operation is without http
}

// policy is a mesh.Policy ready to be checked.
type policy struct {
	key     string
	invalid bool // matches everything, and is among the DENY policies
	groups  []group
}

type (
	group  []clause // all must match
	clause []match  // any must match; a clause without matches holds
)

// match is a mesh.Match that is not empty. has says which of its lists are.
type match struct {
	has  fields
	only mesh.Match
}

type fields uint16

const (
	hasNamespaces fields = 1 << iota
	hasNotNamespaces
	hasPrincipals
	hasNotPrincipals
	hasAccounts
	hasNotAccounts
	hasSources
	hasNotSources
	hasDestinations
	hasNotDestinations
	hasPorts
	hasNotPorts
	hasOperation
)

func (p *policy) matches(c *connection) bool {
	if p.invalid {
		return true
	}
	for _, g := range p.groups {
		if g.matches(c) {
			return true
		}
	}
	return false
}

func (g group) matches(c *connection) bool {
	for _, cl := range g {
		if !cl.matches(c) {
			return false
		}
	}
	return true
}

func (cl clause) matches(c *connection) bool {
	for i := range cl {
		if cl[i].matches(c) {
			return true
		}
	}
	return false
}

// matches tests the cheap fields first. A peer without an identity matches no list of namespaces, principals or
// accounts, and so passes every Not list of them.
func (m *match) matches(c *connection) bool {
	o, has := &m.only, m.has
	switch {
	case has&hasPorts != 0 && !slices.Contains(o.DestinationPorts, c.port),
		has&hasNotPorts != 0 && slices.Contains(o.NotDestPorts, c.port),
		has&hasNamespaces != 0 && !(c.known && anyString(o.Namespaces, c.peer.Namespace)),
		has&hasNotNamespaces != 0 && c.known && anyString(o.NotNamespaces, c.peer.Namespace),
		has&hasAccounts != 0 && !(c.known && anyAccount(o.ServiceAccounts, c.peer)),
		has&hasNotAccounts != 0 && c.known && anyAccount(o.NotServiceAccounts, c.peer),
		has&hasPrincipals != 0 && !(c.known && anyPrincipal(o.Principals, c.peer)),
		has&hasNotPrincipals != 0 && c.known && anyPrincipal(o.NotPrincipals, c.peer),
		has&hasSources != 0 && !anyPrefix(o.SourceIPs, c.src),
		has&hasNotSources != 0 && anyPrefix(o.NotSourceIPs, c.src),
		has&hasDestinations != 0 && !anyPrefix(o.DestinationIPs, c.dst),
		has&hasNotDestinations != 0 && anyPrefix(o.NotDestinationIPs, c.dst),
		has&hasOperation != 0 && !c.does(o.Operation):
		return false
	}
	return true
}

func anyPrefix(ps []netip.Prefix, a netip.Addr) bool {
	for _, p := range ps {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// anyAccount leaves out the trust domain, as Istio does: a policy that must tell trust domains apart uses principals.
func anyAccount(as []mesh.ServiceAccount, id mesh.Identity) bool {
	for _, a := range as {
		if a.Name == id.ServiceAccount && a.Namespace == id.Namespace {
			return true
		}
	}
	return false
}

func anyString(ms []mesh.StringMatch, v string) bool {
	for i := range ms {
		if stringMatches(&ms[i], v) {
			return true
		}
	}
	return false
}

func stringMatches(m *mesh.StringMatch, v string) bool {
	switch m.Kind {
	case mesh.MatchExact:
		return v == m.Value
	case mesh.MatchPrefix:
		return strings.HasPrefix(v, m.Value)
	case mesh.MatchSuffix:
		return strings.HasSuffix(v, m.Value)
	case mesh.MatchPresence:
		return v != ""
	case mesh.MatchTemplate:
		return templateMatches(m.Value, v)
	case mesh.MatchNever:
	}
	return false
}

func anyPrincipal(ms []mesh.StringMatch, id mesh.Identity) bool {
	for i := range ms {
		if principalMatches(&ms[i], id) {
			return true
		}
	}
	return false
}

// principalMatches is stringMatches on id.Principal() without building that string.
func principalMatches(m *mesh.StringMatch, id mesh.Identity) bool {
	parts := [5]string{id.TrustDomain, "/ns/", id.Namespace, "/sa/", id.ServiceAccount}
	switch m.Kind {
	case mesh.MatchExact:
		n := 0
		for _, p := range parts {
			n += len(p)
		}
		return n == len(m.Value) && hasPrefix(parts, m.Value)
	case mesh.MatchPrefix:
		return hasPrefix(parts, m.Value)
	case mesh.MatchSuffix:
		return hasSuffix(parts, m.Value)
	case mesh.MatchPresence:
		return true
	case mesh.MatchNever, mesh.MatchTemplate:
	}
	return false
}

// hasPrefix reports whether the parts, joined, begin with v.
func hasPrefix(parts [5]string, v string) bool {
	for _, p := range parts {
		if len(v) <= len(p) {
			return p[:len(v)] == v
		}
		if v[:len(p)] != p {
			return false
		}
		v = v[len(p):]
	}
	return v == ""
}

// hasSuffix reports whether the parts, joined, end with v.
func hasSuffix(parts [5]string, v string) bool {
	for i := len(parts) - 1; i >= 0; i-- {
		p := parts[i]
		if len(v) <= len(p) {
			return p[len(p)-len(v):] == v
		}
		if v[len(v)-len(p):] != p {
			return false
		}
		v = v[:len(v)-len(p)]
	}
	return v == ""
}
