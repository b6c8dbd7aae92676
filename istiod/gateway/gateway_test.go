package gateway_test

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/sets"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/gateway-api/pkg/features"
	"sigs.k8s.io/yaml"

	"github.com/mistnet/mistnet/istiod/gateway"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// config is a control plane as the chart starts one.
func config(t *testing.T) gateway.Config {
	t.Helper()
	defaults, err := gateway.ParseDefaults(`
"":
  deployment: {spec: {template: {spec: {containers: [{name: istio-proxy, resources: {requests: {cpu: 100m, memory: 128Mi}, limits: {memory: 1Gi}}}]}}}}
mistnet-waypoint:
  service: "metadata: {annotations: {class: ours}}"
`)
	if err != nil {
		t.Fatal(err)
	}
	return gateway.Config{Image: "example.org/waypoint:1", Defaults: defaults, Namespace: "istio-system", ClusterID: "Kubernetes",
		ClusterDomain: "cluster.local", TrustDomain: "example.org"}
}

func waypoint(name string) *gatewayv1.Gateway {
	return &gatewayv1.Gateway{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: "uid-1", Generation: 7},
		Spec: gatewayv1.GatewaySpec{GatewayClassName: gateway.IstioClass,
			Listeners: []gatewayv1.Listener{{Name: "mesh", Port: 15008, Protocol: gateway.ProtocolHBONE}}},
	}
}

// TestPlan compares what Gateways become with what is known to be right.
func TestPlan(t *testing.T) {
	for _, name := range []string{"plain", "everything"} {
		t.Run(name, func(t *testing.T) {
			text, err := os.ReadFile("testdata/" + name + ".yaml")
			if err != nil {
				t.Fatal(err)
			}
			document, overlays, _ := strings.Cut(string(text), "\n---\n")
			var gw gatewayv1.Gateway
			var own gateway.Overlays
			if err := errors.Join(yaml.UnmarshalStrict([]byte(document), &gw), yaml.Unmarshal([]byte(overlays), &own)); err != nil {
				t.Fatal(err)
			}
			plan, err := config(t).Plan(&gw, own)
			if err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			for _, u := range plan {
				y, err := yaml.Marshal(u.Object)
				if err != nil {
					t.Fatal(err)
				}
				got.WriteString("---\n")
				got.Write(y)
			}
			golden := "testdata/" + name + ".golden.yaml"
			if *update {
				if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got.String()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", golden, diff)
			}
		})
	}
}

// TestEnvironmentIsTheWaypoints: every variable is of a flag that the waypoint has. Programs do not import each other, so its
// source is read.
func TestEnvironmentIsTheWaypoints(t *testing.T) {
	t.Parallel()
	var source []byte
	for _, dir := range []string{"waypoint", "internal/daemon", "internal/controlplane"} {
		files, err := filepath.Glob("../../" + dir + "/*.go")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			source = append(source, text...)
		}
	}
	gw := waypoint("waypoint")
	if gw.Annotations == nil {
		gw.Annotations = make(map[string]string)
	}
	gw.Annotations[gateway.AnnotationClientCert] = "true"
	off := ""
	settings, err := gateway.NewSettings("merge_slashes", &off, "JSON", `{"cost": "$(PRICE) $%DURATION%"}`)
	if err != nil {
		t.Fatal(err)
	}
	asked := env(t, gw, nil, settings)
	for name, want := range map[string]string{
		"PATH_NORMALIZATION": "MERGE_SLASHES", "ACCESS_LOG": "false", "ACCESS_LOG_ENCODING": "JSON",
		"ACCESS_LOG_FORMAT": `{"cost": "$$(PRICE) $$%DURATION%"}`, // Kubernetes takes one of two away
	} {
		if !slices.Contains(asked, corev1.EnvVar{Name: name, Value: want}) {
			t.Errorf("%s=%s is not among %v", name, want, asked)
		}
	}
	if !slices.ContainsFunc(asked, func(e corev1.EnvVar) bool { return e.Name == "XFCC_INCLUDE_CLIENT_IDENTITY" && e.Value == "true" }) {
		t.Error("the waypoint is not told to name clients, which its Gateway asks for")
	}
	for _, e := range asked {
		if e.Name != "GOMEMLIMIT" && !bytes.Contains(source, []byte(`"`+e.Name+`"`)) {
			t.Errorf("%s is not a variable of the waypoint", e.Name)
		}
	}
}

// TestSettingsSayNothing of what the mesh does not, and refuse what nobody understands.
func TestSettingsSayNothing(t *testing.T) {
	t.Parallel()
	if s, err := gateway.NewSettings("", nil, "", ""); err != nil || s != (gateway.Settings{}) {
		t.Errorf("settings of nothing = %+v, %v", s, err)
	}
	for _, c := range [][2]string{{"MERGE", ""}, {"", "XML"}} {
		if s, err := gateway.NewSettings(c[0], nil, c[1], ""); err == nil {
			t.Errorf("%q makes %+v", c, s)
		}
	}
}

func env(t *testing.T, gw *gatewayv1.Gateway, own gateway.Overlays, settings ...gateway.Settings) []corev1.EnvVar {
	t.Helper()
	cfg := config(t)
	for _, s := range settings {
		cfg.Settings = s
	}
	plan, err := cfg.Plan(gw, own)
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range plan {
		if u.GetKind() == "Deployment" {
			var d appsv1.Deployment
			if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &d); err != nil {
				t.Fatal(err)
			}
			return d.Spec.Template.Spec.Containers[0].Env
		}
	}
	t.Fatal("there is no Deployment")
	return nil
}

// TestDrainFitsTheGracePeriod: what the waypoint waits for is over before it is killed.
func TestDrainFitsTheGracePeriod(t *testing.T) {
	t.Parallel()
	for overlay, want := range map[string]string{
		"{}": "20s",
		"spec: {template: {spec: {terminationGracePeriodSeconds: 60}}}":                                                                           "50s",
		"spec: {template: {spec: {terminationGracePeriodSeconds: 5}}}":                                                                            "0s",
		"spec: {template: {spec: {containers: [{name: istio-proxy, env: [{name: CONNECTION_TERMINATION_DEADLINE, value: 3s}]}]}}}":                "3s",
		"spec: {template: {spec: {containers: [{name: istio-proxy, env: [{name: DRAIN_DELAY, value: 1s}]}], terminationGracePeriodSeconds: 30}}}": "24s",
	} {
		got := ""
		for _, e := range env(t, waypoint("waypoint"), gateway.Overlays{"deployment": overlay}) {
			if e.Name == "CONNECTION_TERMINATION_DEADLINE" {
				got += e.Value
			}
		}
		if got != want {
			t.Errorf("with %s connections may take %q, want %q", overlay, got, want)
		}
	}
}

func TestOverlaysThatAreRefused(t *testing.T) {
	t.Parallel()
	for overlay, want := range map[string]gateway.Overlays{
		"is none of":               {"replicas": "3"},
		"deployment: ":             {"deployment": "spec: ["},
		"it is not an object":      {"service": "[a]"},
		"metadata.name cannot":     {"deployment": "metadata: {name: other}"},
		"ownerReferences cannot":   {"service": "metadata: {ownerReferences: [{apiVersion: v1, kind: Pod, name: x, uid: other}]}"},
		"finalizers cannot":        {"service": "metadata: {finalizers: [a.b/c]}"},
		"spec.selector cannot":     {"deployment": "spec: {selector: {matchLabels: {a: b}}}"},
		"cannot be changed":        {"service": "metadata: {labels: {gateway.istio.io/managed: somebody}}"},
		"no container \"istio-pro": {"deployment": "spec: {template: {spec: {containers: [{name: istio-proxy, $patch: delete}, {name: x}]}}}"},
		"DRAIN_DELAY":              {"deployment": "spec: {template: {spec: {containers: [{name: istio-proxy, env: [{name: DRAIN_DELAY, value: soon}]}]}}}"},
	} {
		if _, err := config(t).Plan(waypoint("waypoint"), want); err == nil || !strings.Contains(err.Error(), overlay) {
			t.Errorf("Plan with %v: %v, want an error with %q", want, err, overlay)
		}
	}
	for _, bad := range []string{"a: b", "'': {deployments: {}}", "["} {
		if got, err := gateway.ParseDefaults(bad); err == nil {
			t.Errorf("ParseDefaults(%q) = %v, want an error", bad, got)
		}
	}
}

// TestNames: everything has the Gateway's name where it fits.
func TestNames(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("long-name.", 25) + "x"
	for name, want := range map[string]gateway.Names{
		"waypoint":   {Service: "waypoint", ServiceAccount: "waypoint", Label: "waypoint"},
		"my.gateway": {Service: "my-gateway-0f568ee0", ServiceAccount: "my-gateway-0f568ee0", Label: "my.gateway"},
	} {
		if diff := cmp.Diff(want, gateway.NamesOf(waypoint(name))); diff != "" {
			t.Errorf("names of %s (-want +got):\n%s", name, diff)
		}
	}
	a, b := gateway.NamesOf(waypoint(long)), gateway.NamesOf(waypoint(long+"x"))
	for _, n := range []string{a.Service, a.ServiceAccount, a.Label} {
		if len(n) > 63 || n == "" {
			t.Errorf("%q has %d characters", n, len(n))
		}
	}
	if strings.Contains(a.Service, ".") || a.Service == b.Service || a.Label == b.Label {
		t.Errorf("two long names are %+v and %+v", a, b)
	}
}

func TestWhoseClassesTheyAre(t *testing.T) {
	t.Parallel()
	c := config(t)
	if !c.Controls("istio.io/mesh-controller") || !c.Controls("mistnet.io/mesh-controller") || c.Controls("istio.io/gateway-controller") || len(c.Classes()) != 2 {
		t.Errorf("classes = %v, want those of waypoints", c.Classes())
	}
	c.IgnoreIstio = true
	if c.Controls("istio.io/mesh-controller") || !c.Controls("mistnet.io/mesh-controller") || c.Classes()["istio-waypoint"] != "" {
		t.Errorf("classes = %v with IgnoreIstio, want ours alone", c.Classes())
	}
}

// TestFeatures holds what a GatewayClass says, which is what upstream's suite is asked to look at (e2e/bins/gatewayapi), against
// what there is to say: everything of meshes and of routes that stands in the standard channel, and nothing else.
func TestFeatures(t *testing.T) {
	t.Parallel()
	s := config(t).ClassStatus(&gatewayv1.GatewayClass{}, metav1.Now())
	var said []features.FeatureName
	for _, f := range s.SupportedFeatures {
		said = append(said, features.FeatureName(f.Name))
	}
	var want []features.FeatureName
	for _, set := range []sets.Set[features.Feature]{
		features.MeshCoreFeatures, features.MeshExtendedFeatures, features.HTTPRouteCoreFeatures, features.HTTPRouteExtendedFeatures,
		features.GRPCRouteCoreFeatures, features.GRPCRouteExtendedFeatures, features.ReferenceGrantCoreFeatures,
	} {
		for f := range set {
			if f.Channel == features.FeatureChannelStandard {
				want = append(want, f.Name)
			}
		}
	}
	slices.Sort(want)
	if diff := cmp.Diff(slices.Compact(want), said); diff != "" {
		t.Errorf("features of a GatewayClass (-want +got):\n%s", diff)
	}
}

func TestAddressesOfOthers(t *testing.T) {
	t.Parallel()
	host, ip := gatewayv1.HostnameAddressType, gatewayv1.IPAddressType
	for _, c := range []struct {
		address gatewayv1.GatewaySpecAddress
		manual  bool
		want    string // "": it is refused
	}{
		{gatewayv1.GatewaySpecAddress{Type: &host, Value: "mine"}, true, "shop/mine"},
		{gatewayv1.GatewaySpecAddress{Type: &host, Value: "mine.other.svc.cluster.local"}, true, "other/mine"},
		{gatewayv1.GatewaySpecAddress{Type: &host, Value: "example.org"}, true, ""},
		{gatewayv1.GatewaySpecAddress{Type: &host, Value: "a.b.c.svc.cluster.local"}, true, ""},
		{gatewayv1.GatewaySpecAddress{Type: &ip, Value: "192.0.2.1"}, false, ""},
		{gatewayv1.GatewaySpecAddress{Value: "192.0.2.1"}, false, ""},
	} {
		gw := waypoint("waypoint")
		gw.Spec.Addresses = []gatewayv1.GatewaySpecAddress{c.address}
		ns, name, err := config(t).ServiceNamed(gw, c.address)
		if got := ns + "/" + name; gateway.Manual(gw) != c.manual || (err == nil) != (c.want != "") || err == nil && got != c.want {
			t.Errorf("%s: manual %t, %s, %v; want %t, %q", c.address.Value, gateway.Manual(gw), got, err, c.manual, c.want)
		}
	}
}

// TestStatus tells a waypoint's life, one state after the other.
func TestStatus(t *testing.T) {
	t.Parallel()
	c, gw := config(t), waypoint("waypoint")
	gw.Spec.Listeners = append(gw.Spec.Listeners, gatewayv1.Listener{Name: "http", Port: 80, Protocol: gatewayv1.HTTPProtocolType})
	now := metav1.NewTime(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
	serves := gateway.Observed{ClusterIPs: []string{"10.0.0.1", "fd00::1"}, Hostnames: []string{"waypoint.shop.svc.cluster.local"}, Ready: true}
	waits := serves
	waits.Ready, waits.Waiting = false, "no pod"
	for _, step := range []struct {
		name     string
		observed gateway.Observed
		change   func()
		want     []string // conditions, listeners' conditions and addresses
	}{
		{"nothing is there yet", gateway.Observed{Waiting: "no Deployment"}, nil, []string{
			"Accepted True ListenersNotValid", "Programmed False AddressNotAssigned no Deployment", "ResolvedRefs True ResolvedRefs",
			"mesh Accepted True Accepted", "mesh Programmed False Pending", "mesh Conflicted False NoConflicts", "mesh ResolvedRefs True ResolvedRefs",
			"http Accepted False UnsupportedProtocol", "http Programmed False Invalid", "http Conflicted False NoConflicts", "http ResolvedRefs True ResolvedRefs"}},
		{"no pod is ready: there is no address yet", waits, func() { gw.Spec.Listeners = gw.Spec.Listeners[:1] }, []string{
			"Accepted True Accepted", "Programmed False AddressNotAssigned no pod", "ResolvedRefs True ResolvedRefs",
			"mesh Accepted True Accepted", "mesh Programmed False Pending", "mesh Conflicted False NoConflicts", "mesh ResolvedRefs True ResolvedRefs"}},
		{"it serves", serves, nil, []string{
			"Accepted True Accepted", "Programmed True Programmed", "ResolvedRefs True ResolvedRefs",
			"mesh Accepted True Accepted", "mesh Programmed True Programmed", "mesh Conflicted False NoConflicts", "mesh ResolvedRefs True ResolvedRefs",
			"IPAddress 10.0.0.1", "IPAddress fd00::1", "Hostname waypoint.shop.svc.cluster.local"}},
		{"it does not any more, and keeps its address", waits, nil, []string{
			"Accepted True Accepted", "Programmed False AddressNotAssigned no pod", "ResolvedRefs True ResolvedRefs",
			"mesh Accepted True Accepted", "mesh Programmed False Pending", "mesh Conflicted False NoConflicts", "mesh ResolvedRefs True ResolvedRefs",
			"IPAddress 10.0.0.1", "IPAddress fd00::1", "Hostname waypoint.shop.svc.cluster.local"}},
		{"its parameters are bad, and it serves as before", gateway.Observed{Parameters: errors.New("bad"), ClusterIPs: serves.ClusterIPs, Hostnames: serves.Hostnames, Ready: true}, nil,
			[]string{"Accepted False InvalidParameters bad", "Programmed True Programmed", "ResolvedRefs True ResolvedRefs",
				"mesh Accepted True Accepted", "mesh Programmed True Programmed", "mesh Conflicted False NoConflicts", "mesh ResolvedRefs True ResolvedRefs",
				"IPAddress 10.0.0.1", "IPAddress fd00::1", "Hostname waypoint.shop.svc.cluster.local"}},
		{"routes are to be attached", serves, func() {
			gw.Spec.Listeners[0].AllowedRoutes = &gatewayv1.AllowedRoutes{Kinds: []gatewayv1.RouteGroupKind{{Kind: "HTTPRoute"}}}
		}, []string{
			"Accepted True Accepted", "Programmed True Programmed", "ResolvedRefs True ResolvedRefs",
			"mesh Accepted True Accepted", "mesh Programmed True Programmed", "mesh Conflicted False NoConflicts", "mesh ResolvedRefs False InvalidRouteKinds",
			"IPAddress 10.0.0.1", "IPAddress fd00::1", "Hostname waypoint.shop.svc.cluster.local"}},
		{"no listener is a waypoint's", gateway.Observed{Addresses: nil, Failed: errors.New("refused")}, func() {
			gw.Spec.Listeners, gw.Status.Addresses = []gatewayv1.Listener{{Name: "x", Port: 15008, Protocol: "HTTP"}}, nil
		}, []string{
			"Accepted False ListenersNotValid", "Programmed False Invalid refused", "ResolvedRefs True ResolvedRefs",
			"x Accepted False UnsupportedProtocol", "x Programmed False Invalid", "x Conflicted False NoConflicts", "x ResolvedRefs True ResolvedRefs"}},
	} {
		if step.change != nil {
			step.change()
		}
		now = metav1.NewTime(now.Add(time.Hour))
		before := gw.Status
		gw.Status = c.Status(gw, step.observed, now)
		var got []string
		told := func(of string, all []metav1.Condition) {
			for _, k := range all {
				line := of + k.Type + " " + string(k.Status) + " " + k.Reason
				if step.observed.Waiting == k.Message || strings.HasSuffix("bad refused", k.Message) || k.Message == "bad" {
					line += " " + k.Message
				}
				if k.ObservedGeneration != 7 || k.Message == "" {
					t.Errorf("%s: %+v has no message, or the wrong generation", step.name, k)
				}
				got = append(got, line)
			}
		}
		told("", gw.Status.Conditions)
		for _, l := range gw.Status.Listeners {
			told(string(l.Name)+" ", l.Conditions)
		}
		for _, a := range gw.Status.Addresses {
			got = append(got, string(*a.Type)+" "+a.Value)
		}
		if diff := cmp.Diff(step.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step.name, diff)
		}
		for _, k := range gw.Status.Conditions {
			for _, old := range before.Conditions {
				if old.Type == k.Type && (old.Status == k.Status) != old.LastTransitionTime.Equal(&k.LastTransitionTime) {
					t.Errorf("%s: %s changed from %s to %s at %s, before at %s", step.name, k.Type, old.Status, k.Status, k.LastTransitionTime, old.LastTransitionTime)
				}
			}
		}
		if diff := cmp.Diff(gw.Status, c.Status(gw, step.observed, metav1.Now())); diff != "" {
			t.Errorf("%s: the same again is another status:\n%s", step.name, diff)
		}
	}
}
