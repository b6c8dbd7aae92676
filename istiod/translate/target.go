package translate

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	securityapi "istio.io/api/security/v1beta1"
	typeapi "istio.io/api/type/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// PolicyTarget is an object that a policy targets, rather than workloads by their labels: the policy holds at waypoints.
type PolicyTarget struct {
	Kind TargetKind
	Name Name // a GatewayClass has no namespace
}

// TargetKind is a kind of PolicyTarget, as it is written.
type TargetKind string

// The kinds of target.
const (
	TargetGateway      TargetKind = "Gateway"
	TargetGatewayClass TargetKind = "GatewayClass"
	TargetService      TargetKind = "Service"
	TargetServiceEntry TargetKind = "ServiceEntry"
)

// String is the kind and name.
func (t PolicyTarget) String() string {
	if t.Kind == TargetGatewayClass {
		return string(t.Kind) + " " + t.Name.Name
	}
	return string(t.Kind) + " " + t.Name.String()
}

// maxTargets is how many targets a policy may have, as Istio's API says.
const maxTargets = 16

// TargetsWaypoint reports whether the policy is for waypoints, and no business of node proxies.
func TargetsWaypoint(ap *securityv1.AuthorizationPolicy) bool {
	return ap.Spec.GetTargetRef() != nil || len(ap.Spec.GetTargetRefs()) > 0
}

// PolicyTargets are what the policy targets, each once, in order. What cannot be a target is left out.
func PolicyTargets(cfg Config, ap *securityv1.AuthorizationPolicy) []PolicyTarget {
	var targets []PolicyTarget
	for _, ref := range targetRefs(ap) {
		if t, err := policyTarget(cfg, ap.Namespace, ref); err == nil {
			targets = append(targets, t)
		}
	}
	slices.SortFunc(targets, func(a, b PolicyTarget) int { return cmp.Or(cmp.Compare(a.Kind, b.Kind), compareNames(a.Name, b.Name)) })
	return slices.Compact(targets)
}

// targetRefs are those of the policy, and the one that has a field of its own in older ones.
func targetRefs(ap *securityv1.AuthorizationPolicy) []*typeapi.PolicyTargetReference {
	refs := ap.Spec.GetTargetRefs()
	if one := ap.Spec.GetTargetRef(); one != nil {
		refs = append(slices.Clip(refs), one)
	}
	return refs
}

func policyTarget(cfg Config, namespace string, ref *typeapi.PolicyTargetReference) (PolicyTarget, error) {
	group, kind, name := ref.GetGroup(), TargetKind(ref.GetKind()), ref.GetName()
	t := PolicyTarget{Kind: kind, Name: Name{namespace, name}}
	switch {
	case name == "":
		return t, fmt.Errorf("%s without a name", kind)
	case group == groupGateway && kind == TargetGatewayClass:
		if t.Name.Namespace = ""; namespace != cfg.RootNamespace {
			return t, fmt.Errorf("a GatewayClass can be targeted from the root namespace %s only", cfg.RootNamespace)
		}
	case group == groupGateway && kind == TargetGateway:
	case (group == "" || group == "core") && kind == TargetService:
	case group == groupNetworking && kind == TargetServiceEntry:
	default:
		return t, fmt.Errorf("kind %q of group %q cannot be targeted", kind, group)
	}
	if ns := ref.GetNamespace(); ns != "" && ns != namespace {
		return t, fmt.Errorf("%s %s is in another namespace, where it cannot be targeted", kind, name)
	}
	return t, nil
}

// targets looks for what makes it unclear what a policy is for.
func (c *policyCompiler) targets(ap *securityv1.AuthorizationPolicy) {
	if !TargetsWaypoint(ap) {
		return
	}
	if len(ap.Spec.GetSelector().GetMatchLabels()) > 0 {
		c.fault("selector", "excludes targetRefs")
	}
	if n := len(targetRefs(ap)); n > maxTargets {
		c.fault("targetRefs", "%d of them, want %d at most", n, maxTargets)
	}
}

// TargetState is whether a target can have policies enforced.
type TargetState uint8

// The states of a target.
const (
	TargetMissing TargetState = iota // there is no such object
	TargetUnbound                    // no waypoint stands before it, or it is no waypoint
	TargetBound
)

// TargetState says what stands where a target is.
func (o Objects) TargetState(cfg Config, t PolicyTarget) TargetState {
	there, bound := false, false
	switch t.Kind {
	case TargetGateway:
		gw := o.Gateways[t.Name]
		there, bound = gw != nil, gw != nil && o.IsWaypoint(gw)
	case TargetGatewayClass:
		bound = o.IsWaypointClass(t.Name.Name)
		there = bound || o.GatewayClasses[t.Name.Name] != nil
	case TargetService:
		if svc := o.Services[t.Name]; svc != nil {
			there, bound = true, !o.BindService(cfg, &svc.ObjectMeta).Waypoint.IsZero()
		}
	case TargetServiceEntry:
		if se := o.ServiceEntries[t.Name]; se != nil {
			there, bound = true, !o.BindService(cfg, &se.ObjectMeta).Waypoint.IsZero()
		}
	}
	switch {
	case bound:
		return TargetBound
	case there:
		return TargetUnbound
	}
	return TargetMissing
}

// Policy returns the noun of an AuthorizationPolicy, or nil when nobody enforces it, and what became of it, which for one with
// targets depends on them.
func (o Objects) Policy(cfg Config, ap *securityv1.AuthorizationPolicy) (*mesh.Policy, *Status, *Conditions) {
	p, s := Policy(cfg, ap)
	if !TargetsWaypoint(ap) {
		return p, s, nil // kube tells what node proxies make of it
	}
	c := o.attachment(cfg, ap, p, s)
	if c.Reason != ReasonAccepted {
		told := &Status{Kind: "AuthorizationPolicy", Namespace: ap.Namespace, Name: ap.Name, Reason: Ignored, Message: c.Message}
		if s != nil {
			told.Reason = s.Reason
		}
		s = told
	}
	return p, s, &Conditions{Kind: "AuthorizationPolicy", Namespace: ap.Namespace, Name: ap.Name, List: []Condition{c}}
}

// attachment is the condition that tells what became of a policy with targets: p and s are what Policy made of it.
func (o Objects) attachment(cfg Config, ap *securityv1.AuthorizationPolicy, p *mesh.Policy, s *Status) Condition {
	by := make(map[TargetState][]string)
	for _, t := range PolicyTargets(cfg, ap) {
		state := o.TargetState(cfg, t)
		by[state] = append(by[state], t.String())
	}
	bound, unbound, missing := by[TargetBound], by[TargetUnbound], by[TargetMissing]
	var bad, says []string
	for _, ref := range targetRefs(ap) {
		if _, err := policyTarget(cfg, ap.Namespace, ref); err != nil {
			bad = append(bad, err.Error())
		}
	}
	say := func(what string, about []string) {
		if len(about) > 0 {
			says = append(says, what+strings.Join(about, ", "))
		}
	}
	if s != nil {
		says = append(says, s.Message)
	}
	if p != nil {
		say("holds for ", bound)
	}
	say("no waypoint stands before ", unbound)
	say("there is no ", missing)
	say("", bad)
	c := Condition{Type: ConditionWaypointAccepted, Message: strings.Join(says, "; ")}
	switch {
	case p == nil, p.Invalid != "", len(bound)+len(unbound)+len(missing) == 0:
		c.Reason = ReasonInvalid
	case len(bound) == 0 && len(unbound) > 0:
		c.Reason = ReasonAncestorNotBound
	case len(bound) == 0:
		c.Reason = ReasonTargetNotFound
	case len(says) > 1:
		c.Status, c.Reason = true, ReasonPartiallyInvalid
	default:
		c.Status, c.Reason = true, ReasonAccepted
	}
	return c
}

// WaypointTargets are the targets by which policies hold at a pod that is a waypoint's; none when it is not.
func (o Objects) WaypointTargets(m *metav1.ObjectMeta) []PolicyTarget {
	gw := o.waypointOf(m)
	if gw == nil {
		return nil
	}
	return []PolicyTarget{
		{Kind: TargetGateway, Name: Name{gw.Namespace, gw.Name}},
		{Kind: TargetGatewayClass, Name: Name{"", string(gw.Spec.GatewayClassName)}},
	}
}

// policiesOf are the keys of the policies that target any of these.
func (o Objects) policiesOf(cfg Config, targets ...PolicyTarget) (keys []string) {
	for _, ap := range o.AuthorizationPolicies {
		if slices.ContainsFunc(PolicyTargets(cfg, ap), func(t PolicyTarget) bool { return slices.Contains(targets, t) }) && Enforced(ap) {
			keys = append(keys, ap.Namespace+"/"+ap.Name)
		}
	}
	return keys
}

// Enforced reports whether anybody enforces a policy with targets: one that only asks for a record has no noun.
func Enforced(ap *securityv1.AuthorizationPolicy) bool {
	return ap.Spec.Action != securityapi.AuthorizationPolicy_AUDIT
}
