package netlab_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/netlab"
)

// echo serves in a namespace: each line comes back behind the client's address.
func echo(t *testing.T, ns *netlab.Namespace, port uint16) {
	t.Helper()
	l, err := ns.Listen(t.Context(), linux.ListenOptions{Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), port)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
				to := c.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
				line, err := bufio.NewReader(c).ReadString('\n')
				if err == nil {
					fmt.Fprintf(c, "%s %s %s", from, to, line)
				}
			}()
		}
	}()
}

// call sends a line from a namespace and returns what comes back.
func call(t *testing.T, ns *netlab.Namespace, to netip.AddrPort, line string) string {
	t.Helper()
	c, err := ns.Dial(t.Context(), linux.DialOptions{Remote: to, Timeout: 5 * time.Second})
	if err != nil {
		t.Fatalf("from %s: %v", ns.NSName, err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatalf("from %s to %s: %v", ns.NSName, to, err)
	}
	return strings.TrimSpace(string(got))
}

func addPod(t *testing.T, l *netlab.Lab, node int, name string) *netlab.Pod {
	t.Helper()
	p, err := l.AddPod(t.Context(), l.Nodes[node], netlab.PodSpec{Namespace: "shop", Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestTwoNodes(t *testing.T) {
	l := netlab.New(t, netlab.Config{Nodes: 2, IPv6: true})
	client, near, far := addPod(t, l, 0, "client"), addPod(t, l, 0, "near"), addPod(t, l, 1, "far")
	echo(t, near.Namespace, 80)
	echo(t, far.Namespace, 80)
	if _, err := l.AddPod(t.Context(), l.Nodes[0], far.Spec); err == nil {
		t.Error("a pod was added twice")
	}
	capture, err := l.Capture(t.Context())
	if err != nil {
		t.Fatal(err)
	}

	for family := range 2 {
		for _, to := range []*netlab.Pod{near, far} {
			line := "to " + to.Spec.Name + " at " + to.IPs[family].String()
			want := fmt.Sprintf("%s %s %s", client.IPs[family], to.IPs[family], line)
			if got := call(t, client.Namespace, netip.AddrPortFrom(to.IPs[family], 80), line); got != want {
				t.Errorf("answer = %q, want %q", got, want)
			}
			crossed := to == far
			if got := capture.Contains([]byte(line)); got != crossed {
				t.Errorf("capture contains %q: %v, want %v", line, got, crossed)
			}
		}
		// The control plane and the nodes themselves reach pods, too.
		for _, from := range []*netlab.Host{l.ControlPlane, l.Nodes[0].Host, l.Nodes[1].Host} {
			got := call(t, from.Namespace, netip.AddrPortFrom(far.IPs[family], 80), "hello")
			if !strings.HasSuffix(got, "hello") {
				t.Errorf("%s got %q", from.Name, got)
			}
		}
	}
	found := 0
	for _, f := range capture.Flows() {
		if f.Src.Addr() == client.IP() && f.Dst == netip.AddrPortFrom(far.IP(), 80) {
			found++
			if want := len("to far at ") + len(far.IP().String()) + 1; f.Payload != want {
				t.Errorf("flow %v carried %d bytes, want %d", f, f.Payload, want)
			}
		}
		if f.Dst.Addr() == near.IP() && f.Src.Addr() == client.IP() {
			t.Errorf("flow %v of one node on the fabric", f)
		}
	}
	if found != 1 {
		t.Errorf("%d flows from client to far captured, want 1: %v", found, capture.Flows())
	}
	if err := capture.Stop(); err != nil {
		t.Error(err)
	}

	for _, p := range l.Pods() {
		if err := l.CheckPod(t.Context(), p); err != nil {
			t.Error(err)
		}
	}
	if err := l.GC(t.Context(), l.Nodes[0]); err != nil {
		t.Error(err)
	}
	if err := l.Status(t.Context(), l.Nodes[0]); err != nil {
		t.Error(err)
	}
	if err := l.CheckPod(t.Context(), near); err != nil {
		t.Errorf("after GC: %v", err)
	}
	nearIP := near.IP()
	if err := l.DelPod(t.Context(), near); err != nil {
		t.Fatal(err)
	}
	if err := l.DelPod(t.Context(), near); err == nil {
		t.Error("second DelPod succeeded")
	}
	if _, err := os.Stat(near.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("namespace of the deleted pod: %v, want it gone", err)
	}
	used, err := filepath.Glob(filepath.Join(l.Dir, "node1", "ipam", "netlab", nearIP.String()))
	if err != nil || len(used) != 0 {
		t.Errorf("address of the deleted pod still reserved: %v, %v", used, err)
	}
}

func TestServices(t *testing.T) {
	l := netlab.New(t, netlab.Config{Nodes: 2, IPv6: true})
	client, near, far := addPod(t, l, 0, "client"), addPod(t, l, 0, "near"), addPod(t, l, 1, "far")
	for _, p := range []*netlab.Pod{client, near, far} {
		echo(t, p.Namespace, 8080)
	}
	for family, vip := range []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:10:96::10")} {
		at := func(p *netlab.Pod) netip.AddrPort { return netip.AddrPortFrom(p.IPs[family], 8080) }
		set := func(ports ...netlab.ServicePort) {
			t.Helper()
			if err := l.SetService(netlab.Service{VIP: vip, Ports: ports}); err != nil {
				t.Fatal(err)
			}
		}
		set(netlab.ServicePort{Port: 80, Endpoints: []netip.AddrPort{at(near), at(far)}},
			netlab.ServicePort{Port: 81, Endpoints: []netip.AddrPort{at(client)}},
			netlab.ServicePort{Port: 82})
		seen := map[string]int{}
		for range 60 {
			seen[call(t, client.Namespace, netip.AddrPortFrom(vip, 80), "x")]++
		}
		for _, p := range []*netlab.Pod{near, far} {
			if seen[fmt.Sprintf("%s %s x", client.IPs[family], p.IPs[family])] == 0 {
				t.Errorf("%s never answered for %s: %v", p.Spec.Name, vip, seen)
			}
		}
		if len(seen) != 2 {
			t.Errorf("answers by %s = %v, want two kinds", vip, seen)
		}
		// A process of the node itself, as ztunnel is one.
		if got := call(t, l.Nodes[1].Namespace, netip.AddrPortFrom(vip, 80), "x"); !strings.HasSuffix(got, " x") {
			t.Errorf("node got %q", got)
		}
		// A pod that is its own service's endpoint.
		if got := call(t, client.Namespace, netip.AddrPortFrom(vip, 81), "x"); !strings.HasSuffix(got, " x") {
			t.Errorf("client of itself got %q", got)
		}
		for _, from := range []*netlab.Namespace{client.Namespace, l.Nodes[0].Namespace} {
			_, err := from.Dial(t.Context(), linux.DialOptions{Remote: netip.AddrPortFrom(vip, 82), Timeout: 3 * time.Second})
			if err == nil || !strings.Contains(err.Error(), "refused") {
				t.Errorf("%s dials a port without endpoints: %v, want refused", from.NSName, err)
			}
		}
	}
	if err := l.SetService(netlab.Service{VIP: netip.MustParseAddr("10.96.0.1"), Ports: []netlab.ServicePort{
		{Port: 80, Endpoints: []netip.AddrPort{netip.MustParseAddrPort("[fd00::1]:80")}},
	}}); err == nil {
		t.Error("service with an endpoint of another family accepted")
	}
}

// TestChainedPlugin has a plugin of its own at the end of the chain, which records what it is given and may refuse.
func TestChainedPlugin(t *testing.T) {
	dir := t.TempDir()
	script := `#!/bin/sh
cat > "$RECORD.stdin.$CNI_COMMAND"
echo "$CNI_COMMAND $CNI_IFNAME $CNI_NETNS $CNI_CONTAINERID $CNI_ARGS $(readlink /proc/self/ns/net)" >> "$RECORD"
case "$CNI_COMMAND$CNI_ARGS" in
ADD*K8S_POD_NAME=bad*) echo '{"cniVersion":"1.0.0","code":11,"msg":"agent is down"}'; exit 1;;
ADD*) jq -c .prevResult 2>/dev/null < "$RECORD.stdin.ADD" || sed 's/.*"prevResult":\({.*}\),"type".*/\1/' "$RECORD.stdin.ADD";;
esac
`
	if err := os.WriteFile(filepath.Join(dir, "mistnet-record"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(dir, "record")
	t.Setenv("RECORD", record)
	l := netlab.New(t, netlab.Config{
		PluginDirs: []string{dir},
		Chained: func(n *netlab.Node) []byte {
			return fmt.Appendf(nil, `{"type":"mistnet-record","run_dir":%q}`, n.RunDir)
		},
	})
	n := l.Nodes[0]
	p, err := l.AddPod(t.Context(), n, netlab.PodSpec{Namespace: "shop", Name: "good", UID: "uid-1"})
	if err != nil {
		t.Fatal(err)
	}
	id, err := n.ID()
	if err != nil {
		t.Fatal(err)
	}
	log := func() []string {
		b, err := os.ReadFile(record)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSpace(string(b)), "\n")
	}
	want := fmt.Sprintf("ADD eth0 %s %s IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=good;"+
		"K8S_POD_INFRA_CONTAINER_ID=%s;K8S_POD_UID=uid-1 net:[%d]", p.Path, p.ContainerID, p.ContainerID, id)
	if got := log()[0]; got != want {
		t.Errorf("plugin was called with\n%s\nwant\n%s", got, want)
	}
	var conf struct {
		RunDir     string `json:"run_dir"`
		PrevResult struct {
			IPs []struct{ Address netip.Prefix }
		}
	}
	stdin, err := os.ReadFile(record + ".stdin.ADD")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(stdin, &conf); err != nil {
		t.Fatal(err)
	}
	if conf.RunDir != n.RunDir || len(conf.PrevResult.IPs) != 1 || conf.PrevResult.IPs[0].Address.Addr() != p.IP() {
		t.Errorf("plugin read %s", stdin)
	}

	_, err = l.AddPod(t.Context(), n, netlab.PodSpec{Namespace: "shop", Name: "bad"})
	if err == nil || !strings.Contains(err.Error(), "agent is down") {
		t.Errorf("AddPod with a plugin that refuses = %v, want its words", err)
	}
	lines := log()
	if last := lines[len(lines)-1]; !strings.HasPrefix(last, "DEL ") || !strings.Contains(last, "K8S_POD_NAME=bad") {
		t.Errorf("last call = %q, want DEL of the refused pod", last)
	}
	if left, err := filepath.Glob(p.Path[:len(p.Path)-len("good")] + "bad"); err != nil || len(left) > 0 {
		t.Errorf("namespace of the refused pod is there: %v, %v", left, err)
	}
	if got := len(l.Pods()); got != 1 {
		t.Errorf("%d pods, want 1", got)
	}
}

func TestCommands(t *testing.T) {
	l := netlab.New(t, netlab.Config{Nodes: 1})
	pod := addPod(t, l, 0, "web")
	id, err := pod.ID()
	if err != nil {
		t.Fatal(err)
	}
	out, err := l.Command(t.Context(), pod.Namespace, "readlink", "/proc/self/ns/net").Output()
	if want := fmt.Sprintf("net:[%d]\n", id); err != nil || string(out) != want {
		t.Errorf("command ran in %q, %v; want %q", out, err, want)
	}
	out, err = l.Command(t.Context(), pod.Namespace, "cat", "/proc/sys/net/ipv4/tcp_congestion_control").Output()
	if err != nil || string(out) != "reno\n" {
		t.Errorf("congestion control of a pod = %q, %v; want reno", out, err)
	}
	if _, err := l.Command(t.Context(), pod.Namespace, "sh", "-c", "echo why >&2; exit 3").Output(); err == nil || !strings.Contains(err.Error(), "why") {
		t.Errorf("failed command = %v, want its words", err)
	}
	// A child that leaves its parent's group dies with the lab or its pod all the same.
	ready, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	c := l.Command(t.Context(), pod.Namespace, "setsid", "-f", "sh", "-c", "echo up >&3; exec sleep 1000")
	c.ExtraFiles = []*os.File{w}
	err = c.Run()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(ready).ReadString('\n'); err != nil || line != "up\n" {
		t.Fatalf("detached child says %q, %v", line, err)
	}
	left, err := netlab.Leftovers("", l.ID)
	if err != nil || !strings.Contains(strings.Join(left, "\n"), " sleep") && !strings.Contains(strings.Join(left, "\n"), " sh") {
		t.Errorf("Leftovers of a running lab = %q, %v; want the child among them", left, err)
	}
	if err := l.DelPod(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	left, err = netlab.Leftovers("", l.ID)
	if err != nil || strings.Contains(strings.Join(left, "\n"), "process") {
		t.Errorf("Leftovers after DelPod = %q, %v; want no process", left, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	c = l.Command(ctx, l.ControlPlane.Namespace, "sleep", "1000")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := c.Wait(); err == nil {
		t.Error("cancelled command ended well")
	}
	c = l.Command(t.Context(), nil, "sleep", "1000")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := c.Stop(time.Minute); err == nil || time.Since(begin) > 10*time.Second {
		t.Errorf("Stop = %v after %v, want the signal's end at once", err, time.Since(begin))
	}
	if err := l.Command(t.Context(), nil, "sleep", "1000").Start(); err != nil { // Close is to find it
		t.Fatal(err)
	}
}

// TestCrash kills a process that has a lab with pods and processes, and sweeps.
func TestCrash(t *testing.T) {
	if dir := os.Getenv("NETLAB_CRASH_DIR"); dir != "" {
		crash(t, dir)
		return
	}
	if os.Geteuid() != 0 && os.Getenv("CI") != "true" {
		t.Skip(netlab.ErrNotRoot)
	}
	dir := t.TempDir()
	for _, keep := range []bool{false, true} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestCrash$", "-test.v")
		cmd.Env = append(os.Environ(), "NETLAB_CRASH_DIR="+dir, fmt.Sprintf("NETLAB_CRASH_KEEP=%v", keep))
		var errOut bytes.Buffer
		cmd.Stderr = &errOut
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		id := ""
		for s := bufio.NewScanner(out); s.Scan(); {
			if v, ok := strings.CutPrefix(s.Text(), "LAB "); ok {
				id = v
				break
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if id == "" {
			t.Fatalf("child made no lab: %s", errOut.Bytes())
		}
		left, err := netlab.Leftovers(dir, id)
		if err != nil {
			t.Fatal(err)
		}
		for _, kind := range []string{"namespace ", "mount ", "file ", "process "} {
			if !strings.Contains(strings.Join(left, "\n"), kind) {
				t.Errorf("after the crash there is no %sto sweep: %q", kind, left)
			}
		}
		if err := netlab.Sweep(dir); err != nil {
			t.Error(err)
		}
		if keep {
			if again, err := netlab.Leftovers(dir, id); err != nil || len(again) != len(left) {
				t.Errorf("Sweep touched a lab that is to be kept: %q, %v; before %q", again, err, left)
			}
			if ids, err := netlab.Labs(dir); err != nil || len(ids) != 1 || ids[0] != id {
				t.Errorf("Labs = %q, %v; want %q", ids, err, id)
			}
			if err := netlab.Remove(dir, id); err != nil {
				t.Error(err)
			}
		}
		if left, err := netlab.Leftovers(dir, id); err != nil || len(left) > 0 {
			t.Errorf("left after the sweep: %q, %v", left, err)
		}
	}
}

// crash is the child: it makes a lab, says so and waits to be killed.
func crash(t *testing.T, dir string) {
	l, err := netlab.Start(t.Context(), netlab.Config{Nodes: 1, StateDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	p := addPod(t, l, 0, "web")
	for _, ns := range []*netlab.Namespace{nil, p.Namespace, l.ControlPlane.Namespace} {
		if err := l.Command(context.Background(), ns, "sleep", "1000").Start(); err != nil {
			t.Fatal(err)
		}
	}
	if os.Getenv("NETLAB_CRASH_KEEP") == "true" {
		if err := l.Keep(); err != nil {
			t.Fatal(err)
		}
	}
	fmt.Println("LAB " + l.ID)
	select {}
}

func TestSweepSparesTheLiving(t *testing.T) {
	dir := t.TempDir()
	l := netlab.New(t, netlab.Config{StateDir: dir})
	if err := netlab.Sweep(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(l.Nodes[0].Path); err != nil {
		t.Errorf("Sweep took a living lab: %v", err)
	}
	for _, id := range []string{"", "mnl-", "mnl-*", "../etc", "mnl-/../x"} {
		if err := netlab.Remove(dir, id); err == nil {
			t.Errorf("Remove(%q) succeeded", id)
		}
	}
}

func TestCongestionIsPutBack(t *testing.T) {
	const allowed = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"
	read := func() string {
		b, err := os.ReadFile(allowed)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	available, err := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(available), "cubic") {
		t.Skip("needs a kernel with cubic")
	}
	before := read()
	dir := t.TempDir()
	first := netlab.New(t, netlab.Config{StateDir: dir, Congestion: "cubic"})
	second, err := netlab.Start(t.Context(), netlab.Config{StateDir: dir, Congestion: "cubic"})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	pod := addPod(t, second, 0, "web") // is still allowed to
	out, err := second.Command(t.Context(), pod.Namespace, "cat", "/proc/sys/net/ipv4/tcp_congestion_control").Output()
	if err != nil || string(out) != "cubic\n" {
		t.Errorf("congestion control of a pod = %q, %v; want cubic", out, err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if after := read(); after != before {
		t.Errorf("allowed algorithms = %q, were %q", after, before)
	}
	if _, err := netlab.Start(t.Context(), netlab.Config{StateDir: dir, Congestion: "none-such"}); err == nil || !strings.Contains(err.Error(), "not available") {
		t.Errorf("Start with an unknown algorithm = %v", err)
	}
	if ids, err := netlab.Labs(dir); err != nil || len(ids) != 0 {
		t.Errorf("labs left: %q, %v", ids, err)
	}
}

func TestWhatIsMissingIsNamed(t *testing.T) {
	if os.Geteuid() != 0 {
		if _, err := netlab.Start(t.Context(), netlab.Config{}); !errors.Is(err, netlab.ErrNotRoot) {
			t.Errorf("Start as an ordinary user = %v, want ErrNotRoot", err)
		}
		return
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := netlab.Start(t.Context(), netlab.Config{}); err == nil || !strings.Contains(err.Error(), "package nftables") {
		t.Errorf("Start without nft = %v, want the package's name", err)
	}
	if _, err := netlab.Start(t.Context(), netlab.Config{Nodes: 1000}); err == nil {
		t.Error("Start with 1000 nodes succeeded")
	}
}

// TestFailedStartLeavesNothing has a chained plugin's configuration that cannot be read.
func TestFailedStartLeavesNothing(t *testing.T) {
	if os.Geteuid() != 0 && os.Getenv("CI") != "true" {
		t.Skip(netlab.ErrNotRoot)
	}
	dir := t.TempDir()
	id := ""
	_, err := netlab.Start(t.Context(), netlab.Config{StateDir: dir, Nodes: 2, Chained: func(n *netlab.Node) []byte {
		id, _, _ = strings.Cut(n.NSName, "-node")
		return []byte("{")
	}})
	if err == nil || id == "" {
		t.Fatalf("Start = %v, lab %q; want an error about the configuration", err, id)
	}
	if left, err := netlab.Leftovers(dir, id); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
}
