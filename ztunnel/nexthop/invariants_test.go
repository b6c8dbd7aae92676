package nexthop_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/ztunnel/nexthop"
)

// TestWhatHoldsForEveryHop decides for random meshes and holds every hop against what must be true of all, so that no
// combination of services, waypoints and networks opens a way around the mesh.
func TestWhatHoldsForEveryHop(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(11, 12))
	seen := make(map[string]int)
	for range 1500 {
		s, workloads := randomMesh(rng)
		for range 20 {
			from := workloads[rng.IntN(len(workloads))]
			dst := netip.AddrPortFrom(randomAddr(rng), uint16(80+rng.IntN(3)))
			hop, err := nexthop.Outbound(s, from, dst, rng.Uint64N)
			if err != nil {
				e, ok := errors.AsType[*nexthop.Error](err)
				if !ok {
					t.Fatalf("Outbound: %#v, want a *nexthop.Error", err)
				}
				if hop.Protocol != nexthop.ProtocolUnknown || hop.Addr.IsValid() {
					t.Fatalf("Outbound(%s, %v) = %+v beside error %v", from.UID, dst, hop, err)
				}
				seen[e.Fault.String()]++
				continue
			}
			seen[hop.Why.String()]++
			if fault := hopFault(s, from, dst, hop); fault != "" {
				t.Fatalf("Outbound(%s, %v) = %+v: %s", from.UID, dst, hop, fault)
			}
		}
	}
	for _, want := range []fmt.Stringer{
		nexthop.UnknownDestination, nexthop.PassthroughService, nexthop.DirectToWorkload, nexthop.DirectToEndpoint,
		nexthop.ThroughServiceWaypoint, nexthop.ThroughWorkloadWaypoint, nexthop.ThroughNetworkGateway,
		nexthop.NoEndpoint, nexthop.UnknownWaypoint, nexthop.UnreachableNetwork,
	} {
		if seen[want.String()] < 20 {
			t.Errorf("only %d random decisions were %q: the generator is too weak", seen[want.String()], want)
		}
	}
}

// hopFault says what is wrong with a hop, or "".
func hopFault(s *mesh.Snapshot, from *mesh.Workload, dst netip.AddrPort, hop nexthop.Hop) string {
	to := s.Find(mesh.NetworkAddr{Network: from.Network, Addr: dst.Addr()}, from.Namespace)
	switch {
	case hop.Addr.Port() == 0:
		return "no port to dial"
	case hop.Addr.Addr().IsValid() == (hop.Resolve != ""):
		return "neither an address nor a name to resolve, or both"
	case hop.Service != to.Service:
		return "another service than the one addressed"
	case to.IsZero():
		if hop.Protocol != nexthop.TCP || hop.Addr != dst || hop.Workload != nil {
			return "an unknown destination is not passed through untouched"
		}
		return ""
	}
	switch hop.Protocol {
	case nexthop.TCP:
		if len(hop.Expect)+len(hop.InnerExpect) > 0 || hop.Authority != "" {
			return "plain TCP that expects something"
		}
		if hop.Why == nexthop.PassthroughService {
			if to.Service == nil || to.Service.LB.Mode != mesh.LBPassthrough || hop.Addr != dst {
				return "passed through what did not ask for it"
			}
			break
		}
		if hop.Workload.Protocol == mesh.ProtocolHBONE || hop.Workload.Network != from.Network {
			return "plain TCP to a workload that must be tunnelled to"
		}
	case nexthop.HBONE, nexthop.DoubleHBONE:
		if !slices.Contains(hop.Expect, hop.Workload.Identity()) || hop.Authority == "" {
			return "a tunnel to nobody in particular"
		}
	case nexthop.ProtocolUnknown:
		return "no protocol"
	}
	return waypointFault(s, from, to, dst, hop)
}

// waypointFault tells when traffic that must see a waypoint does not.
func waypointFault(s *mesh.Snapshot, from *mesh.Workload, to mesh.Address, dst netip.AddrPort, hop nexthop.Hop) string {
	var gws []mesh.GatewayAddress
	switch {
	case to.Workload != nil:
		gws = append(gws, to.Workload.Waypoint)
	case len(to.Service.WeightedWaypoints) > 0:
		for _, w := range to.Service.WeightedWaypoints {
			gws = append(gws, w.Gateway)
		}
	default:
		gws = append(gws, to.Service.Waypoint)
	}
	if gws[0].IsZero() {
		return ""
	}
	var instances []string
	for _, gw := range gws {
		for _, ep := range s.Endpoints(mesh.ServiceKey(gw.Namespace, gw.Hostname)) {
			instances = append(instances, ep.Workload.UID)
		}
	}
	switch {
	case slices.Contains(instances, from.UID), hop.Protocol == nexthop.DoubleHBONE:
		return ""
	case hop.Protocol != nexthop.HBONE || !slices.Contains(instances, hop.Workload.UID):
		return "goes around the waypoint"
	case hop.Authority != dst.String():
		return "the waypoint is not told the original destination"
	}
	return ""
}

func randomAddr(rng *rand.Rand) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 0, 0, byte(rng.IntN(10))})
}

func randomMesh(rng *rand.Rand) (*mesh.Snapshot, []*mesh.Workload) {
	flip := func(n int) bool { return rng.IntN(n) == 0 }
	hosts := []string{"s0", "s1", "wp0", "wp1"}
	network := func() string { return []string{"", "", "n2"}[rng.IntN(3)] }
	waypoint := func() mesh.GatewayAddress {
		return mesh.GatewayAddress{Namespace: "ns", Hostname: []string{"wp0", "wp1", "gone"}[rng.IntN(3)], Port: 15008}
	}
	var d mesh.Delta
	for i := range 6 {
		w := &mesh.Workload{
			UID: fmt.Sprint("c//Pod/ns/w", i), Namespace: "ns", Name: fmt.Sprint("w", i), TrustDomain: "td",
			ServiceAccount: fmt.Sprint("sa", i), Network: network(), Protocol: mesh.TunnelProtocol(rng.IntN(2)), Healthy: !flip(5), Capacity: 1,
		}
		switch rng.IntN(5) {
		case 0:
			w.Hostname = "host.example"
		default:
			w.Addrs = []netip.Addr{randomAddr(rng)}
		}
		if flip(3) {
			w.Waypoint = waypoint()
		}
		if flip(2) {
			w.NetworkGateway = mesh.GatewayAddress{Addr: mesh.NetworkAddr{Network: network(), Addr: randomAddr(rng)}, Port: 15008}
		}
		for _, h := range hosts {
			if flip(3) {
				w.Services = append(w.Services, mesh.ServicePorts{Service: "ns/" + h})
			}
		}
		d.Workloads = append(d.Workloads, w)
	}
	for _, h := range hosts {
		svc := &mesh.Service{
			Namespace: "ns", Hostname: h, VIPs: []mesh.VIP{{Network: network(), Prefix: netip.PrefixFrom(randomAddr(rng), 32)}},
			Ports: []mesh.Port{{ServicePort: 80, TargetPort: 8080}, {ServicePort: 81, TargetPort: 81}, {ServicePort: 15008, TargetPort: 15008}},
		}
		if flip(2) {
			svc.SANs = []mesh.Identity{{TrustDomain: "td", Namespace: "ns", ServiceAccount: "san"}}
		}
		if flip(6) {
			svc.LB.Mode = mesh.LBPassthrough
		}
		switch rng.IntN(4) {
		case 0:
			svc.Waypoint = waypoint()
		case 1:
			svc.WeightedWaypoints = []mesh.WeightedGateway{{Gateway: waypoint(), Weight: 1}, {Gateway: waypoint(), Weight: 2}}
		}
		d.Services = append(d.Services, svc)
	}
	return new(mesh.Snapshot).Apply(d), d.Workloads
}
