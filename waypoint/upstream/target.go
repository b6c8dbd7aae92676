package upstream

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/mistnet/mistnet/internal/lb"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/peer"
)

// Target is one port of a service, or of a subset of it, as a view says to talk to it. It never changes.
type Target struct {
	Service  *mesh.Service
	Settings mesh.TrafficSettings
	tls      *mesh.UpstreamTLS // to begin with the application; nil: none
	secret   *mesh.Credential  // for that; nil: none
	Hash     *mesh.ConsistentHash
	Connect  time.Duration       // for a connection to be made
	App      mesh.AppProtocol    // of the port
	Shared   mesh.ConnectionPool // what bounds requests that share a connection
	Cluster  *Cluster

	labels    map[string]string // of the subset
	port      uint16
	self      *mesh.Workload
	endpoints []mesh.Endpoint
	mesh      *mesh.Snapshot
}

// members are the endpoints of a cluster, and how they do. It is an lb.State. The set stays until what it was made of
// changes, whatever else a new view brings.
type members struct {
	set   *lb.Set
	hosts []*host // by place in the set
	byID  map[uint64]int32

	vitals  []*vitals     // what came of asking them, by place; nil: nobody is asked
	failing *atomic.Int64 // how many are out for that, these and others; nil likewise

	// What they were made of.
	service   *mesh.Service
	settings  mesh.TrafficSettings
	secret    *mesh.Credential
	self      *mesh.Workload
	endpoints []mesh.Endpoint

	warmup   *mesh.Warmup // nil: none
	now      atomic.Int64 // of the last pick, in nanoseconds since 1970
	troubled atomic.Int64 // until when somebody may be out or warming up, likewise
}

// host is an endpoint as a member of a cluster.
type host struct {
	Pick
	id    uint64       // by which clients know it
	since time.Time    // it is known
	until atomic.Int64 // it is ejected, in nanoseconds since 1970
	outlier
}

// Calm implements lb.State.
func (m *members) Calm() bool {
	return m.troubled.Load() <= m.now.Load() && (m.failing == nil || m.failing.Load() == 0)
}

// Out implements lb.State.
func (m *members) Out(i int) bool {
	return m.hosts[i].until.Load() > m.now.Load() || m.vitals != nil && m.vitals[i].failing.Load()
}

// Busy implements lb.State.
func (m *members) Busy(i int) int64 { return m.hosts[i].endpoint.active.Load() }

// Warmth implements lb.State. Envoy: the time since the endpoint came, as part of the warm-up, to the power of
// 1/aggression, and at least the smallest part.
func (m *members) Warmth(i int) float64 {
	w := m.warmup
	if w == nil {
		return 1
	}
	passed := float64(m.now.Load()-m.hosts[i].since.UnixNano()) / float64(w.Duration)
	if passed >= 1 {
		return 1
	}
	least := 0.1
	if w.MinPercent.Denominator > 0 {
		least = max(float64(w.MinPercent.Numerator)/float64(w.MinPercent.Denominator), 0.001)
	}
	if w.Aggression > 0 {
		passed = math.Pow(max(passed, 0), 1/w.Aggression)
	}
	return max(passed, least)
}

// worry notes that something is amiss until then.
func (m *members) worry(until int64) {
	for {
		old := m.troubled.Load()
		if old >= until || m.troubled.CompareAndSwap(old, until) {
			return
		}
	}
}

// fits reports whether the members are what a target needs.
func (m *members) fits(t *Target) bool {
	return m != nil && m.service == t.Service && m.settings == t.Settings && m.secret == t.secret && m.self == t.self &&
		len(m.endpoints) == len(t.endpoints) &&
		(len(m.endpoints) == 0 || &m.endpoints[0] == &t.endpoints[0])
}

// members are the endpoints to pick from, for clients that dialled an address of that family.
func (t *Target) members(u *Pool, ipv4 bool) *members {
	at := &t.Cluster.members[0]
	if ipv4 {
		at = &t.Cluster.members[1]
	}
	if m := at.Load(); m.fits(t) {
		return m
	}
	t.Cluster.mu.Lock()
	defer t.Cluster.mu.Unlock()
	if m := at.Load(); m.fits(t) {
		return m
	}
	m := t.gather(u, ipv4, time.Now())
	at.Store(m)
	return m
}

// gather makes the members. The mutex of the cluster is held. An endpoint that was a member before goes on as it did.
func (t *Target) gather(u *Pool, ipv4 bool, now time.Time) *members {
	m := &members{service: t.Service, settings: t.Settings, secret: t.secret, self: t.self, endpoints: t.endpoints}
	if b := t.Settings.Balancer; b != nil && b.Warmup != nil && b.Warmup.Duration > 0 {
		m.warmup = b.Warmup
	}
	dst := netip.IPv6Unspecified()
	if ipv4 {
		dst = netip.IPv4Unspecified()
	}
	r := lb.Request{Service: t.Service, Endpoints: t.endpoints, From: t.self, Dst: netip.AddrPortFrom(dst, t.port), Labels: t.labels}
	elsewhere := func(ep mesh.Endpoint) bool { return ep.Workload.Network != t.self.Network } // gateways are not spoken to
	if slices.ContainsFunc(r.Endpoints, elsewhere) {
		r.Endpoints = slices.DeleteFunc(slices.Clone(r.Endpoints), elsewhere)
	}
	how := lb.Preference{Ejects: t.Settings.Outliers != nil, Hashing: hashing(t.Settings.Balancer)}
	if b := t.Settings.Balancer; b != nil {
		how.Locality = b.Locality
	}
	if l := how.Locality; t.Settings.Health != nil && l != nil && len(l.Failover)+len(l.FailoverPriority) > 0 {
		how.Ejects = true // what was asked for has something to act on; by itself a check prefers nobody
	}
	before := make(map[string]*host)
	for i := range t.Cluster.members {
		if old := t.Cluster.members[i].Load(); old != nil {
			how.Like = append(how.Like, old.set)
			for _, h := range old.hosts {
				before[h.Workload.UID] = h
			}
		}
	}
	m.set = lb.NewSet(&r, how)
	m.byID = make(map[uint64]int32, len(m.set.Members))
	for i := range m.set.Members {
		p := u.member(t, &m.set.Members[i])
		h := before[p.Workload.UID]
		if h == nil {
			h = &host{Pick: p, id: sessionID(p.Workload.UID), since: now}
			h.Pick.host = h
		} else if h.endpoint.key != p.endpoint.key {
			h = &host{Pick: p, id: h.id, since: h.since} // as new: it is reached in another way
			h.Pick.host = h
		}
		m.hosts, m.byID[h.id] = append(m.hosts, h), int32(i)
		m.worry(h.until.Load())
		if m.warmup != nil {
			m.worry(h.since.Add(m.warmup.Duration).UnixNano())
		}
	}
	if t.Settings.Health != nil {
		m.vitals, m.failing = u.vitalsOf(t, m.hosts), &u.failing
	}
	return m
}

// member is how a member of a target's set is reached.
func (u *Pool) member(t *Target, c *lb.Choice) Pick {
	key := endpointKey{addr: netip.AddrPortFrom(c.Addr, c.Port)}
	t.origin(&key)
	if !c.Addr.IsValid() {
		key.host = c.Endpoint.Workload.Hostname
	}
	p := u.to(t.self, key, c.Endpoint.Workload, t.Service.SANs)
	p.self = t.self
	return p
}

// origin puts into key what TLS is to be begun with.
func (t *Target) origin(key *endpointKey) {
	if t.tls != nil {
		key.tls, key.secret, key.name = t.tls, t.secret, t.Service.Hostname
	}
}

// Search is one search for an endpoint: a request's, with its retries, or a connection's.
type Search struct {
	way     lb.Way
	members *members // nil: the original destination is the only one
	tried   [4]int32 // room for way.Tried
	first   int32    // the member to try first, and one more; 0: none

	target  *Target
	at      located        // where the target is resolved dynamically
	from    netip.AddrPort // the client
	dialled netip.AddrPort // by the client
}

// Begin prepares for picks from a target on behalf of a client. key is what to hash; "": nothing.
func (s *Search) Begin(u *Pool, t *Target, c *peer.Client, dialled netip.AddrPort, key string) {
	*s = Search{target: t, from: c.Addr, dialled: dialled}
	if !t.Cluster.used.Load() {
		t.Cluster.used.Store(true)
	}
	if t.Service.LB.Mode == mesh.LBPassthrough || t.Service.Dynamic {
		return
	}
	s.members = t.members(u, dialled.Addr().Is4())
	s.way = lb.Way{Pick: rand.Uint64N, Key: key, Tried: s.tried[:0]}
	if b := t.Settings.Balancer; b != nil && b.Algorithm != mesh.BalancerPassthrough {
		s.way.Algorithm = b.Algorithm
	}
	if o := t.Settings.Outliers; o != nil {
		s.way.MinHealthy = o.MinHealthy
	}
	if s.way.Algorithm == mesh.BalancerRoundRobin {
		s.way.Turn = t.Cluster.turn.Add(1) - 1
	}
	if s.way.Key == "" && t.Service.LB.Sticky {
		if s.way.Key = c.Addr.Addr().String(); c.Workload != nil {
			s.way.Key = c.Workload.UID
		}
	}
}

// Next picks an endpoint; ok is false when there is none.
func (s *Search) Next(u *Pool, now time.Time) (p Pick, ok bool) {
	t := s.target
	switch {
	case t.Service.Dynamic && len(s.at.addrs) == 0: // nobody said whom he means
		return Pick{}, false
	case t.Service.Dynamic:
		p = s.at.next(u, t)
	case s.members == nil:
		key := endpointKey{addr: netip.AddrPortFrom(s.dialled.Addr(), t.port)}
		t.origin(&key)
		p.endpoint = u.endpoint(key)
	default:
		s.members.now.Store(now.UnixNano())
		i := int(s.first - 1)
		if s.first = 0; i < 0 || s.members.Out(i) {
			i = s.members.set.Choose(s.members, &s.way)
		}
		if i < 0 {
			return Pick{}, false
		}
		s.way.Tried = append(s.way.Tried, int32(i))
		p = s.members.hosts[i].Pick
	}
	p.Settings, p.from, p.dialled = &t.Settings, s.from, s.dialled
	if t.Settings.ProxyProtocol != mesh.ProxyProtocolNone {
		key := p.endpoint.key
		key.client = s.from
		p.endpoint = u.endpoint(key)
	}
	return p, true
}

// Again lets the next pick be any endpoint.
func (s *Search) Again() { s.way.Tried = s.way.Tried[:0] }

// Fault is why there is no endpoint.
func (s *Search) Fault() error {
	if s.members == nil || s.members.set.Fault == 0 {
		return lb.NoHealthyEndpoints
	}
	return s.members.set.Fault
}

// Balances reports whether there is a choice between endpoints that clients can know.
func (s *Search) Balances() bool { return s.members != nil }

// Prefer makes the next pick the member that clients know by id, and returns its place; false: there is none.
func (s *Search) Prefer(id uint64) (place int32, ok bool) {
	if place, ok = s.members.byID[id]; ok {
		s.first = place + 1
	}
	return place, ok
}

// IsAt reports whether p is the member at that place.
func (s *Search) IsAt(place int32, p *Pick) bool { return s.members.hosts[place] == p.host }

// OtherTiers makes later picks leave the priorities of those that were tried, if there are others.
func (s *Search) OtherTiers(yes bool) { s.way.OtherTiers = yes }

// Keyed reports whether picks follow from who asks.
func (s *Search) Keyed() bool { return s.way.Key != "" }

// hashing is how what clients are told apart by is mapped to endpoints.
func hashing(b *mesh.Balancer) lb.Hashing {
	if b == nil || b.Hash == nil {
		return lb.Hashing{}
	}
	h := lb.Hashing{Algorithm: b.Algorithm, Size: b.Hash.MinRingSize}
	if b.Algorithm == mesh.BalancerMaglev {
		h.Size = b.Hash.TableSize
	}
	return h
}

// hashOf is what the clients of a service are told apart by; nil: nothing.
func hashOf(b *mesh.Balancer) *mesh.ConsistentHash {
	if b == nil || b.Algorithm != mesh.BalancerRingHash && b.Algorithm != mesh.BalancerMaglev {
		return nil
	}
	return b.Hash
}

// sessionID is the number by which clients know a workload: FNV-1a.
func sessionID(uid string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(uid) {
		h = (h ^ uint64(uid[i])) * 1099511628211
	}
	return h
}
