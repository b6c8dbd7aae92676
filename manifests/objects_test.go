package manifests_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/kubernetes/scheme"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/cni"
	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/istiod"
	"github.com/mistnet/mistnet/istiod/gateway"
	"github.com/mistnet/mistnet/ztunnel"
)

// The linter of Helm has nothing to complain of.
func TestChartsPassHelmsLinter(t *testing.T) {
	for _, name := range append(slices.Clone(parts), "ambient") {
		l := lint.AllWithKubeVersion(filepath.Join("charts", name), map[string]any{}, "istio-system", nil)
		for _, m := range l.Messages {
			advice := m.Severity == support.InfoSev && strings.Contains(m.Error(), "icon is recommended")
			vendored := name == "ambient" && strings.Contains(m.Error(), "chart directory is missing these dependencies")
			if !advice && !vendored {
				t.Errorf("lint %s: %v", name, m)
			}
		}
	}
}

// Everything is an object that Kubernetes' own types know, every field of it: what an API server would warn of.
func TestObjectsAreValid(t *testing.T) {
	strict := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	cases, err := filepath.Glob("testdata/*.golden.yaml")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, file := range cases {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for document := range strings.SplitSeq(string(text), "\n---\n") {
			if !strings.Contains(document, "kind: ") {
				continue
			}
			n++
			if _, _, err := strict.Decode([]byte(document), nil, nil); err != nil {
				t.Errorf("%s: %v\n%s", file, err, document)
			}
		}
	}
	if n == 0 {
		t.Fatal("no objects: the test is blind")
	}
}

// podTemplate finds the pods a chart starts.
func podTemplate(t *testing.T, objects []*unstructured.Unstructured) corev1.PodTemplateSpec {
	t.Helper()
	for _, u := range objects {
		switch u.GetKind() {
		case "Deployment":
			var d appsv1.Deployment
			if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &d); err != nil {
				t.Fatal(err)
			}
			return d.Spec.Template
		case "DaemonSet":
			var d appsv1.DaemonSet
			if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &d); err != nil {
				t.Fatal(err)
			}
			return d.Spec.Template
		}
	}
	t.Fatal("no Deployment and no DaemonSet")
	return corev1.PodTemplateSpec{}
}

// Every argument is a flag that the program has, with a value it accepts, and every variable one it reads.
func TestProgramsKnowTheirArguments(t *testing.T) {
	programs := map[string]daemon.Flags{"istiod": &istiod.Config{}, "cni": &cni.Config{}, "ztunnel": &ztunnel.Config{}}
	for name, cfg := range programs {
		for _, values := range []string{"default", "everything"} {
			t.Run(name+" "+values, func(t *testing.T) {
				template := podTemplate(t, objects(t, mustRender(t, name, readValues(t, "testdata/"+name+"_"+values+".values.yaml"))))
				c := template.Spec.Containers[0]
				fs := daemon.NewFlagSet(name)
				var logLevel, logFormat string // those that daemon.Main adds
				fs.StringVar(&logLevel, "log-level", "info", "LOG_LEVEL", "")
				fs.StringVar(&logFormat, "log-format", "plain", "LOG_FORMAT", "")
				cfg.Register(fs)
				var usage strings.Builder
				fs.Usage(&usage)
				env := make(map[string]string)
				for _, e := range c.Env {
					env[e.Name] = e.Value
					if e.ValueFrom != nil {
						env[e.Name] = "" // only the kubelet knows
					}
					// Read by the Go runtime, or asked for by the case itself.
					if slices.Contains([]string{"GOMEMLIMIT", "MY_OWN", "MY_UID"}, e.Name) {
						continue
					}
					if !strings.Contains(usage.String(), "[$"+e.Name+"]") {
						t.Errorf("variable %s is none that %s reads", e.Name, name)
					}
				}
				if err := fs.Parse(c.Args, func(k string) (string, bool) { v, ok := env[k]; return v, ok }); err != nil {
					t.Errorf("arguments %q: %v", c.Args, err)
				}
				if _, _, err := daemon.NewLogger(os.Stderr, daemon.LogOptions{Level: logLevel, Format: logFormat}); err != nil {
					t.Errorf("log settings: %v", err)
				}
			})
		}
	}
}

// istiod makes waypoints of what the chart tells it.
func TestWaypointsAreAsTheValuesSay(t *testing.T) {
	gw := &gatewayv1.Gateway{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "waypoint", UID: "1"},
		Spec: gatewayv1.GatewaySpec{GatewayClassName: gateway.Class}}
	for values, want := range map[string]string{
		"default":    "localhost/mistnet/waypoint:0.1.0-dev, memory 128Mi, user 1337, selector map[kubernetes.io/os:linux], tolerations 0, pull secrets [], autoscaler false",
		"everything": "example.org/proxies/waypoint:9, memory 128Mi, user any, selector map[kubernetes.io/os:linux pool:mesh], tolerations 1, pull secrets [{pull}], autoscaler true",
	} {
		env := make(map[string]string)
		for _, e := range podTemplate(t, objects(t, mustRender(t, "istiod", readValues(t, "testdata/istiod_"+values+".values.yaml")))).Spec.Containers[0].Env {
			env[e.Name] = e.Value
		}
		defaults, err := gateway.ParseDefaults(env["WAYPOINT_DEFAULTS"])
		if err != nil {
			t.Fatal(err)
		}
		plan, err := gateway.Config{Image: env["WAYPOINT_IMAGE"], Defaults: defaults}.Plan(gw, nil)
		if err != nil {
			t.Fatal(err)
		}
		p := podTemplate(t, plan).Spec
		c, user, scaled := p.Containers[0], "any", slices.ContainsFunc(plan, func(u *unstructured.Unstructured) bool { return u.GetKind() == "HorizontalPodAutoscaler" })
		if id := c.SecurityContext.RunAsUser; id != nil {
			user = strconv.Itoa(int(*id))
		}
		if got := fmt.Sprintf("%s, memory %s, user %s, selector %v, tolerations %d, pull secrets %v, autoscaler %t", c.Image, c.Resources.Requests.Memory(), user,
			p.NodeSelector, len(p.Tolerations), p.ImagePullSecrets, scaled); got != want {
			t.Errorf("with values %s a waypoint is %s, want %s", values, got, want)
		}
	}
}

// Every mount has its volume and every probe a port that the container names.
func TestPodsHangTogether(t *testing.T) {
	for _, name := range []string{"istiod", "cni", "ztunnel"} {
		template := podTemplate(t, objects(t, mustRender(t, name, nil)))
		var volumes []string
		for _, v := range template.Spec.Volumes {
			volumes = append(volumes, v.Name)
		}
		c := template.Spec.Containers[0]
		for _, m := range c.VolumeMounts {
			if !slices.Contains(volumes, m.Name) {
				t.Errorf("%s: mount %s has no volume", name, m.Name)
			}
		}
		port := c.ReadinessProbe.HTTPGet.Port.IntVal
		if !slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.ContainerPort == port }) {
			t.Errorf("%s: the readiness probe's port %d is none of the container's", name, port)
		}
		if s := c.SecurityContext; s.Privileged != nil && *s.Privileged || !*s.ReadOnlyRootFilesystem || s.Capabilities.Drop[0] != "ALL" {
			t.Errorf("%s: security context is %+v", name, s)
		}
	}
}

// The definitions are those of the module that is linked, to the byte.
func TestDefinitionsAreUpstreams(t *testing.T) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "istio.io/api").Output()
	if err != nil {
		t.Fatalf("find istio.io/api: %v", err)
	}
	want, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "kubernetes", "customresourcedefinitions.gen.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	const file = "charts/base/files/customresourcedefinitions.gen.yaml"
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("%s is not that of istio.io/api in go.mod: copy it again", file)
	}
}

func TestBaseInstallsDefinitions(t *testing.T) {
	tests := []struct {
		name   string
		values map[string]any
		want   int
		not    string
	}{
		{name: "all", want: 15},
		{name: "but one", values: map[string]any{"base": map[string]any{"excludedCRDs": []any{"envoyfilters.networking.istio.io"}}},
			want: 14, not: "envoyfilters.networking.istio.io"},
		{name: "none", values: map[string]any{"base": map[string]any{"enableIstioConfigCRDs": false}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			all := objects(t, mustRender(t, "base", tt.values))
			if len(all) != tt.want {
				t.Errorf("%d objects, want %d", len(all), tt.want)
			}
			for _, u := range all {
				if u.GetKind() != "CustomResourceDefinition" || u.GetName() == tt.not {
					t.Errorf("unwanted %s %s", u.GetKind(), u.GetName())
				}
			}
		})
	}
}

// The umbrella is its parts, with global values for all of them.
func TestUmbrellaIsItsParts(t *testing.T) {
	values := map[string]any{"global": map[string]any{"hub": "example.org/m", "tag": "7"}, "ztunnel": map[string]any{"logLevel": "debug"}}
	got := objects(t, mustRender(t, "ambient", values))
	images := make(map[string]bool)
	for _, u := range got {
		if u.GetKind() == "Deployment" || u.GetKind() == "DaemonSet" {
			c := podTemplate(t, []*unstructured.Unstructured{u}).Spec.Containers[0]
			images[c.Image] = true
		}
	}
	for _, want := range []string{"example.org/m/istiod:7", "example.org/m/cni:7", "example.org/m/ztunnel:7"} {
		if !images[want] {
			t.Errorf("image %s is missing among %v", want, images)
		}
	}
	n := 0
	for _, name := range parts {
		n += len(objects(t, mustRender(t, name, nil)))
	}
	if len(got) != n {
		t.Errorf("the umbrella renders %d objects, its parts %d", len(got), n)
	}
	for _, d := range load(t, "ambient").Metadata.Dependencies {
		if v := load(t, d.Name).Metadata.Version; v != d.Version {
			t.Errorf("the umbrella wants %s %s, its version is %s", d.Name, d.Version, v)
		}
	}
}

// permissions are the rules of all roles, each taken apart: kind of role, group, resource, name, verb.
func permissions(t *testing.T, objects []*unstructured.Unstructured) map[string]bool {
	t.Helper()
	out := make(map[string]bool)
	for _, u := range objects {
		if u.GetKind() != "ClusterRole" && u.GetKind() != "Role" {
			continue
		}
		var role rbacv1.ClusterRole // a Role has the same rules
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &role); err != nil {
			t.Fatal(err)
		}
		for _, r := range role.Rules {
			names := r.ResourceNames
			if len(names) == 0 {
				names = []string{"*"}
			}
			for _, group := range r.APIGroups {
				for _, resource := range r.Resources {
					for _, name := range names {
						for _, verb := range r.Verbs {
							out[strings.Join([]string{u.GetKind(), group, resource, name, verb}, " ")] = true
						}
					}
				}
			}
		}
	}
	return out
}

// istiod may do what its package says it needs, where its tests run with nothing else, and nothing besides.
func TestIstiodMayDoWhatItNeeds(t *testing.T) {
	text, err := os.ReadFile("../istiod/kube/testdata/rbac.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want := permissions(t, objects(t, string(text)))
	// Not in that file, as its tests have no custom resources; see the package's comment.
	want["ClusterRole security.istio.io authorizationpolicies/status * patch"] = true
	if diff := cmp.Diff(want, permissions(t, objects(t, mustRender(t, "istiod", nil)))); diff != "" {
		t.Errorf("permissions (-needed +given):\n%s", diff)
	}
}
