package ztunnel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/ztunnel/nexthop"
)

func testReporter(t *testing.T) (*reporter, *bytes.Buffer) {
	t.Helper()
	var out bytes.Buffer
	log, _, err := daemon.NewLogger(&out, daemon.LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cs := newConns()
	return &reporter{access: log.Named("access"), enabled: true, metrics: newConnMetrics(cs), conns: cs}, &out
}

func inboundRecord() *record {
	web := workload("web")
	web.CanonicalName, web.OwnerName = "web", "web"
	return &record{
		inbound: true, src: netip.MustParseAddrPort("10.0.0.2:4000"), dst: netip.MustParseAddrPort("10.0.0.1:15008"),
		tunnel: "10.0.0.1:80", srcWorkload: web, dstWorkload: workload("cart"), srcID: web.Identity(),
		dstID: workload("cart").Identity(),
	}
}

func TestAccessLogLineOfAnInboundConnection(t *testing.T) {
	rep, out := testReporter(t)
	c := &conn{record: inboundRecord()}
	rep.conns.track(t.Context(), c)
	rep.open(c)
	c.bytes.AToB.Store(3)
	c.bytes.BToA.Store(70)
	rep.close(c, &deniedError{authz.Decision{Why: authz.DenyPolicy, Policy: "shop/stop"}, errPolicyChanged})
	_, line, _ := strings.Cut(out.String(), "\t")
	line, _, _ = strings.Cut(line, " duration=")
	want := "error\taccess\tconnection complete\t" +
		`src.addr="10.0.0.2:4000" src.workload="web" src.namespace="shop" src.identity="spiffe://cluster.local/ns/shop/sa/web" ` +
		`src.cluster="Kubernetes" dst.addr="10.0.0.1:15008" dst.hbone_addr="10.0.0.1:80" dst.workload="cart" ` +
		`dst.namespace="shop" dst.identity="spiffe://cluster.local/ns/shop/sa/cart" dst.cluster="Kubernetes" ` +
		`direction="inbound" bytes_sent=70 bytes_recv=3`
	if diff := cmp.Diff(want, line); diff != "" {
		t.Errorf("access log (-want +got):\n%s", diff)
	}
	if !strings.Contains(out.String(), "shop/stop") {
		t.Errorf("the line does not name the policy: %s", out)
	}
}

// sums adds up a metric over all its label sets.
func sums(t *testing.T, c prometheus.Collector) map[string]float64 {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(c)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			got[strings.TrimPrefix(f.GetName(), "istio_tcp_")] += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return got
}

func TestBytesCountWhileTheConnectionLivesAndOnlyOnceAfter(t *testing.T) {
	rep, _ := testReporter(t)
	c := &conn{record: inboundRecord()}
	rep.conns.track(t.Context(), c)
	rep.open(c)
	c.bytes.AToB.Store(11)
	c.bytes.BToA.Store(22)
	want := map[string]float64{
		"connections_opened_total": 1, "connections_closed_total": 0, "received_bytes_total": 11, "sent_bytes_total": 22,
		"sockets_open": 1,
	}
	if diff := cmp.Diff(want, sums(t, rep.metrics)); diff != "" {
		t.Errorf("live (-want +got):\n%s", diff)
	}
	rep.close(c, nil)
	want["connections_closed_total"], want["sockets_open"] = 1, 0
	if diff := cmp.Diff(want, sums(t, rep.metrics)); diff != "" {
		t.Errorf("closed (-want +got):\n%s", diff)
	}
}

func TestMetricLabelsAreIstios(t *testing.T) {
	rep, _ := testReporter(t)
	c := &conn{record: inboundRecord()}
	c.srcWorkload, c.srcID = nil, mesh.Identity{}
	rep.conns.track(t.Context(), c)
	rep.close(c, &deniedError{decision: authz.Decision{}})
	want := `
# HELP istio_tcp_connections_failed_total Connections that could not be made or were refused.
# TYPE istio_tcp_connections_failed_total counter
istio_tcp_connections_failed_total{connection_security_policy="mutual_tls",destination_app="unknown",destination_canonical_revision="latest",destination_canonical_service="unknown",destination_cluster="Kubernetes",destination_principal="spiffe://cluster.local/ns/shop/sa/cart",destination_region="unknown",destination_service="unknown",destination_service_name="unknown",destination_service_namespace="unknown",destination_version="latest",destination_workload="unknown",destination_workload_namespace="shop",destination_zone="unknown",reporter="destination",request_protocol="tcp",response_flags="DENY",source_app="unknown",source_canonical_revision="unknown",source_canonical_service="unknown",source_cluster="unknown",source_principal="unknown",source_region="unknown",source_version="unknown",source_workload="unknown",source_workload_namespace="unknown",source_zone="unknown"} 1
`
	if err := testutil.CollectAndCompare(rep.metrics, strings.NewReader(want), "istio_tcp_connections_failed_total"); err != nil {
		t.Error(err)
	}
}

func TestEveryFailureHasItsFlag(t *testing.T) {
	tests := []struct {
		name string
		err  error
		want flag
	}{
		{"a normal end", nil, flagNone},
		{"a policy", &deniedError{}, flagDeny},
		{"a policy that has not come", &missingPolicyError{}, flagDeny},
		{"the peer's policy", &hbone.StatusError{Status: 401}, flagDeny},
		{"the peer's application", &hbone.StatusError{Status: 503}, flagConnect},
		{"no certificate", &hbone.StageError{Stage: hbone.StageTLS, Err: identityError{errors.New("istiod is away")}}, flagIdentity},
		{"a handshake", &hbone.StageError{Stage: hbone.StageTLS, Err: errors.New("bad certificate")}, flagTLS},
		{"HTTP/2", &hbone.StageError{Stage: hbone.StageHTTP2, Err: errors.New("goaway")}, flagHTTP2},
		{"a refused dial", &hbone.StageError{Stage: hbone.StageDial, Err: errors.New("refused")}, flagConnect},
		{"a silent dial", &hbone.StageError{Stage: hbone.StageDial, Err: os.ErrDeadlineExceeded}, flagNetworkPolicy},
		{"the application", connectError{errors.New("refused")}, flagConnect},
		{"no endpoint", &nexthop.Error{Fault: nexthop.NoEndpoint}, flagConnect},
		{"an end in the middle", fmt.Errorf("copy: %w", context.Canceled), flagNone},
	}
	for _, tt := range tests {
		if got := flagOf(tt.err); got != tt.want {
			t.Errorf("%s: flag = %s, want %s", tt.name, got, tt.want)
		}
	}
	silent := &hbone.StageError{Stage: hbone.StageDial, Err: os.ErrDeadlineExceeded}
	if s := explain(silent); !strings.Contains(s, "NetworkPolicy") {
		t.Errorf("explain = %q, want a hint at NetworkPolicy", s)
	}
}

func TestHeadersOfAConnect(t *testing.T) {
	w := workload("web")
	w.OwnerName, w.CanonicalName, w.Locality.Region = "web", "shopfront", "eu"
	got := baggage(w)
	want := "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=web,service.name=shopfront,cloud.region=eu"
	if got != want {
		t.Errorf("baggage = %q, want %q", got, want)
	}
	f := forwarded(netip.MustParseAddrPort("[fd00::1]:5"), "cart.shop.svc.cluster.local")
	if want := `for="[fd00::1]:5";host=cart.shop.svc.cluster.local`; f != want {
		t.Errorf("forwarded = %q, want %q", f, want)
	}
	if got := forwardedHost(f); got != "cart.shop.svc.cluster.local" {
		t.Errorf("forwardedHost(%q) = %q", f, got)
	}
	if tp := newTraceparent(); len(tp) != 55 || tp == newTraceparent() {
		t.Errorf("traceparent %q: want 55 characters, never twice the same", tp)
	}
}
