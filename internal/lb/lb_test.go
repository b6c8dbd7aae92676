package lb_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/lb"
	"github.com/mistnet/mistnet/internal/mesh"
)

// dumbPick returns the weight of every endpoint that may be picked, or why there is none: one filter after the other,
// each on the whole list.
func dumbPick(r *lb.Request) (weights map[string]uint64, fault lb.Error) {
	eps := slices.Clone(r.Endpoints)
	keep := func(why lb.Error, ok func(w *mesh.Workload, ep mesh.Endpoint) bool) {
		if fault != 0 {
			return
		}
		eps = slices.DeleteFunc(eps, func(ep mesh.Endpoint) bool { return !ok(ep.Workload, ep) })
		if len(eps) == 0 {
			fault = why
		}
	}
	keep(lb.NoEndpoints, func(*mesh.Workload, mesh.Endpoint) bool { return true })
	keep(lb.NoHealthyEndpoints, func(w *mesh.Workload, _ mesh.Endpoint) bool { return w.Healthy || r.Service.LB.AllowUnready })
	keep(lb.NoAddress, func(w *mesh.Workload, _ mesh.Endpoint) bool {
		if w.Network != r.From.Network {
			return w.NetworkGateway != mesh.GatewayAddress{}
		}
		if len(w.Addrs) == 0 {
			return w.Hostname != ""
		}
		return len(dumbAddrs(r, w)) > 0
	})
	keep(lb.NoSuchPort, func(_ *mesh.Workload, ep mesh.Endpoint) bool { return dumbPort(r, ep) != 0 })
	keep(lb.NoCapacity, func(w *mesh.Workload, _ mesh.Endpoint) bool { return w.Capacity > 0 })
	if r.Service.LB.Mode == mesh.LBStrict {
		keep(lb.NoLocalEndpoints, func(w *mesh.Workload, _ mesh.Endpoint) bool {
			return dumbShared(r, w, r.Service.LB.Preference) == len(r.Service.LB.Preference)
		})
	}
	if fault != 0 {
		return nil, fault
	}
	if r.Service.LB.Mode == mesh.LBFailover {
		eps = dumbNearest(r, eps)
	}
	weights = make(map[string]uint64)
	for _, ep := range eps {
		weights[ep.Workload.UID] = uint64(ep.Workload.Capacity)
	}
	return weights, 0
}

// dumbNearest splits at the network first when that is the first scope, then keeps those that share most.
func dumbNearest(r *lb.Request, eps []mesh.Endpoint) []mesh.Endpoint {
	scopes := r.Service.LB.Preference
	if len(scopes) > 0 && scopes[0] == mesh.ScopeNetwork {
		scopes = scopes[1:]
		local := slices.DeleteFunc(slices.Clone(eps), func(ep mesh.Endpoint) bool { return ep.Workload.Network != r.From.Network })
		if len(local) > 0 {
			eps = local
		}
	}
	for n := len(scopes); ; n-- {
		near := slices.DeleteFunc(slices.Clone(eps), func(ep mesh.Endpoint) bool { return dumbShared(r, ep.Workload, scopes) < n })
		if len(near) > 0 {
			return near
		}
	}
}

func dumbShared(r *lb.Request, w *mesh.Workload, scopes []mesh.LBScope) int {
	value := func(w *mesh.Workload, s mesh.LBScope) string {
		return map[mesh.LBScope]string{
			mesh.ScopeRegion: w.Locality.Region, mesh.ScopeZone: w.Locality.Zone, mesh.ScopeSubzone: w.Locality.Subzone,
			mesh.ScopeNode: w.Node, mesh.ScopeCluster: w.ClusterID, mesh.ScopeNetwork: w.Network,
		}[s]
	}
	for i, s := range scopes {
		if s == mesh.ScopeUnknown || value(w, s) != value(r.From, s) {
			return i
		}
	}
	return len(scopes)
}

func dumbAddrs(r *lb.Request, w *mesh.Workload) []netip.Addr {
	var same, other []netip.Addr
	for _, a := range w.Addrs {
		switch {
		case r.Service.Families == mesh.FamiliesIPv4 && !a.Is4(), r.Service.Families == mesh.FamiliesIPv6 && a.Is4():
		case a.Is4() == r.Dst.Addr().Is4():
			same = append(same, a)
		default:
			other = append(other, a)
		}
	}
	return append(same, other...)
}

func dumbPort(r *lb.Request, ep mesh.Endpoint) uint16 {
	for _, ports := range [][]mesh.Port{ep.Ports, r.Service.Ports} {
		for _, p := range ports {
			if p.ServicePort == r.Dst.Port() && p.TargetPort != 0 {
				return p.TargetPort
			}
		}
	}
	if r.Waypoint && (ep.Workload.AppTunnel.Proxy || ep.Workload.AppTunnel.Port != 0) {
		return r.Dst.Port()
	}
	return 0
}

func TestPickEqualsADumbOneOnRandomServices(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(3, 4))
	seen := make(map[lb.Error]int)
	for range 20_000 {
		r := randomRequest(rng)
		weights, fault := dumbPick(r)
		seen[fault]++
		if fault != 0 {
			if _, err := lb.Pick(r, func(uint64) uint64 { t.Fatal("picked from nothing"); return 0 }); err != fault {
				t.Fatalf("Pick(%+v) = %v, want %v", r, err, fault)
			}
			continue
		}
		// Every number of the source is tried once: the count per endpoint is its weight exactly.
		got, total := make(map[string]uint64), uint64(1)
		for n := uint64(0); n < total; n++ {
			c, err := lb.Pick(r, func(bound uint64) uint64 { total = bound; return n })
			if err != nil {
				t.Fatalf("Pick(%+v): %v, want one of %v", r, err, weights)
			}
			got[c.Endpoint.Workload.UID]++
			checkChoice(t, r, c)
		}
		if diff := cmp.Diff(weights, got); diff != "" {
			t.Fatalf("Pick(%+v) of %v (-dumb +got):\n%s", r, say(r), diff)
		}
	}
	for fault := lb.Error(0); fault <= lb.NoLocalEndpoints; fault++ {
		if seen[fault] < 100 {
			t.Errorf("only %d random services gave %q: the generator is too weak", seen[fault], fault)
		}
	}
}

func checkChoice(t *testing.T, r *lb.Request, c lb.Choice) {
	t.Helper()
	w := c.Endpoint.Workload
	want := netip.Addr{}
	if as := dumbAddrs(r, w); len(as) > 0 && w.Network == r.From.Network {
		want = as[0]
	}
	if c.Addr != want || c.Port != dumbPort(r, c.Endpoint) {
		t.Fatalf("Pick = %v:%v, want %v:%v", c.Addr, c.Port, want, dumbPort(r, c.Endpoint))
	}
}

func say(r *lb.Request) (s string) {
	for _, ep := range r.Endpoints {
		s += fmt.Sprintf("\n%+v", *ep.Workload)
	}
	return s
}

func randomRequest(rng *rand.Rand) *lb.Request {
	flip := func(n int) bool { return rng.IntN(n) == 0 }
	name := func() string { return string(rune('a' + rng.IntN(2))) }
	workload := func(i int) *mesh.Workload {
		w := &mesh.Workload{
			UID: fmt.Sprint("w", i), Network: name(), Node: name(), ClusterID: name(), Healthy: !flip(4), Capacity: uint32(rng.IntN(4)),
			Locality: mesh.Locality{Region: name(), Zone: name(), Subzone: name()},
		}
		for _, a := range []string{"10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"} {
			if flip(3) {
				w.Addrs = append(w.Addrs, netip.MustParseAddr(a))
			}
		}
		rng.Shuffle(len(w.Addrs), func(i, j int) { w.Addrs[i], w.Addrs[j] = w.Addrs[j], w.Addrs[i] })
		if flip(2) {
			w.Hostname = "host.example"
		}
		if flip(2) {
			w.NetworkGateway.Port = 15008
		}
		if flip(4) {
			w.AppTunnel = mesh.AppTunnel{Proxy: flip(2), Port: uint16(rng.IntN(2))}
		}
		return w
	}
	ports := func() (ps []mesh.Port) {
		for range rng.IntN(3) {
			ps = append(ps, mesh.Port{ServicePort: uint16(80 + rng.IntN(2)), TargetPort: uint16(8080 * rng.IntN(2))})
		}
		return ps[:min(len(ps), 1)]
	}
	svc := &mesh.Service{Ports: ports(), Families: mesh.IPFamilies(rng.IntN(4))}
	svc.LB = mesh.LoadBalancing{Mode: mesh.LBMode(rng.IntN(3)), AllowUnready: flip(4)}
	for range rng.IntN(4) {
		svc.LB.Preference = append(svc.LB.Preference, mesh.LBScope(rng.IntN(7)))
	}
	if len(svc.LB.Preference) > 0 && flip(2) {
		svc.LB.Preference[0] = mesh.ScopeNetwork
	}
	r := &lb.Request{Service: svc, From: workload(-1), Waypoint: flip(3), Dst: netip.MustParseAddrPort("10.96.0.1:80")}
	if flip(2) {
		r.Dst = netip.MustParseAddrPort("[fd96::1]:80")
	}
	for i := range rng.IntN(7) {
		r.Endpoints = append(r.Endpoints, mesh.Endpoint{Workload: workload(i), Ports: ports()})
	}
	return r
}

// TestLocalNetworkBeatsNearerRemote is the special case of a NETWORK scope that comes first.
func TestLocalNetworkBeatsNearerRemote(t *testing.T) {
	t.Parallel()
	prefer := []mesh.LBScope{mesh.ScopeNetwork, mesh.ScopeRegion, mesh.ScopeZone}
	from := &mesh.Workload{Network: "n1", Locality: mesh.Locality{Region: "r", Zone: "z"}}
	far := endpoint("local but far", "n1", "other", "other")
	near := endpoint("remote but near", "n2", "r", "z")
	nearRegion := endpoint("remote in the region", "n2", "r", "other")
	for _, c := range []struct {
		name string
		eps  []mesh.Endpoint
		want string
	}{
		{"own network first", []mesh.Endpoint{far, near, nearRegion}, "local but far"},
		{"then the nearest of the others", []mesh.Endpoint{nearRegion, near}, "remote but near"},
	} {
		svc := &mesh.Service{
			Ports: []mesh.Port{{ServicePort: 80, TargetPort: 80}},
			LB:    mesh.LoadBalancing{Mode: mesh.LBFailover, Preference: prefer},
		}
		got, err := lb.Pick(&lb.Request{
			Service: svc, Endpoints: c.eps, From: from, Dst: netip.MustParseAddrPort("10.0.0.1:80"),
		}, func(n uint64) uint64 { return n - 1 })
		if err != nil || got.Endpoint.Workload.UID != c.want {
			t.Errorf("%s: Pick = %+v, %v, want %s", c.name, got.Endpoint.Workload, err, c.want)
		}
	}
}

func endpoint(uid, network, region, zone string) mesh.Endpoint {
	return mesh.Endpoint{Workload: &mesh.Workload{
		UID: uid, Network: network, Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.9")}, Healthy: true, Capacity: 1,
		Locality: mesh.Locality{Region: region, Zone: zone}, NetworkGateway: mesh.GatewayAddress{Port: 15008},
	}}
}

func TestPassthroughGoesWhereItWasGoing(t *testing.T) {
	t.Parallel()
	dst := netip.MustParseAddrPort("192.0.2.1:443")
	c, err := lb.Pick(&lb.Request{
		Service: &mesh.Service{LB: mesh.LoadBalancing{Mode: mesh.LBPassthrough}}, From: &mesh.Workload{}, Dst: dst,
	}, rand.Uint64N)
	if err != nil || c.Endpoint.Workload != nil || netip.AddrPortFrom(c.Addr, c.Port) != dst {
		t.Errorf("Pick = %+v, %v, want %v and no endpoint", c, err, dst)
	}
}

// TestPicksFollowCapacity draws from a real source: each share must be within five standard deviations.
func TestPicksFollowCapacity(t *testing.T) {
	t.Parallel()
	r := request(10)
	for i := range r.Endpoints {
		r.Endpoints[i].Workload.Capacity = uint32(i)
	}
	rng := rand.New(rand.NewPCG(5, 6))
	const draws = 100_000
	got := make(map[string]float64)
	for range draws {
		c, err := lb.Pick(r, rng.Uint64N)
		if err != nil {
			t.Fatal(err)
		}
		got[c.Endpoint.Workload.UID]++
	}
	for i, ep := range r.Endpoints {
		p := float64(i) / 45
		want, dev := draws*p, math.Sqrt(draws*p*(1-p))
		if n := got[ep.Workload.UID]; math.Abs(n-want) > 5*dev {
			t.Errorf("endpoint of capacity %d was picked %v times of %d, want %.0f ± %.0f", i, n, draws, want, 5*dev)
		}
	}
}

func TestPickDoesNotAllocate(t *testing.T) {
	r := request(50)
	rng := rand.New(rand.NewPCG(7, 8))
	var pick lb.Picker = rng.Uint64N
	if n := testing.AllocsPerRun(200, func() { _, _ = lb.Pick(r, pick) }); n != 0 {
		t.Errorf("Pick allocates %v times, want 0", n)
	}
	r.Dst = netip.MustParseAddrPort("10.96.0.1:99")
	if n := testing.AllocsPerRun(200, func() { _, _ = lb.Pick(r, pick) }); n != 0 {
		t.Errorf("Pick that fails allocates %v times, want 0", n)
	}
}

func BenchmarkPick(b *testing.B) {
	for _, n := range []int{3, 100, 1000} {
		r := request(n)
		b.Run(fmt.Sprint(n, " endpoints"), func(b *testing.B) {
			for b.Loop() {
				_, _ = lb.Pick(r, rand.Uint64N)
			}
		})
	}
}

// request is a FAILOVER service of n endpoints, as trafficDistribution: PreferClose makes one.
func request(n int) *lb.Request {
	r := &lb.Request{
		Service: &mesh.Service{
			Ports: []mesh.Port{{ServicePort: 80, TargetPort: 8080}},
			LB: mesh.LoadBalancing{Mode: mesh.LBFailover, Preference: []mesh.LBScope{
				mesh.ScopeNetwork, mesh.ScopeRegion, mesh.ScopeZone,
			}},
		},
		From: &mesh.Workload{Locality: mesh.Locality{Region: "r", Zone: "z"}},
		Dst:  netip.MustParseAddrPort("10.96.0.1:80"),
	}
	for i := range n {
		r.Endpoints = append(r.Endpoints, endpoint(fmt.Sprint("w", i), "", "r", "z"))
	}
	return r
}
