package lb

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Preference is what a traffic policy adds to a service's own preference of near endpoints.
type Preference struct {
	Locality *mesh.LocalityBalance // localityLbSetting; nil: nothing is said
	// Ejects: failing endpoints are taken out, so that farther ones get their turn. Then nearer ones are preferred, unless
	// something else is said.
	Ejects bool

	Hashing Hashing // of requests with a key
	Like    []*Set  // may be nil, and hold nil: sets whose tables are taken over where they fit, for making them costs
}

// NewSet finds the endpoints that may take what From sends to the port of r.Dst, and orders them by where they are. A
// PASSTHROUGH service has no set: Pick knows where to go.
func NewSet(r *Request, p Preference) *Set {
	s := &Set{}
	m := maker{Set: s, hashing: p.Hashing, like: p.Like}
	furthest := NoEndpoints
	var order []int // by member: the lower, the sooner it is used
	for i := range r.Endpoints {
		rank, fault := r.rank(&r.Endpoints[i])
		if fault != 0 {
			furthest = max(furthest, fault)
			continue
		}
		s.Members = append(s.Members, r.choose(&r.Endpoints[i]))
		order = append(order, -rank)
	}
	if len(s.Members) == 0 {
		s.Fault = furthest
		return s
	}
	l := p.Locality
	switch {
	case l == nil && r.Service.LB.Mode == mesh.LBFailover: // by rank
	case l != nil && len(l.Distribute) > 0:
		clear(order)
		m.distribute(r.From, l.Distribute)
	case l != nil && l.Disabled, !p.Ejects:
		clear(order)
	default:
		for i, m := range s.Members {
			order[i] = distance(r.From, m.Endpoint.Workload, l)
		}
	}
	if s.tiers == nil {
		m.arrange(order)
	}
	return s
}

// maker makes a set.
type maker struct {
	*Set
	hashing Hashing
	like    []*Set
	places  uint64 // of its tables
}

// arrange makes a tier of all members of each order.
func (s *maker) arrange(order []int) {
	for _, o := range slices.Compact(slices.Sorted(slices.Values(order))) {
		var members []int32
		for i := range order {
			if order[i] == o {
				members = append(members, int32(i))
			}
		}
		s.tiers = append(s.tiers, tier{groups: []group{s.group(members, 1)}})
	}
}

func (s *maker) group(members []int32, share uint64) group {
	g := group{members: members, share: share, stride: 1}
	end, same := uint64(0), true
	names := make([]named, len(members))
	for i, m := range members {
		w := s.Members[m].Endpoint.Workload
		names[i] = named{w.UID, w.Capacity}
		weight := w.Capacity
		same = same && weight == s.Members[members[0]].Endpoint.Workload.Capacity
		end += uint64(weight)
		g.ends = append(g.ends, end)
	}
	if g.spread = s.hashing.orDefault(s.places).spreadOver(names, s.like); g.spread != nil {
		s.places += uint64(g.spread.size())
	}
	if same {
		g.ends = nil
		return g
	}
	// A step of about the golden section, without a divisor in common with the whole, meets every part once and the parts
	// of one member far from each other.
	for g.stride = max(1, end*618/1000); gcd(g.stride, end) != 1; g.stride++ {
	}
	return g
}

func gcd(a, b uint64) uint64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// distribute makes one tier of the parts that the first rule for the client's locality names. Endpoints elsewhere get
// nothing. Without such a rule, all are alike.
func (s *maker) distribute(from *mesh.Workload, rules []mesh.LocalityDistribute) {
	i := slices.IndexFunc(rules, func(d mesh.LocalityDistribute) bool { return within(from.Locality, d.From) })
	if i < 0 {
		return
	}
	// The most exact name of a locality counts.
	names := slices.SortedFunc(maps.Keys(rules[i].To), func(a, b string) int {
		return cmp.Or(cmp.Compare(exactness(b), exactness(a)), cmp.Compare(a, b))
	})
	parts := make([][]int32, len(names))
	for m := range s.Members {
		w := s.Members[m].Endpoint.Workload
		if at := slices.IndexFunc(names, func(n string) bool { return within(w.Locality, n) }); at >= 0 {
			parts[at] = append(parts[at], int32(m))
		}
	}
	var t tier
	for at, members := range parts {
		if share := rules[i].To[names[at]]; len(members) > 0 && share > 0 {
			t.groups = append(t.groups, s.group(members, uint64(share)))
		}
	}
	if s.tiers = []tier{t}; len(t.groups) == 0 {
		*s.Set = Set{Fault: NoLocalEndpoints}
	}
}

// within reports whether a locality is what a name, region/zone/subzone, stands for: the last parts may be * or missing.
func within(l mesh.Locality, name string) bool {
	parts := [3]string{l.Region, l.Zone, l.Subzone}
	for i := 0; name != ""; i++ {
		var part string
		if part, name, _ = strings.Cut(name, "/"); part == "*" {
			return true
		}
		if i == len(parts) || part != parts[i] {
			return false
		}
	}
	return true
}

// exactness is how many parts of a locality a name fixes.
func exactness(name string) int {
	if name = strings.TrimRight(name, "/*"); name == "" {
		return 0
	}
	return 1 + strings.Count(name, "/")
}

// distance says how far an endpoint is: by the labels of failoverPriority that it shares with the client, and by region,
// zone and subzone, where that is asked for or nothing is.
func distance(from, to *mesh.Workload, l *mesh.LocalityBalance) int {
	if l == nil {
		return apart(from.Locality, to.Locality, nil)
	}
	d := 0
	if n := len(l.FailoverPriority); n > 0 {
		shared := 0
		for shared < n && sharesLabel(l.FailoverPriority[shared], from, to) {
			shared++
		}
		if d = n - shared; len(l.Failover) == 0 {
			return d
		}
	}
	const places = 5 // that apart tells from each other
	return d*places + apart(from.Locality, to.Locality, l.Failover)
}

// apart is 0 in the same subzone, 1 in the same zone, 2 in the same region, 3 in another, 4 in one to which the client's does
// not fail over.
func apart(from, to mesh.Locality, failover []mesh.LocalityFailover) int {
	switch {
	case from == to:
		return 0
	case from.Region == to.Region && from.Zone == to.Zone:
		return 1
	case from.Region == to.Region:
		return 2
	}
	for _, f := range failover {
		if f.From == from.Region {
			if f.To == to.Region {
				return 3
			}
			return 4
		}
	}
	return 3
}

// sharesLabel compares one label, key or key=value. With a value, the client is taken to have that.
func sharesLabel(label string, from, to *mesh.Workload) bool {
	key, value, fixed := strings.Cut(label, "=")
	if !fixed {
		value = placeLabel(key, from)
	}
	return placeLabel(key, to) == value
}

// placeLabel is a label of a workload, those of its place among them.
func placeLabel(key string, w *mesh.Workload) string {
	switch key {
	case "topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/region":
		return w.Locality.Region
	case "topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone":
		return w.Locality.Zone
	case "topology.istio.io/subzone":
		return w.Locality.Subzone
	case "topology.istio.io/network":
		return w.Network
	case "topology.istio.io/cluster":
		return w.ClusterID
	case "kubernetes.io/hostname":
		return w.Node
	}
	return w.Labels[key]
}
