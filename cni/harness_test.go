package cni_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/cni"
	"github.com/mistnet/mistnet/cni/plugin"
	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/yamldir"
	"github.com/mistnet/mistnet/internal/zds"
)

// TestMain lets the test binary stand in for our programs, by the name it is called by.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "istio-cni":
		plugin.Main()
	case "cni-agent":
		var cfg cni.Config
		daemon.Main("cni-agent", &cfg, func(ctx context.Context, env *daemon.Env) error {
			return cni.Main(ctx, cfg, env)
		})
	default:
		os.Exit(m.Run())
	}
}

const patience = 20 * time.Second // how long a test waits for what must happen

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("needs root, and CI must have it")
	}
	t.Skip("needs root to make network namespaces")
}

// node is a machine for one test: directories, and an agent that may be started and stopped.
type node struct {
	t        testing.TB
	root     string
	statuses chan map[string]*corev1.Pod // all status files, after each change
	current  map[string]*corev1.Pod
	config   func(*cni.Config) // of agents that are started; may be nil
}

func newNode(t testing.TB) *node {
	t.Helper()
	needRoot(t)
	root, err := os.MkdirTemp("", "mc") // a short path: sockets live in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	n := &node{t: t, root: root, statuses: make(chan map[string]*corev1.Pod, 1000)}
	for _, d := range []string{"config", "status", "run"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		all := map[string]*corev1.Pod{}
		err := yamldir.Watch(ctx, n.dir("status"), func(ch yamldir.Change) {
			for _, p := range ch.Problems {
				t.Errorf("status file is refused: %+v", p)
			}
			next := map[string]*corev1.Pod{}
			for k, v := range all {
				next[k] = v
			}
			for _, k := range ch.Deletes {
				delete(next, k.Namespace+"/"+k.Name)
			}
			for _, o := range ch.Upserts {
				next[o.Key.Namespace+"/"+o.Key.Name] = o.Value.(*corev1.Pod)
			}
			all = next
			n.statuses <- next
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return n
}

func (n *node) dir(name string) string { return filepath.Join(n.root, name) }

// start runs an agent until stop is called, or the test ends.
func (n *node) start() (stop func()) {
	n.t.Helper()
	var out io.Writer = n.t.Output()
	env, err := daemon.NewEnv("cni-agent", out, daemon.LogOptions{Level: n.level()})
	if err != nil {
		n.t.Fatal(err)
	}
	cfg := cni.Config{
		ConfigDir: n.dir("config"), StatusDir: n.dir("status"), RunDir: n.dir("run"), ZDSSocket: n.dir("z"),
		Policy: cni.Policy{ExcludeNamespaces: []string{"kube-system"}},
	}
	if n.config != nil {
		n.config(&cfg)
	}
	return n.run(cfg, env)
}

// run runs an agent until stop is called, or the test ends. It returns when the agent is ready.
func (n *node) run(cfg cni.Config, env *daemon.Env) (stop func()) {
	n.t.Helper()
	a, err := cni.New(cfg, env)
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("Run = %v, want nil", err)
		}
	})
	n.t.Cleanup(stop)
	n.eventually("the agent is ready", func() bool {
		code, _ := n.ask(http.MethodGet, plugin.PathStatus, nil)
		return code == http.StatusOK
	})
	return stop
}

// eventually polls what has no event to wait for.
func (n *node) eventually(what string, cond func() bool) {
	n.t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			n.t.Fatalf("waited in vain until %s", what)
		}
	}
}

// write puts YAML into the watched directory.
func (n *node) write(file, content string) {
	n.t.Helper()
	tmp := filepath.Join(n.dir("config"), ".tmp")
	if err := os.WriteFile(tmp, []byte(content), 0o644); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(n.dir("config"), file)); err != nil {
		n.t.Fatal(err)
	}
}

func namespace(name, mode string) string {
	labels := ""
	if mode != "" {
		labels = "  labels: {istio.io/dataplane-mode: " + mode + "}\n"
	}
	return "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: " + name + "\n" + labels
}

func podYAML(namespace, name, uid, more string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata:\n  namespace: %s\n  name: %s\n  uid: %s\n%sspec:\n"+
		"  nodeName: node-1\n  serviceAccountName: sa-%s\n  containers: [{name: app, image: app}]\n", namespace, name, uid, more, name)
}

// ask makes one request as the plugin does.
func (n *node) ask(method, path string, body any) (int, string) {
	n.t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		n.t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", filepath.Join(n.dir("run"), plugin.SocketName))
		},
	}}
	req, err := http.NewRequest(method, "http://unix"+path, bytes.NewReader(b))
	if err != nil {
		n.t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		n.t.Fatal(err)
	}
	return resp.StatusCode, strings.TrimSpace(string(text))
}

// redirection waits until a pod's status announces want: enabled, pending, "" or, for no status at all, "gone".
func (n *node) redirection(pod, want string) *corev1.Pod {
	n.t.Helper()
	deadline := time.After(patience)
	for {
		p, ok := n.current[pod]
		got := "gone"
		if ok {
			got = p.Annotations["ambient.istio.io/redirection"]
		}
		if got == want {
			return p
		}
		select {
		case n.current = <-n.statuses:
		case <-deadline:
			n.t.Fatalf("status of %s announces %q, want %q", pod, got, want)
		}
	}
}

var sandboxes atomic.Int64

// sandbox is a network namespace as a runtime makes it for a pod.
type sandbox struct {
	t    testing.TB
	name string
}

func newSandbox(t testing.TB) *sandbox {
	t.Helper()
	s := &sandbox{t, fmt.Sprintf("mist-cni-%d-%d", os.Getpid(), sandboxes.Add(1))}
	run(t, "ip", "netns", "add", s.name)
	t.Cleanup(s.destroy)
	run(t, "ip", "-n", s.name, "link", "set", "lo", "up")
	return s
}

func (s *sandbox) path() string { return filepath.Join("/run/netns", s.name) }

func (s *sandbox) destroy() {
	if _, err := os.Stat(s.path()); err == nil {
		run(s.t, "ip", "netns", "del", s.name)
	}
}

func (s *sandbox) exec(args ...string) string {
	s.t.Helper()
	return run(s.t, append([]string{"ip", "netns", "exec", s.name}, args...)...)
}

// spares reports whether connections that are older than the rules are let by.
func (s *sandbox) spares() bool {
	s.t.Helper()
	return strings.Contains(s.exec("iptables", "-t", "nat", "-S"), "! --tcp-flags FIN,SYN,RST,ACK SYN -j RETURN")
}

// captured reports whether our rules are in the namespace: all of them, or none. Anything between is an error.
func (s *sandbox) captured() bool {
	s.t.Helper()
	lines, routes := 0, 0
	for _, ipt := range []string{"iptables", "ip6tables"} {
		for _, table := range []string{"mangle", "nat"} {
			lines += strings.Count(s.exec(ipt, "-t", table, "-S"), "ISTIO_")
		}
	}
	for _, f := range []string{"-4", "-6"} {
		routes += strings.Count(run(s.t, "ip", "-n", s.name, f, "rule"), "fwmark 0x111/0xfff lookup 100")
	}
	const perFamily = 4 + 4 + 8 // chains, jumps, rules
	const sparing = 2           // rules for connections that are older
	switch {
	case (lines == 2*perFamily || lines == 2*(perFamily+sparing)) && routes == 2:
		return true
	case lines == 0 && routes == 0:
		return false
	}
	s.t.Errorf("namespace %s holds %d lines of rules and %d ip rules: neither all nor none", s.name, lines, routes)
	return false
}

func (s *sandbox) id() uint64 {
	s.t.Helper()
	ns, err := linux.OpenNetNS(s.path())
	if err != nil {
		s.t.Fatal(err)
	}
	defer ns.Close()
	id, err := ns.ID()
	if err != nil {
		s.t.Fatal(err)
	}
	return id
}

func (s *sandbox) event(namespace, name, uid, container string) plugin.Event {
	return plugin.Event{
		Netns: s.path(), PodNamespace: namespace, PodName: name, PodUID: uid, ContainerID: container, IfName: "eth0",
		IPs: []plugin.IP{
			{Interface: "eth0", Address: netip.MustParsePrefix("10.9.0.5/24")},
			{Interface: "eth0", Address: netip.MustParsePrefix("fd09::5/64")},
		},
	}
}

func run(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// ztunnel is a fake of the node's ztunnel on a real connection.
type ztunnel struct {
	t      testing.TB
	events chan string
	refuse atomic.Pointer[error]
	onAdd  func() // runs while the agent waits for the answer; may be nil
}

func (n *node) ztunnel() (z *ztunnel, stop func()) {
	n.t.Helper()
	z = &ztunnel{t: n.t, events: make(chan string, 1000)}
	return z, n.connect(z)
}

func (n *node) connect(z *ztunnel) (stop func()) {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	c := zds.Client{Path: n.dir("z"), Pods: z}
	go func() { done <- c.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Error(err)
		}
	})
	n.t.Cleanup(stop)
	return stop
}

func (z *ztunnel) Add(_ context.Context, info zds.Info, netns *os.File) error {
	ns, err := linux.NetNSFromFile(netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	id, err := ns.ID()
	if err != nil {
		return err
	}
	if z.onAdd != nil {
		z.onAdd()
	}
	if e := z.refuse.Load(); e != nil {
		z.events <- "refused " + info.UID
		return *e
	}
	z.events <- fmt.Sprintf("add %s %s/%s %s %d", info.UID, info.Namespace, info.Name, info.ServiceAccount, id)
	return nil
}

func (z *ztunnel) Keep(_ context.Context, uid string) error { z.events <- "keep " + uid; return nil }
func (z *ztunnel) Del(_ context.Context, uid string) error  { z.events <- "del " + uid; return nil }
func (z *ztunnel) Synced(_ context.Context, uids []string) error {
	z.events <- fmt.Sprint("synced ", uids)
	return nil
}

// expect waits for the next event and reports when it is another.
func (z *ztunnel) expect(want string) {
	z.t.Helper()
	select {
	case got := <-z.events:
		if got != want {
			z.t.Errorf("ztunnel was told %q, want %q", got, want)
		}
	case <-time.After(patience):
		z.t.Fatalf("ztunnel was told nothing, want %q", want)
	}
}

// await waits for an event and lets others pass.
func (z *ztunnel) await(want string) {
	z.t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case got := <-z.events:
			if got == want {
				return
			}
		case <-deadline:
			z.t.Fatalf("ztunnel was not told %q", want)
		}
	}
}

// level is that of the agent's log: benchmarks do not pay for more than an agent in production does.
func (n *node) level() string {
	if _, ok := n.t.(*testing.B); ok {
		return "error"
	}
	return "debug"
}
