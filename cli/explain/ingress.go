package explain

import (
	"cmp"
	"fmt"
	"slices"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// ingressClasses are the classes of Istio's Gateways that are no waypoints. Those of others are for others to judge.
var ingressClasses = []gatewayv1.ObjectName{"istio", "istio-remote", "istio-east-west"}

// atTheEdge are the Gateways that bring traffic into the mesh, which nothing here serves yet, and what is attached to them or
// to none at all.
func atTheEdge(events []index.Event) (all []Problem) {
	gateways := make(map[translate.Name]gatewayv1.ObjectName)
	for _, e := range events {
		if g, ok := e.Object.(*gatewayv1.Gateway); ok {
			gateways[e.Name] = g.Spec.GatewayClassName
			if slices.Contains(ingressClasses, g.Spec.GatewayClassName) {
				all = append(all, Problem{Object: "Gateway " + e.Name.String(), Reason: "Ignored", What: fmt.Sprintf(
					"has no effect: Gateways of class %s are not served yet, only waypoints are; leave it to another controller", g.Spec.GatewayClassName)})
			}
		}
	}
	for _, e := range events {
		kind, parents := parentsOf(e.Object)
		for i, p := range parents {
			if p.Kind != nil && *p.Kind != "Gateway" || p.Group != nil && *p.Group != gatewayv1.GroupName {
				continue
			}
			name := translate.Name{Namespace: e.Name.Namespace, Name: string(p.Name)}
			if p.Namespace != nil {
				name.Namespace = cmp.Or(string(*p.Namespace), name.Namespace)
			}
			problem := Problem{Object: kind + " " + e.Name.String()}
			switch class, ok := gateways[name]; {
			case !ok:
				problem.Reason, problem.What = "ParentNotFound", fmt.Sprintf("parentRefs[%d]: there is no Gateway %s; rules of the mesh have a Service as parent", i, name)
			case slices.Contains(ingressClasses, class):
				problem.Reason, problem.What = "Ignored", fmt.Sprintf("parentRefs[%d]: has no effect: Gateway %s is of class %s, which is not served yet; "+
					"rules of the mesh have a Service as parent", i, name, class)
			default:
				continue
			}
			all = append(all, problem)
		}
	}
	return all
}

// parentsOf are the parents of a route of the Gateway API, none of anything else.
func parentsOf(object any) (kind string, parents []gatewayv1.ParentReference) {
	switch r := object.(type) {
	case *gatewayv1.HTTPRoute:
		return "HTTPRoute", r.Spec.ParentRefs
	case *gatewayv1.GRPCRoute:
		return "GRPCRoute", r.Spec.ParentRefs
	case *gatewayv1.TCPRoute:
		return "TCPRoute", r.Spec.ParentRefs
	case *gatewayv1.TLSRoute:
		return "TLSRoute", r.Spec.ParentRefs
	}
	return "", nil
}
