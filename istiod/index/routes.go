package index

import (
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// What says where requests go. Each function records one object.

func (x *Index) virtualService(n name, now *networkingv1.VirtualService) {
	keep(x.objects.VirtualServices, n, now)
}

func (x *Index) httpRoute(n name, now *gatewayv1.HTTPRoute) { keep(x.objects.HTTPRoutes, n, now) }

func (x *Index) grpcRoute(n name, now *gatewayv1.GRPCRoute) { keep(x.objects.GRPCRoutes, n, now) }

func (x *Index) tcpRoute(n name, now *gatewayv1.TCPRoute) { keep(x.objects.TCPRoutes, n, now) }

func (x *Index) tlsRoute(n name, now *gatewayv1.TLSRoute) { keep(x.objects.TLSRoutes, n, now) }

func (x *Index) referenceGrant(n name, now *gatewayv1.ReferenceGrant) {
	keep(x.objects.ReferenceGrants, n, now)
}
