package wds

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	pb "github.com/mistnet/mistnet/api/workload"
	"github.com/mistnet/mistnet/internal/mesh"
)

// DecodeAddress reads the bytes of an istio.workload.Address: a workload or a service, with every default restored. An
// error names each field at fault, and then the address is zero.
func DecodeAddress(body []byte) (mesh.Address, error) {
	var d decoder
	return d.address(body)
}

// decoder reads one batch. Its strings are shared between the resources of the batch: a mesh has few namespaces, nodes
// and clusters, and many workloads that name them.
type decoder struct {
	known         map[string]string
	withoutLabels bool
}

func (d *decoder) intern(s string) string {
	if s == "" || d.known == nil {
		return s
	}
	if k, ok := d.known[s]; ok {
		return k
	}
	d.known[s] = s
	return s
}

func (d *decoder) address(body []byte) (mesh.Address, error) {
	var m pb.Address
	if err := proto.Unmarshal(body, &m); err != nil {
		return mesh.Address{}, fmt.Errorf("decode address: %w", err)
	}
	switch t := m.GetType().(type) {
	case *pb.Address_Workload:
		w, err := d.workload(t.Workload)
		if err != nil {
			return mesh.Address{}, fmt.Errorf("decode workload %q: %w", t.Workload.GetUid(), err)
		}
		return mesh.Address{Workload: w}, nil
	case *pb.Address_Service:
		s, err := d.service(t.Service)
		if err != nil {
			return mesh.Address{}, fmt.Errorf("decode service %q: %w",
				mesh.ServiceKey(t.Service.GetNamespace(), t.Service.GetHostname()), err)
		}
		return mesh.Address{Service: s}, nil
	}
	return mesh.Address{}, errors.New("decode address: neither a workload nor a service")
}

func (d *decoder) workload(m *pb.Workload) (*mesh.Workload, error) {
	w := &mesh.Workload{
		UID: m.GetUid(), Name: m.GetName(), Namespace: d.intern(m.GetNamespace()),
		Network: d.intern(m.GetNetwork()), Hostname: m.GetHostname(),
		TrustDomain:    d.intern(restore(m.GetTrustDomain(), mesh.DefaultTrustDomain)),
		ServiceAccount: d.intern(restore(m.GetServiceAccount(), mesh.DefaultServiceAccount)),
		ClusterID:      d.intern(restore(m.GetClusterId(), mesh.DefaultClusterID)),
		NativeTunnel:   m.GetNativeTunnel(),
		Node:           d.intern(m.GetNode()), Capacity: 1,
		CanonicalName: d.intern(m.GetCanonicalName()), CanonicalRevision: d.intern(m.GetCanonicalRevision()),
		OwnerName: d.intern(m.GetWorkloadName()),
	}
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if w.UID == "" {
		fail("uid: is empty")
	}
	for i, b := range m.GetAddresses() {
		a, err := addr(b)
		if err != nil {
			fail("addresses[%d]: %w", i, err)
		}
		w.Addrs = append(w.Addrs, a)
	}
	switch m.GetTunnelProtocol() {
	case pb.TunnelProtocol_NONE:
	case pb.TunnelProtocol_HBONE:
		w.Protocol = mesh.ProtocolHBONE
	case pb.TunnelProtocol_LEGACY_ISTIO_MTLS:
		fail("tunnel_protocol: LEGACY_ISTIO_MTLS has no place in an ambient mesh")
	default:
		fail("tunnel_protocol: unknown value %d", m.GetTunnelProtocol())
	}
	switch m.GetNetworkMode() {
	case pb.NetworkMode_STANDARD:
	case pb.NetworkMode_HOST_NETWORK:
		w.HostNetwork = true
	default:
		fail("network_mode: unknown value %d", m.GetNetworkMode())
	}
	switch m.GetStatus() {
	case pb.WorkloadStatus_HEALTHY:
		w.Healthy = true
	case pb.WorkloadStatus_UNHEALTHY:
	default:
		fail("status: unknown value %d", m.GetStatus())
	}
	// What a workload belongs to is only reported: a kind of a later version must not cost its traffic.
	if k := m.GetWorkloadType(); k >= pb.WorkloadType_DEPLOYMENT && k <= pb.WorkloadType_JOB {
		w.Kind = mesh.WorkloadKind(k)
	}
	if c := m.GetCapacity(); c != nil {
		w.Capacity = c.GetValue()
	}
	if l := m.GetLocality(); l != nil {
		w.Locality = mesh.Locality{
			Region: d.intern(l.GetRegion()), Zone: d.intern(l.GetZone()), Subzone: d.intern(l.GetSubzone()),
		}
	}
	for _, key := range m.GetAuthorizationPolicies() {
		w.Policies = append(w.Policies, d.intern(key))
	}
	var err error
	if w.AppTunnel, err = appTunnel(m.GetApplicationTunnel()); err != nil {
		fail("application_tunnel: %w", err)
	}
	if w.Waypoint, err = d.gateway(m.GetWaypoint()); err != nil {
		fail("waypoint: %w", err)
	}
	if w.NetworkGateway, err = d.gateway(m.GetNetworkGateway()); err != nil {
		fail("network_gateway: %w", err)
	}
	if w.Labels, err = d.labels(m.GetExtensions()); err != nil {
		fail("extensions[%s]: %w", extensionLabels, err)
	}
	if w.TargetPolicies, err = d.policies(m.GetExtensions()); err != nil {
		fail("%w", err)
	}
	for key, list := range m.GetServices() {
		if key == "" {
			fail("services: empty key")
		}
		ps, err := ports(list.GetPorts())
		if err != nil {
			fail("services[%q].%w", key, err)
		}
		w.Services = append(w.Services, mesh.ServicePorts{Service: d.intern(key), Ports: ps})
	}
	slices.SortFunc(w.Services, func(a, b mesh.ServicePorts) int { return strings.Compare(a.Service, b.Service) })
	return w, errors.Join(errs...)
}

func (d *decoder) service(m *pb.Service) (*mesh.Service, error) {
	s := &mesh.Service{
		Name: m.GetName(), Namespace: d.intern(m.GetNamespace()), Hostname: m.GetHostname(),
		IngressUseWaypoint: m.GetIngressUseWaypoint(), Canonical: m.GetCanonical(),
	}
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if s.Hostname == "" {
		fail("hostname: is empty")
	}
	for i, a := range m.GetAddresses() {
		p, err := prefix(a.GetAddress(), a.Length)
		if err != nil {
			fail("addresses[%d]: %w", i, err)
		}
		s.VIPs = append(s.VIPs, mesh.VIP{Network: d.intern(a.GetNetwork()), Prefix: p})
	}
	for _, san := range m.GetSubjectAltNames() {
		// An identity that is not one can never be shown by a peer: leaving it out is strict.
		if id, err := mesh.ParseIdentity(san); err == nil {
			s.SANs = append(s.SANs, id)
		}
	}
	switch m.GetVisibility() {
	case pb.Visibility_PUBLIC:
	case pb.Visibility_NAMESPACE:
		s.NamespaceOnly = true
	default:
		fail("visibility: unknown value %d", m.GetVisibility())
	}
	if f := m.GetIpFamilies(); f < pb.IPFamilies_AUTOMATIC || f > pb.IPFamilies_DUAL {
		fail("ip_families: unknown value %d", f)
	} else {
		s.Families = mesh.IPFamilies(f)
	}
	var err error
	if s.Ports, err = ports(m.GetPorts()); err != nil {
		errs = append(errs, err)
	}
	if s.LB, err = loadBalancing(m.GetLoadBalancing()); err != nil {
		fail("load_balancing.%w", err)
	}
	for _, x := range m.GetExtensions() {
		s.LB.Sticky = s.LB.Sticky || x.GetName() == extensionSticky
		s.Dynamic = s.Dynamic || x.GetName() == extensionDynamic
	}
	if s.Policies, err = d.policies(m.GetExtensions()); err != nil {
		fail("%w", err)
	}
	if s.Waypoint, err = d.gateway(m.GetWaypoint()); err != nil {
		fail("waypoint: %w", err)
	}
	for i, ww := range m.GetWeightedWaypoints() {
		to, err := d.gateway(ww.GetDestination())
		if err == nil && to.IsZero() {
			err = errors.New("no destination")
		}
		if err != nil {
			fail("weighted_waypoints[%d]: %w", i, err)
		}
		s.WeightedWaypoints = append(s.WeightedWaypoints, mesh.WeightedGateway{Gateway: to, Weight: ww.GetWeight()})
	}
	return s, errors.Join(errs...)
}

func loadBalancing(m *pb.LoadBalancing) (mesh.LoadBalancing, error) {
	var lb mesh.LoadBalancing
	if mode := m.GetMode(); mode < pb.LoadBalancing_UNSPECIFIED_MODE || mode > pb.LoadBalancing_PASSTHROUGH {
		return lb, fmt.Errorf("mode: unknown value %d", mode)
	}
	lb.Mode = mesh.LBMode(m.GetMode())
	for i, scope := range m.GetRoutingPreference() {
		if scope < pb.LoadBalancing_UNSPECIFIED_SCOPE || scope > pb.LoadBalancing_NETWORK {
			return lb, fmt.Errorf("routing_preference[%d]: unknown value %d", i, scope)
		}
		lb.Preference = append(lb.Preference, mesh.LBScope(scope))
	}
	switch m.GetHealthPolicy() {
	case pb.LoadBalancing_ONLY_HEALTHY:
	case pb.LoadBalancing_ALLOW_ALL:
		lb.AllowUnready = true
	default:
		return lb, fmt.Errorf("health_policy: unknown value %d", m.GetHealthPolicy())
	}
	return lb, nil
}

// gateway reads a gateway's place. A gateway that is there but leads nowhere is refused: read as "no gateway", it would
// let traffic around it.
func (d *decoder) gateway(m *pb.GatewayAddress) (mesh.GatewayAddress, error) {
	var g mesh.GatewayAddress
	if m == nil {
		return g, nil
	}
	var err error
	if g.Port, err = port(m.GetHboneMtlsPort()); err != nil {
		return g, fmt.Errorf("hbone_mtls_port: %w", err)
	}
	switch dst := m.GetDestination().(type) {
	case *pb.GatewayAddress_Hostname:
		g.Namespace, g.Hostname = d.intern(dst.Hostname.GetNamespace()), d.intern(dst.Hostname.GetHostname())
		if g.Hostname == "" {
			return g, errors.New("hostname: is empty")
		}
	case *pb.GatewayAddress_Address:
		p, err := prefix(dst.Address.GetAddress(), dst.Address.Length)
		if err != nil {
			return g, fmt.Errorf("address: %w", err)
		}
		if !p.IsSingleIP() {
			return g, fmt.Errorf("address: %s is a range", p)
		}
		g.Addr = mesh.NetworkAddr{Network: d.intern(dst.Address.GetNetwork()), Addr: p.Addr()}
	default:
		return g, errors.New("no destination")
	}
	return g, nil
}

func appTunnel(m *pb.ApplicationTunnel) (mesh.AppTunnel, error) {
	p, err := port(m.GetPort())
	if err != nil {
		return mesh.AppTunnel{}, fmt.Errorf("port: %w", err)
	}
	switch m.GetProtocol() {
	case pb.ApplicationTunnel_NONE:
		return mesh.AppTunnel{Port: p}, nil
	case pb.ApplicationTunnel_PROXY:
		return mesh.AppTunnel{Proxy: true, Port: p}, nil
	}
	return mesh.AppTunnel{}, fmt.Errorf("protocol: unknown value %d", m.GetProtocol())
}

func ports(list []*pb.Port) ([]mesh.Port, error) {
	var ps []mesh.Port
	for i, m := range list {
		service, err := port(m.GetServicePort())
		if err != nil {
			return nil, fmt.Errorf("ports[%d].service_port: %w", i, err)
		}
		target, err := port(m.GetTargetPort())
		if err != nil {
			return nil, fmt.Errorf("ports[%d].target_port: %w", i, err)
		}
		p := mesh.Port{ServicePort: service, TargetPort: target}
		// A protocol of a later version is as good as one nobody declared.
		app := m.GetAppProtocol()
		if app >= pb.AppProtocol_UNKNOWN && app <= pb.AppProtocol_TLS || app == pb.AppProtocol(mesh.AppGRPCWeb) {
			p.App = mesh.AppProtocol(app)
		}
		ps = append(ps, p)
	}
	return ps, nil
}

func port(n uint32) (uint16, error) {
	if n > math.MaxUint16 {
		return 0, fmt.Errorf("%d is not a port", n)
	}
	return uint16(n), nil
}

func addr(b []byte) (netip.Addr, error) {
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.Addr{}, fmt.Errorf("%d bytes, want 4 or 16", len(b))
	}
	return a.Unmap(), nil
}

// prefix reads an address and its length in bits; without a length it is one address. Bits beyond the length are
// cleared, and an IPv4-mapped range becomes the IPv4 range that indexes are keyed by.
func prefix(b []byte, length *uint32) (netip.Prefix, error) {
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.Prefix{}, fmt.Errorf("%d bytes, want 4 or 16", len(b))
	}
	bits := uint32(a.BitLen())
	if length != nil {
		if *length > bits {
			return netip.Prefix{}, fmt.Errorf("length %d of a %d-bit address", *length, bits)
		}
		bits = *length
	}
	if a.Is4In6() && bits >= 96 {
		a, bits = a.Unmap(), bits-96
	}
	return netip.PrefixFrom(a, int(bits)).Masked(), nil
}

func restore(value, byDefault string) string {
	if value == "" {
		return byDefault
	}
	return value
}
