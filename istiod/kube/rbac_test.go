package kube_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// TestPermissionsAreDocumented: the package comment lists what testdata/rbac.yaml allows, which the test with a real
// API server proves to be enough.
func TestPermissionsAreDocumented(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("testdata/rbac.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for d := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096); ; {
		var role rbacv1.ClusterRole
		if err := d.Decode(&role); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		for _, r := range role.Rules {
			line := strings.Join(r.Verbs, " ") + ":"
			for _, res := range r.Resources {
				if line += " " + res; r.APIGroups[0] != "" {
					line += "." + r.APIGroups[0]
				}
			}
			if len(r.ResourceNames) > 0 {
				line += " (" + strings.Join(r.ResourceNames, " ") + ")"
			}
			want = append(want, line)
		}
	}
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(doc)) {
		if rule, ok := strings.CutPrefix(line, "//\t"); ok {
			got = append(got, strings.TrimSpace(rule))
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" || len(want) < 10 {
		t.Errorf("permissions (-rbac.yaml +doc.go):\n%s", diff)
	}
}
