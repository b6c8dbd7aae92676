package authz_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/mesh"
)

func TestANilSetAllows(t *testing.T) {
	t.Parallel()
	var s *authz.Set
	d := s.Check(&authz.Request{})
	if !d.Allow || d.Why != authz.NoAllowPolicy || s.Len() != 0 {
		t.Errorf("Check = %+v, want allowed as there is no policy", d)
	}
}

func TestTheZeroDecisionDenies(t *testing.T) {
	t.Parallel()
	if (authz.Decision{}).Allow {
		t.Error("the zero Decision allows")
	}
}

func TestCompileLeavesItsArgumentAlone(t *testing.T) {
	t.Parallel()
	mapped := netip.MustParsePrefix("::ffff:10.0.0.9/120")
	p := &mesh.Policy{Namespace: "a", Name: "b", Groups: []mesh.Group{{Clauses: []mesh.Clause{{
		Matches: []mesh.Match{{SourceIPs: []netip.Prefix{mapped}}},
	}}}}}
	if _, err := authz.Compile([]*mesh.Policy{p}); err != nil {
		t.Fatal(err)
	}
	if got := p.Groups[0].Clauses[0].Matches[0].SourceIPs[0]; got != mapped {
		t.Errorf("Compile changed the policy's range to %v", got)
	}
}

func TestCheckDoesNotAllocate(t *testing.T) {
	set, requests := many(t, 200)
	for name, r := range requests {
		if n := testing.AllocsPerRun(100, func() { set.Check(&r) }); n != 0 {
			t.Errorf("%s: Check allocates %v times, want 0", name, n)
		}
	}
}

// BenchmarkCheck has 10 000 ALLOW policies, each for another account, and one DENY policy for strangers.
func BenchmarkCheck(b *testing.B) {
	set, requests := many(b, 10_000)
	for _, name := range []string{"allowed by the last", "not allowed", "nobody"} {
		b.Run(name, func(b *testing.B) {
			r := requests[name]
			for b.Loop() {
				set.Check(&r)
			}
		})
	}
}

func many(t testing.TB, n int) (*authz.Set, map[string]authz.Request) {
	t.Helper()
	ps := []*mesh.Policy{{Namespace: "ns", Name: "strict", Action: mesh.Deny, Groups: []mesh.Group{{Clauses: []mesh.Clause{{
		Matches: []mesh.Match{{NotPrincipals: []mesh.StringMatch{{Kind: mesh.MatchPresence}}}},
	}}}}}}
	id := func(i int) mesh.Identity {
		return mesh.Identity{TrustDomain: "cluster.local", Namespace: "web", ServiceAccount: fmt.Sprintf("account-%d", i)}
	}
	for i := range n {
		ps = append(ps, &mesh.Policy{Namespace: "ns", Name: fmt.Sprintf("allow-%d", i), Groups: []mesh.Group{{Clauses: []mesh.Clause{
			{Matches: []mesh.Match{{Principals: []mesh.StringMatch{{Kind: mesh.MatchExact, Value: id(i).Principal()}}}}},
			{Matches: []mesh.Match{{DestinationPorts: []uint16{80}}}},
		}}}})
	}
	set, err := authz.Compile(ps)
	if err != nil {
		t.Fatal(err)
	}
	r := authz.Request{Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("[::ffff:10.0.0.2]:80")}
	last, other := r, r
	last.Peer, other.Peer = id(n-1), id(n)
	if d := set.Check(&last); !d.Allow {
		t.Fatalf("Check = %+v, want allowed", d)
	}
	return set, map[string]authz.Request{"allowed by the last": last, "not allowed": other, "nobody": r}
}
