package translate

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mistnet/mistnet/internal/mesh"
)

const annotationTrafficDistribution = "networking.istio.io/traffic-distribution"

// Service returns the noun of a Service, or nil for one that only renames another (ExternalName). namespace is the one
// it lives in, or nil when not known.
func Service(cfg Config, svc *corev1.Service, namespace *corev1.Namespace) (*mesh.Service, *Status) {
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		return nil, nil
	}
	vips, err := vips(svc)
	if err != nil {
		return nil, &Status{Kind: "Service", Namespace: svc.Namespace, Name: svc.Name, Reason: Invalid, Message: err.Error()}
	}
	s := &mesh.Service{
		Name:      svc.Name,
		Namespace: svc.Namespace,
		Hostname:  Hostname(cfg, Name{svc.Namespace, svc.Name}),
		VIPs:      vips,
		LB:        loadBalancing(svc, namespace),
		Families:  families(svc.Spec.IPFamilies),
		Canonical: true,
	}
	for _, p := range tcpPorts(svc) {
		s.Ports = append(s.Ports, mesh.Port{ServicePort: uint16(p.Port), TargetPort: targetNumber(p), App: appProtocol(p)})
	}
	return s, nil
}

// Hostname is that of the Service of that name.
func Hostname(cfg Config, n Name) string {
	return n.Name + "." + n.Namespace + ".svc." + cfg.ClusterDomain
}

// ServiceKey is the key of the noun of the Service of that name.
func ServiceKey(cfg Config, n Name) string { return mesh.ServiceKey(n.Namespace, Hostname(cfg, n)) }

func serviceKey(cfg Config, svc *corev1.Service) string {
	return ServiceKey(cfg, Name{svc.Namespace, svc.Name})
}

// vips are the service's own addresses; a headless service has none.
func vips(svc *corev1.Service) ([]mesh.VIP, error) {
	ips := svc.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{svc.Spec.ClusterIP}
	}
	var vips []mesh.VIP
	for i, ip := range ips {
		if ip == "" || ip == corev1.ClusterIPNone {
			continue
		}
		a, err := netip.ParseAddr(ip)
		if err != nil || a.Zone() != "" || a.IsUnspecified() {
			return nil, fmt.Errorf("spec.clusterIPs[%d]: %q is not an address", i, ip)
		}
		a = a.Unmap()
		v := mesh.VIP{Prefix: netip.PrefixFrom(a, a.BitLen())}
		if !slices.Contains(vips, v) {
			vips = append(vips, v)
		}
	}
	return vips, nil
}

// tcpPorts are the ports the mesh carries.
func tcpPorts(svc *corev1.Service) []corev1.ServicePort {
	ports := make([]corev1.ServicePort, 0, len(svc.Spec.Ports))
	for _, p := range svc.Spec.Ports {
		if (p.Protocol == "" || p.Protocol == corev1.ProtocolTCP) && portNumber(p.Port) != 0 {
			ports = append(ports, p)
		}
	}
	return ports
}

// targetNumber is the numeric target of a port: the port itself when nothing is said, as the API server fills in, and
// 0 when the target is a name, which each pod resolves for itself.
func targetNumber(p corev1.ServicePort) uint16 {
	if p.TargetPort.Type == intstr.String {
		return 0
	}
	return cmp.Or(portNumber(p.TargetPort.IntVal), portNumber(p.Port))
}

// portNumber is n as a port, or 0 when it cannot be one.
func portNumber(n int32) uint16 {
	if n < 1 || n > 65535 {
		return 0
	}
	return uint16(n)
}

// appProtocols maps appProtocol, or the first part of a port's name, to what is spoken.
var appProtocols = map[string]mesh.AppProtocol{
	"http": mesh.AppHTTP1, "kubernetes.io/ws": mesh.AppHTTP1,
	"http2": mesh.AppHTTP2, "kubernetes.io/h2c": mesh.AppHTTP2,
	"grpc": mesh.AppGRPC, grpcWeb: mesh.AppGRPCWeb,
	"tcp": mesh.AppTCP, "mongo": mesh.AppTCP, "mysql": mesh.AppTCP, "redis": mesh.AppTCP,
	"tls": mesh.AppTLS, "https": mesh.AppTLS, "kubernetes.io/wss": mesh.AppTLS,
}

// grpcWeb is what the appProtocol, or else the name, of a port of gRPC-Web begins with.
const grpcWeb = "grpc-web"

func appProtocol(p corev1.ServicePort) mesh.AppProtocol {
	name := strings.ToLower(p.Name)
	if p.AppProtocol != nil {
		name = strings.ToLower(*p.AppProtocol)
	}
	if strings.HasPrefix(name, grpcWeb) {
		return mesh.AppGRPCWeb
	}
	if p.AppProtocol == nil {
		name, _, _ = strings.Cut(name, "-")
	}
	return appProtocols[name]
}

// loadBalancing: an internal traffic policy of Local leaves no choice; else the preference of the service, of its
// annotation, of its namespace's annotation, whichever is there first.
func loadBalancing(svc *corev1.Service, namespace *corev1.Namespace) mesh.LoadBalancing {
	lb := mesh.LoadBalancing{
		AllowUnready: svc.Spec.PublishNotReadyAddresses, Sticky: svc.Spec.SessionAffinity == corev1.ServiceAffinityClientIP,
	}
	if p := svc.Spec.InternalTrafficPolicy; p != nil && *p == corev1.ServiceInternalTrafficPolicyLocal {
		lb.Mode, lb.Preference = mesh.LBStrict, []mesh.LBScope{mesh.ScopeNode}
		return lb
	}
	var preference string
	if svc.Spec.TrafficDistribution != nil {
		preference = *svc.Spec.TrafficDistribution
	}
	lb.Mode, lb.Preference = distribution(preference, svc.Annotations, namespace)
	return lb
}

// distribution is the preference that a spec, the annotations beside it, or those of the namespace ask for.
func distribution(preference string, annotations map[string]string, namespace *corev1.Namespace) (mesh.LBMode, []mesh.LBScope) {
	if preference == "" {
		preference = annotations[annotationTrafficDistribution]
	}
	if preference == "" && namespace != nil {
		preference = namespace.Annotations[annotationTrafficDistribution]
	}
	switch strings.ToLower(preference) {
	case "preferclose", "prefersamezone":
		return mesh.LBFailover, []mesh.LBScope{mesh.ScopeNetwork, mesh.ScopeRegion, mesh.ScopeZone}
	case "prefersamenode":
		return mesh.LBFailover, []mesh.LBScope{mesh.ScopeNetwork, mesh.ScopeRegion, mesh.ScopeZone, mesh.ScopeSubzone, mesh.ScopeNode}
	}
	return mesh.LBAny, nil
}

func families(list []corev1.IPFamily) mesh.IPFamilies {
	switch {
	case len(list) == 2:
		return mesh.FamiliesDual
	case len(list) == 1 && list[0] == corev1.IPv4Protocol:
		return mesh.FamiliesIPv4
	case len(list) == 1 && list[0] == corev1.IPv6Protocol:
		return mesh.FamiliesIPv6
	}
	return mesh.FamiliesAny
}
