package gateway

import (
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// Observed is what there is of a Gateway.
type Observed struct {
	Parameters error    // why spec.infrastructure.parametersRef, or what it names, cannot be used
	Failed     error    // why what the Gateway becomes could not be written
	Addresses  error    // why spec.addresses cannot be used
	ClusterIPs []string // of the Service; none: it has no address
	Hostnames  []string // of the Service
	Ready      bool     // a pod serves
	Waiting    string   // for what, when it is not ready
}

// Status is what a Gateway's status should be. Conditions keep the time of their last transition, and an address that was
// once told is told for as long as the Service has it: clients are to find a waypoint that restarts, not to pass it by.
func (c Config) Status(gw *gatewayv1.Gateway, o Observed, now metav1.Time) gatewayv1.GatewayStatus {
	s := *gw.Status.DeepCopy()
	set := func(t gatewayv1.GatewayConditionType, status metav1.ConditionStatus, reason gatewayv1.GatewayConditionReason, message string) {
		meta.SetStatusCondition(&s.Conditions, metav1.Condition{Type: string(t), Status: status, Reason: string(reason), Message: message,
			ObservedGeneration: gw.Generation, LastTransitionTime: now})
	}
	good := 0
	for _, l := range gw.Spec.Listeners {
		if Serves(l) {
			good++
		}
	}
	switch {
	case o.Parameters != nil:
		set(gatewayv1.GatewayConditionAccepted, metav1.ConditionFalse, gatewayv1.GatewayReasonInvalidParameters, o.Parameters.Error())
	case o.Addresses != nil:
		set(gatewayv1.GatewayConditionAccepted, metav1.ConditionFalse, gatewayv1.GatewayReasonUnsupportedAddress, o.Addresses.Error())
	case good == 0:
		set(gatewayv1.GatewayConditionAccepted, metav1.ConditionFalse, gatewayv1.GatewayReasonListenersNotValid,
			"none of the listeners is a waypoint's: "+wantListener)
	case good < len(gw.Spec.Listeners):
		set(gatewayv1.GatewayConditionAccepted, metav1.ConditionTrue, gatewayv1.GatewayReasonListenersNotValid,
			"some listeners are not a waypoint's: "+wantListener)
	default:
		set(gatewayv1.GatewayConditionAccepted, metav1.ConditionTrue, gatewayv1.GatewayReasonAccepted, "it is a waypoint of this mesh")
	}
	told := len(s.Addresses) > 0
	if len(o.ClusterIPs) > 0 && (o.Ready || told) {
		s.Addresses = addresses(o)
	}
	switch {
	case o.Failed != nil:
		set(gatewayv1.GatewayConditionProgrammed, metav1.ConditionFalse, gatewayv1.GatewayReasonInvalid, o.Failed.Error())
	case len(o.ClusterIPs) == 0 || !o.Ready:
		set(gatewayv1.GatewayConditionProgrammed, metav1.ConditionFalse, gatewayv1.GatewayReasonAddressNotAssigned, o.Waiting)
	default:
		set(gatewayv1.GatewayConditionProgrammed, metav1.ConditionTrue, gatewayv1.GatewayReasonProgrammed, "the waypoint serves at "+o.Hostnames[0])
	}
	set("ResolvedRefs", metav1.ConditionTrue, "ResolvedRefs", "there is no reference besides the parameters")
	s.Listeners = c.listeners(gw, o, now)
	return s
}

const wantListener = "want protocol HBONE and port 15008"

// addresses are both the Service's addresses and its names: Istio of different versions looks for one or the other.
func addresses(o Observed) []gatewayv1.GatewayStatusAddress {
	var all []gatewayv1.GatewayStatusAddress
	ip, host := gatewayv1.IPAddressType, gatewayv1.HostnameAddressType
	for _, a := range o.ClusterIPs {
		all = append(all, gatewayv1.GatewayStatusAddress{Type: &ip, Value: a})
	}
	for _, a := range o.Hostnames {
		all = append(all, gatewayv1.GatewayStatusAddress{Type: &host, Value: a})
	}
	return all
}

// listeners are the status of each. No route is attached to a waypoint's listener: routes name Services as parents.
func (c Config) listeners(gw *gatewayv1.Gateway, o Observed, now metav1.Time) []gatewayv1.ListenerStatus {
	all := make([]gatewayv1.ListenerStatus, 0, len(gw.Spec.Listeners))
	for _, l := range gw.Spec.Listeners {
		s := gatewayv1.ListenerStatus{Name: l.Name, SupportedKinds: []gatewayv1.RouteGroupKind{}}
		if i := slices.IndexFunc(gw.Status.Listeners, func(old gatewayv1.ListenerStatus) bool { return old.Name == l.Name }); i >= 0 {
			s.Conditions = slices.Clone(gw.Status.Listeners[i].Conditions)
		}
		set := func(t gatewayv1.ListenerConditionType, status metav1.ConditionStatus, reason gatewayv1.ListenerConditionReason, message string) {
			meta.SetStatusCondition(&s.Conditions, metav1.Condition{Type: string(t), Status: status, Reason: string(reason), Message: message,
				ObservedGeneration: gw.Generation, LastTransitionTime: now})
		}
		switch {
		case !Serves(l):
			why := fmt.Sprintf("protocol %s on port %d is not served by a waypoint: %s", l.Protocol, l.Port, wantListener)
			set(gatewayv1.ListenerConditionAccepted, metav1.ConditionFalse, gatewayv1.ListenerReasonUnsupportedProtocol, why)
			set(gatewayv1.ListenerConditionProgrammed, metav1.ConditionFalse, gatewayv1.ListenerReasonInvalid, why)
		case o.Ready && len(o.ClusterIPs) > 0:
			set(gatewayv1.ListenerConditionAccepted, metav1.ConditionTrue, gatewayv1.ListenerReasonAccepted, "it is a waypoint's")
			set(gatewayv1.ListenerConditionProgrammed, metav1.ConditionTrue, gatewayv1.ListenerReasonProgrammed, "the waypoint serves it")
		default:
			set(gatewayv1.ListenerConditionAccepted, metav1.ConditionTrue, gatewayv1.ListenerReasonAccepted, "it is a waypoint's")
			set(gatewayv1.ListenerConditionProgrammed, metav1.ConditionFalse, gatewayv1.ListenerReasonPending, "the waypoint is not ready")
		}
		set(gatewayv1.ListenerConditionConflicted, metav1.ConditionFalse, gatewayv1.ListenerReasonNoConflicts, "listeners have ports of their own")
		if l.AllowedRoutes != nil && len(l.AllowedRoutes.Kinds) > 0 {
			set(gatewayv1.ListenerConditionResolvedRefs, metav1.ConditionFalse, gatewayv1.ListenerReasonInvalidRouteKinds,
				"no route can be attached to a waypoint's listener: name Services as parents of routes")
		} else {
			set(gatewayv1.ListenerConditionResolvedRefs, metav1.ConditionTrue, gatewayv1.ListenerReasonResolvedRefs, "there is no reference")
		}
		all = append(all, s)
	}
	return all
}

// features are what of the Gateway API (sigs.k8s.io/gateway-api/pkg/features) waypoints of this mesh support, sorted: whatever
// its standard channel has for meshes and for their routes. Upstream's suite is asked to look at these (e2e/bins/gatewayapi).
var features = []gatewayv1.FeatureName{
	"GRPCRoute",
	"GRPCRouteNamedRouteRule",
	"HTTPRoute",
	"HTTPRoute303RedirectStatusCode",
	"HTTPRoute307RedirectStatusCode",
	"HTTPRoute308RedirectStatusCode",
	"HTTPRouteBackendProtocolH2C",
	"HTTPRouteBackendProtocolWebSocket",
	"HTTPRouteBackendRequestHeaderModification",
	"HTTPRouteBackendTimeout",
	"HTTPRouteCORS",
	"HTTPRouteHostRewrite",
	"HTTPRouteMethodMatching",
	"HTTPRouteNamedRouteRule",
	"HTTPRouteParentRefPort",
	"HTTPRoutePathRedirect",
	"HTTPRoutePathRewrite",
	"HTTPRoutePortRedirect",
	"HTTPRouteQueryParamMatching",
	"HTTPRouteRequestMirror",
	"HTTPRouteRequestMultipleMirrors",
	"HTTPRouteRequestPercentageMirror",
	"HTTPRouteRequestTimeout",
	"HTTPRouteResponseHeaderModification",
	"HTTPRouteSchemeRedirect",
	"Mesh",
	"MeshClusterIPMatching",
	"MeshConsumerRoute",
	"MeshHTTPRouteBackendRequestHeaderModification",
	"MeshHTTPRouteNamedRouteRule",
	"MeshHTTPRouteQueryParamMatching",
	"MeshHTTPRouteRedirectPath",
	"MeshHTTPRouteRedirectPort",
	"MeshHTTPRouteRewritePath",
	"MeshHTTPRouteSchemeRedirect",
	"ReferenceGrant",
}

const handled = "handled by Mistnet"

// AcceptedBy reports whether a class is accepted already, as it is now, by a control plane whose word is to stay: one of another mesh,
// or, unless this one is to speak for the class, anyone.
func AcceptedBy(class *gatewayv1.GatewayClass, mine bool) bool {
	c := meta.FindStatusCondition(class.Status.Conditions, string(gatewayv1.GatewayClassConditionStatusAccepted))
	return c != nil && c.Status == metav1.ConditionTrue && c.ObservedGeneration == class.Generation && (!mine || c.Message != handled)
}

// ClassStatus is what the status of a GatewayClass of this control plane should be.
func (c Config) ClassStatus(class *gatewayv1.GatewayClass, now metav1.Time) gatewayv1.GatewayClassStatus {
	s := *class.Status.DeepCopy()
	accepted := metav1.Condition{Type: string(gatewayv1.GatewayClassConditionStatusAccepted), Status: metav1.ConditionTrue,
		Reason: string(gatewayv1.GatewayClassReasonAccepted), Message: handled, ObservedGeneration: class.Generation, LastTransitionTime: now}
	if class.Spec.ParametersRef != nil {
		accepted.Status, accepted.Reason = metav1.ConditionFalse, string(gatewayv1.GatewayClassReasonInvalidParameters)
		accepted.Message = "spec.parametersRef of a class is not supported: give a Gateway spec.infrastructure.parametersRef"
	}
	meta.SetStatusCondition(&s.Conditions, accepted)
	s.SupportedFeatures = nil
	for _, f := range features {
		s.SupportedFeatures = append(s.SupportedFeatures, gatewayv1.SupportedFeature{Name: f})
	}
	return s
}
