package yamldir

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayxv1alpha1 "sigs.k8s.io/gateway-api/apisx/v1alpha1"
)

// The kinds that are decoded, as they stand in Key.Kind.
const (
	KindNamespace           = "/Namespace"
	KindNode                = "/Node"
	KindPod                 = "/Pod"
	KindService             = "/Service"
	KindServiceAccount      = "/ServiceAccount"
	KindConfigMap           = "/ConfigMap"
	KindSecret              = "/Secret"
	KindEndpointSlice       = "discovery.k8s.io/EndpointSlice"
	KindAuthorizationPolicy = "security.istio.io/AuthorizationPolicy"
	KindPeerAuthentication  = "security.istio.io/PeerAuthentication"
	KindServiceEntry        = "networking.istio.io/ServiceEntry"
	KindWorkloadEntry       = "networking.istio.io/WorkloadEntry"
	KindVirtualService      = "networking.istio.io/VirtualService"
	KindDestinationRule     = "networking.istio.io/DestinationRule"
	KindHTTPRoute           = "gateway.networking.k8s.io/HTTPRoute"
	KindGRPCRoute           = "gateway.networking.k8s.io/GRPCRoute"
	KindTCPRoute            = "gateway.networking.k8s.io/TCPRoute"
	KindTLSRoute            = "gateway.networking.k8s.io/TLSRoute"
	KindGateway             = "gateway.networking.k8s.io/Gateway"
	KindGatewayClass        = "gateway.networking.k8s.io/GatewayClass"
	KindReferenceGrant      = "gateway.networking.k8s.io/ReferenceGrant"
	KindBackendTLSPolicy    = "gateway.networking.k8s.io/BackendTLSPolicy"
	KindXBackendTraffic     = "gateway.networking.x-k8s.io/XBackendTrafficPolicy"
)

// kind is one decodable kind.
type kind struct {
	versions []string // newest first; all share one schema and decode into the newest one's type
	cluster  bool     // lives outside of namespaces
	make     func() runtime.Object
}

// kinds lists what is decoded. Versions of a kind that share a row have the same fields.
var kinds = map[string]kind{
	KindNamespace:           {versions: []string{"v1"}, cluster: true, make: func() runtime.Object { return &corev1.Namespace{} }},
	KindNode:                {versions: []string{"v1"}, cluster: true, make: func() runtime.Object { return &corev1.Node{} }},
	KindPod:                 {versions: []string{"v1"}, make: func() runtime.Object { return &corev1.Pod{} }},
	KindService:             {versions: []string{"v1"}, make: func() runtime.Object { return &corev1.Service{} }},
	KindServiceAccount:      {versions: []string{"v1"}, make: func() runtime.Object { return &corev1.ServiceAccount{} }},
	KindConfigMap:           {versions: []string{"v1"}, make: func() runtime.Object { return &corev1.ConfigMap{} }},
	KindSecret:              {versions: []string{"v1"}, make: func() runtime.Object { return &corev1.Secret{} }},
	KindEndpointSlice:       {versions: []string{"v1"}, make: func() runtime.Object { return &discoveryv1.EndpointSlice{} }},
	KindAuthorizationPolicy: {versions: []string{"v1", "v1beta1"}, make: func() runtime.Object { return &securityv1.AuthorizationPolicy{} }},
	KindPeerAuthentication:  {versions: []string{"v1", "v1beta1"}, make: func() runtime.Object { return &securityv1.PeerAuthentication{} }},
	KindServiceEntry:        {versions: []string{"v1", "v1beta1", "v1alpha3"}, make: func() runtime.Object { return &networkingv1.ServiceEntry{} }},
	KindWorkloadEntry:       {versions: []string{"v1", "v1beta1", "v1alpha3"}, make: func() runtime.Object { return &networkingv1.WorkloadEntry{} }},
	KindVirtualService:      {versions: []string{"v1", "v1beta1", "v1alpha3"}, make: func() runtime.Object { return &networkingv1.VirtualService{} }},
	KindDestinationRule:     {versions: []string{"v1", "v1beta1", "v1alpha3"}, make: func() runtime.Object { return &networkingv1.DestinationRule{} }},
	KindHTTPRoute:           {versions: []string{"v1", "v1beta1"}, make: func() runtime.Object { return &gatewayv1.HTTPRoute{} }},
	KindGRPCRoute:           {versions: []string{"v1"}, make: func() runtime.Object { return &gatewayv1.GRPCRoute{} }},
	KindTCPRoute:            {versions: []string{"v1", "v1alpha2"}, make: func() runtime.Object { return &gatewayv1.TCPRoute{} }},
	KindTLSRoute:            {versions: []string{"v1", "v1alpha3", "v1alpha2"}, make: func() runtime.Object { return &gatewayv1.TLSRoute{} }},
	KindGateway:             {versions: []string{"v1", "v1beta1"}, make: func() runtime.Object { return &gatewayv1.Gateway{} }},
	KindGatewayClass:        {versions: []string{"v1", "v1beta1"}, cluster: true, make: func() runtime.Object { return &gatewayv1.GatewayClass{} }},
	KindReferenceGrant:      {versions: []string{"v1", "v1beta1"}, make: func() runtime.Object { return &gatewayv1.ReferenceGrant{} }},
	KindBackendTLSPolicy:    {versions: []string{"v1", "v1alpha3"}, make: func() runtime.Object { return &gatewayv1.BackendTLSPolicy{} }},
	KindXBackendTraffic:     {versions: []string{"v1alpha1"}, make: func() runtime.Object { return &gatewayxv1alpha1.XBackendTrafficPolicy{} }},
}

// alike are kinds that are passed over although their names are close to those of kinds that are not.
var alike = []string{"gateway.networking.k8s.io/UDPRoute"}

// apiVersion is what the newest version is called in YAML.
func (k kind) apiVersion(group string) string {
	if group == "" {
		return k.versions[0]
	}
	return group + "/" + k.versions[0]
}

// findKind says how to decode an object. known is false for kinds that are none of our business; err is set for one
// that was surely meant to be known: a version we do not read, or a slip of the pen in a group that is ours.
func findKind(apiVersion, name string) (key string, k kind, known bool, err error) {
	group, version, found := strings.Cut(apiVersion, "/")
	if !found {
		group, version = "", apiVersion
	}
	key = group + "/" + name
	k, known = kinds[key]
	if known {
		if !slices.Contains(k.versions, version) {
			return key, k, true, fmt.Errorf("version %q of %s is not one of %s", version, name, strings.Join(k.versions, ", "))
		}
		return key, k, true, nil
	}
	if slices.Contains(alike, key) {
		return key, k, false, nil
	}
	var ours []string
	for _, have := range slices.Sorted(maps.Keys(kinds)) {
		if g, n, _ := strings.Cut(have, "/"); g == group {
			ours = append(ours, n)
		}
	}
	if near := nearest(name, ours); near != "" && distance(name, near) <= 2 {
		return key, k, false, fmt.Errorf("unknown kind %q, did you mean %q?", name, near)
	}
	return key, k, false, nil
}
