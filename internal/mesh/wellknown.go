package mesh

// Ports a ztunnel opens inside every enrolled pod's network namespace.
const (
	PortOutbound    = 15001 // captured outbound connections
	PortPassthrough = 15006 // captured inbound plaintext
	PortHBONE       = 15008 // HBONE: mutual TLS and HTTP/2 CONNECT; addressed directly
	PortDNS         = 15053 // captured DNS
)

// Ports a program opens for itself.
const (
	PortAdmin     = 15000 // administration, loopback only
	PortMetrics   = 15020 // Prometheus metrics
	PortReadiness = 15021 // /healthz/ready
	PortXDS       = 15012 // istiod: xDS and CA over TLS
	PortIstiodMon = 15014 // istiod and CNI agent: metrics and debug pages
)

// Marks and connection marks that keep ztunnel's own packets out of redirection.
const (
	MarkZtunnel = 0x539 // on every socket ztunnel opens in a pod
	MarkTProxy  = 0x111 // on the connections those sockets belong to
	MarkMask    = 0xfff
	RouteTable  = 100   // where packets marked MarkTProxy are routed: to the loopback device
	RulePref    = 32764 // priority of the ip rule that does so
)

// Addresses host probes appear from inside a pod, so that redirection can let them pass.
const (
	ProbeAddrIPv4 = "169.254.7.127"
	ProbeAddrIPv6 = "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"
)

// Names users, dashboards and the other programs of an Istio mesh rely on.
const (
	DefaultTrustDomain    = "cluster.local"
	DefaultClusterDomain  = "cluster.local"
	DefaultClusterID      = "Kubernetes"
	DefaultServiceAccount = "default"
	RootNamespace         = "istio-system"

	LabelDataplaneMode    = "istio.io/dataplane-mode" // ambient or none, on a namespace or pod
	DataplaneModeAmbient  = "ambient"
	DataplaneModeNone     = "none"
	AnnotationRedirection = "ambient.istio.io/redirection" // enabled or pending, written on the pod by the CNI agent

	// Gateways of the Gateway API that are waypoints: of our class and, unless that is switched off, of Istio's.
	ClassWaypoint       = "mistnet-waypoint"
	ControllerMesh      = "mistnet.io/mesh-controller" // of GatewayClasses
	ClassIstioWaypoint  = "istio-waypoint"
	ControllerIstioMesh = "istio.io/mesh-controller"
	LabelGatewayName    = "gateway.networking.k8s.io/gateway-name" // on what belongs to a Gateway
	LabelGatewayManaged = "gateway.istio.io/managed"               // on what a controller made for a Gateway
	ManagedByIstioMesh  = "istio.io-mesh-controller"               // that of waypoints

	TypeAddress       = "type.googleapis.com/istio.workload.Address"
	TypeAuthorization = "type.googleapis.com/istio.security.Authorization"

	// StaticStrictPolicy is the name, in the root namespace, of the policy that refuses callers without an identity.
	StaticStrictPolicy = "istio_converted_static_strict"
)
