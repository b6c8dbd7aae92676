package manifests_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	k8syaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write the files that are compared")

// here is the directory that is embedded: -update renders from what it has just written.
var here = os.DirFS(".")

var schemasOnce sync.Once

// parts are the charts in the order in which they are installed.
var parts = []string{"base", "istiod", "cni", "ztunnel"}

// load reads a chart; the umbrella with its parts.
func load(t *testing.T, name string) *chart.Chart {
	t.Helper()
	if *update {
		schemasOnce.Do(func() { writeSchemas(t) }) // or new values would be refused by the old schema
	}
	var files []*loader.BufferedFile
	dir := path.Join("charts", name)
	err := fs.WalkDir(here, dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(here, p)
		files = append(files, &loader.BufferedFile{Name: strings.TrimPrefix(p, dir+"/"), Data: b})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := loader.LoadFiles(files)
	if err != nil {
		t.Fatalf("load chart %s: %v", name, err)
	}
	for _, d := range c.Metadata.Dependencies {
		c.AddDependency(load(t, d.Name))
	}
	return c
}

// render is what a chart makes of values, without notes, in the order of the files' names.
func render(t *testing.T, name string, values map[string]any) (string, error) {
	t.Helper()
	c := load(t, name)
	if err := chartutil.ProcessDependenciesWithMerge(c, values); err != nil {
		return "", err
	}
	release := chartutil.ReleaseOptions{Name: name, Namespace: "istio-system", IsInstall: true, Revision: 1}
	all, err := chartutil.ToRenderValues(c, values, release, chartutil.DefaultCapabilities)
	if err != nil {
		return "", err
	}
	files, err := engine.Render(c, all)
	if err != nil {
		return "", err
	}
	var out strings.Builder
	for _, p := range slices.Sorted(maps.Keys(files)) {
		text := strings.TrimSpace(files[p])
		if strings.HasSuffix(p, ".txt") || strings.HasPrefix(path.Base(p), "_") || text == "" {
			continue
		}
		fmt.Fprintf(&out, "---\n# Source: %s\n%s\n", p, strings.TrimPrefix(text, "---\n"))
	}
	return out.String(), nil
}

func mustRender(t *testing.T, name string, values map[string]any) string {
	t.Helper()
	out, err := render(t, name, values)
	if err != nil {
		t.Fatalf("render chart %s: %v", name, err)
	}
	return out
}

// objects reads what was rendered.
func objects(t *testing.T, rendered string) []*unstructured.Unstructured {
	t.Helper()
	var all []*unstructured.Unstructured
	for d := k8syaml.NewYAMLOrJSONDecoder(strings.NewReader(rendered), 4096); ; {
		u := new(unstructured.Unstructured)
		if err := d.Decode(&u.Object); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("rendered text is not YAML: %v\n%s", err, rendered)
		}
		if len(u.Object) > 0 {
			all = append(all, u)
		}
	}
}

// readValues reads a file of values; one that does not exist has none.
func readValues(t *testing.T, file string) map[string]any {
	t.Helper()
	values := map[string]any{}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.UnmarshalStrict(b, &values); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return values
}

// golden compares, or with -update writes, a file.
func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v (go test ./manifests -update writes it)", err)
	}
	if !bytes.Equal(want, got) {
		t.Errorf("%s (-file +rendered; go test ./manifests -update accepts it):\n%s", file, cmp.Diff(string(want), string(got)))
	}
}

// testdata/CHART_CASE.values.yaml renders to testdata/CHART_CASE.golden.yaml.
func TestChartsRenderAsTheyDid(t *testing.T) {
	cases, err := filepath.Glob("testdata/*.values.yaml")
	if err != nil || len(cases) == 0 {
		t.Fatalf("no cases in testdata: %v", err)
	}
	for _, file := range cases {
		name := strings.TrimSuffix(filepath.Base(file), ".values.yaml")
		t.Run(name, func(t *testing.T) {
			chartName, _, _ := strings.Cut(name, "_")
			golden(t, strings.TrimSuffix(file, ".values.yaml")+".golden.yaml", []byte(mustRender(t, chartName, readValues(t, file))))
		})
	}
}
