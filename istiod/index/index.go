// Package index keeps the nouns of a mesh up to date, one changed object at a time.
//
// It knows which nouns an object touches, so that one change costs what it touches and not what there is: a pod its
// workload, a service the workloads it selects, a policy the workloads that must name it. What a noun is, package
// translate says. Apply must equal a difference of translate.All before and after, which the tests hold it to.
//
// The package is pure and its values are not for several goroutines: the shell around it locks.
package index

import (
	"cmp"
	"reflect"
	"slices"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayxv1alpha1 "sigs.k8s.io/gateway-api/apisx/v1alpha1"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/translate"
)

// Kind is a kind of object that nouns are made from.
type Kind uint8

// The kinds of object.
const (
	Unknown Kind = iota
	Namespace
	Node
	Pod
	Service
	EndpointSlice
	AuthorizationPolicy
	PeerAuthentication
	ServiceEntry
	WorkloadEntry
	VirtualService
	DestinationRule
	HTTPRoute
	GRPCRoute
	TCPRoute
	TLSRoute
	Gateway // of the Gateway API
	GatewayClass
	ReferenceGrant
	ConfigMap // that others refer to
	Secret    // likewise
	MeshConfig
	BackendTLSPolicy
	XBackendTrafficPolicy
)

func (k Kind) String() string {
	switch k {
	case Namespace:
		return "Namespace"
	case Node:
		return "Node"
	case Pod:
		return "Pod"
	case Service:
		return "Service"
	case EndpointSlice:
		return "EndpointSlice"
	case AuthorizationPolicy:
		return "AuthorizationPolicy"
	case PeerAuthentication:
		return "PeerAuthentication"
	case ServiceEntry:
		return "ServiceEntry"
	case WorkloadEntry:
		return "WorkloadEntry"
	case VirtualService:
		return "VirtualService"
	case DestinationRule:
		return "DestinationRule"
	case HTTPRoute:
		return "HTTPRoute"
	case GRPCRoute:
		return "GRPCRoute"
	case TCPRoute:
		return "TCPRoute"
	case TLSRoute:
		return "TLSRoute"
	case Gateway:
		return "Gateway"
	case GatewayClass:
		return "GatewayClass"
	case ReferenceGrant:
		return "ReferenceGrant"
	case ConfigMap:
		return "ConfigMap"
	case MeshConfig:
		return "MeshConfig"
	case Secret:
		return "Secret"
	case BackendTLSPolicy:
		return "BackendTLSPolicy"
	case XBackendTrafficPolicy:
		return "XBackendTrafficPolicy"
	case Unknown:
	}
	return "unknown"
}

// Event is one changed object.
type Event struct {
	Kind   Kind
	Name   translate.Name // Namespace is "" for namespaces, nodes and gateway classes
	Object runtime.Object // nil when it is gone; else of the kind's type, and never changed afterwards
}

// NounKind is a kind of noun.
type NounKind uint8

// The kinds of noun, in the order in which a client should learn of them: policies first, so that no workload is
// served before what guards it, then what routes name, then routes.
const (
	NounPolicy NounKind = iota
	NounCredential
	NounTraffic
	NounRoute
	NounService
	NounWorkload
	NounStatus
	NounRouteStatus
	NounConditions
)

func (k NounKind) String() string {
	switch k {
	case NounPolicy:
		return "policy"
	case NounCredential:
		return "credential"
	case NounTraffic:
		return "trafficpolicy"
	case NounRoute:
		return "route"
	case NounService:
		return "service"
	case NounWorkload:
		return "workload"
	case NounRouteStatus:
		return "routestatus"
	case NounStatus:
		return "status"
	case NounConditions:
	}
	return "conditions"
}

// Key names a noun.
type Key struct {
	Kind NounKind
	Name string // a workload's UID; else the noun's Key()
}

// Change is one noun that differs. One of the pointers is set, or none when the noun is gone.
type Change struct {
	Key      Key
	Workload *mesh.Workload
	Service  *mesh.Service
	Policy   *mesh.Policy
	Route    *mesh.Route
	Traffic  *mesh.TrafficPolicy
	Status   *translate.Status

	RouteStatus *translate.RouteStatus
	Conditions  *translate.Conditions
	Credential  *translate.Credential
}

type name = translate.Name

type set[T comparable] map[T]struct{}

// Index is all objects, all nouns, and who touches whom.
type Index struct {
	cfg     translate.Config // base, with what the mesh's configuration says instead
	base    translate.Config
	objects translate.Objects
	nouns   translate.Nouns

	labels   map[pair]set[name] // pods by each of their labels
	bySelect map[pair]set[name] // services by one pair of their selectors
	entries  entries
	traffic  traffic
	routing  routing

	waypoints waypoints

	byPolicy map[pair]set[name]             // policies by one pair of theirs; the root's have no namespace
	onNode   map[string]set[name]           // pods by node
	inSpace  map[string]set[name]           // pods by namespace
	services map[string]set[name]           // services by namespace
	slices   map[name]set[name]             // slices by service
	named    map[name]set[name]             // slices by a pod they name
	authn    map[string]map[name]*peerAuthn // PeerAuthentications by namespace
	runs     map[account]int                // how many pods run as an account on a node
	listed   map[name][]string              // UIDs of the workloads made from a slice

	credentials credentials

	dirty   dirt     // what the Apply under way must look at again
	changes []Change // and what it found different
}

// dirt is the objects whose nouns must be made again.
type dirt struct {
	pods, services, slices, policies, authn, serviceEntries, workloadEntries set[name]

	routes set[router]
	hosts  set[host]
	strict bool      // the policy that strict workloads share
	mesh   set[name] // the mesh's configuration
}

func clean() dirt {
	return dirt{pods: make(set[name]), services: make(set[name]), slices: make(set[name]), policies: make(set[name]), authn: make(set[name]),
		serviceEntries: make(set[name]), workloadEntries: make(set[name]), hosts: make(set[host]), routes: make(set[router]),
		mesh: make(set[name])}
}

// pair is one label in one namespace.
type pair struct{ namespace, key, value string }

type peerAuthn = securityv1.PeerAuthentication

type account struct{ node, namespace, serviceAccount string }

// New returns an index of nothing.
func New(cfg translate.Config) *Index {
	return &Index{
		cfg: cfg.WithDefaults(), base: cfg.WithDefaults(),
		objects: translate.NewObjects(), nouns: translate.NewNouns(),
		entries: newEntries(), traffic: newTraffic(), routing: newRouting(), waypoints: newWaypoints(), credentials: newCredentials(),
		labels: make(map[pair]set[name]), bySelect: make(map[pair]set[name]), byPolicy: make(map[pair]set[name]),
		onNode: make(map[string]set[name]), inSpace: make(map[string]set[name]), services: make(map[string]set[name]),
		slices: make(map[name]set[name]), named: make(map[name]set[name]),
		authn: make(map[string]map[name]*peerAuthn), runs: make(map[account]int), listed: make(map[name][]string),
		dirty: clean(),
	}
}

// Nouns is everything the index holds; it changes with the next Apply.
func (x *Index) Nouns() translate.Nouns { return x.nouns }

// Objects counts the objects by kind.
func (x *Index) Objects() map[string]int {
	o := x.objects
	return map[string]int{
		Namespace.String(): len(o.Namespaces), Node.String(): len(o.Nodes), Pod.String(): len(o.Pods),
		Service.String(): len(o.Services), EndpointSlice.String(): len(o.EndpointSlices),
		AuthorizationPolicy.String(): len(o.AuthorizationPolicies), PeerAuthentication.String(): len(o.PeerAuthentications),
		ServiceEntry.String(): len(o.ServiceEntries), WorkloadEntry.String(): len(o.WorkloadEntries),
		VirtualService.String(): len(o.VirtualServices), DestinationRule.String(): len(o.DestinationRules),
		HTTPRoute.String(): len(o.HTTPRoutes), GRPCRoute.String(): len(o.GRPCRoutes),
		TCPRoute.String(): len(o.TCPRoutes), TLSRoute.String(): len(o.TLSRoutes),
		Gateway.String(): len(o.Gateways), GatewayClass.String(): len(o.GatewayClasses), ReferenceGrant.String(): len(o.ReferenceGrants),
		ConfigMap.String(): len(o.ConfigMaps), Secret.String(): len(o.Secrets), BackendTLSPolicy.String(): len(o.BackendTLSPolicies), XBackendTrafficPolicy.String(): len(o.BackendTrafficPolicies),
	}
}

// Runs reports whether a pod of the account runs on the node: one that has not failed, with an address or not yet.
func (x *Index) Runs(node, namespace, serviceAccount string) bool {
	return x.runs[account{node, namespace, serviceAccount}] > 0
}

// Apply records the changed objects and returns the nouns that differ because of them, each once, policies before
// services before workloads.
func (x *Index) Apply(events ...Event) []Change {
	for _, ev := range events {
		x.apply(ev)
	}
	x.refresh()
	changes := x.changes
	x.changes = nil
	slices.SortFunc(changes, func(a, b Change) int {
		return cmp.Or(cmp.Compare(a.Key.Kind, b.Key.Kind), cmp.Compare(a.Key.Name, b.Key.Name))
	})
	return changes
}

func (x *Index) apply(ev Event) {
	switch ev.Kind {
	case Namespace:
		x.namespace(ev.Name.Name, as[corev1.Namespace](ev.Object))
	case Node:
		x.node(ev.Name.Name, as[corev1.Node](ev.Object))
	case Pod:
		x.pod(ev.Name, as[corev1.Pod](ev.Object))
	case Service:
		x.service(ev.Name, as[corev1.Service](ev.Object))
	case EndpointSlice:
		x.endpointSlice(ev.Name, as[discoveryv1.EndpointSlice](ev.Object))
	case AuthorizationPolicy:
		x.authorizationPolicy(ev.Name, as[securityv1.AuthorizationPolicy](ev.Object))
	case PeerAuthentication:
		x.peerAuthentication(ev.Name, as[securityv1.PeerAuthentication](ev.Object))
	case ServiceEntry:
		x.serviceEntry(ev.Name, as[translate.ServiceEntry](ev.Object))
	case WorkloadEntry:
		x.workloadEntry(ev.Name, as[networkingv1.WorkloadEntry](ev.Object))
	case VirtualService:
		x.virtualService(ev.Name, as[networkingv1.VirtualService](ev.Object))
	case DestinationRule:
		x.destinationRule(ev.Name, as[networkingv1.DestinationRule](ev.Object))
	case HTTPRoute:
		x.httpRoute(ev.Name, as[gatewayv1.HTTPRoute](ev.Object))
	case GRPCRoute:
		x.grpcRoute(ev.Name, as[gatewayv1.GRPCRoute](ev.Object))
	case TCPRoute:
		x.tcpRoute(ev.Name, as[gatewayv1.TCPRoute](ev.Object))
	case TLSRoute:
		x.tlsRoute(ev.Name, as[gatewayv1.TLSRoute](ev.Object))
	case Gateway:
		x.gateway(ev.Name, as[gatewayv1.Gateway](ev.Object))
	case GatewayClass:
		x.gatewayClass(ev.Name.Name, as[gatewayv1.GatewayClass](ev.Object))
	case ReferenceGrant:
		x.referenceGrant(ev.Name, as[gatewayv1.ReferenceGrant](ev.Object))
	case ConfigMap:
		x.configMap(ev.Name, as[corev1.ConfigMap](ev.Object))
	case MeshConfig:
		x.meshConfig(ev.Name, as[translate.MeshConfig](ev.Object))
	case Secret:
		x.secret(ev.Name, as[corev1.Secret](ev.Object))
	case BackendTLSPolicy:
		x.backendTLSPolicy(ev.Name, as[gatewayv1.BackendTLSPolicy](ev.Object))
	case XBackendTrafficPolicy:
		x.backendTrafficPolicy(ev.Name, as[gatewayxv1alpha1.XBackendTrafficPolicy](ev.Object))
	case Unknown:
	}
}

// as is the object as what its kind says it is, or nil when it is gone.
func as[T any](o runtime.Object) *T {
	v, _ := any(o).(*T)
	return v
}

func keep[K comparable, V any](m map[K]*V, k K, v *V) {
	if v == nil {
		delete(m, k)
		return
	}
	m[k] = v
}

func link[K, V comparable](m map[K]set[V], k K, v V) {
	if m[k] == nil {
		m[k] = make(set[V])
	}
	m[k][v] = struct{}{}
}

func unlink[K, V comparable](m map[K]set[V], k K, v V) {
	delete(m[k], v)
	if len(m[k]) == 0 {
		delete(m, k)
	}
}

// put makes v the noun of that key, nil for none, and notes the change if it is one.
func put[V any](x *Index, nouns map[string]*V, key Key, v *V, change Change) (changed bool) {
	old, had := nouns[key.Name]
	if v == nil && !had || v != nil && had && reflect.DeepEqual(old, v) {
		return false
	}
	keep(nouns, key.Name, v)
	change.Key = key
	x.changes = append(x.changes, change)
	return true
}

func (x *Index) putWorkload(uid string, w *mesh.Workload) {
	put(x, x.nouns.Workloads, Key{NounWorkload, uid}, w, Change{Workload: w})
}

func (x *Index) putService(key string, s *mesh.Service) {
	if put(x, x.nouns.Services, Key{NounService, key}, s, Change{Service: s}) {
		x.serviceChanged(key, s != nil)
	}
}

func (x *Index) putPolicy(key string, p *mesh.Policy) {
	put(x, x.nouns.Policies, Key{NounPolicy, key}, p, Change{Policy: p})
}

func (x *Index) putRoute(key string, r *mesh.Route) {
	put(x, x.nouns.Routes, Key{NounRoute, key}, r, Change{Route: r})
}

func (x *Index) putRouteStatus(key string, s *translate.RouteStatus) {
	put(x, x.nouns.RouteStatuses, Key{NounRouteStatus, key}, s, Change{RouteStatus: s})
}

func (x *Index) putTraffic(key string, p *mesh.TrafficPolicy) {
	put(x, x.nouns.Traffic, Key{NounTraffic, key}, p, Change{Traffic: p})
}

func (x *Index) putCredential(key string, c *translate.Credential) {
	put(x, x.nouns.Credentials, Key{NounCredential, key}, c, Change{Credential: c})
}

// putStatus records what became of an object; s is nil when all is well.
func (x *Index) putStatus(kind Kind, n name, s *translate.Status) {
	key := (&translate.Status{Kind: kind.String(), Namespace: n.Namespace, Name: n.Name}).Key()
	put(x, x.nouns.Statuses, Key{NounStatus, key}, s, Change{Status: s})
}

// putConditions records what the status of an object must say; c is nil for nothing.
func (x *Index) putConditions(kind Kind, n name, c *translate.Conditions) {
	key := (&translate.Conditions{Kind: kind.String(), Namespace: n.Namespace, Name: n.Name}).Key()
	put(x, x.nouns.Conditions, Key{NounConditions, key}, c, Change{Conditions: c})
}
