package nexthop

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/mistnet/mistnet/internal/lb"
	"github.com/mistnet/mistnet/internal/mesh"
)

// Outbound decides where a connection from a captured workload to dst goes next. The error is an *Error; the Hop beside
// it has no protocol and only names, for the report, the Service or Workload that was meant.
//
// An address the mesh does not know passes through as plain TCP. Anything the mesh does know is reached as it must be or
// not at all: a waypoint that cannot be found, or a network that cannot be reached, fails the connection.
func Outbound(s *mesh.Snapshot, from *mesh.Workload, dst netip.AddrPort, pick lb.Picker) (Hop, error) {
	if from == nil {
		return Hop{}, &Error{Fault: UnknownWorkload}
	}
	dst = mesh.Unmap(dst)
	if dst.Addr().IsLoopback() && reserved(dst.Port()) {
		return Hop{}, &Error{Fault: SelfCall, Detail: dst.String()}
	}
	o := outbound{s: s, from: from, dst: dst, pick: pick}
	key := mesh.NetworkAddr{Network: from.Network, Addr: dst.Addr().WithZone("")}
	to := s.Find(key, from.Namespace)
	switch {
	case to.Service != nil:
		return o.toService(to.Service)
	case to.Workload != nil:
		return o.toWorkload(to.Workload)
	}
	return Hop{Protocol: TCP, Why: UnknownDestination, Addr: dst, Target: dst, Missing: addrName(key)}, nil
}

// outbound is one decision under way.
type outbound struct {
	s    *mesh.Snapshot
	from *mesh.Workload
	dst  netip.AddrPort
	pick lb.Picker
}

func (o *outbound) toService(svc *mesh.Service) (Hop, error) {
	hop := Hop{Service: svc, ForwardedHost: svc.Hostname, Target: o.dst}
	gw, ok, fault := o.serviceWaypoint(svc)
	if fault != nil {
		return hop, fault
	}
	if ok {
		hop.Why = ThroughServiceWaypoint
		return o.throughWaypoint(hop, gw)
	}
	c, err := lb.Pick(&lb.Request{
		Service: svc, Endpoints: o.s.Endpoints(svc.Key()), From: o.from, Dst: o.dst,
	}, o.pick)
	if err != nil {
		return hop, &Error{Fault: NoEndpoint, Detail: hostPort(svc.Hostname, o.dst.Port()), Err: err}
	}
	w := c.Endpoint.Workload
	if w == nil {
		hop.Protocol, hop.Why, hop.Addr = TCP, PassthroughService, o.dst
		return hop, nil
	}
	if w.Network != o.from.Network {
		return o.throughGateway(hop, w, svc)
	}
	hop.Why = DirectToEndpoint
	return direct(hop, w, c.Addr, c.Port, svc.SANs), nil
}

func (o *outbound) toWorkload(w *mesh.Workload) (Hop, error) {
	hop := Hop{Target: o.dst}
	if !w.Waypoint.IsZero() && !isWaypoint(o.s, o.from, w.Waypoint) {
		hop.Why, hop.Workload = ThroughWorkloadWaypoint, w
		return o.throughWaypoint(hop, w.Waypoint)
	}
	hop.Why = DirectToWorkload
	return direct(hop, w, o.dst.Addr(), o.dst.Port(), nil), nil
}

// direct completes a hop to a workload itself. addr is invalid when its hostname must be resolved.
func direct(hop Hop, w *mesh.Workload, addr netip.Addr, port uint16, sans []mesh.Identity) Hop {
	hop.Workload = w
	if !addr.IsValid() {
		hop.Resolve = w.Hostname
	}
	target := netip.AddrPortFrom(addr, port)
	if w.Protocol != mesh.ProtocolHBONE {
		hop.Protocol, hop.Addr = TCP, target
		return hop
	}
	hop.Protocol, hop.Addr = HBONE, netip.AddrPortFrom(addr, mesh.PortHBONE)
	hop.Expect = identities(w, sans)
	hop.Authority = target.String()
	if hop.Resolve != "" {
		hop.Authority = hostPort(hop.Resolve, port)
	}
	return hop
}

// serviceWaypoint returns the waypoint that traffic to svc must go through, one of several by weight. There is none for
// traffic from one of these waypoints itself: it has been through already and would go round for ever.
func (o *outbound) serviceWaypoint(svc *mesh.Service) (gw mesh.GatewayAddress, ok bool, fault *Error) {
	total := uint64(0)
	for _, w := range svc.WeightedWaypoints {
		total += uint64(w.Weight)
	}
	if total == 0 {
		gw = svc.Waypoint
		return gw, !gw.IsZero() && !isWaypoint(o.s, o.from, gw), nil
	}
	for _, w := range svc.WeightedWaypoints {
		if isWaypoint(o.s, o.from, w.Gateway) {
			return mesh.GatewayAddress{}, false, nil
		}
	}
	n := o.pick(total)
	for _, w := range svc.WeightedWaypoints {
		if n < uint64(w.Weight) {
			if w.Gateway.IsZero() {
				return gw, false, &Error{Fault: UnknownWaypoint, Detail: "of " + svc.Key()}
			}
			return w.Gateway, true, nil
		}
		n -= uint64(w.Weight)
	}
	panic("nexthop: picker returned a number that is not below its bound")
}

// throughWaypoint completes a hop to one endpoint of a waypoint. The authority stays the original destination: the
// waypoint, not we, decides what it stands for.
func (o *outbound) throughWaypoint(hop Hop, gw mesh.GatewayAddress) (Hop, error) {
	e, fault := o.resolve(gw)
	if fault != nil {
		return hop, fault
	}
	if e.workload.Network != o.from.Network {
		return o.throughGateway(hop, e.workload, e.service)
	}
	hop.Protocol, hop.Workload = HBONE, e.workload
	hop.Addr = netip.AddrPortFrom(e.addr, e.port)
	if !e.addr.IsValid() {
		hop.Resolve = e.workload.Hostname
	}
	hop.Authority = o.dst.String()
	hop.Expect = e.identities()
	return hop, nil
}

// throughGateway completes a hop to an endpoint of another network. Only services are known across networks, so the
// authority is a hostname, and the endpoint (or the waypoint in front of it) is proven by the identities that the
// service vouches for.
func (o *outbound) throughGateway(hop Hop, remote *mesh.Workload, vouches *mesh.Service) (Hop, error) {
	unreachable := &Error{Fault: UnreachableNetwork, Detail: remote.UID}
	if remote.NetworkGateway.IsZero() || hop.Service == nil || vouches == nil {
		return hop, unreachable
	}
	unreachable.Detail += " through gateway " + gatewayName(remote.NetworkGateway)
	e, fault := o.resolve(remote.NetworkGateway)
	if fault != nil {
		unreachable.Missing, unreachable.Err = fault.Missing, fault.Err
		return hop, unreachable
	}
	if !e.addr.IsValid() && e.workload.Hostname == "" {
		return hop, unreachable // the gateway itself is behind a gateway
	}
	hop.Protocol, hop.Why, hop.Workload = DoubleHBONE, ThroughNetworkGateway, e.workload
	hop.Addr = netip.AddrPortFrom(e.addr, e.port)
	if !e.addr.IsValid() {
		hop.Resolve = e.workload.Hostname
	}
	hop.Authority = hostPort(hop.Service.Hostname, o.dst.Port())
	hop.Expect, hop.InnerExpect = e.identities(), slices.Clone(vouches.SANs)
	return hop, nil
}

// identities are those of a workload and those its service vouches for, each once.
func identities(w *mesh.Workload, sans []mesh.Identity) []mesh.Identity {
	ids := make([]mesh.Identity, 1, 1+len(sans))
	ids[0] = w.Identity()
	for _, id := range sans {
		if !id.IsZero() && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// addrName is how xDS names an address: network/address.
func addrName(a mesh.NetworkAddr) string { return a.Network + "/" + a.Addr.String() }

func hostPort(host string, port uint16) string {
	return strings.TrimSuffix(host, ".") + ":" + strconv.Itoa(int(port))
}
