package index

import gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

// What says where waypoints are. Each function records one object.

func (x *Index) gateway(n name, now *gatewayv1.Gateway) { keep(x.objects.Gateways, n, now) }

func (x *Index) gatewayClass(n string, now *gatewayv1.GatewayClass) {
	keep(x.objects.GatewayClasses, n, now)
}
