package lab

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/template"
	"time"

	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/netlab"
)

//go:embed node.sh files
var files embed.FS

// The components of a node.
const (
	Containerd = "containerd"
	Kubelet    = "kubelet"
	KubeProxy  = "kube-proxy"
)

// PowerOn starts the node with the disk it has. It does not wait for it; see WaitReady.
func (n *Node) PowerOn(ctx context.Context) error {
	l := n.lab
	if n.running() {
		return fmt.Errorf("power on %s: it runs", n.Name)
	}
	if err := n.writeFiles(); err != nil {
		return err
	}
	if err := n.unlink(ctx); err != nil {
		return err
	}
	if err := n.link(ctx); err != nil {
		return err
	}
	groups, err := makeCgroups(l.state.Name, n.Name)
	if err != nil {
		return err
	}
	flags := "--node-ip=" + n.IP.String()
	if l.state.DualStack {
		flags += "," + n.IP6.String()
	}
	cmd := exec.Command("bash", l.path(n.Name, "node.sh"))
	cmd.Env = append(os.Environ(), "NODE="+n.Name, "NODE_IP="+n.IP.String(), "DIR="+l.state.dir, "KUBE="+l.state.Binaries.Kube,
		"CONTAINERD="+l.state.Binaries.Containerd, "CGROUPS="+strings.Join(groups, " "), "KUBELET_FLAGS="+flags)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true, Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWPID,
	}
	pid, err := l.spawn(l.netns(n.Name), cmd, l.path("log", n.Name+".log"))
	if err != nil {
		return fmt.Errorf("power on %s: %w", n.Name, err)
	}
	return os.WriteFile(n.pidFile(), []byte(strconv.Itoa(pid)), 0o644)
}

// PowerOff pulls the plug: everything on the node ends at once, and its disk stays. Nobody is told; the API server goes on
// showing the node as Ready until the node's lease runs out.
func (n *Node) PowerOff(ctx context.Context) error {
	if err := endPIDFile(ctx, n.pidFile()); err != nil {
		return fmt.Errorf("power off %s: %w", n.Name, err)
	}
	if err := n.unlink(ctx); err != nil {
		return err
	}
	return removeCgroups(filepath.Join(cgroupName(n.lab.state.Name), n.Name))
}

func (n *Node) pidFile() string { return n.lab.path("run", n.Name+".pid") }

func (n *Node) pid() (int, error) {
	raw, err := os.ReadFile(n.pidFile())
	if err != nil {
		return 0, fmt.Errorf("%s is off", n.Name)
	}
	return strconv.Atoi(string(raw))
}

func (n *Node) running() bool {
	pid, err := n.pid()
	if err == nil {
		_, err = netlab.ProcessStart(pid)
	}
	return err == nil
}

// writeFiles writes what node.sh and the node's components read.
func (n *Node) writeFiles() error {
	if err := os.MkdirAll(n.lab.path(n.Name), 0o755); err != nil {
		return err
	}
	entries, err := files.ReadDir("files")
	if err != nil {
		return err
	}
	for _, e := range entries {
		body, err := n.lab.render("files/"+e.Name(), n)
		if err != nil {
			return err
		}
		if err := os.WriteFile(n.lab.path(n.Name, e.Name()), body, 0o644); err != nil {
			return err
		}
	}
	script, err := files.ReadFile("node.sh")
	if err != nil {
		return err
	}
	return os.WriteFile(n.lab.path(n.Name, "node.sh"), script, 0o755)
}

// render fills in one of the files; n is nil for what is not a node's.
func (l *Lab) render(name string, n *Node) ([]byte, error) {
	t, err := template.ParseFS(files, name)
	if err != nil {
		return nil, err
	}
	values := struct {
		Pause, CoreDNS, ProxyMode, PodRanges, Name string
		DNS                                        netip.Addr
		DualStack                                  bool
		PodCIDR, PodCIDR6                          netip.Prefix
	}{Pause: PauseImage, CoreDNS: CoreDNSImage, ProxyMode: l.state.ProxyMode, PodRanges: podRange, DNS: dnsIP, DualStack: l.state.DualStack}
	if l.state.DualStack {
		values.PodRanges += "," + podRange6
	}
	if n != nil {
		values.Name, values.PodCIDR, values.PodCIDR6 = n.Name, n.PodCIDR, n.PodCIDR6
	}
	var b bytes.Buffer
	err = t.Execute(&b, values)
	return b.Bytes(), err
}

// Command prepares a program to be run on the node, in all of its namespaces.
func (n *Node) Command(ctx context.Context, args ...string) (*exec.Cmd, error) {
	pid, err := n.pid()
	if err != nil {
		return nil, err
	}
	// env sets PATH inside: nsenter looks for the program with its own.
	enter := []string{"-t", strconv.Itoa(pid), "-a", "--", "/usr/bin/env",
		"PATH=/lab/containerd:/lab/kube:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"CONTAINERD_NAMESPACE=k8s.io", "KUBECONFIG=/lab/pki/admin.kubeconfig"}
	return exec.CommandContext(ctx, "nsenter", append(enter, args...)...), nil
}

// Exec runs a program on the node and returns its standard output; standard error is part of the error.
func (n *Node) Exec(ctx context.Context, args ...string) (string, error) {
	cmd, err := n.Command(ctx, args...)
	if err != nil {
		return "", err
	}
	return output(cmd, fmt.Sprintf("%s on %s", strings.Join(args, " "), n.Name))
}

func output(cmd *exec.Cmd, what string) (string, error) {
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s", what, err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// StopComponent kills one of the node's components with SIGKILL, and it stays down.
func (n *Node) StopComponent(ctx context.Context, component string) error {
	if err := n.known(component); err != nil {
		return err
	}
	if _, err := n.Exec(ctx, "touch", "/run/"+component+".stop"); err != nil {
		return err
	}
	_, err := n.kill(ctx, component)
	return err
}

// StartComponent undoes StopComponent.
func (n *Node) StartComponent(ctx context.Context, component string) error {
	if err := n.known(component); err != nil {
		return err
	}
	_, err := n.Exec(ctx, "rm", "-f", "/run/"+component+".stop")
	return err
}

// KillComponent kills one of the node's components with SIGKILL and waits until its supervisor has started it again.
func (n *Node) KillComponent(ctx context.Context, component string) error {
	if err := n.known(component); err != nil {
		return err
	}
	old, err := n.kill(ctx, component)
	if err != nil {
		return err
	}
	return until(ctx, endTimeout, component+" to be started again", func(ctx context.Context) error {
		pid, err := n.Exec(ctx, "cat", "/run/"+component+".pid")
		if err == nil && pid == old {
			return errors.New("its process file still names the old one")
		}
		return err
	})
}

// kill returns the process it has killed.
func (n *Node) kill(ctx context.Context, component string) (string, error) {
	pid, err := n.Exec(ctx, "cat", "/run/"+component+".pid")
	if err != nil {
		return "", fmt.Errorf("%s does not run on %s: %w", component, n.Name, err)
	}
	_, err = n.Exec(ctx, "kill", "-9", strings.TrimSpace(pid))
	return pid, err
}

func (n *Node) known(component string) error {
	switch component {
	case Containerd, Kubelet, KubeProxy:
		return nil
	}
	return fmt.Errorf("no component %q on %s: want %s, %s or %s", component, n.Name, Containerd, Kubelet, KubeProxy)
}

// DialContext connects from the node itself, as a process on it would.
func (n *Node) DialContext(ctx context.Context, _, address string) (net.Conn, error) {
	return dialIn(ctx, filepath.Join(netnsDir, n.lab.netns(n.Name)), address)
}

func dialIn(ctx context.Context, netns, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	ns, err := linux.OpenNetNS(netns)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	c, err := ns.Dial(ctx, linux.DialOptions{Remote: to, Timeout: 10 * time.Second})
	if err != nil {
		return nil, err // not c, which is a nil that an interface would hide
	}
	return c, nil
}

// within runs fn in a network namespace.
func within(netns string, fn func() error) error {
	ns, err := linux.OpenNetNS(netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(fn)
}

// readyTimeout bounds how long a node or the control plane takes to work; on a busy machine that can be a minute.
const readyTimeout = 3 * time.Minute

// waitForDNS waits until the node gets an answer from the cluster's DNS by its service address: then kube-proxy works.
func (n *Node) waitForDNS(ctx context.Context) error {
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return n.DialContext(ctx, network, netip.AddrPortFrom(dnsIP, 53).String())
	}}
	return until(ctx, readyTimeout, "DNS on "+n.Name, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err := r.LookupHost(ctx, "kubernetes.default.svc.cluster.local.")
		return err
	})
}
