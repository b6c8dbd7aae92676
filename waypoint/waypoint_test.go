package waypoint_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
)

// TestARequestGoesThrough: no rule at all, one endpoint; what the application and the client see, and what is reported.
func TestARequestGoesThrough(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	seen := make(chan http.Header, 1)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) {
		seen <- r.Header
		w.Header().Set("Server", "own")
		w.Header().Set("X-Envoy-Peer-Metadata", "secret")
		w.WriteHeader(201)
		_, _ = w.Write([]byte("hello " + r.URL.RequestURI() + " " + r.Host))
	}))
	l.known("cart")
	resp, body := l.get("http://10.9.0.1/a/./b/../c%41?q=%2e", "X-Forwarded-Client-Cert", "forged")
	if want := "hello /a/cA?q=%2e 10.9.0.1"; resp.StatusCode != 201 || body != want {
		t.Errorf("response is %d %q, want 201 %q", resp.StatusCode, body, want)
	}
	for name, want := range map[string]string{"Server": "istio-envoy", "X-Envoy-Peer-Metadata": ""} {
		if got := resp.Header.Get(name); got != want {
			t.Errorf("response header %s is %q, want %q", name, got, want)
		}
	}
	if resp.Header.Get("X-Envoy-Upstream-Service-Time") == "" {
		t.Error("response has no x-envoy-upstream-service-time")
	}
	h := <-seen
	for name, want := range map[string]string{
		"X-Forwarded-Proto": "http", "X-Envoy-Attempt-Count": "1", "X-Forwarded-Client-Cert": "", "X-Forwarded-For": "",
	} {
		if got := h.Get(name); got != want {
			t.Errorf("request header %s is %q, want %q", name, got, want)
		}
	}
	if id := h.Get("X-Request-Id"); len(id) != 36 || id[14] != '4' {
		t.Errorf("x-request-id is %q, want a random UUID", id)
	}
	l.eventually("access log", func() bool { return strings.Contains(l.log.String(), `{"start_time":"20`) })
	for _, want := range []string{
		`"response_code":201`, `"method":"GET"`, `"upstream_cluster":"inbound-vip|80|http|cart.shop.svc.cluster.local"`,
		`"src.identity":"spiffe://cluster.local/ns/web/sa/front"`, `"dst.workload":"cart-0"`, `"response_flags":"-"`,
	} {
		if !strings.Contains(l.log.String(), want) {
			t.Errorf("the access log does not hold %s", want)
		}
	}
	metrics := l.page(":15020/stats/prometheus")
	for _, want := range []string{
		`istio_requests_total{`, `reporter="waypoint"`, `source_workload="front"`, `destination_workload="cart"`,
		`response_code="201"`, `source_principal="spiffe://cluster.local/ns/web/sa/front"`,
		`destination_service="cart.shop.svc.cluster.local"`, `istio_request_duration_milliseconds_bucket{`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("the metrics do not hold %s", want)
		}
	}
}
