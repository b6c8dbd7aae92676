package lb_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/lb"
	"github.com/mistnet/mistnet/internal/mesh"
)

// state is how members do; those not mentioned do well.
type state struct {
	out  map[int]bool
	warm map[int]float64
	busy map[int]int64
}

func (s *state) Calm() bool { return len(s.out)+len(s.warm) == 0 }

func (s *state) Out(m int) bool { return s.out[m] }

func (s *state) Warmth(m int) float64 {
	if w, ok := s.warm[m]; ok {
		return w
	}
	return 1
}

func (s *state) Busy(m int) int64 { return s.busy[m] }

// place is an endpoint: region/zone/subzone, weight, and label=value.
func place(i int, where string, weight uint32, labels ...string) mesh.Endpoint {
	parts := append(strings.Split(where, "/"), "", "")
	w := &mesh.Workload{
		UID: fmt.Sprint("Kubernetes//Pod/shop/web-", i), Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})},
		Healthy: true, Capacity: weight, Locality: mesh.Locality{Region: parts[0], Zone: parts[1], Subzone: parts[2]},
	}
	for _, l := range labels {
		k, v, _ := strings.Cut(l, "=")
		if w.Labels == nil {
			w.Labels = make(map[string]string)
		}
		w.Labels[k] = v
	}
	return mesh.Endpoint{Workload: w}
}

func setRequest(eps ...mesh.Endpoint) *lb.Request {
	return &lb.Request{
		Service: &mesh.Service{Ports: []mesh.Port{{ServicePort: 80, TargetPort: 8080}}}, Endpoints: eps,
		From: place(999, "east/a/1", 1, "team=blue").Workload, Dst: netip.MustParseAddrPort("10.96.0.1:80"),
	}
}

// shares counts n picks by member, in per cent.
func shares(t *testing.T, s *lb.Set, st lb.State, w lb.Way, n int) []float64 {
	t.Helper()
	rng := rand.New(rand.NewPCG(1, 1))
	counts := make([]float64, len(s.Members))
	for i := range n {
		way := w
		way.Turn, way.Pick = uint64(i), rng.Uint64N
		if m := s.Choose(st, &way); m >= 0 {
			counts[m] += 100 / float64(n)
		}
	}
	return counts
}

func TestSharesOfAlgorithms(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		weights   []uint32
		algorithm mesh.BalancerAlgorithm
		state     state
		health    uint32
		want      []float64
	}{
		"random by weight":                            {[]uint32{1, 2, 1, 0}, mesh.BalancerRandom, state{}, 0, []float64{25, 50, 25}},
		"in turn by weight":                           {[]uint32{1, 2, 1}, mesh.BalancerRoundRobin, state{}, 0, []float64{25, 50, 25}},
		"least request, all alike":                    {[]uint32{1, 1, 1, 1}, mesh.BalancerLeastRequest, state{}, 0, []float64{25, 25, 25, 25}},
		"least request by weight when idle":           {[]uint32{1, 2, 1}, mesh.BalancerLeastRequest, state{}, 0, []float64{25, 50, 25}},
		"least request passes the busy one by":        {[]uint32{1, 1, 1}, mesh.BalancerLeastRequest, state{busy: map[int]int64{0: 9}}, 0, []float64{100. / 9, 400. / 9, 400. / 9}},
		"what is out gets nothing":                    {[]uint32{1, 1, 1}, mesh.BalancerRandom, state{out: map[int]bool{1: true}}, 0, []float64{50, 0, 50}},
		"turns of what is out go to all others alike": {[]uint32{1, 1, 1}, mesh.BalancerRoundRobin, state{out: map[int]bool{1: true}}, 0, []float64{50, 0, 50}},
		"all out is nobody":                           {[]uint32{1, 1}, mesh.BalancerRandom, state{out: map[int]bool{0: true, 1: true}}, 0, []float64{0, 0}},
		"too many out is nobody out":                  {[]uint32{1, 1}, mesh.BalancerRandom, state{out: map[int]bool{0: true, 1: true}}, 10, []float64{50, 50}},
		"a cold one gets its part":                    {[]uint32{1, 1, 1}, mesh.BalancerRandom, state{warm: map[int]float64{2: 0.5}}, 0, []float64{40, 40, 20}},
		"a cold one in turn":                          {[]uint32{1, 1, 1}, mesh.BalancerRoundRobin, state{warm: map[int]float64{2: 0.4}}, 0, []float64{43.3, 43.3, 13.3}},
		"all cold are all alike":                      {[]uint32{1, 1}, mesh.BalancerRoundRobin, state{warm: map[int]float64{0: 0.1, 1: 0.1}}, 0, []float64{50, 50}},
	} {
		var eps []mesh.Endpoint
		for i, w := range tc.weights {
			eps = append(eps, place(i, "", w))
		}
		s := lb.NewSet(setRequest(eps...), lb.Preference{})
		got := shares(t, s, &tc.state, lb.Way{Algorithm: tc.algorithm, MinHealthy: tc.health}, 12_000)
		for i := range got {
			if math.Abs(got[i]-tc.want[i]) > 2 {
				t.Errorf("%s: shares are %.1f, want %.1f", name, got, tc.want)
				break
			}
		}
	}
}

// TestTurnsOfHeavyMembersAreSpread: of weights 5, 1, 1 the heavy one never has all its turns in a row.
func TestTurnsOfHeavyMembersAreSpread(t *testing.T) {
	t.Parallel()
	s := lb.NewSet(setRequest(place(0, "", 5), place(1, "", 1), place(2, "", 1)), lb.Preference{})
	row, longest := 0, 0
	for turn := range uint64(70) {
		if s.Choose(&state{}, &lb.Way{Algorithm: mesh.BalancerRoundRobin, Turn: turn}) != 0 {
			row = 0
			continue
		}
		row++
		longest = max(longest, row)
	}
	if longest > 4 {
		t.Errorf("the heavy member had %d turns in a row", longest)
	}
}

func TestLocalities(t *testing.T) {
	t.Parallel()
	eps := []mesh.Endpoint{ // the client is in east/a/1, team blue
		place(0, "east/a/1", 1, "team=red"), place(1, "east/a/2", 1, "team=blue"), place(2, "east/b/1", 1, "team=blue"),
		place(3, "west/a/1", 1), place(4, "south/a/1", 1, "team=blue"),
	}
	failover := func(to string) *mesh.LocalityBalance {
		return &mesh.LocalityBalance{Failover: []mesh.LocalityFailover{{From: "east", To: to}}}
	}
	priority := func(labels ...string) *mesh.LocalityBalance { return &mesh.LocalityBalance{FailoverPriority: labels} }
	distribute := func(to map[string]uint32) *mesh.LocalityBalance {
		return &mesh.LocalityBalance{Distribute: []mesh.LocalityDistribute{
			{From: "west/*", To: map[string]uint32{"west/*": 100}}, {From: "east/a", To: to}}}
	}
	for name, tc := range map[string]struct {
		preference lb.Preference
		out        []int
		want       []float64
	}{
		"without a preference all are alike":          {lb.Preference{}, nil, []float64{20, 20, 20, 20, 20}},
		"failover without ejection is none":           {lb.Preference{Locality: failover("west")}, nil, []float64{20, 20, 20, 20, 20}},
		"ejection prefers the nearest":                {lb.Preference{Ejects: true}, nil, []float64{100, 0, 0, 0, 0}},
		"then the next":                               {lb.Preference{Ejects: true}, []int{0}, []float64{0, 100, 0, 0, 0}},
		"then the same region":                        {lb.Preference{Ejects: true}, []int{0, 1}, []float64{0, 0, 100, 0, 0}},
		"then every other":                            {lb.Preference{Ejects: true}, []int{0, 1, 2}, []float64{0, 0, 0, 50, 50}},
		"the region that is named first":              {lb.Preference{Locality: failover("south"), Ejects: true}, []int{0, 1, 2}, []float64{0, 0, 0, 0, 100}},
		"and the rest after it":                       {lb.Preference{Locality: failover("south"), Ejects: true}, []int{0, 1, 2, 4}, []float64{0, 0, 0, 100, 0}},
		"switched off":                                {lb.Preference{Locality: &mesh.LocalityBalance{Disabled: true}, Ejects: true}, []int{0}, []float64{0, 25, 25, 25, 25}},
		"by the client's own label":                   {lb.Preference{Locality: priority("team"), Ejects: true}, nil, []float64{0, 33, 33, 0, 33}},
		"by labels in order":                          {lb.Preference{Locality: priority("topology.kubernetes.io/region", "team"), Ejects: true}, nil, []float64{0, 50, 50, 0, 0}},
		"the first label is worth more":               {lb.Preference{Locality: priority("topology.kubernetes.io/region", "team"), Ejects: true}, []int{1, 2}, []float64{100, 0, 0, 0, 0}},
		"by a value":                                  {lb.Preference{Locality: priority("team=red"), Ejects: true}, nil, []float64{100, 0, 0, 0, 0}},
		"what half a tier cannot carry goes on":       {lb.Preference{Locality: priority("topology.kubernetes.io/region"), Ejects: true}, []int{0, 1}, []float64{0, 0, 46.7, 26.7, 26.7}},
		"in parts":                                    {lb.Preference{Locality: distribute(map[string]uint32{"east/*": 80, "west": 20})}, nil, []float64{26.7, 26.7, 26.7, 20, 0}},
		"the more exact name counts":                  {lb.Preference{Locality: distribute(map[string]uint32{"east/*": 50, "east/b": 50})}, nil, []float64{25, 25, 50, 0, 0}},
		"a part of nobody is shared by the others":    {lb.Preference{Locality: distribute(map[string]uint32{"north": 50, "west": 50})}, nil, []float64{0, 0, 0, 100, 0}},
		"no rule for the client's place is no rule":   {lb.Preference{Locality: &mesh.LocalityBalance{Distribute: []mesh.LocalityDistribute{{From: "west", To: map[string]uint32{"west": 100}}}}}, nil, []float64{20, 20, 20, 20, 20}},
		"a part that is out is shared by the others":  {lb.Preference{Locality: distribute(map[string]uint32{"east/*": 80, "west": 20})}, []int{3}, []float64{33.3, 33.3, 33.3, 0, 0}},
		"a part that is half out loses a part of it ": {lb.Preference{Locality: distribute(map[string]uint32{"east/a": 50, "west": 50})}, []int{0}, []float64{0, 41.2, 0, 58.8, 0}},
	} {
		s := lb.NewSet(setRequest(eps...), tc.preference)
		st := state{out: make(map[int]bool)}
		for _, m := range tc.out {
			st.out[m] = true
		}
		got := shares(t, s, &st, lb.Way{Algorithm: mesh.BalancerRandom}, 12_000)
		for i := range got {
			if math.Abs(got[i]-tc.want[i]) > 2 {
				t.Errorf("%s: shares are %.1f, want %.1f", name, got, tc.want)
				break
			}
		}
	}
}

// TestPanic: only what all tiers together cannot carry makes one forget who is out.
func TestPanic(t *testing.T) {
	t.Parallel()
	var eps []mesh.Endpoint // the client is in east
	for i := range 10 {
		eps = append(eps, place(i, "east/a/1", 1))
	}
	eps = append(eps, place(10, "west/a/1", 1), place(11, "west/a/1", 1))
	for name, tc := range map[string]struct {
		out                []int
		health             uint32
		east, gone, inWest float64 // per cent of the picks: usable ones in east, those out in east, west
	}{
		"the others carry what a tier cannot":  {[]int{0, 1, 2, 3, 4, 5, 6, 7, 8}, 50, 14, 0, 86},
		"enough is usable for everything":      {[]int{0, 1}, 90, 100, 0, 0},
		"too few everywhere: all, by size":     {[]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 10}, 60, 8.3, 75, 16.7},
		"too few in one, which forgets":        {[]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 10}, 40, 1.7, 15, 83.3},
		"none anywhere: the first tier":        {[]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, 1, 0, 100, 0},
		"without a threshold nobody forgets":   {[]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 10}, 0, 16.7, 0, 83.3},
		"nobody, without a threshold, is used": {[]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, 0, 0, 0, 0},
	} {
		s := lb.NewSet(setRequest(eps...), lb.Preference{Ejects: true})
		st := state{out: make(map[int]bool)}
		for _, m := range tc.out {
			st.out[m] = true
		}
		var east, gone, west float64
		for m, share := range shares(t, s, &st, lb.Way{Algorithm: mesh.BalancerRandom, MinHealthy: tc.health}, 12_000) {
			switch {
			case m >= 10:
				west += share
			case st.out[m]:
				gone += share
			default:
				east += share
			}
		}
		if math.Abs(east-tc.east) > 2 || math.Abs(gone-tc.gone) > 2 || math.Abs(west-tc.inWest) > 2 {
			t.Errorf("%s: %.1f to the usable, %.1f to those out, %.1f to the west, want %.1f, %.1f, %.1f",
				name, east, gone, west, tc.east, tc.gone, tc.inWest)
		}
	}
}

func TestRetriesGoElsewhere(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(7, 7))
	s := lb.NewSet(setRequest(place(0, "east/a/1", 1), place(1, "east/a/1", 1), place(2, "west/a/1", 1)), lb.Preference{Ejects: true})
	for _, a := range []mesh.BalancerAlgorithm{mesh.BalancerLeastRequest, mesh.BalancerRoundRobin, mesh.BalancerRandom} {
		for turn := range uint64(200) {
			way := lb.Way{Algorithm: a, Turn: turn, Pick: rng.Uint64N, Tried: []int32{0}}
			if m := s.Choose(&state{}, &way); m != 1 {
				t.Fatalf("%v: after member 0 comes %d, want 1", a, m)
			}
			way.OtherTiers = true
			if m := s.Choose(&state{}, &way); m != 2 {
				t.Fatalf("%v: after member 0 comes %d, want 2 of another tier", a, m)
			}
			way.Tried = []int32{0, 1, 2}
			if m := s.Choose(&state{}, &way); m != 0 && m != 1 {
				t.Fatalf("%v: when all were tried comes %d, want one of the first tier", a, m)
			}
		}
	}
}

// TestHashedSetAgreesWithPick: the same client, by the same name, has the same endpoint by both.
func TestHashedSetAgreesWithPick(t *testing.T) {
	t.Parallel()
	for n := range 500 {
		r := stickyRequest(n, 1, 2, 3)
		s := lb.NewSet(r, lb.Preference{})
		m := s.Choose(&state{}, &lb.Way{Key: r.From.UID})
		if got, want := s.Members[m].Endpoint.Workload.UID, stuckTo(t, r); got != want {
			t.Fatalf("client %d is sent to %s, and by Pick to %s", n, got, want)
		}
	}
}

// TestSetsHaveWhatPickPicks: on random services, the first tier is what Pick picks from, and nothing else is the same
// fault.
func TestSetsHaveWhatPickPicks(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(3, 3))
	for range 3000 {
		r := randomRequest(rng)
		if r.Service.LB.Mode == mesh.LBPassthrough {
			continue
		}
		want, fault := dumbPick(r)
		s := lb.NewSet(r, lb.Preference{})
		if s.Fault != fault {
			t.Fatalf("fault = %v, want %v", s.Fault, fault)
		}
		got := make(map[string]uint64)
		for range 40 * len(s.Members) {
			way := lb.Way{Algorithm: mesh.BalancerRandom, Pick: rng.Uint64N}
			w := s.Members[s.Choose(&state{}, &way)].Endpoint.Workload
			got[w.UID] = uint64(w.Capacity)
		}
		if len(want) == 0 {
			want = map[string]uint64{}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("members (-want +got):\n%s", diff)
		}
	}
}

func TestSubsetsNarrow(t *testing.T) {
	t.Parallel()
	r := setRequest(place(0, "", 1, "version=v1", "app=web"), place(1, "", 1, "version=v2", "app=web"), place(2, "", 1))
	r.Labels = map[string]string{"version": "v2", "app": "web"}
	c, err := lb.Pick(r, func(uint64) uint64 { return 0 })
	if s := lb.NewSet(r, lb.Preference{}); err != nil || len(s.Members) != 1 || s.Members[0].Endpoint.Workload != r.Endpoints[1].Workload ||
		c.Endpoint.Workload != r.Endpoints[1].Workload {
		t.Errorf("the subset is %v, and %v is picked (%v), want endpoint 1", s.Members, c, err)
	}
	r.Labels["version"] = "v3"
	if s := lb.NewSet(r, lb.Preference{}); s.Fault != lb.NoEndpoints || s.Choose(&state{}, &lb.Way{}) != -1 {
		t.Errorf("a subset of nobody: %v, want %v", s.Fault, lb.NoEndpoints)
	}
}

func TestChooseAllocatesNothing(t *testing.T) {
	var eps []mesh.Endpoint
	for i := range 50 {
		eps = append(eps, place(i, "east/a/1", uint32(1+i%3)), place(100+i, "west/a/1", 1))
	}
	r := setRequest(eps...)
	sets := map[mesh.BalancerAlgorithm]*lb.Set{mesh.BalancerMaglev: lb.NewSet(r, lb.Preference{Ejects: true, Hashing: maglev}),
		mesh.BalancerRingHash: lb.NewSet(r, lb.Preference{Ejects: true, Hashing: ring})}
	plain := lb.NewSet(r, lb.Preference{Ejects: true})
	calm, troubled := &state{}, &state{out: map[int]bool{1: true}, warm: map[int]float64{3: 0.3}}
	rng := rand.New(rand.NewPCG(1, 1))
	pick := rng.Uint64N
	triedBefore := []int32{4}
	for _, a := range []mesh.BalancerAlgorithm{mesh.BalancerLeastRequest, mesh.BalancerRoundRobin, mesh.BalancerRandom, mesh.BalancerRingHash,
		mesh.BalancerMaglev} {
		s := plain
		if sets[a] != nil {
			s = sets[a]
		}
		for _, st := range []*state{calm, troubled} {
			way := lb.Way{Algorithm: a, Pick: pick, Tried: triedBefore}
			if s != plain {
				way.Key = "somebody"
			}
			if n := testing.AllocsPerRun(100, func() { way.Turn++; _ = s.Choose(st, &way) }); n > 0 {
				t.Errorf("%v, calm %v: %v allocations", a, st.Calm(), n)
			}
		}
	}
	if !slices.ContainsFunc(plain.Members, func(c lb.Choice) bool { return c.Port == 8080 }) {
		t.Error("no member has its port")
	}
}

func BenchmarkChoose(b *testing.B) {
	for _, n := range []int{3, 1000} {
		var eps []mesh.Endpoint
		for i := range n {
			eps = append(eps, place(i, "east/a/1", 1))
		}
		s := lb.NewSet(setRequest(eps...), lb.Preference{})
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			way := lb.Way{Pick: rand.Uint64N}
			for b.Loop() {
				s.Choose(&state{}, &way)
			}
		})
	}
}
