package index

import (
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/mistnet/mistnet/istiod/translate"
)

// Each function here records one object, keeps the relations true, and marks what the object touched before and
// touches now.

func (x *Index) namespace(n string, now *corev1.Namespace) {
	old := x.objects.Namespaces[n]
	keep(x.objects.Namespaces, n, now)
	x.mark(x.dirty.services, x.services[n])
	for se := range x.entries.inSpace[n] {
		x.markHosts(x.objects.ServiceEntries[se])
	}
	x.askAgain(n, old, now)
}

func (x *Index) node(n string, now *corev1.Node) {
	old := x.objects.Nodes[n]
	keep(x.objects.Nodes, n, now)
	if old != nil && now != nil && maps.Equal(old.Labels, now.Labels) {
		return // a node reports itself every few seconds
	}
	x.mark(x.dirty.pods, x.onNode[n])
}

func (x *Index) pod(n name, now *corev1.Pod) {
	x.rewarded(n.Namespace, x.objects.Pods[n], now)
	if old := x.objects.Pods[n]; old != nil {
		for k, v := range old.Labels {
			unlink(x.labels, pair{n.Namespace, k, v}, n)
		}
		unlink(x.onNode, old.Spec.NodeName, n)
		unlink(x.inSpace, n.Namespace, n)
		x.count(old, -1)
	}
	if now != nil {
		now = translate.TrimPod(now)
		for k, v := range now.Labels {
			link(x.labels, pair{n.Namespace, k, v}, n)
		}
		link(x.onNode, now.Spec.NodeName, n)
		link(x.inSpace, n.Namespace, n)
		x.count(now, +1)
	}
	keep(x.objects.Pods, n, now)
	x.dirty.pods[n] = struct{}{}
	x.ask(asker{Pod, n}, metaOf(now))
}

// metaOf is the metadata of an object, nil of none.
func metaOf[T any, P interface {
	*T
	metav1.ObjectMetaAccessor
}](o P) *metav1.ObjectMeta {
	if o == nil {
		return nil
	}
	m, _ := o.GetObjectMeta().(*metav1.ObjectMeta)
	return m
}

func (x *Index) count(pod *corev1.Pod, by int) {
	if pod.Status.Phase == corev1.PodFailed {
		return
	}
	a := account{pod.Spec.NodeName, pod.Namespace, translate.ServiceAccount(pod)}
	if x.runs[a] += by; x.runs[a] == 0 {
		delete(x.runs, a)
	}
}

func (x *Index) service(n name, now *corev1.Service) {
	if old := x.objects.Services[n]; old != nil {
		unlink(x.services, n.Namespace, n)
		if anchor, ok := anchorOf(n.Namespace, old.Spec.Selector); ok {
			unlink(x.bySelect, anchor, n)
		}
		x.markSelected(n.Namespace, old.Spec.Selector)
	}
	keep(x.objects.Services, n, now)
	if now != nil {
		link(x.services, n.Namespace, n)
		if anchor, ok := anchorOf(n.Namespace, now.Spec.Selector); ok {
			link(x.bySelect, anchor, n)
		}
		x.markSelected(n.Namespace, now.Spec.Selector)
	}
	x.ask(asker{Service, n}, metaOf(now))
	x.markService(n)
	for gw := range x.waypoints.fronts[n] {
		x.markGateway(gw)
	}
	x.mark(x.dirty.serviceEntries, x.entries.byHost[host{n.Namespace, translate.Hostname(x.cfg, n)}])
	for slice := range x.slices[n] {
		x.dirty.slices[slice] = struct{}{}
		for _, pod := range translate.PodsOf(x.objects.EndpointSlices[slice]) {
			x.dirty.pods[pod] = struct{}{}
		}
	}
}

func (x *Index) endpointSlice(n name, now *discoveryv1.EndpointSlice) {
	if old := x.objects.EndpointSlices[n]; old != nil {
		svc := translate.ServiceOf(old)
		unlink(x.slices, svc, n)
		for _, pod := range translate.PodsOf(old) {
			unlink(x.named, pod, n)
			x.markListed(svc, pod)
		}
	}
	keep(x.objects.EndpointSlices, n, now)
	if now != nil {
		svc := translate.ServiceOf(now)
		link(x.slices, svc, n)
		for _, pod := range translate.PodsOf(now) {
			link(x.named, pod, n)
			x.markListed(svc, pod)
		}
	}
	x.dirty.slices[n] = struct{}{}
}

// markListed marks a pod that a slice names, unless its service finds its pods by itself: such slices are most of all,
// and say nothing that is not known.
func (x *Index) markListed(service, pod name) {
	if svc := x.objects.Services[service]; svc != nil && len(svc.Spec.Selector) == 0 {
		x.dirty.pods[pod] = struct{}{}
	}
}

func (x *Index) authorizationPolicy(n name, now *securityv1.AuthorizationPolicy) {
	before := x.attachment(x.objects.AuthorizationPolicies[n])
	after := x.attachment(now)
	x.aim(n, x.objects.AuthorizationPolicies[n], now)
	keep(x.objects.AuthorizationPolicies, n, now)
	x.dirty.policies[n] = struct{}{}
	if maps.Equal(before, after) {
		return // what it says does not matter to those that name it
	}
	space := x.policySpace(n)
	if anchor, ok := anchorOf(space, before); ok {
		unlink(x.byPolicy, anchor, n)
	}
	if anchor, ok := anchorOf(space, after); ok {
		link(x.byPolicy, anchor, n)
	}
	x.markSelected(space, before)
	x.markSelected(space, after)
}

// aim records which objects a policy targets, and marks those for which that changed.
func (x *Index) aim(n name, old, now *securityv1.AuthorizationPolicy) {
	targets := func(ap *securityv1.AuthorizationPolicy) ([]translate.PolicyTarget, bool) {
		if ap == nil {
			return nil, false
		}
		return translate.PolicyTargets(x.cfg, ap), translate.Enforced(ap)
	}
	before, was := targets(old)
	after, is := targets(now)
	if slices.Equal(before, after) && was == is {
		return
	}
	for _, t := range before {
		unlink(x.waypoints.targets, t, n)
		x.markTarget(t)
	}
	for _, t := range after {
		link(x.waypoints.targets, t, n)
		x.markTarget(t)
	}
}

// attachment is the selector by which workloads come to name the policy, or nil when none does.
func (x *Index) attachment(ap *securityv1.AuthorizationPolicy) map[string]string {
	if ap == nil || !translate.IsL4(ap) {
		return nil
	}
	return ap.Spec.GetSelector().GetMatchLabels()
}

// policySpace is the namespace whose workloads the policy may select, "" for all.
func (x *Index) policySpace(n name) string {
	if n.Namespace == x.cfg.RootNamespace {
		return ""
	}
	return n.Namespace
}

func (x *Index) peerAuthentication(n name, now *peerAuthn) {
	old := x.objects.PeerAuthentications[n]
	keep(x.objects.PeerAuthentications, n, now)
	if now != nil {
		if x.authn[n.Namespace] == nil {
			x.authn[n.Namespace] = make(map[name]*peerAuthn)
		}
		x.authn[n.Namespace][n] = now
	} else if delete(x.authn[n.Namespace], n); len(x.authn[n.Namespace]) == 0 {
		delete(x.authn, n.Namespace)
	}
	x.dirty.strict = true
	x.dirty.authn[n] = struct{}{}
	for _, pa := range []*peerAuthn{old, now} {
		switch {
		case pa == nil:
		case !translate.IsPlain(pa):
			x.markSelected(n.Namespace, pa.Spec.GetSelector().GetMatchLabels())
		case n.Namespace == x.cfg.RootNamespace:
			for pod := range x.objects.Pods {
				x.dirty.pods[pod] = struct{}{}
			}
			for we := range x.objects.WorkloadEntries {
				x.dirty.workloadEntries[we] = struct{}{}
			}
			for other := range x.objects.PeerAuthentications {
				x.dirty.authn[other] = struct{}{}
			}
		default:
			x.mark(x.dirty.pods, x.inSpace[n.Namespace])
			x.mark(x.dirty.workloadEntries, x.entries.machines[n.Namespace])
			for other := range x.authn[n.Namespace] {
				x.dirty.authn[other] = struct{}{}
			}
		}
	}
}

func (x *Index) mark(dirty, names set[name]) {
	for n := range names {
		dirty[n] = struct{}{}
	}
}

// markSelected marks the pods and WorkloadEntries of a namespace ("" for all) that a selector picks.
func (x *Index) markSelected(namespace string, selector map[string]string) {
	if len(selector) == 0 {
		return
	}
	if namespace == "" {
		for n, pod := range x.objects.Pods {
			if translate.Selects(selector, pod.Labels) {
				x.dirty.pods[n] = struct{}{}
			}
		}
		for n, we := range x.objects.WorkloadEntries {
			if translate.Selects(selector, translate.EntryLabels(we)) {
				x.dirty.workloadEntries[n] = struct{}{}
			}
		}
		return
	}
	for n := range fewest(x.labels, namespace, selector) {
		if translate.Selects(selector, x.objects.Pods[n].Labels) {
			x.dirty.pods[n] = struct{}{}
		}
	}
	for n := range fewest(x.entries.labels, namespace, selector) {
		if translate.Selects(selector, translate.EntryLabels(x.objects.WorkloadEntries[n])) {
			x.dirty.workloadEntries[n] = struct{}{}
		}
	}
}

// fewest are the objects that have the rarest of a selector's labels.
func fewest(labels map[pair]set[name], namespace string, selector map[string]string) (found set[name]) {
	first := true
	for k, v := range selector {
		if have := labels[pair{namespace, k, v}]; first || len(have) < len(found) {
			found, first = have, false
		}
	}
	return found
}

// anchorOf is the pair a selector is filed under: any will do, so it is the first by key.
func anchorOf(namespace string, selector map[string]string) (pair, bool) {
	if len(selector) == 0 {
		return pair{}, false
	}
	k := slices.Min(slices.Collect(maps.Keys(selector)))
	return pair{namespace, k, selector[k]}, true
}
