package authz_test

import (
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/mesh"
)

// dumbCheck decides as the rules are told, with strings and no index.
func dumbCheck(ps []*mesh.Policy, r *authz.Request) authz.Decision {
	invalid := func(p *mesh.Policy) bool { return p.Invalid != "" }
	first := func(action mesh.PolicyAction, dryRun bool) (found *mesh.Policy, any bool) {
		for _, p := range ps {
			if !invalid(p) && (p.Action != action || p.DryRun != dryRun) || invalid(p) && (action != mesh.Deny || dryRun) {
				continue
			}
			any = true
			if invalid(p) || dumbPolicy(p, r, action == mesh.Deny) {
				return p, true
			}
		}
		return nil, any
	}
	var d authz.Decision
	if p, _ := first(mesh.Deny, true); p != nil {
		d.DryRun.Deny = p.Key()
	}
	if p, _ := first(mesh.Deny, false); p != nil {
		d.Policy, d.Why = p.Key(), authz.DenyPolicy
		if invalid(p) {
			d.Why = authz.InvalidPolicy
		}
		return d
	}
	if p, any := first(mesh.Allow, true); p != nil {
		d.DryRun.Allow = p.Key()
	} else {
		d.DryRun.NotAllow = any
	}
	p, any := first(mesh.Allow, false)
	switch {
	case !any:
		d.Allow, d.Why = true, authz.NoAllowPolicy
	case p != nil:
		d.Allow, d.Policy, d.Why = true, p.Key(), authz.AllowPolicy
	default:
		d.Why = authz.NoAllowMatches
	}
	return d
}

func dumbPolicy(p *mesh.Policy, r *authz.Request, deny bool) bool {
	for _, g := range p.Groups {
		all := true
		for _, c := range g.Clauses {
			any := len(c.Matches) == 0
			for _, m := range c.Matches {
				any = any || dumbMatch(m, r, deny)
			}
			all = all && any
		}
		if all {
			return true
		}
	}
	return false
}

func dumbMatch(m mesh.Match, r *authz.Request, deny bool) bool {
	known := r.Peer != mesh.Identity{}
	empty := true
	check := func(holds bool, positive, negative int, matchesPositive, matchesNegative bool) bool {
		if positive+negative > 0 {
			empty = false
		}
		return holds && (positive == 0 || matchesPositive) && (negative == 0 || !matchesNegative)
	}
	str := func(ms []mesh.StringMatch, v string) bool {
		for _, s := range ms {
			switch s.Kind {
			case mesh.MatchExact:
				if v == s.Value {
					return true
				}
			case mesh.MatchPrefix:
				if strings.HasPrefix(v, s.Value) {
					return true
				}
			case mesh.MatchSuffix:
				if strings.HasSuffix(v, s.Value) {
					return true
				}
			case mesh.MatchPresence:
				return true
			}
		}
		return false
	}
	ip := func(ps []netip.Prefix, a netip.Addr) bool {
		for _, p := range ps {
			if p.Contains(a.Unmap()) {
				return true
			}
		}
		return false
	}
	port := func(ps []uint16) bool { return strings.ContainsRune(string(asRunes(ps)), rune(r.Dst.Port())) }
	account := func(as []mesh.ServiceAccount) bool {
		for _, a := range as {
			if a.Namespace+"/"+a.Name == r.Peer.Namespace+"/"+r.Peer.ServiceAccount {
				return true
			}
		}
		return false
	}
	ok := true
	ok = check(ok, len(m.Namespaces), len(m.NotNamespaces),
		known && str(m.Namespaces, r.Peer.Namespace), known && str(m.NotNamespaces, r.Peer.Namespace))
	ok = check(ok, len(m.Principals), len(m.NotPrincipals),
		known && str(m.Principals, r.Peer.Principal()), known && str(m.NotPrincipals, r.Peer.Principal()))
	ok = check(ok, len(m.ServiceAccounts), len(m.NotServiceAccounts),
		known && account(m.ServiceAccounts), known && account(m.NotServiceAccounts))
	ok = check(ok, len(m.SourceIPs), len(m.NotSourceIPs), ip(m.SourceIPs, r.Src.Addr()), ip(m.NotSourceIPs, r.Src.Addr()))
	ok = check(ok, len(m.DestinationIPs), len(m.NotDestinationIPs),
		ip(m.DestinationIPs, r.Dst.Addr()), ip(m.NotDestinationIPs, r.Dst.Addr()))
	ok = check(ok, len(m.DestinationPorts), len(m.NotDestPorts), port(m.DestinationPorts), port(m.NotDestPorts))
	if o := m.Operation; o != nil {
		lists := 0
		for _, l := range [][]mesh.StringMatch{o.Hosts, o.NotHosts, o.Methods, o.NotMethods, o.Paths, o.NotPaths} {
			lists += len(l)
		}
		if lists+len(o.Headers) > 0 {
			empty = false
			ok = ok && dumbOperation(o, r.HTTP, deny, str)
		}
	}
	return ok && !empty
}

func dumbOperation(o *mesh.Operation, r *authz.HTTP, deny bool, str func([]mesh.StringMatch, string) bool) bool {
	if r == nil {
		return deny
	}
	lower := func(ms []mesh.StringMatch) (out []mesh.StringMatch) {
		for _, m := range ms {
			out = append(out, mesh.StringMatch{Kind: m.Kind, Value: strings.ToLower(m.Value)})
		}
		return out
	}
	name, _, _ := strings.Cut(strings.ToLower(r.Host), ":")
	name = strings.TrimSuffix(name, ".")
	host := func(ms []mesh.StringMatch) bool {
		return str(lower(ms), strings.ToLower(r.Host)) || str(lower(ms), name)
	}
	for _, f := range []struct {
		yes, no  []mesh.StringMatch
		hit, bad bool
	}{
		{o.Methods, o.NotMethods, str(o.Methods, r.Method), str(o.NotMethods, r.Method)},
		{o.Paths, o.NotPaths, str(o.Paths, r.Path), str(o.NotPaths, r.Path)},
		{o.Hosts, o.NotHosts, host(o.Hosts), host(o.NotHosts)},
	} {
		if len(f.yes) > 0 && !f.hit || len(f.no) > 0 && f.bad {
			return false
		}
	}
	for _, h := range o.Headers {
		switch h.Name {
		case "host", ":authority":
			if len(h.Values) > 0 && !host(h.Values) || host(h.NotValues) {
				return false
			}
			continue
		case ":method":
			if len(h.Values) > 0 && !str(h.Values, r.Method) || str(h.NotValues, r.Method) {
				return false
			}
			continue
		case ":path":
			if !deny {
				return false
			}
			continue
		}
		v, there := r.Header.Value(h.Name)
		wanted, unwanted := there && str(h.Values, v), there && str(h.NotValues, v)
		if lines := strings.Split(v, ","); len(lines) > 1 {
			for _, line := range lines {
				wanted = wanted || deny && str(h.Values, line)
				unwanted = unwanted || !deny && str(h.NotValues, line)
			}
		}
		if len(h.Values) > 0 && !wanted || unwanted {
			return false
		}
	}
	return true
}

// headers are those of a request, the lines of one name joined.
type headers map[string]string

func (h headers) Line(name string, i int) (string, bool) {
	v, ok := h[name]
	lines := strings.Split(v, ",")
	if !ok || i >= len(lines) {
		return "", false
	}
	return lines[i], true
}

func (h headers) Value(name string) (string, bool) { v, ok := h[name]; return v, ok }

func asRunes(ps []uint16) []rune {
	rs := make([]rune, len(ps))
	for i, p := range ps {
		rs[i] = rune(p)
	}
	return rs
}

func TestCheckEqualsADumbOneOnRandomPolicies(t *testing.T) {
	t.Parallel()
	const sets, requests = 2500, 24 // 60 000 decisions
	rng := rand.New(rand.NewPCG(1, 2))
	seen := make(map[authz.Reason]int)
	dryRuns := 0
	for range sets {
		var ps []*mesh.Policy
		for i := range rng.IntN(12) {
			ps = append(ps, randomPolicy(rng, i))
		}
		set, _ := authz.Compile(ps)
		if set.Len() != len(ps) {
			t.Fatalf("Len() = %d, want %d", set.Len(), len(ps))
		}
		for range requests {
			r := randomRequest(rng)
			got, want := set.Check(&r), dumbCheck(ps, &r)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("Check(%+v) of\n%+v\n(-dumb +got):\n%s", r, ps, diff)
			}
			seen[got.Why]++
			if !got.DryRun.IsZero() {
				dryRuns++
			}
		}
	}
	for why := authz.NoAllowPolicy; why <= authz.InvalidPolicy; why++ {
		if seen[why] < 1000 {
			t.Errorf("only %d random decisions were %q: the generator is too weak", seen[why], why)
		}
	}
	if dryRuns < 1000 {
		t.Errorf("only %d random decisions had a dry run", dryRuns)
	}
}

// The vocabulary is small so that random requests hit random rules.
var (
	trustDomains = []string{"td", "cluster.local"}
	namespaces   = []string{"a", "ab", "b"}
	accounts     = []string{"x", "xy", "y"}
	addrs        = []string{"10.0.0.1", "10.0.1.1", "10.1.0.1", "fd00::1", "fd00:1::1"}
	methods      = []string{"GET", "POST", "GETS"}
	paths        = []string{"/", "/a", "/ab/c"}
	hosts        = []string{"a.b", "A.b", "a"}
	prefixes     = []string{"10.0.0.0/24", "10.0.0.0/16", "0.0.0.0/0", "fd00::/32", "10.1.0.1/32", "fd00::1/128"}
)

func oneOf[T any](rng *rand.Rand, vs []T) T { return vs[rng.IntN(len(vs))] }

func randomIdentity(rng *rand.Rand) mesh.Identity {
	return mesh.Identity{
		TrustDomain: oneOf(rng, trustDomains), Namespace: oneOf(rng, namespaces), ServiceAccount: oneOf(rng, accounts),
	}
}

func randomRequest(rng *rand.Rand) authz.Request {
	var r authz.Request
	if rng.IntN(4) > 0 {
		r.Peer = randomIdentity(rng)
	}
	addr := func() netip.AddrPort {
		a := netip.MustParseAddr(oneOf(rng, addrs))
		if a.Is4() && rng.IntN(4) == 0 {
			a = netip.AddrFrom16(a.As16()) // IPv4-mapped
		}
		return netip.AddrPortFrom(a, uint16(1+rng.IntN(4)))
	}
	r.Src, r.Dst = addr(), addr()
	if rng.IntN(3) > 0 {
		r.HTTP = &authz.HTTP{
			Method: oneOf(rng, methods), Path: oneOf(rng, paths), Host: oneOf(rng, hosts) + oneOf(rng, []string{"", ".", ":80", ".:80"}), Header: headers{},
		}
		if rng.IntN(2) == 0 {
			r.HTTP.Header = headers{"x-a": oneOf(rng, accounts) + oneOf(rng, []string{"", "," + oneOf(rng, accounts)})}
		}
	}
	return r
}

func randomPolicy(rng *rand.Rand, i int) *mesh.Policy {
	p := &mesh.Policy{Namespace: "ns", Name: string(rune('a' + i)), DryRun: rng.IntN(4) == 0}
	p.Action = mesh.PolicyAction(rng.IntN(2))
	if rng.IntN(40) == 0 {
		p.Invalid = "broken"
	}
	for range rng.IntN(4) {
		var g mesh.Group
		for range rng.IntN(4) {
			var c mesh.Clause
			for range rng.IntN(3) {
				c.Matches = append(c.Matches, randomMatch(rng))
			}
			g.Clauses = append(g.Clauses, c)
		}
		p.Groups = append(p.Groups, g)
	}
	return p
}

func randomMatch(rng *rand.Rand) mesh.Match {
	var m mesh.Match
	some := func() int { return max(0, rng.IntN(8)-5) } // mostly 0, up to 2
	for range some() {
		m.Namespaces = append(m.Namespaces, randomString(rng, oneOf(rng, namespaces)))
	}
	for range some() / 2 {
		m.NotNamespaces = append(m.NotNamespaces, randomString(rng, oneOf(rng, namespaces)))
	}
	for range some() {
		m.Principals = append(m.Principals, randomString(rng, randomIdentity(rng).Principal()))
	}
	for range some() / 2 {
		m.NotPrincipals = append(m.NotPrincipals, randomString(rng, randomIdentity(rng).Principal()))
	}
	for range some() {
		m.ServiceAccounts = append(m.ServiceAccounts, mesh.ServiceAccount{Namespace: oneOf(rng, namespaces), Name: oneOf(rng, accounts)})
	}
	for range some() / 2 {
		m.NotServiceAccounts = append(m.NotServiceAccounts, mesh.ServiceAccount{Namespace: oneOf(rng, namespaces), Name: oneOf(rng, accounts)})
	}
	for _, ps := range []*[]netip.Prefix{&m.SourceIPs, &m.NotSourceIPs, &m.DestinationIPs, &m.NotDestinationIPs} {
		for range some() / 2 {
			*ps = append(*ps, netip.MustParsePrefix(oneOf(rng, prefixes)))
		}
	}
	for range some() {
		m.DestinationPorts = append(m.DestinationPorts, uint16(1+rng.IntN(4)))
	}
	for range some() / 2 {
		m.NotDestPorts = append(m.NotDestPorts, uint16(1+rng.IntN(4)))
	}
	if rng.IntN(4) == 0 {
		m.Operation = randomOperation(rng)
	}
	return m
}

func randomOperation(rng *rand.Rand) *mesh.Operation {
	var o mesh.Operation
	for _, f := range []struct {
		list  *[]mesh.StringMatch
		words []string
	}{
		{&o.Methods, methods}, {&o.Paths, paths}, {&o.Hosts, hosts}, {&o.NotMethods, methods}, {&o.NotPaths, paths}, {&o.NotHosts, hosts},
	} {
		for range max(0, rng.IntN(6)-3) {
			*f.list = append(*f.list, randomString(rng, oneOf(rng, f.words)))
		}
	}
	for range max(0, rng.IntN(4)-2) {
		h := mesh.HeaderCondition{Name: oneOf(rng, []string{"x-a", "x-a", "x-a", "host", ":authority", ":method", ":path"})}
		words := accounts
		switch h.Name {
		case "host", ":authority":
			words = hosts
		case ":method":
			words = methods
		}
		if rng.IntN(2) == 0 {
			h.Values = []mesh.StringMatch{randomString(rng, oneOf(rng, words))}
		} else {
			h.NotValues = []mesh.StringMatch{randomString(rng, oneOf(rng, words))}
		}
		o.Headers = append(o.Headers, h)
	}
	return &o
}

func randomString(rng *rand.Rand, v string) mesh.StringMatch {
	i := rng.IntN(len(v) + 1)
	switch rng.IntN(8) {
	case 0:
		return mesh.StringMatch{Kind: mesh.MatchPresence}
	case 1:
		return mesh.StringMatch{Kind: mesh.MatchPrefix, Value: v[:i]}
	case 2:
		return mesh.StringMatch{Kind: mesh.MatchSuffix, Value: v[i:]}
	case 3:
		return mesh.StringMatch{Kind: mesh.MatchNever, Value: v}
	case 4:
		return mesh.StringMatch{Kind: mesh.MatchPrefix, Value: v + "z"}
	case 5:
		return mesh.StringMatch{Kind: mesh.MatchSuffix, Value: "z" + v}
	}
	return mesh.StringMatch{Kind: mesh.MatchExact, Value: v}
}
