package waypoint_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

const cart = "http://10.9.0.1"

var all = mesh.Fraction{Numerator: 1, Denominator: 1}

func prefix(path string) []mesh.HTTPMatch {
	return []mesh.HTTPMatch{{Path: mesh.PathMatch{Kind: mesh.PathPrefix, Value: path}}}
}

// TestRulesDecideWhereRequestsGo: a canary by header, the rest by weight, counted.
func TestRulesDecideWhereRequestsGo(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "v0"))
	l.service("cart-v1", "10.9.0.2", mesh.AppHTTP1, named(t, "v1"))
	l.service("cart-v2", "10.9.0.3", mesh.AppHTTP1, named(t, "v2"))
	l.known("cart", "cart-v1", "cart-v2")
	l.routes(mesh.KindVirtualService,
		mesh.HTTPRule{
			Matches:  []mesh.HTTPMatch{{Headers: []mesh.NamedMatch{{Name: "x-canary", Match: mesh.StringMatch{Kind: mesh.MatchExact, Value: "yes"}}}}},
			Rewrite:  &mesh.Rewrite{Path: mesh.PathEdit{Kind: mesh.ReplaceFull, Value: "/new"}},
			Headers:  mesh.HeaderEdits{Response: mesh.HeaderOps{Set: []mesh.Header{{Name: "x-from", Value: "canary"}}}},
			Backends: []mesh.Backend{to("cart-v2", 1)},
		},
		mesh.HTTPRule{Backends: []mesh.Backend{to("cart-v1", 80), to("cart-v2", 20)}})
	resp, body := l.get(cart+"/old?a=b", "X-Canary", "yes")
	if body != "v2 /new?a=b" || resp.Header.Get("X-From") != "canary" {
		t.Errorf("with the header: %q from %q, want v2 /new?a=b from canary", body, resp.Header.Get("X-From"))
	}
	counts := make(map[string]int)
	for range 400 {
		_, body := l.get(cart + "/")
		counts[strings.Fields(body)[0]]++
	}
	// Five standard deviations of a fair count of 400 are 40.
	if counts["v1"]+counts["v2"] != 400 || counts["v2"] < 40 || counts["v2"] > 120 {
		t.Errorf("400 requests went to %v, want 80 %% v1 and 20 %% v2", counts)
	}
}

// TestAnswersOfItsOwn: every answer the waypoint gives without a backend's, body for body.
func TestAnswersOfItsOwn(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	l.service("empty", "10.9.0.2", mesh.AppHTTP1)
	gone := listen(t, loopback()+":0")
	l.service("gone", "10.9.0.3", mesh.AppHTTP1, addrPort(gone.Addr()))
	gone.Close()
	cut := listen(t, loopback()+":0")
	l.service("cut", "10.9.0.4", mesh.AppHTTP1, addrPort(cut.Addr()))
	go func() {
		for {
			conn, err := cut.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 1024))
			conn.Close()
		}
	}()
	l.known("cart", "empty", "gone", "cut")
	once := &mesh.Retry{}
	l.routes(mesh.KindVirtualService,
		mesh.HTTPRule{Matches: prefix("/direct"), Direct: &mesh.DirectResponse{Status: 418, Body: []byte("short and stout")}},
		mesh.HTTPRule{Matches: prefix("/redirect"), Redirect: &mesh.Redirect{Status: 308, Authority: "else.example", Path: mesh.PathEdit{Kind: mesh.ReplaceFull, Value: "/x"}}},
		mesh.HTTPRule{Matches: prefix("/fault"), Fault: &mesh.Fault{Abort: mesh.Abort{Percent: all, HTTPStatus: 555}}, Backends: []mesh.Backend{to("cart", 1)}},
		mesh.HTTPRule{Matches: prefix("/slow"), Timeout: 50 * time.Millisecond, Backends: []mesh.Backend{to("cart", 1)}},
		mesh.HTTPRule{Matches: prefix("/try"), TryTimeout: 30 * time.Millisecond, Retry: once, Backends: []mesh.Backend{to("cart", 1)}},
		mesh.HTTPRule{Matches: prefix("/empty"), Backends: []mesh.Backend{to("empty", 1)}},
		mesh.HTTPRule{Matches: prefix("/gone"), Retry: once, Backends: []mesh.Backend{to("gone", 1)}},
		mesh.HTTPRule{Matches: prefix("/cut"), Backends: []mesh.Backend{to("cut", 1)}},
		mesh.HTTPRule{Matches: prefix("/unknown"), Backends: []mesh.Backend{to("unknown", 1)}},
		mesh.HTTPRule{Matches: prefix("/subset"), Backends: []mesh.Backend{{Ref: mesh.BackendRef{Namespace: "shop", Hostname: "cart.shop.svc.cluster.local", Subset: "v9"}, Weight: 1}}},
		mesh.HTTPRule{Matches: prefix("/cors"), CORS: &mesh.CORS{AllowOrigins: []mesh.StringMatch{{Kind: mesh.MatchExact, Value: "http://ok"}}, AllowMethods: []string{"PUT"}}, Backends: []mesh.Backend{to("cart", 1)}},
	)
	for _, c := range []struct {
		path   string
		status int
		body   string
		flags  string
	}{
		{"/direct", 418, "short and stout", "-"},
		{"/redirect", 308, "", "-"},
		{"/fault", 555, "fault filter abort", "FI"},
		{"/slow", 504, "upstream request timeout", "UT"},
		{"/try", 504, "upstream request timeout", "UT"},
		{"/empty", 503, "no healthy upstream", "UH"},
		{"/gone", 503, "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure, transport failure reason: ", "UF"},
		{"/cut", 503, "upstream connect error or disconnect/reset before headers. reset reason: connection termination", "UC"},
		{"/unknown", 503, "", "NC"},
		{"/subset", 503, "", "NC"},
		{"/none", 404, "", "NR"},
	} {
		resp, body := l.get(cart + c.path)
		if resp.StatusCode != c.status || body != c.body && (c.path != "/gone" || !strings.HasPrefix(body, c.body)) {
			t.Errorf("GET %s = %d %q, want %d %q", c.path, resp.StatusCode, body, c.status, c.body)
		}
		if got := resp.Header.Get("Server"); got != "istio-envoy" {
			t.Errorf("GET %s: server is %q, want istio-envoy", c.path, got)
		}
		if body != "" && resp.Header.Get("Content-Type") != "text/plain" {
			t.Errorf("GET %s: content-type is %q, want text/plain", c.path, resp.Header.Get("Content-Type"))
		}
		want := `istio_requests_total{connection_security_policy="mutual_tls"`
		l.eventually(c.path+" counted", func() bool {
			for line := range strings.Lines(l.page(":15020/stats/prometheus")) {
				if strings.HasPrefix(line, want) && strings.Contains(line, fmt.Sprintf(`response_code="%d"`, c.status)) &&
					strings.Contains(line, `response_flags="`+c.flags+`"`) {
					return true
				}
			}
			return false
		})
		if c.path == "/redirect" && resp.Header.Get("Location") != "http://else.example/x" {
			t.Errorf("location is %q, want http://else.example/x", resp.Header.Get("Location"))
		}
	}
	req, _ := http.NewRequestWithContext(t.Context(), "OPTIONS", cart+"/cors", nil)
	req.Header.Set("Origin", "http://ok")
	req.Header.Set("Access-Control-Request-Method", "PUT")
	resp, _ := l.do(req)
	if resp.StatusCode != 200 || resp.Header.Get("Access-Control-Allow-Origin") != "http://ok" || resp.Header.Get("Access-Control-Allow-Methods") != "PUT" {
		t.Errorf("preflight = %d %v, want 200 with what is allowed", resp.StatusCode, resp.Header)
	}
}

// TestRetries: what failed twice succeeds the third time, body and all; what is not to be retried is not.
func TestRetries(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	var calls atomic.Int64
	var counts []string
	var conns sync.Map
	flaky := app(t, func(w http.ResponseWriter, r *http.Request) {
		conns.Store(r.RemoteAddr, true)
		body, _ := io.ReadAll(r.Body)
		if calls.Add(1)%3 != 0 {
			w.WriteHeader(503)
			return
		}
		counts = append(counts, r.Header.Get("X-Envoy-Attempt-Count"))
		fmt.Fprint(w, "got ", string(body))
	})
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, flaky)
	l.known("cart")
	l.routes(mesh.KindVirtualService,
		mesh.HTTPRule{Matches: prefix("/retry"), Backends: []mesh.Backend{to("cart", 1)},
			Retry: &mesh.Retry{Attempts: 3, On: mesh.RetryOn5xx, Backoff: time.Millisecond}},
		mesh.HTTPRule{Backends: []mesh.Backend{to("cart", 1)}})
	for range 5 {
		req, _ := http.NewRequestWithContext(t.Context(), "POST", cart+"/retry", strings.NewReader("a body"))
		if resp, body := l.do(req); resp.StatusCode != 200 || body != "got a body" {
			t.Errorf("POST /retry = %d %q, want 200 after two retries", resp.StatusCode, body)
		}
	}
	opened := 0
	conns.Range(func(any, any) bool { opened++; return true })
	if opened != 1 {
		t.Errorf("%d connections were opened for requests one after the other, want 1: a response that is not passed on costs none", opened)
	}
	if calls.Load() != 15 || counts[0] != "3" {
		t.Errorf("the application was called %d times, the last says it is try %v; want 15, 3", calls.Load(), counts)
	}
	if resp, _ := l.get(cart + "/"); resp.StatusCode != 503 || calls.Load() != 16 {
		t.Errorf("GET / = %d after %d calls, want 503 after one: its status is no reason to retry", resp.StatusCode, calls.Load()-15)
	}
}

// TestAKeptConnectionThatEndedIsNoFailure: the application closes every connection after its response without saying so.
func TestAKeptConnectionThatEndedIsNoFailure(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	ln := listen(t, loopback()+":0")
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 4096))
			_, _ = conn.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
			conn.Close()
		}
	}()
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, addrPort(ln.Addr()))
	l.known("cart")
	for i := range 50 {
		if resp, body := l.get(cart + "/"); resp.StatusCode != 200 || body != "ok" {
			t.Fatalf("request %d = %d %q, want 200 ok", i, resp.StatusCode, body)
		}
	}
}

// TestBadConfigurationKeepsTheLastGood: a rule that is no rule, or is somebody else's, is refused by name.
func TestBadConfigurationKeepsTheLastGood(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "v1"))
	l.known("cart")
	l.routes(mesh.KindVirtualService, mesh.HTTPRule{Direct: &mesh.DirectResponse{Status: 200, Body: []byte("good")}})
	name := "VirtualService/shop/cart/http/0"
	other, err := wds.EncodeRoute(&mesh.Route{Kind: mesh.KindVirtualService, Namespace: "shop", Name: "else", Protocol: mesh.RouteHTTP,
		HTTP: &mesh.HTTPRule{}, Parents: []mesh.RouteParent{{Namespace: "shop", Hostname: "cart.shop.svc.cluster.local"}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, body := range [][]byte{{0xff, 0xff}, other} {
		l.publish(mesh.TypeRoute, xds.Resource{Name: name, Body: body})
		l.publish(mesh.TypeTrafficPolicy, xds.Resource{Name: "/shop/broken.shop.svc.cluster.local", Body: body})
		l.eventually("rejected", func() bool {
			rejected := 0
			for _, c := range l.istiod.Clients() {
				for _, typ := range c.Types {
					rejected += len(typ.Rejected)
				}
			}
			return rejected == 2
		})
		if _, body := l.get(cart + "/"); body != "good" {
			t.Errorf("body is %q, want that of the last good rule", body)
		}
	}
}

// traffic publishes what a service's DestinationRule says, and waits until it is known.
func (l *lab) traffic(name string, s mesh.TrafficSettings) {
	l.t.Helper()
	p := &mesh.TrafficPolicy{Namespace: "shop", Hostname: name + ".shop.svc.cluster.local", Settings: s}
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

// TestBoundsOfAService: of four requests at once one is under way, one waits, and two are refused.
func TestBoundsOfAService(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	release := make(chan struct{})
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(http.ResponseWriter, *http.Request) { <-release }))
	l.known("cart")
	l.traffic("cart", mesh.TrafficSettings{Pool: &mesh.ConnectionPool{MaxConnections: 1, MaxPending: 1}})
	results := make(chan int, 4)
	for range 4 {
		go func() {
			resp, err := l.client.Get(cart + "/")
			if err != nil {
				t.Error(err)
				results <- 0
				return
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			const overflow = "upstream connect error or disconnect/reset before headers. reset reason: overflow"
			if resp.StatusCode == 503 && (string(body) != overflow || resp.Header.Get("X-Envoy-Overloaded") != "true") {
				t.Errorf("refused with %q, x-envoy-overloaded %q", body, resp.Header.Get("X-Envoy-Overloaded"))
			}
			results <- resp.StatusCode
		}()
	}
	for i, want := range []int{503, 503, 200, 200} {
		if i == 2 {
			close(release)
		}
		if got := <-results; got != want {
			t.Errorf("request %d to end = %d, want %d", i, got, want)
		}
	}
}

// TestFailingEndpointsAreEjected after as many failures in a row as the policy says, for as long as it says.
func TestFailingEndpointsAreEjected(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	var bad atomic.Int64
	broken := app(t, func(w http.ResponseWriter, _ *http.Request) { bad.Add(1); w.WriteHeader(500) })
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, broken, named(t, "good"))
	l.known("cart")
	three := uint32(3)
	l.traffic("cart", mesh.TrafficSettings{Outliers: &mesh.OutlierDetection{
		Consecutive5xx: &three, BaseEjection: time.Hour, MaxEjected: 100,
	}})
	for range 200 {
		l.get(cart + "/")
	}
	if n := bad.Load(); n != 3 {
		t.Errorf("the failing endpoint got %d of 200 requests, want 3 and then no more", n)
	}
	_, clusters, _ := strings.Cut(l.page(":15000/config_dump"), `"clusters"`)
	if got := strings.Count(clusters, `"ejectedUntil"`); got != 1 || strings.Count(clusters, `"workload": "Kubernetes//Pod/shop/cart-`) != 2 {
		t.Errorf("config_dump shows %d ejected endpoints, want one of two:\n%s", got, clusters)
	}
}

// TestHashedRequestsStay on one endpoint, by header or by a cookie that the waypoint sets.
func TestHashedRequestsStay(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "a"), named(t, "b"), named(t, "c"))
	l.service("shop", "10.9.0.2", mesh.AppHTTP1, named(t, "a"), named(t, "b"), named(t, "c"))
	l.known("cart", "shop")
	ttl := time.Hour
	l.traffic("cart", mesh.TrafficSettings{Balancer: &mesh.Balancer{Algorithm: mesh.BalancerMaglev, Hash: &mesh.ConsistentHash{Header: "x-user"}}})
	l.traffic("shop", mesh.TrafficSettings{Balancer: &mesh.Balancer{Algorithm: mesh.BalancerRingHash,
		Hash: &mesh.ConsistentHash{Cookie: &mesh.HashCookie{Name: "sid", Path: "/", TTL: &ttl}}}})
	of := func(url string, headers ...string) (*http.Response, map[string]int) {
		counts := make(map[string]int)
		var resp *http.Response
		for range 20 {
			var body string
			resp, body = l.get(url, headers...)
			counts[body]++
		}
		return resp, counts
	}
	endpoints := make(map[string]bool)
	for _, user := range []string{"ann", "bob", "cid", "dan", "eve", "fay", "gil", "hal"} {
		_, counts := of(cart+"/", "X-User", user)
		if len(counts) != 1 {
			t.Errorf("20 requests of %s went to %v, want one endpoint", user, counts)
		}
		for e := range counts {
			endpoints[e] = true
		}
	}
	if len(endpoints) < 2 {
		t.Errorf("8 users share the endpoints %v, want some spread", endpoints)
	}
	resp, counts := of("http://10.9.0.2/")
	if len(counts) < 2 {
		t.Errorf("20 clients without a cookie went to %v, want some spread", counts)
	}
	cookie := resp.Header.Get("Set-Cookie")
	if !strings.HasSuffix(cookie, "; Max-Age=3600; Path=/; HttpOnly") || !strings.HasPrefix(cookie, "sid=") {
		t.Errorf("set-cookie is %q, want sid for an hour", cookie)
	}
	if resp, counts := of("http://10.9.0.2/", "Cookie", "sid="); len(counts) < 2 || !strings.HasPrefix(resp.Header.Get("Set-Cookie"), "sid=") {
		t.Errorf("with an empty cookie: %v and set-cookie %q, want some spread and a new cookie", counts, resp.Header.Get("Set-Cookie"))
	}
	pair, _, _ := strings.Cut(cookie, ";")
	resp, counts = of("http://10.9.0.2/", "Cookie", "other=1; "+pair)
	if len(counts) != 1 || resp.Header.Get("Set-Cookie") != "" {
		t.Errorf("with the cookie: %v and set-cookie %q, want one endpoint and no new cookie", counts, resp.Header.Get("Set-Cookie"))
	}
}

// TestMirrorsGetCopies, body and all, and what they answer changes nothing.
func TestMirrorsGetCopies(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	copies := make(chan string, 8)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) }))
	l.service("shadow", "10.9.0.2", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		copies <- r.Method + " " + r.Host + r.URL.RequestURI() + " " + string(body)
		w.WriteHeader(500)
	}))
	l.known("cart", "shadow")
	l.routes(mesh.KindVirtualService, mesh.HTTPRule{
		Mirrors: []mesh.Mirror{{Ref: to("shadow", 1).Ref, Percent: all}}, Backends: []mesh.Backend{to("cart", 1)},
	})
	for i := range 4 {
		req, _ := http.NewRequestWithContext(t.Context(), "POST", fmt.Sprintf("%s/%d?q", cart, i), strings.NewReader("a body"))
		if resp, body := l.do(req); resp.StatusCode != 200 || body != "a body" {
			t.Errorf("mirrored request = %d %q, want 200 a body", resp.StatusCode, body)
		}
		if got, want := <-copies, fmt.Sprintf("POST 10.9.0.1/%d?q a body", i); got != want {
			t.Errorf("the mirror got %q, want %q", got, want)
		}
	}
}
