package netlab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"go.uber.org/zap"
)

// Config says what a lab is made of. The zero value is one node with IPv4.
type Config struct {
	// Name is for people, in the list of labs; optional.
	Name string
	// Nodes is how many nodes there are, 1 to 200; 0: one.
	Nodes int
	// IPv6 gives nodes and pods an IPv6 address besides the IPv4 one.
	IPv6 bool
	// Chained returns the JSON object of one more CNI plugin, {"type": ...}, that comes after bridge in the node's
	// conflist, or nil for none. It is called once per node, whose RunDir exists by then.
	Chained func(n *Node) []byte
	// CNIVersion is the conflist's; "": 1.0.0, the newest that Debian 12's plugins speak. GC and STATUS need 1.1.0.
	CNIVersion string
	// PluginDirs are searched for plugins before /usr/lib/cni and /opt/cni/bin.
	PluginDirs []string
	// StateDir holds one directory per lab; "": /run/mistnet-netlab.
	StateDir string
	// Congestion is the TCP congestion control of every namespace; "": reno. A machine's own default may be one that
	// makes measurements erratic.
	Congestion string
	// Log is optional.
	Log *zap.Logger
}

// Lab is a running cluster. Its methods may be called from several goroutines.
type Lab struct {
	ID           string
	Dir          string // of the lab's own files
	Nodes        []*Node
	ControlPlane *Host      // where istiod runs: on the fabric, with routes to all pods
	Fabric       *Namespace // between the nodes; holds only the bridge br0

	cfg   Config
	state *state
	log   *zap.Logger

	mu       sync.Mutex
	spaces   []*Namespace // all, in the order they were made
	pods     map[string]*Pod
	commands map[*Cmd]struct{}
	services []Service
	closed   bool
}

// Host is a namespace on the fabric.
type Host struct {
	*Namespace
	Name string // node1, node2 ..., or cp
	IPs  []netip.Addr
}

// Node is a host that runs pods.
type Node struct {
	*Host
	PodCIDRs []netip.Prefix // IPv4, then IPv6 when the lab has it
	RunDir   string         // private to the node: sockets and state of what runs on it
	ConfDir  string         // the node's net.d; its first conflist is read anew for each pod

	cni *libcni.CNIConfig
}

const (
	bridgeName    = "br0"
	podBridgeName = "cni0"
	conflistName  = "10-netlab.conflist"
)

// Start sweeps what dead processes left behind, then builds a lab. The caller closes it. A missing program is an error
// that names its Debian package; without root the error says so.
func Start(ctx context.Context, cfg Config) (*Lab, error) {
	if cfg.Nodes == 0 {
		cfg.Nodes = 1
	}
	if cfg.Nodes < 0 || cfg.Nodes > 200 {
		return nil, fmt.Errorf("start lab: %d nodes, want 1 to 200", cfg.Nodes)
	}
	if cfg.StateDir == "" {
		cfg.StateDir = DefaultStateDir
	}
	if cfg.CNIVersion == "" {
		cfg.CNIVersion = "1.0.0"
	}
	if cfg.Congestion == "" {
		cfg.Congestion = "reno"
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	cfg.PluginDirs = append(slices.Clone(cfg.PluginDirs), "/usr/lib/cni", "/opt/cni/bin")
	if err := requirements(cfg.PluginDirs); err != nil {
		return nil, fmt.Errorf("start lab: %w", err)
	}
	if err := Sweep(cfg.StateDir); err != nil {
		return nil, fmt.Errorf("start lab: %w", err)
	}
	st, err := newState(cfg.StateDir, cfg.Name)
	if err != nil {
		return nil, fmt.Errorf("start lab: %w", err)
	}
	l := &Lab{
		ID: st.ID, Dir: st.dir(), cfg: cfg, state: st, log: cfg.Log.Named("netlab").With(zap.String("lab", st.ID)),
		pods: map[string]*Pod{}, commands: map[*Cmd]struct{}{},
	}
	if err := l.build(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start lab %s: %w", l.ID, err), l.Close())
	}
	l.log.Info("lab started", zap.Int("nodes", len(l.Nodes)), zap.String("dir", l.Dir))
	return l, nil
}

// requirements reports all that is missing at once.
func requirements(pluginDirs []string) error {
	if os.Geteuid() != 0 {
		return ErrNotRoot
	}
	var errs []error
	for _, p := range []string{"bridge", "host-local", "loopback"} {
		if !slices.ContainsFunc(pluginDirs, func(dir string) bool {
			_, err := os.Stat(filepath.Join(dir, p))
			return err == nil
		}) {
			errs = append(errs, fmt.Errorf("no CNI plugin %q in %s: install the package containernetworking-plugins",
				p, strings.Join(pluginDirs, ", ")))
		}
	}
	if _, err := exec.LookPath("nft"); err != nil {
		errs = append(errs, fmt.Errorf("no program nft: install the package nftables: %w", err))
	}
	return errors.Join(errs...)
}

// ErrNotRoot is why Start fails for ordinary users.
var ErrNotRoot = errors.New("making network namespaces needs root")

// New starts a lab for a test and closes it at the test's end, where it also checks that nothing is left. Without root it
// skips the test, but fails it when the environment says CI=true.
func New(t testing.TB, cfg Config) *Lab {
	t.Helper()
	if cfg.Name == "" {
		cfg.Name = t.Name()
	}
	l, err := Start(t.Context(), cfg)
	if errors.Is(err, ErrNotRoot) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		left, err := Leftovers(l.cfg.StateDir, l.ID)
		if err != nil {
			t.Error(err)
		}
		for _, what := range left {
			t.Errorf("left behind by lab %s: %s", l.ID, what)
		}
	})
	return l
}

// build makes everything; what it has made so far is removed by Close.
func (l *Lab) build(ctx context.Context) error {
	if err := allowCongestion(l.state, l.cfg.Congestion); err != nil {
		return err
	}
	if err := l.buildFabric(); err != nil {
		return err
	}
	cp, err := l.addHost("cp", 2)
	if err != nil {
		return err
	}
	l.ControlPlane = cp
	for i := 1; i <= l.cfg.Nodes; i++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := l.addNode(i)
		if err != nil {
			return err
		}
		l.Nodes = append(l.Nodes, n)
	}
	return l.connectHosts()
}

func (l *Lab) addNode(i int) (*Node, error) {
	name := fmt.Sprintf("node%d", i)
	h, err := l.addHost(name, 10+i)
	if err != nil {
		return nil, err
	}
	n := &Node{Host: h, RunDir: filepath.Join(l.Dir, name, "run"), ConfDir: filepath.Join(l.Dir, name, "net.d")}
	n.PodCIDRs = append(n.PodCIDRs, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(i), 0}), 24))
	if l.cfg.IPv6 {
		a := netip.MustParseAddr("fd00:10:244::").As16()
		a[7] = byte(i)
		n.PodCIDRs = append(n.PodCIDRs, netip.PrefixFrom(netip.AddrFrom16(a), 64))
	}
	for _, dir := range []string{n.RunDir, n.ConfDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if err := n.Sysctl(nodeSysctls(l.cfg.IPv6)...); err != nil {
		return nil, fmt.Errorf("node %s: %w", name, err)
	}
	if err := n.buildPodBridge(i); err != nil {
		return nil, fmt.Errorf("node %s: %w", name, err)
	}
	var chained []byte
	if l.cfg.Chained != nil {
		chained = l.cfg.Chained(n)
	}
	n.cni = newCNI(l.cfg.PluginDirs, filepath.Join(l.Dir, name, "cni"))
	list, err := conflist(l.cfg.CNIVersion, filepath.Join(l.Dir, name, "ipam"), n.PodCIDRs, chained)
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", name, err)
	}
	if err := os.WriteFile(filepath.Join(n.ConfDir, conflistName), list, 0o600); err != nil {
		return nil, err
	}
	return n, nil
}

// Pods returns the pods there are, ordered by namespace and name.
func (l *Lab) Pods() []*Pod {
	l.mu.Lock()
	defer l.mu.Unlock()
	var ps []*Pod
	for _, p := range l.pods {
		ps = append(ps, p)
	}
	slices.SortFunc(ps, func(a, b *Pod) int {
		return strings.Compare(a.Spec.Namespace+"/"+a.Spec.Name, b.Spec.Namespace+"/"+b.Spec.Name)
	})
	return ps
}

// Keep makes the lab outlive its process: Sweep spares it, and only Remove takes it down. Close still does.
func (l *Lab) Keep() error {
	return l.state.update(func(s *state) { s.Keep = true })
}

// Close ends every process in the lab and removes the lab. CNI plugins are not called: their state goes with the lab's
// namespaces and directory. A second Close does nothing.
func (l *Lab) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	spaces := slices.Clone(l.spaces)
	var cmds []*Cmd
	for c := range l.commands {
		cmds = append(cmds, c)
	}
	l.mu.Unlock()
	for _, c := range cmds {
		c.kill()
	}
	err := remove(l.cfg.StateDir, l.ID)
	for _, c := range cmds {
		_ = c.Wait() // it was killed: how it ended says nothing
	}
	for _, n := range spaces {
		n.Close()
	}
	if err != nil {
		return fmt.Errorf("close lab %s: %w", l.ID, err)
	}
	return nil
}
