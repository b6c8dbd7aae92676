package waypoint_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

// healthCheck asks every second, and believes the first answer.
func healthCheck(change func(*mesh.HealthCheck)) mesh.TrafficSettings {
	h := &mesh.HealthCheck{Path: "/healthz", Interval: time.Second, Timeout: 500 * time.Millisecond, Unhealthy: 1, Healthy: 1}
	change(h)
	return mesh.TrafficSettings{Health: h, Balancer: &mesh.Balancer{Algorithm: mesh.BalancerRoundRobin}}
}

// spreads waits until n requests go to as many endpoints as there are names, all of them to these.
func (l *lab) spreads(url string, names ...string) {
	l.t.Helper()
	var got map[string]int
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		got = l.spread(2*len(names)+2, url)
		all := len(got) == len(names)
		for _, name := range names {
			all = all && got[name] > 0
		}
		if all {
			return
		}
	}
	l.t.Fatalf("requests go to %v, want %v\n%s", got, names, l.page(":15000/config_dump"))
}

// patient is an application with a page about its health.
type patient struct {
	netip.AddrPort
	status atomic.Int32
	asked  atomic.Pointer[http.Request]
	checks atomic.Int64
}

func newPatient(t *testing.T, name string) *patient {
	p := new(patient)
	p.status.Store(200)
	p.AddrPort = app(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/healthz") {
			p.checks.Add(1)
			p.asked.Store(r)
			w.WriteHeader(int(p.status.Load()))
			return
		}
		fmt.Fprint(w, name)
	})
	return p
}

// TestHealthChecks: an endpoint whose page says it is not well gets nothing until it is again; when none is, requests fail; when
// nobody asks any more, all are well.
func TestHealthChecks(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	a, b := newPatient(t, "a"), newPatient(t, "b")
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, a.AddrPort, b.AddrPort)
	l.known("cart")
	l.traffic("cart", healthCheck(func(h *mesh.HealthCheck) { h.Path, h.Host = "/healthz?full", "cart.example" }))
	l.spreads(cart+"/", "a", "b")
	l.eventually("both are asked", func() bool { return a.asked.Load() != nil && b.asked.Load() != nil })
	if r := a.asked.Load(); r.Method != "GET" || r.RequestURI != "/healthz?full" || r.Host != "cart.example" || r.UserAgent() != "mistnet-health-check" {
		t.Errorf("asked was %s %s of %s by %s", r.Method, r.RequestURI, r.Host, r.UserAgent())
	}
	a.status.Store(503)
	l.spreads(cart+"/", "b")
	dump := l.checks()
	if c := dump["cart-0"]; !c.Failing || c.Error != "the answer is 503" || c.At.IsZero() {
		t.Errorf("config_dump says of the failing endpoint %+v", c)
	}
	if c := dump["cart-1"]; c.Failing || c.Error != "" || c.At.IsZero() {
		t.Errorf("config_dump says of the other one %+v", c)
	}
	metrics := l.page(":15020/metrics")
	for _, want := range []string{
		`mistnet_health_check_failing_endpoints{destination_service="cart.shop.svc.cluster.local",destination_service_namespace="shop"} 1`,
		`mistnet_health_checks_total{destination_service="cart.shop.svc.cluster.local",destination_service_namespace="shop",result="fail"} `,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	b.status.Store(404)
	l.eventually("none is well", func() bool {
		resp, body := l.get(cart + "/")
		return resp.StatusCode == 503 && body == "no healthy upstream"
	})
	a.status.Store(302)
	l.spreads(cart+"/", "a")
	l.traffic("cart", mesh.TrafficSettings{Balancer: &mesh.Balancer{Algorithm: mesh.BalancerRoundRobin}})
	l.spreads(cart+"/", "a", "b")
	if strings.Contains(l.page(":15000/config_dump"), `"healthCheck"`) {
		t.Error("config_dump shows checks of a service that nobody asks any more")
	}
	if got := l.page(":15020/metrics"); !strings.Contains(got, `mistnet_health_check_failing_endpoints{destination_service="cart.shop.svc.cluster.local",destination_service_namespace="shop"} 0`) {
		t.Error("endpoints count as failing that nobody asks any more")
	}
}

type checkShown struct {
	Failing bool
	Error   string
	At      time.Time
}

// checks is what config_dump says of checks, by the names of endpoints.
func (l *lab) checks() map[string]checkShown {
	l.t.Helper()
	var dump struct {
		Clusters []struct {
			Endpoints []struct {
				Workload    string
				HealthCheck *checkShown
			}
		}
	}
	if err := json.Unmarshal([]byte(l.page(":15000/config_dump")), &dump); err != nil {
		l.t.Fatal(err)
	}
	all := make(map[string]checkShown)
	for _, c := range dump.Clusters {
		for _, e := range c.Endpoints {
			if e.HealthCheck != nil {
				all[e.Workload[strings.LastIndex(e.Workload, "/")+1:]] = *e.HealthCheck
			}
		}
	}
	return all
}

// TestHealthOfConnections: what is no HTTP is asked by connecting, on a port of its own if one is named; subsets know what came of it.
func TestHealthOfConnections(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	ip := loopback()
	side := listen(t, ip+":0") // as if it were for health
	var accepted atomic.Int64
	go func() {
		for {
			conn, err := side.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			conn.Close()
		}
	}()
	port := addrPort(side.Addr()).Port()
	ln := listen(t, ip+":0")
	go func() {
		_ = http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "a") }))
	}()
	l.endpoint("cart", 1, addrPort(ln.Addr()), labelled(map[string]string{"version": "v1"}))
	l.endpoint("cart", 2, named(t, "b"), labelled(map[string]string{"version": "v1"})) // nothing listens on the other port there
	l.service("cart", "10.9.0.1", mesh.AppHTTP1)
	l.known("cart")
	settings := healthCheck(func(h *mesh.HealthCheck) { h.Protocol, h.Path, h.Port = mesh.HealthTCP, "", port })
	l.backend(&mesh.TrafficPolicy{Namespace: "shop", Hostname: "cart.shop.svc.cluster.local", Settings: settings,
		Subsets: []mesh.Subset{{Name: "v1", Labels: map[string]string{"version": "v1"}}}})
	sub := to("cart", 1)
	sub.Ref.Subset = "v1"
	l.routes(mesh.KindVirtualService, mesh.HTTPRule{Matches: prefix("/v1"), Backends: []mesh.Backend{sub}}, mesh.HTTPRule{Backends: []mesh.Backend{to("cart", 1)}})
	l.eventually("both are asked, and one fails", func() bool { c := l.checks(); return !c["cart-1"].At.IsZero() && c["cart-2"].Failing })
	l.spreads(cart+"/", "a")
	l.spreads(cart+"/v1", "a")
	if accepted.Load() == 0 {
		t.Error("nobody asked on the port of its own")
	}
	side.Close()
	l.eventually("none is well", func() bool { resp, _ := l.get(cart + "/v1"); return resp.StatusCode == 503 })
}

// TestHealthOfGRPC asks the health service of gRPC.
func TestHealthOfGRPC(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	ln := listen(t, loopback()+":0")
	srv, state := grpc.NewServer(), health.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, state)
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(srv.Stop)
	l.service("cart", "10.9.0.1", mesh.AppGRPC, addrPort(ln.Addr()))
	l.known("cart")
	l.traffic("cart", healthCheck(func(h *mesh.HealthCheck) { h.Protocol, h.Path, h.Service = mesh.HealthGRPC, "", "shop.Cart" }))
	says := func(failing bool, text string) {
		t.Helper()
		l.eventually("the check says "+text, func() bool {
			c := l.checks()["cart-0"]
			return !c.At.IsZero() && c.Failing == failing && strings.HasPrefix(c.Error, text) && (text != "" || c.Error == "")
		})
	}
	says(true, "the answer is gRPC status 5")
	state.SetServingStatus("shop.Cart", grpc_health_v1.HealthCheckResponse_SERVING)
	says(false, "")
	state.SetServingStatus("shop.Cart", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	says(true, "the answer is NOT_SERVING")
}

// TestHealthOfEndpointsInTheMesh is asked the way requests go: through a tunnel, as the waypoint. A check that takes too long fails.
func TestHealthOfEndpointsInTheMesh(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	var slow atomic.Bool
	backend := app(t, func(w http.ResponseWriter, r *http.Request) {
		if slow.Load() && r.URL.Path == "/healthz" {
			<-r.Context().Done()
		}
		fmt.Fprint(w, "inside")
	})
	id := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}
	var asked atomic.Bool
	ip := l.ztunnel(id, backend, func(peer mesh.Identity, authority string) {
		if peer == waypointID && strings.HasSuffix(authority, ":8080") {
			asked.Store(true)
		}
	})
	svc := l.service("cart", "10.9.0.1", mesh.AppHTTP1)
	l.workloads(&mesh.Workload{UID: "Kubernetes//Pod/shop/cart-1", Name: "cart-1", Namespace: "shop", Addrs: addrs(ip),
		ServiceAccount: "cart", Protocol: mesh.ProtocolHBONE,
		Services: []mesh.ServicePorts{{Service: svc.Key(), Ports: []mesh.Port{{ServicePort: 80, TargetPort: 8080}}}}})
	l.known("cart")
	l.traffic("cart", healthCheck(func(*mesh.HealthCheck) {}))
	l.eventually("asked and well", func() bool {
		c, ok := l.checks()["cart-1"]
		return ok && !c.At.IsZero() && c.Error == "" && asked.Load()
	})
	slow.Store(true)
	l.eventually("asked in vain", func() bool { c := l.checks()["cart-1"]; return c.Failing && c.Error == "no answer within 500ms" })
}

// TestChecksOnlyOfWhatIsServed: a service of another waypoint is not asked, but for one that a rule sends to.
func TestChecksOnlyOfWhatIsServed(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	own, other := newPatient(t, "own"), newPatient(t, "other")
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, own.AddrPort)
	stock := l.service("stock", "10.9.0.9", mesh.AppHTTP1, other.AddrPort)
	stock.Waypoint = mesh.GatewayAddress{}
	body, err := wds.EncodeService(stock)
	if err != nil {
		t.Fatal(err)
	}
	l.publish(mesh.TypeAddress, xds.Resource{Name: stock.Key(), Body: body})
	l.known("cart")
	l.traffic("stock", healthCheck(func(*mesh.HealthCheck) {}))
	l.traffic("cart", healthCheck(func(*mesh.HealthCheck) {}))
	l.eventually("the own is asked twice", func() bool { return own.checks.Load() > 1 })
	if other.checks.Load() > 0 {
		t.Error("endpoints are asked of a service that is another waypoint's")
	}
	l.routes(mesh.KindVirtualService, mesh.HTTPRule{Backends: []mesh.Backend{to("stock", 1)}})
	l.eventually("the other is asked", func() bool { return other.checks.Load() > 0 })
}
