package mesh

import (
	"net/netip"
	"slices"
)

// Workload is one addressable unit of compute: a pod, a VM, an external endpoint (istio.workload.Workload).
type Workload struct {
	UID       string // unique in the whole mesh; its resource name
	Name      string
	Namespace string
	Addrs     []netip.Addr // on Network; empty when it is reached by Hostname or NetworkGateway
	Network   string       // "" is the default network
	Hostname  string       // resolved on demand when there are no Addrs

	TrustDomain    string // never empty
	ServiceAccount string // never empty

	Protocol     TunnelProtocol
	NativeTunnel bool // it terminates HBONE itself; ztunnel must not do so for it
	AppTunnel    AppTunnel

	Waypoint       GatewayAddress // where traffic addressed to the workload goes first; zero for none
	NetworkGateway GatewayAddress // how it is reached from another network; zero for none

	Node        string
	ClusterID   string // never empty
	Locality    Locality
	HostNetwork bool // it shares its node's address, so the address does not name it
	Healthy     bool
	Capacity    uint32 // load-balancing weight; 1 when unset

	CanonicalName     string
	CanonicalRevision string
	Kind              WorkloadKind
	OwnerName         string // the workload the unit belongs to: a Deployment's name for its pods

	// Labels are those it was declared with, all of them. Subsets and sourceLabels ask for them, so a node proxy has none.
	Labels map[string]string

	// Policies are the keys (namespace/name) of the policies whose selector matches the workload.
	Policies []string
	// TargetPolicies are the keys of the policies that target the Gateway of which the workload is a waypoint, or its class. It
	// enforces them itself: a node proxy that serves it does not see requests.
	TargetPolicies []string
	// Services are the services it is an endpoint of, sorted by key.
	Services []ServicePorts
}

// Identity is who the workload is.
func (w *Workload) Identity() Identity {
	return Identity{TrustDomain: w.TrustDomain, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}
}

// HasAddr reports whether addr is one of the workload's own.
func (w *Workload) HasAddr(addr netip.Addr) bool { return slices.Contains(w.Addrs, addr) }

// Reaches are those of the addresses of a name that w can be expected to reach: of families that it has addresses of itself. They
// are all of them where that says nothing.
func (w *Workload) Reaches(named []netip.Addr) []netip.Addr {
	var near, all []netip.Addr
	for _, addr := range named {
		addr = addr.Unmap()
		all = append(all, addr)
		if slices.ContainsFunc(w.Addrs, func(own netip.Addr) bool { return own.Is4() == addr.Is4() }) {
			near = append(near, addr)
		}
	}
	if len(near) == 0 {
		return all
	}
	return near
}

// ServicePorts is the place of a workload in one service.
type ServicePorts struct {
	Service string // namespace/hostname
	Ports   []Port
}

// Port maps a service's port to the workload's.
type Port struct {
	ServicePort uint16
	TargetPort  uint16 // 0 on a Service: each endpoint carries its own mapping
	App         AppProtocol
}

// Locality is where a workload runs, from the node's topology labels.
type Locality struct{ Region, Zone, Subzone string }

// AppTunnel says that the application expects its connections wrapped once more after HBONE.
type AppTunnel struct {
	Proxy bool   // PROXY protocol, version 2
	Port  uint16 // 0: no tunnel
}

// GatewayAddress is where a waypoint or network gateway listens: a hostname or an address, and the HBONE port.
type GatewayAddress struct {
	Namespace string // of Hostname
	Hostname  string
	Addr      NetworkAddr // when Hostname is ""
	Port      uint16
}

// IsZero reports whether there is no gateway.
func (g GatewayAddress) IsZero() bool { return g == GatewayAddress{} }

// NetworkAddr is the key of everything addressable: the same address may exist on several networks.
type NetworkAddr struct {
	Network string
	Addr    netip.Addr
}

// TunnelProtocol is how a workload is reached.
type TunnelProtocol uint8

// The tunnel protocols. The zero value is a plain TCP connection.
const (
	ProtocolTCP TunnelProtocol = iota
	ProtocolHBONE
)

func (p TunnelProtocol) String() string {
	if p == ProtocolHBONE {
		return "HBONE"
	}
	return "TCP"
}

// WorkloadKind is what the unit belongs to.
type WorkloadKind uint8

// The kinds of workload, with Istio's numbers.
const (
	KindDeployment WorkloadKind = iota
	KindCronJob
	KindPod
	KindJob
)

func (k WorkloadKind) String() string {
	switch k {
	case KindCronJob:
		return "cronjob"
	case KindPod:
		return "pod"
	case KindJob:
		return "job"
	case KindDeployment:
	}
	return "deployment"
}

// AppProtocol is what is spoken on a service's port.
type AppProtocol uint8

// The application protocols, with Istio's numbers.
const (
	AppUnknown AppProtocol = iota
	AppHTTP1
	AppHTTP2
	AppGRPC
	AppTCP
	AppTLS

	// AppGRPCWeb is gRPC that clients may speak as gRPC-Web, too. Istio has no number for it, whose proxies do not look at it.
	AppGRPCWeb AppProtocol = 100
)

// HTTP2 reports whether endpoints of such a port are spoken to by HTTP/2.
func (a AppProtocol) HTTP2() bool { return a == AppHTTP2 || a == AppGRPC || a == AppGRPCWeb }
