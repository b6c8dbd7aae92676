package demo

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/netlab"
	"github.com/mistnet/mistnet/manifests"
)

// own are the demo's own manifests: where there is no Kubernetes, pods are written down one by one. What is said of them is
// the same everywhere, and among the samples.
//
//go:embed manifests/*.yaml
var own embed.FS

// world is the demo's mesh: a lab of two nodes, the programs on them, and the pods.
type world struct {
	bin     string
	lab     *netlab.Lab
	dir     string // the lab's own; everything below goes with it
	pods    map[string]*pod
	procs   map[string]*process
	host    string // how the machine's own rules looked before
	stopped bool
	logs    map[string]string // the ends of the programs' logs, kept when something fails
}

// pod is a pod with its server running.
type pod struct {
	*netlab.Pod
	ip, ip6 netip.Addr
}

// setupError is why there is no world, and what its programs said last.
type setupError struct {
	error
	tails string
}

func (e *setupError) Unwrap() error { return e.error }

// newWorld builds the lab, starts the programs and the pods, and waits until the mesh knows them all.
func newWorld(ctx context.Context, bin string) (_ *world, err error) {
	bin, err = filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	for _, program := range []string{"istiod", "cni-agent", "cni-plugin", "ztunnel", "waypoint", "demo-app"} {
		if _, err := os.Stat(filepath.Join(bin, program)); err != nil {
			return nil, fmt.Errorf("%w: run make build", err)
		}
	}
	w := &world{bin: bin, pods: make(map[string]*pod), procs: make(map[string]*process), host: hostRules()}
	w.lab, err = netlab.Start(ctx, netlab.Config{
		Name: "demo", Nodes: 2, IPv6: true, PluginDirs: []string{bin}, Chained: func(n *netlab.Node) []byte {
			return fmt.Appendf(nil, `{"type": "cni-plugin", "cni_agent_run_dir": %q}`, n.RunDir)
		},
	})
	if err != nil {
		return nil, err
	}
	w.dir = w.lab.Dir
	defer func() {
		if err != nil {
			w.keepLogs()
			err = &setupError{errors.Join(err, w.lab.Close()), w.tails()}
		}
	}()
	for _, start := range []func(context.Context) error{w.writeConfig, w.startControlPlane, w.startNodes, w.startPods, w.settled} {
		if err := start(ctx); err != nil {
			return nil, err
		}
	}
	return w, nil
}

func (w *world) path(elem ...string) string {
	return filepath.Join(append([]string{w.dir}, elem...)...)
}

func (w *world) writeConfig(context.Context) error {
	for _, d := range []string{"config", "status", "istiod", "logs", "tokens"} {
		if err := os.MkdirAll(w.path(d), 0o700); err != nil {
			return err
		}
	}
	for _, name := range []string{"shop.yaml", "legacy.yaml", "api.yaml", "waypoint.yaml"} {
		if err := w.write(name, nil); err != nil {
			return err
		}
	}
	return nil
}

// write puts one of the embedded manifests into istiod's directory, as it is or changed.
func (w *world) write(name string, change func(string) string) error {
	return w.writeAs(name, name, change)
}

// writeAs does so under another name.
func (w *world) writeAs(as, name string, change func(string) string) error {
	b, err := own.ReadFile("manifests/" + name)
	if errors.Is(err, fs.ErrNotExist) {
		b, err = manifests.Samples.ReadFile("samples/" + name)
	}
	if err != nil {
		return err
	}
	text := string(b)
	if change != nil {
		text = change(text)
	}
	return w.writeText(as, text)
}

// writeText puts a manifest into istiod's directory at once.
func (w *world) writeText(as, text string) error {
	tmp := w.path("config", "."+as+".tmp")
	if err := os.WriteFile(tmp, []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, w.path("config", as))
}

// apply adds a manifest to istiod's directory.
func (w *world) apply(c *checks, name string) {
	if err := w.write(name, nil); err != nil {
		c.check("apply "+name, func() (string, error) { return "", err })
	}
}

// withdraw removes a manifest from istiod's directory.
func (w *world) withdraw(c *checks, name string) {
	if err := os.Remove(w.path("config", name)); err != nil {
		c.check("withdraw "+name, func() (string, error) { return "", err })
	}
}

// relabel puts namespace shop into the mesh or takes it out.
func (w *world) relabel(c *checks, ambient bool) {
	err := w.write("shop.yaml", func(text string) string {
		if ambient {
			return text
		}
		return strings.Replace(text, mesh.LabelDataplaneMode+": "+mesh.DataplaneModeAmbient, "was-in-the-mesh: \"true\"", 1)
	})
	if err != nil {
		c.check("label namespace shop", func() (string, error) { return "", err })
	}
}

// podPlan is where each pod runs; the names are those of the manifests.
var podPlan = []struct {
	namespace, name, node string
	serves                string // demo-app's command; "": it only calls
}{
	{"shop", "web", "node1", ""},
	{"shop", "cart-1", "node1", "serve"},
	{"shop", "cart-2", "node2", "serve"},
	{"shop", "api-v1", "node1", "web"},
	{"shop", "api-v2", "node2", "web"},
	{"shop", "waypoint", "node2", ""},
	{"legacy", "old", "node1", ""},
	{"legacy", "print", "node2", "serve"},
}

func (w *world) startPods(ctx context.Context) error {
	for _, plan := range podPlan {
		p, err := w.lab.AddPod(ctx, w.node(plan.node), netlab.PodSpec{
			Namespace: plan.namespace, Name: plan.name, UID: plan.name + "-uid",
		})
		if err != nil {
			return fmt.Errorf("start pod %s/%s: %w", plan.namespace, plan.name, err)
		}
		w.pods[plan.namespace+"/"+plan.name] = &pod{Pod: p, ip: p.IPs[0], ip6: p.IPs[1]}
		if plan.serves != "" {
			if err := w.serve(ctx, p, plan.serves); err != nil {
				return err
			}
		}
	}
	if err := w.startWaypoint(ctx, w.pods["shop/waypoint"].Pod, "node2"); err != nil {
		return err
	}
	vip := netip.MustParseAddrPort(serviceVIP)
	return w.lab.SetService(netlab.Service{VIP: vip.Addr(), Ports: []netlab.ServicePort{{Port: vip.Port(), Endpoints: []netip.AddrPort{
		netip.MustParseAddrPort(w.at("shop/cart-1")), netip.MustParseAddrPort(w.at("shop/cart-2")),
	}}}})
}

// serve runs one of the demo's servers in a pod and waits until it listens.
func (w *world) serve(ctx context.Context, p *netlab.Pod, command string) error {
	proc, err := w.start(p.Spec.Name, p.Namespace, "demo-app", command, p.Spec.Name, "[::]:8080")
	if err != nil {
		return err
	}
	_, err = eventually(ctx, 5*time.Second, func() error { return proc.logContains("listening on") })
	return err
}

func (w *world) node(name string) *netlab.Node {
	for _, n := range w.lab.Nodes {
		if n.Name == name {
			return n
		}
	}
	return nil
}

// at is the address of a pod's server.
func (w *world) at(pod string) string { return addrOf(w.pods[pod].ip) }

func (w *world) at6(pod string) string { return addrOf(w.pods[pod].ip6) }

// settled waits until both ztunnels know every pod of the mesh as one of the mesh.
func (w *world) settled(ctx context.Context) error {
	for _, node := range []string{"node1", "node2"} {
		_, err := eventually(ctx, 10*time.Second, func() error { return w.knows(ctx, node, "HBONE", inMesh) })
		if err != nil {
			return err
		}
	}
	return nil
}

// knows checks how many of shop's workloads a node's ztunnel reaches by a protocol.
func (w *world) knows(ctx context.Context, node, protocol string, want int) error {
	b, err := w.get(ctx, w.node(node).Namespace, fmt.Sprintf("127.0.0.1:%d", mesh.PortAdmin), "/config_dump")
	if err != nil {
		return err
	}
	var dump struct {
		Workloads []struct{ Namespace, Protocol, Status string }
	}
	if err := json.Unmarshal(b, &dump); err != nil {
		return err
	}
	got := 0
	for _, wl := range dump.Workloads {
		if wl.Namespace == "shop" && wl.Protocol == protocol && wl.Status == "Healthy" {
			got++
		}
	}
	if got != want {
		return fmt.Errorf("ztunnel of %s knows %d healthy %s workloads of shop, want %d", node, got, protocol, want)
	}
	return nil
}

// inMesh is how many pods of namespace shop join the mesh. Its waypoint does not: it speaks HBONE itself.
const inMesh = 5

// outsideMesh checks that both ztunnels reach shop's pods by plain TCP.
func (w *world) outsideMesh(ctx context.Context) error {
	return errors.Join(w.knows(ctx, "node1", "TCP", inMesh+1), w.knows(ctx, "node2", "TCP", inMesh+1))
}

// stop ends everything and reports what is left.
func (w *world) stop() error {
	if w.stopped {
		return nil
	}
	w.stopped = true
	w.keepLogs()
	var errs []error
	for _, name := range []string{"waypoint", "ztunnel-node1", "ztunnel-node2", "cni-agent-node1", "cni-agent-node2", "istiod"} {
		if p := w.procs[name]; p != nil {
			if err := p.Stop(10 * time.Second); err != nil {
				errs = append(errs, fmt.Errorf("%s did not stop cleanly: %w", name, err))
			}
		}
	}
	errs = append(errs, w.lab.Close())
	left, err := netlab.Leftovers(netlab.DefaultStateDir, w.lab.ID)
	errs = append(errs, err)
	for _, what := range left {
		errs = append(errs, fmt.Errorf("left behind: %s", what))
	}
	if now := hostRules(); now != w.host {
		errs = append(errs, fmt.Errorf("the machine's own rules changed:\nbefore:\n%s\nnow:\n%s", w.host, now))
	}
	return errors.Join(errs...)
}

// hostRules is what the demo must leave as it was: the machine's own packet filter, routing rules and links.
func hostRules() string {
	var b strings.Builder
	for _, cmd := range [][]string{{"nft", "list", "ruleset"}, {"ip", "rule"}, {"ip", "-6", "rule"}, {"ip", "-o", "link"}} {
		out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput()
		fmt.Fprintf(&b, "%s: %v\n%s", strings.Join(cmd, " "), err, out)
	}
	return b.String()
}

func (w *world) explain(out io.Writer) {
	fmt.Fprintf(out, `
The mesh is up until you press Ctrl-C. In another terminal:
  edit its YAML         %s
  call as pod web       ip netns exec %s %s call %s hello
  from outside          ip netns exec %s %s call %s hello
  ask the service api   ip netns exec %s %s get %s 100 1
  what ztunnel knows    ip netns exec %s curl -s 127.0.0.1:%d/config_dump
  its metrics           ip netns exec %s curl -s 127.0.0.1:%d/metrics | grep istio_tcp
  the rules in a pod    ip netns exec %s iptables-save
  access logs           tail -f %s
`, w.path("config"), w.pods["shop/web"].NSName, filepath.Join(w.bin, "demo-app"), serviceVIP,
		w.pods["legacy/old"].NSName, filepath.Join(w.bin, "demo-app"), serviceVIP,
		w.pods["shop/web"].NSName, filepath.Join(w.bin, "demo-app"), apiURL,
		w.node("node1").NSName, mesh.PortAdmin, w.node("node1").NSName, mesh.PortMetrics,
		w.pods["shop/web"].NSName, w.path("logs", "ztunnel-node*.log"))
}
