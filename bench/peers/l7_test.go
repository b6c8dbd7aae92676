package peers_test

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/mistnet/mistnet/bench/peers"
)

// TestEnvoyHasWhatAWaypointHas: every listener that speaks HTTP has the filters, and there are as many rules and policies as ours has.
func TestEnvoyHasWhatAWaypointHas(t *testing.T) {
	dir := t.TempDir()
	certs, err := peers.NewCerts(dir)
	if err != nil {
		t.Fatal(err)
	}
	text := peers.EnvoyWaypoint(env(dir, certs))
	var any map[string]any
	if err := yaml.Unmarshal([]byte(text), &any); err != nil {
		t.Fatal(err)
	}
	for part, want := range map[string]int{
		"- match: {prefix: ": 1000 + 4, "name: envoy.filters.http.rbac.": 4 + 2, "principals: [{any: true}]": 4 + 100,
		"v3.HTTPFault}": 5, "v3.Cors}": 5, "prefix: \"/r999/\"}": 1,
	} {
		if got := strings.Count(text, part); got != want {
			t.Errorf("%q is there %d times, want %d", part, got, want)
		}
	}
	bin := os.Getenv("ENVOY_BIN")
	if bin == "" {
		t.Log("ENVOY_BIN is not set: Envoy itself is not asked")
		return
	}
	path := filepath.Join(dir, "envoy.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), bin, "--mode", "validate", "-c", path).CombinedOutput(); err != nil {
		t.Errorf("envoy refuses: %v\n%s", err, out)
	}
}

func TestProxyHeader(t *testing.T) {
	got := fmt.Sprintf("%q", peers.ProxyHeader(netip.MustParseAddrPort("10.0.0.1:258"), netip.MustParseAddrPort("10.9.0.1:80"), "spiffe://a"))
	want := `"\r\n\r\n\x00\r\nQUIT\n!\x11\x00\x19\n\x00\x00\x01\n\t\x00\x01\x01\x02\x00P\xd0\x00\nspiffe://a"`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ProxyHeader (-want +got):\n%s", diff)
	}
}
