package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/netlab"
)

// process is one running program whose output goes to a file.
type process struct {
	*netlab.Cmd
	log string
}

// start runs one of our programs in a namespace, adding to its log.
func (w *world) start(name string, in *netlab.Namespace, program string, args ...string) (*process, error) {
	p := &process{Cmd: w.lab.Command(context.Background(), in, filepath.Join(w.bin, program), args...), log: w.path("logs", name+".log")}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.Stdout, p.Stderr = log, log
	if err := p.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	w.procs[name] = p
	return p, nil
}

func (p *process) logContains(parts ...string) error {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		if containsAll(line, parts) {
			return nil
		}
	}
	return fmt.Errorf("no line of %s has %q", filepath.Base(p.log), parts)
}

func containsAll(s string, parts []string) bool {
	for _, part := range parts {
		if !strings.Contains(s, part) {
			return false
		}
	}
	return true
}

func (w *world) startControlPlane(ctx context.Context) error {
	cp := w.lab.ControlPlane
	_, err := w.start("istiod", cp.Namespace, "istiod", "-files="+w.path("config"), "-status-dir="+w.path("status"),
		"-data-dir="+w.path("istiod"), "-ips="+cp.IPs[0].String())
	if err != nil {
		return err
	}
	if err := w.istiodTool(ctx, "root", "-out="+w.path("tokens", "root-cert.pem")); err != nil {
		return err
	}
	return w.ready(ctx, "istiod", cp.Namespace, mesh.PortIstiodMon, "/ready")
}

// istiodTool runs one of istiod's commands that hand out what a node needs to join.
func (w *world) istiodTool(ctx context.Context, args ...string) error {
	args = append(args, "-data-dir="+w.path("istiod"))
	out, err := w.lab.Command(ctx, nil, filepath.Join(w.bin, "istiod"), args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("istiod %s: %w: %s", args[0], err, out)
	}
	return nil
}

func (w *world) startNodes(ctx context.Context) error {
	for _, n := range w.lab.Nodes {
		_, err := w.start("cni-agent-"+n.Name, n.Namespace, "cni-agent", "-config-dir="+w.path("config"),
			"-status-dir="+w.path("status"), "-run-dir="+n.RunDir, "-ztunnel-uds-address="+w.zdsSocket(n))
		if err != nil {
			return err
		}
		if err := w.istiodTool(ctx, "token", "-node="+n.Name, "-out="+w.path("tokens", n.Name)); err != nil {
			return err
		}
		if err := w.startZtunnel(ctx, n.Name); err != nil {
			return err
		}
		if err := w.ready(ctx, "cni-agent-"+n.Name, n.Namespace, mesh.PortIstiodMon, "/readyz"); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) zdsSocket(n *netlab.Node) string { return filepath.Join(n.RunDir, "ztunnel.sock") }

// startZtunnel starts a node's ztunnel and waits until it is ready.
func (w *world) startZtunnel(ctx context.Context, node string) error {
	n, cp := w.node(node), w.lab.ControlPlane
	_, err := w.start("ztunnel-"+node, n.Namespace, "ztunnel", "-node-name="+node, "-instance-ip="+n.IPs[0].String(),
		"-xds-address=https://"+netip.AddrPortFrom(cp.IPs[0], mesh.PortXDS).String(),
		"-xds-root-ca="+w.path("tokens", "root-cert.pem"), "-auth-token="+w.path("tokens", node),
		"-inpod-uds="+w.zdsSocket(n))
	if err != nil {
		return err
	}
	return w.ready(ctx, "ztunnel-"+node, n.Namespace, mesh.PortReadiness, "/healthz/ready")
}

// kill ends a program as a crash would.
func (w *world) kill(name string) {
	_ = w.procs[name].Kill()
	delete(w.procs, name)
}

// ready waits until a program says it is.
func (w *world) ready(ctx context.Context, name string, in *netlab.Namespace, port int, path string) error {
	_, err := eventually(ctx, 10*time.Second, func() error {
		_, err := w.get(ctx, in, fmt.Sprintf("127.0.0.1:%d", port), path)
		return err
	})
	if err != nil {
		return fmt.Errorf("%s is not ready: %w", name, err)
	}
	return nil
}

// get fetches a page from inside a namespace.
func (w *world) get(ctx context.Context, in *netlab.Namespace, addr, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
		to, err := netip.ParseAddrPort(addr)
		if err != nil {
			return nil, err
		}
		return in.Dial(ctx, linux.DialOptions{Remote: to, Timeout: time.Second})
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, resp.Status, bytes.TrimSpace(b))
	}
	return b, err
}

// call makes one call from a pod and returns how the server greeted it.
func (w *world) call(ctx context.Context, from, addr, text string) (string, error) {
	out, err := w.lab.Command(ctx, w.pods[from].Namespace, filepath.Join(w.bin, "demo-app"), "call", addr, text).Output()
	if err != nil {
		return "", fmt.Errorf("%s → %s: %w", from, addr, err)
	}
	greeting, echo, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	if echo != text {
		return "", fmt.Errorf("%s → %s: sent %q, got %q back", from, addr, text, echo)
	}
	return greeting, nil
}

// answers checks that a call passes.
func (w *world) answers(ctx context.Context, from, addr string) error {
	return w.carries(ctx, from, addr, "hello")
}

// carries checks that a call with this text passes.
func (w *world) carries(ctx context.Context, from, addr, text string) error {
	_, err := w.call(ctx, from, addr, text)
	return err
}

// refused checks that a call fails. It carries the secret, for captures to look for.
func (w *world) refused(ctx context.Context, from, addr string) error {
	greeting, err := w.call(ctx, from, addr, secret)
	if err == nil {
		return fmt.Errorf("the call passed: %q", greeting)
	}
	return ctx.Err()
}

// holder is a connection that is held open, one exchange every 5 ms.
type holder struct {
	*process
}

func (w *world) hold(ctx context.Context, from, addr string) (*holder, error) {
	p, err := w.start("hold", w.pods[from].Namespace, "demo-app", "hold", addr, "5ms")
	if err != nil {
		return nil, err
	}
	_, err = eventually(ctx, 5*time.Second, func() error { return p.logContains("tick 3") })
	return &holder{p}, err
}

// ended waits until the connection was cut, and says when that was noticed.
func (h *holder) ended(ctx context.Context, limit time.Duration) (time.Time, error) {
	_, err := eventually(ctx, limit, func() error { return h.logContains("closed:") })
	info, statErr := os.Stat(h.log)
	if err = errors.Join(err, statErr); err != nil {
		return time.Time{}, err
	}
	return info.ModTime(), nil
}

func (h *holder) stop() { _ = h.Kill() }

// logged checks that a node's ztunnel wrote a line with all these parts.
func (w *world) logged(node string, parts ...string) error {
	return w.procs["ztunnel-"+node].logContains(parts...)
}

// how says how web's last connection to an address was carried.
func (w *world) how(ctx context.Context, workload, addr string) (string, error) {
	_, err := eventually(ctx, 2*time.Second, func() error {
		return w.logged("node1", `src.workload="`+workload+`"`, `dst.hbone_addr="`+addr+`"`, `direction="outbound"`)
	})
	return "HBONE", err
}

// keepLogs reads the logs' ends before their files go.
func (w *world) keepLogs() {
	w.logs = make(map[string]string)
	for name, p := range w.procs {
		b, err := os.ReadFile(p.log)
		if err != nil {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		w.logs[name] = strings.Join(lines[max(0, len(lines)-15):], "\n")
	}
}

// tails is the end of every log.
func (w *world) tails() string {
	var b strings.Builder
	for name, tail := range w.logs {
		fmt.Fprintf(&b, "--- the end of %s's log\n%s\n", name, tail)
	}
	return b.String()
}

func (w *world) printLogs(out io.Writer) { fmt.Fprintf(out, "\n%s", w.tails()) }
