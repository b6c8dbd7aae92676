package cli_test

import (
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/cli/fakeapi"
)

// admin serves recorded pages as ztunnel and istiod do, and returns its host:port.
func admin(t *testing.T) string {
	t.Helper()
	mux := http.NewServeMux()
	for path, file := range map[string]string{"/config_dump": "mistnet.json", "/debug/xds": "xds.json"} {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, "inspect/testdata/"+file) })
	}
	web := httptest.NewServer(mux)
	t.Cleanup(web.Close)
	return strings.TrimPrefix(web.URL, "http://")
}

func TestZtunnelConfigWithoutKubernetes(t *testing.T) {
	t.Parallel()
	want, err := os.ReadFile("inspect/testdata/mistnet.golden.txt")
	if err != nil {
		t.Fatal(err)
	}
	// The validity of certificates depends on the day.
	services, _, _ := strings.Cut(string(want), "\nNAMESPACE    POLICY")
	_, services, _ = strings.Cut(services, "\n\n")
	for _, args := range [][]string{{"--admin-addr", admin(t)}, {"--file", "inspect/testdata/mistnet.json"}} {
		status, out, errOut := mistctl(t, append([]string{"ztunnel-config", "service"}, args...)...)
		if status != 0 || strings.TrimSpace(out) != strings.TrimSpace(services) {
			t.Errorf("%v: %s\n%s\nwant\n%s", args, errOut, out, services)
		}
	}
}

func TestProxyStatusWithoutKubernetes(t *testing.T) {
	t.Parallel()
	status, out, errOut := mistctl(t, "proxy-status", "--istiod-addr", admin(t))
	if status != 0 || strings.Count(out, "Address: SYNCED") != 2 {
		t.Errorf("%s\n%s", errOut, out)
	}
}

func TestZtunnelConfigOfNobody(t *testing.T) {
	t.Parallel()
	api := fakeapi.New(t)
	for _, c := range []struct {
		want string
		args []string
	}{
		{"no ztunnel runs in namespace istio-system", []string{"--kubeconfig", api.Kubeconfig(t)}},
		{"is the cluster up", []string{"--kubeconfig", unreachable(t)}},
		{"nothing listens there", []string{"--admin-addr", "127.0.0.1:1"}},
		{"/config_dump of a ztunnel", []string{"--file", "inspect/testdata/xds.json"}},
		{"there is no output format \"xml\"", []string{"-o", "xml"}},
	} {
		status, _, errOut := mistctl(t, append([]string{"ztunnel-config", "workload"}, c.args...)...)
		if status == 0 || !strings.Contains(errOut, c.want) || strings.Count(errOut, "\n") != 1 {
			t.Errorf("%v: %q, want one line with %q", c.args, errOut, c.want)
		}
	}
}
