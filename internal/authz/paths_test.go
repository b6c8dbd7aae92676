package authz_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/mesh"
)

// onPaths are policies of one path each, with what an index over beginnings could get wrong: beginnings of beginnings, equal ones,
// the empty one, and some without a beginning among them.
func onPaths(rng *rand.Rand, n int) []*mesh.Policy {
	var ps []*mesh.Policy
	for i := range n {
		m := mesh.StringMatch{Kind: mesh.MatchPrefix, Value: randomPath(rng)}
		switch rng.IntN(8) {
		case 0:
			m.Kind = mesh.MatchExact
		case 1:
			m.Kind = mesh.MatchSuffix
		case 2:
			m.Value = ""
		}
		p := &mesh.Policy{Namespace: "ns", Name: fmt.Sprint(i), Action: mesh.PolicyAction(rng.IntN(2)), Groups: []mesh.Group{{Clauses: []mesh.Clause{
			{Matches: []mesh.Match{{DestinationPorts: []uint16{uint16(1 + rng.IntN(2))}}}},
			{Matches: []mesh.Match{{Operation: &mesh.Operation{Paths: []mesh.StringMatch{m}}}}},
		}}}}
		if rng.IntN(4) > 0 {
			p.Groups[0].Clauses = p.Groups[0].Clauses[1:]
		}
		ps = append(ps, p)
	}
	return ps
}

func randomPath(rng *rand.Rand) string {
	var b []byte
	for range rng.IntN(6) {
		b = append(b, "/ab"[rng.IntN(3)])
	}
	return string(b)
}

func TestPathsAreFoundAsByLookingAtAll(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	for range 2000 {
		ps := onPaths(rng, rng.IntN(30))
		set, err := authz.Compile(ps)
		if err != nil {
			t.Fatal(err)
		}
		for range 10 {
			r := randomRequest(rng)
			if r.HTTP != nil {
				r.HTTP.Path = "/" + randomPath(rng)
			}
			if diff := cmp.Diff(dumbCheck(ps, &r), set.Check(&r)); diff != "" {
				t.Fatalf("Check of %+v among %d policies (-want +got):\n%s", r.HTTP, len(ps), diff)
			}
		}
	}
}

// TestManyPoliciesOnPathsDoNotAllocate: a policy whose path does not begin the request's is not looked at, and the one that does is found
// among 10 000; BenchmarkPaths says how fast.
func TestManyPoliciesOnPathsDoNotAllocate(t *testing.T) {
	set, r := manyPaths(t, 10_000)
	if n := testing.AllocsPerRun(100, func() { set.Check(r) }); n != 0 {
		t.Errorf("Check allocates %v times, want 0", n)
	}
}

// BenchmarkPaths has as many policies as its name says, each for another path.
func BenchmarkPaths(b *testing.B) {
	for _, n := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			set, r := manyPaths(b, n)
			for b.Loop() {
				set.Check(r)
			}
		})
	}
}

func manyPaths(t testing.TB, n int) (*authz.Set, *authz.Request) {
	t.Helper()
	var ps []*mesh.Policy
	for i := range n {
		ps = append(ps, &mesh.Policy{Namespace: "ns", Name: fmt.Sprint(i), Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{
			Operation: &mesh.Operation{Paths: []mesh.StringMatch{{Kind: mesh.MatchPrefix, Value: fmt.Sprintf("/app-%d/", i)}}},
		}}}}}}})
	}
	set, err := authz.Compile(ps)
	if err != nil {
		t.Fatal(err)
	}
	r := &authz.Request{HTTP: &authz.HTTP{Method: "GET", Path: fmt.Sprintf("/app-%d/items", n-1)}}
	if d := set.Check(r); !d.Allow {
		t.Fatalf("Check = %+v, want allowed", d)
	}
	return set, r
}
