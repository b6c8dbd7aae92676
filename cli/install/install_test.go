package install_test

import (
	"bytes"
	"context"
	"flag"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/mistnet/mistnet/cli/cluster"
	"github.com/mistnet/mistnet/cli/fakeapi"
	"github.com/mistnet/mistnet/cli/install"
	"github.com/mistnet/mistnet/istiod/gateway"
)

var update = flag.Bool("update", false, "rewrite golden files")

type lab struct {
	api *fakeapi.Server
	in  *install.Installer
	out bytes.Buffer
}

func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{api: fakeapi.New(t)}
	l.in = l.installer(t)
	return l
}

// installer is another mistctl on the same cluster.
func (l *lab) installer(t *testing.T) *install.Installer {
	t.Helper()
	c, err := cluster.New(l.api.Config, "istio-system")
	if err != nil {
		t.Fatal(err)
	}
	return &install.Installer{Cluster: c, Charts: testCharts(t), Out: &l.out, Timeout: 5 * time.Second, Poll: time.Millisecond}
}

// testCharts are small charts with one object of every sort that matters.
func testCharts(t *testing.T) *install.Charts {
	t.Helper()
	charts, err := install.LoadCharts(os.DirFS("testdata"))
	if err != nil {
		t.Fatal(err)
	}
	return charts
}

func (l *lab) install(t *testing.T, sets ...string) {
	t.Helper()
	if err := l.in.Install(t.Context(), install.Input{Sets: sets}); err != nil {
		t.Fatalf("Install: %v\n%s", err, l.out.String())
	}
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if err == nil || !strings.Contains(err.Error(), part) || strings.Contains(err.Error(), "\n") {
			t.Errorf("error is %v, want one line with %q", err, part)
		}
	}
}

func TestInstallAppliesInOrder(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.install(t)
	var applied []string
	for _, line := range l.api.Log() {
		if path, ok := strings.CutPrefix(line, "apply "); ok {
			applied = append(applied, filepath.Base(filepath.Dir(path))+"/"+filepath.Base(path))
		}
	}
	want := []string{
		"customresourcedefinitions/policies.test.io", "serviceaccounts/istio-reader",
		"serviceaccounts/istiod", "configmaps/istio", "clusterroles/istiod", "services/istiod", "deployments/istiod",
		"validatingwebhookconfigurations/istio-validator",
		"serviceaccounts/istio-cni", "clusterroles/istio-cni", "daemonsets/istio-cni-node",
		"serviceaccounts/ztunnel", "daemonsets/ztunnel",
	}
	if diff := cmp.Diff(want, applied); diff != "" {
		t.Errorf("applied in this order (-want +got):\n%s", diff)
	}
}

func TestUninstallLeavesTheClusterAsItWas(t *testing.T) {
	t.Parallel()
	for _, purge := range []bool{false, true} {
		l := newLab(t)
		l.api.GatewayAPI = true
		theirs := object("gateway.networking.k8s.io/v1", "GatewayClass", "", "istio")
		l.api.Put("/apis/gateway.networking.k8s.io/v1/gatewayclasses/istio", theirs)
		l.api.Put("/apis/gateway.networking.k8s.io/v1/namespaces/shop/gateways/waypoint", object("gateway.networking.k8s.io/v1", "Gateway", "shop", "waypoint"))
		l.api.Put("/apis/apps/v1/namespaces/shop/deployments/cart", object("apps/v1", "Deployment", "shop", "cart"))
		before := l.api.Paths()
		l.install(t)
		// What istiod makes while it runs.
		class := object("gateway.networking.k8s.io/v1", "GatewayClass", "", "istio-waypoint")
		class["spec"] = fakeapi.Object{"description": gateway.ClassDescription}
		l.api.Put("/apis/gateway.networking.k8s.io/v1/gatewayclasses/istio-waypoint", class)
		for path, o := range map[string]fakeapi.Object{
			"/apis/apps/v1/namespaces/shop/deployments/waypoint":                     object("apps/v1", "Deployment", "shop", "waypoint"),
			"/api/v1/namespaces/shop/services/waypoint":                              object("v1", "Service", "shop", "waypoint"),
			"/api/v1/namespaces/shop/serviceaccounts/waypoint":                       object("v1", "ServiceAccount", "shop", "waypoint"),
			"/apis/policy/v1/namespaces/shop/poddisruptionbudgets/waypoint":          object("policy/v1", "PodDisruptionBudget", "shop", "waypoint"),
			"/apis/autoscaling/v2/namespaces/shop/horizontalpodautoscalers/waypoint": object("autoscaling/v2", "HorizontalPodAutoscaler", "shop", "waypoint"),
		} {
			l.api.Put(path, labelled(o, gateway.LabelManaged, gateway.Managed))
		}
		for _, ns := range []string{"default", "istio-system", "kube-system"} {
			l.api.Put("/api/v1/namespaces/"+ns+"/configmaps/istio-ca-root-cert", object("v1", "ConfigMap", ns, "istio-ca-root-cert"))
		}
		l.api.Put("/api/v1/namespaces/istio-system/secrets/istio-ca-secret", object("v1", "Secret", "istio-system", "istio-ca-secret"))
		l.api.Put("/apis/coordination.k8s.io/v1/namespaces/istio-system/leases/istio-leader", object("coordination.k8s.io/v1", "Lease", "istio-system", "istio-leader"))
		l.api.Log()
		if err := l.in.Uninstall(t.Context(), purge); err != nil {
			t.Fatalf("Uninstall: %v\n%s", err, l.out.String())
		}
		want := slices.Clone(before)
		if !purge {
			want = append(want, "/api/v1/namespaces/istio-system", "/api/v1/namespaces/istio-system/secrets/istio-ca-secret",
				"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/policies.test.io")
		}
		slices.Sort(want)
		if diff := cmp.Diff(want, l.api.Paths()); diff != "" {
			t.Errorf("purge %v: the cluster holds (-want +got):\n%s", purge, diff)
		}
		log := l.api.Log()
		order := func(end string) int {
			return slices.IndexFunc(log, func(s string) bool { return strings.HasPrefix(s, "delete ") && strings.HasSuffix(s, end) })
		}
		if hook, cni, role, zt, istiod := order("/istio-validator"), order("/istio-cni-node"), order("clusterroles/istio-cni"), order("daemonsets/ztunnel"),
			order("deployments/istiod"); hook < 0 || hook > cni || cni > role || role > zt || zt > istiod {
			t.Errorf("deleted in this order: %q", log)
		}
	}
}

func TestPurgeAfterUninstall(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	before := l.api.Paths()
	l.install(t)
	for _, purge := range []bool{false, true} {
		if err := l.in.Uninstall(t.Context(), purge); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(before, l.api.Paths()); diff != "" {
		t.Errorf("the cluster holds (-want +got):\n%s", diff)
	}
}

func TestUninstallKeepsWhatIsNotOurs(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	crd := "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/policies.test.io"
	l.api.Put(crd, object("apiextensions.k8s.io/v1", "CustomResourceDefinition", "", "policies.test.io"))
	l.install(t)
	cacerts := "/api/v1/namespaces/istio-system/secrets/cacerts"
	l.api.Put(cacerts, object("v1", "Secret", "istio-system", "cacerts"))
	replaced := "/api/v1/namespaces/istio-system/configmaps/istio"
	l.api.Put(replaced, object("v1", "ConfigMap", "istio-system", "istio")) // without our label
	if err := l.in.Uninstall(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{crd, cacerts, replaced, "/api/v1/namespaces/istio-system"} {
		if l.api.Get(path) == nil {
			t.Errorf("%s is gone", path)
		}
	}
	if !strings.Contains(l.out.String(), "namespace istio-system stays: it holds ConfigMap istio, Secret cacerts") {
		t.Errorf("the output does not say why the namespace stays:\n%s", l.out.String())
	}
}

func TestInstallAgainAfterAnInterruption(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	ctx, cancel := context.WithCancel(t.Context())
	l.api.Request = func(r *http.Request) {
		if r.Method == http.MethodPatch && strings.HasSuffix(r.URL.Path, "/istio-cni-node") {
			cancel()
		}
	}
	wantError(t, l.in.Install(ctx, install.Input{}), "interrupted", "run the same command again")
	l.api.Request = nil
	inv, err := install.ReadInventory(t.Context(), l.in.Cluster)
	if err != nil || inv == nil || inv.Complete {
		t.Fatalf("inventory after the interruption: %+v, %v", inv, err)
	}
	l.install(t)
	if inv, err = install.ReadInventory(t.Context(), l.in.Cluster); err != nil || !inv.Complete {
		t.Errorf("inventory after the second run: %+v, %v", inv, err)
	}
}

func TestTwoAtOnceAreRefused(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	second := l.installer(t)
	var err error
	l.api.Request = func(r *http.Request) {
		if r.Method == http.MethodPatch && strings.HasSuffix(r.URL.Path, "/deployments/istiod") {
			l.api.Request = nil
			err = second.Install(t.Context(), install.Input{})
		}
	}
	l.install(t)
	wantError(t, err, "another mistctl is at work")
	if slices.ContainsFunc(l.api.Paths(), func(p string) bool { return strings.HasSuffix(p, "/leases/mistctl") }) {
		t.Error("the lock was not given back")
	}
}

func TestADeadMistctlLosesTheLock(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	lease := object("coordination.k8s.io/v1", "Lease", "istio-system", "mistctl")
	lease["spec"] = fakeapi.Object{"holderIdentity": "dead", "renewTime": time.Now().Add(-time.Minute).UTC().Format("2006-01-02T15:04:05.000000Z")}
	l.api.Put("/apis/coordination.k8s.io/v1/namespaces/istio-system/leases/mistctl", lease)
	l.install(t)
}

func TestAnotherMeshIsRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		path string
		o    fakeapi.Object
		want string
	}{
		"Istio": {"/apis/apps/v1/namespaces/istio-system/deployments/istiod",
			labelled(object("apps/v1", "Deployment", "istio-system", "istiod"), "app", "istiod"), "Istio (Deployment istio-system/istiod)"},
		"ztunnel": {"/apis/apps/v1/namespaces/x/daemonsets/ztunnel", object("apps/v1", "DaemonSet", "x", "ztunnel"), "Istio (DaemonSet x/ztunnel)"},
		"Linkerd": {"/apis/apps/v1/namespaces/linkerd/deployments/linkerd-destination",
			labelled(object("apps/v1", "Deployment", "linkerd", "linkerd-destination"), "linkerd.io/control-plane-component", "destination"), "Linkerd"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.api.Put(c.path, c.o)
			wantError(t, l.in.Install(t.Context(), install.Input{}), c.want, "--force")
			if log := l.api.Log(); len(log) > 0 {
				t.Errorf("changed all the same: %q", log)
			}
			l.in.Force = true
			l.install(t)
		})
	}
}

func TestObjectsOfOthersAreRefusedBeforeAnyChange(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cm := object("v1", "ConfigMap", "istio-system", "istio")
	cm["metadata"].(fakeapi.Object)["annotations"] = fakeapi.Object{"meta.helm.sh/release-name": "istiod"}
	l.api.Put("/api/v1/namespaces/istio-system/configmaps/istio", cm)
	wantError(t, l.in.Install(t.Context(), install.Input{}), "ConfigMap istio-system/istio (Helm release istiod)", "--force")
	if log := l.api.Log(); len(log) > 0 {
		t.Errorf("changed all the same: %q", log)
	}
}

func TestMissingPermission(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.api.Deny = func(verb, plural string) bool { return verb == "patch" && plural == "daemonsets" }
	wantError(t, l.in.Install(t.Context(), install.Input{}), `account eve needs verb "patch" on daemonsets.apps in namespace istio-system`)
}

func TestWhatIsNotReadyIsNamed(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.in.Timeout = time.Second
	l.api.Stored = func(kind string, o fakeapi.Object) {
		fakeapi.Ready(kind, o)
		if kind == "Deployment" {
			o["status"] = fakeapi.Object{"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1}
		}
	}
	pod := labelled(object("v1", "Pod", "istio-system", "istiod-1"), "app", "istiod")
	pod["status"] = fakeapi.Object{"containerStatuses": []any{fakeapi.Object{"name": "discovery", "state": fakeapi.Object{
		"waiting": fakeapi.Object{"reason": "ImagePullBackOff", "message": "no such image"}}}}}
	l.api.Put("/api/v1/namespaces/istio-system/pods/istiod-1", pod)
	wantError(t, l.in.Install(t.Context(), install.Input{}), "istiod is not done after 1s", "0 of 1 ready", "istiod-1: ImagePullBackOff (no such image)")

	// The new pod counts as updated, the old one as available: who reads must learn of the new one's trouble all the same.
	l.api.Stored = func(kind string, o fakeapi.Object) {
		fakeapi.Ready(kind, o)
		if kind == "Deployment" {
			o["status"] = fakeapi.Object{"observedGeneration": 1, "replicas": 2, "updatedReplicas": 1, "availableReplicas": 1, "unavailableReplicas": 1}
		}
	}
	wantError(t, l.in.Install(t.Context(), install.Input{}), "0 of 1 ready", "istiod-1: ImagePullBackOff (no such image)")
}

func TestUpgrade(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	wantError(t, l.in.Upgrade(t.Context(), install.Input{}), "run mistctl install")
	l.install(t, "istiod.replicaCount=3", "global.tag=1.0")
	wantError(t, l.in.Install(t.Context(), install.Input{Sets: []string{"global.tag=2.0"}}), "has version 1.0, this is 2.0: run mistctl upgrade")
	l.api.Log()
	if err := l.in.Upgrade(t.Context(), install.Input{Sets: []string{"global.tag=2.0", "istiod.webhook=false", "components.cni=false"}}); err != nil {
		t.Fatal(err)
	}
	istiod := l.api.Get("/apis/apps/v1/namespaces/istio-system/deployments/istiod")
	if got := istiod["spec"].(fakeapi.Object)["replicas"]; got != 3.0 {
		t.Errorf("istiod has %v replicas after the upgrade, want the 3 of the installation", got)
	}
	for _, path := range l.api.Paths() {
		if strings.Contains(path, "istio-cni") || strings.Contains(path, "istio-validator") {
			t.Errorf("%s is still there", path)
		}
	}
	inv, err := install.ReadInventory(t.Context(), l.in.Cluster)
	if err != nil || inv.Version != "2.0" || slices.Contains(inv.Settings.Components, "cni") {
		t.Errorf("inventory is %+v, %v", inv, err)
	}
}

func TestDryRunChangesNothing(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.in.DryRun = true
	l.install(t)
	if log := l.api.Log(); len(log) > 0 {
		t.Errorf("changed: %q", log)
	}
	l.in.DryRun = false
	l.install(t)
	l.api.Log()
	l.in.DryRun = true
	l.out.Reset()
	l.install(t, "istiod.replicaCount=2", "istiod.webhook=false")
	if log := l.api.Log(); len(log) > 0 {
		t.Errorf("changed: %q", log)
	}
	for _, want := range []string{"configure  Deployment.apps istio-system/istiod\n", "unchanged  ConfigMap istio-system/istio\n",
		"delete     ValidatingWebhookConfiguration.admissionregistration.k8s.io istio-validator\n"} {
		if !strings.Contains(l.out.String(), want) {
			t.Errorf("dry run does not say %q:\n%s", want, l.out.String())
		}
	}
}

func object(version, kind, namespace, name string) fakeapi.Object {
	m := fakeapi.Object{"name": name}
	if namespace != "" {
		m["namespace"] = namespace
	}
	return fakeapi.Object{"apiVersion": version, "kind": kind, "metadata": m}
}

func labelled(o fakeapi.Object, key, value string) fakeapi.Object {
	o["metadata"].(fakeapi.Object)["labels"] = fakeapi.Object{key: value}
	return o
}

func TestValues(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	low, high := write("low.yaml", "istiod: {replicaCount: 5, webhook: false}\n"), write("high.yaml", "istiod: {replicaCount: 6}\n")
	broken := write("broken.yaml", "istiod: [\n")
	for _, c := range []struct {
		name string
		in   install.Input
		path string // where want is looked up
		want any
		err  string
	}{
		{name: "a value", in: install.Input{Sets: []string{"istiod.replicaCount=2"}}, path: "istiod.replicaCount", want: int64(2)},
		{name: "later files win", in: install.Input{Files: []string{low, high}}, path: "istiod.replicaCount", want: 6.0},
		{name: "earlier files count too", in: install.Input{Files: []string{low, high}}, path: "istiod.webhook", want: false},
		{name: "set wins over files", in: install.Input{Files: []string{high}, Sets: []string{"istiod.replicaCount=7"}}, path: "istiod.replicaCount", want: int64(7)},
		{name: "istioctl's pilot", in: install.Input{Sets: []string{"values.pilot.replicaCount=4"}}, path: "istiod.replicaCount", want: int64(4)},
		{name: "istioctl's meshConfig", in: install.Input{Sets: []string{"meshConfig.trustDomain=x.io"}}, path: "istiod.meshConfig.trustDomain", want: "x.io"},
		{name: "free maps take anything", in: install.Input{Sets: []string{"istiod.env.WHATEVER=1"}}, path: "istiod.env.WHATEVER", want: int64(1)},
		{name: "base's own table", in: install.Input{Sets: []string{"base.enableIstioConfigCRDs=false"}}, path: "base.base.enableIstioConfigCRDs", want: false},
		{name: "the profile's value", in: install.Input{Profile: "openshift"}, path: "global.platform", want: "openshift"},
		{name: "the user wins over the profile", in: install.Input{Sets: []string{"profile=openshift", "global.platform=k3s"}}, path: "global.platform", want: "k3s"},
		{name: "unknown value", in: install.Input{Sets: []string{"istiod.replicaCuont=2"}}, err: `unknown value "istiod.replicaCuont", did you mean "istiod.replicaCount"?`},
		{name: "unknown component", in: install.Input{Sets: []string{"ztunel.x=2"}}, err: `unknown value "ztunel", did you mean "ztunnel"?`},
		{name: "unknown global", in: install.Input{Sets: []string{"global.hubb=2"}}, err: `unknown value "global.hubb", did you mean "global.hub"?`},
		{name: "unknown switch", in: install.Input{Sets: []string{"components.cnii=true"}}, err: `there is no component "cnii", did you mean "cni"?`},
		{name: "unknown profile", in: install.Input{Profile: "ambent"}, err: `there is no profile "ambent", did you mean "ambient"?`},
		{name: "wrong kind", in: install.Input{Sets: []string{"istiod.webhook=maybe"}}, err: `value istiod.webhook is "maybe", want true or false`},
		{name: "not a number", in: install.Input{Sets: []string{"istiod.replicaCount=many"}}, err: `value istiod.replicaCount is "many", want a number`},
		{name: "no equals sign", in: install.Input{Sets: []string{"istiod.replicaCount"}}, err: "--set istiod.replicaCount: want key=value"},
		{name: "broken file", in: install.Input{Files: []string{broken}}, err: "broken.yaml"},
		{name: "no such file", in: install.Input{Files: []string{"/none"}}, err: "/none"},
		{name: "remote without address", in: install.Input{Profile: "external"}, err: "profile remote needs --set global.remotePilotAddress=VALUE"},
	} {
		s, err := testCharts(t).Settle(c.in, nil)
		if c.err != "" {
			t.Run(c.name, func(t *testing.T) { wantError(t, err, c.err) })
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		var got any = s.Values
		for key := range strings.SplitSeq(c.path, ".") {
			got = got.(map[string]any)[key]
		}
		if got != c.want {
			t.Errorf("%s: %s is %v (%T), want %v (%T)", c.name, c.path, got, got, c.want, c.want)
		}
	}
}

func TestRenderGolden(t *testing.T) {
	t.Parallel()
	for _, profile := range []string{"ambient", "minimal", "empty", "openshift"} {
		s, err := testCharts(t).Settle(install.Input{Profile: profile}, nil)
		if err != nil {
			t.Fatal(err)
		}
		objects, err := testCharts(t).Render(s, install.Target{Namespace: "istio-system"})
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		for _, o := range objects {
			b, err := yaml.Marshal(o.Object)
			if err != nil {
				t.Fatal(err)
			}
			got.WriteString("---\n" + string(b))
		}
		golden := filepath.Join("testdata", profile+".golden.yaml")
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
			t.Errorf("profile %s (-want +got):\n%s", profile, diff)
		}
	}
}
