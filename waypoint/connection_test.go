package waypoint_test

import (
	"bufio"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/waypoint"
)

func addrPort(a net.Addr) netip.AddrPort { return netip.MustParseAddrPort(a.String()) }

// tcpApp greets who connects, if it has a greeting, then echoes in capitals.
func tcpApp(t *testing.T, greeting string) netip.AddrPort {
	ln := listen(t, loopback()+":0")
	var conns sync.WaitGroup
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer conn.Close()
				_, _ = io.WriteString(conn, greeting)
				text, _ := io.ReadAll(conn)
				_, _ = io.WriteString(conn, strings.ToUpper(string(text)))
			})
		}
	}()
	return addrPort(ln.Addr())
}

// TestConnectionsThatAreNotHTTP pass as they are, whether that is declared or found out, and whoever speaks first.
func TestConnectionsThatAreNotHTTP(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("declared", "10.9.0.1", mesh.AppTCP, tcpApp(t, "hi "))
	l.service("silent", "10.9.0.2", mesh.AppUnknown, tcpApp(t, "hi "))
	l.service("client-first", "10.9.0.3", mesh.AppUnknown, tcpApp(t, ""))
	l.service("http", "10.9.0.4", mesh.AppUnknown, named(t, "web"))
	l.known("declared", "silent", "client-first", "http")
	for _, c := range []struct{ authority, greeting string }{
		{"10.9.0.1:80", "hi "}, {"10.9.0.2:80", "hi "}, {"10.9.0.3:80", ""}, {"declared.shop.svc.cluster.local:80", "hi "},
	} {
		s, err := l.open(t.Context(), c.authority)
		if err != nil {
			t.Errorf("open %s: %v", c.authority, err)
			continue
		}
		hi := make([]byte, len(c.greeting))
		if _, err := io.ReadFull(s, hi); err != nil || string(hi) != c.greeting {
			t.Errorf("%s greets %q (%v), want %q", c.authority, hi, err, c.greeting)
		}
		_, _ = io.WriteString(s, "GEist says boo")
		_ = s.CloseWrite()
		if got, err := io.ReadAll(s); err != nil || string(got) != "GEIST SAYS BOO" {
			t.Errorf("%s answers %q (%v), want what was said, in capitals", c.authority, got, err)
		}
		s.Close()
	}
	l.eventually("HTTP on an undeclared port is served as such", func() bool { // on a busy machine a client may be taken for silent
		l.client.CloseIdleConnections() // and that connection is no HTTP to its end
		resp, body := l.get("http://10.9.0.4/x")
		return resp.Header.Get("Server") == "istio-envoy" && body == "web /x"
	})
	l.eventually("metrics", func() bool {
		m := l.page(":15020/stats/prometheus")
		return strings.Contains(m, `istio_tcp_connections_closed_total{`) && strings.Contains(m, `destination_service="declared.shop.svc.cluster.local"`)
	})
}

// TestWhatIsNotBoundIsRefused: another waypoint's service, a port that does not exist, a workload of a service waypoint.
func TestWhatIsNotBoundIsRefused(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "v1"))
	l.known("cart")
	other := &mesh.Service{Name: "other", Namespace: "shop", Hostname: "other.shop.svc.cluster.local",
		VIPs: []mesh.VIP{{Prefix: netip.MustParsePrefix("10.9.0.9/32")}}, Ports: []mesh.Port{{ServicePort: 80, TargetPort: 80}}}
	body, err := wds.EncodeService(other)
	if err != nil {
		t.Fatal(err)
	}
	l.publish(mesh.TypeAddress, xds.Resource{Name: other.Key(), Body: body})
	for authority, want := range map[string]int{
		"10.9.0.9:80": 404, "10.9.0.1:81": 404, "10.9.0.77:80": 404, l.ip + ":15000": 404, "nonsense": 400,
	} {
		_, err := l.open(t.Context(), authority)
		status, ok := errors.AsType[*hbone.StatusError](err)
		if !ok || status.Status != want {
			t.Errorf("open %s: %v, want status %d", authority, err, want)
		}
	}
}

// TestPoliciesOfTheGatewayGovern: a denied client gets 403, and a policy that has not arrived denies.
func TestPoliciesOfTheGatewayGovern(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "v1"))
	l.service("raw", "10.9.0.2", mesh.AppTCP, tcpApp(t, ""))
	l.known("cart", "raw")
	self := &mesh.Workload{UID: "Kubernetes//Pod/shop/gate-1", Name: "gate-1", Namespace: "shop", Addrs: addrs(l.ip),
		ServiceAccount: "gate", Policies: []string{"shop/guard"}}
	expect := func(what string, status int, body string) {
		t.Helper()
		l.eventually(what, func() bool {
			resp, got := l.get(cart + "/")
			return resp.StatusCode == status && got == body
		})
	}
	expect("allowed without a policy", 200, "v1 /")
	l.workloads(self)
	expect("denied while the policy is not known", 403, "RBAC: access denied")
	policy := func(namespace string) {
		body, err := wds.EncodePolicy(&mesh.Policy{Namespace: "shop", Name: "guard", Scope: mesh.ScopeWorkload, Action: mesh.Allow,
			Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{Namespaces: []mesh.StringMatch{{Kind: mesh.MatchExact, Value: namespace}}}}}}}}})
		if err != nil {
			t.Fatal(err)
		}
		l.publish(mesh.TypeAuthorization, xds.Resource{Name: "shop/guard", Body: body})
	}
	policy("web")
	expect("allowed by name", 200, "v1 /")
	policy("else")
	expect("denied", 403, "RBAC: access denied")
	if _, err := l.open(t.Context(), "10.9.0.2:80"); err == nil {
		t.Error("a TCP connection of a denied client is accepted")
	}
}

// TestEndpointsInTheMeshAreReachedByHBONE as the waypoint itself, and the tunnel is kept.
func TestEndpointsInTheMeshAreReachedByHBONE(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	backend := named(t, "inside")
	id := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}
	var peers sync.Map
	var tunnels atomic.Int64
	ip := l.ztunnel(id, backend, func(peer mesh.Identity, authority string) {
		tunnels.Add(1)
		peers.Store(peer.String()+" "+authority, true)
	})
	svc := l.service("cart", "10.9.0.1", mesh.AppHTTP1)
	l.workloads(&mesh.Workload{UID: "Kubernetes//Pod/shop/cart-1", Name: "cart-1", Namespace: "shop", Addrs: addrs(ip),
		ServiceAccount: "cart", Protocol: mesh.ProtocolHBONE,
		Services: []mesh.ServicePorts{{Service: svc.Key(), Ports: []mesh.Port{{ServicePort: 80, TargetPort: 8080}}}}})
	l.known("cart")
	l.eventually("endpoint known", func() bool { resp, _ := l.get(cart + "/"); return resp.StatusCode == 200 })
	for range 20 {
		if _, body := l.get(cart + "/x"); body != "inside /x" {
			t.Fatalf("body is %q, want inside /x", body)
		}
	}
	if _, ok := peers.Load(waypointID.String() + " " + ip + ":8080"); !ok {
		t.Error("the endpoint's ztunnel did not see the waypoint's identity and the endpoint's port")
	}
	if n := tunnels.Load(); n != 1 {
		t.Errorf("21 requests one after the other took %d tunnels, want 1", n)
	}
}

// ztunnel serves tunnels at an address of its own, as the ztunnel of an endpoint of that identity would. seen is told of each.
func (l *lab) ztunnel(id mesh.Identity, backend netip.AddrPort, seen func(peer mesh.Identity, authority string)) (ip string) {
	ip = loopback()
	srv := &hbone.Server{TLS: identity.ServerConfig(l.ca.SVID(id)), Handle: func(ctx context.Context, r *hbone.Request) {
		peer, _ := identity.PeerIdentity(r.TLS)
		seen(peer, r.Authority)
		s, err := r.Accept("")
		if err != nil {
			return
		}
		conn, err := net.Dial("tcp", backend.String())
		if err != nil {
			_ = s.Reset()
			return
		}
		defer conn.Close()
		var up sync.WaitGroup
		up.Go(func() { _, _ = io.Copy(conn, s); conn.Close() })
		_, _ = io.Copy(s, conn)
		s.Close()
		up.Wait()
	}}
	ln := listen(l.t, ip+":15008")
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { _ = srv.ServeConn(context.Background(), conn) }()
		}
	}()
	return ip
}

// TestDrainLosesNoRequest: requests under way when the waypoint is told to stop end well, and so do those that come while
// the mesh learns of it, each on a connection that then closes.
func TestDrainLosesNoRequest(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(c *waypoint.Config) { c.DrainDelay = time.Hour })
	release, waiting := make(chan struct{}), make(chan struct{}, 8)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			waiting <- struct{}{}
			<-release
		}
		fmt.Fprint(w, "done")
	}))
	l.known("cart")
	if _, body := l.get(cart + "/"); body != "done" { // a kept connection, too
		t.Fatalf("body is %q", body)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			resp, err := l.client.Get(cart + "/slow")
			if err != nil {
				t.Errorf("request under way at the stop: %v", err)
				return
			}
			defer resp.Body.Close()
			if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "done" || !resp.Close {
				t.Errorf("request under way at the stop: %q, %v, connection closes: %v; want done, and that it closes", body, err, resp.Close)
			}
		})
	}
	for range 8 {
		<-waiting
	}
	l.stop()
	l.eventually("not ready", func() bool { return strings.HasPrefix(l.page(":15021/healthz/ready"), "not ready") })
	for range 5 {
		if resp, body := l.get(cart + "/"); body != "done" || !resp.Close {
			t.Errorf("request after the stop: %q, connection closes: %v; want done, and that it closes", body, resp.Close)
		}
	}
	close(release)
	wg.Wait()
	l.hurry()
	l.end()
}

// TestConfigurationChangesUnderLoad: rules and endpoints come and go while requests run, and none fails.
func TestConfigurationChangesUnderLoad(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	one, two := named(t, "one"), named(t, "two")
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, one)
	l.service("next", "10.9.0.2", mesh.AppHTTP1, two)
	l.known("cart", "next")
	stop := make(chan struct{})
	var load sync.WaitGroup
	var served, ofTwo atomic.Int64
	for range 4 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				resp, err := l.client.Get(cart + "/")
				if err != nil {
					t.Errorf("request %d: %v", served.Load(), err)
					return
				}
				body, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || resp.StatusCode != 200 {
					t.Errorf("request %d = %d %q (%v), want 200", served.Load(), resp.StatusCode, body, err)
					return
				}
				served.Add(1)
				if strings.HasPrefix(string(body), "two") {
					ofTwo.Add(1)
				}
			}
		})
	}
	for i := range 10 {
		backend := to("cart", 1)
		if i%2 == 1 {
			backend = to("next", 1)
		}
		l.routes(mesh.KindVirtualService, mesh.HTTPRule{Backends: []mesh.Backend{backend}})
		l.service("cart", "10.9.0.1", mesh.AppHTTP1, []netip.AddrPort{one, two}[i%2])
		from := served.Load()
		l.eventually("some requests more", func() bool { return served.Load() > from+20 || t.Failed() })
	}
	close(stop)
	load.Wait()
	if ofTwo.Load() == 0 || ofTwo.Load() == served.Load() {
		t.Errorf("of %d requests %d went to the second application: the changes did not take effect", served.Load(), ofTwo.Load())
	}
}

// TestUpgradesAndLargeBodies: a protocol switch joins the two connections; bodies larger than any buffer pass both ways.
func TestUpgradesAndLargeBodies(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			_, _ = io.Copy(w, r.Body)
			return
		}
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		_, _ = io.Copy(conn, buf)
	}))
	l.known("cart")
	size := 3 << 20
	req, err := http.NewRequestWithContext(t.Context(), "POST", cart+"/", strings.NewReader(strings.Repeat("x", size)))
	if err != nil {
		t.Fatal(err)
	}
	if resp, body := l.do(req); resp.StatusCode != 200 || len(body) != size {
		t.Errorf("3 MiB echoed = %d with %d bytes, want 200 and all of them", resp.StatusCode, len(body))
	}
	s, err := l.open(t.Context(), "10.9.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, _ = io.WriteString(s, "GET /ws HTTP/1.1\r\nHost: cart\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nfirst")
	r := bufio.NewReader(s)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("upgrade: %v, %v; want 101", resp, err)
	}
	_, _ = io.WriteString(s, " second")
	_ = s.CloseWrite()
	if got, err := io.ReadAll(r); err != nil || string(got) != "first second" {
		t.Errorf("after the upgrade: %q, %v; want what was sent", got, err)
	}
}

// TestAClientThatLeavesFreesItsUpstream: the wait for a response ends with the client.
func TestAClientThatLeavesFreesItsUpstream(t *testing.T) {
	t.Parallel()
	for how, leave := range map[string]func(*hbone.Stream) error{"by an error": (*hbone.Stream).Reset, "in order": (*hbone.Stream).Close} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, nil)
			waiting, over := make(chan struct{}), make(chan struct{})
			l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(_ http.ResponseWriter, r *http.Request) {
				close(waiting)
				<-r.Context().Done()
				close(over)
			}))
			l.known("cart")
			s, err := l.open(t.Context(), "10.9.0.1:80")
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(s, "GET / HTTP/1.1\r\nHost: cart\r\n\r\n")
			<-waiting
			_ = leave(s)
			select {
			case <-over:
			case <-time.After(10 * time.Second):
				t.Error("the application still works for a client that left")
			}
			l.eventually("log", func() bool { return strings.Contains(l.log.String(), `"response_flags":"DC"`) })
		})
	}
}

// TestTLSToTheApplication is begun where a policy asks for it, and only with whom the policy names.
func TestTLSToTheApplication(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "sni ", r.TLS.ServerName) }))
	srv.Listener.Close()
	srv.Listener = listen(t, loopback()+":0")
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	roots := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	for i, c := range []struct {
		tls    mesh.UpstreamTLS
		status int
	}{
		{mesh.UpstreamTLS{ServerName: "example.com", CAPEM: roots}, 200},
		{mesh.UpstreamTLS{ServerName: "other.test", SANs: []string{"nobody", "example.com"}, CAPEM: roots}, 200},
		{mesh.UpstreamTLS{ServerName: "other.test", InsecureSkipVerify: true}, 200},
		{mesh.UpstreamTLS{ServerName: "other.test", CAPEM: roots}, 503},
		{mesh.UpstreamTLS{ServerName: "example.com", SANs: []string{"nobody"}, CAPEM: roots}, 503},
		{mesh.UpstreamTLS{ServerName: "example.com"}, 503}, // no root of the system's signed it
		{mesh.UpstreamTLS{ServerName: "example.com", CAPEM: roots, Credential: "shop/secret"}, 503},
	} {
		name, vip := fmt.Sprintf("secure%d", i), fmt.Sprintf("10.9.1.%d", i+1)
		l.service(name, vip, mesh.AppHTTP1, addrPort(srv.Listener.Addr()))
		l.known(name)
		c.tls.Mode = mesh.TLSSimple
		l.traffic(name, mesh.TrafficSettings{TLS: &c.tls})
		resp, body := l.get("http://" + vip + "/")
		if resp.StatusCode != c.status || c.status == 200 && body != "sni "+c.tls.ServerName {
			t.Errorf("with %+v: %d %q, want %d", c.tls, resp.StatusCode, body, c.status)
		}
	}
}
