package peers

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/mistnet/mistnet/istiod/ca"
	"github.com/mistnet/mistnet/istiod/token"
)

// Ours is our whole mesh: istiod, and on each of two nodes of their own a CNI agent and a ztunnel; the pods are enrolled by the
// CNI plugin as a container runtime would have it done.
type Ours struct{}

// Name implements Contender.
func (Ours) Name() string { return "ours" }

// Start implements Contender.
func (Ours) Start(ctx context.Context, env *Env) (*Running, error) {
	return meshed{name: "ours", ztunnel: filepath.Join(env.OursDir, "ztunnel")}.start(ctx, env)
}

// Rust is our mesh with a stock ztunnel of the Istio project, written in Rust, in the place of ours: same istiod, same CNI, same
// rules in the pods. ZTUNNEL_BIN names it.
type Rust struct{}

// Name implements Contender.
func (Rust) Name() string { return "zt-rust" }

// Start implements Contender.
func (Rust) Start(ctx context.Context, env *Env) (*Running, error) {
	if env.ZTunnelBin == "" {
		return nil, fmt.Errorf("zt-rust: %w (set ZTUNNEL_BIN to a ztunnel of the Istio project)", ErrAbsent)
	}
	return meshed{name: "zt-rust", ztunnel: env.ZTunnelBin}.start(ctx, env)
}

// meshed is a mesh of two nodes with a given ztunnel.
type meshed struct{ name, ztunnel string }

const (
	meshNamespace   = "bench"
	systemNamespace = "istio-system"
	xdsPort         = 15012
	hbonePort       = 15008
	istiodName      = "istiod.istio-system.svc"
	// enrolWithin is how long a node's agent and ztunnel may take until a pod can be added.
	enrolWithin = 20 * time.Second
)

// meshDirs are the folders of one mesh.
type meshDirs struct{ root, config, status, istiod string }

func (m meshed) start(ctx context.Context, env *Env) (_ *Running, err error) {
	bin := func(name string) string { return filepath.Join(env.OursDir, name) }
	for _, path := range []string{bin("istiod"), bin("cni-agent"), bin("cni-plugin"), m.ztunnel} {
		if _, err := os.Stat(path); err != nil {
			return nil, fmt.Errorf("%s: %w (make build, or -bin DIR)", path, ErrAbsent)
		}
	}
	var undo undoing
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.all())
		}
	}()
	fabric, err := NewFabric(ctx, m.name+"-")
	if err != nil {
		return nil, err
	}
	undo.add(fabric.Close)
	dirs, err := m.prepare(env, fabric)
	if err != nil {
		return nil, err
	}
	spawn := func(p Program) (*Process, error) {
		proc, err := Spawn(ctx, p)
		if err != nil {
			return nil, fmt.Errorf("start %s of %s: %w", p.Argv[0], m.name, err)
		}
		undo.add(proc.Stop)
		return proc, nil
	}
	procs := make(map[string]*Process)
	if procs["istiod"], err = spawn(Program{
		NetNS: fabric.Nodes[0], Dir: dirs.root, Log: filepath.Join(env.Dir, m.name+"-istiod.log"), Argv: append([]string{bin("istiod")}, istiodArgs(dirs, fabric)...),
	}); err != nil {
		return nil, err
	}
	r := &Running{
		Client: fabric.Client, Server: fabric.Server, Listen: env.EchoPort, Addr: netip.AddrPortFrom(fabric.Server.Addr, env.EchoPort),
		Version: describe(ctx, m.ztunnel), Stop: undo.all,
		Verify: func(ctx context.Context) error { return tunnelled(ctx, fabric.Client) },
		Cipher: func(context.Context) string { return "not asked; two ends in Go on AES hardware agree on " + suite },
	}
	for i, node := range []string{"n1", "n2"} {
		home := filepath.Join(dirs.root, node)
		if procs[node+"'s cni-agent"], err = spawn(Program{
			NetNS: fabric.Nodes[i], Dir: home, Log: filepath.Join(env.Dir, m.name+"-"+node+"-agent.log"),
			Argv: []string{
				bin("cni-agent"), "-config-dir", dirs.config, "-status-dir", dirs.status, "-run-dir", filepath.Join(home, "run"),
				"-ztunnel-uds-address", filepath.Join(home, "zds.sock"),
			},
		}); err != nil {
			return nil, err
		}
		zt, err := spawn(Program{
			NetNS: fabric.Nodes[i], Dir: home, Log: filepath.Join(env.Dir, m.name+"-"+node+"-ztunnel.log"),
			Env: ztunnelEnv(node, home, fabric.NodeAddrs[0], fabric.NodeAddrs[i], env.Workers), Argv: []string{m.ztunnel},
		})
		if err != nil {
			return nil, err
		}
		procs[node+"'s ztunnel"] = zt
		r.PIDs = append(r.PIDs, zt.PID())
	}
	if m.name == "zt-rust" {
		r.Cipher = func(context.Context) string { return "not asked" }
	}
	for i, pod := range []struct {
		name string
		pod  Pod
	}{{"client", fabric.Client}, {"server", fabric.Server}} {
		run := filepath.Join(dirs.root, "n"+strconv.Itoa(i+1), "run")
		if err := enrol(ctx, bin("cni-plugin"), run, pod.name, pod.pod, procs); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// prepare makes the mesh's folders: its objects, the CA, and for each ztunnel the token and root where it looks for them.
func (m meshed) prepare(env *Env, f *Fabric) (meshDirs, error) {
	root := filepath.Join(env.Dir, m.name)
	d := meshDirs{root: root, config: filepath.Join(root, "config"), status: filepath.Join(root, "status"), istiod: filepath.Join(root, "istiod")}
	for _, dir := range []string{d.config, d.status, d.istiod} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return d, err
		}
	}
	authority, err := ca.Open(ca.Config{Dir: d.istiod})
	if err != nil {
		return d, err
	}
	issuer, err := token.OpenIssuer(d.istiod)
	if err != nil {
		return d, err
	}
	for _, node := range []string{"n1", "n2"} {
		raw, err := issuer.Issue(token.Caller{
			Namespace: systemNamespace, ServiceAccount: "ztunnel", Pod: "ztunnel-" + node, PodUID: "uid-ztunnel-" + node, Node: node,
		}, 24*time.Hour)
		if err != nil {
			return d, err
		}
		secrets := filepath.Join(root, node, "var/run/secrets")
		for path, text := range map[string][]byte{"tokens/istio-token": []byte(raw), "istio/root-cert.pem": authority.RootPEM()} {
			path = filepath.Join(secrets, path)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.MkdirAll(filepath.Join(root, node, "run"), 0o700)); err != nil {
				return d, err
			}
			if err := os.WriteFile(path, text, 0o600); err != nil {
				return d, err
			}
		}
	}
	return d, os.WriteFile(filepath.Join(d.config, "bench.yaml"), []byte(MeshObjects()), 0o644)
}

// MeshObjects is the YAML of the mesh: an enrolled namespace with a client and a server on two nodes.
func MeshObjects() string {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {istio.io/dataplane-mode: ambient}}\n", meshNamespace)
	for i, name := range []string{"client", "server"} {
		fmt.Fprintf(&b, `---
apiVersion: v1
kind: ServiceAccount
metadata: {name: %[1]s, namespace: %[2]s}
---
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: %[2]s, uid: %[4]s}
spec: {nodeName: n%[3]d, serviceAccountName: %[1]s, containers: [{name: app, image: load}]}
`, name, meshNamespace, i+1, podUID(name))
	}
	return b.String()
}

func podUID(name string) string { return "uid-bench-" + name }

// istiodArgs are istiod's flags in files mode. It shares the first node with a CNI agent, whose pages are on istiod's usual port.
func istiodArgs(d meshDirs, f *Fabric) []string {
	addr := f.NodeAddrs[0].String()
	return []string{
		"-files", d.config, "-status-dir", d.status, "-data-dir", d.istiod,
		"-xds-addr", fmt.Sprintf("%s:%d", addr, xdsPort), "-ips", addr, "-monitoring-addr", addr + ":15016",
	}
}

// ztunnelEnv configures a ztunnel, ours or the Rust one, with the variables both know. Access logs are off, as they are for all
// contenders.
func ztunnelEnv(node, home string, istiod, self netip.Addr, workers int) []string {
	address := fmt.Sprintf("https://%s:%d", istiod, xdsPort)
	return []string{
		"NODE_NAME=" + node, "POD_NAME=ztunnel-" + node, "POD_NAMESPACE=" + systemNamespace, "SERVICE_ACCOUNT=ztunnel",
		"INSTANCE_IP=" + self.String(), "CLUSTER_ID=Kubernetes",
		"XDS_ADDRESS=" + address, "CA_ADDRESS=" + address, "ALT_XDS_HOSTNAME=" + istiodName, "ALT_CA_HOSTNAME=" + istiodName,
		"PROXY_MODE=shared", "INPOD_ENABLED=true", "INPOD_UDS=" + filepath.Join(home, "zds.sock"),
		"GOMAXPROCS=" + strconv.Itoa(workers), "ZTUNNEL_WORKER_THREADS=" + strconv.Itoa(workers),
		"ACCESS_LOG=false", "RUST_LOG=warn",
	}
}

// enrol has the CNI plugin add a pod, again and again while the node's agent and ztunnel come up, as a kubelet does.
func enrol(ctx context.Context, plugin, runDir, name string, pod Pod, procs map[string]*Process) error {
	ctx, cancel := context.WithTimeoutCause(ctx, enrolWithin, fmt.Errorf("not within %v", enrolWithin))
	defer cancel()
	pause := time.NewTicker(200 * time.Millisecond)
	defer pause.Stop()
	for {
		err := addPod(ctx, plugin, runDir, name, pod)
		if err == nil {
			return nil
		}
		for who, p := range procs {
			if ended := p.Exited(); ended != nil {
				return fmt.Errorf("enrol %s: %s: %w", name, who, ended)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("enrol %s: %w; last: %w", name, context.Cause(ctx), err)
		case <-pause.C:
		}
	}
}

// addPod runs the CNI plugin once, with what the plugins before it in a chain would have left (CNI spec, section 5).
func addPod(ctx context.Context, plugin, runDir, name string, pod Pod) error {
	conf, err := json.Marshal(map[string]any{
		"cniVersion": "1.0.0", "name": "bench", "type": "cni-plugin", "cni_agent_run_dir": runDir,
		"prevResult": map[string]any{
			"cniVersion": "1.0.0",
			"interfaces": []any{map[string]any{"name": "eth0", "sandbox": pod.NetNS}},
			"ips":        []any{map[string]any{"address": pod.Addr.String() + "/24", "interface": 0}},
		},
	})
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, plugin)
	cmd.Stdin = bytes.NewReader(conf)
	cmd.Env = append(os.Environ(), "CNI_COMMAND=ADD", "CNI_CONTAINERID=bench-"+name, "CNI_NETNS="+pod.NetNS, "CNI_IFNAME=eth0",
		"CNI_PATH="+filepath.Dir(plugin), fmt.Sprintf("CNI_ARGS=K8S_POD_NAMESPACE=%s;K8S_POD_NAME=%s;K8S_POD_UID=%s", meshNamespace, name, podUID(name)))
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("CNI plugin: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// tunnelled proves that traffic of the pod goes through a tunnel: a ztunnel would carry it in plaintext if it took the
// destination for a stranger to the mesh.
func tunnelled(ctx context.Context, pod Pod) error {
	table, err := Output(ctx, pod.NetNS, "cat", "/proc/self/net/tcp", "/proc/self/net/tcp6")
	if err != nil {
		return err
	}
	if !connectedTo(table, hbonePort) {
		return fmt.Errorf("no connection to port %d: the traffic is not tunnelled", hbonePort)
	}
	return nil
}

// connectedTo reports whether the text of /proc/net/tcp has an established connection whose remote port is port (proc(5)).
func connectedTo(table string, port uint16) bool {
	const established = "01"
	want := fmt.Sprintf(":%04X", port)
	for line := range strings.Lines(table) {
		if f := strings.Fields(line); len(f) > 3 && strings.HasSuffix(f[2], want) && f[3] == established {
			return true
		}
	}
	return false
}

// describe names a ztunnel's version: from the build information of a Go program, or else by asking it.
func describe(ctx context.Context, ztunnel string) string {
	info, err := buildinfo.ReadFile(ztunnel)
	if err != nil {
		out, err := Output(ctx, "", ztunnel, "version")
		if err != nil {
			return "unknown version"
		}
		line, _, _ := strings.Cut(out, "\n")
		return line
	}
	text := "mistnet, built with " + info.GoVersion
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			text += ", revision " + s.Value[:min(len(s.Value), 12)]
		}
	}
	return text
}
