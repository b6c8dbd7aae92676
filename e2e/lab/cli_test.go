package lab

import (
	"strings"
	"testing"
)

// What lab up prints can be typed: a lab that is not linked is reached by commands that enter it, of its own name.
func TestWhatNextCanBeTyped(t *testing.T) {
	for _, c := range []struct {
		name        string
		linked      bool
		want, never []string
	}{
		{"lab", true, []string{"export KUBECONFIG=/k PATH=/b:$PATH\n", "\n  bin/mistctl install\n", "lab load bin/images"}, []string{"-name", "lab run"}},
		{"lab", false, []string{"lab kubectl get pods", "lab run bin/mistctl install\n", "lab shell node1"}, []string{"-name", "export", "\n  bin/mistctl"}},
		{"two", false, []string{"lab kubectl -name two get pods", "lab run -name two bin/mistctl install\n", "lab down -name two"}, []string{"export", "\n  bin/mistctl"}},
	} {
		got := whatNext(c.name, "/k", "/b", c.linked)
		for _, want := range c.want {
			if !strings.Contains(got, want) {
				t.Errorf("lab %s, linked %t: no %q in\n%s", c.name, c.linked, want, got)
			}
		}
		for _, never := range c.never {
			if strings.Contains(got, never) {
				t.Errorf("lab %s, linked %t: %q in\n%s", c.name, c.linked, never, got)
			}
		}
	}
}
