package cli_test

import (
	"bytes"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/mistnet/mistnet/cli"
	"github.com/mistnet/mistnet/cli/fakeapi"
	"github.com/mistnet/mistnet/cli/install"
)

// mistctl runs the command line and returns its status and what it printed.
func mistctl(t *testing.T, args ...string) (status int, out, errOut string) {
	t.Helper()
	var o, e bytes.Buffer
	status = cli.Main(t.Context(), args, &o, &e)
	return status, o.String(), e.String()
}

func TestEveryProfileFitsTheCharts(t *testing.T) {
	t.Parallel()
	for _, profile := range install.Profiles() {
		args := []string{"manifest", "generate", "--profile", profile, "-i", "mesh"}
		if profile == "remote" {
			args = append(args, "--set", "global.remotePilotAddress=192.0.2.1")
		}
		status, out, errOut := mistctl(t, args...)
		if status != 0 {
			t.Errorf("profile %s: %s", profile, errOut)
		}
		kinds := make(map[string]int)
		for doc := range strings.SplitSeq(out, "---\n") {
			u := &unstructured.Unstructured{}
			if err := yaml.Unmarshal([]byte(doc), &u.Object); err != nil {
				t.Errorf("profile %s prints what is no YAML: %v", profile, err)
			}
			if u.Object == nil {
				continue
			}
			kinds[u.GetKind()]++
			if ns := u.GetNamespace(); ns != "" && ns != "mesh" {
				t.Errorf("profile %s puts %s %s into namespace %s, not mesh", profile, u.GetKind(), u.GetName(), ns)
			}
		}
		want := map[string]map[string]int{
			"empty": {}, "minimal": {"CustomResourceDefinition": 15, "Deployment": 1}, "remote": {"CustomResourceDefinition": 15, "DaemonSet": 2},
		}[profile]
		if want == nil {
			want = map[string]int{"CustomResourceDefinition": 15, "Deployment": 1, "DaemonSet": 2}
		}
		for _, kind := range []string{"CustomResourceDefinition", "Deployment", "DaemonSet"} {
			if kinds[kind] != want[kind] {
				t.Errorf("profile %s has %d objects of kind %s, want %d", profile, kinds[kind], kind, want[kind])
			}
		}
	}
}

func TestInstallAndUninstallOfTheRealCharts(t *testing.T) {
	t.Parallel()
	api := fakeapi.New(t)
	before := api.Paths()
	kubeconfig := api.Kubeconfig(t)
	for _, args := range [][]string{{"install"}, {"install"}, {"upgrade", "--set", "ztunnel.logLevel=debug"}, {"uninstall", "--purge"}} {
		if status, out, errOut := mistctl(t, append(args, "--kubeconfig", kubeconfig)...); status != 0 {
			t.Fatalf("mistctl %v: %s\n%s", args, errOut, out)
		}
	}
	if after := api.Paths(); strings.Join(after, "\n") != strings.Join(before, "\n") {
		t.Errorf("the cluster holds %q, held %q", after, before)
	}
}

func TestBadInputIsOneLine(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		want string
		args []string
	}{
		{"did you mean \"istiod.replicaCount\"?", []string{"manifest", "generate", "--set", "istiod.replicaCont=1"}},
		{"Kubernetes v1.20.1 is not supported, the mesh needs >=1.30.0", []string{"manifest", "generate", "--kube-version", "v1.20.1"}},
		{"understand Kubernetes version \"new\"", []string{"manifest", "generate", "--kube-version", "new"}},
		{"unknown flag: --profil, did you mean \"--profile\"?", []string{"install", "--profil", "x"}},
		{"unknown flag: --zzzzzzzz", []string{"install", "--zzzzzzzz"}},
		{"unknown command \"worklod\" for \"mistctl ztunnel-config\", did you mean \"workload\"?", []string{"ztunnel-config", "worklod"}},
		{"unknown command \"generat\" for \"mistctl manifest\", did you mean \"generate\"?", []string{"manifest", "generat"}},
		{"unknown command \"instal\" for \"mistctl\", did you mean \"install\"?", []string{"instal"}},
		{"unknown command \"proxy-config\" for \"mistctl\": there are no sidecars; see mistctl ztunnel-config", []string{"proxy-config", "routes", "web"}},
		{"mistctl waypoint", []string{"pc"}},
		{"unknown command \"kube-inject\" for \"mistctl\": nothing is injected", []string{"kube-inject"}},
		{"/none: no such file or directory", []string{"analyze", "/none"}},
		{"unknown value \"foo\": want one of", []string{"manifest", "generate", "--set", "foo=bar"}},
		{"read --kubeconfig: stat /none: no such file", []string{"install", "--kubeconfig", "/none"}},
		{"is the cluster up", []string{"install", "--kubeconfig", unreachable(t)}},
		{"no context \"moon\"", []string{"install", "--context", "moon", "--kubeconfig", unreachable(t)}},
	} {
		status, _, errOut := mistctl(t, c.args...)
		if status == 0 || !strings.Contains(errOut, c.want) || strings.Count(errOut, "\n") != 1 {
			t.Errorf("mistctl %v: status %d, %q, want one line with %q", c.args, status, errOut, c.want)
		}
	}
}

// unreachable is the kubeconfig of a server where nothing listens.
func unreachable(t *testing.T) string {
	t.Helper()
	s := &fakeapi.Server{}
	s.Refuse(t)
	return s.Kubeconfig(t)
}

func TestVersion(t *testing.T) {
	t.Parallel()
	api := fakeapi.New(t)
	kubeconfig := api.Kubeconfig(t)
	if status, _, errOut := mistctl(t, "install", "--kubeconfig", kubeconfig, "--set", "global.tag=1.2.3"); status != 0 {
		t.Fatal(errOut)
	}
	for name, labels := range map[string]fakeapi.Object{"a": {"app": "istiod"}, "b": {"app": "ztunnel"}, "c": {"app": "ztunnel"}, "d": {"k8s-app": "istio-cni-node"}} {
		api.Put("/api/v1/namespaces/istio-system/pods/"+name, fakeapi.Object{"apiVersion": "v1", "kind": "Pod",
			"metadata": fakeapi.Object{"name": name, "namespace": "istio-system", "labels": labels},
			"spec":     fakeapi.Object{"containers": []any{fakeapi.Object{"name": "x", "image": "h/x:1.2.3"}}}})
	}
	status, out, errOut := mistctl(t, "version", "--kubeconfig", kubeconfig)
	want := "kubernetes:  v1.36.3\ninstalled:   1.2.3\ncni:         1.2.3 (1 pods)\nistiod:      1.2.3 (1 pods)\nztunnel:     1.2.3 (2 pods)\n"
	if status != 0 || !strings.HasSuffix(out, want) {
		t.Errorf("version says %q, %s, want it to end with %q", out, errOut, want)
	}
	if status, out, _ := mistctl(t, "version", "--kubeconfig", unreachable(t)); status != 0 || !strings.Contains(out, "cluster:     not reached: ") {
		t.Errorf("version without a cluster: status %d, %q", status, out)
	}
	if status, out, _ := mistctl(t, "version", "--remote=false", "--kubeconfig", "/none"); status != 0 || strings.Contains(out, "cluster:") {
		t.Errorf("version of mistctl alone: status %d, %q", status, out)
	}
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if status, out, errOut := mistctl(t, "completion", shell); status != 0 || !strings.Contains(out, "mistctl") {
			t.Errorf("completion %s: %s", shell, errOut)
		}
	}
	if _, out, _ := mistctl(t, "__complete", "install", "--profile", ""); !strings.Contains(out, "ambient\n") || !strings.Contains(out, "openshift\n") {
		t.Errorf("profiles complete to %q", out)
	}
}

func TestCheckBeforeAndAfter(t *testing.T) {
	t.Parallel()
	api := fakeapi.New(t)
	api.Put("/api/v1/nodes/n", fakeapi.Object{"apiVersion": "v1", "kind": "Node", "metadata": fakeapi.Object{"name": "n"},
		"status": fakeapi.Object{"nodeInfo": fakeapi.Object{"kernelVersion": "6.1.0", "architecture": "amd64", "operatingSystem": "linux"}}})
	kubeconfig := api.Kubeconfig(t)
	if status, out, errOut := mistctl(t, "check", "--pre", "--kubeconfig", kubeconfig); status != 0 {
		t.Errorf("check --pre: %s\n%s", errOut, out)
	}
	if status, out, _ := mistctl(t, "check", "--kubeconfig", kubeconfig); status == 0 || !strings.Contains(out, "✗ there is no istiod") {
		t.Errorf("check without a mesh: status %d\n%s", status, out)
	}
}
