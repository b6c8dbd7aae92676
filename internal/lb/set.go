package lb

import (
	"math/bits"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Set is the endpoints that may take what is sent to a port of a service, ordered by where they are: made once, for many
// picks. It never changes. What does, is a State's.
type Set struct {
	Members []Choice // read-only, in the order of Request.Endpoints
	Fault   Error    // why there are none; 0 when there are some

	tiers []tier // the one to use first comes first
}

// tier is the members that are alike in preference.
type tier struct {
	groups []group
}

// group is the members of a tier that get one share of its traffic.
type group struct {
	members []int32
	ends    []uint64 // of the members' parts, by weight, one after the other; nil: they all have the same weight
	stride  uint64   // what spreads turns over the parts
	share   uint64
	spread  *spread // of keys; nil: without a table
}

// State is how the members of a Set are doing, by their place in Members.
type State interface {
	// Calm reports that no member is out or warming up, so that neither need be asked for.
	Calm() bool
	// Out reports that a member must not be used now.
	Out(member int) bool
	// Warmth is the part of its share that a member is to get now, more than 0 and at most 1.
	Warmth(member int) float64
	// Busy is how much is under way to a member.
	Busy(member int) int64
}

// Way is how one pick is made.
type Way struct {
	Algorithm mesh.BalancerAlgorithm // for picks without a Key; BalancerRingHash and BalancerMaglev then mean BalancerRandom
	Key       string                 // what is hashed; "": the pick is by chance
	Turn      uint64                 // with BalancerRoundRobin: how many picks there were before
	Pick      Picker

	// Tried are members not to be picked again, when there are others.
	Tried []int32
	// OtherTiers leaves out the tiers of members tried, when there are others.
	OtherTiers bool
	// MinHealthy, per cent: when the tiers together cannot carry everything, and fewer of one's members are usable, it is forgotten
	// who of them is out (Envoy's panic threshold).
	MinHealthy uint32
}

// attempts bounds the picks in search of a member that has not been tried, or that is warm enough.
const attempts = 5

// overprovision is how many times its members a tier can carry: while 5 in 7 of a tier are usable, nothing goes elsewhere.
const overprovision = 1.4

// Choose picks a member, and returns its place in Members; -1 when none is usable. It allocates nothing.
func (s *Set) Choose(st State, w *Way) int {
	if len(s.Members) == 0 {
		return -1
	}
	p := picking{set: s, way: w, state: st, calm: st.Calm()}
	return p.pick()
}

type picking struct {
	set    *Set
	way    *Way
	state  State
	calm   bool
	panics bool // it is forgotten who is out
}

func (p *picking) pick() int {
	t := p.tier()
	if t == nil {
		return -1
	}
	best := -1
	for range attempts {
		g := p.group(t)
		if g == nil {
			return -1
		}
		m := p.member(g)
		if m < 0 || !tried(p.way.Tried, m) {
			return m
		}
		best = m
		p.way.Turn++
	}
	for i := range t.groups {
		for _, m := range t.groups[i].members {
			if !p.out(m) && !tried(p.way.Tried, int(m)) {
				return int(m)
			}
		}
	}
	return best
}

func tried(list []int32, m int) bool {
	for _, t := range list {
		if int(t) == m {
			return true
		}
	}
	return false
}

// out reports that a member is not to be used.
func (p *picking) out(m int32) bool { return !p.calm && !p.panics && p.state.Out(int(m)) }

// usable counts the members of a tier that are not out.
func (p *picking) usable(t *tier) int {
	n := 0
	for i := range t.groups {
		n += p.usableIn(&t.groups[i])
	}
	return n
}

func (p *picking) usableIn(g *group) int {
	n := 0
	for _, m := range g.members {
		if !p.out(m) {
			n++
		}
	}
	return n
}

func (t *tier) size() int {
	n := 0
	for i := range t.groups {
		n += len(t.groups[i].members)
	}
	return n
}

// has reports whether the tier has one of the members.
func (t *tier) has(members []int32) bool {
	for i := range t.groups {
		for _, m := range t.groups[i].members {
			if tried(members, int(m)) {
				return true
			}
		}
	}
	return false
}

// whole is all traffic, in per cent.
const whole = 100

// tier is the first, as long as enough of it is usable: what it cannot carry goes to the next, and so on.
func (p *picking) tier() *tier {
	tiers := p.set.tiers
	skip := p.way.OtherTiers && len(p.way.Tried) > 0 && p.elsewhere()
	if p.calm && !skip {
		return &tiers[0]
	}
	total := 0.0
	for i := range tiers {
		total += p.capacity(&tiers[i], skip)
	}
	switch {
	case total < whole && p.way.MinHealthy > 0 && !p.calm && !skip:
		return p.strained(total)
	case total == 0:
		return nil
	}
	return draw(tiers, p.chance("tier")*min(total, whole), func(t *tier) float64 { return p.capacity(t, skip) })
}

// strained picks a tier when all of them cannot carry everything, but a part of it in per cent: they share it by what they can
// carry. Those of whose members too few are usable forget who is out; when all do, the tiers share by size.
func (p *picking) strained(total float64) *tier {
	tiers := p.set.tiers
	all, sizes := true, 0
	for i := range tiers {
		all = all && p.tooFew(&tiers[i])
		sizes += tiers[i].size()
	}
	t := &tiers[0]
	switch {
	case total == 0:
	case all:
		t = draw(tiers, p.chance("tier")*float64(sizes), func(t *tier) float64 { return float64(t.size()) })
	default:
		t = draw(tiers, p.chance("tier")*total, func(t *tier) float64 { return p.capacity(t, false) })
	}
	p.panics = p.tooFew(t)
	return t
}

// tooFew reports whether fewer members of a tier are usable than must be for who is out to be passed over.
func (p *picking) tooFew(t *tier) bool { return p.usable(t)*100 < int(p.way.MinHealthy)*t.size() }

// draw picks the one in whose part a number is, that is below the sum of the parts; nil when no part is above 0.
func draw[T any](of []T, at float64, part func(*T) float64) *T {
	var last *T
	for i := range of {
		n := part(&of[i])
		if n <= 0 {
			continue
		}
		if last = &of[i]; at < n {
			break
		}
		at -= n
	}
	return last
}

// elsewhere reports whether a tier without any of the members tried has a usable one.
func (p *picking) elsewhere() bool {
	for i := range p.set.tiers {
		if t := &p.set.tiers[i]; !t.has(p.way.Tried) && p.usable(t) > 0 {
			return true
		}
	}
	return false
}

func (p *picking) capacity(t *tier, skip bool) float64 {
	if skip && t.has(p.way.Tried) {
		return 0
	}
	return min(100, overprovision*100*float64(p.usable(t))/float64(t.size()))
}

// group picks one by its share; what one cannot carry goes to the others.
func (p *picking) group(t *tier) *group {
	if len(t.groups) == 1 {
		return &t.groups[0]
	}
	total := 0.0
	for i := range t.groups {
		total += p.share(&t.groups[i])
	}
	return draw(t.groups, p.chance("group")*total, p.share)
}

func (p *picking) share(g *group) float64 {
	return float64(g.share) * min(1, overprovision*float64(p.usableIn(g))/float64(len(g.members)))
}

// chance is a number in [0, 1): the same for the same key.
func (p *picking) chance(of string) float64 {
	if p.way.Key != "" {
		return uniform(p.way.Key, of)
	}
	return float64(p.way.Pick(1<<53)) / (1 << 53)
}

// member picks one of a group, or -1.
func (p *picking) member(g *group) int {
	if p.way.Key != "" {
		return p.hashed(g)
	}
	switch p.way.Algorithm {
	case mesh.BalancerRoundRobin:
		return p.inTurn(g)
	case mesh.BalancerLeastRequest:
		a := p.random(g)
		if len(g.members) == 1 || a < 0 {
			return a
		}
		b := p.random(g)
		if float64(p.state.Busy(b))*p.weight(a) < float64(p.state.Busy(a))*p.weight(b) {
			return b
		}
		return a
	case mesh.BalancerRandom, mesh.BalancerPassthrough, mesh.BalancerRingHash, mesh.BalancerMaglev:
	}
	return p.random(g)
}

func (p *picking) weight(m int) float64 { return float64(p.set.Members[m].Endpoint.Workload.Capacity) }

// at is the member whose part a number is in.
func (g *group) at(n uint64) int {
	if g.ends == nil {
		return int(n)
	}
	low, high := 0, len(g.ends)-1
	for low < high {
		if mid := (low + high) / 2; n < g.ends[mid] {
			high = mid
		} else {
			low = mid + 1
		}
	}
	return low
}

func (g *group) parts() uint64 {
	if g.ends == nil {
		return uint64(len(g.members))
	}
	return g.ends[len(g.ends)-1]
}

// random picks by weight. A member that warms up is passed over in part.
func (p *picking) random(g *group) int {
	if p.calm {
		return int(g.members[g.at(p.way.Pick(g.parts()))])
	}
	found := -1
	for range 8 * attempts {
		m := g.members[g.at(p.way.Pick(g.parts()))]
		if p.out(m) {
			continue
		}
		found = int(m)
		if w := p.state.Warmth(found); w >= 1 || float64(p.way.Pick(1<<53))/(1<<53) < w {
			return found
		}
	}
	if found < 0 { // nearly all are out
		for i := range g.members {
			if !p.out(g.members[i]) {
				return int(g.members[i])
			}
		}
	}
	return found
}

// inTurn picks the member whose turn it is, each as often as its weight says and those of large weight not all in a row.
// The turns of one that is out go to the others, to another one each time.
func (p *picking) inTurn(g *group) int {
	parts, n := g.parts(), len(g.members)
	high, low := bits.Mul64(p.way.Turn%parts, g.stride)
	_, at := bits.Div64(high%parts, low, parts)
	first := g.at(at)
	if m := g.members[first]; p.calm || !p.out(m) && p.warm(m) {
		return int(m)
	}
	found := -1
	for k := range n - 1 {
		round := int((p.way.Turn / parts) % uint64(n-1))
		if m := g.members[(first+1+(round+k)%(n-1))%n]; !p.out(m) {
			if p.warm(m) {
				return int(m)
			}
			found = int(m)
		}
	}
	if m := g.members[first]; !p.out(m) {
		return int(m) // all are warming up
	}
	return found
}

func (p *picking) warm(m int32) bool {
	w := p.state.Warmth(int(m))
	return w >= 1 || float64(p.way.Pick(1<<53))/(1<<53) < w
}
