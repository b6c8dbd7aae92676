package index

import (
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayxv1alpha1 "sigs.k8s.io/gateway-api/apisx/v1alpha1"
)

// What says how a service is talked to. Each function records one object.

func (x *Index) destinationRule(n name, now *networkingv1.DestinationRule) {
	keep(x.objects.DestinationRules, n, now)
}

func (x *Index) backendTLSPolicy(n name, now *gatewayv1.BackendTLSPolicy) {
	keep(x.objects.BackendTLSPolicies, n, now)
}

func (x *Index) backendTrafficPolicy(n name, now *gatewayxv1alpha1.XBackendTrafficPolicy) {
	keep(x.objects.BackendTrafficPolicies, n, now)
}
