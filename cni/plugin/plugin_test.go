package plugin_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/mistnet/mistnet/cni/plugin"
)

// TestMain lets the test binary stand in for the plugins of a chain: under the name istio-cni it is ours, under the name
// fake-bridge one that gives every pod the same addresses.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "istio-cni":
		plugin.Main()
	case "fake-bridge":
		if cmd := os.Getenv("CNI_COMMAND"); cmd == "ADD" {
			var conf struct{ Result json.RawMessage }
			if err := json.NewDecoder(os.Stdin).Decode(&conf); err != nil {
				os.Exit(1)
			}
			os.Stdout.Write(conf.Result)
		} else if cmd == "VERSION" {
			fmt.Print(`{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}`)
		}
	default:
		os.Exit(m.Run())
	}
}

const result = `{"cniVersion":"%s","interfaces":[{"name":"mist0","mac":"02:00:00:00:00:01"},` +
	`{"name":"eth0","mac":"02:00:00:00:00:02","sandbox":"/run/netns/pod"}],"ips":[{%s"interface":1,` +
	`"address":"10.244.1.5/24","gateway":"10.244.1.1"},{%s"interface":1,"address":"fd00::5/64"},` +
	`{%s"interface":0,"address":"10.244.1.1/24"}],"routes":[{"dst":"0.0.0.0/0"}],"dns":{}}`

func prevResult(version string) string {
	v4, v6 := "", ""
	if version < "1" {
		v4, v6 = `"version":"4",`, `"version":"6",`
	}
	return fmt.Sprintf(result, version, v4, v6, v4)
}

// agent is a fake of the node agent: it answers as told and keeps what it was asked.
type agent struct {
	dir    string
	status int

	mu   sync.Mutex
	seen []string
	last []byte
}

func newAgent(t *testing.T, status int) *agent {
	t.Helper()
	a := &agent{dir: t.TempDir(), status: status}
	ln, err := net.Listen("unix", filepath.Join(a.dir, plugin.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var b bytes.Buffer
		b.ReadFrom(r.Body)
		a.mu.Lock()
		a.seen = append(a.seen, r.Method+" "+r.URL.Path)
		a.last = b.Bytes()
		a.mu.Unlock()
		if a.status == 0 { // hang until the caller gives up
			<-r.Context().Done()
			return
		}
		if a.status != http.StatusOK {
			http.Error(w, "no ztunnel is connected", a.status)
		}
	})}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(ln) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return a
}

func (a *agent) requests() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.seen
}

// call runs the plugin as a runtime would and returns its output, and its error when it printed one.
type call struct {
	command, version, args, netns string
	conf                          map[string]any
	noPrev                        bool
}

func (c call) run(t *testing.T, dir string) (string, *types.Error) {
	t.Helper()
	exe := filepath.Join(t.TempDir(), "istio-cni")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, exe); err != nil {
		t.Fatal(err)
	}
	conf := map[string]any{"cniVersion": c.version, "name": "k8s", "type": "istio-cni", "cni_agent_run_dir": dir}
	if !c.noPrev {
		conf["prevResult"] = json.RawMessage(prevResult(c.version))
	}
	for k, v := range c.conf {
		conf[k] = v
	}
	stdin, err := json.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Env = []string{"CNI_COMMAND=" + c.command, "CNI_CONTAINERID=abc", "CNI_IFNAME=eth0", "CNI_PATH=/x", "CNI_ARGS=" + c.args}
	if c.netns != "" {
		cmd.Env = append(cmd.Env, "CNI_NETNS="+c.netns)
	}
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		var e types.Error
		if err := json.Unmarshal(out, &e); err != nil {
			t.Fatalf("%s failed (%v) and printed no CNI error: %s%s", c.command, exit, out, exit.Stderr)
		}
		return "", &e
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(out), nil
}

const (
	webArgs = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-1;K8S_POD_UID=u-1"
	netns   = "/run/netns/pod"
)

func TestAddReportsThePodAndPassesTheResultThrough(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			a := newAgent(t, http.StatusOK)
			out, cniErr := call{command: "ADD", version: version, args: webArgs, netns: netns}.run(t, a.dir)
			if cniErr != nil {
				t.Fatal(cniErr)
			}
			if d := cmp.Diff(prevResult(version), out); d != "" {
				t.Errorf("result (-prevResult +printed):\n%s", d)
			}
			if d := cmp.Diff([]string{"POST /cmdadd"}, a.requests()); d != "" {
				t.Errorf("requests (-want +got):\n%s", d)
			}
			var got plugin.Event
			if err := json.Unmarshal(a.last, &got); err != nil {
				t.Fatal(err)
			}
			want := plugin.Event{
				Netns: netns, PodName: "web-1", PodNamespace: "shop", PodUID: "u-1", ContainerID: "abc", IfName: "eth0",
				IPs: []plugin.IP{
					{"eth0", netip.MustParsePrefix("10.244.1.5/24"), netip.MustParseAddr("10.244.1.1")},
					{"eth0", netip.MustParsePrefix("fd00::5/64"), netip.Addr{}},
				},
			}
			if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{})); d != "" {
				t.Errorf("event (-want +got):\n%s", d)
			}
		})
	}
}

func TestCommands(t *testing.T) {
	t.Parallel()
	const (
		dead = -1 // no agent at all
		ok   = http.StatusOK
		busy = http.StatusServiceUnavailable
	)
	for _, c := range []struct {
		name  string
		agent int
		call
		wantCode     uint // 0: success
		wantWords    string
		wantRequests []string
	}{
		{name: "ADD without an agent asks to try again", agent: dead,
			call: call{command: "ADD", args: webArgs, netns: netns}, wantCode: 11, wantWords: "is cni-agent running?"},
		{name: "ADD that the agent refuses asks to try again", agent: busy,
			call:     call{command: "ADD", args: webArgs, netns: netns},
			wantCode: 11, wantWords: "no ztunnel is connected", wantRequests: []string{"POST /cmdadd"}},
		{name: "ADD needs a previous result", agent: ok,
			call: call{command: "ADD", args: webArgs, netns: netns, noPrev: true}, wantCode: 7, wantWords: "must come after"},
		{name: "ADD needs a namespace", agent: ok, call: call{command: "ADD", args: webArgs}, wantCode: 4, wantWords: "CNI_NETNS"},
		{name: "ADD of half a pod", agent: ok,
			call: call{command: "ADD", args: "K8S_POD_NAME=web-1", netns: netns}, wantCode: 4, wantWords: "or neither"},
		{name: "ADD of what is no pod needs no agent", agent: dead, call: call{command: "ADD", netns: netns}},
		{name: "ADD of a version nobody speaks", agent: ok,
			call: call{command: "ADD", version: "0.2.0", args: webArgs, netns: netns}, wantCode: 1},
		{name: "ADD in an excluded namespace needs no agent", agent: dead,
			call: call{command: "ADD", args: "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns", netns: netns}},
		{name: "a list of excluded namespaces replaces the default", agent: dead,
			call: call{command: "ADD", args: "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns", netns: netns,
				conf: map[string]any{"exclude_namespaces": []string{"lab"}}}, wantCode: 11},
		{name: "ADD of the agent's own pod needs no agent", agent: dead,
			call: call{command: "ADD", args: "K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=istio-cni-node-x7f", netns: netns,
				conf: map[string]any{"pod_namespace": "istio-system"}}},
		{name: "a pod that borrows the agent's name elsewhere is no exception", agent: dead,
			call: call{command: "ADD", args: "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=istio-cni-node-x7f", netns: netns,
				conf: map[string]any{"pod_namespace": "istio-system"}}, wantCode: 11},
		{name: "ADD with ambient mode off needs no agent", agent: dead,
			call: call{command: "ADD", args: webArgs, netns: netns, conf: map[string]any{"ambient_enabled": false}}},
		{name: "ADD with a full disk under the log", agent: ok,
			call:         call{command: "ADD", args: webArgs, netns: netns, conf: map[string]any{"log_file": "/dev/full"}},
			wantRequests: []string{"POST /cmdadd"}},
		{name: "ADD with a log that cannot be opened", agent: ok,
			call:         call{command: "ADD", args: webArgs, netns: netns, conf: map[string]any{"log_file": "/dev/null/x"}},
			wantRequests: []string{"POST /cmdadd"}},
		{name: "DEL is reported", agent: ok,
			call: call{command: "DEL", args: webArgs, netns: netns}, wantRequests: []string{"POST /cmddel"}},
		{name: "DEL without an agent", agent: dead, call: call{command: "DEL", args: webArgs, netns: netns}},
		{name: "DEL that the agent refuses", agent: busy,
			call: call{command: "DEL", args: webArgs}, wantRequests: []string{"POST /cmddel"}},
		{name: "DEL with neither namespace nor previous result", agent: ok,
			call: call{command: "DEL", args: webArgs, noPrev: true}, wantRequests: []string{"POST /cmddel"}},
		{name: "DEL of half a pod", agent: dead, call: call{command: "DEL", args: "K8S_POD_NAME=web-1"}},
		{name: "CHECK asks the agent", agent: ok,
			call: call{command: "CHECK", args: webArgs, netns: netns}, wantRequests: []string{"POST /cmdcheck"}},
		{name: "CHECK that the agent fails", agent: http.StatusConflict,
			call:     call{command: "CHECK", args: webArgs, netns: netns},
			wantCode: 11, wantRequests: []string{"POST /cmdcheck"}},
		{name: "CHECK is not of version 0.3.1", agent: ok,
			call: call{command: "CHECK", version: "0.3.1", args: webArgs, netns: netns}, wantCode: 1},
		{name: "STATUS with an agent", agent: ok, call: call{command: "STATUS", noPrev: true}, wantRequests: []string{"GET /status"}},
		{name: "STATUS without an agent", agent: dead, call: call{command: "STATUS", noPrev: true}, wantCode: 50},
		{name: "STATUS of an agent that is not ready", agent: busy,
			call: call{command: "STATUS", noPrev: true}, wantCode: 50, wantWords: "no ztunnel", wantRequests: []string{"GET /status"}},
		{name: "GC forwards", agent: ok, call: call{command: "GC", noPrev: true}, wantRequests: []string{"POST /gc"}},
		{name: "GC without an agent", agent: dead, call: call{command: "GC", noPrev: true}, wantCode: 11},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir, requests := t.TempDir(), func() []string { return nil }
			if c.agent != dead {
				a := newAgent(t, c.agent)
				dir, requests = a.dir, a.requests
			}
			if c.version == "" {
				c.version = "1.1.0"
			}
			if c.version == "0.2.0" {
				c.noPrev = true
			}
			_, err := c.run(t, dir)
			switch {
			case c.wantCode == 0 && err != nil:
				t.Errorf("failed with code %d: %v", err.Code, err)
			case c.wantCode != 0 && err == nil:
				t.Errorf("succeeded, want code %d", c.wantCode)
			case c.wantCode != 0 && (err.Code != c.wantCode || !strings.Contains(err.Error(), c.wantWords)):
				t.Errorf("code %d: %v; want code %d with %q", err.Code, err, c.wantCode, c.wantWords)
			}
			if d := cmp.Diff(c.wantRequests, requests(), cmpopts.EquateEmpty()); d != "" {
				t.Errorf("requests (-want +got):\n%s", d)
			}
		})
	}
}

func TestGCForwardsTheValidAttachments(t *testing.T) {
	t.Parallel()
	a := newAgent(t, http.StatusOK)
	_, err := call{command: "GC", version: "1.1.0", noPrev: true, conf: map[string]any{
		"cni.dev/valid-attachments": []map[string]string{{"containerID": "abc", "ifname": "eth0"}},
	}}.run(t, a.dir)
	if err != nil {
		t.Fatal(err)
	}
	var got plugin.Valid
	if err := json.Unmarshal(a.last, &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(plugin.Valid{Attachments: []plugin.Attachment{{"abc", "eth0"}}}, got); d != "" {
		t.Errorf("attachments (-want +got):\n%s", d)
	}
}

func TestAddGivesUpOnAnAgentThatHangs(t *testing.T) {
	t.Parallel()
	a := newAgent(t, 0)
	began := time.Now()
	_, err := call{command: "ADD", version: "1.0.0", args: webArgs, netns: netns}.run(t, a.dir)
	if err == nil || err.Code != 11 {
		t.Errorf("ADD = %v, want code 11", err)
	}
	if took := time.Since(began); took < plugin.Timeout || took > 3*plugin.Timeout {
		t.Errorf("ADD gave up after %v, want about %v", took, plugin.Timeout)
	}
}

func TestLogIsBounded(t *testing.T) {
	t.Parallel()
	a := newAgent(t, http.StatusOK)
	log := filepath.Join(t.TempDir(), "cni.log")
	const half = 5 << 20
	if err := os.WriteFile(log+".1", bytes.Repeat([]byte("x"), half), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(log, bytes.Repeat([]byte("y"), half-10), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		c := call{command: "ADD", version: "1.0.0", args: webArgs, netns: netns, conf: map[string]any{"log_file": log}}
		if _, err := c.run(t, a.dir); err != nil {
			t.Fatal(err)
		}
	}
	old, err := os.ReadFile(log + ".1")
	if err != nil || len(old) != half-10 || old[0] != 'y' {
		t.Errorf("the full log was not kept as the only predecessor: %d bytes, %v", len(old), err)
	}
	young, err := os.ReadFile(log)
	if err != nil || bytes.Count(young, []byte("\n")) != 2 || !bytes.Contains(young, []byte(`"pod.name":"web-1"`)) {
		t.Errorf("log is %q, %v; want two lines that name the pod", young, err)
	}
}

func TestInAChainOfLibcni(t *testing.T) {
	t.Parallel()
	a := newAgent(t, http.StatusOK)
	bin := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"istio-cni", "fake-bridge"} {
		if err := os.Symlink(self, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	list, err := libcni.ConfListFromBytes(fmt.Appendf(nil,
		`{"cniVersion":"1.1.0","name":"k8s","plugins":[{"type":"fake-bridge","Result":%s},`+
			`{"type":"istio-cni","cni_agent_run_dir":%q}]}`, prevResult("1.1.0"), a.dir))
	if err != nil {
		t.Fatal(err)
	}
	cni := libcni.NewCNIConfigWithCacheDir([]string{bin}, t.TempDir(), nil)
	rt := &libcni.RuntimeConf{ContainerID: "abc", NetNS: netns, IfName: "eth0",
		Args: [][2]string{{"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", "web-1"}}}
	r, err := cni.AddNetworkList(t.Context(), list, rt)
	if err != nil {
		t.Fatal(err)
	}
	if v := r.Version(); v != "1.1.0" {
		t.Errorf("result has version %s, want 1.1.0", v)
	}
	if err := cni.CheckNetworkList(t.Context(), list, rt); err != nil {
		t.Error(err)
	}
	if err := cni.GetStatusNetworkList(t.Context(), list); err != nil {
		t.Error(err)
	}
	if err := cni.GCNetworkList(t.Context(), list, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "abc", IfName: "eth0"}}}); err != nil {
		t.Error(err)
	}
	if err := cni.DelNetworkList(t.Context(), list, rt); err != nil {
		t.Error(err)
	}
	want := []string{"POST /cmdadd", "POST /cmdcheck", "GET /status", "POST /gc", "POST /cmddel"}
	if d := cmp.Diff(want, a.requests()); d != "" {
		t.Errorf("requests (-want +got):\n%s", d)
	}
}
