package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Addresses. Several labs may use the same ones at a time: their namespaces do not see each other.
var (
	controlPlaneIP  = netip.MustParseAddr("10.89.0.1")
	controlPlaneIP6 = netip.MustParseAddr("fd00:89::1")
	machineIP       = netip.MustParseAddr("10.89.0.250") // of the machine itself, when the lab is linked to it
	serviceIP       = netip.MustParseAddr("10.96.0.1")   // of Service default/kubernetes
	serviceIP6      = netip.MustParseAddr("fd00:96::1")
	dnsIP           = netip.MustParseAddr("10.96.0.10")
)

const (
	apiPort      = 6443
	podRange     = "10.244.0.0/16"
	podRange6    = "fd00:244::/32" // holds every node's /64, which a /48 would not
	serviceRange = "10.96.0.0/16"
	service6     = "fd00:96::/112"
	netnsDir     = "/run/netns"
	machineLink  = "me2e-root"
)

// tool runs a program of the machine; what it printed is part of the error.
func tool(ctx context.Context, name string, args ...string) (string, error) {
	return toolIn(ctx, nil, name, args...)
}

func toolIn(ctx context.Context, stdin []byte, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// ip runs lines of ip(8) inside a network namespace; "": the machine's own.
func ip(ctx context.Context, netns string, lines ...string) error {
	args := []string{"-batch", "-"}
	if netns != "" {
		args = append([]string{"-n", netns}, args...)
	}
	_, err := toolIn(ctx, []byte(strings.Join(lines, "\n")+"\n"), "ip", args...)
	return err
}

// sysctlIn sets values inside a network namespace.
func sysctlIn(ctx context.Context, netns string, pairs ...string) error {
	_, err := tool(ctx, "nsenter", append([]string{"--net=" + filepath.Join(netnsDir, netns), "sysctl", "-qw"}, pairs...)...)
	return err
}

func (l *Lab) netns(host string) string { return netnsPrefix(l.state.Name) + host }

func netnsPrefix(name string) string { return "me2e-" + name + "-" }

// buildFabric makes the control plane's namespace, which is also the network between the nodes.
func (l *Lab) buildFabric(ctx context.Context) error {
	cp := l.netns("cp")
	if err := ip(ctx, "", "netns add "+cp); err != nil {
		return err
	}
	if err := ip(ctx, cp,
		"link set lo up",
		"link add lab0 type bridge",
		"addr add "+controlPlaneIP.String()+"/24 dev lab0",
		"addr add "+controlPlaneIP6.String()+"/64 dev lab0 nodad",
		"link set lab0 up",
	); err != nil {
		return err
	}
	// Frames between nodes are none of the control plane's packet filter's business.
	if err := sysctlIn(ctx, cp, "net.bridge.bridge-nf-call-iptables=0", "net.bridge.bridge-nf-call-ip6tables=0",
		"net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"); err != nil {
		return err
	}
	// The API server dials webhooks in pods.
	var routes []string
	for _, n := range l.Nodes {
		routes = append(routes, n.routes()...)
	}
	if err := ip(ctx, cp, routes...); err != nil {
		return err
	}
	if !l.state.MachineLink {
		return nil
	}
	if err := ip(ctx, "",
		fmt.Sprintf("link add %s type veth peer name machine netns %s", machineLink, cp),
		fmt.Sprintf("addr add %s/24 dev %s", machineIP, machineLink),
		"link set "+machineLink+" up",
		fmt.Sprintf("route add %s via %s", podRange, controlPlaneIP),
	); err != nil {
		return fmt.Errorf("link the lab to the machine (is another lab linked, or %s in use here?): %w", podRange, err)
	}
	return ip(ctx, cp, "link set machine master lab0 up")
}

// routes lead to the node's pods.
func (n *Node) routes() []string {
	return []string{
		fmt.Sprintf("route add %s via %s", n.PodCIDR, n.IP),
		fmt.Sprintf("route add %s via %s", n.PodCIDR6, n.IP6),
	}
}

// link makes the node's namespace and its cable to the fabric.
func (n *Node) link(ctx context.Context) error {
	cp, ns := n.lab.netns("cp"), n.lab.netns(n.Name)
	if err := ip(ctx, "", "netns add "+ns); err != nil {
		return err
	}
	if err := ip(ctx, cp,
		fmt.Sprintf("link add %s type veth peer name eth0 netns %s", n.Name, ns),
		fmt.Sprintf("link set %s master lab0 up", n.Name),
	); err != nil {
		return err
	}
	lines := []string{
		"link set lo up",
		fmt.Sprintf("addr add %s/24 dev eth0", n.IP),
		fmt.Sprintf("addr add %s/64 dev eth0 nodad", n.IP6),
		"link set eth0 up",
		"route add default via " + controlPlaneIP.String(),
		"route add ::/0 via " + controlPlaneIP6.String(),
	}
	for _, other := range n.lab.Nodes {
		if other != n {
			lines = append(lines, other.routes()...)
		}
	}
	if err := ip(ctx, ns, lines...); err != nil {
		return err
	}
	return sysctlIn(ctx, ns, "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1",
		"net.bridge.bridge-nf-call-iptables=1", "net.bridge.bridge-nf-call-ip6tables=1")
}

// unlink removes both. The cable goes first and by its end on the fabric: a namespace gives its links back only some time
// after it was deleted.
func (n *Node) unlink(ctx context.Context) error {
	cp, ns := n.lab.netns("cp"), n.lab.netns(n.Name)
	if exists(filepath.Join(netnsDir, cp)) {
		_ = ip(ctx, cp, "link del "+n.Name) // not there after an incomplete start
	}
	if !exists(filepath.Join(netnsDir, ns)) {
		return nil
	}
	return ip(ctx, "", "netns del "+ns)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
