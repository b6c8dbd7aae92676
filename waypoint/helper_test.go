package waypoint_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	capb "github.com/mistnet/mistnet/api/ca"
	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/waypoint"
)

// lab is a whole waypoint with an istiod of test make, a client's ztunnel and applications, all on loopback.
type lab struct {
	t      *testing.T
	ca     *meshtest.CA
	istiod *xds.Server
	ip     string // of the waypoint
	pool   *hbone.Pool
	client *http.Client
	log    *lockedBuffer
	stop   context.CancelFunc
	hurry  context.CancelFunc // after stop: what it still waits for is not worth the wait
	done   chan error

	stopIstiod func()
}

var (
	waypointID = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "gate"}
	clientID   = mesh.Identity{TrustDomain: "cluster.local", Namespace: "web", ServiceAccount: "front"}
	gateway    = mesh.GatewayAddress{Namespace: "shop", Hostname: "gate.shop.svc.cluster.local", Port: mesh.PortHBONE}
)

// lockedBuffer is a log that may be read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// caService signs what it is asked to.
type caService struct {
	capb.UnimplementedIstioCertificateServiceServer
	ca *meshtest.CA
}

func (s caService) CreateCertificate(ctx context.Context, req *capb.IstioCertificateRequest) (*capb.IstioCertificateResponse, error) {
	id, err := mesh.ParseIdentity(req.GetMetadata().GetFields()["ImpersonatedIdentity"].GetStringValue())
	if err != nil {
		return nil, err
	}
	chain, err := s.ca.Sign(ctx, id, []byte(req.GetCsr()), time.Hour)
	return &capb.IstioCertificateResponse{CertChain: chain}, err
}

// newLab starts all of it, with an empty mesh but for the waypoint and the client.
func newLab(t *testing.T, change func(*waypoint.Config)) *lab {
	t.Helper()
	return newLabWriting(t, func(log io.Writer) io.Writer { return log }, change)
}

// newLabWriting has the waypoint write to what output makes of the log.
func newLabWriting(t *testing.T, output func(log io.Writer) io.Writer, change func(*waypoint.Config)) *lab {
	t.Helper()
	l := &lab{t: t, ca: meshtest.NewCA(t), ip: loopback(), log: new(lockedBuffer), done: make(chan error, 1)}
	target := l.serveIstiod()
	l.publish(mesh.TypeAuthorization)
	l.publish(mesh.TypeRoute)
	l.publish(mesh.TypeTrafficPolicy)
	l.workloads(
		&mesh.Workload{UID: "Kubernetes//Pod/shop/gate-1", Name: "gate-1", Namespace: "shop", Addrs: addrs(l.ip), ServiceAccount: "gate"},
		&mesh.Workload{UID: "Kubernetes//Pod/web/front-1", Name: "front-1", Namespace: "web", Addrs: addrs("127.0.0.1"),
			ServiceAccount: "front", CanonicalName: "front", OwnerName: "front"})

	dir := t.TempDir()
	root, token := filepath.Join(dir, "root.pem"), filepath.Join(dir, "token")
	for file, text := range map[string][]byte{root: l.ca.RootPEM(), token: []byte("token")} {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg := &waypoint.Config{}
	fs := daemon.NewFlagSet("waypoint")
	cfg.Register(fs)
	if err := fs.Parse([]string{
		"-gateway=gate", "-namespace=shop", "-pod-name=gate-1", "-instance-ip=" + l.ip, "-xds-address=https://" + target,
		"-xds-root-ca=" + root, "-auth-token=" + token, "-listen-addr=" + l.ip + ":15008", "-admin-addr=" + l.ip + ":15000",
		"-metrics-addr=" + l.ip + ":15020", "-ready-addr=" + l.ip + ":15021", "-drain-delay=0s", "-access-log-encoding=JSON", "-sniff-timeout=50ms",
	}, func(string) (string, bool) { return "", false }); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(cfg)
	}
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	env, err := daemon.NewEnv("waypoint", output(l.log), daemon.LogOptions{Level: "debug", Format: "json"})
	if err != nil {
		t.Fatal(err)
	}
	env.Hurry, l.hurry = context.WithCancel(context.Background())
	t.Cleanup(l.hurry)
	w, err := waypoint.New(cfg, env)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	l.stop = stop
	go func() { l.done <- w.Run(ctx) }()
	l.connect()
	t.Cleanup(func() {
		l.client.CloseIdleConnections()
		_ = l.pool.Close()
		l.end()
		if t.Failed() {
			t.Log(l.log.String())
		}
	})
	l.eventually("ready", func() bool { return l.page(":15021/healthz/ready") == "ready\n" })
	return l
}

// end stops the waypoint and waits for its end; once is enough.
func (l *lab) end() {
	l.stop()
	select {
	case err := <-l.done:
		l.done <- nil
		if err != nil {
			l.t.Errorf("Run() = %v", err)
		}
	case <-time.After(time.Minute):
		l.t.Error("the waypoint does not stop")
	}
}

func (l *lab) serveIstiod() string {
	cert := l.ca.Issue(mesh.Identity{}, meshtest.Server("istiod"))
	srv := grpc.NewServer(append(xds.ServerOptions(), grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"},
	})))...)
	l.istiod = xds.NewServer(xds.ServerConfig{Authenticate: func(context.Context) (string, error) { return "waypoint", nil }})
	l.istiod.Register(srv)
	capb.RegisterIstioCertificateServiceServer(srv, caService{ca: l.ca})
	ln := listen(l.t, "127.0.0.1:0")
	go func() { _ = srv.Serve(ln) }()
	l.stopIstiod = srv.Stop
	l.t.Cleanup(srv.Stop)
	return ln.Addr().String()
}

// connect makes the client's side: what its ztunnel would do.
func (l *lab) connect() {
	svid := l.ca.SVID(clientID)
	l.pool = hbone.NewPool(hbone.PoolConfig{
		Dial: func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
			local := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}
			return (&net.Dialer{LocalAddr: local}).DialContext(ctx, "tcp", addr.String())
		},
		TLS: func(_ context.Context, to hbone.Target) (*tls.Config, error) {
			return identity.ClientConfig(svid, to.Expect), nil
		},
	})
	l.client = &http.Client{
		Transport: &http.Transport{
			MaxIdleConnsPerHost: 64,
			DialContext:         func(ctx context.Context, _, addr string) (net.Conn, error) { return l.open(ctx, addr) },
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func (l *lab) open(ctx context.Context, authority string) (*hbone.Stream, error) {
	return l.pool.Open(ctx, hbone.Target{
		Local: clientID, Addr: netip.AddrPortFrom(netip.MustParseAddr(l.ip), mesh.PortHBONE), Expect: []mesh.Identity{waypointID},
	}, authority, hbone.Header{})
}

func (l *lab) publish(typeURL string, rs ...xds.Resource) { l.istiod.Publish(typeURL, rs, nil) }

func (l *lab) workloads(ws ...*mesh.Workload) {
	l.t.Helper()
	for _, w := range ws {
		w.TrustDomain, w.ClusterID, w.Healthy = "cluster.local", "Kubernetes", true
		w.Capacity = max(w.Capacity, 1)
		body, err := wds.EncodeWorkload(w)
		if err != nil {
			l.t.Fatal(err)
		}
		l.publish(mesh.TypeAddress, xds.Resource{Name: w.UID, Body: body})
	}
}

// service publishes a service of port 80, bound to the waypoint, with these servers as endpoints.
func (l *lab) service(name, vip string, app mesh.AppProtocol, servers ...netip.AddrPort) *mesh.Service {
	l.t.Helper()
	svc := &mesh.Service{
		Name: name, Namespace: "shop", Hostname: name + ".shop.svc.cluster.local", Waypoint: gateway,
		VIPs:  []mesh.VIP{{Prefix: netip.PrefixFrom(netip.MustParseAddr(vip), 32)}},
		Ports: []mesh.Port{{ServicePort: 80, TargetPort: 8080, App: app}},
	}
	for i, at := range servers {
		l.workloads(&mesh.Workload{
			UID: fmt.Sprintf("Kubernetes//Pod/shop/%s-%d", name, i), Name: fmt.Sprintf("%s-%d", name, i), Namespace: "shop",
			Addrs: []netip.Addr{at.Addr()}, ServiceAccount: name, CanonicalName: name, OwnerName: name,
			Services: []mesh.ServicePorts{{Service: svc.Key(), Ports: []mesh.Port{{ServicePort: 80, TargetPort: at.Port()}}}},
		})
	}
	body, err := wds.EncodeService(svc)
	if err != nil {
		l.t.Fatal(err)
	}
	l.publish(mesh.TypeAddress, xds.Resource{Name: svc.Key(), Body: body})
	return svc
}

// routes publishes rules of the service cart, in this order.
func (l *lab) routes(kind mesh.RouteKind, rules ...mesh.HTTPRule) {
	l.t.Helper()
	l.routesOf("cart", kind, rules...)
}

// routesOf publishes rules of a service, in this order.
func (l *lab) routesOf(service string, kind mesh.RouteKind, rules ...mesh.HTTPRule) {
	l.t.Helper()
	for i := range rules {
		r := &mesh.Route{
			Kind: kind, Namespace: "shop", Name: service, Protocol: mesh.RouteHTTP, Rule: uint32(i), HTTP: &rules[i],
			Created: time.Unix(1, 0).UTC(), Parents: []mesh.RouteParent{{Namespace: "shop", Hostname: service + ".shop.svc.cluster.local"}},
		}
		body, err := wds.EncodeRoute(r)
		if err != nil {
			l.t.Fatal(err)
		}
		l.publish(mesh.TypeRoute, xds.Resource{Name: r.Key(), Body: body})
	}
	l.eventually("routes known", func() bool {
		return strings.Count(l.page(":15000/config_dump"), `"RuleName"`) >= len(rules)
	})
}

func to(name string, weight uint32) mesh.Backend {
	return mesh.Backend{Ref: mesh.BackendRef{Namespace: "shop", Hostname: name + ".shop.svc.cluster.local"}, Weight: weight}
}

// page reads one of the waypoint's own pages; "" when it cannot.
func (l *lab) page(path string) string {
	resp, err := http.Get("http://" + l.ip + path)
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return string(body)
}

// eventually waits for what happens elsewhere.
func (l *lab) eventually(what string, ok func() bool) {
	l.t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			l.t.Fatalf("%s: not within a minute\n%s", what, l.log)
		}
	}
}

// unused reports whether nothing is under way to any endpoint: what was is over for the waypoint, too.
func (l *lab) unused() bool {
	var dump struct {
		Clusters []struct{ Endpoints []struct{ Active int64 } }
	}
	if json.Unmarshal([]byte(l.page(":15000/config_dump")), &dump) != nil {
		return false
	}
	for _, c := range dump.Clusters {
		for _, e := range c.Endpoints {
			if e.Active != 0 {
				return false
			}
		}
	}
	return true
}

// known waits until the waypoint knows a service.
func (l *lab) known(services ...string) {
	l.t.Helper()
	l.eventually("services known", func() bool {
		var dump struct{ Services []struct{ Hostname string } } // routes name services that are not known yet
		if json.Unmarshal([]byte(l.page(":15000/config_dump")), &dump) != nil {
			return false
		}
		there := make(map[string]bool)
		for _, s := range dump.Services {
			there[strings.TrimSuffix(s.Hostname, ".shop.svc.cluster.local")] = true
		}
		return !slices.ContainsFunc(services, func(s string) bool { return !there[s] })
	})
}

// get makes a request and returns its response, body read.
func (l *lab) get(url string, headers ...string) (*http.Response, string) {
	l.t.Helper()
	req, err := http.NewRequestWithContext(l.t.Context(), "GET", url, nil)
	if err != nil {
		l.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	return l.do(req)
}

func (l *lab) do(req *http.Request) (*http.Response, string) {
	l.t.Helper()
	resp, err := l.client.Do(req)
	if err != nil {
		l.t.Fatalf("%s %s: %v\n%s", req.Method, req.URL, err, l.log)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		l.t.Fatalf("%s %s: read body: %v", req.Method, req.URL, err)
	}
	return resp, string(body)
}

// app starts an HTTP application on an address of its own.
func app(t *testing.T, h http.HandlerFunc) netip.AddrPort { return appAt(t, loopback(), h) }

func appAt(t *testing.T, ip string, h http.HandlerFunc) netip.AddrPort {
	t.Helper()
	srv := httptest.NewUnstartedServer(h)
	srv.Listener.Close()
	srv.Listener = listen(t, ip+":0")
	srv.Start()
	t.Cleanup(srv.Close)
	return netip.MustParseAddrPort(srv.Listener.Addr().String())
}

// named is an application that says its name.
func named(t *testing.T, name string) netip.AddrPort {
	return app(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, name, " ", r.URL.RequestURI()) })
}

func listen(t *testing.T, addr string) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// loopback is an address nobody else is likely to use.
func loopback() string {
	return fmt.Sprintf("127.%d.%d.%d", 64+rand.IntN(190), rand.IntN(256), 1+rand.IntN(254))
}

func addrs(ip string) []netip.Addr { return []netip.Addr{netip.MustParseAddr(ip)} }
