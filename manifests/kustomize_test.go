package manifests_test

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/kubernetes/scheme"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/manifests"
)

// forKubectl is a chart's defaults without what says that Helm manages them.
func forKubectl(t *testing.T, name string) string {
	t.Helper()
	var out strings.Builder
	fmt.Fprintf(&out, "# Made from manifests/charts/%s by go test ./manifests -update. DO NOT EDIT.\n", name)
	for line := range strings.Lines(mustRender(t, name, nil)) {
		if strings.Contains(line, "helm.sh/chart:") || strings.HasPrefix(line, "# Source: ") {
			continue
		}
		out.WriteString(strings.Replace(line, "managed-by: Helm", "managed-by: kustomize", 1))
	}
	return out.String()
}

// What kubectl applies is what the charts make of their defaults.
func TestKustomizeFollowsTheCharts(t *testing.T) {
	for _, name := range parts[1:] {
		golden(t, filepath.Join("kustomize", name, name+".yaml"), []byte(forKubectl(t, name)))
	}
}

// kubectl itself puts all parts together.
func TestKubectlBuildsTheWhole(t *testing.T) {
	if _, err := exec.LookPath("kubectl"); err != nil {
		t.Skip("kubectl is not installed")
	}
	out, err := exec.Command("kubectl", "kustomize", "kustomize/ambient").CombinedOutput()
	if err != nil {
		t.Fatalf("kubectl kustomize: %v\n%s", err, out)
	}
	n := 1 // the namespace, which Helm makes
	for _, name := range parts {
		n += len(objects(t, mustRender(t, name, nil)))
	}
	if got := len(objects(t, string(out))); got != n {
		t.Errorf("kubectl kustomize makes %d objects, the charts and the namespace are %d", got, n)
	}
}

// There is one version, of every chart, of the images they name, and of those the samples name.
func TestVersionsAreOne(t *testing.T) {
	version := load(t, "istiod").Metadata.Version
	for _, name := range append([]string{"ambient"}, parts...) {
		if m := load(t, name).Metadata; m.Version != version || m.AppVersion != version {
			t.Errorf("chart %s has version %s and appVersion %s, istiod %s", name, m.Version, m.AppVersion, version)
		}
	}
	files, err := filepath.Glob("samples/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no samples: %v", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if _, image, ok := strings.Cut(line, "image: "); ok && strings.TrimSpace(image) != "localhost/mistnet/demo-app:"+version {
				t.Errorf("%s: image %s, want version %s", file, strings.TrimSpace(image), version)
			}
		}
	}
}

// Samples are objects of Kubernetes and Istio, every field of them.
func TestSamplesAreValid(t *testing.T) {
	known := runtime.NewScheme()
	if err := scheme.AddToScheme(known); err != nil {
		t.Fatal(err)
	}
	for _, add := range []func(*runtime.Scheme) error{securityv1.AddToScheme, networkingv1.AddToScheme, gatewayv1.Install} {
		if err := add(known); err != nil {
			t.Fatal(err)
		}
	}
	strict := serializer.NewCodecFactory(known, serializer.EnableStrict).UniversalDeserializer()
	files, err := filepath.Glob("samples/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no samples: %v", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for document := range strings.SplitSeq(string(text), "\n---\n") {
			if _, _, err := strict.Decode([]byte(document), nil, nil); err != nil {
				t.Errorf("%s: %v\n%s", file, err, document)
			}
		}
	}
}

// The embedded charts are the ones of this directory, helpers, whose names begin with _, included.
func TestChartsAreEmbeddedWhole(t *testing.T) {
	if *update {
		return // what was embedded is older than what was written
	}
	n := 0
	err := fs.WalkDir(here, "charts", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		n++
		want, err := fs.ReadFile(here, p)
		if err != nil {
			return err
		}
		if got, err := manifests.Files.ReadFile(p); err != nil || string(got) != string(want) {
			t.Errorf("%s is not embedded as it is: %v", p, err)
		}
		return nil
	})
	if err != nil || n < 30 {
		t.Errorf("walked over %d files: %v", n, err)
	}
}
