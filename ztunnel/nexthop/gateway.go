package nexthop

import (
	"net/netip"

	"github.com/mistnet/mistnet/internal/lb"
	"github.com/mistnet/mistnet/internal/mesh"
)

// gateway is one instance of a waypoint or network gateway.
type gateway struct {
	workload *mesh.Workload
	service  *mesh.Service // it was picked from; nil when it was named by its own address or hostname
	addr     netip.Addr    // invalid when its hostname must be resolved, or it is on another network
	port     uint16
}

func (g *gateway) identities() []mesh.Identity {
	if g.service == nil {
		return identities(g.workload, nil)
	}
	return identities(g.workload, g.service.SANs)
}

// resolve picks an instance of a gateway.
func (o *outbound) resolve(gw mesh.GatewayAddress) (gateway, *Error) {
	to := lookup(o.s, gw, o.from.Namespace)
	switch {
	case to.Service != nil:
		return o.resolveService(gw, to.Service)
	case to.Workload != nil:
		g := gateway{workload: to.Workload, addr: gw.Addr.Addr, port: gw.Port}
		if gw.Hostname != "" {
			g.addr = preferred(to.Workload, o.dst.Addr())
		}
		if g.addr.IsValid() || to.Workload.Hostname != "" || to.Workload.Network != o.from.Network {
			return g, nil
		}
	}
	return gateway{}, &Error{Fault: UnknownWaypoint, Detail: gatewayName(gw), Missing: gatewayName(gw)}
}

func (o *outbound) resolveService(gw mesh.GatewayAddress, svc *mesh.Service) (gateway, *Error) {
	c, err := lb.Pick(&lb.Request{
		Service: svc, Endpoints: o.s.Endpoints(svc.Key()), From: o.from,
		Dst: netip.AddrPortFrom(o.dst.Addr(), gw.Port), Waypoint: true,
	}, o.pick)
	if err == nil && c.Endpoint.Workload == nil {
		err = lb.NoEndpoints // a PASSTHROUGH service names nobody whose identity could be expected
	}
	if err != nil {
		return gateway{}, &Error{Fault: UnknownWaypoint, Detail: gatewayName(gw), Err: err}
	}
	return gateway{workload: c.Endpoint.Workload, service: svc, addr: c.Addr, port: c.Port}, nil
}

// lookup says what a gateway's address or hostname names. A hostname comes with the namespace it is to be read in: a
// service of the same hostname elsewhere is somebody else's.
func lookup(s *mesh.Snapshot, gw mesh.GatewayAddress, clientNamespace string) mesh.Address {
	if gw.Hostname == "" {
		return s.Find(gw.Addr, clientNamespace)
	}
	svc := s.Service(mesh.ServiceKey(gw.Namespace, gw.Hostname))
	if gw.Namespace == "" {
		svc = s.ServiceNamed(gw.Hostname, clientNamespace)
	}
	if svc != nil {
		return mesh.Address{Service: svc}
	}
	if w := s.WorkloadNamed(gw.Hostname); w != nil && (gw.Namespace == "" || w.Namespace == gw.Namespace) {
		return mesh.Address{Workload: w}
	}
	return mesh.Address{}
}

// isWaypoint reports whether w is an instance of a gateway.
func isWaypoint(s *mesh.Snapshot, w *mesh.Workload, gw mesh.GatewayAddress) bool {
	if gw.IsZero() {
		return false
	}
	to := lookup(s, gw, w.Namespace)
	switch {
	case to.Workload != nil:
		return to.Workload.UID == w.UID
	case to.Service != nil:
		key := to.Service.Key()
		for _, sp := range w.Services {
			if sp.Service == key {
				return true
			}
		}
	}
	return false
}

// preferred is the address of w of the same family as like, else its first.
func preferred(w *mesh.Workload, like netip.Addr) netip.Addr {
	for _, a := range w.Addrs {
		if a.Is4() == like.Is4() {
			return a
		}
	}
	if len(w.Addrs) > 0 {
		return w.Addrs[0]
	}
	return netip.Addr{}
}

// gatewayName is how xDS names a gateway.
func gatewayName(gw mesh.GatewayAddress) string {
	if gw.Hostname != "" {
		return mesh.ServiceKey(gw.Namespace, gw.Hostname)
	}
	return addrName(gw.Addr)
}
