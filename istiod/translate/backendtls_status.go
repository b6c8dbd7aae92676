package translate

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// tlsConditions are those of a BackendTLSPolicy under way: Accepted and ResolvedRefs for each of its targets, which are the ancestors
// of its status. Gateway API: an ancestor is the target of a policy, or above it; a mesh has nothing above a Service.
type tlsConditions struct {
	policy           *BackendTLSPolicy
	closed, resolved Condition         // what holds for all targets; closed.Status: it does not close them
	refused          map[int]Condition // by the place of the target, before closed
}

func newTLSConditions(p *BackendTLSPolicy, configMaps map[Name]*corev1.ConfigMap) *tlsConditions {
	accepted, refs := string(gatewayv1.PolicyConditionAccepted), string(gatewayv1.BackendTLSPolicyConditionResolvedRefs)
	c := &tlsConditions{
		policy: p, refused: make(map[int]Condition),
		closed:   Condition{Type: accepted, Status: true, Reason: string(gatewayv1.PolicyReasonAccepted), Message: "waypoints speak TLS to it"},
		resolved: Condition{Type: refs, Status: true, Reason: string(gatewayv1.BackendTLSPolicyReasonResolvedRefs), Message: "all references are good"},
	}
	bundle, wrong := trusted(p, configMaps)
	if len(wrong) > 0 {
		c.resolved.Status, c.resolved.Message = false, strings.Join(wrong, "; ")
		c.resolved.Reason = string(gatewayv1.BackendTLSPolicyReasonInvalidCACertificateRef)
		if slices.ContainsFunc(p.Spec.Validation.CACertificateRefs, func(r gatewayv1.LocalObjectReference) bool {
			return !isConfigMap(string(r.Group), string(r.Kind))
		}) {
			c.resolved.Reason = string(gatewayv1.BackendTLSPolicyReasonInvalidKind)
		}
	}
	if _, why := upstreamTLS(p, configMaps); why != "" {
		c.closed.Status, c.closed.Reason, c.closed.Message = false, string(gatewayv1.PolicyReasonInvalid), why+"; nothing is sent to it"
		if len(wrong) > 0 && len(bundle) == 0 {
			c.closed.Reason = string(gatewayv1.BackendTLSPolicyReasonNoValidCACertificate)
		}
	}
	return c
}

// target notes why targetRefs[i] is not served; the first reason counts.
func (c *tlsConditions) target(i int, reason gatewayv1.PolicyConditionReason, why string) {
	if _, said := c.refused[i]; !said {
		c.refused[i] = Condition{Type: c.closed.Type, Reason: string(reason), Message: why}
	}
}

// status is nil when none of the targets is one that a mesh has.
func (c *tlsConditions) status() *RouteStatus {
	p := c.policy
	s := &RouteStatus{Kind: "BackendTLSPolicy", Namespace: p.Namespace, Name: p.Name, Generation: p.Generation}
	for i, ref := range p.Spec.TargetRefs {
		if _, ok := target(p.Namespace, ref.LocalPolicyTargetReference); !ok {
			continue
		}
		accepted, refused := c.refused[i]
		if !refused {
			accepted = c.closed
		}
		s.Parents = append(s.Parents, ParentStatus{
			Ref:        gatewayv1.ParentReference{Group: &ref.Group, Kind: &ref.Kind, Name: ref.Name, SectionName: ref.SectionName},
			Conditions: []Condition{accepted, c.resolved},
		})
	}
	if len(s.Parents) == 0 {
		return nil
	}
	return s
}
