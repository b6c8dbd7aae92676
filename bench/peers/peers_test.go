package peers_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/bench/peers"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func env(dir string, certs peers.Certs) *peers.Env {
	return &peers.Env{
		Client: peers.Pod{Addr: netip.MustParseAddr("10.201.1.2")}, Server: peers.Pod{Addr: netip.MustParseAddr("10.201.2.2")},
		Dir: dir, Certs: certs, Workers: 2, EchoPort: 7000,
	}
}

var fixedCerts = peers.Certs{
	CA: "/b/ca.pem", ClientCert: "/b/client.pem", ClientKey: "/b/client.key", ServerCert: "/b/server.pem", ServerKey: "/b/server.key",
	ClientBoth: "/b/client-both.pem", ServerBoth: "/b/server-both.pem",
}

func TestConfigurations(t *testing.T) {
	e := env("/b", fixedCerts)
	for name, got := range map[string]string{
		"nginx-inner.conf": peers.NginxInner(e), "nginx-outer.conf": peers.NginxOuter(e),
		"haproxy-inner.cfg": peers.HAProxyInner(e), "haproxy-outer.cfg": peers.HAProxyOuter(e),
		"nginx-l7.conf": peers.NginxHTTP(e), "haproxy-l7.cfg": peers.HAProxyHTTP(e),
		"mesh.yaml": peers.MeshObjects(), "envoy-inner.yaml": peers.EnvoyInner(e), "envoy-outer.yaml": peers.EnvoyOuter(e),
	} {
		golden := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// The programs themselves must accept the configurations, where they are here.
func TestTheProgramsAcceptTheirConfigurations(t *testing.T) {
	dir := t.TempDir()
	certs, err := peers.NewCerts(dir)
	if err != nil {
		t.Fatal(err)
	}
	e := env(dir, certs)
	for _, c := range []struct {
		program, config string
		check           []string // before the path of the configuration
	}{
		{"nginx", peers.NginxInner(e), []string{"-e", "stderr", "-t", "-c"}},
		{"nginx", peers.NginxOuter(e), []string{"-e", "stderr", "-t", "-c"}},
		{"haproxy", peers.HAProxyInner(e), []string{"-c", "-f"}},
		{"haproxy", peers.HAProxyOuter(e), []string{"-c", "-f"}},
		{"nginx", peers.NginxHTTP(e), []string{"-e", "stderr", "-t", "-c"}},
		{"haproxy", peers.HAProxyHTTP(e), []string{"-c", "-f"}},
	} {
		bin, err := exec.LookPath(c.program)
		if err != nil {
			t.Logf("%s is not here (apt-get install nginx libnginx-mod-stream haproxy)", c.program)
			continue
		}
		path := filepath.Join(t.TempDir(), "config")
		if err := os.WriteFile(path, []byte(c.config), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), bin, append(c.check, path)...).CombinedOutput(); err != nil {
			t.Errorf("%s refuses: %v\n%s\n%s", c.program, err, out, c.config)
		}
	}
}

func TestCertsAuthenticateBothSides(t *testing.T) {
	c, err := peers.NewCerts(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	ca, err := os.ReadFile(c.CA)
	if err != nil || !roots.AppendCertsFromPEM(ca) {
		t.Fatalf("read the CA: %v", err)
	}
	for _, leaf := range []struct{ cert, key, name string }{
		{c.ClientCert, c.ClientKey, ""}, {c.ServerCert, c.ServerKey, "server.bench.test"},
		{c.ClientBoth, c.ClientBoth, ""}, {c.ServerBoth, c.ServerBoth, "server.bench.test"},
	} {
		pair, err := tls.LoadX509KeyPair(leaf.cert, leaf.key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: leaf.name, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Errorf("%s: %v", leaf.cert, err)
		}
	}
}

// newFabric builds the real network, for tests that need root.
func newFabric(t *testing.T) *peers.Fabric {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("network namespaces need root")
		}
		t.Skip("network namespaces need root")
	}
	if err := peers.PrepareHost(t.Context()); err != nil {
		t.Fatal(err)
	}
	f, err := peers.NewFabric(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		list, err := peers.Output(context.Background(), "", "ip", "netns", "list")
		if err != nil || strings.Contains(list, "mistbench-"+strconv.Itoa(os.Getpid())+"-") {
			t.Errorf("namespaces are left: %q, %v", list, err)
		}
	})
	return f
}

func TestFabricAndProcesses(t *testing.T) {
	f := newFabric(t)
	if f.Congestion != "cubic" || f.MTU != "1500" {
		t.Errorf("fabric has congestion control %q and MTU %q, want cubic and 1500", f.Congestion, f.MTU)
	}
	// A refusal comes from the other side: there is a way.
	dial := fmt.Sprintf("exec 3<>/dev/tcp/%s/9", f.Server.Addr)
	if out, err := peers.Output(t.Context(), f.Client.NetNS, "timeout", "5", "bash", "-c", dial); err == nil || !strings.Contains(out, "refused") {
		t.Errorf("dial from pod to pod = %q, %v, want refused", out, err)
	}
	// One that obeys, one that must be killed, and one that ended by itself.
	for _, script := range []string{"echo up; exec sleep 60", "trap '' TERM; echo up; while :; do read -r x <$0; done", "echo up; exit 3"} {
		fifo, log := filepath.Join(t.TempDir(), "fifo"), filepath.Join(t.TempDir(), "log")
		if _, err := peers.Output(t.Context(), "", "mkfifo", fifo); err != nil {
			t.Fatal(err)
		}
		p, err := peers.Spawn(t.Context(), peers.Program{NetNS: f.Client.NetNS, Log: log, Argv: []string{"bash", "-c", script, fifo}})
		if err != nil {
			t.Fatal(err)
		}
		waitFor(t, func() bool {
			text, err := os.ReadFile(log)
			return err == nil && string(text) == "up\n"
		})
		if err := p.Stop(); err != nil {
			t.Errorf("stop %q: %v", script, err)
		}
		if p.Exited() == nil {
			t.Errorf("%q still runs after Stop", script)
		}
	}
}

// waitFor polls until done says so.
func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for !done() {
		select {
		case <-poll.C:
		case <-t.Context().Done():
			t.Fatal("the test ended first")
		}
	}
}

func TestSweepRemovesOnlyTheNamespacesOfTheDead(t *testing.T) {
	f := newFabric(t) // ours: this process is alive
	dead := exec.CommandContext(t.Context(), "true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	left := "mistbench-" + strconv.Itoa(dead.ProcessState.Pid()) + "-cli"
	if _, err := peers.Output(t.Context(), "", "ip", "netns", "add", left); err != nil {
		t.Fatal(err)
	}
	orphan := exec.CommandContext(t.Context(), "nsenter", "--net=/run/netns/"+left, "--", "sleep", "60")
	if err := orphan.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- orphan.Wait() }()
	waitFor(t, func() bool {
		pids, err := peers.Output(t.Context(), "", "ip", "netns", "pids", left)
		return err == nil && pids != ""
	})
	swept, err := peers.Sweep(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// What runs killed before this test left on the machine is swept as well: only these two are the test's to judge.
	if !slices.Contains(swept, left) {
		t.Errorf("swept %q, want %q among them", swept, left)
	}
	if ours := "mistbench-" + strconv.Itoa(os.Getpid()) + "-"; slices.ContainsFunc(swept, func(name string) bool { return strings.HasPrefix(name, ours) }) {
		t.Errorf("swept %q, want nothing of this live run (%s)", swept, ours)
	}
	if err := <-ended; err == nil {
		t.Error("the process in the namespace ended in peace, want it killed")
	}
	if _, err := os.Stat(f.Client.NetNS); err != nil {
		t.Errorf("the namespace of a live run is gone: %v", err)
	}
}

func TestAContenderWithoutItsProgramIsAbsent(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	e := env(t.TempDir(), fixedCerts)
	e.OursDir = t.TempDir()
	for _, c := range []peers.Contender{peers.Nginx{}, peers.HAProxy{}, peers.Envoy{}, peers.Rust{}, peers.Ours{}, peers.NginxL7{}, peers.HAProxyL7{}, peers.NGHTTPX{}, peers.EnvoyL7{}, peers.Waypoint{}} {
		if _, err := c.Start(t.Context(), e); !errors.Is(err, peers.ErrAbsent) {
			t.Errorf("%s without its program: %v, want ErrAbsent", c.Name(), err)
		}
	}
}

func TestConnectedTo(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:3AA0 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0
   1: 0201C90A:A1B2 0202C90A:3AA0 %s 00000000:00000000 00:00000000 00000000     0        0 2 1 0
`
	for state, want := range map[string]bool{"01": true, "06": false} {
		if got := peers.ConnectedTo(fmt.Sprintf(table, state), 15008); got != want {
			t.Errorf("ConnectedTo(port 15008, state %s) = %v, want %v", state, got, want)
		}
	}
	if peers.ConnectedTo(fmt.Sprintf(table, "01"), 15006) {
		t.Error("ConnectedTo(port 15006) = true without such a connection")
	}
}
