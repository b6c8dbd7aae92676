package waypoint

import (
	"cmp"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"

	"github.com/mistnet/mistnet/waypoint/upstream"

	"github.com/mistnet/mistnet/internal/mesh"
)

// destination is what a client asked for: a port of a service, or of a workload by its address.
type destination struct {
	service  string // the service's key; "" when a workload was asked for
	uid      string // of the workload
	hostname string // of the service, for logs
	addr     netip.AddrPort
	port     uint16
	app      mesh.AppProtocol
}

// cluster is what a rule's backend, with its service's key, means to a client that asked for d.
func (d *destination) cluster(service string, ref *mesh.BackendRef) upstream.ClusterKey {
	key := upstream.ClusterKey{Service: cmp.Or(service, d.service), Subset: ref.Subset, Port: d.port}
	if ref.Port != 0 {
		key.Port = ref.Port
	}
	return key
}

// refusedError refuses a tunnel.
type refusedError struct {
	status int
	why    string
}

func (e *refusedError) Error() string { return e.why }

// find says what the authority of a CONNECT names to a client of a namespace, if that is bound to this waypoint.
func (s *state) find(v *view, authority, clientNamespace string) (destination, error) {
	host, portText, err := net.SplitHostPort(authority)
	port, perr := strconv.ParseUint(portText, 10, 16)
	if err != nil || perr != nil || port == 0 {
		return destination{}, &refusedError{http.StatusBadRequest, fmt.Sprintf("authority %q is no host:port", authority)}
	}
	var to mesh.Address
	addr, err := netip.ParseAddr(host)
	if err == nil {
		addr = addr.Unmap()
		to = v.Find(mesh.NetworkAddr{Network: s.cfg.Network, Addr: addr}, clientNamespace)
	} else {
		to.Service = v.ServiceNamed(host, clientNamespace)
	}
	d := destination{port: uint16(port), addr: netip.AddrPortFrom(addr, uint16(port))}
	switch {
	case to.Service != nil:
		return s.toService(v, d, to.Service)
	case to.Workload != nil:
		return s.toWorkload(v, d, to.Workload)
	}
	return d, &refusedError{http.StatusNotFound, authority + " is not known to the mesh"}
}

func (s *state) toService(v *view, d destination, svc *mesh.Service) (destination, error) {
	if !s.serves(v, svc) {
		return d, &refusedError{http.StatusNotFound, "service " + svc.Key() + " is not bound to this waypoint"}
	}
	p, ok := svc.Port(d.port)
	if !ok {
		return d, &refusedError{http.StatusNotFound, fmt.Sprintf("service %s has no port %d", svc.Key(), d.port)}
	}
	d.service, d.hostname, d.app = svc.Key(), svc.Hostname, p.App
	if !d.addr.Addr().IsValid() { // asked for by name: what its own address would be
		for _, vip := range svc.VIPs {
			if vip.Network == s.cfg.Network && vip.Prefix.IsSingleIP() {
				d.addr = netip.AddrPortFrom(vip.Prefix.Addr(), d.port)
				break
			}
		}
	}
	return d, nil
}

func (s *state) toWorkload(v *view, d destination, w *mesh.Workload) (destination, error) {
	if !s.isSelf(v, w.Waypoint) {
		return d, &refusedError{http.StatusNotFound, "workload " + w.UID + " is not bound to this waypoint"}
	}
	d.uid = w.UID
	for _, sp := range w.Services { // what is spoken on a port, its services know
		svc := v.Service(sp.Service)
		if svc == nil {
			continue
		}
		ep := mesh.Endpoint{Workload: w, Ports: sp.Ports}
		for _, p := range svc.Ports {
			if ep.TargetPort(svc, p.ServicePort) == d.port && p.App != mesh.AppUnknown {
				d.app = p.App
				return d, nil
			}
		}
	}
	return d, nil
}

// serves reports whether a service is bound to this waypoint.
func (s *state) serves(v *view, svc *mesh.Service) bool {
	if s.isSelf(v, svc.Waypoint) {
		return true
	}
	for _, w := range svc.WeightedWaypoints {
		if s.isSelf(v, w.Gateway) {
			return true
		}
	}
	return false
}

// concerns returns what is known now, and whether a service is one that requests are sent to.
func (s *state) concerns() (*upstream.View, func(*mesh.Service) bool) {
	v := s.load()
	return &v.View, func(svc *mesh.Service) bool { return s.serves(v, svc) || v.backends[svc.Key()] }
}

// isSelf reports whether g is this waypoint, by its hostname or by an address of its Service or pod.
func (s *state) isSelf(v *view, g mesh.GatewayAddress) bool {
	if g.IsZero() {
		return false
	}
	if g.Hostname != "" {
		return g.Hostname == s.cfg.hostname() && (g.Namespace == "" || g.Namespace == s.cfg.Namespace)
	}
	if v.Self != nil && g.Addr.Network == v.Self.Network && v.Self.HasAddr(g.Addr.Addr) {
		return true
	}
	own := v.Service(mesh.ServiceKey(s.cfg.Namespace, s.cfg.hostname()))
	if own == nil {
		return false
	}
	for _, vip := range own.VIPs {
		if vip.Network == g.Addr.Network && vip.Prefix.IsSingleIP() && vip.Prefix.Addr() == g.Addr.Addr {
			return true
		}
	}
	return false
}
