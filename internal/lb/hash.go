package lb

import (
	"cmp"
	"math"
	"math/bits"
	"slices"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Hashing is how the keys of requests are mapped to members.
type Hashing struct {
	// Algorithm is BalancerRingHash or BalancerMaglev. With any other there is no table, and keys are mapped as Pick does.
	Algorithm mesh.BalancerAlgorithm
	// Size is that of the ring in points, at least, or of Maglev's table in slots. 0: DefaultRingSize, DefaultTableSize.
	Size uint64
}

// The sizes where none is said.
const (
	DefaultRingSize  = 1024
	DefaultTableSize = 65537
)

// A member has pointsEach points on the ring, on the average, or more where a larger ring is asked for, as long as the ring has no
// more than maxPoints. While it has fewer, a member that comes or goes leaves the points of the others where they are.
const (
	pointsEach = 512
	maxPoints  = 1 << 17
)

// maxPlaces bounds what the tables of one set have of points and slots where a size is asked for: the groups after those that fill
// it have the size where none is said. A point takes 8 bytes, a slot 4.
const maxPlaces = 8 << 20

// orDefault is the hashing of a group of a set whose other groups have taken that many places.
func (h Hashing) orDefault(taken uint64) Hashing {
	if taken+h.Size > maxPlaces {
		h.Size = 0
	}
	return h
}

// spread is the member of a group that a key belongs to, and who comes after it: a ring or Maglev's table. It never changes.
type spread struct {
	hashing Hashing
	of      []named // what it was made of: the members by their place in the group

	ring  []uint64 // points in their order: the upper bits are where, the lower ones whose
	slots []uint32 // or whose each slot is
}

// named is a member as far as hashing goes.
type named struct {
	uid    string
	weight uint32
}

// memberBits of a point say whose it is: more members than that have no memory to be in.
const memberBits = 24

// spreadOver makes the table of members, or takes over that of another set which has the same.
func (h Hashing) spreadOver(of []named, like []*Set) *spread {
	if h.Algorithm != mesh.BalancerRingHash && h.Algorithm != mesh.BalancerMaglev || len(of) < 2 || len(of) >= 1<<memberBits {
		return nil
	}
	for _, other := range like {
		if s := other.spreadOver(h, of); s != nil {
			return s
		}
	}
	s := &spread{hashing: h, of: of}
	if h.Algorithm == mesh.BalancerMaglev {
		s.slots = slotsOf(of, h.Size)
		return s
	}
	s.ring = ringOf(of, h.Size)
	return s
}

// spreadOver is the table of this set that is made of the same members in the same way; nil: it has none. s may be nil.
func (s *Set) spreadOver(h Hashing, of []named) *spread {
	if s == nil {
		return nil
	}
	for i := range s.tiers {
		for j := range s.tiers[i].groups {
			if t := s.tiers[i].groups[j].spread; t != nil && t.hashing == h && slices.Equal(t.of, of) {
				return t
			}
		}
	}
	return nil
}

// ringOf puts every member's points on a ring, by weight, each at least once.
func ringOf(of []named, least uint64) []uint64 {
	least = min(cmp.Or(least, DefaultRingSize), mesh.MaxRingSize)
	size := max(min(uint64(len(of))*pointsEach, maxPoints), least)
	total := totalOf(of)
	ring := make([]uint64, 0, size+uint64(len(of)))
	for i := range of {
		// The points of a name are always the same, so many of them as its weight asks for.
		point := digest(of[i].uid)
		for range max(1, uint64(math.Round(float64(size)*float64(of[i].weight)/float64(total)))) {
			point += 0x9e3779b97f4a7c15 // the golden section: each is elsewhere (splitmix64)
			ring = append(ring, mixed(point)>>memberBits<<memberBits|uint64(i))
		}
	}
	return sorted(ring)
}

// sorted sorts by the bits above memberBits, byte by byte: what is random is in order sooner so than by comparisons. Points in
// the very same place keep their order, which is that of members.
func sorted(points []uint64) []uint64 {
	spare := make([]uint64, len(points))
	for shift := memberBits; shift < 64; shift += 8 {
		var begins [257]int
		for _, p := range points {
			begins[int(byte(p>>shift))+1]++
		}
		for i := 1; i < len(begins); i++ {
			begins[i] += begins[i-1]
		}
		for _, p := range points {
			b := byte(p >> shift)
			spare[begins[b]] = p
			begins[b]++
		}
		points, spare = spare, points
	}
	return points
}

// slotsOf fills Maglev's table (Eisenbud et al., 2016, 3.4): the members take turns to take the next free slot of their own order of
// all slots, until each has its part of them, which differs from its weight's by less than one.
func slotsOf(of []named, size uint64) []uint32 {
	if size = cmp.Or(size, DefaultTableSize); !mesh.IsTableSize(size) {
		size = DefaultTableSize // in another table, a member's order might never come to a free slot
	}
	const free = math.MaxUint32
	slots := make([]uint32, size)
	for i := range slots {
		slots[i] = free
	}
	type taker struct {
		member           uint32
		at, skip, wanted uint64
	}
	takers := make([]taker, len(of))
	for i := range of {
		h := digest(of[i].uid)
		takers[i] = taker{member: uint32(i), at: mixed(h) % size, skip: mixed(^h)%(size-1) + 1}
	}
	// Who comes first must not depend on the order the members are given in.
	slices.SortFunc(takers, func(a, b taker) int { return cmp.Compare(of[a.member].uid, of[b.member].uid) })
	total, before := totalOf(of), uint64(0)
	for i := range takers {
		// Parts lie on a line one after the other; a slot is whose part it begins in.
		after := before + uint64(of[takers[i].member].weight)
		takers[i].wanted = part(size, after, total) - part(size, before, total)
		before = after
	}
	for len(takers) > 0 {
		turn := takers[:0]
		for _, t := range takers {
			if t.wanted == 0 {
				continue
			}
			for slots[t.at] != free {
				if t.at += t.skip; t.at >= size {
					t.at -= size
				}
			}
			slots[t.at] = t.member
			t.wanted--
			turn = append(turn, t)
		}
		takers = turn
	}
	return slots
}

// part is how many of size slots begin before that much of the whole: size*of/total, rounded up.
func part(size, of, total uint64) uint64 {
	high, low := bits.Mul64(size, of)
	low, carry := bits.Add64(low, total-1, 0)
	n, _ := bits.Div64(high+carry, low, total)
	return n
}

func totalOf(of []named) uint64 {
	total := uint64(0)
	for i := range of {
		total += uint64(of[i].weight)
	}
	return total
}

// size is how many places there are.
func (s *spread) size() int { return len(s.ring) + len(s.slots) }

// first is the place of a key's own member.
func (s *spread) first(key string) int {
	h := mixed(digest(key))
	if s.slots != nil {
		return int(h % uint64(len(s.slots)))
	}
	at, _ := slices.BinarySearch(s.ring, h>>memberBits<<memberBits)
	if at == len(s.ring) {
		at = 0 // round the ring
	}
	return at
}

// at is whose a place is.
func (s *spread) at(place int) int {
	if s.slots != nil {
		return int(s.slots[place])
	}
	return int(s.ring[place] & (1<<memberBits - 1))
}

// hashed picks the key's own member; when that is out or was tried, who comes next on the ring or in the table.
func (p *picking) hashed(g *group) int {
	if g.spread == nil {
		return p.highest(g)
	}
	place, size := g.spread.first(p.way.Key), g.spread.size()
	best := -1
	for range size {
		m := g.members[g.spread.at(place)]
		if place++; place == size {
			place = 0
		}
		switch {
		case p.out(m):
		case !tried(p.way.Tried, int(m)):
			return int(m)
		case best < 0:
			best = int(m)
		}
	}
	return best
}

// highest picks the key's own member without a table, as Pick does.
func (p *picking) highest(g *group) int {
	best, highest, fresh := -1, 0.0, false
	for _, m := range g.members {
		if p.out(m) {
			continue
		}
		untried := !tried(p.way.Tried, int(m))
		s := score(p.way.Key, p.set.Members[m].Endpoint.Workload)
		if best < 0 || untried && !fresh || untried == fresh && s > highest {
			best, highest, fresh = int(m), s, untried
		}
	}
	return best
}

// score is how much a workload is a key's own: it belongs to the one of highest score (weighted rendezvous hashing). -ln of a
// uniform number is exponential, and of several such the one divided by its weight is least with a chance in proportion to that
// weight.
func score(key string, w *mesh.Workload) float64 {
	return float64(w.Capacity) / -math.Log(uniform(key, w.UID))
}

// uniform makes two names a number in (0, 1).
func uniform(a, b string) float64 {
	return (float64(mixed(add(digest(a), b))>>11) + 0.5) / (1 << 53)
}

// digest makes a name a number: FNV-1a.
func digest(s string) uint64 { return add(14695981039346656037, s) }

// add goes on with a digest. Names one after the other are told apart by a byte that no name has.
func add(h uint64, s string) uint64 {
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return (h ^ 0xff) * 1099511628211
}

// mixed spreads a digest's bits, which differ little between names that differ at their ends (murmur3's finalizer).
func mixed(h uint64) uint64 {
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	h ^= h >> 33
	return h
}
