package index

import (
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/translate"
)

// asker is an object that may ask for a waypoint, or be a part of one: a Service, ServiceEntry, Pod or WorkloadEntry.
type asker struct {
	kind Kind
	name name
}

// waypoints says who touches whom by way of waypoints.
type waypoints struct {
	asks    map[asker][]name                     // the Gateways that decide about an object
	askers  map[name]set[asker]                  // and the other way round
	fronts  map[name]set[name]                   // Gateways by the Service that may be their own
	byClass map[string]set[name]                 // Gateways by class
	inSpace map[string]set[name]                 // Gateways by namespace
	targets map[translate.PolicyTarget]set[name] // policies by target
}

func newWaypoints() waypoints {
	return waypoints{asks: make(map[asker][]name), askers: make(map[name]set[asker]),
		fronts: make(map[name]set[name]), byClass: make(map[string]set[name]), inSpace: make(map[string]set[name]), targets: make(map[translate.PolicyTarget]set[name])}
}

func (x *Index) gateway(n name, now *gatewayv1.Gateway) {
	if old := x.objects.Gateways[n]; old != nil {
		unlink(x.waypoints.fronts, translate.ServiceOfGateway(old), n)
		unlink(x.waypoints.byClass, string(old.Spec.GatewayClassName), n)
		unlink(x.waypoints.inSpace, n.Namespace, n)
	}
	keep(x.objects.Gateways, n, now)
	if now != nil {
		link(x.waypoints.fronts, translate.ServiceOfGateway(now), n)
		link(x.waypoints.byClass, string(now.Spec.GatewayClassName), n)
		link(x.waypoints.inSpace, n.Namespace, n)
	}
	x.markGateway(n)
}

func (x *Index) gatewayClass(n string, now *gatewayv1.GatewayClass) {
	keep(x.objects.GatewayClasses, n, now)
	for gw := range x.waypoints.byClass[n] {
		x.markGateway(gw)
	}
	x.mark(x.dirty.policies, x.waypoints.targets[translate.PolicyTarget{Kind: translate.TargetGatewayClass, Name: name{Name: n}}])
}

// markGateway marks what goes through a Gateway's waypoints, what is a part of them, and the policies that target it.
func (x *Index) markGateway(n name) {
	for a := range x.waypoints.askers[n] {
		x.markAsker(a)
	}
	x.mark(x.dirty.policies, x.waypoints.targets[translate.PolicyTarget{Kind: translate.TargetGateway, Name: n}])
	x.credentials.dirtySpaces[n.Namespace] = struct{}{}
}

func (x *Index) markAsker(a asker) {
	switch a.kind {
	case Service:
		x.markService(a.name)
	case ServiceEntry:
		x.markEntry(a.name)
	case Pod:
		x.dirty.pods[a.name] = struct{}{}
	case WorkloadEntry:
		x.dirty.workloadEntries[a.name] = struct{}{}
	default:
	}
}

// markService marks a Service and the policies that target it: whether they are enforced depends on its waypoint.
func (x *Index) markService(n name) {
	x.dirty.services[n] = struct{}{}
	x.mark(x.dirty.policies, x.waypoints.targets[translate.PolicyTarget{Kind: translate.TargetService, Name: n}])
}

// markEntry marks a ServiceEntry, its hosts and workloads, and the policies that target it.
func (x *Index) markEntry(n name) {
	if se := x.objects.ServiceEntries[n]; se != nil {
		x.markHosts(se)
	}
	x.dirty.serviceEntries[n] = struct{}{}
	x.mark(x.dirty.policies, x.waypoints.targets[translate.PolicyTarget{Kind: translate.TargetServiceEntry, Name: n}])
}

// ask records which Gateways decide about an object; m is nil when it is gone.
func (x *Index) ask(a asker, m *metav1.ObjectMeta) {
	var now []name
	if m != nil {
		now = x.objects.GatewaysOf(m)
	}
	old := x.waypoints.asks[a]
	if slices.Equal(old, now) {
		return
	}
	for _, gw := range old {
		unlink(x.waypoints.askers, gw, a)
	}
	for _, gw := range now {
		link(x.waypoints.askers, gw, a)
	}
	if len(now) == 0 {
		delete(x.waypoints.asks, a)
		return
	}
	x.waypoints.asks[a] = now
}

// askAgain has everything in a namespace ask again: the namespace speaks for what does not speak for itself.
func (x *Index) askAgain(n string, old, now *corev1.Namespace) {
	if old != nil && now != nil && maps.Equal(old.Labels, now.Labels) && maps.Equal(old.Annotations, now.Annotations) {
		return
	}
	again := func(kind Kind, names set[name], meta func(name) *metav1.ObjectMeta) {
		for n := range names {
			a := asker{kind, n}
			x.ask(a, meta(n))
			x.markAsker(a)
		}
	}
	again(Service, x.services[n], func(n name) *metav1.ObjectMeta { return &x.objects.Services[n].ObjectMeta })
	again(ServiceEntry, x.entries.inSpace[n], func(n name) *metav1.ObjectMeta { return &x.objects.ServiceEntries[n].ObjectMeta })
	again(Pod, x.inSpace[n], func(n name) *metav1.ObjectMeta { return &x.objects.Pods[n].ObjectMeta })
	again(WorkloadEntry, x.entries.machines[n], func(n name) *metav1.ObjectMeta { return &x.objects.WorkloadEntries[n].ObjectMeta })
}

// markTarget marks what a policy's target is made of.
func (x *Index) markTarget(t translate.PolicyTarget) {
	switch t.Kind {
	case translate.TargetService:
		x.dirty.services[t.Name] = struct{}{}
	case translate.TargetServiceEntry:
		if se := x.objects.ServiceEntries[t.Name]; se != nil {
			x.markHosts(se)
		}
	case translate.TargetGateway:
		x.mark(x.dirty.pods, x.labels[pair{t.Name.Namespace, mesh.LabelGatewayName, t.Name.Name}])
	case translate.TargetGatewayClass:
		for gw := range x.waypoints.byClass[t.Name.Name] {
			x.mark(x.dirty.pods, x.labels[pair{gw.Namespace, mesh.LabelGatewayName, gw.Name}])
		}
	}
}

// targeting are the keys of the policies that target any of these.
func (x *Index) targeting(targets ...translate.PolicyTarget) (keys []string) {
	for _, t := range targets {
		for n := range x.waypoints.targets[t] {
			if translate.Enforced(x.objects.AuthorizationPolicies[n]) {
				keys = append(keys, n.String())
			}
		}
	}
	return keys
}
