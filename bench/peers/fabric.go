package peers

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// nsPrefix begins the name of every namespace the bench makes; the process id follows, so that a later run can sweep up.
const nsPrefix = "mistbench-"

// congestion is the congestion control of every namespace. bbr without a pacing queue gives erratic ratios.
const congestion = "cubic"

// Fabric is a network of two nodes joined by a link, a client pod on the first and a server pod on the second: four network
// namespaces joined by veth pairs and routes. A contender that needs nodes to itself gets a fabric of its own, of the same shape.
type Fabric struct {
	Client, Server Pod
	// Nodes are the namespaces of the two nodes, NodeAddrs their addresses on the link between them.
	Nodes     [2]string
	NodeAddrs [2]netip.Addr
	// Congestion and MTU are as the pods' namespaces report them.
	Congestion, MTU string

	tag   string
	names []string // of all namespaces, in the order of their making
}

// perNS are the kernel settings of every namespace: the same for everybody.
var perNS = []string{
	"net.ipv4.tcp_congestion_control=" + congestion,
	"net.ipv4.ip_local_port_range=1024 65535",
	"net.ipv4.ip_local_reserved_ports=7000-7999,15000-15999",
	"net.ipv4.tcp_tw_reuse=1",
	"net.ipv4.ip_forward=1",
	// A connection that ended in a reset leaves its conntrack entry behind; ten thousand a second would fill the table.
	"net.netfilter.nf_conntrack_tcp_timeout_close=2",
	"net.netfilter.nf_conntrack_tcp_timeout_time_wait=5",
}

// PrepareHost sets what only the initial namespace can: which congestion controls a new namespace may choose. It is left as
// set, since undoing it could pull it from under another run.
func PrepareHost(ctx context.Context) error {
	const path = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	allowed := strings.Fields(string(text))
	for _, name := range allowed {
		if name == congestion {
			return nil
		}
	}
	if err := os.WriteFile(path, []byte(strings.Join(append(allowed, congestion), " ")), 0o644); err != nil {
		return fmt.Errorf("allow %s in new namespaces: %w", congestion, err)
	}
	return nil
}

// NewFabric builds a network; prefix keeps the names of two of them apart. What it made is removed again when it fails.
func NewFabric(ctx context.Context, prefix string) (_ *Fabric, err error) {
	f := &Fabric{tag: nsPrefix + strconv.Itoa(os.Getpid()) + "-" + prefix}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	f.NodeAddrs = [2]netip.Addr{netip.MustParseAddr("10.201.0.1"), netip.MustParseAddr("10.201.0.2")}
	for i, name := range []string{"n1", "n2"} {
		ns, err := f.namespace(ctx, name)
		if err != nil {
			return nil, err
		}
		f.Nodes[i] = "/run/netns/" + ns
	}
	if err := ip(ctx, f.names,
		"link add eth0 netns {1} type veth peer name eth0 netns {2}",
		"-n {1} addr add 10.201.0.1/24 dev eth0",
		"-n {2} addr add 10.201.0.2/24 dev eth0",
		"-n {1} link set eth0 up",
		"-n {2} link set eth0 up",
		"-n {1} route add 10.201.2.0/24 via 10.201.0.2",
		"-n {2} route add 10.201.1.0/24 via 10.201.0.1",
	); err != nil {
		return nil, err
	}
	if f.Client, err = f.pod(ctx, 0, "cli"); err != nil {
		return nil, err
	}
	f.Server, err = f.pod(ctx, 1, "srv")
	return f, err
}

// pod makes a pod's namespace and joins it to node i.
func (f *Fabric) pod(ctx context.Context, i int, name string) (Pod, error) {
	ns, err := f.namespace(ctx, name)
	if err != nil {
		return Pod{}, err
	}
	prefix := fmt.Sprintf("10.201.%d.", i+1)
	if err := ip(ctx, []string{ns, filepath.Base(f.Nodes[i]), prefix + "1", prefix + "2"},
		"link add eth0 netns {1} type veth peer name pod netns {2}",
		"-n {1} addr add {4}/24 dev eth0",
		"-n {2} addr add {3}/24 dev pod",
		"-n {1} link set eth0 up",
		"-n {2} link set pod up",
		"-n {1} route add default via {3}",
	); err != nil {
		return Pod{}, err
	}
	pod := Pod{NetNS: "/run/netns/" + ns, Addr: netip.MustParseAddr(prefix + "2")}
	return pod, f.inspect(ctx, pod)
}

// namespace makes and tunes a namespace and returns its name.
func (f *Fabric) namespace(ctx context.Context, name string) (string, error) {
	ns := f.tag + name
	if err := inNS(ctx, "", "ip", "netns", "add", ns); err != nil {
		return "", err
	}
	f.names = append(f.names, ns)
	if err := ip(ctx, []string{ns}, "-n {1} link set lo up"); err != nil {
		return "", err
	}
	return ns, Tune(ctx, "/run/netns/"+ns)
}

// inspect asserts the congestion control of a pod and notes its MTU.
func (f *Fabric) inspect(ctx context.Context, pod Pod) (err error) {
	if f.Congestion, err = Output(ctx, pod.NetNS, "sysctl", "-n", "net.ipv4.tcp_congestion_control"); err != nil {
		return err
	}
	if f.Congestion != congestion {
		return fmt.Errorf("congestion control in %s is %q, want %q", pod.NetNS, f.Congestion, congestion)
	}
	link, err := Output(ctx, pod.NetNS, "ip", "-o", "link", "show", "dev", "eth0")
	if err != nil {
		return err
	}
	if _, after, ok := strings.Cut(link, " mtu "); ok {
		f.MTU, _, _ = strings.Cut(after, " ")
	}
	return nil
}

// ip runs commands of ip(8), in which {1}, {2} … stand for args.
func ip(ctx context.Context, args []string, commands ...string) error {
	var swaps []string
	for i, a := range args {
		swaps = append(swaps, fmt.Sprintf("{%d}", i+1), a)
	}
	fill := strings.NewReplacer(swaps...)
	for _, c := range commands {
		if err := inNS(ctx, "", append([]string{"ip"}, strings.Fields(fill.Replace(c))...)...); err != nil {
			return err
		}
	}
	return nil
}

// Tune gives a namespace the kernel settings of every contender and makes its connections pass conntrack, as they do in a pod
// whose traffic is redirected. A namespace of somebody else's making can be tuned too.
func Tune(ctx context.Context, netns string) error {
	// A rule in the nat table loads conntrack for the namespace; this one matches nothing.
	if err := inNS(ctx, netns, "iptables", "-w", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", "192.0.2.1", "--dport", "9", "-j", "ACCEPT"); err != nil {
		return err
	}
	for _, kv := range perNS {
		if err := inNS(ctx, netns, "sysctl", "-q", "-w", kv); err != nil {
			return err
		}
	}
	return nil
}

// Close removes the network. Interfaces and rules go with their namespaces.
func (f *Fabric) Close() error {
	var errs []error
	for _, ns := range f.names {
		errs = append(errs, inNS(context.Background(), "", "ip", "netns", "del", ns))
	}
	f.names = nil
	return errors.Join(errs...)
}

// Sweep removes what a run that was killed left behind: namespaces and scratch folders that bear the id of a process no longer
// there, and whatever still runs in them. It returns the names it removed.
func Sweep(ctx context.Context) ([]string, error) {
	list, err := Output(ctx, "", "ip", "netns", "list")
	if err != nil {
		return nil, err
	}
	var swept []string
	for line := range strings.Lines(list) {
		ns, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if !orphaned(ns) {
			continue
		}
		pids, err := Output(ctx, "", "ip", "netns", "pids", ns)
		if err != nil {
			return swept, err
		}
		for _, pid := range strings.Fields(pids) {
			if n, err := strconv.Atoi(pid); err == nil {
				_ = syscall.Kill(n, syscall.SIGKILL)
			}
		}
		if err := inNS(ctx, "", "ip", "netns", "del", ns); err != nil {
			return swept, err
		}
		swept = append(swept, ns)
	}
	dirs, err := os.ReadDir(os.TempDir())
	if err != nil {
		return swept, err
	}
	for _, d := range dirs {
		if !orphaned(d.Name()) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(os.TempDir(), d.Name())); err != nil {
			return swept, err
		}
		swept = append(swept, d.Name())
	}
	return swept, nil
}

// ScratchDir makes a folder that Sweep finds when we are killed.
func ScratchDir() (string, error) {
	return os.MkdirTemp("", nsPrefix+strconv.Itoa(os.Getpid())+"-")
}

// orphaned tells whether a namespace or folder was made by a bench that is no longer alive, from the process id in its name.
func orphaned(name string) bool {
	rest, ours := strings.CutPrefix(name, nsPrefix)
	if !ours {
		return false
	}
	id, _, _ := strings.Cut(rest, "-")
	pid, err := strconv.Atoi(id)
	return err == nil && !alive(pid)
}

func alive(pid int) bool {
	err := syscall.Kill(pid, 0)
	return err == nil || errors.Is(err, syscall.EPERM)
}
