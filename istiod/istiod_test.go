package istiod_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/istiod"
)

const wait = 10 * time.Second

// lab is a running istiod and the directories it reads.
type lab struct {
	t                 *testing.T
	dir, status, data string
	d                 *istiod.Istiod
	stop              func()
}

func newLab(t *testing.T) *lab {
	l := &lab{t: t, dir: t.TempDir(), status: t.TempDir(), data: filepath.Join(t.TempDir(), "keys")}
	return l
}

func (l *lab) start() {
	l.t.Helper()
	env, err := daemon.NewEnv("istiod", io.Discard, daemon.LogOptions{Level: "debug", Format: "plain"})
	if err != nil {
		l.t.Fatal(err)
	}
	l.d, err = istiod.New(l.t.Context(), istiod.Config{
		Files: l.dir, StatusDir: l.status, DataDir: l.data, XDSAddr: "127.0.0.1:0", MonitoringAddr: "127.0.0.1:0",
	}, env)
	if err != nil {
		l.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(l.t.Context())
	done := make(chan error, 1)
	go func() { done <- l.d.Run(ctx) }()
	stopped := false
	l.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			l.t.Errorf("Run = %v, want nil", err)
		}
	}
	l.t.Cleanup(l.stop)
}

func (l *lab) write(dir, name, content string) {
	l.t.Helper()
	temp := filepath.Join(dir, "."+name)
	if err := os.WriteFile(temp, []byte(content), 0o644); err != nil {
		l.t.Fatal(err)
	}
	if err := os.Rename(temp, filepath.Join(dir, name)); err != nil {
		l.t.Fatal(err)
	}
}

// token mints one as the subcommand does.
func (l *lab) token(args ...string) string {
	l.t.Helper()
	var out, errs bytes.Buffer
	code, handled := istiod.Secrets(append([]string{"token", "-data-dir", l.data}, args...), &out, &errs)
	if code != 0 || !handled {
		l.t.Fatalf("istiod token = %d: %s", code, errs.String())
	}
	return strings.TrimSpace(out.String())
}

func (l *lab) tls() *tls.Config {
	l.t.Helper()
	conf, err := identity.ControlPlaneConfig(l.d.RootPEM(), "istiod.istio-system.svc")
	if err != nil {
		l.t.Fatal(err)
	}
	return conf
}

// proxy is a client of istiod that keeps a snapshot, as ztunnel does.
type proxy struct {
	l       *lab
	updates chan xds.Update
	snap    *mesh.Snapshot
	lost    chan error
}

func (l *lab) connect(token string) *proxy {
	p := &proxy{l: l, updates: make(chan xds.Update, 100), snap: new(mesh.Snapshot), lost: make(chan error, 100)}
	c := xds.NewClient(xds.ClientConfig{
		Target: l.d.XDSAddr().String(), TLS: l.tls(),
		Token: func(context.Context) (string, error) {
			if token == "" {
				return "", nil
			}
			return token, nil
		},
		Node:          &core.Node{Id: "ztunnel~10.0.0.1~ztunnel-n1.istio-system~istio-system.svc.cluster.local"},
		Subscriptions: []xds.Subscription{{TypeURL: mesh.TypeAddress, Wildcard: true}, {TypeURL: mesh.TypeAuthorization, Wildcard: true}},
		Apply:         func(_ context.Context, u xds.Update) []xds.Rejection { p.updates <- u; return nil },
		OnDisconnect: func(err error) {
			select {
			case p.lost <- err:
			default:
			}
		},
	})
	ctx, cancel := context.WithCancel(l.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := c.Run(ctx); err != nil && ctx.Err() == nil {
			l.t.Errorf("client: %v", err)
		}
	}()
	l.t.Cleanup(func() { cancel(); <-done })
	return p
}

// next applies the next update and says what was in it: +name, -name.
func (p *proxy) next() []string {
	p.l.t.Helper()
	select {
	case u := <-p.updates:
		var names []string
		named := make([]wds.Named, 0, len(u.Upserts))
		for _, r := range u.Upserts {
			names = append(names, "+"+r.Name)
			named = append(named, wds.Named{Name: r.Name, Body: r.Body})
		}
		for _, r := range u.Removes {
			names = append(names, "-"+r)
		}
		delta, bad := wds.Delta(p.snap, u.TypeURL, named, u.Removes)
		if len(bad) > 0 {
			p.l.t.Errorf("rejected: %v", bad)
		}
		p.snap = p.snap.Apply(delta)
		slices.Sort(names)
		return names
	case <-time.After(wait):
		p.l.t.Fatal("no update within 10 s")
		return nil
	}
}

// until applies updates until the snapshot is as wanted.
func (p *proxy) until(what string, ok func() bool) {
	p.l.t.Helper()
	for !ok() {
		p.l.t.Log("waiting for", what, "after", p.next())
	}
}

func (p *proxy) wantNext(want ...string) {
	p.l.t.Helper()
	if got := p.next(); !slices.Equal(got, want) {
		p.l.t.Errorf("update = %v, want %v", got, want)
	}
}

// denied asks what the policies in force say of a caller of web.
func (p *proxy) denied(from mesh.Identity) bool {
	p.l.t.Helper()
	w := p.snap.Pod("shop", "web")
	if w == nil {
		p.l.t.Fatal("web is not known")
	}
	policies, missing := p.snap.PoliciesFor(w)
	if len(missing) > 0 {
		p.l.t.Fatalf("policies %v have not come, though workloads name them", missing)
	}
	set, err := authz.Compile(policies)
	if err != nil {
		p.l.t.Fatal(err)
	}
	return !set.Check(&authz.Request{Peer: from, Src: netip.MustParseAddrPort("10.0.0.9:1000"), Dst: netip.MustParseAddrPort("10.0.0.1:80")}).Allow
}

// page reads a page of the monitoring address.
func (l *lab) page(path string) (int, string) {
	l.t.Helper()
	resp, err := http.Get("http://" + l.d.MonitoringAddr().String() + path)
	if err != nil {
		l.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		l.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

type problem struct {
	File, Object, Reason string
	Line                 int
	Refused              bool
}

func (l *lab) problems() []problem {
	l.t.Helper()
	_, body := l.page("/debug/problems")
	var ps []problem
	if err := json.Unmarshal([]byte(body), &ps); err != nil {
		l.t.Fatalf("%v in %s", err, body)
	}
	return ps
}

const (
	meshYAML = `apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: n1, serviceAccountName: web}
---
apiVersion: v1
kind: Pod
metadata: {name: far, namespace: shop}
spec: {nodeName: n2, serviceAccountName: far}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, clusterIP: 10.96.0.1, ports: [{port: 80, targetPort: 8080}]}
`
	stateYAML = `apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, annotations: {ambient.istio.io/redirection: enabled}}
status: {phase: Running, podIP: 10.0.0.1, conditions: [{type: Ready, status: "True"}]}
`
	policyYAML = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: guard, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  action: DENY
  rules: [{from: [{source: {namespaces: [evil]}}]}]
`
	webUID  = "Kubernetes//Pod/shop/web"
	webName = "shop/web.shop.svc.cluster.local"
)

var (
	evil = mesh.Identity{TrustDomain: "cluster.local", Namespace: "evil", ServiceAccount: "x"}
	good = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "x"}
)

func TestFromYAMLToProxies(t *testing.T) {
	l := newLab(t)
	l.write(l.dir, "mesh.yaml", meshYAML)
	l.start()
	p := l.connect(l.token("-node", "n1"))
	p.until("service", func() bool { return p.snap.Service(webName) != nil })
	if w := p.snap.Workload(webUID); w != nil {
		t.Errorf("web has no address yet and is served: %+v", w)
	}
	if code, _ := l.page("/healthz/ready"); code != http.StatusOK {
		t.Errorf("ready = %d, want 200", code)
	}

	// The agent tells the pod's address: exactly its workload comes.
	l.write(l.status, "shop_web.yaml", stateYAML)
	p.until("web", func() bool { return p.snap.Workload(webUID) != nil })
	w := p.snap.Workload(webUID)
	if w.Protocol != mesh.ProtocolHBONE || !w.Healthy || w.Node != "n1" || len(p.snap.Endpoints(webName)) != 1 {
		t.Errorf("web = %+v with %d endpoints, want a healthy HBONE endpoint on n1", w, len(p.snap.Endpoints(webName)))
	}

	// A policy: it comes before the workload that names it, and denies.
	l.write(l.dir, "policy.yaml", policyYAML)
	p.wantNext("+shop/guard")
	p.wantNext("+" + webUID)
	if !p.denied(evil) || p.denied(good) {
		t.Errorf("denied(evil), denied(good) = %v, %v, want true, false", p.denied(evil), p.denied(good))
	}

	// An edit is one small update.
	l.write(l.dir, "policy.yaml", strings.Replace(policyYAML, "evil", "shop", 1))
	p.wantNext("+shop/guard")
	if p.denied(evil) || !p.denied(good) {
		t.Error("the edit did not take effect")
	}

	// Broken YAML: reported with file, line and reason; the last good policy stays; the rest goes on.
	l.write(l.dir, "policy.yaml", strings.Replace(policyYAML, "action", "acton", 1))
	l.write(l.dir, "mesh.yaml", strings.Replace(meshYAML, "10.96.0.1", "10.96.0.2", 1))
	p.wantNext("+" + webName)
	if !p.denied(good) {
		t.Error("a broken document opened the door")
	}
	ps := l.problems()
	if len(ps) != 1 || !ps[0].Refused || ps[0].File != filepath.Join(l.dir, "policy.yaml") || ps[0].Line != 6 ||
		!strings.Contains(ps[0].Reason, `unknown field "spec.acton", did you mean "action"?`) {
		t.Errorf("problems = %+v, want policy.yaml:6 with a suggestion", ps)
	}

	// A policy that is well formed and makes no sense denies everybody.
	l.write(l.dir, "policy.yaml", strings.Replace(policyYAML, "namespaces: [evil]", "ipBlocks: [nonsense]", 1))
	p.wantNext("+shop/guard")
	if !p.denied(evil) || !p.denied(good) {
		t.Error("a policy that makes no sense does not deny")
	}
	ps = l.problems()
	if len(ps) != 1 || ps[0].Refused || ps[0].Line != 1 || !strings.Contains(ps[0].Reason, "ipBlocks[0]") {
		t.Errorf("problems = %+v, want one that names ipBlocks[0]", ps)
	}

	// STRICT: the shared policy comes before the workload that names it.
	l.write(l.dir, "strict.yaml", "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n")
	p.wantNext("+istio-system/istio_converted_static_strict")
	p.wantNext("+" + webUID)
	if err := os.Remove(filepath.Join(l.dir, "policy.yaml")); err != nil {
		t.Fatal(err)
	}
	p.until("the policy is gone", func() bool { return p.snap.Policy("shop/guard") == nil })
	if p.denied(good) || !p.denied(mesh.Identity{}) {
		t.Errorf("denied(good), denied(nobody) = %v, %v, want false, true", p.denied(good), p.denied(mesh.Identity{}))
	}

	for path, want := range map[string]string{
		"/metrics":               "istiod_xds_clients 1",
		"/debug":                 "/debug/problems",
		"/debug/objects":         `"file": "` + filepath.Join(l.dir, "mesh.yaml"),
		"/debug/nouns?name=shop": webUID,
		"/debug/xds":             "istio-system/ztunnel@n1",
	} {
		if code, body := l.page(path); code != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("%s = %d without %q:\n%s", path, code, want, body)
		}
	}
}

func TestNobodyIsAnonymous(t *testing.T) {
	l := newLab(t)
	l.write(l.dir, "mesh.yaml", meshYAML)
	l.start()
	other := newLab(t)
	other.write(other.dir, "mesh.yaml", meshYAML)
	other.start()
	cases := map[string]string{
		"no token":                     "",
		"garbage":                      "not.a.token",
		"a token of another istiod":    other.token("-node", "n1"),
		"a token of another namespace": l.token("-node", "n1", "-service-account", "shop/ztunnel"),
	}
	for name, token := range cases {
		t.Run(name, func(t *testing.T) {
			p := l.connect(token)
			select {
			case u := <-p.updates:
				t.Fatalf("update of %s with %d resources, want a refusal", u.TypeURL, len(u.Upserts))
			case err := <-p.lost:
				if code := status.Code(unwrap(err)); code != codes.Unauthenticated && code != codes.PermissionDenied {
					t.Errorf("refusal = %v, want unauthenticated or permission denied", err)
				}
			case <-time.After(wait):
				t.Fatal("neither an update nor a refusal within 10 s")
			}
		})
	}
}

func unwrap(err error) error {
	for {
		if _, ok := status.FromError(err); ok {
			return err
		}
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}

// sign asks for a certificate.
func (l *lab) sign(token, namespace, account string) error {
	l.t.Helper()
	c, err := identity.NewCAClient(identity.CAClientConfig{
		Target: l.d.XDSAddr().String(), TLS: l.tls(), Token: func(context.Context) (string, error) { return token, nil },
	})
	if err != nil {
		l.t.Fatal(err)
	}
	defer c.Close()
	id := mesh.Identity{TrustDomain: "cluster.local", Namespace: namespace, ServiceAccount: account}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		l.t.Fatal(err)
	}
	csr, err := identity.NewCSR(id, key)
	if err != nil {
		l.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(l.t.Context(), wait)
	defer cancel()
	chain, err := c.Sign(ctx, id, csr, time.Hour)
	if err == nil && len(chain) < 2 {
		l.t.Errorf("chain has %d elements, want leaf and root", len(chain))
	}
	return err
}

func TestCertificatesFollowPods(t *testing.T) {
	l := newLab(t)
	l.write(l.dir, "mesh.yaml", meshYAML)
	l.start()
	n1 := l.token("-node", "n1")
	cases := []struct {
		name, token, namespace, account string
		ok                              bool
	}{
		{"a pod on the node", n1, "shop", "web", true},
		{"a pod on another node", n1, "shop", "far", false},
		{"an account without a pod", n1, "shop", "ghost", false},
		{"without a token", "", "shop", "web", false},
		{"a caller that is no node proxy", l.token("-node", "n1", "-service-account", "shop/web"), "shop", "far", false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			err := l.sign(c.token, c.namespace, c.account)
			if (err == nil) != c.ok {
				t.Errorf("sign %s/%s = %v, want success %v", c.namespace, c.account, err, c.ok)
			}
		})
	}
	if _, body := l.page("/metrics"); !strings.Contains(body, `istiod_certificate_requests_total{code="OK"} 1`) {
		t.Error("the metrics do not count the one certificate")
	}
}

func TestKeysOutliveRestarts(t *testing.T) {
	l := newLab(t)
	l.write(l.dir, "mesh.yaml", meshYAML)
	l.start()
	token, root := l.token("-node", "n1"), l.d.RootPEM()
	l.stop()
	l.start()
	if !bytes.Equal(root, l.d.RootPEM()) {
		t.Error("the root changed")
	}
	p := l.connect(token)
	p.until("service", func() bool { return p.snap.Service(webName) != nil })

	out := filepath.Join(t.TempDir(), "root.pem")
	if code, _ := istiod.Secrets([]string{"root", "-data-dir", l.data, "-out", out}, io.Discard, io.Discard); code != 0 {
		t.Fatalf("istiod root = %d", code)
	}
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, root) {
		t.Errorf("istiod root wrote another root: %v", err)
	}
	if info, err := os.Stat(l.data); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("data directory: %v, %v, want mode 0700", info.Mode(), err)
	}
}

// TestABrokenPolicyOutlivesRestarts: a slip of the pen leaves the last good policy in force, and so it stays.
func TestABrokenPolicyOutlivesRestarts(t *testing.T) {
	l := newLab(t)
	l.write(l.dir, "mesh.yaml", meshYAML)
	l.write(l.dir, "policy.yaml", policyYAML)
	l.write(l.status, "shop_web.yaml", stateYAML)
	l.start()
	p := l.connect(l.token("-node", "n1"))
	p.until("web and its policy", func() bool { return p.snap.Workload(webUID) != nil && p.snap.Policy("shop/guard") != nil })
	l.write(l.dir, "policy.yaml", "not: [yaml")
	l.write(l.dir, "mesh.yaml", strings.Replace(meshYAML, "10.96.0.1", "10.96.0.2", 1)) // the same watcher: the slip was seen before
	p.until("second address", func() bool {
		svc := p.snap.Service(webName)
		return svc != nil && svc.VIPs[0].Prefix.Addr() == netip.MustParseAddr("10.96.0.2")
	})
	l.stop()
	l.start()
	p = l.connect(l.token("-node", "n1"))
	p.until("web and its policy", func() bool { return p.snap.Workload(webUID) != nil && p.snap.Policy("shop/guard") != nil })
	if !p.denied(evil) || p.denied(good) {
		t.Error("the last good policy is not in force after a restart")
	}
	if len(l.problems()) != 1 {
		t.Errorf("problems = %+v, want the slip", l.problems())
	}
	l.write(l.dir, "policy.yaml", "# deleted by a person\n")
	p.until("the policy is gone", func() bool { return p.snap.Policy("shop/guard") == nil })
	l.stop()
	l.start()
	p = l.connect(l.token("-node", "n1"))
	p.until("web", func() bool { return p.snap.Workload(webUID) != nil })
	if p.denied(evil) {
		t.Error("a policy that was deleted came back")
	}
}

// TestATokenInAFileIsNothingElse: other proxies put the file's content into a header as it is, as a kubelet writes it.
func TestATokenInAFileIsNothingElse(t *testing.T) {
	out := filepath.Join(t.TempDir(), "token")
	if code, _ := istiod.Secrets([]string{"token", "-node=n1", "-data-dir", t.TempDir(), "-out", out}, io.Discard, io.Discard); code != 0 {
		t.Fatalf("istiod token = %d", code)
	}
	raw, err := os.ReadFile(out)
	if err != nil || len(raw) == 0 || len(bytes.TrimSpace(raw)) != len(raw) {
		t.Errorf("the file holds %q, %v, want a token and no space around it", raw, err)
	}
}

func TestWrongUsageSaysHow(t *testing.T) {
	var errs bytes.Buffer
	if code, handled := istiod.Secrets([]string{"token", "-data-dir", t.TempDir()}, io.Discard, &errs); code != 1 || !handled || !strings.Contains(errs.String(), "-node is required") {
		t.Errorf("token without a node = %d: %s", code, errs.String())
	}
	if _, handled := istiod.Secrets([]string{"-files", "x"}, io.Discard, io.Discard); handled {
		t.Error("flags were taken for a subcommand")
	}
	if err := new(istiod.Config).Validate(); err == nil || !strings.Contains(err.Error(), "-files") {
		t.Errorf("Validate of nothing = %v, want it to name -files", err)
	}
	env, err := daemon.NewEnv("istiod", io.Discard, daemon.LogOptions{Level: "info", Format: "plain"})
	if err != nil {
		t.Fatal(err)
	}
	l := newLab(t)
	l.start()
	_, err = istiod.New(l.t.Context(), istiod.Config{Files: l.dir, DataDir: l.data, XDSAddr: l.d.XDSAddr().String(), MonitoringAddr: "127.0.0.1:0"}, env)
	if err == nil || !strings.Contains(err.Error(), "-xds-addr") {
		t.Errorf("New on a port in use = %v, want an error that names -xds-addr", err)
	}
}

// TestEditReachesProxiesSoon logs how long it takes from a renamed file to a proxy that has the policy. The bound is
// loose, for busy machines; on an idle one it is the settle time of yamldir and a few milliseconds.
func TestEditReachesProxiesSoon(t *testing.T) {
	l := newLab(t)
	l.write(l.dir, "mesh.yaml", meshYAML)
	l.start()
	p := l.connect(l.token("-node", "n1"))
	p.until("service", func() bool { return p.snap.Service(webName) != nil })
	var took []time.Duration
	for i := range 20 {
		start := time.Now()
		l.write(l.dir, "policy.yaml", strings.Replace(policyYAML, "evil", fmt.Sprint("evil", i), 1))
		p.until("policy", func() bool {
			g := p.snap.Policy("shop/guard")
			return g != nil && g.Groups[0].Clauses[0].Matches[0].Namespaces[0].Value == fmt.Sprint("evil", i)
		})
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	t.Logf("edit to proxy: median %v, slowest %v", took[len(took)/2], took[len(took)-1])
	if took[0] > time.Second {
		t.Errorf("the fastest edit took %v", took[0])
	}
}
