package suite_test

import (
	"context"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestGatewayDefinitions: the Gateway API's own definitions go in as they are, those of the standard channel and those of
// the experimental one, beside the mesh, and mistctl sees them.
func TestGatewayDefinitions(t *testing.T) {
	s := newSpace(t, "e2e-gatewayapi", false)
	if _, err := cluster.Kubectl(t.Context(), "get", "crd", "gateways.gateway.networking.k8s.io"); err == nil {
		t.Fatal("the cluster has the Gateway API already: what would be seen is not this test's doing")
	}
	mistctl, dir := buildMistctl(s), gatewayDefinitions(s)
	check := func() string {
		t.Helper()
		out, err := cluster.Command(t.Context(), mistctl, "check", "--pre").CombinedOutput()
		if err != nil {
			t.Fatalf("mistctl check --pre: %v\n%s", err, out)
		}
		return string(out)
	}
	if out := check(); !strings.Contains(out, "the Gateway API is not installed") {
		t.Errorf("mistctl does not see that the Gateway API is missing:\n%s", out)
	}
	for _, channel := range []struct{ dir, alsoKind string }{
		{dir, "tlsroutes.gateway.networking.k8s.io"},
		{filepath.Join(dir, "experimental"), "xbackendtrafficpolicies.gateway.networking.x-k8s.io"},
	} {
		remove := func() { // which the API server takes minutes for when it is busy, and kinds of these names went just before
			out, err := cluster.Kubectl(context.WithoutCancel(t.Context()), "delete", "--ignore-not-found", "--timeout=6m", "-k", channel.dir)
			if err != nil {
				t.Errorf("remove %s: %v\n%s", channel.dir, err, out)
			}
		}
		t.Cleanup(remove)
		out, err := cluster.Kubectl(t.Context(), "apply", "--server-side", "-k", channel.dir)
		s.must(err)
		for _, kind := range []string{"gatewayclasses.gateway.networking.k8s.io", "gateways.gateway.networking.k8s.io",
			"httproutes.gateway.networking.k8s.io", "grpcroutes.gateway.networking.k8s.io", "backendtlspolicies.gateway.networking.k8s.io", channel.alsoKind} {
			_, err := cluster.Kubectl(t.Context(), "wait", "--for=condition=Established", "--timeout=2m", "crd/"+kind)
			s.must(err)
		}
		if strings.Contains(strings.ToLower(out), "warning") {
			t.Errorf("the API server finds fault with %s:\n%s", channel.dir, out)
		}
		// As somebody who owns none of their fields: it is an error when applying them would change anything.
		if out, err := cluster.Kubectl(t.Context(), "diff", "--server-side", "--field-manager=e2e", "--force-conflicts", "-k", channel.dir); err != nil {
			t.Errorf("the API server holds something else than %s: %v\n%s", channel.dir, err, out)
		}
		if out := check(); !strings.Contains(out, "the Gateway API is installed") || strings.Contains(out, "the Gateway API is not installed") {
			t.Errorf("mistctl does not see the Gateway API:\n%s", out)
		}
		remove() // the two channels exclude each other
	}
}

// gatewayDefinitions is the directory of the Gateway API's definitions, in the module that e2e/bins/gatewayapi pins and
// whose sum go checks.
func gatewayDefinitions(s *space) string {
	s.Helper()
	cmd := exec.CommandContext(s.Context(), "go", "mod", "download", "-json", "sigs.k8s.io/gateway-api")
	cmd.Dir = "../bins/gatewayapi"
	out, err := cmd.Output()
	var module struct{ Dir, Error string }
	if e := json.Unmarshal(out, &module); e != nil || module.Dir == "" {
		s.Fatalf("find the Gateway API's module: %v %v %s", err, e, module.Error)
	}
	return filepath.Join(module.Dir, "config", "crd")
}
