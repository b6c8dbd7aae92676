package wds

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	pb "github.com/mistnet/mistnet/api/workload"
	"github.com/mistnet/mistnet/internal/mesh"
)

// deterministic makes equal nouns equal bytes, so that a hash of the bytes is a version.
var deterministic = proto.MarshalOptions{Deterministic: true}

// extensionSticky on a service says that each client keeps to one endpoint. Istio's messages have no field for it, and its
// proxies pass over extensions that they do not know.
const extensionSticky = "mistnet.io/session-affinity-client"

// extensionDynamic on a service says that its waypoint resolves the hosts that clients ask for (resolution DYNAMIC_DNS).
const extensionDynamic = "mistnet.io/dynamic-dns"

// extensionLabels on a workload are its labels, as a google.protobuf.Struct of strings.
const extensionLabels = "mistnet.io/labels"

// extensionPolicies on a service, or on a waypoint itself, lists the keys of the policies that a waypoint enforces for it, as a
// google.protobuf.ListValue.
const extensionPolicies = "mistnet.io/policies"

// EncodeWorkload returns w as the bytes of an istio.workload.Address. Equal workloads give equal bytes. It fails on
// what the message cannot carry, naming the field.
func EncodeWorkload(w *mesh.Workload) ([]byte, error) {
	m, err := workloadToProto(w)
	if err != nil {
		return nil, fmt.Errorf("encode workload %q: %w", w.UID, err)
	}
	return deterministic.Marshal(&pb.Address{Type: &pb.Address_Workload{Workload: m}})
}

// EncodeService returns s as the bytes of an istio.workload.Address. Equal services give equal bytes. It fails on what
// the message cannot carry, naming the field.
func EncodeService(s *mesh.Service) ([]byte, error) {
	m, err := serviceToProto(s)
	if err != nil {
		return nil, fmt.Errorf("encode service %q: %w", s.Key(), err)
	}
	return deterministic.Marshal(&pb.Address{Type: &pb.Address_Service{Service: m}})
}

// WorkloadAliases are the further names a client may ask for w by: network/address. A workload that shares its node's
// address has none, for the address does not name it.
func WorkloadAliases(w *mesh.Workload) []string {
	if w.HostNetwork {
		return nil
	}
	names := make([]string, 0, len(w.Addrs))
	for _, a := range w.Addrs {
		names = append(names, w.Network+"/"+a.String())
	}
	return names
}

// ServiceAliases are the further names a client may ask for s by: network/address and, for a range of addresses,
// network/address/length.
func ServiceAliases(s *mesh.Service) []string {
	names := make([]string, 0, len(s.VIPs))
	for _, v := range s.VIPs {
		name := v.Network + "/" + v.Prefix.Addr().String()
		if !v.Prefix.IsSingleIP() {
			name += "/" + strconv.Itoa(v.Prefix.Bits())
		}
		names = append(names, name)
	}
	return names
}

func workloadToProto(w *mesh.Workload) (*pb.Workload, error) {
	m := &pb.Workload{
		Uid: w.UID, Name: w.Name, Namespace: w.Namespace, Network: w.Network, Hostname: w.Hostname,
		TrustDomain:    elide(w.TrustDomain, mesh.DefaultTrustDomain),
		ServiceAccount: elide(w.ServiceAccount, mesh.DefaultServiceAccount),
		ClusterId:      elide(w.ClusterID, mesh.DefaultClusterID),
		NativeTunnel:   w.NativeTunnel, Node: w.Node,
		CanonicalName: w.CanonicalName, CanonicalRevision: w.CanonicalRevision,
		WorkloadType: pb.WorkloadType(w.Kind), WorkloadName: w.OwnerName,
		AuthorizationPolicies: w.Policies,
	}
	var errs []error
	if w.UID == "" {
		errs = append(errs, errors.New("uid: is empty"))
	}
	if w.Protocol == mesh.ProtocolHBONE {
		m.TunnelProtocol = pb.TunnelProtocol_HBONE
	}
	if w.HostNetwork {
		m.NetworkMode = pb.NetworkMode_HOST_NETWORK
	}
	if !w.Healthy {
		m.Status = pb.WorkloadStatus_UNHEALTHY
	}
	if w.Capacity != 1 {
		m.Capacity = wrapperspb.UInt32(w.Capacity)
	}
	if w.Locality != (mesh.Locality{}) {
		m.Locality = &pb.Locality{Region: w.Locality.Region, Zone: w.Locality.Zone, Subzone: w.Locality.Subzone}
	}
	if w.AppTunnel != (mesh.AppTunnel{}) {
		m.ApplicationTunnel = &pb.ApplicationTunnel{Port: uint32(w.AppTunnel.Port)}
		if w.AppTunnel.Proxy {
			m.ApplicationTunnel.Protocol = pb.ApplicationTunnel_PROXY
		}
	}
	for i, a := range w.Addrs {
		if !a.IsValid() {
			errs = append(errs, fmt.Errorf("addresses[%d]: is not an address", i))
			continue
		}
		m.Addresses = append(m.Addresses, a.Unmap().AsSlice())
	}
	if len(w.Services) > 0 {
		m.Services = make(map[string]*pb.PortList, len(w.Services))
	}
	for _, sp := range w.Services {
		if m.Services[sp.Service] != nil {
			errs = append(errs, fmt.Errorf("services[%q]: listed twice", sp.Service))
		}
		m.Services[sp.Service] = &pb.PortList{Ports: portsToProto(sp.Ports)}
	}
	var err error
	if m.Extensions, err = labelsToProto(w.Labels); err != nil {
		errs = append(errs, fmt.Errorf("labels: %w", err))
	}
	if m.Extensions, err = appendPolicies(m.Extensions, w.TargetPolicies); err != nil {
		errs = append(errs, err)
	}
	if m.Waypoint, err = gatewayToProto(w.Waypoint); err != nil {
		errs = append(errs, fmt.Errorf("waypoint: %w", err))
	}
	if m.NetworkGateway, err = gatewayToProto(w.NetworkGateway); err != nil {
		errs = append(errs, fmt.Errorf("network_gateway: %w", err))
	}
	return m, errors.Join(errs...)
}

func serviceToProto(s *mesh.Service) (*pb.Service, error) {
	m := &pb.Service{
		Name: s.Name, Namespace: s.Namespace, Hostname: s.Hostname, Ports: portsToProto(s.Ports),
		IpFamilies: pb.IPFamilies(s.Families), Canonical: s.Canonical, IngressUseWaypoint: s.IngressUseWaypoint,
		LoadBalancing: lbToProto(s.LB),
	}
	var errs []error
	if s.Hostname == "" {
		errs = append(errs, errors.New("hostname: is empty"))
	}
	if s.NamespaceOnly {
		m.Visibility = pb.Visibility_NAMESPACE
	}
	if s.LB.Sticky {
		m.Extensions = append(m.Extensions, &pb.Extension{Name: extensionSticky})
	}
	if s.Dynamic {
		m.Extensions = append(m.Extensions, &pb.Extension{Name: extensionDynamic})
	}
	for i, v := range s.VIPs {
		if !v.Prefix.IsValid() {
			errs = append(errs, fmt.Errorf("addresses[%d]: is not an address", i))
			continue
		}
		m.Addresses = append(m.Addresses, vipToProto(v))
	}
	for _, id := range s.SANs {
		m.SubjectAltNames = append(m.SubjectAltNames, id.String())
	}
	var err error
	if m.Extensions, err = appendPolicies(m.Extensions, s.Policies); err != nil {
		errs = append(errs, err)
	}
	if m.Waypoint, err = gatewayToProto(s.Waypoint); err != nil {
		errs = append(errs, fmt.Errorf("waypoint: %w", err))
	}
	for i, w := range s.WeightedWaypoints {
		to, err := gatewayToProto(w.Gateway)
		if err == nil && to == nil {
			err = errors.New("no destination")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("weighted_waypoints[%d]: %w", i, err))
		}
		m.WeightedWaypoints = append(m.WeightedWaypoints, &pb.WeightedWaypoint{Destination: to, Weight: w.Weight})
	}
	return m, errors.Join(errs...)
}

func vipToProto(v mesh.VIP) *pb.NetworkAddress {
	m := &pb.NetworkAddress{Network: v.Network, Address: v.Prefix.Addr().AsSlice()}
	if !v.Prefix.IsSingleIP() {
		m.Length = proto.Uint32(uint32(v.Prefix.Bits()))
	}
	return m
}

func lbToProto(lb mesh.LoadBalancing) *pb.LoadBalancing {
	if lb.Mode == mesh.LBAny && len(lb.Preference) == 0 && !lb.AllowUnready {
		return nil
	}
	m := &pb.LoadBalancing{Mode: pb.LoadBalancing_Mode(lb.Mode)}
	for _, scope := range lb.Preference {
		m.RoutingPreference = append(m.RoutingPreference, pb.LoadBalancing_Scope(scope))
	}
	if lb.AllowUnready {
		m.HealthPolicy = pb.LoadBalancing_ALLOW_ALL
	}
	return m
}

func portsToProto(ports []mesh.Port) []*pb.Port {
	var list []*pb.Port
	for _, p := range ports {
		list = append(list, &pb.Port{
			ServicePort: uint32(p.ServicePort), TargetPort: uint32(p.TargetPort), AppProtocol: pb.AppProtocol(p.App),
		})
	}
	return list
}

// gatewayToProto returns nil for no gateway.
func gatewayToProto(g mesh.GatewayAddress) (*pb.GatewayAddress, error) {
	if g.IsZero() {
		return nil, nil
	}
	m := &pb.GatewayAddress{HboneMtlsPort: uint32(g.Port)}
	if g.Hostname != "" {
		m.Destination = &pb.GatewayAddress_Hostname{
			Hostname: &pb.NamespacedHostname{Namespace: g.Namespace, Hostname: g.Hostname},
		}
		return m, nil
	}
	if g.Addr.Addr == (netip.Addr{}) {
		return nil, errors.New("neither hostname nor address")
	}
	m.Destination = &pb.GatewayAddress_Address{
		Address: &pb.NetworkAddress{Network: g.Addr.Network, Address: g.Addr.Addr.Unmap().AsSlice()},
	}
	return m, nil
}

func elide(value, byDefault string) string {
	if value == byDefault {
		return ""
	}
	return value
}
