package lb

import (
	"math"
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
	Algorithm mesh.BalancerAlgorithm // of BalancerRingHash and BalancerMaglev, only Key counts
	Key       string                 // what is hashed; "": the pick is by chance
	Turn      uint64                 // with BalancerRoundRobin: how many picks there were before
	Pick      Picker

	// Tried are members not to be picked again, when there are others.
	Tried []int32
	// OtherTiers leaves out the tiers of members tried, when there are others.
	OtherTiers bool
	// MinHealthy, per cent: when fewer of all members are usable, it is forgotten who is out.
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
	p.panics = !p.calm && w.MinHealthy > 0 && p.usable(nil)*100 < int(w.MinHealthy)*len(s.Members)
	return p.pick()
}

type picking struct {
	set    *Set
	way    *Way
	state  State
	calm   bool
	panics bool
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

// usable counts the members of a tier, or with nil of all, that are not out.
func (p *picking) usable(t *tier) int {
	n := 0
	if t == nil {
		for m := range p.set.Members {
			if !p.state.Out(m) {
				n++
			}
		}
		return n
	}
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

// tier is the first, as long as enough of it is usable: what it cannot carry goes to the next, and so on.
func (p *picking) tier() *tier {
	tiers := p.set.tiers
	if len(tiers) == 1 && p.calm {
		return &tiers[0]
	}
	skip := p.way.OtherTiers && len(p.way.Tried) > 0 && p.elsewhere()
	if p.calm && !skip {
		return &tiers[0]
	}
	// What each can carry, in per cent, one after the other.
	const whole = 100
	total := 0.0
	var last *tier
	for i := range tiers {
		if c := p.capacity(&tiers[i], skip); c > 0 {
			total += c
			last = &tiers[i]
		}
	}
	if last == nil {
		return nil
	}
	at := p.chance("tier") * min(total, whole)
	for i := range tiers {
		if c := p.capacity(&tiers[i], skip); c > 0 {
			if at < c {
				return &tiers[i]
			}
			at -= c
		}
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
	var last *group
	for i := range t.groups {
		if share := p.share(&t.groups[i]); share > 0 {
			total += share
			last = &t.groups[i]
		}
	}
	if last == nil {
		return nil
	}
	at := p.chance("group") * total
	for i := range t.groups {
		if share := p.share(&t.groups[i]); share > 0 {
			if at < share {
				return &t.groups[i]
			}
			at -= share
		}
	}
	return last
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

// hashed picks the key's own member: see the package comment.
func (p *picking) hashed(g *group) int {
	own, highest := -1, 0.0
	for _, m := range g.members {
		if p.out(m) {
			continue
		}
		w := p.set.Members[m].Endpoint.Workload
		score := float64(w.Capacity) / -math.Log(uniform(p.way.Key, w.UID))
		if own < 0 || score > highest {
			own, highest = int(m), score
		}
	}
	return own
}
