package mesh

import (
	"net/netip"
	"strings"
)

// Service is a name and virtual addresses in front of endpoints (istio.workload.Service).
type Service struct {
	Name      string
	Namespace string
	Hostname  string // fully qualified
	VIPs      []VIP
	Ports     []Port
	SANs      []Identity // further identities an endpoint may show

	Waypoint           GatewayAddress
	WeightedWaypoints  []WeightedGateway // when of positive total weight, replaces Waypoint
	IngressUseWaypoint bool

	// Policies are the keys of the policies that target the service: its waypoint enforces them, node proxies do not.
	Policies []string

	// Dynamic: it has no endpoints. Its waypoint resolves the host that a request or a TLS hello asks for, which Hostname, with a *
	// in front, must cover (ServiceEntry resolution: DYNAMIC_DNS).
	Dynamic bool

	LB            LoadBalancing
	Families      IPFamilies
	Canonical     bool // the platform's own service, not a user's declaration over the same hostname
	NamespaceOnly bool // only clients of its own namespace may resolve it
}

// Key names the service in the mesh: namespace/hostname.
func (s *Service) Key() string { return ServiceKey(s.Namespace, s.Hostname) }

// ServiceKey joins the two parts of a service's name.
func ServiceKey(namespace, hostname string) string { return namespace + "/" + hostname }

// Covers reports whether a host in lower case, without a dot at its end, is one that Hostname stands for, which has a * in front: that is
// for one character or more, as in Istio.
func (s *Service) Covers(host string) bool {
	suffix, wild := strings.CutPrefix(s.Hostname, "*")
	return wild && len(host) > len(suffix) && strings.HasSuffix(host, suffix) && host[0] != '.'
}

// Port returns the service's port of that number.
func (s *Service) Port(number uint16) (Port, bool) {
	for _, p := range s.Ports {
		if p.ServicePort == number {
			return p, true
		}
	}
	return Port{}, false
}

// VIP is a virtual address, or a range of them when Prefix is shorter than the address.
type VIP struct {
	Network string
	Prefix  netip.Prefix
}

// WeightedGateway is one of several waypoints that share a service's traffic.
type WeightedGateway struct {
	Gateway GatewayAddress
	Weight  uint32
}

// Endpoint is a workload as one service sees it.
type Endpoint struct {
	Workload *Workload
	Ports    []Port // the workload's own mapping for this service
}

// TargetPort is where e listens for port of svc: the endpoint's own mapping, else the service's. It is 0 when neither
// names one.
func (e *Endpoint) TargetPort(svc *Service, port uint16) uint16 {
	for _, p := range e.Ports {
		if p.ServicePort == port && p.TargetPort != 0 {
			return p.TargetPort
		}
	}
	p, _ := svc.Port(port)
	return p.TargetPort
}

// LoadBalancing says which endpoints of a service a client may use.
type LoadBalancing struct {
	Mode         LBMode
	Preference   []LBScope
	AllowUnready bool // unhealthy endpoints take traffic too (publishNotReadyAddresses)
	Sticky       bool // a client keeps to one of the endpoints it may use (sessionAffinity: ClientIP)
}

// LBMode is how LoadBalancing.Preference is read.
type LBMode uint8

// The load-balancing modes, with Istio's numbers.
const (
	LBAny         LBMode = iota // every endpoint alike
	LBStrict                    // only those that match every scope
	LBFailover                  // those that match the most leading scopes
	LBPassthrough               // the original destination, untouched
)

func (m LBMode) String() string {
	switch m {
	case LBStrict:
		return "STRICT"
	case LBFailover:
		return "FAILOVER"
	case LBPassthrough:
		return "PASSTHROUGH"
	case LBAny:
	}
	return "ANY"
}

// LBScope is one thing a client and an endpoint may have in common.
type LBScope uint8

// The scopes, with Istio's numbers.
const (
	ScopeUnknown LBScope = iota
	ScopeRegion
	ScopeZone
	ScopeSubzone
	ScopeNode
	ScopeCluster
	ScopeNetwork
)

// IPFamilies are the address families a service is served on.
type IPFamilies uint8

// The families, with Istio's numbers.
const (
	FamiliesAny IPFamilies = iota
	FamiliesIPv4
	FamiliesIPv6
	FamiliesDual
)

// Allows reports whether an endpoint's address may be used for the service.
func (f IPFamilies) Allows(a netip.Addr) bool {
	switch f {
	case FamiliesIPv4:
		return a.Is4()
	case FamiliesIPv6:
		return a.Is6()
	case FamiliesAny, FamiliesDual:
	}
	return true
}

// Address answers "what is this IP?": exactly one of the two is set, or none when nothing is known.
type Address struct {
	Workload *Workload
	Service  *Service
}

// IsZero reports whether the address is unknown to the mesh.
func (a Address) IsZero() bool { return a.Workload == nil && a.Service == nil }
