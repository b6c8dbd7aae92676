package demo

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// newTestWorld starts the demo's mesh for a test, from the programs in MISTNET_BIN or ../../bin.
func newTestWorld(t *testing.T) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("CI must run as root")
		}
		t.Skip("needs root: it makes network namespaces")
	}
	w, err := newWorld(t.Context(), testBin(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(w.tails())
		}
	})
	return w
}

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// soon fails the test unless f succeeds within 20 s.
func soon(t *testing.T, what string, f func() error) {
	t.Helper()
	took, err := eventually(t.Context(), 20*time.Second, f)
	must(t, what, err)
	t.Logf("%s: after %s", what, took)
}

func TestTrafficOutlivesIstiod(t *testing.T) {
	w := newTestWorld(t)
	ctx, cart := t.Context(), w.at("shop/cart-2")
	must(t, "call with istiod up", w.answers(ctx, "shop/web", cart))
	held, err := w.hold(ctx, "shop/web", cart)
	must(t, "hold a connection", err)
	must(t, "stop istiod", w.procs["istiod"].Stop(10*time.Second))
	must(t, "new connection with istiod down", w.answers(ctx, "shop/web", cart))
	if held.logContains("closed:") == nil {
		t.Error("istiod's end cut an established connection")
	}

	t.Run("a ztunnel that starts meanwhile waits, and says for what", func(t *testing.T) {
		w.kill("ztunnel-node1")
		err := w.startZtunnel(shortened(t, ctx), "node1")
		if err == nil || !strings.Contains(err.Error(), "state manager") {
			t.Fatalf("start = %v, want it to be waiting for istiod", err)
		}
		must(t, "no traffic without policies", w.refused(ctx, "shop/web", cart))
	})

	must(t, "start istiod again", w.startControlPlane(ctx))
	soon(t, "ztunnel is ready", func() error {
		_, err := w.get(ctx, w.node("node1").Namespace, "127.0.0.1:15021", "/healthz/ready")
		return err
	})
	soon(t, "calls pass again", func() error { return w.answers(ctx, "shop/web", cart) })
	must(t, "write a policy", w.write("deny.yaml", nil))
	soon(t, "a policy written after istiod came back holds", func() error { return w.refused(ctx, "shop/web", cart) })
}

// shortened is ctx with little patience: for what is expected not to happen.
func shortened(t *testing.T, ctx context.Context) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestBrokenYAMLLeavesTheRestInForce(t *testing.T) {
	w := newTestWorld(t)
	ctx, cart := t.Context(), w.at("shop/cart-2")
	must(t, "write a policy", w.write("deny.yaml", nil))
	soon(t, "it holds", func() error { return w.refused(ctx, "shop/web", cart) })
	must(t, "break it", w.write("deny.yaml", func(s string) string { return strings.Replace(s, "action: DENY", "action: DNEY", 1) }))
	soon(t, "istiod names file and reason", func() error {
		b, err := w.get(ctx, w.lab.ControlPlane.Namespace, "127.0.0.1:15014", "/debug/problems")
		if err == nil && !(strings.Contains(string(b), "deny.yaml") && strings.Contains(string(b), "DNEY")) {
			return os.ErrNotExist
		}
		return err
	})
	must(t, "the last good form still denies", w.refused(ctx, "shop/web", cart))
	must(t, "another file", w.write("strict.yaml", nil))
	soon(t, "is in force", func() error { return w.refused(ctx, "legacy/old", cart) })
}

func TestWithoutAnAgentNoPodStarts(t *testing.T) {
	w := newTestWorld(t)
	w.kill("cni-agent-node1")
	_, err := w.lab.AddPod(t.Context(), w.node("node1"), podSpec("shop", "late"))
	if err == nil || !strings.Contains(err.Error(), "agent") {
		t.Fatalf("AddPod = %v, want a refusal that names the agent", err)
	}
	must(t, "running pods go on", w.answers(t.Context(), "shop/web", w.at("shop/cart-2")))
}

func TestZtunnelSaysWhyItCannotStart(t *testing.T) {
	w := newTestWorld(t)
	n := w.node("node1")
	args := []string{
		"-node-name=node1", "-xds-root-ca=" + w.path("tokens", "root-cert.pem"), "-auth-token=" + w.path("tokens", "node1"),
		"-inpod-uds=" + w.zdsSocket(n),
	}
	for _, tt := range []struct {
		name, program string
		args          []string
		want          string
	}{
		{"port in use", filepath.Join(w.bin, "ztunnel"), args, "open administration pages (-admin-addr): listen tcp 127.0.0.1:15000: bind: address already in use"},
		{"no root certificate", filepath.Join(w.bin, "ztunnel"), []string{"-node-name=node1", "-xds-root-ca=/nowhere"}, "read istiod's root certificate"},
		{"no capability", "setpriv", append([]string{"--bounding-set=-all", "--inh-caps=-all", filepath.Join(w.bin, "ztunnel")}, args...), "CAP_NET_ADMIN is missing"},
		{"agent without capability", "setpriv", []string{"--bounding-set=-all", "--inh-caps=-all", filepath.Join(w.bin, "cni-agent"),
			"-config-dir=" + w.path("config"), "-run-dir=" + t.TempDir()}, "CAP_NET_ADMIN"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			out, err := w.lab.Command(ctx, n.Namespace, tt.program, tt.args...).CombinedOutput()
			if err == nil || ctx.Err() != nil {
				t.Fatalf("exit = %v, want a failure at once; output:\n%s", err, out)
			}
			if !strings.Contains(string(out), tt.want) {
				t.Errorf("output lacks %q:\n%s", tt.want, out)
			}
		})
	}
}

func TestMetricsCountTheDemosBytes(t *testing.T) {
	w := newTestWorld(t)
	must(t, "call", w.answers(t.Context(), "shop/web", w.at("shop/cart-2")))
	soon(t, "both reporters count the connection", func() error {
		for node, reporter := range map[string]string{"node1": "source", "node2": "destination"} {
			b, err := w.get(t.Context(), w.node(node).Namespace, "127.0.0.1:15020", "/metrics")
			if err != nil {
				return err
			}
			if !hasLine(string(b), "istio_tcp_connections_closed_total{", `reporter="`+reporter+`"`, `connection_security_policy="mutual_tls"`,
				`source_principal="`+(mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}).String()+`"`) {
				return os.ErrNotExist
			}
		}
		return nil
	})
}

func hasLine(text string, parts ...string) bool {
	for line := range strings.Lines(text) {
		if containsAll(line, parts) {
			return true
		}
	}
	return false
}
