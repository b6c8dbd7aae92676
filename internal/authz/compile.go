package authz

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Compile makes the policies that govern one workload ready to be checked. The Set is always usable: a policy that is
// Invalid, or that cannot be compiled, denies every connection, also when it asks for a dry run, since nothing it says
// can be relied on. The error joins what is wrong with each such policy and names it.
func Compile(ps []*mesh.Policy) (*Set, error) {
	var s Set
	var errs []error
	for _, p := range ps {
		c, err := compilePolicy(p)
		if err != nil {
			errs = append(errs, fmt.Errorf("compile policy %s: %w", p.Key(), err))
			s.deny.policies = append(s.deny.policies, policy{key: p.Key(), invalid: true})
			continue
		}
		l := s.listFor(p)
		l.policies = append(l.policies, c)
	}
	for _, l := range []*list{&s.dryDeny, &s.deny, &s.dryAllow, &s.allow} {
		l.index()
	}
	return &s, errors.Join(errs...)
}

func (s *Set) listFor(p *mesh.Policy) *list {
	switch {
	case p.Action == mesh.Deny && p.DryRun:
		return &s.dryDeny
	case p.Action == mesh.Deny:
		return &s.deny
	case p.DryRun:
		return &s.dryAllow
	}
	return &s.allow
}

func compilePolicy(p *mesh.Policy) (policy, error) {
	if p.Invalid != "" {
		return policy{}, errors.New(p.Invalid)
	}
	if p.Action > mesh.Deny {
		return policy{}, fmt.Errorf("action %d is not known", p.Action)
	}
	if p.Scope > mesh.ScopeWorkload {
		return policy{}, fmt.Errorf("scope %d is not known", p.Scope)
	}
	c := policy{key: p.Key(), groups: make([]group, 0, len(p.Groups))}
	for _, g := range p.Groups {
		cg, possible, err := compileGroup(g)
		if err != nil {
			return policy{}, err
		}
		if possible {
			c.groups = append(c.groups, cg)
		}
	}
	return c, nil
}

// compileGroup drops the clauses that always hold. possible is false when a clause never does: one that has matches,
// all of them empty. Istio skips an empty match rather than letting it match everything.
func compileGroup(g mesh.Group) (compiled group, possible bool, err error) {
	possible = true
	for _, cl := range g.Clauses {
		if len(cl.Matches) == 0 {
			continue
		}
		var cc clause
		for i := range cl.Matches {
			m, err := compileMatch(&cl.Matches[i])
			if err != nil {
				return nil, false, err
			}
			if m.has != 0 {
				cc = append(cc, m)
			}
		}
		if len(cc) == 0 {
			possible = false
		}
		compiled = append(compiled, cc)
	}
	return compiled, possible, nil
}

func compileMatch(m *mesh.Match) (match, error) {
	c := match{only: *m}
	var errs [4]error
	c.only.SourceIPs, errs[0] = plainPrefixes(m.SourceIPs)
	c.only.NotSourceIPs, errs[1] = plainPrefixes(m.NotSourceIPs)
	c.only.DestinationIPs, errs[2] = plainPrefixes(m.DestinationIPs)
	c.only.NotDestinationIPs, errs[3] = plainPrefixes(m.NotDestinationIPs)
	if err := errors.Join(errs[:]...); err != nil {
		return match{}, err
	}
	for _, ms := range append(stringsOf(m.Operation), m.Namespaces, m.NotNamespaces, m.Principals, m.NotPrincipals) {
		for _, sm := range ms {
			if sm.Kind > mesh.MatchTemplate {
				return match{}, fmt.Errorf("string match of kind %d is not known", sm.Kind)
			}
		}
	}
	if err := checkTemplates(m); err != nil {
		return match{}, err
	}
	for _, f := range []struct {
		n   int
		bit fields
	}{
		{len(m.Namespaces), hasNamespaces}, {len(m.NotNamespaces), hasNotNamespaces},
		{len(m.Principals), hasPrincipals}, {len(m.NotPrincipals), hasNotPrincipals},
		{len(m.ServiceAccounts), hasAccounts}, {len(m.NotServiceAccounts), hasNotAccounts},
		{len(m.SourceIPs), hasSources}, {len(m.NotSourceIPs), hasNotSources},
		{len(m.DestinationIPs), hasDestinations}, {len(m.NotDestinationIPs), hasNotDestinations},
		{len(m.DestinationPorts), hasPorts}, {len(m.NotDestPorts), hasNotPorts},
	} {
		if f.n > 0 {
			c.has |= f.bit
		}
	}
	if !m.Operation.IsZero() {
		c.has |= hasOperation
	}
	return c, nil
}

// plainPrefixes writes prefixes of IPv4-mapped IPv6 addresses as IPv4 ones: the addresses they are held against are
// never mapped.
func plainPrefixes(ps []netip.Prefix) ([]netip.Prefix, error) {
	if len(ps) == 0 {
		return nil, nil
	}
	plain := make([]netip.Prefix, len(ps))
	for i, p := range ps {
		if !p.IsValid() {
			return nil, errors.New("address range is not valid")
		}
		if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
		}
		plain[i] = p.Masked()
	}
	return plain, nil
}
