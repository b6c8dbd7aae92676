// Package translate turns Kubernetes objects into the mesh's nouns: what a pod, a service or a policy means.
//
// It is pure: each function takes the objects that matter to one noun and returns it, with a Status when the object
// asks for something that cannot be had. Which objects matter to which noun is decided twice: plainly in All, which
// looks at everything, and quickly in package index, which must agree with it. Objects are never changed; nouns may
// share strings and slices with them.
package translate

import (
	"cmp"
	"maps"
	"slices"
	"time"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayxv1alpha1 "sigs.k8s.io/gateway-api/apisx/v1alpha1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Config is what a noun depends on besides objects.
type Config struct {
	ClusterID     string // part of every workload's UID
	TrustDomain   string // of every identity
	RootNamespace string // whose policies hold in the whole mesh
	ClusterDomain string // end of every service's hostname

	NoStatus            bool // nobody writes statuses: a Gateway is in place when its Service is
	NoSecrets           bool // Secrets are not at hand: what is said of those that are not there is believed
	DenyWithoutWaypoint bool // what asks for a waypoint that is not there is not reached, unless its namespace says otherwise

	// What holds for objects that say nothing (WithMesh): the exportTo of VirtualServices and DestinationRules, none for
	// everybody, and the retries of HTTP rules, nil for those of a waypoint (DefaultRetry).
	VirtualServiceExportTo  []string
	DestinationRuleExportTo []string
	Retry                   *mesh.Retry
	TryTimeout              time.Duration // of each try; 0: none
}

// WithDefaults fills what is empty with Istio's defaults.
func (c Config) WithDefaults() Config {
	c.ClusterID = cmp.Or(c.ClusterID, mesh.DefaultClusterID)
	c.TrustDomain = cmp.Or(c.TrustDomain, mesh.DefaultTrustDomain)
	c.RootNamespace = cmp.Or(c.RootNamespace, mesh.RootNamespace)
	c.ClusterDomain = cmp.Or(c.ClusterDomain, mesh.DefaultClusterDomain)
	return c
}

// Name is a namespaced object's name.
type Name struct{ Namespace, Name string }

// String joins the two with a slash.
func (n Name) String() string { return n.Namespace + "/" + n.Name }

func compareNames(a, b Name) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// Status says what became of an object that is not served as written.
type Status struct {
	Kind      string // of the object, as in YAML: "AuthorizationPolicy"
	Namespace string
	Name      string
	Reason    StatusReason
	Message   string // for the person who wrote the object
}

// StatusReason is the class of a Status.
type StatusReason string

// The reasons of a Status.
const (
	// Unsupported: part of the object is left out; what is left is stricter or, where the message says so, nothing.
	Unsupported StatusReason = "UnsupportedValue"
	// Invalid: the object makes no sense. A policy that is invalid denies everything in its scope.
	Invalid StatusReason = "Invalid"
	// Ignored: the object is understood and has no effect where it stands.
	Ignored StatusReason = "Ignored"
	// Conflicted: an older object has said the same already, and counts.
	Conflicted StatusReason = "Conflicted"
)

// Key names what the status is about: Kind namespace/name.
func (s *Status) Key() string { return s.Kind + " " + s.Namespace + "/" + s.Name }

// Objects is everything a mesh is made from.
type Objects struct {
	Namespaces            map[string]*corev1.Namespace
	Nodes                 map[string]*corev1.Node
	Pods                  map[Name]*corev1.Pod
	Services              map[Name]*corev1.Service
	EndpointSlices        map[Name]*discoveryv1.EndpointSlice
	AuthorizationPolicies map[Name]*securityv1.AuthorizationPolicy
	PeerAuthentications   map[Name]*securityv1.PeerAuthentication
	ServiceEntries        map[Name]*ServiceEntry
	WorkloadEntries       map[Name]*networkingv1.WorkloadEntry

	VirtualServices        map[Name]*networkingv1.VirtualService
	DestinationRules       map[Name]*networkingv1.DestinationRule
	HTTPRoutes             map[Name]*gatewayv1.HTTPRoute
	GRPCRoutes             map[Name]*gatewayv1.GRPCRoute
	TCPRoutes              map[Name]*gatewayv1.TCPRoute
	TLSRoutes              map[Name]*gatewayv1.TLSRoute
	Gateways               map[Name]*gatewayv1.Gateway
	GatewayClasses         map[string]*gatewayv1.GatewayClass
	ReferenceGrants        map[Name]*gatewayv1.ReferenceGrant
	ConfigMaps             map[Name]*corev1.ConfigMap // those that others refer to
	MeshConfig             *MeshConfig                // nil: there is none
	Secrets                map[Name]*corev1.Secret    // likewise
	BackendTLSPolicies     map[Name]*gatewayv1.BackendTLSPolicy
	BackendTrafficPolicies map[Name]*gatewayxv1alpha1.XBackendTrafficPolicy
}

// NewObjects returns no objects, in maps that take them.
func NewObjects() Objects {
	return Objects{
		Namespaces: make(map[string]*corev1.Namespace), Nodes: make(map[string]*corev1.Node),
		Pods: make(map[Name]*corev1.Pod), Services: make(map[Name]*corev1.Service),
		EndpointSlices:         make(map[Name]*discoveryv1.EndpointSlice),
		AuthorizationPolicies:  make(map[Name]*securityv1.AuthorizationPolicy),
		PeerAuthentications:    make(map[Name]*securityv1.PeerAuthentication),
		ServiceEntries:         make(map[Name]*ServiceEntry),
		WorkloadEntries:        make(map[Name]*networkingv1.WorkloadEntry),
		VirtualServices:        make(map[Name]*networkingv1.VirtualService),
		DestinationRules:       make(map[Name]*networkingv1.DestinationRule),
		HTTPRoutes:             make(map[Name]*gatewayv1.HTTPRoute),
		GRPCRoutes:             make(map[Name]*gatewayv1.GRPCRoute),
		TCPRoutes:              make(map[Name]*gatewayv1.TCPRoute),
		TLSRoutes:              make(map[Name]*gatewayv1.TLSRoute),
		Gateways:               make(map[Name]*gatewayv1.Gateway),
		GatewayClasses:         make(map[string]*gatewayv1.GatewayClass),
		ReferenceGrants:        make(map[Name]*gatewayv1.ReferenceGrant),
		ConfigMaps:             make(map[Name]*corev1.ConfigMap),
		Secrets:                make(map[Name]*corev1.Secret),
		BackendTLSPolicies:     make(map[Name]*gatewayv1.BackendTLSPolicy),
		BackendTrafficPolicies: make(map[Name]*gatewayxv1alpha1.XBackendTrafficPolicy),
	}
}

// Nouns is everything a mesh is, each by its key.
type Nouns struct {
	Workloads map[string]*mesh.Workload
	Services  map[string]*mesh.Service
	Policies  map[string]*mesh.Policy
	Routes    map[string]*mesh.Route
	Traffic   map[string]*mesh.TrafficPolicy
	Statuses  map[string]*Status

	Credentials   map[string]*Credential  // not for everybody to see
	RouteStatuses map[string]*RouteStatus // of routes of the Gateway API
	Conditions    map[string]*Conditions  // what the statuses of objects must say
}

// NewNouns returns no nouns, in maps that take them.
func NewNouns() Nouns {
	return Nouns{
		Workloads: make(map[string]*mesh.Workload), Services: make(map[string]*mesh.Service), Policies: make(map[string]*mesh.Policy),
		Routes: make(map[string]*mesh.Route), Traffic: make(map[string]*mesh.TrafficPolicy), Statuses: make(map[string]*Status),
		RouteStatuses: make(map[string]*RouteStatus), Credentials: make(map[string]*Credential),
		Conditions: make(map[string]*Conditions),
	}
}

// All translates everything at once, in the plainest way: it is what package index is tested against.
func All(cfg Config, o Objects) Nouns {
	n := NewNouns()
	status := func(s *Status) {
		if s != nil {
			n.Statuses[s.Key()] = s
		}
	}
	conditions := func(c *Conditions) {
		if c != nil {
			n.Conditions[c.Key()] = c
		}
	}
	status(o.MeshConfig.Status(cfg))
	cfg = cfg.WithMesh(o.MeshConfig)
	for _, name := range slices.SortedFunc(maps.Keys(o.Services), compareNames) {
		svc, s := Service(cfg, o.Services[name], o.Namespaces[name.Namespace])
		if svc != nil {
			m := &o.Services[name].ObjectMeta
			b := o.BindService(cfg, m)
			b.Set(svc, o.policiesOf(cfg, PolicyTarget{TargetService, name}))
			conditions(b.Conditions("Service", m))
			s = b.Status("Service", m, s)
			n.Services[svc.Key()] = svc
		}
		status(s)
	}
	for _, se := range o.ServiceEntries {
		taken := make(map[string]string)
		for _, host := range EntryHosts(se) {
			if owner := o.hostOwner(cfg, se.Namespace, host); owner == se {
				if svc := o.EntryService(cfg, se, host, o.policiesOf(cfg, PolicyTarget{TargetServiceEntry, Name{se.Namespace, se.Name}})); svc != nil {
					n.Services[svc.Key()] = svc
				}
			} else if owner != nil {
				taken[host] = TakenByEntry(owner)
			} else {
				taken[host] = TakenByService
			}
		}
		status(o.EntryStatus(cfg, se, taken))
		conditions(o.EntryConditions(cfg, se))
		for _, w := range EntryWorkloads(cfg, se) {
			w.Waypoint = o.BindWorkload(cfg, &se.ObjectMeta)
			n.Workloads[w.UID] = w
		}
	}
	o.traffic(cfg, n, status)
	o.credentials(n)
	for _, we := range o.WorkloadEntries {
		w, s := WorkloadEntry(cfg, o.entryInput(cfg, we))
		status(s)
		if w != nil {
			n.Workloads[w.UID] = w
		}
	}
	for _, ap := range o.AuthorizationPolicies {
		p, s, c := o.Policy(cfg, ap)
		status(s)
		conditions(c)
		if p != nil {
			n.Policies[p.Key()] = p
		}
	}
	if len(o.PeerAuthentications) > 0 {
		p := StaticStrict(cfg)
		n.Policies[p.Key()] = p
	}
	for _, pa := range o.PeerAuthentications {
		status(AuthnStatus(cfg, pa))
		if p := PortPolicy(cfg, o.levels(cfg, pa.Namespace, nil), pa); p != nil {
			n.Policies[p.Key()] = p
		}
	}
	for _, pod := range o.Pods {
		w, s := Pod(cfg, o.podInput(cfg, pod))
		status(s)
		if w != nil {
			n.Workloads[w.UID] = w
		}
	}
	for _, slice := range o.EndpointSlices {
		ws, s := Slice(cfg, slice, o.Services[ServiceOf(slice)])
		status(s)
		for _, w := range ws {
			n.Workloads[w.UID] = w
		}
	}
	o.routes(cfg, n)
	return n
}

// traffic adds how services are talked to. All services must be there.
func (o Objects) traffic(cfg Config, n Nouns, status func(*Status)) {
	targets := make(map[Target][]TrafficInput)
	covered := make(map[*DestinationRule]bool)
	for _, svc := range n.Services {
		in := o.trafficInput(cfg, svc)
		targets[TargetOf(svc)] = append(targets[TargetOf(svc)], in)
		for _, dr := range in.Rules {
			covered[dr] = true
		}
		for _, p := range TrafficPolicies(cfg, in) {
			n.Traffic[p.Key()] = p
		}
	}
	for _, dr := range o.DestinationRules {
		var siblings []*DestinationRule
		for _, other := range o.DestinationRules {
			if other != dr && other.Namespace == dr.Namespace && RuleHost(cfg, other) == RuleHost(cfg, dr) {
				siblings = append(siblings, other)
			}
		}
		status(o.DestinationRuleStatus(cfg, dr, siblings, covered[dr]))
	}
	meant := func(ts []Target) (services []TrafficInput) {
		for _, t := range ts {
			services = append(services, targets[t]...)
		}
		slices.SortFunc(services, func(a, b TrafficInput) int { return cmp.Compare(a.Service.Key(), b.Service.Key()) })
		return services
	}
	for _, p := range o.BackendTLSPolicies {
		s, told := BackendTLSStatus(cfg, p, o.ConfigMaps, slices.Collect(maps.Values(o.BackendTLSPolicies)), meant(TLSPolicyTargets(p)))
		status(s)
		if told != nil {
			n.RouteStatuses[told.Key()] = told
		}
	}
	for _, p := range o.BackendTrafficPolicies {
		status(BackendTrafficStatus(cfg, p, slices.Collect(maps.Values(o.BackendTrafficPolicies)), meant(TrafficPolicyTargets(p))))
	}
}

func (o Objects) trafficInput(cfg Config, svc *mesh.Service) TrafficInput {
	t := TargetOf(svc)
	var in TrafficInput
	if t.Kind == targetService {
		in = NewTrafficInput(svc, o.Services[t.Name], nil)
	} else {
		in = NewTrafficInput(svc, nil, o.ServiceEntries[t.Name])
	}
	in.ConfigMaps, in.Secrets = o.ConfigMaps, o.Secrets
	for _, dr := range o.DestinationRules {
		if Covers(cfg, dr, svc) {
			in.Rules = append(in.Rules, dr)
		}
	}
	for _, p := range o.BackendTLSPolicies {
		if slices.Contains(TLSPolicyTargets(p), t) {
			in.TLS = append(in.TLS, p)
		}
	}
	for _, p := range o.BackendTrafficPolicies {
		if slices.Contains(TrafficPolicyTargets(p), t) {
			in.Backends = append(in.Backends, p)
		}
	}
	return in
}

func (o Objects) podInput(cfg Config, pod *corev1.Pod) PodInput {
	in := PodInput{Pod: pod, Node: o.Nodes[pod.Spec.NodeName]}
	for _, svc := range o.Services {
		if svc.Namespace == pod.Namespace && Selects(svc.Spec.Selector, pod.Labels) {
			in.Services = append(in.Services, svc)
		}
	}
	for name, slice := range o.EndpointSlices {
		svc := o.Services[ServiceOf(slice)]
		if svc != nil && len(svc.Spec.Selector) == 0 && slices.Contains(PodsOf(slice), Name{pod.Namespace, pod.Name}) {
			in.Slices = append(in.Slices, Backing{Service: svc, Slice: o.EndpointSlices[name]})
		}
	}
	in.Entries = o.entriesThatSelect(pod.Namespace, pod.Labels)
	in.Policies = o.policiesFor(cfg, pod.Namespace, pod.Labels)
	o.CompletePod(cfg, &in, func(targets []PolicyTarget) []string { return o.policiesOf(cfg, targets...) })
	return in
}

func (o Objects) entryInput(cfg Config, we *networkingv1.WorkloadEntry) WorkloadEntryInput {
	labels := EntryLabels(we)
	in := WorkloadEntryInput{Entry: we, Entries: o.entriesThatSelect(we.Namespace, labels), Policies: o.policiesFor(cfg, we.Namespace, labels),
		Waypoint: o.BindWorkload(cfg, &we.ObjectMeta)}
	for _, svc := range o.Services {
		if svc.Namespace == we.Namespace && Selects(svc.Spec.Selector, labels) {
			in.Services = append(in.Services, svc)
		}
	}
	return in
}

// hostOwner is the ServiceEntry whose word counts about a host, or nil when a Service has it.
func (o Objects) hostOwner(cfg Config, namespace, host string) (owner *ServiceEntry) {
	if n, ok := ServiceOfHost(cfg, namespace, host); ok && HasHost(o.Services[n]) {
		return nil
	}
	for _, se := range o.ServiceEntries {
		if se.Namespace == namespace && slices.Contains(EntryHosts(se), host) {
			owner = OlderEntry(owner, se)
		}
	}
	return owner
}

func (o Objects) entriesThatSelect(namespace string, labels map[string]string) (entries []*ServiceEntry) {
	for _, se := range o.ServiceEntries {
		if se.Namespace == namespace && Selects(EntrySelector(se), labels) {
			entries = append(entries, se)
		}
	}
	return entries
}

// policiesFor are the keys of the policies that a workload of a namespace with the labels must name.
func (o Objects) policiesFor(cfg Config, namespace string, labels map[string]string) (keys []string) {
	for _, ap := range o.AuthorizationPolicies {
		if Attaches(cfg, ap, namespace, labels) {
			keys = append(keys, ap.Namespace+"/"+ap.Name)
		}
	}
	return append(keys, AuthnPolicies(cfg, o.levels(cfg, namespace, labels))...)
}

// levels finds the PeerAuthentications in force for a workload of a namespace with the labels.
func (o Objects) levels(cfg Config, namespace string, labels map[string]string) Levels {
	var l Levels
	for _, pa := range o.PeerAuthentications {
		l.Consider(cfg, pa, namespace, labels)
	}
	return l
}

// Selects reports whether a selector picks what has the labels. An empty selector picks nothing.
func Selects(selector, labels map[string]string) bool {
	if len(selector) == 0 || len(selector) > len(labels) {
		return false
	}
	for k, v := range selector {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}
