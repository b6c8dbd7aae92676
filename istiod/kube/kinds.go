package kube

import (
	"context"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayxv1alpha1 "sigs.k8s.io/gateway-api/apisx/v1alpha1"

	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// customKind is a kind that is there when somebody installed its definition.
type customKind struct {
	kind     index.Kind
	group    apiGroup
	resource string
	cluster  bool // lives outside of namespaces
	trim     func(runtime.Object) (runtime.Object, error)
}

// The groups of these kinds, with the versions of each, the newest first. Those of one kind have the same fields.
var (
	securityKinds   = apiGroup{"security.istio.io", []string{"v1", "v1beta1"}}
	networkingKinds = apiGroup{"networking.istio.io", []string{"v1", "v1beta1", "v1alpha3"}}
	gatewayAPI      = apiGroup{"gateway.networking.k8s.io", []string{"v1", "v1beta1"}}
	gatewayAPINew   = apiGroup{"gateway.networking.k8s.io", []string{"v1", "v1alpha3", "v1alpha2"}}
	gatewayAPITry   = apiGroup{"gateway.networking.x-k8s.io", []string{"v1alpha1"}}
)

var customKinds = []customKind{
	{kind: index.AuthorizationPolicy, group: securityKinds, resource: "authorizationpolicies", trim: trimAuthorizationPolicy},
	{kind: index.PeerAuthentication, group: securityKinds, resource: "peerauthentications", trim: trimPeerAuthentication},
	{kind: index.ServiceEntry, group: networkingKinds, resource: "serviceentries", trim: trimServiceEntry},
	{kind: index.WorkloadEntry, group: networkingKinds, resource: "workloadentries", trim: trimWorkloadEntry},
	{kind: index.VirtualService, group: networkingKinds, resource: "virtualservices", trim: trimVirtualService},
	{kind: index.DestinationRule, group: networkingKinds, resource: "destinationrules", trim: trimDestinationRule},
	{kind: index.HTTPRoute, group: gatewayAPI, resource: "httproutes", trim: trimGatewayAPI[gatewayv1.HTTPRoute]},
	{kind: index.GRPCRoute, group: gatewayAPI, resource: "grpcroutes", trim: trimGatewayAPI[gatewayv1.GRPCRoute]},
	{kind: index.TCPRoute, group: gatewayAPINew, resource: "tcproutes", trim: trimGatewayAPI[gatewayv1.TCPRoute]},
	{kind: index.TLSRoute, group: gatewayAPINew, resource: "tlsroutes", trim: trimGatewayAPI[gatewayv1.TLSRoute]},
	{kind: index.Gateway, group: gatewayAPI, resource: "gateways", trim: trimGatewayAPI[gatewayv1.Gateway]},
	{kind: index.GatewayClass, group: gatewayAPI, resource: "gatewayclasses", cluster: true, trim: trimGatewayAPI[gatewayv1.GatewayClass]},
	{kind: index.ReferenceGrant, group: gatewayAPI, resource: "referencegrants", trim: trimGatewayAPI[gatewayv1.ReferenceGrant]},
	{kind: index.BackendTLSPolicy, group: gatewayAPINew, resource: "backendtlspolicies", trim: trimGatewayAPI[gatewayv1.BackendTLSPolicy]},
	{kind: index.XBackendTrafficPolicy, group: gatewayAPITry, resource: "xbackendtrafficpolicies",
		trim: trimGatewayAPI[gatewayxv1alpha1.XBackendTrafficPolicy]},
}

// name is what the kind is called in reports: that of Istio's kinds says enough.
func (k customKind) name() string {
	if k.group.name == securityKinds.name || k.group.name == networkingKinds.name {
		return k.resource
	}
	return k.resource + "." + k.group.name
}

type apiGroup struct {
	name     string
	versions []string
}

func (g apiGroup) resources(resource string) []schema.GroupVersionResource {
	all := make([]schema.GroupVersionResource, len(g.versions))
	for i, v := range g.versions {
		all[i] = schema.GroupVersionResource{Group: g.name, Version: v, Resource: resource}
	}
	return all
}

// Custom are the kinds that are read when they are there, in every version.
func Custom() map[schema.GroupVersionResource]index.Kind {
	all := make(map[schema.GroupVersionResource]index.Kind)
	for _, k := range customKinds {
		for _, r := range k.group.resources(k.resource) {
			all[r] = k.kind
		}
	}
	return all
}

// versions are the ways to read a kind.
func (s *Source) versions(group apiGroup, resource string) []version {
	return untyped(s.cfg.Clients.Dynamic, group, resource)
}

// untyped are the ways to read a kind without its type.
func untyped(client dynamic.Interface, group apiGroup, resource string) (versions []version) {
	for _, gvr := range group.resources(resource) {
		r := client.Resource(gvr)
		versions = append(versions, version{
			name:  gvr.Version,
			list:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return r.List(ctx, o) },
			watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) { return r.Watch(ctx, o) },
		})
	}
	return versions
}

func (s *Source) makeCustom() []*feed {
	feeds := make([]*feed, len(customKinds))
	for i, k := range customKinds {
		take := s.taker(k.kind)
		switch k.kind {
		case index.AuthorizationPolicy:
			take = s.takePolicies
		case index.ServiceEntry:
			take = s.takeEntries
		case index.VirtualService:
			take = s.ruleTaker(k.kind)
		case index.DestinationRule:
			take = both(s.ruleTaker(k.kind), both(s.secrets.taker(k.kind, byRule(translate.CredentialSecrets)),
				s.trusted.taker(k.kind, byRule(translate.CredentialConfigMaps))))
		case index.HTTPRoute, index.GRPCRoute, index.TCPRoute, index.TLSRoute:
			take = both(s.routeTaker(k.kind), func(changes []change) { s.routes.take(k, changes) })
		case index.BackendTLSPolicy:
			take = both(both(take, s.trusted.taker(k.kind, trustedByPolicy)), func(changes []change) { s.routes.take(k, changes) })
		case index.Gateway:
			take = both(take, s.gateways.takeGateways)
		case index.GatewayClass:
			take = both(take, s.gateways.takeClasses)
		default:
		}
		// Which waypoints there are must be known of all control planes, by whom things are bound to them.
		if k.kind != index.Gateway && k.kind != index.GatewayClass {
			take = s.revisions.configured(k.name(), take)
		}
		feeds[i] = &feed{name: k.name(), client: s.cfg.Clients.Dynamic, versions: s.versions(k.group, k.resource), optional: true,
			selected: !k.cluster, trim: k.trim, take: take}
	}
	return feeds
}

func both(a, b func([]change)) func([]change) {
	return func(changes []change) {
		a(changes)
		b(changes)
	}
}

// routeTaker takes routes that speak to the mesh: those of gateways speak to whoever runs them.
func (s *Source) routeTaker(kind index.Kind) func([]change) {
	take := s.taker(kind)
	return func(changes []change) {
		meant := make([]change, len(changes))
		for i, c := range changes {
			meant[i] = c
			if parents, _ := parentsOf(c.object); !isMeshRoute(parents) {
				meant[i].object = nil
			}
		}
		take(meant)
	}
}

// isMeshRoute: a route speaks to the mesh when one of its parents is a service.
func isMeshRoute(parents []gatewayv1.ParentReference) bool {
	return slices.ContainsFunc(parents, func(p gatewayv1.ParentReference) bool {
		return p.Kind != nil && (*p.Kind == "Service" || *p.Kind == "ServiceEntry")
	})
}
