package lb_test

import (
	"fmt"
	"math"
	"runtime"
	"slices"
	"testing"

	"github.com/mistnet/mistnet/internal/lb"
	"github.com/mistnet/mistnet/internal/mesh"
)

var (
	ring   = lb.Hashing{Algorithm: mesh.BalancerRingHash}
	maglev = lb.Hashing{Algorithm: mesh.BalancerMaglev}
)

// places are n endpoints of weight 1, all in one place.
func places(n int) []mesh.Endpoint {
	eps := make([]mesh.Endpoint, n)
	for i := range eps {
		eps[i] = place(i, "east/a/1", 1)
	}
	return eps
}

func hashSet(h lb.Hashing, eps ...mesh.Endpoint) *lb.Set {
	return lb.NewSet(setRequest(eps...), lb.Preference{Hashing: h})
}

// owner is the name of the endpoint that a key belongs to; "": it belongs to none.
func owner(s *lb.Set, st lb.State, key int, tried ...int32) string {
	m := s.Choose(st, &lb.Way{Key: fmt.Sprint("key-", key), Tried: tried})
	if m < 0 {
		return ""
	}
	return s.Members[m].Endpoint.Workload.UID
}

// TestHashedShares: every endpoint's share of keys is its weight's, within what the table and the number of keys allow.
func TestHashedShares(t *testing.T) {
	t.Parallel()
	const keys = 100_000
	for name, tc := range map[string]struct {
		hashing lb.Hashing
		weights []uint32
		within  float64 // of the share
	}{
		"ring of equals":            {ring, []uint32{1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, 0.15},
		"ring of weights":           {ring, []uint32{1, 2, 3, 4}, 0.15},
		"large ring":                {lb.Hashing{Algorithm: mesh.BalancerRingHash, Size: 1 << 20}, []uint32{1, 1, 2, 4}, 0.03},
		"maglev of equals":          {maglev, []uint32{1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, 0.04},
		"maglev of weights":         {maglev, []uint32{1, 2, 3, 4}, 0.04},
		"maglev of uneven weights":  {maglev, []uint32{1000, 1, 999}, 0.04},
		"maglev of a size":          {lb.Hashing{Algorithm: mesh.BalancerMaglev, Size: 1009}, []uint32{1, 2, 5}, 0.04},
		"maglev of what is no size": {lb.Hashing{Algorithm: mesh.BalancerMaglev, Size: 1000}, []uint32{1, 1}, 0.04},
		"one alone":                 {ring, []uint32{7}, 0},
	} {
		var eps []mesh.Endpoint
		total := 0.0
		for i, w := range tc.weights {
			eps = append(eps, place(i, "", w))
			total += float64(w)
		}
		s := hashSet(tc.hashing, eps...)
		counts := make(map[string]int)
		for key := range keys {
			counts[owner(s, &state{}, key)]++
		}
		for i, w := range tc.weights {
			got, want := float64(counts[eps[i].Workload.UID])/keys, float64(w)/total
			if math.Abs(got-want) > want*tc.within+0.001 {
				t.Errorf("%s: endpoint %d has %.4f of the keys, want %.4f", name, i, got, want)
			}
		}
	}
}

// TestHashedKeysMoveOnlyWhenTheyMust: an endpoint that comes takes its share and, on a ring, nothing else moves; one that goes
// leaves its keys to all others.
func TestHashedKeysMoveOnlyWhenTheyMust(t *testing.T) {
	t.Parallel()
	const keys = 20_000
	for name, tc := range map[string]struct {
		hashing lb.Hashing
		n       int
		others  float64 // of the keys that may move among endpoints that stay
	}{
		"ring":                          {ring, 10, 0},
		"ring as large as it gets":      {ring, 400, 0.005},
		"ring of a size":                {lb.Hashing{Algorithm: mesh.BalancerRingHash, Size: 64}, 4, 0},
		"maglev":                        {maglev, 10, 0.04},
		"maglev of many":                {maglev, 400, 0.03},
		"without a table, as Pick does": {lb.Hashing{}, 10, 0},
	} {
		eps := places(tc.n + 1)
		few, more := hashSet(tc.hashing, eps[:tc.n]...), hashSet(tc.hashing, eps...)
		newcomer, came, moved := eps[tc.n].Workload.UID, 0, 0
		for key := range keys {
			switch a, b := owner(few, &state{}, key), owner(more, &state{}, key); {
			case b == newcomer:
				came++
			case a != b:
				moved++
			}
		}
		if got, want := float64(came)/keys, 1/float64(tc.n+1); math.Abs(got-want) > want*0.35 {
			t.Errorf("%s: the newcomer takes %.4f of the keys, want %.4f", name, got, want)
		}
		if got := float64(moved) / keys; got > tc.others {
			t.Errorf("%s: %.4f of the keys move among the others, want at most %.4f", name, got, tc.others)
		}
	}
}

// TestHashedKeysOfWhoIsOut go to all others, come back, and no other key moves.
func TestHashedKeysOfWhoIsOut(t *testing.T) {
	t.Parallel()
	for _, h := range []lb.Hashing{ring, maglev, {}} {
		s := hashSet(h, places(5)...)
		out := &state{out: map[int]bool{2: true}}
		gone := s.Members[2].Endpoint.Workload.UID
		heirs := make(map[string]int)
		for key := range 10_000 {
			before, meanwhile := owner(s, &state{}, key), owner(s, out, key)
			if before != gone && meanwhile != before {
				t.Fatalf("%v: key %d moves from %s to %s when %s is out", h.Algorithm, key, before, meanwhile, gone)
			}
			if before == gone {
				heirs[meanwhile]++
			}
		}
		if len(heirs) != 4 || heirs[gone] > 0 {
			t.Errorf("%v: keys of who is out went to %v, want all others", h.Algorithm, heirs)
		}
		for heir, n := range heirs {
			if n < 300 || n > 700 {
				t.Errorf("%v: %s inherits %d of about 2000 keys, want a quarter", h.Algorithm, heir, n)
			}
		}
		all := &state{out: map[int]bool{0: true, 1: true, 2: true, 3: true, 4: true}}
		if got := owner(s, all, 1); got != "" {
			t.Errorf("%v: when all are out, %s is picked", h.Algorithm, got)
		}
	}
}

// TestHashedRetriesGoElsewhere: after the key's own come others, each once, and not the same for all keys.
func TestHashedRetriesGoElsewhere(t *testing.T) {
	t.Parallel()
	for _, h := range []lb.Hashing{ring, maglev, {}} {
		s := hashSet(h, places(4)...)
		second := make(map[int]int)
		for key := range 400 {
			var tried []int32
			for range 4 {
				way := lb.Way{Key: fmt.Sprint("key-", key), Tried: tried}
				m := s.Choose(&state{}, &way)
				if m < 0 || slices.Contains(tried, int32(m)) {
					t.Fatalf("%v: after %v comes %d", h.Algorithm, tried, m)
				}
				tried = append(tried, int32(m))
			}
			second[int(tried[1])]++
			if m := s.Choose(&state{}, &lb.Way{Key: fmt.Sprint("key-", key), Tried: tried}); m != int(tried[0]) {
				t.Fatalf("%v: when all were tried comes %d, want the key's own, %d", h.Algorithm, m, tried[0])
			}
		}
		for m := range 4 {
			if second[m] < 40 {
				t.Errorf("%v: second tries went to %v, want all alike", h.Algorithm, second)
				break
			}
		}
	}
}

// TestHashedTablesAreTheSameEverywhere: the order in which endpoints are known does not matter, nor what else is said of them.
func TestHashedTablesAreTheSameEverywhere(t *testing.T) {
	t.Parallel()
	for _, h := range []lb.Hashing{ring, maglev} {
		eps := places(7)
		s := hashSet(h, eps...)
		slices.Reverse(eps)
		other := hashSet(h, eps...)
		for key := range 5000 {
			if a, b := owner(s, &state{}, key), owner(other, &state{}, key); a != b {
				t.Fatalf("%v: key %d belongs to %s here and to %s there", h.Algorithm, key, a, b)
			}
		}
	}
}

// TestTablesAreMadeOnce: a set of the same endpoints takes the table over, whatever else is new about them.
func TestTablesAreMadeOnce(t *testing.T) {
	for _, h := range []lb.Hashing{ring, maglev} {
		eps := places(100)
		first := hashSet(h, eps...)
		next := slices.Clone(eps)
		changed := *eps[3].Workload
		changed.Labels = map[string]string{"new": "label"}
		next[3].Workload = &changed
		allocated := func(like ...*lb.Set) uint64 {
			r, p := setRequest(next...), lb.Preference{Hashing: h, Like: like}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			lb.NewSet(r, p)
			runtime.ReadMemStats(&after)
			return after.TotalAlloc - before.TotalAlloc
		}
		if again, made := allocated(nil, first), allocated(nil); again > made/4 {
			t.Errorf("%v: a set of the same endpoints takes %d bytes, and %d without the other's table", h.Algorithm, again, made)
		}
		changed.Capacity = 2
		s := lb.NewSet(setRequest(next...), lb.Preference{Hashing: h, Like: []*lb.Set{first}})
		n := 0
		for key := range 20_000 {
			if owner(s, &state{}, key) == changed.UID {
				n++
			}
		}
		if n < 300 { // 198 of weight 1, 396 of weight 2
			t.Errorf("%v: of twice the weight, an endpoint has %d of 20000 keys", h.Algorithm, n)
		}
	}
}

// TestTablesAreBounded: many localities with a large table each share the bound of one set.
func TestTablesAreBounded(t *testing.T) {
	for _, h := range []lb.Hashing{{Algorithm: mesh.BalancerMaglev, Size: 5000011}, {Algorithm: mesh.BalancerRingHash, Size: mesh.MaxRingSize}} {
		var eps []mesh.Endpoint
		to := make(map[string]uint32)
		for i := range 20 {
			eps = append(eps, place(2*i, fmt.Sprint("r", i), 1), place(2*i+1, fmt.Sprint("r", i), 1))
			to[fmt.Sprint("r", i)] = 5
		}
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		s := lb.NewSet(setRequest(eps...), lb.Preference{Hashing: h, Locality: &mesh.LocalityBalance{
			Distribute: []mesh.LocalityDistribute{{From: "*", To: to}}}})
		runtime.GC()
		runtime.ReadMemStats(&after)
		if got := int64(after.HeapAlloc) - int64(before.HeapAlloc); got > 80<<20 {
			t.Errorf("%v: the tables take %d MB", h.Algorithm, got>>20)
		}
		if owner(s, &state{}, 1) == "" {
			t.Errorf("%v: a key belongs to nobody", h.Algorithm)
		}
	}
}

// BenchmarkNewSet is the cost of one change among many endpoints.
func BenchmarkNewSet(b *testing.B) {
	for name, h := range map[string]lb.Hashing{"none": {}, "ring": ring, "maglev": maglev} {
		b.Run(name+"/1000", func(b *testing.B) {
			r := setRequest(places(1000)...)
			b.ReportAllocs()
			for b.Loop() {
				lb.NewSet(r, lb.Preference{Hashing: h})
			}
		})
	}
}
