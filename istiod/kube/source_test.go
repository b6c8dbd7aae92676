package kube_test

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/kube"
	"github.com/mistnet/mistnet/istiod/translate"
)

const patience = 20 * time.Second

var (
	policies = schema.GroupVersionResource{Group: "security.istio.io", Version: "v1", Resource: "authorizationpolicies"}
	entries  = schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "serviceentries"}
	machines = schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "workloadentries"}
	gateways = schema.GroupVersionResource{Group: "gateway.networking.k8s.io", Version: "v1", Resource: "gateways"}
	classes  = schema.GroupVersionResource{Group: "gateway.networking.k8s.io", Version: "v1", Resource: "gatewayclasses"}
	peers    = schema.GroupVersionResource{Group: "security.istio.io", Version: "v1", Resource: "peerauthentications"}
)

// cluster is a pretended API server and what an index makes of it.
type cluster struct {
	t       *testing.T
	kube    *fake.Clientset
	dynamic *dynamicfake.FakeDynamicClient
	source  *kube.Source
	index   *index.Index
	batches chan []index.Event
	tells   bool // whether the source hears what became of its objects, as in istiod
}

func (c *cluster) apply(events []index.Event) {
	if changes := c.index.Apply(events...); c.tells {
		c.source.Tell(changes)
	}
}

func newCluster(t *testing.T, objects ...runtime.Object) *cluster {
	t.Helper()
	var core, other []runtime.Object
	var made []*unstructured.Unstructured // the fake guesses a wrong plural
	for _, o := range objects {
		if u, ok := o.(*unstructured.Unstructured); ok && u.GetKind() == "Gateway" {
			made = append(made, u)
		} else if ok {
			other = append(other, o)
		} else {
			core = append(core, o)
		}
	}
	kinds := make(map[schema.GroupVersionResource]string)
	for r, kind := range kube.Custom() {
		kinds[r] = kind.String() + "List"
	}
	for _, r := range kube.Unread() {
		kinds[r] = "ThingList"
	}
	for resource, list := range map[schema.GroupVersionResource]string{
		{Version: "v1", Resource: "serviceaccounts"}: "ServiceAccountList", {Version: "v1", Resource: "services"}: "ServiceList",
		{Group: "apps", Version: "v1", Resource: "deployments"}:                     "DeploymentList",
		{Group: "autoscaling", Version: "v2", Resource: "horizontalpodautoscalers"}: "HorizontalPodAutoscalerList",
		{Group: "policy", Version: "v1", Resource: "poddisruptionbudgets"}:          "PodDisruptionBudgetList",
	} {
		kinds[resource] = list
	}
	c := &cluster{
		t: t, kube: fake.NewClientset(core...), index: index.New(translate.Config{}), batches: make(chan []index.Event, 100),
		dynamic: dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), kinds, other...),
	}
	for _, u := range made {
		if err := c.dynamic.Tracker().Create(gateways, u, u.GetNamespace()); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// start runs the source, which stops with the test.
func (c *cluster) start() {
	c.t.Helper()
	c.startWith(kube.Config{Clients: kube.Clients{Kube: c.kube, Dynamic: c.dynamic}, Identity: "replica-1"})
}

func (c *cluster) startWith(cfg kube.Config) {
	c.t.Helper()
	c.source = kube.New(cfg)
	ctx, cancel := context.WithCancel(c.t.Context())
	done := make(chan error, 1)
	go func() { done <- c.source.Run(ctx, func(events []index.Event) { c.batches <- events }) }()
	c.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			c.t.Errorf("Run = %v, want nil", err)
		}
	})
	c.next()
}

// next applies the next events.
func (c *cluster) next() {
	c.t.Helper()
	select {
	case events := <-c.batches:
		c.apply(events)
	case <-time.After(patience):
		c.t.Fatalf("no events; feeds: %+v", c.source.Feeds())
	}
}

// until applies events until the condition holds.
func (c *cluster) until(what string, holds func(translate.Nouns) bool) {
	c.t.Helper()
	for !holds(c.index.Nouns()) {
		select {
		case events := <-c.batches:
			c.apply(events)
		case <-time.After(patience):
			c.t.Fatalf("never: %s; there is %s", what, c.names())
		}
	}
}

// names lists the nouns there are.
func (c *cluster) names() string {
	n := c.index.Nouns()
	return strings.Join(slices.Sorted(slices.Values(slices.Concat(
		slices.Collect(maps.Keys(n.Workloads)), slices.Collect(maps.Keys(n.Services)), slices.Collect(maps.Keys(n.Policies))))), " ")
}

func namespace(name string, labels map[string]string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
}

func pod(namespace, name, ip string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: "uid-" + "1", Labels: map[string]string{"app": name},
			Annotations:   map[string]string{"ambient.istio.io/redirection": "enabled", "some": "thing"},
			ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubelet"}}},
		Spec: corev1.PodSpec{NodeName: "n1", ServiceAccountName: "sa", Containers: []corev1.Container{{Name: "app", Image: "app:1"}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}},
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
	}
}

func service(namespace, name, ip string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.ServiceSpec{ClusterIP: ip, ClusterIPs: []string{ip}, Selector: map[string]string{"app": name},
			Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
	}
}

func object(kind, namespace, name string, spec map[string]any) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "security.istio.io/v1", "kind": kind,
		"metadata": map[string]any{"namespace": namespace, "name": name, "generation": int64(3)}, "spec": spec,
	}}
}

func allow(namespace, name, from string) *unstructured.Unstructured {
	return object("AuthorizationPolicy", namespace, name, map[string]any{
		"selector": map[string]any{"matchLabels": map[string]any{"app": "web"}},
		"rules":    []any{map[string]any{"from": []any{map[string]any{"source": map[string]any{"namespaces": []any{from}}}}}},
	})
}

func TestObjectsBecomeNouns(t *testing.T) {
	t.Parallel()
	c := newCluster(t, namespace("shop", nil), pod("shop", "web", "10.0.0.1"), service("shop", "web", "10.96.0.1"), allow("shop", "guard", "shop"),
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{corev1.LabelTopologyZone: "z1"}}})
	c.start()
	if got, want := c.names(), "Kubernetes//Pod/shop/web shop/guard shop/web.shop.svc.cluster.local"; got != want {
		t.Fatalf("after the first read there is %q, want %q", got, want)
	}
	web := c.index.Nouns().Workloads["Kubernetes//Pod/shop/web"]
	if web.Locality.Zone != "z1" || !web.Healthy || web.Protocol.String() != "HBONE" || web.ServiceAccount != "sa" {
		t.Errorf("workload = %+v, want zone z1, healthy, HBONE, account sa", web)
	}
	if diff := cmp.Diff([]string{"shop/guard"}, web.Policies); diff != "" {
		t.Errorf("policies of web (-want +got):\n%s", diff)
	}
	if !c.index.Runs("n1", "shop", "sa") || c.index.Runs("n2", "shop", "sa") {
		t.Error("Runs does not tell where the account runs")
	}

	ctx := t.Context()
	if _, err := c.kube.CoreV1().Pods("shop").Create(ctx, pod("shop", "db", "10.0.0.2"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("db comes", func(n translate.Nouns) bool { return n.Workloads["Kubernetes//Pod/shop/db"] != nil })
	if err := c.kube.CoreV1().Pods("shop").Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("web goes", func(n translate.Nouns) bool { return n.Workloads["Kubernetes//Pod/shop/web"] == nil })
	if err := c.dynamic.Resource(policies).Namespace("shop").Delete(ctx, "guard", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("guard goes", func(n translate.Nouns) bool { return n.Policies["shop/guard"] == nil })
}

// TestObjectsAreTrimmed: what the mesh does not look at is not kept, and a cluster has much of it.
func TestObjectsAreTrimmed(t *testing.T) {
	t.Parallel()
	ns, svc := namespace("shop", map[string]string{"a": "b"}), service("shop", "web", "10.96.0.1")
	web := pod("shop", "web", "10.0.0.1")
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Status: corev1.NodeStatus{Images: make([]corev1.ContainerImage, 3)}}
	for _, m := range []*metav1.ObjectMeta{&ns.ObjectMeta, &svc.ObjectMeta, &node.ObjectMeta} {
		m.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "kubectl"}}
		m.Annotations = map[string]string{"big": "thing", "networking.istio.io/traffic-distribution": "PreferClose"}
	}
	c := newCluster(t, ns, svc, web, node, allow("shop", "guard", "shop"))
	source := kube.New(kube.Config{Clients: kube.Clients{Kube: c.kube, Dynamic: c.dynamic}})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	seen := 0
	err := source.Run(ctx, func(events []index.Event) {
		defer cancel()
		for _, ev := range events {
			m, err := meta.Accessor(ev.Object)
			if err != nil {
				t.Error(err)
				continue
			}
			seen++
			if m.GetName() == "" || len(m.GetManagedFields()) > 0 || m.GetAnnotations()["big"] != "" || m.GetAnnotations()["some"] != "" {
				t.Errorf("%s %s is not trimmed: %+v", ev.Kind, ev.Name, ev.Object)
			}
			switch o := ev.Object.(type) {
			case *corev1.Pod:
				if len(o.Spec.Containers) > 0 || o.Annotations["ambient.istio.io/redirection"] != "enabled" {
					t.Errorf("pod is not trimmed: %+v", o)
				}
			case *corev1.Node:
				if len(o.Status.Images) > 0 {
					t.Errorf("node is not trimmed: %+v", o)
				}
			case *corev1.Service:
				if o.Annotations["networking.istio.io/traffic-distribution"] != "PreferClose" {
					t.Error("an annotation that counts was trimmed")
				}
			}
		}
	})
	if err != nil || seen != 5 {
		t.Errorf("Run = %v after %d objects, want nil after 5", err, seen)
	}
}

func networking(kind, namespace, name string, spec map[string]any) *unstructured.Unstructured {
	o := object(kind, namespace, name, spec)
	o.SetAPIVersion("networking.istio.io/v1")
	return o
}

// TestEntriesBecomeNouns: ServiceEntries and WorkloadEntries come, change and go. One that says what is not understood is
// told of, and its last good form stays.
func TestEntriesBecomeNouns(t *testing.T) {
	t.Parallel()
	vm := networking("WorkloadEntry", "shop", "vm", map[string]any{"address": "192.168.0.1", "labels": map[string]any{"app": "db"}})
	vm.SetAnnotations(map[string]string{"ambient.istio.io/redirection": "enabled", "big": "thing"})
	vms := networking("ServiceEntry", "shop", "vms", map[string]any{"hosts": []any{"db.example"}, "addresses": []any{"240.0.0.1"},
		"ports": []any{map[string]any{"number": int64(80), "name": "http", "protocol": "HTTP"}}, "resolution": "STATIC",
		"workloadSelector": map[string]any{"labels": map[string]any{"app": "db"}}})
	c := newCluster(t, namespace("shop", nil), vm, vms)
	c.start()
	const uid, key = "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm", "shop/db.example"
	if got, want := c.names(), uid+" "+key; got != want {
		t.Fatalf("after the first read there is %q, want %q", got, want)
	}
	w := c.index.Nouns().Workloads[uid]
	if w.Protocol.String() != "HBONE" || len(w.Services) != 1 || w.Services[0].Service != key {
		t.Errorf("workload = %+v, want HBONE and a place in %s", w, key)
	}
	ctx := t.Context()
	vm.Object["status"] = map[string]any{"conditions": []any{map[string]any{"type": "Healthy", "status": "False"}}}
	if _, err := c.dynamic.Resource(machines).Namespace("shop").Update(ctx, vm, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("the machine is ill", func(n translate.Nouns) bool { return !n.Workloads[uid].Healthy })

	strange := vms.DeepCopy()
	strange.Object["spec"].(map[string]any)["nobodyKnows"] = true
	if _, err := c.dynamic.Resource(entries).Namespace("shop").Update(ctx, strange, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	deadline := time.After(patience)
	for len(c.source.Problems()) == 0 {
		select {
		case <-deadline:
			t.Fatal("nobody tells that the entry is not understood")
		case <-time.After(10 * time.Millisecond):
		}
	}
	if p := c.source.Problems()[0]; p.Resource != "serviceentries" || p.Name.Name != "vms" || !strings.Contains(p.Reason, "nobodyKnows") {
		t.Errorf("problem = %+v, want that of the entry and its field", p)
	}
	if c.index.Nouns().Services[key] == nil {
		t.Error("its last good form is gone")
	}
	if err := c.dynamic.Resource(entries).Namespace("shop").Delete(ctx, "vms", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("the service goes", func(n translate.Nouns) bool { return n.Services[key] == nil && len(n.Workloads[uid].Services) == 0 })
	if p := c.source.Problems(); len(p) != 0 {
		t.Errorf("problems = %+v, want none once it is gone", p)
	}
}

// TestWhatIsNotHonouredIsTold: objects of other kinds have no effect, and who asks learns of it.
func TestWhatIsNotHonouredIsTold(t *testing.T) {
	t.Parallel()
	c := newCluster(t, namespace("shop", nil), networking("Sidecar", "shop", "less", map[string]any{}),
		object("RequestAuthentication", "shop", "token", map[string]any{}))
	c.start()
	told := func(want ...string) {
		t.Helper()
		var got []string
		deadline := time.After(patience)
		for {
			got = nil
			for _, p := range c.source.Problems() {
				if !p.InForce {
					t.Errorf("%s is said to be refused", p.Name)
				}
				got = append(got, p.Resource+" "+p.Name.String())
			}
			if slices.Equal(got, want) {
				return
			}
			select {
			case <-deadline:
				t.Fatalf("problems = %q, want %q", got, want)
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	told("requestauthentications.security.istio.io shop/token", "sidecars.networking.istio.io shop/less")
	sidecars := entries.GroupVersion().WithResource("sidecars")
	c.eventually("sidecars are watched", func(context.Context) bool { // what goes between list and watch, the pretended server forgets
		return slices.ContainsFunc(c.dynamic.Actions(), func(a clienttesting.Action) bool { return a.Matches("watch", sidecars.Resource) })
	})
	if err := c.dynamic.Resource(sidecars).Namespace("shop").Delete(t.Context(), "less", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	told("requestauthentications.security.istio.io shop/token")
}

func gatewayAPI(kind, namespace, name string, spec map[string]any) *unstructured.Unstructured {
	o := object(kind, namespace, name, spec)
	o.SetAPIVersion("gateway.networking.k8s.io/v1")
	return o
}

// TestKindsOfRoutesAreRead: of every kind of L7 configuration objects come, trimmed, and routes of gateways do not.
func TestKindsOfRoutesAreRead(t *testing.T) {
	t.Parallel()
	parent := func(kind string) map[string]any {
		return map[string]any{"parentRefs": []any{map[string]any{"group": "", "kind": kind, "name": "web"}}, "rules": []any{map[string]any{}}}
	}
	policy := gatewayAPI("XBackendTrafficPolicy", "shop", "budget", map[string]any{"targetRefs": []any{}})
	policy.SetAPIVersion("gateway.networking.x-k8s.io/v1alpha1")
	route := gatewayAPI("HTTPRoute", "shop", "ours", parent("Service"))
	route.SetAnnotations(map[string]string{"kubectl.kubernetes.io/last-applied-configuration": "big", "some": "thing"})
	class := gatewayAPI("GatewayClass", "", "istio-waypoint", map[string]any{"controllerName": "istio.io/mesh-controller"})
	rule := networking("DestinationRule", "shop", "rule", map[string]any{"host": "web"})
	rule.SetAnnotations(map[string]string{"kubectl.kubernetes.io/last-applied-configuration": "big", translate.AnnotationHealthCheck: "{path: /}"})
	objects := []runtime.Object{
		route, gatewayAPI("HTTPRoute", "shop", "theirs", parent("Gateway")), gatewayAPI("GRPCRoute", "shop", "ours", parent("ServiceEntry")),
		gatewayAPI("TCPRoute", "shop", "ours", parent("Service")), gatewayAPI("TLSRoute", "shop", "ours", parent("Service")),
		gatewayAPI("TLSRoute", "shop", "theirs", parent("Gateway")), class,
		gatewayAPI("ReferenceGrant", "shop", "all", map[string]any{"from": []any{}, "to": []any{}}),
		gatewayAPI("BackendTLSPolicy", "shop", "tls", map[string]any{"validation": map[string]any{"hostname": "x"}}), policy,
		networking("VirtualService", "shop", "split", map[string]any{"hosts": []any{"web"}}),
		rule,
	}
	c := newCluster(t, objects...)
	gateway := gatewayAPI("Gateway", "shop", "waypoint", map[string]any{"gatewayClassName": "istio-waypoint", "listeners": []any{}})
	gateways := schema.GroupVersionResource{Group: "gateway.networking.k8s.io", Version: "v1", Resource: "gateways"} // a plural the client cannot guess
	if _, err := c.dynamic.Resource(gateways).Namespace("shop").Create(t.Context(), gateway, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	source := kube.New(kube.Config{Clients: kube.Clients{Kube: c.kube, Dynamic: c.dynamic}})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []string
	if err := source.Run(ctx, func(events []index.Event) {
		defer cancel()
		for _, ev := range events {
			if ev.Object == nil {
				continue
			}
			got = append(got, ev.Kind.String()+" "+ev.Name.String())
			m, err := meta.Accessor(ev.Object)
			if err != nil || m.GetName() != ev.Name.Name || m.GetGeneration() != 3 || m.GetAnnotations()["kubectl.kubernetes.io/last-applied-configuration"] != "" {
				t.Errorf("%v: %v: %+v", err, ev.Name, ev.Object)
			}
			if ev.Kind == index.DestinationRule && m.GetAnnotations()[translate.AnnotationHealthCheck] != "{path: /}" {
				t.Errorf("annotations of a DestinationRule are %v, want its health check", m.GetAnnotations())
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	want := []string{"BackendTLSPolicy shop/tls", "DestinationRule shop/rule", "GRPCRoute shop/ours", "Gateway shop/waypoint",
		"GatewayClass /istio-waypoint", "HTTPRoute shop/ours", "ReferenceGrant shop/all", "TCPRoute shop/ours", "TLSRoute shop/ours",
		"VirtualService shop/split", "XBackendTrafficPolicy shop/budget"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}
