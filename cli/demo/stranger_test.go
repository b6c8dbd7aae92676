package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// stockZtunnel is a ztunnel of the Istio project: a test that needs one is skipped where ZTUNNEL_BIN does not name it.
func stockZtunnel(t *testing.T) string {
	t.Helper()
	bin := os.Getenv("ZTUNNEL_BIN")
	if bin == "" {
		t.Skip("ZTUNNEL_BIN names no ztunnel of the Istio project")
	}
	return bin
}

// TestStockZtunnelWithOurWaypoint: ztunnels of the Istio project in the place of ours, on the client's node and then on all, in
// front of our waypoint and behind it.
func TestStockZtunnelWithOurWaypoint(t *testing.T) {
	bin := stockZtunnel(t)
	w := newTestWorld(t)
	w.bindMore(t, nil)
	for _, node := range []string{"node1", "node2"} {
		w.replaceZtunnel(t, bin, node)
		t.Run("up to "+node, w.throughTheWaypoint)
		b, err := os.ReadFile(w.procs["ztunnel-"+node].log)
		must(t, "read its log", err)
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, "\twarn\t") || strings.Contains(line, "\terror\t") && !strings.Contains(line, "\taccess\t") {
				t.Errorf("the ztunnel of %s complains: %s", node, line)
			}
		}
	}
}

// bindMore lets the waypoint serve workloads too, and binds a pod and a TCP service to it. change is made to the waypoint's own
// manifest besides; nil: none.
func (w *world) bindMore(t *testing.T, change *strings.Replacer) {
	t.Helper()
	replaced := func(old, text string) func(string) string {
		return func(s string) string { return strings.Replace(s, old, text, 1) }
	}
	must(t, "bind a pod and a TCP service to the waypoint", errors.Join(
		w.write("waypoint.yaml", func(s string) string {
			if change != nil {
				s = change.Replace(s)
			}
			return strings.Replace(s, "istio.io/waypoint-for: service", "istio.io/waypoint-for: all", 1)
		}),
		w.write("api.yaml", replaced("labels: {app: api, version: v1}", "labels: {app: api, version: v1, istio.io/use-waypoint: waypoint}")),
		w.write("shop.yaml", replaced("metadata: {name: cart, namespace: shop}\nspec:\n  clusterIP",
			"metadata: {name: cart, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}\nspec:\n  clusterIP"))))
}

// TestWaypointServedByItsZtunnel: the waypoint's pod is enrolled like any other. Its ztunnel takes connections out of their
// tunnels and announces them by PROXY protocol, and takes what the waypoint sends into tunnels. Ours does, and Istio's own.
func TestWaypointServedByItsZtunnel(t *testing.T) {
	w := newTestWorld(t)
	must(t, "stop the waypoint", w.procs["waypoint"].Stop(10*time.Second))
	w.bindMore(t, strings.NewReplacer("istio.io/dataplane-mode: none", "istio.io/dataplane-mode: ambient",
		"labels: {istio.io/waypoint-for: service}}", "labels: {istio.io/waypoint-for: service}, annotations: {ambient.istio.io/waypoint-inbound-binding: PROXY/15088}}"))
	for _, node := range []string{"node1", "node2"} {
		soon(t, node+" reaches the waypoint's pod through a ztunnel", func() error { return w.knows(t.Context(), node, "HBONE", inMesh+1) })
	}
	must(t, "start the waypoint", w.startWaypoint(t.Context(), w.pods["shop/waypoint"].Pod, "node2", "-listen-addr=", "-proxy-addr=127.0.0.1:15088"))
	t.Run("ours", w.throughTheWaypoint)
	t.Run("nobody else announces", func(t *testing.T) {
		must(t, "a call to the port", w.refused(t.Context(), "legacy/old", netip.AddrPortFrom(w.pods["shop/waypoint"].ip, 15088).String()))
	})
	t.Run("stock", func(t *testing.T) {
		w.replaceZtunnel(t, stockZtunnel(t), "node1", "node2")
		w.throughTheWaypoint(t)
	})
}

// throughTheWaypoint checks what a waypoint is for, of requests that web sends.
func (w *world) throughTheWaypoint(t *testing.T) {
	ctx := t.Context()
	must(t, "forget earlier lines", os.Truncate(w.procs["waypoint"].log, 0))
	soon(t, "requests to the service go through its waypoint", func() error {
		if err := w.all(ctx, "shop/web", apiURL+"/hello", "200 api-v"); err != nil {
			return err
		}
		return w.procs["waypoint"].logContains(`"GET /hello HTTP/1.1" 200`, "inbound-vip|80|http|api.shop.svc.cluster.local", w.pods["shop/web"].ip.String()+":")
	})

	must(t, "apply", w.writeAs(ruleFile, "canary.yaml", nil))
	soon(t, "testers see the new version", func() error { return w.all(ctx, "shop/web", apiURL, "200 api-v2", "x-user: tester") })
	tally, err := w.ask(ctx, "/", 400, 2)
	must(t, "ask", errors.Join(err, tally.between(v2, 10, 90)))
	if tally.count[v1]+tally.count[v2] != 400 {
		t.Errorf("of 400 requests some failed: %v", tally.count)
	}

	must(t, "apply", w.writeAs(ruleFile, "admin.yaml", nil))
	soon(t, "a path is denied", func() error { return w.all(ctx, "shop/web", apiURL+"/admin/users", "403 RBAC: access denied") })
	must(t, "another is not", w.all(ctx, "shop/web", apiURL+"/administrator", "200 api-v"))

	must(t, "apply", w.writeText(ruleFile, onlyWebAtGate))
	soon(t, "clients are known by their identity", func() error { return w.all(ctx, "shop/cart-1", apiURL, "403 RBAC: access denied") })
	must(t, "and admitted by it", w.all(ctx, "shop/web", apiURL, "200 api-v"))

	pod := "http://" + w.at("shop/api-v1")
	soon(t, "requests to a pod's address go through its waypoint", func() error {
		if err := w.all(ctx, "shop/web", pod+"/direct", "200 api-v1"); err != nil {
			return err
		}
		return w.procs["waypoint"].logContains(`"GET /direct HTTP/1.1" 200`, w.at("shop/api-v1"), w.pods["shop/web"].ip.String()+":")
	})
	must(t, "and are judged there", w.all(ctx, "shop/cart-1", pod, "403 RBAC: access denied"))
	must(t, "a pod without a waypoint is called directly", w.all(ctx, "shop/cart-1", "http://"+w.at("shop/api-v2"), "200 api-v2"))
	must(t, "connections that are not requests pass too", w.answers(ctx, "shop/web", serviceVIP))
	must(t, "or not", w.refused(ctx, "shop/cart-1", serviceVIP))
	must(t, "withdraw", os.Remove(w.path("config", ruleFile)))

	soon(t, "pods' nodes see the waypoint's identity", func() error {
		const id = "spiffe://cluster.local/ns/shop/sa/waypoint"
		for node, pod := range map[string]string{"node1": "api-v1", "node2": "api-v2"} {
			b, err := w.get(ctx, w.node(node).Namespace, fmt.Sprintf("127.0.0.1:%d", mesh.PortMetrics), "/metrics")
			if err != nil {
				return err
			}
			if !hasLine(string(b), "istio_tcp_connections_opened_total{", `reporter="destination"`, `source_principal="`+id+`"`, `destination_workload="`+pod+`"`) {
				return fmt.Errorf("no connection of the waypoint's to %s in the metrics of %s", pod, node)
			}
		}
		return nil
	})
}

// onlyWebAtGate admits one account to what is behind the waypoint.
const onlyWebAtGate = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-web, namespace: shop}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}]
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]
`

// all sends a few requests, each of which must be answered so.
func (w *world) all(ctx context.Context, from, url, answer string, headers ...string) error {
	const n = 10
	t, err := w.request(ctx, from, url, n, 2, headers...)
	if err != nil {
		return err
	}
	got := 0
	for what, times := range t.count {
		if strings.HasPrefix(what, answer) {
			got += times
		}
	}
	if got != n {
		return fmt.Errorf("%d of %d answers are %q: %v", got, n, answer, t.count)
	}
	return nil
}

// replaceZtunnel puts another ztunnel in the place of ours on these nodes: same agent, same pods, same istiod. It is configured by
// the environment and files of Istio's DaemonSet.
func (w *world) replaceZtunnel(t *testing.T, bin string, nodes ...string) {
	t.Helper()
	for _, node := range nodes {
		must(t, "stop our ztunnel", w.procs["ztunnel-"+node].Stop(10*time.Second))
		n := w.node(node)
		home := t.TempDir()
		for from, to := range map[string]string{node: "tokens/istio-token", "root-cert.pem": "istio/root-cert.pem"} {
			b, err := os.ReadFile(w.path("tokens", from))
			must(t, "read what ours used", err)
			to = filepath.Join(home, "var/run/secrets", to)
			must(t, "write it where the other looks", errors.Join(os.MkdirAll(filepath.Dir(to), 0o700), os.WriteFile(to, b, 0o600)))
		}
		istiod := "https://" + netip.AddrPortFrom(w.lab.ControlPlane.IPs[0], mesh.PortXDS).String()
		// The same file as before: tests look for either's lines there.
		p := &process{Cmd: w.lab.Command(context.Background(), n.Namespace, bin), log: w.path("logs", "ztunnel-"+node+".log")}
		p.Dir = home
		p.Env = append(p.Env,
			"NODE_NAME="+node, "POD_NAME=ztunnel-"+node, "POD_NAMESPACE="+mesh.RootNamespace, "SERVICE_ACCOUNT=ztunnel",
			"INSTANCE_IP="+n.IPs[0].String(), "CLUSTER_ID=Kubernetes", "XDS_ADDRESS="+istiod, "CA_ADDRESS="+istiod,
			"ALT_XDS_HOSTNAME=istiod.istio-system.svc", "ALT_CA_HOSTNAME=istiod.istio-system.svc",
			"PROXY_MODE=shared", "INPOD_ENABLED=true", "INPOD_UDS="+w.zdsSocket(n), "ZTUNNEL_WORKER_THREADS=1", "RUST_LOG=info",
		)
		log, err := os.OpenFile(p.log, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
		must(t, "open its log", err)
		defer log.Close()
		p.Stdout, p.Stderr = log, log
		must(t, "start "+bin, p.Start())
		w.procs["ztunnel-"+node] = p
		soon(t, "the other ztunnel is ready on "+node, func() error {
			_, err := w.get(t.Context(), n.Namespace, fmt.Sprintf("127.0.0.1:%d", mesh.PortReadiness), "/healthz/ready")
			return err
		})
	}
}
