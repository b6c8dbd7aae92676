package index_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	networkingapi "istio.io/api/networking/v1alpha3"
	securityapi "istio.io/api/security/v1beta1"
	typeapi "istio.io/api/type/v1beta1"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// world makes random objects out of few names, so that they meet, and keeps them the plain way.
type world struct {
	*rand.Rand
	objects translate.Objects
}

func newWorld(seed uint64) *world {
	return &world{Rand: rand.New(rand.NewPCG(seed, 1)), objects: translate.NewObjects()}
}

func pick[T any](w *world, from ...T) T { return from[w.IntN(len(from))] }

func (w *world) often() bool { return w.IntN(4) > 0 }

func (w *world) labels() map[string]string {
	m := make(map[string]string)
	for range w.IntN(3) {
		m[pick(w, "app", "tier")] = pick(w, "a", "b")
	}
	return m
}

func (w *world) event() index.Event {
	ev := index.Event{
		Kind: pick(w, index.Namespace, index.Node, index.Pod, index.Pod, index.Pod, index.Service, index.EndpointSlice,
			index.AuthorizationPolicy, index.PeerAuthentication, index.ServiceEntry, index.WorkloadEntry,
			index.DestinationRule, index.DestinationRule, index.BackendTLSPolicy, index.XBackendTrafficPolicy,
			index.VirtualService, index.VirtualService, index.HTTPRoute, index.GRPCRoute, index.TCPRoute, index.TLSRoute, index.ReferenceGrant,
			index.Gateway, index.Gateway, index.GatewayClass, index.ConfigMap, index.MeshConfig, index.Secret),
		Name: translate.Name{Namespace: pick(w, "one", "two", "istio-system"), Name: "x" + strconv.Itoa(w.IntN(5))},
	}
	meta := metav1.ObjectMeta{Namespace: ev.Name.Namespace, Name: ev.Name.Name, Labels: w.labels()}
	w.bind(&meta)
	gone := w.IntN(5) == 0
	switch ev.Kind {
	case index.Namespace:
		ev.Name = translate.Name{Name: ev.Name.Namespace}
		o := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ev.Name.Name}}
		if w.often() {
			o.Annotations = map[string]string{"networking.istio.io/traffic-distribution": pick(w, "PreferClose", "PreferSameNode")}
		}
		w.bind(&o.ObjectMeta)
		set(&ev, w.objects.Namespaces, ev.Name.Name, o, gone)
	case index.Node:
		ev.Name = translate.Name{Name: pick(w, "n1", "n2")}
		o := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: ev.Name.Name, Labels: map[string]string{
			"topology.kubernetes.io/zone": pick(w, "z1", "z2")}}}
		set(&ev, w.objects.Nodes, ev.Name.Name, o, gone)
	case index.Pod:
		set(&ev, w.objects.Pods, ev.Name, w.pod(meta), gone)
	case index.Service:
		set(&ev, w.objects.Services, ev.Name, w.service(meta), gone)
	case index.EndpointSlice:
		set(&ev, w.objects.EndpointSlices, ev.Name, w.slice(meta), gone)
	case index.AuthorizationPolicy:
		set(&ev, w.objects.AuthorizationPolicies, ev.Name, w.policy(meta), gone)
	case index.PeerAuthentication:
		set(&ev, w.objects.PeerAuthentications, ev.Name, w.authn(meta), gone)
	case index.ServiceEntry:
		set(&ev, w.objects.ServiceEntries, ev.Name, w.serviceEntry(meta), gone)
	case index.WorkloadEntry:
		set(&ev, w.objects.WorkloadEntries, ev.Name, w.workloadEntry(meta), gone)
	case index.DestinationRule:
		set(&ev, w.objects.DestinationRules, ev.Name, w.destinationRule(meta), gone)
	case index.BackendTLSPolicy:
		set(&ev, w.objects.BackendTLSPolicies, ev.Name, w.tlsPolicy(meta), gone)
	case index.XBackendTrafficPolicy:
		set(&ev, w.objects.BackendTrafficPolicies, ev.Name, w.backendPolicy(meta), gone)
	case index.VirtualService:
		set(&ev, w.objects.VirtualServices, ev.Name, w.virtualService(meta), gone)
	case index.HTTPRoute:
		set(&ev, w.objects.HTTPRoutes, ev.Name, w.httpRoute(meta), gone)
	case index.GRPCRoute:
		set(&ev, w.objects.GRPCRoutes, ev.Name, w.grpcRoute(meta), gone)
	case index.TCPRoute:
		set(&ev, w.objects.TCPRoutes, ev.Name, w.tcpRoute(meta), gone)
	case index.TLSRoute:
		set(&ev, w.objects.TLSRoutes, ev.Name, w.tlsRoute(meta), gone)
	case index.ReferenceGrant:
		set(&ev, w.objects.ReferenceGrants, ev.Name, w.grant(meta), gone)
	case index.Gateway:
		set(&ev, w.objects.Gateways, ev.Name, w.gateway(meta), gone)
	case index.GatewayClass:
		ev.Name = translate.Name{Name: pick(w, "istio-waypoint", "other")}
		set(&ev, w.objects.GatewayClasses, ev.Name.Name, w.gatewayClass(ev.Name.Name), gone)
	case index.ConfigMap:
		text := pick(w, someCA, "garbage", "")
		set(&ev, w.objects.ConfigMaps, ev.Name, &corev1.ConfigMap{ObjectMeta: meta, Data: map[string]string{"ca.crt": text}}, gone)
	case index.MeshConfig:
		ev.Name = translate.Name{Namespace: "istio-system", Name: "istio"}
		w.objects.MeshConfig = nil
		if !gone {
			w.objects.MeshConfig = w.meshConfig(ev.Name)
			ev.Object = w.objects.MeshConfig
		}
	case index.Secret:
		ev.Name.Name += pick(w, "", "", "-cacert")
		o := translate.TrimSecret(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: ev.Name.Namespace, Name: ev.Name.Name}, StringData: map[string]string{
			"ca.crt": pick(w, someCA, "garbage", ""), "tls.crt": pick(w, someCert, someCert, someCA), "tls.key": pick(w, someKey, someKey, "garbage")}})
		set(&ev, w.objects.Secrets, ev.Name, o, gone)
	default:
	}
	return ev
}

// set records the object, or that it is gone, in the event and in the plain world.
func set[K comparable, T any, P interface {
	*T
	runtime.Object
}](ev *index.Event, m map[K]P, k K, o P, gone bool) {
	if gone {
		delete(m, k)
		return
	}
	ev.Object, m[k] = o, o
}

func (w *world) pod(meta metav1.ObjectMeta) *corev1.Pod {
	if w.often() {
		metav1.SetMetaDataAnnotation(&meta, mesh.AnnotationRedirection, pick(w, "enabled", "pending"))
	}
	o := &corev1.Pod{ObjectMeta: meta}
	o.Spec.NodeName = pick(w, "n1", "n2", "")
	o.Spec.ServiceAccountName = pick(w, "", "web")
	o.Spec.HostNetwork = w.IntN(8) == 0
	o.Spec.Containers = []corev1.Container{{Name: "c", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: int32(pick(w, 80, 8080))}}}}
	o.Status.Phase = pick(w, corev1.PodRunning, corev1.PodRunning, corev1.PodPending, corev1.PodFailed)
	if w.often() {
		o.Status.PodIP = pick(w, "10.0.0.1", "10.0.0.2", "10.0.0.2", "garbage")
	}
	o.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: pick(w, corev1.ConditionTrue, corev1.ConditionFalse)}}
	return o
}

func (w *world) service(meta metav1.ObjectMeta) *corev1.Service {
	o := &corev1.Service{ObjectMeta: meta}
	o.Spec.Selector = w.labels()
	o.Spec.ClusterIP = pick(w, "10.96.0.1", "None", "garbage", "fd00::1")
	o.Spec.Type = pick(w, corev1.ServiceTypeClusterIP, corev1.ServiceTypeClusterIP, corev1.ServiceTypeExternalName)
	o.Spec.Ports = []corev1.ServicePort{{Name: "p", Port: 80, TargetPort: pick(w, intstr.FromInt32(8080), intstr.FromString("http"), intstr.IntOrString{})}}
	return o
}

func (w *world) slice(meta metav1.ObjectMeta) *discoveryv1.EndpointSlice {
	o := &discoveryv1.EndpointSlice{ObjectMeta: meta}
	if w.often() {
		o.Labels = map[string]string{"kubernetes.io/service-name": "x" + strconv.Itoa(w.IntN(5))}
	}
	for range w.IntN(3) {
		ep := discoveryv1.Endpoint{Addresses: []string{pick(w, "192.168.0.1", "192.168.0.2", "garbage")}}
		if w.often() {
			ep.TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: "x" + strconv.Itoa(w.IntN(5))}
		}
		o.Endpoints = append(o.Endpoints, ep)
	}
	return o
}

func (w *world) meshConfig(n translate.Name) *translate.MeshConfig {
	var text strings.Builder
	for _, line := range []string{
		pick(w, "", "defaultVirtualServiceExportTo: ['.']", "defaultVirtualServiceExportTo: [one]"),
		pick(w, "", "defaultDestinationRuleExportTo: ['.']", "defaultDestinationRuleExportTo: [two, one]"),
		pick(w, "", "defaultHttpRetryPolicy: {attempts: 3, perTryTimeout: 2s}"),
		pick(w, "", "mistnet: {waypointUnavailable: deny}", "mistnet: {waypointUnavailable: allow}"),
		pick(w, "", "enableTracing: true"), pick(w, "", "trustDomain: elsewhere"),
	} {
		text.WriteString(line + "\n")
	}
	m, err := translate.ReadMeshConfig(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: n.Namespace, Name: n.Name},
		Data: map[string]string{"mesh": text.String()}})
	if err != nil {
		panic(err)
	}
	return m
}

func (w *world) selector() *typeapi.WorkloadSelector {
	if w.IntN(3) == 0 {
		return nil
	}
	return &typeapi.WorkloadSelector{MatchLabels: w.labels()}
}

func (w *world) policy(meta metav1.ObjectMeta) *securityv1.AuthorizationPolicy {
	o := &securityv1.AuthorizationPolicy{ObjectMeta: meta}
	o.Spec.Selector = w.selector()
	o.Spec.Action = securityapi.AuthorizationPolicy_Action(w.IntN(4))
	if w.IntN(3) == 0 {
		o.Spec.TargetRefs = w.targets()
	}
	for range w.IntN(3) {
		o.Spec.Rules = append(o.Spec.Rules, &securityapi.Rule{To: []*securityapi.Rule_To{{Operation: &securityapi.Operation{
			Ports: []string{pick(w, "80", "81", "nonsense")}, Methods: pick(w, nil, nil, []string{"GET"})}}}})
	}
	return o
}

func (w *world) authn(meta metav1.ObjectMeta) *securityv1.PeerAuthentication {
	o := &securityv1.PeerAuthentication{ObjectMeta: meta}
	o.CreationTimestamp = metav1.NewTime(time.Unix(int64(w.IntN(3)), 0))
	o.Spec.Selector = w.selector()
	mode := func() *securityapi.PeerAuthentication_MutualTLS {
		return &securityapi.PeerAuthentication_MutualTLS{Mode: securityapi.PeerAuthentication_MutualTLS_Mode(w.IntN(4))}
	}
	if w.often() {
		o.Spec.Mtls = mode()
	}
	if w.often() {
		o.Spec.PortLevelMtls = map[uint32]*securityapi.PeerAuthentication_MutualTLS{80: mode(), pick[uint32](w, 81, 99999): mode()}
	}
	return o
}

func (w *world) serviceEntry(meta metav1.ObjectMeta) *translate.ServiceEntry {
	meta.CreationTimestamp = metav1.Unix(int64(w.IntN(3)), 0)
	o := &translate.ServiceEntry{ObjectMeta: meta}
	for range w.IntN(3) {
		o.Spec.Hosts = append(o.Spec.Hosts, pick(w, "a.example", "b.example", "*.example", "x1."+meta.Namespace+".svc.cluster.local"))
	}
	o.Spec.Resolution = pick(w, networkingapi.ServiceEntry_NONE, networkingapi.ServiceEntry_STATIC, networkingapi.ServiceEntry_STATIC,
		networkingapi.ServiceEntry_DNS, networkingapi.ServiceEntry_DYNAMIC_DNS)
	o.Spec.Addresses = pick(w, nil, []string{"240.0.0.1"}, []string{"10.1.0.0/16", "garbage"})
	o.Spec.Ports = []*networkingapi.ServicePort{{Number: 80, Name: "http", Protocol: pick(w, "HTTP", "UDP"), TargetPort: pick[uint32](w, 0, 8080)}}
	if w.often() {
		o.Spec.WorkloadSelector = &networkingapi.WorkloadSelector{Labels: w.labels()}
	}
	for range w.IntN(3) {
		o.Spec.Endpoints = append(o.Spec.Endpoints, w.endpoint())
	}
	return o
}

func (w *world) endpoint() *networkingapi.WorkloadEntry {
	return &networkingapi.WorkloadEntry{Address: pick(w, "192.0.2.1", "192.0.2.2", "vm.example", "unix:///x", ""), Weight: pick[uint32](w, 0, 2),
		Ports: pick(w, nil, map[string]uint32{"http": 8081})}
}

func (w *world) workloadEntry(meta metav1.ObjectMeta) *networkingv1.WorkloadEntry {
	o := &networkingv1.WorkloadEntry{ObjectMeta: meta}
	e := w.endpoint()
	o.Spec.Address, o.Spec.Weight, o.Spec.Ports, o.Spec.Labels = e.Address, e.Weight, e.Ports, w.labels()
	return o
}

func TestApplyEqualsADifferenceOfAll(t *testing.T) {
	steps := 80
	if testing.Short() {
		steps = 30
	}
	for seed := range uint64(20) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			w, cfg := newWorld(seed), translate.Config{NoStatus: seed%3 == 0, DenyWithoutWaypoint: seed%2 == 0}.WithDefaults()
			x := index.New(cfg)
			before := translate.All(cfg, w.objects)
			for range steps {
				var events []index.Event
				for range 1 + w.IntN(3) {
					events = append(events, w.event())
				}
				got := x.Apply(events...)
				after := translate.All(cfg, w.objects)
				if diff := cmp.Diff(difference(before, after), got, same); diff != "" {
					t.Fatalf("Apply(%v) (-difference of All, +Apply):\n%s", events, diff)
				}
				if diff := cmp.Diff(after, x.Nouns(), same); diff != "" {
					t.Fatalf("nouns (-All, +index):\n%s", diff)
				}
				checkRuns(t, x, w.objects)
				before = after
			}
		})
	}
}

// same compares netip's values, which cmp must not look into.
var same = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

func checkRuns(t *testing.T, x *index.Index, o translate.Objects) {
	t.Helper()
	for _, node := range []string{"n1", "n2", ""} {
		for _, ns := range []string{"one", "two", "istio-system"} {
			for _, sa := range []string{"default", "web"} {
				want := false
				for _, p := range o.Pods {
					want = want || p.Spec.NodeName == node && p.Namespace == ns && translate.ServiceAccount(p) == sa && p.Status.Phase != corev1.PodFailed
				}
				if got := x.Runs(node, ns, sa); got != want {
					t.Fatalf("Runs(%q, %q, %q) = %v, want %v", node, ns, sa, got, want)
				}
			}
		}
	}
}

// difference is what changed, found by looking at everything.
func difference(before, after translate.Nouns) []index.Change {
	var all []index.Change
	all = append(all, diff(index.NounPolicy, before.Policies, after.Policies, func(v *mesh.Policy) index.Change { return index.Change{Policy: v} })...)
	all = append(all, diff(index.NounCredential, before.Credentials, after.Credentials,
		func(v *translate.Credential) index.Change { return index.Change{Credential: v} })...)
	all = append(all, diff(index.NounTraffic, before.Traffic, after.Traffic, func(v *mesh.TrafficPolicy) index.Change { return index.Change{Traffic: v} })...)
	all = append(all, diff(index.NounRoute, before.Routes, after.Routes, func(v *mesh.Route) index.Change { return index.Change{Route: v} })...)
	all = append(all, diff(index.NounService, before.Services, after.Services, func(v *mesh.Service) index.Change { return index.Change{Service: v} })...)
	all = append(all, diff(index.NounWorkload, before.Workloads, after.Workloads, func(v *mesh.Workload) index.Change { return index.Change{Workload: v} })...)
	all = append(all, diff(index.NounStatus, before.Statuses, after.Statuses, func(v *translate.Status) index.Change { return index.Change{Status: v} })...)
	all = append(all, diff(index.NounRouteStatus, before.RouteStatuses, after.RouteStatuses, func(v *translate.RouteStatus) index.Change { return index.Change{RouteStatus: v} })...)
	all = append(all, diff(index.NounConditions, before.Conditions, after.Conditions,
		func(v *translate.Conditions) index.Change { return index.Change{Conditions: v} })...)
	return all
}

func diff[V any](kind index.NounKind, before, after map[string]*V, change func(*V) index.Change) []index.Change {
	keys := slices.Collect(maps.Keys(after))
	for k := range before {
		if _, stays := after[k]; !stays {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	var changes []index.Change
	for _, k := range keys {
		if cmp.Equal(before[k], after[k], same) {
			continue
		}
		c := change(after[k])
		c.Key = index.Key{Kind: kind, Name: k}
		changes = append(changes, c)
	}
	return changes
}

func BenchmarkPodEvent(b *testing.B) {
	for _, pods := range []int{1_000, 100_000} {
		b.Run(strconv.Itoa(pods), func(b *testing.B) {
			x, w := index.New(translate.Config{}), newWorld(1)
			var one *corev1.Pod
			for i := range pods {
				p := w.pod(metav1.ObjectMeta{Namespace: "ns" + strconv.Itoa(i%100), Name: "p" + strconv.Itoa(i),
					Labels: map[string]string{"app": strconv.Itoa(i % 1000), "common": "x"}})
				p.Status.Phase, p.Status.PodIP = corev1.PodRunning, "10.0.0.1"
				x.Apply(index.Event{Kind: index.Pod, Name: translate.Name{Namespace: p.Namespace, Name: p.Name}, Object: p})
				one = p
			}
			for i := range 1000 {
				s := w.service(metav1.ObjectMeta{Namespace: "ns" + strconv.Itoa(i%100), Name: "s" + strconv.Itoa(i)})
				s.Spec.Selector = map[string]string{"app": strconv.Itoa(i)}
				x.Apply(index.Event{Kind: index.Service, Name: translate.Name{Namespace: s.Namespace, Name: s.Name}, Object: s})
			}
			for i := 0; b.Loop(); i++ {
				p := one.DeepCopy()
				p.Status.PodIP = "10.0.0." + strconv.Itoa(2+i%2)
				p.Status.PodIPs = nil
				if got := x.Apply(index.Event{Kind: index.Pod, Name: translate.Name{Namespace: p.Namespace, Name: p.Name}, Object: p}); len(got) != 1 {
					b.Fatalf("changes = %v, want one", got)
				}
			}
		})
	}
}
