package translate

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// What people write to bind services and workloads to waypoints (Istio's names, but for the last).
const (
	LabelUseWaypoint          = "istio.io/use-waypoint"
	LabelUseWaypointNamespace = "istio.io/use-waypoint-namespace"
	LabelUseCanary            = "istio.io/use-waypoint-canary"
	LabelUseCanaryNamespace   = "istio.io/use-waypoint-canary-namespace"
	AnnotationCanaryWeight    = "istio.io/use-waypoint-canary-weight"
	LabelIngressUseWaypoint   = "istio.io/ingress-use-waypoint"
	LabelWaypointFor          = "istio.io/waypoint-for"                     // on a Gateway or its class
	AnnotationInboundBinding  = "ambient.istio.io/waypoint-inbound-binding" // likewise

	// AnnotationUnavailable on a namespace says what becomes of traffic of its services and workloads whose waypoint is not
	// there: "deny" refuses it, "allow" lets it go around. The mesh's configuration decides for those that say nothing.
	AnnotationUnavailable = "mistnet.io/waypoint-unavailable"
)

const (
	annotationNameOverride = "gateway.istio.io/name-override" // on a Gateway: what its Service is called

	useNone     = "none" // of LabelUseWaypoint: no waypoint, whatever the namespace says
	unavailable = "unavailable.waypoint.invalid"
)

// traffic is what a waypoint is for, as LabelWaypointFor says it.
type traffic string

const (
	trafficService  traffic = "service"
	trafficWorkload traffic = "workload"
	trafficAll      traffic = "all"
)

// Binding is which waypoints traffic goes through, and what to tell about it.
type Binding struct {
	Waypoint  mesh.GatewayAddress
	Weighted  []mesh.WeightedGateway
	Ingress   bool       // an ingress gateway goes there too
	Condition *Condition // nil: nobody asked for a waypoint
}

// Set makes a service go through the waypoints, which enforce these policies, in any order.
func (b Binding) Set(s *mesh.Service, policies []string) {
	s.Waypoint, s.WeightedWaypoints, s.IngressUseWaypoint = b.Waypoint, b.Weighted, b.Ingress
	s.Policies = sortedSet(policies)
}

// Conditions are those of the object that was bound, a Service or ServiceEntry, or nil.
func (b Binding) Conditions(kind string, m *metav1.ObjectMeta) *Conditions {
	if b.Condition == nil {
		return nil
	}
	return &Conditions{Kind: kind, Namespace: m.Namespace, Name: m.Name, List: []Condition{*b.Condition}}
}

// Status is own, what is wrong with the object that was bound, or else that the waypoint it asked for is not there.
func (b Binding) Status(kind string, m *metav1.ObjectMeta, own *Status) *Status {
	if own != nil || b.Condition == nil || b.Condition.Status || b.Condition.Reason == ReasonUnsupportedTraffic {
		return own
	}
	return &Status{Kind: kind, Namespace: m.Namespace, Name: m.Name, Reason: Ignored, Message: b.Condition.Message}
}

// EntryConditions are those of a ServiceEntry, or nil.
func (o Objects) EntryConditions(cfg Config, se *ServiceEntry) *Conditions {
	b := o.BindService(cfg, &se.ObjectMeta)
	all := b.Conditions("ServiceEntry", &se.ObjectMeta)
	if !isDynamic(se) || !b.Waypoint.IsZero() {
		return all
	}
	if all == nil {
		all = &Conditions{Kind: "ServiceEntry", Namespace: se.Namespace, Name: se.Name}
	}
	all.List = append(all.List, Condition{
		Type: ConditionWaypointMissing, Status: true, Reason: ReasonNoWaypoint,
		Message: noWaypoint,
	})
	return all
}

// asked is a waypoint that somebody asked for.
type asked struct {
	name   Name
	canary Name // "" for none
	weight string
}

// askedBy reads what an object, or else its namespace, asks for; ok is false when there is to be none.
func (o Objects) askedBy(m *metav1.ObjectMeta) (a asked, ok bool) {
	from := m
	if m.Labels[LabelUseWaypoint] == "" {
		ns := o.Namespaces[m.Namespace]
		if ns == nil {
			return a, false
		}
		from = &ns.ObjectMeta
	}
	name := from.Labels[LabelUseWaypoint]
	if name == "" || name == useNone {
		return a, false
	}
	read := func(name, namespaceLabel string) Name {
		if ns := from.Labels[namespaceLabel]; ns != "" {
			return Name{ns, name}
		}
		return Name{m.Namespace, name}
	}
	a.name = read(name, LabelUseWaypointNamespace)
	if canary := from.Labels[LabelUseCanary]; canary != "" {
		a.canary, a.weight = read(canary, LabelUseCanaryNamespace), from.Annotations[AnnotationCanaryWeight]
	}
	return a, true
}

// GatewaysOf are the Gateways that decide about a service or workload with this metadata: those it asks for, by itself or by
// its namespace, and the one that it is a part of.
func (o Objects) GatewaysOf(m *metav1.ObjectMeta) []Name {
	var all []Name
	if own := partOf(m); own.Name != "" {
		all = append(all, own)
	}
	if a, ok := o.askedBy(m); ok {
		all = append(all, a.name)
		if a.canary.Name != "" {
			all = append(all, a.canary)
		}
	}
	return all
}

// BindService says which waypoints a service of this metadata is reached through.
func (o Objects) BindService(cfg Config, m *metav1.ObjectMeta) Binding {
	a, ok := o.askedBy(m)
	if !ok || o.isWaypointPart(m) {
		return Binding{}
	}
	gw, refused := o.waypoint(cfg, a.name, m.Namespace, trafficService)
	if refused != nil {
		return o.unbound(cfg, m.Namespace, a.name, refused)
	}
	b := Binding{Waypoint: gw, Ingress: o.ingressToo(m)}
	c := Condition{Type: ConditionWaypointBound, Status: true, Reason: ReasonWaypointAccepted, Message: "bound to waypoint " + a.name.String()}
	if b.Ingress {
		c.Message += ", ingress gateways too"
	}
	if stopped(o.Gateways[a.name]) {
		c.Message += ", of which no pod is ready: connections are refused until one is"
	}
	if a.canary.Name != "" {
		canary, weight, refused := o.canary(cfg, a, m.Namespace)
		switch {
		case refused != nil:
			c.Reason = refused.reason
			c.Message += " alone, without its canary: " + refused.why
		case weight > 0:
			b.Weighted = []mesh.WeightedGateway{{Gateway: gw, Weight: 100 - weight}, {Gateway: canary, Weight: weight}}
			c.Message += fmt.Sprintf("; %d %% of connections to canary %s", weight, a.canary)
		}
	}
	b.Condition = &c
	return b
}

// BindWorkload says which waypoint traffic goes through that is addressed to a workload of this metadata.
func (o Objects) BindWorkload(cfg Config, m *metav1.ObjectMeta) mesh.GatewayAddress {
	a, ok := o.askedBy(m)
	if !ok || o.isWaypointPart(m) {
		return mesh.GatewayAddress{}
	}
	gw, refused := o.waypoint(cfg, a.name, m.Namespace, trafficWorkload)
	if refused != nil {
		return o.unbound(cfg, m.Namespace, a.name, refused).Waypoint
	}
	return gw
}

// CompletePod says of a pod which waypoint it is reached through or, of one that is a waypoint's own, what holds for that:
// policies with targets, which policies finds, and none of those for workloads, which Istio's waypoints do not heed either.
func (o Objects) CompletePod(cfg Config, in *PodInput, policies func([]PolicyTarget) []string) {
	in.Waypoint = o.BindWorkload(cfg, &in.Pod.ObjectMeta)
	if gw := o.waypointOf(&in.Pod.ObjectMeta); gw != nil {
		in.AppTunnel = o.appTunnel(gw)
		in.Policies, in.Targeting = nil, policies(o.WaypointTargets(&in.Pod.ObjectMeta))
	}
}

// stopped reports whether a Gateway that has an address says that nothing serves there. Its traffic waits for it all the same: a
// waypoint that restarts is not passed by.
func stopped(gw *gatewayv1.Gateway) bool {
	return slices.ContainsFunc(gw.Status.Conditions, func(c metav1.Condition) bool {
		return c.Type == string(gatewayv1.GatewayConditionProgrammed) && c.Status == metav1.ConditionFalse
	})
}

// refusal is why something is not bound to a waypoint.
type refusal struct {
	reason string
	why    string
	absent bool // it asked for one that is not there; otherwise the waypoint is not for it
}

func absent(reason, format string, args ...any) *refusal {
	return &refusal{reason: reason, why: fmt.Sprintf(format, args...), absent: true}
}

// unbound is the binding to a waypoint that is not there: none, or one that cannot be reached, as the namespace and the mesh
// want it.
func (o Objects) unbound(cfg Config, namespace string, name Name, r *refusal) Binding {
	c := &Condition{Type: ConditionWaypointBound, Reason: r.reason, Message: r.why}
	b := Binding{Condition: c}
	switch {
	case !r.absent:
	case !o.mustDeny(cfg, namespace):
		c.Message += "; traffic goes around it"
	default:
		c.Message += "; connections are refused"
		// A name that leads to no waypoint: not that of one which is there and does not take this traffic.
		b.Waypoint = mesh.GatewayAddress{Namespace: name.Namespace, Hostname: name.Name + "." + name.Namespace + "." + unavailable, Port: mesh.PortHBONE}
	}
	return b
}

func (o Objects) mustDeny(cfg Config, namespace string) bool {
	if ns := o.Namespaces[namespace]; ns != nil {
		switch strings.ToLower(ns.Annotations[AnnotationUnavailable]) {
		case "deny":
			return true
		case "allow":
			return false
		}
	}
	return cfg.DenyWithoutWaypoint
}

// waypoint is where the Gateway of that name is, if it takes this kind of traffic of the namespace.
func (o Objects) waypoint(cfg Config, name Name, namespace string, kind traffic) (mesh.GatewayAddress, *refusal) {
	none := mesh.GatewayAddress{}
	gw := o.Gateways[name]
	if gw == nil {
		return none, absent(ReasonWaypointNotReady, "there is no Gateway %s", name)
	}
	if !o.IsWaypoint(gw) {
		return none, absent(ReasonWaypointNotReady, "Gateway %s is of class %s, which is not one of waypoints", name, gw.Spec.GatewayClassName)
	}
	if !o.allows(gw, namespace) {
		return none, absent(ReasonAttachmentDenied, "Gateway %s does not take traffic of namespace %s (allowedRoutes of its HBONE listener)", name, namespace)
	}
	if is := o.trafficOf(gw); is != trafficAll && is != kind {
		return none, &refusal{reason: ReasonUnsupportedTraffic, why: fmt.Sprintf("waypoint %s is not for traffic to a %s, it says %s: %s", name, kind, LabelWaypointFor, is)}
	}
	at, ok := o.waypointAddress(cfg, gw)
	if !ok {
		return none, absent(ReasonWaypointNotReady, "waypoint %s is not ready, it has no address", name)
	}
	return at, nil
}

// canary is the second waypoint, and its share of 100.
func (o Objects) canary(cfg Config, a asked, namespace string) (gw mesh.GatewayAddress, weight uint32, refused *refusal) {
	if a.weight != "" {
		n, err := strconv.ParseUint(a.weight, 10, 32)
		if err != nil || n > 100 {
			return gw, 0, &refusal{reason: ReasonCanaryWeight, why: fmt.Sprintf("annotation %s: %q is not a number from 0 to 100", AnnotationCanaryWeight, a.weight)}
		}
		weight = uint32(n)
	}
	if a.canary == a.name {
		return gw, 0, &refusal{reason: ReasonCanarySame, why: "it is the same waypoint"}
	}
	gw, refused = o.waypoint(cfg, a.canary, namespace, trafficService)
	return gw, weight, refused
}

// IsWaypoint reports whether a Gateway is one of waypoints: of a class that this mesh's controller or Istio's runs.
func (o Objects) IsWaypoint(gw *gatewayv1.Gateway) bool {
	return o.IsWaypointClass(string(gw.Spec.GatewayClassName))
}

// IsWaypointClass reports whether Gateways of a class are waypoints. One that nobody declared is known by its name.
func (o Objects) IsWaypointClass(class string) bool {
	controller := map[string]string{mesh.ClassWaypoint: mesh.ControllerMesh, mesh.ClassIstioWaypoint: mesh.ControllerIstioMesh}[class]
	if c := o.GatewayClasses[class]; c != nil {
		controller = string(c.Spec.ControllerName)
	}
	return controller == mesh.ControllerMesh || controller == mesh.ControllerIstioMesh
}

// trafficOf is what the Gateway is for: as its label says, or its class's.
func (o Objects) trafficOf(gw *gatewayv1.Gateway) traffic {
	if t := gw.Labels[LabelWaypointFor]; t != "" {
		return traffic(t)
	}
	if c := o.GatewayClasses[string(gw.Spec.GatewayClassName)]; c != nil && c.Labels[LabelWaypointFor] != "" {
		return traffic(c.Labels[LabelWaypointFor])
	}
	return trafficService
}

// allows reports whether a Gateway takes traffic of a namespace: its own, unless its HBONE listener says otherwise.
func (o Objects) allows(gw *gatewayv1.Gateway, namespace string) bool {
	from := gatewayv1.NamespacesFromSame
	var selector *metav1.LabelSelector
	i := slices.IndexFunc(gw.Spec.Listeners, func(l gatewayv1.Listener) bool {
		return string(l.Protocol) == "HBONE" && l.Port == mesh.PortHBONE
	})
	if i >= 0 {
		if a := gw.Spec.Listeners[i].AllowedRoutes; a != nil && a.Namespaces != nil {
			if a.Namespaces.From != nil {
				from = *a.Namespaces.From
			}
			selector = a.Namespaces.Selector
		}
	}
	switch from {
	case gatewayv1.NamespacesFromAll:
		return true
	case gatewayv1.NamespacesFromSame:
		return gw.Namespace == namespace
	case gatewayv1.NamespacesFromSelector:
		// The API server labels every namespace with its name. Where nobody did, it has it all the same.
		set := labels.Set{corev1.LabelMetadataName: namespace}
		if ns := o.Namespaces[namespace]; ns != nil {
			maps.Copy(set, ns.Labels)
		}
		s, err := metav1.LabelSelectorAsSelector(selector)
		return err == nil && s.Matches(set)
	default:
		return false
	}
}

// waypointAddress is where a Gateway is to be found: by the hostname of its status, or the hostname of its own Service if its
// status has that one's address, or any other address. Where nobody writes statuses, it is there when its Service is, and
// what its spec says counts.
func (o Objects) waypointAddress(cfg Config, gw *gatewayv1.Gateway) (mesh.GatewayAddress, bool) {
	own := ServiceOfGateway(gw)
	svc := o.Services[own]
	ownHost := mesh.GatewayAddress{Namespace: gw.Namespace, Hostname: Hostname(cfg, own), Port: mesh.PortHBONE}
	addresses := gw.Status.Addresses
	if cfg.NoStatus {
		addresses = nil
		for _, a := range gw.Spec.Addresses {
			addresses = append(addresses, gatewayv1.GatewayStatusAddress(a))
		}
		if len(addresses) == 0 {
			return ownHost, HasHost(svc)
		}
	}
	for _, a := range addresses {
		if a.Type != nil && *a.Type == gatewayv1.HostnameAddressType && a.Value != "" {
			host := strings.ToLower(strings.TrimSuffix(a.Value, "."))
			return mesh.GatewayAddress{Namespace: gw.Namespace, Hostname: host, Port: mesh.PortHBONE}, true
		}
	}
	for _, a := range addresses {
		if a.Type != nil && *a.Type != gatewayv1.IPAddressType {
			continue
		}
		ip, err := netip.ParseAddr(a.Value)
		if err != nil || ip.Zone() != "" {
			continue
		}
		if HasHost(svc) && ownsAddress(svc, ip.Unmap()) {
			return ownHost, true
		}
		return mesh.GatewayAddress{Addr: mesh.NetworkAddr{Addr: ip.Unmap()}, Port: mesh.PortHBONE}, true
	}
	return mesh.GatewayAddress{}, false
}

// ServiceOfGateway is the Service that a Gateway's controller makes for it.
func ServiceOfGateway(gw *gatewayv1.Gateway) Name {
	return Name{gw.Namespace, cmp.Or(gw.Annotations[annotationNameOverride], gw.Name)}
}

func ownsAddress(svc *corev1.Service, ip netip.Addr) bool {
	vips, err := vips(svc)
	return err == nil && slices.Contains(vips, mesh.VIP{Prefix: netip.PrefixFrom(ip, ip.BitLen())})
}

// ingressToo reports whether ingress gateways are to go through a service's waypoint.
func (o Objects) ingressToo(m *metav1.ObjectMeta) bool {
	v, ok := m.Labels[LabelIngressUseWaypoint]
	if ns := o.Namespaces[m.Namespace]; !ok && ns != nil {
		v = ns.Labels[LabelIngressUseWaypoint]
	}
	return v == "true"
}

// partOf is the Gateway that a pod or Service says it is a part of; its Name is "" when it is of none.
func partOf(m *metav1.ObjectMeta) Name {
	return Name{m.Namespace, m.Labels[mesh.LabelGatewayName]}
}

// isWaypointPart reports whether a Service or pod is a waypoint's own: it is not reached through a waypoint.
func (o Objects) isWaypointPart(m *metav1.ObjectMeta) bool {
	return m.Labels[mesh.LabelGatewayManaged] == mesh.ManagedByIstioMesh || o.waypointOf(m) != nil
}

// waypointOf is the Gateway of waypoints that a Service or pod is a part of, by its label, or nil.
func (o Objects) waypointOf(m *metav1.ObjectMeta) *gatewayv1.Gateway {
	gw := o.Gateways[partOf(m)]
	if gw == nil || !o.IsWaypoint(gw) {
		return nil
	}
	return gw
}

// appTunnel is how a ztunnel that serves the pods of a waypoint hands connections to them, as the Gateway or its class says:
// NONE or PROXY, and maybe a port.
func (o Objects) appTunnel(gw *gatewayv1.Gateway) mesh.AppTunnel {
	text, ok := gw.Annotations[AnnotationInboundBinding]
	if c := o.GatewayClasses[string(gw.Spec.GatewayClassName)]; !ok && c != nil {
		text = c.Annotations[AnnotationInboundBinding]
	}
	protocol, port, found := strings.Cut(text, "/")
	if protocol != "NONE" && protocol != "PROXY" {
		return mesh.AppTunnel{}
	}
	t := mesh.AppTunnel{Proxy: protocol == "PROXY"}
	if found {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return mesh.AppTunnel{}
		}
		t.Port = uint16(n)
	}
	return t
}
