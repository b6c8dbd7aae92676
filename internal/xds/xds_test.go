package xds_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/xds"
)

const (
	testToken = "let-me-in"
	address   = mesh.TypeAddress
	policy    = mesh.TypeAuthorization
)

// server is an xDS server behind real TLS on the loopback device. Its port outlives it, so that it can come back.
type server struct {
	*xds.Server
	grpc *grpc.Server
	addr string
}

// certificate is one self-signed certificate for all tests, and the client's side of trusting it.
var certificate = sync.OnceValues(func() (tls.Certificate, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: true,
	}
	template.IPAddresses = append(template.IPAddresses, netip.MustParseAddr("127.0.0.1").AsSlice())
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, pool
})

func authenticate(ctx context.Context) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if got := md.Get("authorization"); len(got) != 1 || got[0] != "Bearer "+testToken {
		return "", errors.New("wrong token")
	}
	return "tester", nil
}

func startServer(t *testing.T, cfg xds.ServerConfig) *server {
	t.Helper()
	if cfg.Authenticate == nil {
		cfg.Authenticate = authenticate
	}
	return startServerAt(t, "127.0.0.1:0", cfg)
}

func startServerAt(t *testing.T, at string, cfg xds.ServerConfig) *server {
	t.Helper()
	ln, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	cert, _ := certificate()
	s := &server{Server: xds.NewServer(cfg), addr: ln.Addr().String()}
	s.grpc = grpc.NewServer(append(xds.ServerOptions(),
		grpc.Creds(credentials.NewServerTLSFromCert(&cert)))...)
	s.Register(s.grpc)
	var serving sync.WaitGroup
	serving.Go(func() { _ = s.grpc.Serve(ln) })
	t.Cleanup(func() {
		s.close()
		serving.Wait()
	})
	return s
}

func (s *server) close() {
	s.Stop()
	s.grpc.Stop()
}

// proxy is a client and the state it was brought to.
type proxy struct {
	*xds.Client
	disconnected chan error

	mu      sync.Mutex
	state   map[string]map[string]string // type → name → body
	updates []xds.Update
	changed chan struct{} // closed at the next update
	refuse  map[string]error
	hold    chan struct{} // when not nil, each update waits for one value
}

func newProxy() *proxy {
	return &proxy{
		state: map[string]map[string]string{}, changed: make(chan struct{}), refuse: map[string]error{},
		disconnected: make(chan error, 1000),
	}
}

func (p *proxy) config(addr string) xds.ClientConfig {
	_, roots := certificate()
	return xds.ClientConfig{
		Target: addr, TLS: &tls.Config{RootCAs: roots, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS13},
		Token: func(context.Context) (string, error) { return testToken, nil },
		Node:  &core.Node{Id: "ztunnel~10.0.0.1~z.istio-system~istio-system.svc.cluster.local"},
		Subscriptions: []xds.Subscription{
			{TypeURL: policy, Wildcard: true}, {TypeURL: address, Wildcard: true},
		},
		Apply: p.apply, OnDisconnect: func(err error) { p.disconnected <- err },
	}
}

// start runs a client with a configuration made from p.config until the test ends.
func (p *proxy) start(t *testing.T, cfg xds.ClientConfig) *proxy {
	t.Helper()
	p.Client = xds.NewClient(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := p.Run(ctx); err != nil {
			t.Errorf("Run() = %v, want no error", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return p
}

func startProxy(t *testing.T, s *server) *proxy {
	p := newProxy()
	return p.start(t, p.config(s.addr))
}

func (p *proxy) apply(ctx context.Context, u xds.Update) []xds.Rejection {
	p.mu.Lock()
	hold := p.hold
	p.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.updates = append(p.updates, u)
	if p.state[u.TypeURL] == nil {
		p.state[u.TypeURL] = map[string]string{}
	}
	for _, name := range u.Removes {
		delete(p.state[u.TypeURL], name)
	}
	var rejected []xds.Rejection
	for _, r := range u.Upserts {
		if err := p.refuse[r.Name]; err != nil {
			rejected = append(rejected, xds.Rejection{Name: r.Name, Err: err})
			continue
		}
		p.state[u.TypeURL][r.Name] = string(r.Body)
	}
	close(p.changed)
	p.changed = make(chan struct{})
	return rejected
}

func (p *proxy) snapshot(typeURL string) map[string]string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.state[typeURL])
}

// await waits until the client has exactly these resources of a type.
func (p *proxy) await(t *testing.T, typeURL string, want map[string]string) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		p.mu.Lock()
		got, changed := maps.Clone(p.state[typeURL]), p.changed
		p.mu.Unlock()
		if maps.Equal(got, want) {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("the client's %s never became the server's (-want +got):\n%s", typeURL, cmp.Diff(want, got))
		}
	}
}

func awaitClosed(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(20 * time.Second):
		t.Fatalf("%s never happened", what)
	}
}

func resources(bodies map[string]string) []xds.Resource {
	var rs []xds.Resource
	for name, body := range bodies {
		rs = append(rs, xds.Resource{Name: name, Body: []byte(body)})
	}
	return rs
}

func numbered(n int) map[string]string {
	bodies := make(map[string]string, n)
	for i := range n {
		bodies[fmt.Sprintf("wl-%d", i)] = fmt.Sprintf("body %d", i)
	}
	return bodies
}

func TestClientFollowsServer(t *testing.T) {
	t.Parallel()
	s := startServer(t, xds.ServerConfig{})
	s.Publish(address, resources(map[string]string{"a": "1", "b": "2"}), nil)
	p := startProxy(t, s)
	awaitClosed(t, "sync", p.Synced())
	p.await(t, address, map[string]string{"a": "1", "b": "2"})
	p.await(t, policy, nil)

	s.Publish(address, resources(map[string]string{"b": "3", "c": "4"}), []string{"a"})
	p.await(t, address, map[string]string{"b": "3", "c": "4"})
	if got := p.updates[0]; got.TypeURL != policy || !got.First {
		t.Errorf("first update = %+v, want the first of the policies", got)
	}
	wantSameVersions(t, s, p, map[string]string{"b": "3", "c": "4"})
}

// wantSameVersions publishes one more resource: when it arrives, what came before it is on the client's books.
func wantSameVersions(t *testing.T, s *server, p *proxy, state map[string]string) {
	t.Helper()
	want := s.Versions(address)
	state = maps.Clone(state)
	state["last"] = "1"
	s.Publish(address, resources(map[string]string{"last": "1"}), nil)
	p.await(t, address, state)
	got := p.Versions(address)
	delete(got, "last")
	delete(want, "last")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("versions differ (-server +client):\n%s", diff)
	}
}
