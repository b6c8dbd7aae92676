package waypoint_test

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

// endpoint publishes another endpoint of a service of port 80. It is known when what is published after it is.
func (l *lab) endpoint(service string, i int, at netip.AddrPort, change func(*mesh.Workload)) {
	l.t.Helper()
	w := &mesh.Workload{
		UID: fmt.Sprintf("Kubernetes//Pod/shop/%s-%d", service, i), Name: fmt.Sprintf("%s-%d", service, i), Namespace: "shop",
		Addrs: []netip.Addr{at.Addr()}, ServiceAccount: service, CanonicalName: service, OwnerName: service,
		Services: []mesh.ServicePorts{{Service: "shop/" + service + ".shop.svc.cluster.local",
			Ports: []mesh.Port{{ServicePort: 80, TargetPort: at.Port()}}}},
	}
	change(w)
	l.workloads(w)
}

func labelled(labels map[string]string) func(*mesh.Workload) {
	return func(w *mesh.Workload) { w.Labels = labels }
}

// backend publishes a whole traffic policy, and waits until it is known.
func (l *lab) backend(p *mesh.TrafficPolicy) {
	l.t.Helper()
	body, err := wds.EncodeTrafficPolicy(p)
	if err != nil {
		l.t.Fatal(err)
	}
	l.publish(mesh.TypeTrafficPolicy, xds.Resource{Name: p.Key(), Body: body})
	l.eventually("traffic policy known", func() bool {
		_, after, _ := strings.Cut(l.page(":15000/config_dump"), `"trafficPolicies"`)
		return strings.Contains(after, p.Hostname)
	})
}

// spread makes n requests and counts the first words of the answers.
func (l *lab) spread(n int, url string, headers ...string) map[string]int {
	counts := make(map[string]int)
	for range n {
		resp, body := l.get(url, headers...)
		if resp.StatusCode != 200 {
			body = resp.Status
		}
		counts[strings.Fields(body + " -")[0]]++
	}
	return counts
}

// TestSubsets: a rule sends to endpoints by their labels, and the subset's own settings hold there.
func TestSubsets(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.endpoint("cart", 1, named(t, "v1a"), labelled(map[string]string{"version": "v1", "app": "cart"}))
	l.endpoint("cart", 2, named(t, "v1b"), labelled(map[string]string{"version": "v1"}))
	l.endpoint("cart", 3, named(t, "v2"), labelled(map[string]string{"version": "v2"}))
	l.service("cart", "10.9.0.1", mesh.AppHTTP1)
	l.known("cart")
	subset := func(name string) mesh.Backend {
		b := to("cart", 1)
		b.Ref.Subset = name
		return b
	}
	l.backend(&mesh.TrafficPolicy{Namespace: "shop", Hostname: "cart.shop.svc.cluster.local",
		Settings: mesh.TrafficSettings{Balancer: &mesh.Balancer{Algorithm: mesh.BalancerRoundRobin}},
		Subsets: []mesh.Subset{
			{Name: "nobody", Labels: map[string]string{"version": "v3"}}, {Name: "v1", Labels: map[string]string{"version": "v1"}},
			{Name: "v2", Labels: map[string]string{"version": "v2"}},
		}})
	l.routes(mesh.KindVirtualService,
		mesh.HTTPRule{Matches: prefix("/1"), Backends: []mesh.Backend{subset("v1")}},
		mesh.HTTPRule{Matches: prefix("/2"), Backends: []mesh.Backend{subset("v2")}},
		mesh.HTTPRule{Matches: prefix("/nobody"), Backends: []mesh.Backend{subset("nobody")}},
		mesh.HTTPRule{Matches: prefix("/unknown"), Backends: []mesh.Backend{subset("v9")}},
		mesh.HTTPRule{Backends: []mesh.Backend{to("cart", 1)}})
	for path, want := range map[string]string{
		"/1": "map[v1a:10 v1b:10]", "/2": "map[v2:20]", "/": "map[v1a:7 v1b:7 v2:6]",
	} {
		got := fmt.Sprint(l.spread(20, cart+path))
		if path == "/" { // whose turn comes first is the order of names
			want = "map[v1a:7 v1b:7 v2:6]"
		}
		if got != want {
			t.Errorf("20 requests to %s went to %s, want %s", path, got, want)
		}
	}
	if resp, body := l.get(cart + "/nobody"); resp.StatusCode != 503 || body != "no healthy upstream" {
		t.Errorf("a subset without endpoints = %d %q, want 503 no healthy upstream", resp.StatusCode, body)
	}
	if resp, body := l.get(cart + "/unknown"); resp.StatusCode != 503 || body != "" {
		t.Errorf("an unknown subset = %d %q, want 503 with nothing", resp.StatusCode, body)
	}
	// A change of labels moves the endpoint.
	l.endpoint("cart", 3, named(t, "v2-no-more"), labelled(map[string]string{"version": "v1"}))
	l.eventually("v2 empty", func() bool { resp, _ := l.get(cart + "/2"); return resp.StatusCode == 503 })
}

// TestSourceLabels: a rule for clients by the labels of their workload.
func TestSourceLabels(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.workloads(&mesh.Workload{UID: "Kubernetes//Pod/web/front-1", Name: "front-1", Namespace: "web", Addrs: addrs("127.0.0.1"),
		ServiceAccount: "front", CanonicalName: "front", OwnerName: "front", Labels: map[string]string{"tier": "beta"}})
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "v1"))
	l.known("cart")
	direct := func(labels map[string]string, body string) mesh.HTTPRule {
		return mesh.HTTPRule{Matches: []mesh.HTTPMatch{{SourceLabels: labels}}, Direct: &mesh.DirectResponse{Status: 200, Body: []byte(body)}}
	}
	l.routes(mesh.KindVirtualService, direct(map[string]string{"tier": "alpha"}, "alpha"), direct(map[string]string{"tier": "beta"}, "beta"))
	if _, body := l.get(cart + "/"); body != "beta" {
		t.Errorf("the answer is %q, want beta's", body)
	}
}

// TestAlgorithms counts where requests go.
func TestAlgorithms(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	for i, weight := range []uint32{1, 2, 1} {
		l.endpoint("cart", i, named(t, fmt.Sprint("e", i)), func(w *mesh.Workload) { w.Capacity = weight })
	}
	l.service("cart", "10.9.0.1", mesh.AppHTTP1)
	l.known("cart")
	for _, a := range []mesh.BalancerAlgorithm{mesh.BalancerRoundRobin, mesh.BalancerRandom, mesh.BalancerLeastRequest} {
		l.traffic("cart", mesh.TrafficSettings{Balancer: &mesh.Balancer{Algorithm: a}})
		l.eventually("algorithm known", func() bool { return strings.Contains(l.page(":15000/config_dump"), fmt.Sprintf(`"Algorithm": %d`, a)) })
		got := l.spread(400, cart+"/")
		slack := 45 // five standard deviations
		if a == mesh.BalancerRoundRobin {
			slack = 1
		}
		for e, want := range map[string]int{"e0": 100, "e1": 200, "e2": 100} {
			if got[e] < want-slack || got[e] > want+slack {
				t.Errorf("%v: 400 requests went to %v, want 100, 200 and 100", a, got)
				break
			}
		}
	}
}

// TestLocalitiesFailOver: the nearest endpoint takes all until it fails, then the next in order.
func TestLocalitiesFailOver(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.workloads(&mesh.Workload{UID: "Kubernetes//Pod/shop/gate-1", Name: "gate-1", Namespace: "shop", Addrs: addrs(l.ip), ServiceAccount: "gate",
		Locality: mesh.Locality{Region: "east", Zone: "a"}})
	var broken atomic.Bool
	near := app(t, func(w http.ResponseWriter, _ *http.Request) {
		if broken.Load() {
			w.WriteHeader(500)
		}
		fmt.Fprint(w, "near")
	})
	at := func(region, zone string) func(*mesh.Workload) {
		return func(w *mesh.Workload) { w.Locality = mesh.Locality{Region: region, Zone: zone} }
	}
	l.endpoint("cart", 1, near, at("east", "a"))
	l.endpoint("cart", 2, named(t, "north"), at("north", "a"))
	l.endpoint("cart", 3, named(t, "west"), at("west", "a"))
	l.service("cart", "10.9.0.1", mesh.AppHTTP1)
	l.known("cart")
	one := uint32(1)
	l.traffic("cart", mesh.TrafficSettings{
		Outliers: &mesh.OutlierDetection{Consecutive5xx: &one, BaseEjection: time.Hour, MaxEjected: 100},
		Balancer: &mesh.Balancer{Locality: &mesh.LocalityBalance{Failover: []mesh.LocalityFailover{{From: "east", To: "west"}}}},
	})
	if got := l.spread(20, cart+"/"); got["near"] != 20 {
		t.Errorf("20 requests went to %v, want all to the near one", got)
	}
	broken.Store(true)
	if got := l.spread(20, cart+"/"); got["west"] != 19 {
		t.Errorf("when it fails, 20 requests went to %v, want 19 to the region it fails over to", got)
	}
	l.traffic("cart", mesh.TrafficSettings{Balancer: &mesh.Balancer{Locality: &mesh.LocalityBalance{
		Distribute: []mesh.LocalityDistribute{{From: "east/*", To: map[string]uint32{"north": 30, "west": 70}}}}}})
	l.eventually("distributed", func() bool {
		return l.spread(1, cart+"/")["500"] == 0 && strings.Contains(l.page(":15000/config_dump"), `"Distribute": [`)
	})
	got := l.spread(200, cart+"/")
	if got["north"]+got["west"] != 200 || got["north"] < 30 || got["north"] > 90 {
		t.Errorf("200 requests went to %v, want 60 to north and 140 to west", got)
	}
}

// TestRetryBudget: retries are a part of what is under way, and a few in any case; maxRetries bounds them alone.
func TestRetryBudget(t *testing.T) {
	t.Parallel()
	for name, s := range map[string]mesh.TrafficSettings{
		"budget":  {RetryBudget: &mesh.RetryBudget{Percent: mesh.Fraction{Numerator: 1, Denominator: 100}, MinConcurrency: 2}},
		"maximum": {Pool: &mesh.ConnectionPool{MaxRetries: 2}},
		"rate":    {RetryBudget: &mesh.RetryBudget{Percent: mesh.Fraction{Denominator: 100}, MinRate: 2, MinRateInterval: time.Hour, Interval: time.Hour}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, nil)
			var first, second atomic.Int64
			arrived, release := make(chan struct{}, 16), make(chan struct{})
			l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("X-Envoy-Attempt-Count") == "1" {
					first.Add(1)
					w.WriteHeader(503)
					return
				}
				second.Add(1)
				arrived <- struct{}{}
				<-release
			}))
			l.known("cart")
			l.traffic("cart", s)
			l.routes(mesh.KindVirtualService, mesh.HTTPRule{Backends: []mesh.Backend{to("cart", 1)},
				Retry: &mesh.Retry{Attempts: 1, On: mesh.RetryOn5xx, Backoff: time.Millisecond}})
			codes := make(chan int, 6)
			request := func() {
				resp, err := l.client.Get(cart + "/")
				if err != nil {
					t.Error(err)
					codes <- 0
					return
				}
				resp.Body.Close()
				codes <- resp.StatusCode
			}
			for range 2 { // two retries are under way, and wait
				go request()
				<-arrived
			}
			for range 4 {
				go request()
				if got := <-codes; got != 503 {
					t.Errorf("while two retries are under way, the answer is %d, want the first try's 503", got)
				}
			}
			close(release)
			for range 2 {
				if got := <-codes; got != 200 {
					t.Errorf("a retry that was let through = %d, want 200", got)
				}
			}
			if first.Load() != 6 || second.Load() != 2 {
				t.Errorf("%d first tries and %d retries, want 6 and 2", first.Load(), second.Load())
			}
		})
	}
}

// TestSessionsStay on the endpoint that answered first, by a cookie or by a header, until that is gone.
func TestSessionsStay(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	for i := range 4 {
		l.endpoint("cart", i, named(t, fmt.Sprint("e", i)), func(*mesh.Workload) {})
	}
	l.service("cart", "10.9.0.1", mesh.AppHTTP1)
	l.known("cart")
	l.traffic("cart", mesh.TrafficSettings{Persistence: &mesh.SessionPersistence{Cookie: "sid", Absolute: time.Hour, Permanent: true}})
	l.routes(mesh.KindHTTPRoute,
		mesh.HTTPRule{Matches: prefix("/header"), Persistence: &mesh.SessionPersistence{Header: "x-session"}, Backends: []mesh.Backend{to("cart", 1)}},
		mesh.HTTPRule{Backends: []mesh.Backend{to("cart", 1)}})
	resp, body := l.get(cart + "/")
	own, cookie := strings.Fields(body)[0], resp.Header.Get("Set-Cookie")
	if !strings.HasPrefix(cookie, "sid=") || !strings.HasSuffix(cookie, "; Path=/; Max-Age=3600; HttpOnly; SameSite=Lax") {
		t.Errorf("set-cookie is %q", cookie)
	}
	pair, _, _ := strings.Cut(cookie, ";")
	for range 20 {
		if resp, body := l.get(cart+"/", "Cookie", pair); !strings.HasPrefix(body, own) || resp.Header.Get("Set-Cookie") != "" {
			t.Fatalf("with the cookie of %s, %q answers and sets %q", own, body, resp.Header.Get("Set-Cookie"))
		}
	}
	for _, bad := range []string{"sid=1.1", "sid=" + strings.Replace(pair, "sid=", "", 1)[:10] + ".1", "sid=nonsense"} {
		if resp, _ := l.get(cart+"/", "Cookie", bad); !strings.HasPrefix(resp.Header.Get("Set-Cookie"), "sid=") {
			t.Errorf("with %s no new session is given", bad)
		}
	}
	resp, body = l.get(cart + "/header")
	own = strings.Fields(body)[0]
	for range 20 {
		again, body := l.get(cart+"/header", "X-Session", resp.Header.Get("X-Session"))
		if !strings.HasPrefix(body, own) || again.Header.Get("X-Session") != "" {
			t.Fatalf("with the header of %s, %q answers", own, body)
		}
	}
	var gone int
	_, _ = fmt.Sscanf(own, "e%d", &gone)
	l.istiod.Publish(mesh.TypeAddress, nil, []string{fmt.Sprintf("Kubernetes//Pod/shop/cart-%d", gone)})
	l.eventually("another session", func() bool {
		again, body := l.get(cart+"/header", "X-Session", resp.Header.Get("X-Session"))
		return again.StatusCode == 200 && !strings.HasPrefix(body, own) && again.Header.Get("X-Session") != ""
	})
}
