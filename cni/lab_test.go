package cni_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/netlab"
)

// links makes a directory in which the test binary goes by the names of our programs.
func links(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"istio-cni", "cni-agent"} {
		if err := os.Symlink(self, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// startAgent runs the agent as a process of its own on the lab's first node.
func (n *node) startAgent(lab *netlab.Lab, bin string) *netlab.Cmd {
	n.t.Helper()
	host := lab.Nodes[0]
	c := lab.Command(n.t.Context(), host.Namespace, filepath.Join(bin, "cni-agent"),
		"-config-dir", n.dir("config"), "-status-dir", n.dir("status"), "-run-dir", host.RunDir,
		"-ztunnel-uds-address", n.dir("z"), "-listen", "127.0.0.1:15014", "-log-level", "debug", "-host-probe")
	c.Stdout, c.Stderr = n.t.Output(), n.t.Output()
	if err := c.Start(); err != nil {
		n.t.Fatal(err)
	}
	n.eventually("the agent is ready", func() bool { return strings.Contains(page(lab, "/readyz"), "ready\n") })
	return c
}

// page reads one of the agent's pages from inside its node.
func page(lab *netlab.Lab, path string) string {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return lab.Nodes[0].Dial(ctx, linux.DialOptions{Remote: netip.MustParseAddrPort(addr), Timeout: time.Second})
		},
	}}
	resp, err := client.Get("http://127.0.0.1:15014" + path)
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return ""
	}
	return string(b)
}

// serve answers every connection with what it says, and the caller's address as it sees it.
func serve(t *testing.T, in *netlab.Pod, addr netip.AddrPort, o linux.ListenOptions, says func(*net.TCPConn) string) {
	t.Helper()
	o.Addr = addr
	ln, err := in.Listen(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.AcceptTCP()
			if err != nil {
				return
			}
			io.WriteString(c, says(c))
			c.Close()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
}

func remote(c *net.TCPConn) string {
	return c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().String()
}

// call connects from a pod and returns what it hears, or the error.
func call(t *testing.T, from *netlab.Pod, o linux.DialOptions) (string, error) {
	t.Helper()
	o.Timeout = 3 * time.Second
	c, err := from.Dial(t.Context(), o)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	b, err := io.ReadAll(c)
	return string(b), err
}

func TestARealChainOnARealNode(t *testing.T) {
	n := newNode(t)
	bin := links(t)
	lab := netlab.New(t, netlab.Config{
		IPv6: true, PluginDirs: []string{bin},
		Chained: func(h *netlab.Node) []byte {
			return fmt.Appendf(nil, `{"type":"istio-cni","cni_agent_run_dir":%q}`, h.RunDir)
		},
	})
	host, ctx := lab.Nodes[0], t.Context()
	pods := podYAML("shop", "web-1", "u-1", "")
	n.write("all.yaml", namespace("shop", "ambient")+"---\n"+namespace("plain", "")+pods)
	n.write("plain.yaml", podYAML("plain", "db-1", "u-2", ""))
	web := netlab.PodSpec{Namespace: "shop", Name: "web-1", UID: "u-1"}

	if _, err := lab.AddPod(ctx, host, web); err == nil || !strings.Contains(err.Error(), "try again later") {
		t.Fatalf("AddPod without an agent = %v, want an error that says to try again later", err)
	}
	agent := n.startAgent(lab, bin)
	if _, err := lab.AddPod(ctx, host, web); err == nil || !strings.Contains(err.Error(), "no ztunnel is connected") {
		t.Fatalf("AddPod without a ztunnel = %v, want an error that says so", err)
	}
	z, _ := n.ztunnel()
	z.await("synced []")
	p, err := lab.AddPod(ctx, host, web)
	if err != nil {
		t.Fatal(err)
	}
	db, err := lab.AddPod(ctx, host, netlab.PodSpec{Namespace: "plain", Name: "db-1", UID: "u-2"})
	if err != nil {
		t.Fatal(err)
	}
	status := n.redirection("shop/web-1", "enabled")
	var ips []netip.Addr
	for _, ip := range status.Status.PodIPs {
		ips = append(ips, netip.MustParseAddr(ip.IP))
	}
	if d := cmp.Diff(p.IPs, ips, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("podIPs (-want +got):\n%s", d)
	}
	if err := lab.CheckPod(ctx, p); err != nil {
		t.Error(err)
	}
	t.Run("every way a packet can go", func(t *testing.T) { captured(t, p, db) }) // its listeners end with it
	if got := page(lab, "/metrics"); !strings.Contains(got, `istio_cni_plugin_requests_total{response_code="200"}`) ||
		!strings.Contains(got, "ztunnel_connected 1") || !strings.Contains(got, `nodeagent_reconcile_events_total{type="add"}`) {
		t.Errorf("metrics are\n%s", got)
	}

	// The agent dies. What runs stays captured; what ends may end; what starts waits.
	if err := agent.Kill(); err == nil {
		t.Error("a killed agent ended well")
	}
	refused(t, db, p, p.IPs)
	if err := lab.DelPod(ctx, db); err != nil {
		t.Errorf("DelPod without an agent = %v", err)
	}
	if _, err := lab.AddPod(ctx, host, netlab.PodSpec{Namespace: "plain", Name: "db-1", UID: "u-2"}); err == nil {
		t.Error("AddPod without an agent succeeded")
	}
	agent = n.startAgent(lab, bin)
	n.redirection("plain/db-1", "gone")
	z.await("synced [u-1]")
	if err := lab.CheckPod(ctx, p); err != nil {
		t.Error(err)
	}

	// The label goes: traffic is plain again, and the application has not noticed.
	db, err = lab.AddPod(ctx, host, netlab.PodSpec{Namespace: "plain", Name: "db-1", UID: "u-2"})
	if err != nil {
		t.Fatal(err)
	}
	n.write("all.yaml", namespace("shop", "")+pods)
	z.await("del u-1")
	n.redirection("shop/web-1", "")
	for _, ip := range p.IPs {
		serve(t, p, netip.AddrPortFrom(ip, 9000), linux.ListenOptions{}, remote)
		got, err := call(t, db, linux.DialOptions{Remote: netip.AddrPortFrom(ip, 9000)})
		want := db.IPs[0]
		if ip.Is6() {
			want = db.IPs[1]
		}
		if err != nil || got != want.String() {
			t.Errorf("call of a released pod at %s = %q, %v; want %s", ip, got, err, want)
		}
	}
	if err := agent.Stop(10 * time.Second); err != nil {
		t.Errorf("agent on SIGTERM: %v", err)
	}
}

// refused checks that nothing gets through to or from a captured pod whose ztunnel is not there.
func refused(t *testing.T, plain, p *netlab.Pod, ips []netip.Addr) {
	t.Helper()
	for i, ip := range ips {
		for name, c := range map[string]struct {
			from, to *netlab.Pod
			addr     netip.Addr
		}{"into": {plain, p, ip}, "out of": {p, plain, plain.IPs[i]}} {
			_, err := call(t, c.from, linux.DialOptions{Remote: netip.AddrPortFrom(c.addr, 8000)})
			if !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("call %s a captured pod without a ztunnel, to %s = %v, want refused", name, c.addr, err)
			}
		}
	}
}

// captured checks every way a packet of a captured pod can go, for each of its addresses. Listeners stand for ztunnel.
func captured(t *testing.T, p, plain *netlab.Pod) {
	t.Helper()
	for i, ip := range p.IPs {
		app := netip.AddrPortFrom(ip, 8000)
		serve(t, p, app, linux.ListenOptions{}, func(c *net.TCPConn) string { return "app hears " + remote(c) })
		serve(t, plain, netip.AddrPortFrom(plain.IPs[i], 8000), linux.ListenOptions{},
			func(c *net.TCPConn) string { return "plain hears " + remote(c) })
	}
	refused(t, plain, p, p.IPs)
	for i, probe := range []string{"169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"} { // a kubelet's health check
		c, err := p.Node.Dial(t.Context(), linux.DialOptions{Remote: netip.AddrPortFrom(p.IPs[i], 8000), Timeout: 3 * time.Second})
		if err != nil {
			t.Errorf("probe of %s: %v", p.IPs[i], err)
			continue
		}
		if got, err := io.ReadAll(c); err != nil || string(got) != "app hears "+probe {
			t.Errorf("probe of %s: heard %q, %v; want that the app hears %s", p.IPs[i], got, err, probe)
		}
		c.Close()
	}
	for i, ip := range p.IPs {
		wildcard, loopback := netip.IPv4Unspecified(), netip.MustParseAddr("127.0.0.1")
		stranger := netip.MustParseAddr("192.0.2.7")
		if ip.Is6() {
			wildcard, loopback, stranger = netip.IPv6Unspecified(), netip.IPv6Loopback(), netip.MustParseAddr("2001:db8::7")
		}
		for _, port := range []uint16{15001, 15006, 15008} {
			says := func(c *net.TCPConn) string {
				dst, err := linux.OriginalDst(c)
				return fmt.Sprintf("%d from %s to %v %v", port, remote(c), dst, err)
			}
			addr := netip.AddrPortFrom(wildcard, port)
			if wildcard.Is6() { // [::] is taken by IPv4 of the same port: be precise
				addr = netip.AddrPortFrom(ip, port)
				if port == 15001 {
					addr = netip.AddrPortFrom(netip.IPv6Loopback(), port)
				}
			}
			serve(t, p, addr, linux.ListenOptions{Mark: 0x539, ReusePort: true, Transparent: true}, says)
		}
		serve(t, p, netip.AddrPortFrom(loopback, 7000), linux.ListenOptions{}, func(*net.TCPConn) string { return "local" })
		out, in := netip.AddrPortFrom(plain.IPs[i], 8000), netip.AddrPortFrom(ip, 8000)
		hbone := netip.AddrPortFrom(ip, 15008)
		for _, c := range []struct {
			name string
			from *netlab.Pod
			dial linux.DialOptions
			want string
		}{
			{"outbound goes to 15001", p, linux.DialOptions{Remote: out}, fmt.Sprintf("15001 from %s to %s <nil>", ip, out)},
			{"inbound goes to 15006", plain, linux.DialOptions{Remote: in}, fmt.Sprintf("15006 from %s to %s <nil>", plain.IPs[i], in)},
			{"HBONE goes to 15008", plain, linux.DialOptions{Remote: hbone}, fmt.Sprintf("15008 from %s to %s <nil>", plain.IPs[i], hbone)},
			{"what ztunnel sends goes out", p, linux.DialOptions{Remote: out, Mark: 0x539}, "plain hears " + ip.String()},
			{"ztunnel speaks to the app as the caller", p, linux.DialOptions{Remote: in, Mark: 0x539, Local: stranger},
				"app hears " + stranger.String()},
			{"the pod speaks to itself", p, linux.DialOptions{Remote: in}, "app hears " + ip.String()},
			{"loopback is left alone", p, linux.DialOptions{Remote: netip.AddrPortFrom(loopback, 7000)}, "local"},
		} {
			got, err := call(t, c.from, c.dial)
			if err != nil || got != c.want {
				t.Errorf("%s: heard %q, %v; want %q", c.name, got, err, c.want)
			}
		}
	}
}

func TestWithoutCapNetAdmin(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("setpriv"); err != nil {
		t.Fatal("setpriv (package util-linux) is missing")
	}
	dir := t.TempDir()
	cmd := exec.Command("setpriv", "--bounding-set=-net_admin", filepath.Join(links(t), "cni-agent"),
		"-config-dir", dir, "-run-dir", dir, "-listen", "")
	var out strings.Builder
	cmd.Stderr = &out
	err := cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() == 0 {
		t.Errorf("agent ended with %v, want an exit status", err)
	}
	want := "cni-agent: CAP_NET_ADMIN is missing: the agent changes the network of pods, run it as root\n"
	if out.String() != want {
		t.Errorf("standard error is %q, want %q", out.String(), want)
	}
}
