package peers

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// nsPrefix begins the name of every namespace the bench makes; the process id follows, so that a later run can sweep up.
const nsPrefix = "mistbench-"

// congestion is the congestion control of every namespace. bbr without a pacing queue gives erratic ratios.
const congestion = "cubic"

// Fabric is the network of a run: client pod – node – node – server pod, in four namespaces joined by veth pairs and routes.
type Fabric struct {
	Client, Server Pod
	// Congestion and MTU are as the pods' namespaces report them.
	Congestion, MTU string
	names           []string
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

// NewFabric builds the network. What it made is removed again when it fails.
func NewFabric(ctx context.Context) (_ *Fabric, err error) {
	f := &Fabric{}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	tag := nsPrefix + strconv.Itoa(os.Getpid()) + "-"
	cli, n1, n2, srv := tag+"cli", tag+"n1", tag+"n2", tag+"srv"
	for _, ns := range []string{cli, n1, n2, srv} {
		if err := inNS(ctx, "", "ip", "netns", "add", ns); err != nil {
			return nil, err
		}
		f.names = append(f.names, ns)
	}
	f.Client = Pod{NetNS: "/run/netns/" + cli, Addr: netip.MustParseAddr("10.201.1.2")}
	f.Server = Pod{NetNS: "/run/netns/" + srv, Addr: netip.MustParseAddr("10.201.2.2")}
	steps := fmt.Sprintf(`
link add eth0 netns %[1]s type veth peer name pod netns %[2]s
link add eth0 netns %[2]s type veth peer name eth0 netns %[3]s
link add eth0 netns %[4]s type veth peer name pod netns %[3]s
-n %[1]s addr add 10.201.1.2/24 dev eth0
-n %[2]s addr add 10.201.1.1/24 dev pod
-n %[2]s addr add 10.201.0.1/24 dev eth0
-n %[3]s addr add 10.201.0.2/24 dev eth0
-n %[3]s addr add 10.201.2.1/24 dev pod
-n %[4]s addr add 10.201.2.2/24 dev eth0
-n %[1]s link set lo up
-n %[1]s link set eth0 up
-n %[2]s link set lo up
-n %[2]s link set pod up
-n %[2]s link set eth0 up
-n %[3]s link set lo up
-n %[3]s link set pod up
-n %[3]s link set eth0 up
-n %[4]s link set lo up
-n %[4]s link set eth0 up
-n %[1]s route add default via 10.201.1.1
-n %[2]s route add 10.201.2.0/24 via 10.201.0.2
-n %[3]s route add 10.201.1.0/24 via 10.201.0.1
-n %[4]s route add default via 10.201.2.1`, cli, n1, n2, srv)
	for line := range strings.Lines(strings.TrimSpace(steps)) {
		if err := inNS(ctx, "", append([]string{"ip"}, strings.Fields(line)...)...); err != nil {
			return nil, err
		}
	}
	for _, ns := range f.names {
		if err := Tune(ctx, "/run/netns/"+ns); err != nil {
			return nil, err
		}
	}
	if f.Congestion, err = Output(ctx, f.Client.NetNS, "sysctl", "-n", "net.ipv4.tcp_congestion_control"); err != nil {
		return nil, err
	}
	if f.Congestion != congestion {
		return nil, fmt.Errorf("congestion control in %s is %q, want %q", cli, f.Congestion, congestion)
	}
	link, err := Output(ctx, f.Client.NetNS, "ip", "-o", "link", "show", "dev", "eth0")
	if err != nil {
		return nil, err
	}
	if _, after, ok := strings.Cut(link, " mtu "); ok {
		f.MTU, _, _ = strings.Cut(after, " ")
	}
	return f, nil
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

// Sweep removes what a run that was killed left behind: namespaces that bear the id of a process no longer there, and whatever
// still runs in them. It returns the names it removed.
func Sweep(ctx context.Context) ([]string, error) {
	list, err := Output(ctx, "", "ip", "netns", "list")
	if err != nil {
		return nil, err
	}
	var swept []string
	for _, ns := range leftovers(list, alive) {
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
	return swept, nil
}

// leftovers picks from the output of ip netns list our namespaces whose maker is not alive.
func leftovers(list string, alive func(pid int) bool) []string {
	var names []string
	for line := range strings.Lines(list) {
		ns, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		rest, ours := strings.CutPrefix(ns, nsPrefix)
		if !ours {
			continue
		}
		id, _, _ := strings.Cut(rest, "-")
		if pid, err := strconv.Atoi(id); err == nil && !alive(pid) {
			names = append(names, ns)
		}
	}
	return names
}

func alive(pid int) bool {
	err := syscall.Kill(pid, 0)
	return err == nil || errors.Is(err, syscall.EPERM)
}
