package nexthop

import (
	"net/netip"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Inbound decides where a CONNECT request that arrived for a workload goes. local is where its TCP connection arrived:
// the workload's own address at the HBONE port. The hop always leads to that address; the authority chooses the port, and
// must name the workload. The error is an *Error, whose Status refuses the request; the Hop beside it has no protocol.
//
// Hop.Addr is the destination to authorize: the application's port, not the tunnel's.
func Inbound(s *mesh.Snapshot, to *mesh.Workload, local netip.AddrPort, authority string) (Hop, error) {
	a, ok := parseAuthority(authority)
	if !ok {
		return Hop{}, &Error{Fault: BadAuthority, Detail: quote(authority)}
	}
	if to == nil {
		return Hop{}, &Error{Fault: UnknownWorkload}
	}
	local = mesh.Unmap(local)
	hop := Hop{Protocol: TCP, Why: ToApplication, Workload: to}
	port := a.port
	if a.host == "" {
		hop.Target = netip.AddrPortFrom(a.addr, a.port)
		if !mayAskFor(s, to, local.Addr(), a.addr) {
			return Hop{}, &Error{Fault: ForeignAddress, Detail: a.addr.String()}
		}
	} else {
		svc := s.ServiceNamed(a.host, to.Namespace)
		if svc == nil {
			return Hop{}, &Error{Fault: UnknownService, Detail: a.host}
		}
		hop.Service, hop.ForwardedHost = svc, svc.Hostname
		if port = localPort(to, svc, a.port); port == 0 {
			return Hop{Workload: to, Service: svc}, &Error{Fault: NoPort, Detail: hostPort(a.host, a.port)}
		}
		if to.AppTunnel.Proxy {
			vip := vipOf(svc, to.Network)
			if !vip.IsValid() {
				return Hop{Workload: to, Service: svc}, &Error{Fault: NoAddress, Detail: a.host}
			}
			hop.Target = netip.AddrPortFrom(vip, a.port)
		}
	}
	hop.AppTunnel = to.AppTunnel
	if to.AppTunnel.Port != 0 {
		port = to.AppTunnel.Port
	}
	if reserved(port) {
		return Hop{}, &Error{Fault: SelfCall, Detail: netip.AddrPortFrom(local.Addr(), port).String()}
	}
	hop.Addr = netip.AddrPortFrom(local.Addr(), port)
	return hop, nil
}

// Passthrough decides where a plaintext connection that arrived for a workload goes: to where it was going, dst, unless
// that is one of the proxy's own ports. The error is an *Error.
func Passthrough(to *mesh.Workload, dst netip.AddrPort) (Hop, error) {
	dst = mesh.Unmap(dst)
	if reserved(dst.Port()) {
		return Hop{}, &Error{Fault: SelfCall, Detail: dst.String()}
	}
	if to == nil {
		return Hop{}, &Error{Fault: UnknownWorkload}
	}
	return Hop{Protocol: TCP, Why: ToApplication, Addr: dst, Target: dst, Workload: to}, nil
}

// mayAskFor reports whether a client may ask workload to for an address: one of its own; any, when it is told the
// address and judges itself; or one whose waypoint it is.
func mayAskFor(s *mesh.Snapshot, to *mesh.Workload, local, asked netip.Addr) bool {
	if asked == local || to.HasAddr(asked) || to.AppTunnel != (mesh.AppTunnel{}) {
		return true
	}
	a := s.Find(mesh.NetworkAddr{Network: to.Network, Addr: asked}, to.Namespace)
	switch {
	case a.Service != nil:
		if isWaypoint(s, to, a.Service.Waypoint) {
			return true
		}
		for _, w := range a.Service.WeightedWaypoints {
			if isWaypoint(s, to, w.Gateway) {
				return true
			}
		}
	case a.Workload != nil:
		return isWaypoint(s, to, a.Workload.Waypoint)
	}
	return false
}

// vipOf is the address that stands for a service where a hostname cannot: on that network rather than another, of IPv4 rather
// than IPv6, as Istio's ztunnel has it. It is invalid if there is none.
func vipOf(svc *mesh.Service, network string) (best netip.Addr) {
	most := 0
	for _, vip := range svc.VIPs {
		rank := 1
		if vip.Network == network {
			rank = 2
			if vip.Prefix.Addr().Is4() {
				rank = 3
			}
		}
		if rank > most && vip.Prefix.IsSingleIP() {
			best, most = vip.Prefix.Addr(), rank
		}
	}
	return best
}

// localPort is where a workload listens for a service's port: by its own mapping, else the service's; 0 for nowhere. One that is
// told in a PROXY header which port was asked for listens on the port of its own where it takes them.
func localPort(to *mesh.Workload, svc *mesh.Service, port uint16) uint16 {
	if _, known := svc.Port(port); known && to.AppTunnel.Proxy && to.AppTunnel.Port != 0 {
		return to.AppTunnel.Port
	}
	ep := mesh.Endpoint{Workload: to}
	key := svc.Key()
	for _, sp := range to.Services {
		if sp.Service == key {
			ep.Ports = sp.Ports
		}
	}
	return ep.TargetPort(svc, port)
}
