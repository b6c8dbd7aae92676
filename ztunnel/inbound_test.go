package ztunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/controlplane"
	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
	"github.com/mistnet/mistnet/internal/proxyproto"
	"github.com/mistnet/mistnet/internal/zds"
)

// syncBuffer is a log that several goroutines write.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// fixture is one pod, cart, served on loopback without any namespace, and a peer's pool to reach it.
type fixture struct {
	*pod
	ca   *meshtest.CA
	addr netip.AddrPort
	log  *syncBuffer
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{ca: meshtest.NewCA(t), log: new(syncBuffer)}
	log, _, err := daemon.NewLogger(f.log, daemon.LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cs := newConns()
	p := &proxy{
		cfg: &Config{Config: controlplane.Config{TrustDomain: "cluster.local"}, KeepSource: true, ResponseDetail: true}, log: zap.NewNop(),
		state: newState(zap.NewNop()), ids: identity.NewManager(identity.ManagerConfig{CA: f.ca}), conns: cs,
		rep: &reporter{access: log.Named("access"), enabled: true, metrics: newConnMetrics(cs), conns: cs},
	}
	p.state.changed = cs.recheck
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = p.ids.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	f.pod = &pod{
		proxy: p, info: zds.Info{UID: "1", Name: "cart", Namespace: "shop", ServiceAccount: "cart"}, log: zap.NewNop(),
		id: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"},
	}
	f.server = &hbone.Server{TLS: p.ids.ServerConfig(f.id), Handle: f.inbound, Log: zap.NewNop()}
	w := workload("cart")
	w.Addrs = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	push(t, p.state, []*mesh.Workload{w}, nil)

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.addr = ln.Addr().(*net.TCPAddr).AddrPort()
	served := make(chan error, 1)
	go func() {
		served <- daemon.Serve(ctx, ln, 0, func(ctx context.Context, c net.Conn) { f.serveTunnel(ctx, c.(*net.TCPConn)) })
	}()
	t.Cleanup(func() {
		cancel()
		stopped, stop := context.WithCancel(context.Background())
		stop()
		_ = f.server.Shutdown(stopped)
		<-served
	})
	return f
}

func web() mesh.Identity {
	return mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}
}

func (f *fixture) open(t *testing.T, authority string) (*hbone.Stream, error) {
	t.Helper()
	svid := f.ca.SVID(web())
	pool := hbone.NewPool(hbone.PoolConfig{
		Dial: func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", a.String())
		},
		TLS: clientTLSOf(svid),
	})
	t.Cleanup(func() { pool.Close() })
	return pool.Open(t.Context(), hbone.Target{Local: web(), Addr: f.addr, Expect: []mesh.Identity{f.id}}, authority, hbone.Header{})
}

func TestInboundRefusesWhatItMust(t *testing.T) {
	tests := []struct {
		name, authority string
		policy          *mesh.Policy
		status          int
		log             string
	}{
		{name: "another pod's address", authority: "10.9.9.9:80", status: 400, log: "10.9.9.9"},
		{name: "no port", authority: "127.0.0.1", status: 400},
		{name: "not an authority", authority: "a b:80", status: 400},
		{name: "port out of range", authority: "127.0.0.1:70000", status: 400},
		{name: "one of ztunnel's ports", authority: "127.0.0.1:15008", status: 503},
		{name: "unknown hostname", authority: "nobody.shop.svc.cluster.local:80", status: 503, log: "nobody"},
		{name: "denied by policy", authority: "127.0.0.1:80", policy: denyAll("stop", mesh.ScopeNamespace), status: 401, log: "shop/stop"},
		{name: "an invalid policy", authority: "127.0.0.1:80", status: 401, log: "shop/odd",
			policy: &mesh.Policy{Namespace: "shop", Name: "odd", Scope: mesh.ScopeNamespace, Invalid: "unreadable"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t)
			if tt.policy != nil {
				f.state.current.Store(f.state.view(f.state.load().Apply(mesh.Delta{Policies: []*mesh.Policy{tt.policy}})))
			}
			_, err := f.open(t, tt.authority)
			var status *hbone.StatusError
			if !errors.As(err, &status) || status.Status != tt.status {
				t.Fatalf("Open(%q) = %v, want status %d", tt.authority, err, tt.status)
			}
			if tt.log != "" {
				waitFor(t, func() bool { return strings.Contains(f.log.String(), tt.log) })
			}
		})
	}
}

func TestInboundServesConnectOnly(t *testing.T) {
	f := newFixture(t)
	conf := identity.ClientConfig(f.ca.SVID(web()), []mesh.Identity{f.id})
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("https://" + f.addr.String() + "/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.ProtoMajor != 2 || resp.StatusCode != http.StatusBadRequest {
		t.Errorf("GET = HTTP/%d %d, want HTTP/2 400", resp.ProtoMajor, resp.StatusCode)
	}
}

func TestInboundKeepsStrangersOut(t *testing.T) {
	f := newFixture(t)
	other := meshtest.NewCA(t)
	foreign := mesh.Identity{TrustDomain: "elsewhere.org", Namespace: "shop", ServiceAccount: "web"}
	for _, tt := range []struct {
		name string
		svid *identity.SVID
	}{
		{"expired certificate", f.ca.SVID(web(), meshtest.Valid(time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)))},
		{"foreign trust domain", f.ca.SVID(foreign)},
		{"another root", other.SVID(web())},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pool := hbone.NewPool(hbone.PoolConfig{
				Dial: func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
					return (&net.Dialer{}).DialContext(ctx, "tcp", a.String())
				},
				TLS: clientTLSOf(trusting(tt.svid, f.ca)),
			})
			defer pool.Close()
			_, err := pool.Open(t.Context(), hbone.Target{Local: web(), Addr: f.addr, Expect: []mesh.Identity{f.id}}, "127.0.0.1:80", hbone.Header{})
			if err == nil {
				t.Fatal("the tunnel opened")
			}
			waitFor(t, func() bool { return strings.Contains(f.log.String(), "connection failed") })
		})
	}
}

func TestInboundCarriesToTheApplication(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("CI must run as root: sockets are marked")
		}
		t.Skip("needs root: sockets are marked")
	}
	f := newFixture(t)
	app, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	go func() {
		c, err := app.Accept()
		if err != nil {
			return
		}
		_, _ = io.Copy(c, c)
		c.Close()
	}()
	s, err := f.open(t, app.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(s, "through the tunnel"); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(s)
	if err != nil || string(got) != "through the tunnel" {
		t.Fatalf("read %q, %v", got, err)
	}
	if !strings.Contains(s.ResponseBaggage(), "k8s.namespace.name=shop") {
		t.Errorf("baggage of the answer = %q, want the destination's namespace", s.ResponseBaggage())
	}
	waitFor(t, func() bool { return strings.Contains(f.log.String(), "connection complete") })
	for _, want := range []string{`src.identity="spiffe://cluster.local/ns/shop/sa/web"`, "bytes_recv=18", "bytes_sent=18"} {
		if !strings.Contains(f.log.String(), want) {
			t.Errorf("log lacks %s: %s", want, f.log)
		}
	}
}

// TestInboundAnnouncesTheCaller to a workload that wants it: by a PROXY header, on loopback at the workload's port for that,
// whoever was asked for.
func TestInboundAnnouncesTheCaller(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("CI must run as root: sockets are marked")
		}
		t.Skip("needs root: sockets are marked")
	}
	f := newFixture(t)
	f.cfg.AppTunnelLocal = true
	app, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	w := workload("cart")
	w.Addrs = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	w.AppTunnel = mesh.AppTunnel{Proxy: true, Port: addrPort(app.Addr()).Port()}
	push(t, f.state, []*mesh.Workload{w}, nil)
	for _, asked := range []string{"10.96.0.10:80", "[fd00::2]:443"} {
		s, err := f.open(t, asked)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(s, "hello"); err != nil {
			t.Fatal(err)
		}
		c, err := app.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		h, err := proxyproto.Read(c)
		if err != nil || h.To.String() != asked || h.Identity != web() || h.From.Addr().String() != "127.0.0.1" || h.From.Port() == 0 {
			t.Errorf("%s: the application is told %+v, %v, want it, web and web's address", asked, h, err)
		}
		said := make([]byte, 5)
		if _, err := io.ReadFull(c, said); err != nil || string(said) != "hello" {
			t.Errorf("%s: after the header comes %q, %v", asked, said, err)
		}
	}
}

func TestADeadApplicationIs503(t *testing.T) {
	f := newFixture(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	_, err = f.open(t, addr)
	var status *hbone.StatusError
	if !errors.As(err, &status) || status.Status != 503 {
		t.Errorf("Open = %v, want status 503", err)
	}
}

func TestAConnectionEndsWhenAPolicyForbidsIt(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: sockets are marked")
	}
	f := newFixture(t)
	app, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	s, err := f.open(t, app.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	push(t, f.state, nil, []*mesh.Policy{denyAll("stop", mesh.ScopeNamespace)})
	if _, err := s.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("read = %v, want a reset", err)
	}
	waitFor(t, func() bool { return strings.Contains(f.log.String(), "policy changed") })
}

// clientTLSOf shows svid and expects what the target does.
func clientTLSOf(svid *identity.SVID) func(context.Context, hbone.Target) (*tls.Config, error) {
	return func(_ context.Context, to hbone.Target) (*tls.Config, error) {
		return identity.ClientConfig(svid, to.Expect), nil
	}
}

// trusting makes svid's owner trust ca, so that only the server's own judgement is tested.
func trusting(svid *identity.SVID, ca *meshtest.CA) *identity.SVID {
	c := *svid
	c.Roots = ca.Roots()
	return &c
}

// waitFor polls for what another goroutine writes; it is bounded.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	deadline := time.After(5 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatal("it did not happen within 5 s")
		case <-tick.C:
		}
	}
}
