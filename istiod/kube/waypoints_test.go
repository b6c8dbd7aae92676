package kube_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation/field"
	clienttesting "k8s.io/client-go/testing"

	"github.com/mistnet/mistnet/istiod/gateway"
	"github.com/mistnet/mistnet/istiod/kube"
)

var (
	deployments = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}
	services    = schema.GroupVersionResource{Version: "v1", Resource: "services"}
	accounts    = schema.GroupVersionResource{Version: "v1", Resource: "serviceaccounts"}
	autoscalers = schema.GroupVersionResource{Group: "autoscaling", Version: "v2", Resource: "horizontalpodautoscalers"}
)

// appliers has the pretended API server store what is applied, and counts: "deployments shop/waypoint" and the like, of
// status "gateways/status …". It merges nothing: what is applied replaces the object, or its status.
func (c *cluster) appliers() func() map[string]int {
	var mu sync.Mutex
	n := make(map[string]int)
	c.dynamic.PrependReactor("patch", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		p := a.(clienttesting.PatchActionImpl)
		r := p.GetResource()
		if r.Group == "security.istio.io" {
			return false, nil, nil
		}
		manager := map[bool]string{true: "mistnet-istiod", false: "istio.io/gateway-controller"}[p.Subresource == "status"]
		if o := p.PatchOptions; p.PatchType != types.ApplyPatchType || o.Force == nil || !*o.Force || o.FieldManager != manager {
			c.t.Errorf("patch of %s %s: %s %+v", r.Resource, p.Name, p.PatchType, o)
		}
		mu.Lock()
		defer mu.Unlock()
		what := r.Resource
		if p.Subresource != "" {
			what += "/" + p.Subresource
		}
		n[strings.TrimSuffix(what+" "+p.Namespace+"/"+p.Name, "/")]++
		u := &unstructured.Unstructured{}
		if err := json.Unmarshal(p.Patch, &u.Object); err != nil {
			return true, nil, err
		}
		old, err := c.dynamic.Tracker().Get(r, p.Namespace, p.Name)
		if apierrors.IsNotFound(err) {
			if p.Subresource != "" {
				return true, nil, err
			}
			if r == services {
				_ = unstructured.SetNestedStringSlice(u.Object, []string{"10.96.0.9"}, "spec", "clusterIPs")
			}
			u.SetUID(types.UID("uid of " + p.Name))
			return true, u, c.dynamic.Tracker().Create(r, u, p.Namespace)
		}
		have := old.(*unstructured.Unstructured).DeepCopy()
		if p.Subresource == "status" {
			have.Object["status"] = u.Object["status"]
		} else {
			if status, ok := have.Object["status"]; ok {
				u.Object["status"] = status
			}
			u.SetUID(have.GetUID())
			if r == services {
				_ = unstructured.SetNestedStringSlice(u.Object, []string{"10.96.0.9"}, "spec", "clusterIPs")
			}
			have = u
		}
		return true, have, c.dynamic.Tracker().Update(r, have, p.Namespace)
	})
	return func() map[string]int {
		mu.Lock()
		defer mu.Unlock()
		return maps.Clone(n)
	}
}

func waypointGateway(namespace, name string, change func(spec map[string]any)) *unstructured.Unstructured {
	spec := map[string]any{"gatewayClassName": "istio-waypoint",
		"listeners": []any{map[string]any{"name": "mesh", "port": int64(15008), "protocol": "HBONE"}}}
	if change != nil {
		change(spec)
	}
	return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
		"metadata": map[string]any{"namespace": namespace, "name": name, "uid": "uid of " + namespace + "/" + name, "generation": int64(1)}, "spec": spec}}
}

// startWaypoints runs the source as a leader that knows an image.
func (c *cluster) startWaypoints(cfg gateway.Config) {
	c.t.Helper()
	c.startWith(kube.Config{Clients: kube.Clients{Kube: c.kube, Dynamic: c.dynamic}, Identity: "replica-1", Waypoints: cfg})
}

func (c *cluster) get(r schema.GroupVersionResource, namespace, name string) *unstructured.Unstructured {
	u, err := c.dynamic.Resource(r).Namespace(namespace).Get(c.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		return nil
	}
	return u
}

// condition is "STATUS REASON" of a Gateway's condition.
func (c *cluster) condition(namespace, name, which string) string {
	if u := c.get(gateways, namespace, name); u != nil {
		return conditionIn(u, which)
	}
	return "gone"
}

func conditionIn(u *unstructured.Unstructured, which string) string {
	all, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
	for _, v := range all {
		if k := v.(map[string]any); k["type"] == which {
			return fmt.Sprint(k["status"], " ", k["reason"])
		}
	}
	return ""
}

func (c *cluster) untilCondition(namespace, name, which, want string) {
	c.t.Helper()
	got := ""
	c.eventually(fmt.Sprintf("%s of %s is %s", which, name, want), func(context.Context) bool {
		if now := c.condition(namespace, name, which); now != got {
			got = now
			c.t.Logf("%s of %s: %s", which, name, now)
		}
		return got == want
	})
}

// available plays the Deployment's controller and its pods.
func (c *cluster) available(namespace, name string, n int64) {
	c.t.Helper()
	c.eventually("there is a Deployment", func(context.Context) bool { return c.get(deployments, namespace, name) != nil })
	d := c.get(deployments, namespace, name)
	_ = unstructured.SetNestedField(d.Object, n, "status", "availableReplicas")
	if _, err := c.dynamic.Resource(deployments).Namespace(namespace).Update(c.t.Context(), d, metav1.UpdateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

// TestAGatewayBecomesAWaypoint also mends what somebody spoils, writes nothing that need not be written, and leaves alone
// what is not ours.
func TestAGatewayBecomesAWaypoint(t *testing.T) {
	t.Parallel()
	other := waypointGateway("shop", "ingress", func(spec map[string]any) { spec["gatewayClassName"] = "istio" })
	c := newCluster(t, namespace("shop", nil), waypointGateway("shop", "waypoint", nil), other)
	written := c.appliers()
	c.startWaypoints(gateway.Config{Image: "waypoint:1"})

	c.untilCondition("shop", "waypoint", "Programmed", "False AddressNotAssigned")
	c.available("shop", "waypoint", 1)
	c.untilCondition("shop", "waypoint", "Programmed", "True Programmed")
	addresses, _, _ := unstructured.NestedSlice(c.get(gateways, "shop", "waypoint").Object, "status", "addresses")
	want := []any{map[string]any{"type": "IPAddress", "value": "10.96.0.9"}, map[string]any{"type": "Hostname", "value": "waypoint.shop.svc.cluster.local"}}
	if diff := cmp.Diff(want, addresses); diff != "" {
		t.Errorf("addresses (-want +got):\n%s", diff)
	}
	for name, controller := range map[string]string{"istio-waypoint": "istio.io/mesh-controller", "mistnet-waypoint": "mistnet.io/mesh-controller"} {
		c.eventually(name+" is accepted", func(context.Context) bool {
			u := c.get(classes, "", name)
			if u == nil {
				return false
			}
			got, _, _ := unstructured.NestedString(u.Object, "spec", "controllerName")
			list, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
			features, _, _ := unstructured.NestedSlice(u.Object, "status", "supportedFeatures")
			return got == controller && len(list) == 1 && list[0].(map[string]any)["status"] == "True" && len(features) > 10
		})
	}
	if n := written(); n["deployments shop/waypoint"] != 1 || n["services shop/waypoint"] != 1 || n["serviceaccounts shop/waypoint"] != 1 || n["gateways/status shop/ingress"] != 0 {
		t.Errorf("writes = %v, want each object once", n)
	}

	d := c.get(deployments, "shop", "waypoint")
	if err := unstructured.SetNestedField(d.Object, "evil:1", "spec", "template", "spec", "serviceAccountName"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.dynamic.Resource(deployments).Namespace("shop").Update(t.Context(), d, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("it is mended", func(context.Context) bool {
		got, _, _ := unstructured.NestedString(c.get(deployments, "shop", "waypoint").Object, "spec", "template", "spec", "serviceAccountName")
		return got == "waypoint"
	})
	if err := c.dynamic.Resource(services).Namespace("shop").Delete(t.Context(), "waypoint", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("the Service is back", func(context.Context) bool { return c.get(services, "shop", "waypoint") != nil })
	c.available("shop", "waypoint", 0)
	c.untilCondition("shop", "waypoint", "Programmed", "False AddressNotAssigned")
	if err := c.dynamic.Resource(classes).Delete(t.Context(), "istio-waypoint", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("the class is back", func(context.Context) bool { return c.get(classes, "", "istio-waypoint") != nil })
}

// TestParametersOfAGateway: overlays make an autoscaler, without them it goes; bad ones change nothing.
func TestParametersOfAGateway(t *testing.T) {
	t.Parallel()
	withOptions := func(spec map[string]any) {
		spec["infrastructure"] = map[string]any{"parametersRef": map[string]any{"group": "", "kind": "ConfigMap", "name": "options"}}
	}
	c := newCluster(t, namespace("shop", nil), waypointGateway("shop", "waypoint", withOptions))
	c.appliers()
	c.startWaypoints(gateway.Config{Image: "waypoint:1"})
	c.untilCondition("shop", "waypoint", "Accepted", "False InvalidParameters")
	if c.get(deployments, "shop", "waypoint") != nil {
		t.Error("there is a Deployment, though its parameters are not known")
	}
	options := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "options"}, Data: map[string]string{"horizontalPodAutoscaler": "spec: {maxReplicas: 4}"}}
	if _, err := c.kube.CoreV1().ConfigMaps("shop").Create(t.Context(), options, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.untilCondition("shop", "waypoint", "Accepted", "True Accepted") // it is looked for every ten seconds
	c.eventually("there is an autoscaler", func(context.Context) bool { return c.get(autoscalers, "shop", "waypoint") != nil })

	options.Data = map[string]string{"horizontalPodAutoscaler": "metadata: {name: other}"}
	gw := c.get(gateways, "shop", "waypoint")
	c.change(options, gw)
	c.untilCondition("shop", "waypoint", "Accepted", "False InvalidParameters")
	if c.get(autoscalers, "shop", "waypoint") == nil || c.get(deployments, "shop", "waypoint") == nil {
		t.Error("bad parameters took away what ran")
	}
	options.Data = nil
	c.change(options, gw)
	c.eventually("the autoscaler is gone", func(context.Context) bool { return c.get(autoscalers, "shop", "waypoint") == nil })
	if c.get(deployments, "shop", "waypoint") == nil {
		t.Error("the Deployment went too")
	}
}

// TestParametersThatTheAPIServerRefuses: they are the fault of who wrote them, and said to be; what ran goes on.
func TestParametersThatTheAPIServerRefuses(t *testing.T) {
	t.Parallel()
	options := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "options"}}
	c := newCluster(t, namespace("shop", nil), options, waypointGateway("shop", "waypoint", func(spec map[string]any) {
		spec["infrastructure"] = map[string]any{"parametersRef": map[string]any{"group": "", "kind": "ConfigMap", "name": "options"}}
	}))
	c.appliers()
	c.dynamic.PrependReactor("patch", "deployments", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if strings.Contains(string(a.(clienttesting.PatchActionImpl).Patch), `"image":""`) {
			return true, nil, apierrors.NewInvalid(schema.GroupKind{Group: "apps", Kind: "Deployment"}, "waypoint",
				field.ErrorList{field.Required(field.NewPath("spec"), "image")})
		}
		return false, nil, nil
	})
	c.startWaypoints(gateway.Config{Image: "waypoint:1"})
	c.available("shop", "waypoint", 1)
	c.untilCondition("shop", "waypoint", "Programmed", "True Programmed")
	gw := c.get(gateways, "shop", "waypoint")
	options.Data = map[string]string{"deployment": `spec: {template: {spec: {containers: [{name: istio-proxy, image: ""}]}}}`}
	c.change(options, gw)
	c.untilCondition("shop", "waypoint", "Accepted", "False InvalidParameters")
	if got := c.condition("shop", "waypoint", "Programmed"); got != "True Programmed" {
		t.Errorf("Programmed is %s, though a waypoint runs", got)
	}
	options.Data = nil
	c.change(options, gw)
	c.untilCondition("shop", "waypoint", "Accepted", "True Accepted")
}

// change changes a ConfigMap and has a Gateway looked at, which otherwise takes ten seconds.
func (c *cluster) change(cm *corev1.ConfigMap, gw *unstructured.Unstructured) {
	c.t.Helper()
	if _, err := c.kube.CoreV1().ConfigMaps(cm.Namespace).Update(c.t.Context(), cm, metav1.UpdateOptions{}); err != nil {
		c.t.Fatal(err)
	}
	now := c.get(gateways, gw.GetNamespace(), gw.GetName())
	now.SetGeneration(now.GetGeneration() + 1)
	if _, err := c.dynamic.Resource(gateways).Namespace(gw.GetNamespace()).Update(c.t.Context(), now, metav1.UpdateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

// TestWhatIsSomebodyElsesStays: objects of the same names that were not made for the Gateway.
func TestWhatIsSomebodyElsesStays(t *testing.T) {
	t.Parallel()
	object := func(apiVersion, kind, name string) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{"apiVersion": apiVersion, "kind": kind,
			"metadata": map[string]any{"namespace": "shop", "name": name}, "spec": map[string]any{"mine": true}}}
	}
	named := waypointGateway("shop", "second", nil)
	named.SetAnnotations(map[string]string{"gateway.istio.io/name-override": "first"})
	c := newCluster(t, namespace("shop", nil), waypointGateway("shop", "waypoint", nil), object("apps/v1", "Deployment", "waypoint"),
		waypointGateway("shop", "other", nil), object("v1", "ServiceAccount", "other"), waypointGateway("shop", "first", nil))
	c.appliers()
	c.startWaypoints(gateway.Config{Image: "waypoint:1"})
	c.untilCondition("shop", "waypoint", "Programmed", "False Invalid")
	if mine, _, _ := unstructured.NestedBool(c.get(deployments, "shop", "waypoint").Object, "spec", "mine"); !mine {
		t.Error("the Deployment was overwritten")
	}
	c.available("shop", "other", 1)
	c.untilCondition("shop", "other", "Programmed", "True Programmed")
	if mine, _, _ := unstructured.NestedBool(c.get(accounts, "shop", "other").Object, "spec", "mine"); !mine {
		t.Error("the ServiceAccount was overwritten")
	}
	c.available("shop", "first", 1)
	c.untilCondition("shop", "first", "Programmed", "True Programmed")
	if _, err := c.dynamic.Resource(gateways).Namespace("shop").Create(t.Context(), named, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.untilCondition("shop", "second", "Programmed", "False Invalid")
	if refs := c.get(deployments, "shop", "first").GetOwnerReferences(); len(refs) != 1 || refs[0].Name != "first" {
		t.Errorf("owners = %v, want the first Gateway", refs)
	}
}

// TestGatewaysThatOthersRun: nothing is made for them, and they are programmed when their Service serves.
func TestGatewaysThatOthersRun(t *testing.T) {
	t.Parallel()
	manual := waypointGateway("shop", "waypoint", func(spec map[string]any) {
		spec["addresses"] = []any{map[string]any{"type": "Hostname", "value": "mine"}}
	})
	foreign := waypointGateway("shop", "foreign", func(spec map[string]any) { spec["gatewayClassName"] = "mistnet-waypoint" })
	hidden := waypointGateway("hidden", "waypoint", nil)
	mesh := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio"},
		Data: map[string]string{"mesh": "discoverySelectors:\n- matchLabels: {mesh: \"yes\"}\n"}}
	c := newCluster(t, mesh, namespace("shop", map[string]string{"mesh": "yes"}), namespace("hidden", nil), manual, foreign, hidden)
	written := c.appliers()
	c.startWaypoints(gateway.Config{Image: "waypoint:1", IgnoreIstio: true})
	c.available("shop", "foreign", 1)
	c.untilCondition("shop", "foreign", "Programmed", "True Programmed")
	if n := written(); n["gateways/status shop/waypoint"] != 0 || n["gateways/status hidden/waypoint"] != 0 || c.get(classes, "", "istio-waypoint") != nil {
		t.Errorf("writes = %v, want none for Istio's class", n)
	}

	d := newCluster(t, namespace("shop", nil), manual.DeepCopy())
	written = d.appliers()
	d.startWaypoints(gateway.Config{Image: "waypoint:1"})
	d.untilCondition("shop", "waypoint", "Programmed", "False AddressNotAssigned")
	svc := service("shop", "mine", "10.96.0.7")
	svc.Spec.Ports = []corev1.ServicePort{{Port: 15008}}
	ready := true
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "mine-1", Labels: map[string]string{"kubernetes.io/service-name": "mine"}},
		Endpoints: []discoveryv1.Endpoint{{Conditions: discoveryv1.EndpointConditions{Ready: &ready}}}}
	if _, err := d.kube.DiscoveryV1().EndpointSlices("shop").Create(t.Context(), slice, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.kube.CoreV1().Services("shop").Create(t.Context(), svc, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	d.untilCondition("shop", "waypoint", "Programmed", "True Programmed")
	for what := range written() {
		if !strings.HasPrefix(what, "gateways/status") && !strings.HasPrefix(what, "gatewayclasses") {
			t.Errorf("%s was written for a Gateway that somebody else runs", what)
		}
	}
	if u := d.get(gateways, "shop", "waypoint"); !slices.Contains(addressValues(u), "mine.shop.svc.cluster.local") {
		t.Errorf("addresses = %v", addressValues(u))
	}
}

func addressValues(u *unstructured.Unstructured) (all []string) {
	list, _, _ := unstructured.NestedSlice(u.Object, "status", "addresses")
	for _, a := range list {
		all = append(all, fmt.Sprint(a.(map[string]any)["value"]))
	}
	return all
}

// TestMeshSettingsReachWaypoints as variables of their containers, also when they change.
func TestMeshSettingsReachWaypoints(t *testing.T) {
	t.Parallel()
	config := func(mesh string) *corev1.ConfigMap {
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio"}, Data: map[string]string{"mesh": mesh}}
	}
	c := newCluster(t, config("accessLogEncoding: JSON\naccessLogFormat: '{\"took\": \"%DURATION%\"}'\npathNormalization: {normalization: MERGE_SLASHES}\n"), namespace("shop", nil),
		waypointGateway("shop", "waypoint", nil))
	c.appliers()
	c.startWaypoints(gateway.Config{Image: "waypoint:1"})
	variable := func(name string) string {
		d := c.get(deployments, "shop", "waypoint")
		if d == nil {
			return ""
		}
		containers, _, _ := unstructured.NestedSlice(d.Object, "spec", "template", "spec", "containers")
		for _, container := range containers {
			env, _, _ := unstructured.NestedSlice(container.(map[string]any), "env")
			for _, e := range env {
				if m := e.(map[string]any); m["name"] == name {
					return m["value"].(string)
				}
			}
		}
		return ""
	}
	c.eventually("the waypoint is told", func(context.Context) bool {
		return variable("ACCESS_LOG_ENCODING") == "JSON" && variable("PATH_NORMALIZATION") == "MERGE_SLASHES" && variable("ACCESS_LOG") == "" &&
			variable("ACCESS_LOG_FORMAT") == `{"took": "%DURATION%"}`
	})
	if _, err := c.kube.CoreV1().ConfigMaps("istio-system").Update(t.Context(), config("accessLogFile: ''\naccessLogFormat: '%TOOK%'\nenableTracing: true\n"), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("the waypoint is told again", func(context.Context) bool {
		return variable("ACCESS_LOG_ENCODING") == "" && variable("ACCESS_LOG") == "false" && variable("ACCESS_LOG_FORMAT") == ""
	})
}
