package lab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/netlab"
)

// Config says what a lab is made of. The zero value is two nodes with IPv4 and kube-proxy in nftables mode, out of the
// machine's sight.
type Config struct {
	// Name tells labs apart, and is part of the names of what they are made of; "": one is drawn.
	Name string
	// Nodes is how many nodes there are, 1 to 9; 0: two.
	Nodes int
	// DualStack gives nodes, pods and services IPv6 addresses too.
	DualStack bool
	// ProxyMode is kube-proxy's: nftables or iptables; "": nftables.
	ProxyMode string
	// MachineLink connects the machine itself, as 10.89.0.250, with routes to nodes and pods: for people. One lab at a
	// time can have it. Tests do without: Client, Kubectl and DialContext work anyway.
	MachineLink bool
	// Keep makes the lab outlive the process that starts it.
	Keep bool
	// StateDir holds one directory per lab; "": DefaultStateDir.
	StateDir string
	// CacheDir holds what was built; "": mistnet-e2e in the user's cache directory.
	CacheDir string
	// Progress is told what takes time; optional.
	Progress io.Writer
}

// Lab is a running cluster. Its methods may be called from several goroutines, but for those that start and stop the same
// node or component.
type Lab struct {
	Nodes []*Node

	state  *state
	space  *linux.NetNS // the control plane's
	client *kubernetes.Clientset
	config *rest.Config
}

// Node is a machine of the cluster.
type Node struct {
	Name     string // node1, node2 ...
	IP, IP6  netip.Addr
	PodCIDR  netip.Prefix
	PodCIDR6 netip.Prefix

	lab *Lab
}

// ErrNotRoot is why Start fails for ordinary users.
var ErrNotRoot = errors.New("a lab needs root: it makes namespaces, mounts and cgroups")

var validName = regexp.MustCompile(`^[a-z0-9]{1,16}$`)

// Start builds what is not built, removes what dead processes left, and brings a cluster up: when it returns all nodes are
// Ready and each of them gets answers from the cluster's DNS. The caller closes it.
func Start(ctx context.Context, cfg Config) (*Lab, error) {
	if cfg.Nodes == 0 {
		cfg.Nodes = 2
	}
	if cfg.ProxyMode == "" {
		cfg.ProxyMode = "nftables"
	}
	if cfg.StateDir == "" {
		cfg.StateDir = DefaultStateDir
	}
	if cfg.Progress == nil {
		cfg.Progress = io.Discard
	}
	if cfg.Name == "" {
		b := make([]byte, 3)
		_, _ = rand.Read(b) // never fails
		cfg.Name = "t" + hex.EncodeToString(b)
	}
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("start lab: %w", err)
	}
	if err := Sweep(ctx, cfg.StateDir); err != nil {
		return nil, fmt.Errorf("start lab: remove what another left: %w", err)
	}
	if err := checkInotify(inotifyInstances(cfg.Nodes), syscall.InotifyInit1); err != nil {
		return nil, fmt.Errorf("start lab: %w", err)
	}
	bins, err := Build(ctx, cfg.CacheDir, cfg.Progress)
	if err != nil {
		return nil, fmt.Errorf("start lab: %w", err)
	}
	s, err := newState(cfg, bins)
	if err != nil {
		return nil, fmt.Errorf("start lab: %w", err)
	}
	l := newLab(s)
	if err := l.bringUp(ctx, cfg.Progress); err != nil {
		if cfg.Keep {
			return nil, fmt.Errorf("start lab %s: %w (logs are in %s; then take it down)", s.Name, err, s.dir)
		}
		return nil, errors.Join(fmt.Errorf("start lab %s: %w", s.Name, err), remove(context.WithoutCancel(ctx), s))
	}
	return l, nil
}

// check reports all that is wrong or missing at once.
func (c *Config) check() error {
	if os.Geteuid() != 0 {
		return ErrNotRoot
	}
	var errs []error
	if !validName.MatchString(c.Name) {
		errs = append(errs, fmt.Errorf("name %q: want up to 16 letters a-z and digits", c.Name))
	}
	if c.Nodes < 1 || c.Nodes > 9 {
		errs = append(errs, fmt.Errorf("%d nodes: want 1 to 9", c.Nodes))
	}
	if c.ProxyMode != "nftables" && c.ProxyMode != "iptables" {
		errs = append(errs, fmt.Errorf("proxy mode %q: want nftables or iptables", c.ProxyMode))
	}
	for _, need := range []struct{ program, pkg string }{
		{"runc", "runc"}, {"ip", "iproute2"}, {"nsenter", "util-linux"}, {"unshare", "util-linux"}, {"sysctl", "procps"},
		{"iptables", "iptables"}, {"nft", "nftables"}, {"conntrack", "conntrack"},
	} {
		if _, err := exec.LookPath(need.program); err != nil {
			errs = append(errs, fmt.Errorf("no program %s: install the package %s", need.program, need.pkg))
		}
	}
	for _, plugin := range []string{"bridge", "host-local", "loopback", "portmap"} {
		if !exists(filepath.Join("/usr/lib/cni", plugin)) {
			errs = append(errs, fmt.Errorf("no CNI plugin /usr/lib/cni/%s: install the package containernetworking-plugins", plugin))
		}
	}
	return errors.Join(errs...)
}

// newState makes the lab's directory.
func newState(cfg Config, bins Binaries) (*state, error) {
	started, err := netlab.ProcessStart(os.Getpid())
	if err != nil {
		return nil, err
	}
	s := &state{
		Name: cfg.Name, PID: os.Getpid(), Started: started, Keep: cfg.Keep, Nodes: cfg.Nodes, DualStack: cfg.DualStack,
		ProxyMode: cfg.ProxyMode, MachineLink: cfg.MachineLink, Binaries: bins, dir: filepath.Join(cfg.StateDir, cfg.Name),
	}
	if err := os.MkdirAll(cfg.StateDir, 0o755); err != nil {
		return nil, err
	}
	if err := os.Mkdir(s.dir, 0o755); errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("there is a lab %s already: take it down first, or choose another name", cfg.Name)
	} else if err != nil {
		return nil, err
	}
	if err := syscall.Mount("mistnet-e2e", s.dir, "tmpfs", 0, "mode=755"); err != nil {
		return nil, errors.Join(fmt.Errorf("mount tmpfs on %s: %w", s.dir, err), os.Remove(s.dir))
	}
	return s, s.write()
}

func newLab(s *state) *Lab {
	l := &Lab{state: s}
	for i := 1; i <= s.Nodes; i++ {
		l.Nodes = append(l.Nodes, &Node{
			Name:     fmt.Sprintf("node%d", i),
			IP:       netip.AddrFrom4([4]byte{10, 89, 0, byte(10 + i)}),
			IP6:      netip.MustParseAddr(fmt.Sprintf("fd00:89::%d", 10+i)),
			PodCIDR:  netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(i), 0}), 24),
			PodCIDR6: netip.MustParsePrefix(fmt.Sprintf("fd00:244:%d::/64", i)),
			lab:      l,
		})
	}
	return l
}

// bringUp makes everything. Nodes get ready while the API server starts, which takes longest.
func (l *Lab) bringUp(ctx context.Context, progress io.Writer) error {
	began := time.Now()
	say := func(what string) { fmt.Fprintf(progress, "%5.1fs %s\n", time.Since(began).Seconds(), what) }
	for _, dir := range []string{"log", "run"} {
		if err := os.MkdirAll(l.path(dir), 0o755); err != nil {
			return err
		}
	}
	for _, module := range []string{"br_netfilter", "overlay", "nf_conntrack"} {
		_, _ = tool(ctx, "modprobe", "-q", module) // what the kernel has built in, it does not load
	}
	if err := l.writePKI(); err != nil {
		return err
	}
	if _, err := packImages(l.state.Binaries, l.path("images")); err != nil {
		return err
	}
	if err := l.buildFabric(ctx); err != nil {
		return err
	}
	if err := l.connect(); err != nil {
		return err
	}
	for _, component := range []string{"etcd", "kube-apiserver"} {
		if err := l.Start(component); err != nil {
			return err
		}
	}
	for _, n := range l.Nodes {
		if err := n.PowerOn(ctx); err != nil {
			return err
		}
	}
	if err := l.WaitForAPI(ctx); err != nil {
		return err
	}
	say("API server ready")
	for _, component := range []string{"kube-controller-manager", "kube-scheduler"} {
		if err := l.Start(component); err != nil {
			return err
		}
	}
	if err := l.deployDNS(ctx); err != nil {
		return err
	}
	for _, n := range l.Nodes {
		if err := n.WaitReady(ctx); err != nil {
			return err
		}
	}
	say("nodes ready")
	for _, n := range l.Nodes {
		if err := n.waitForDNS(ctx); err != nil {
			return err
		}
	}
	say("DNS answers on every node")
	return nil
}

// Open finds a running lab. Its Close takes the lab down, whoever started it; CloseHandle does not.
func Open(stateDir, name string) (*Lab, error) {
	if stateDir == "" {
		stateDir = DefaultStateDir
	}
	s, err := readState(stateDir, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no lab %s", name)
	}
	if err != nil {
		return nil, err
	}
	l := newLab(s)
	return l, l.connect()
}

// Close ends every process of the lab and removes all of it.
func (l *Lab) Close() error {
	return errors.Join(l.CloseHandle(), remove(context.Background(), l.state))
}

// CloseHandle lets go of the lab, which stays.
func (l *Lab) CloseHandle() error {
	if l.space == nil {
		return nil
	}
	return l.space.Close()
}

// Remove takes down the lab of that name, in whatever state it is. It is not an error when there is none.
func Remove(ctx context.Context, stateDir, name string) error {
	if stateDir == "" {
		stateDir = DefaultStateDir
	}
	s, err := readState(stateDir, name)
	if errors.Is(err, fs.ErrNotExist) {
		s, err = &state{Name: name, MachineLink: true, dir: filepath.Join(stateDir, name)}, nil
	}
	if err != nil {
		return err
	}
	return remove(ctx, s)
}

// New starts a lab for a test and closes it at the test's end, where it checks that nothing is left. When the environment
// names a running lab in MISTNET_E2E_LAB, that one is used and left alone: for people who write tests. Without root it
// skips the test, but fails it when the environment says CI=true.
func New(t testing.TB, cfg Config) *Lab {
	t.Helper()
	if name := os.Getenv("MISTNET_E2E_LAB"); name != "" {
		l, err := Open(cfg.StateDir, name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.CloseHandle() })
		return l
	}
	l, err := Start(t.Context(), cfg)
	if errors.Is(err, ErrNotRoot) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(l.tails())
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		left, err := Leftovers(cfg.StateDir, l.Name())
		if err != nil {
			t.Error(err)
		}
		for _, what := range left {
			t.Errorf("left behind by lab %s: %s", l.Name(), what)
		}
	})
	return l
}

// FromEnv returns what the environment says of labs for tests: MISTNET_E2E_NODES, MISTNET_E2E_PROXY and MISTNET_E2E_DUAL=1.
// Start refuses what makes no sense.
func FromEnv() Config {
	cfg := Config{ProxyMode: os.Getenv("MISTNET_E2E_PROXY"), DualStack: os.Getenv("MISTNET_E2E_DUAL") == "1"}
	if nodes := os.Getenv("MISTNET_E2E_NODES"); nodes != "" {
		if n, err := strconv.Atoi(nodes); err == nil {
			cfg.Nodes = n
		} else {
			cfg.Nodes = -1
		}
	}
	return cfg
}

// Name is the lab's.
func (l *Lab) Name() string { return l.state.Name }

// DualStack reports whether the lab has IPv6.
func (l *Lab) DualStack() bool { return l.state.DualStack }

// ProxyMode is kube-proxy's: nftables or iptables.
func (l *Lab) ProxyMode() string { return l.state.ProxyMode }

// Kubeconfig is the path of an administrator's kubeconfig. The address in it is reached from the machine only when the lab
// is linked to it.
func (l *Lab) Kubeconfig() string { return l.path("pki", "admin.kubeconfig") }

// Bin is the directory with kubectl and the other programs of Kubernetes.
func (l *Lab) Bin() string { return l.state.Binaries.Kube }

// Node returns node i, counted from 1 as in its name.
func (l *Lab) Node(i int) *Node { return l.Nodes[i-1] }

// path names a file in the lab's directory.
func (l *Lab) path(elem ...string) string {
	return filepath.Join(append([]string{l.state.dir}, elem...)...)
}
