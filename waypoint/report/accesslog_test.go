package report

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
	"github.com/mistnet/mistnet/waypoint/peer"
	"github.com/mistnet/mistnet/waypoint/route"
)

// records for the formats: a request that went well, one that could not be sent, a connection.
func someRecords() map[string]*Record {
	start := time.Date(2026, 11, 22, 20, 30, 1, 5e6, time.UTC)
	front := &mesh.Workload{Name: "front-1", Namespace: "web", TrustDomain: "cluster.local", ServiceAccount: "front", OwnerName: "front", CanonicalName: "front", ClusterID: "Kubernetes"}
	cart := &mesh.Workload{Name: "cart-1", Namespace: "shop", TrustDomain: "cluster.local", ServiceAccount: "cart", OwnerName: "cart", CanonicalName: "cart", CanonicalRevision: "v2", ClusterID: "Kubernetes"}
	c := &peer.Client{ID: front.Identity(), Addr: netip.MustParseAddrPort("10.1.0.1:4000"), Workload: front}
	svc, local := &mesh.Service{Name: "cart", Namespace: "shop", Hostname: "cart.shop.svc.cluster.local"}, netip.MustParseAddrPort("10.96.0.1:80")
	table, _ := route.Compile(nil)
	rule, _ := table.Match(svc.Key(), 80, &route.Request{Method: "GET", Path: "/"})
	request := func() *Record {
		return &Record{
			Start: start, Client: c, Hostname: svc.Hostname, Local: local, HTTP: true, Protocol: "HTTP/1.1", Method: "GET", Target: `/a"b?q=1`, Authority: "cart",
			UserAgent: "curl/8 \"x\"\xff", RequestID: "id-1", ForwardedFor: "203.0.113.1, 10.0.0.1", Route: rule, Service: svc, Workload: cart,
			Upstream: netip.MustParseAddrPort("10.2.0.1:8080"), port: 80, Attempts: 2, UpstreamTime: 7 * time.Millisecond, Answered: true,
			Status: 200, Flags: "-", Details: "via_upstream", Received: 3, Sent: 70,
		}
	}
	failed := request()
	failed.Status, failed.Flags, failed.Details, failed.Answered, failed.Attempts = 503, "UF,URX", "upstream_reset_before_response_started{remote_connection_failure}", false, 3
	failed.Failure, failed.Sent, failed.subset, failed.Target, failed.UserAgent, failed.ForwardedFor = "dial tcp: refused", 90, "v2", "/", "", ""
	tcp := &Record{
		Start: start, Client: &peer.Client{ID: front.Identity(), Addr: c.Addr, Gateway: &peer.Gateway{ID: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "gate"}}},
		Hostname: svc.Hostname, Local: local, Flags: "-", Details: "rbac_access_denied_matched_policy[none]", SNI: "shop.example",
	}
	tcp.Bytes.AToB.Store(11)
	tcp.Bytes.BToA.Store(22)
	return map[string]*Record{"well": request(), "failed": failed, "tcp": tcp}
}

func TestAccessLogText(t *testing.T) {
	t.Parallel()
	recs := someRecords()
	for name, want := range map[string]string{
		"well": `[2026-11-22T20:30:01.005Z] "GET /a\"b?q=1 HTTP/1.1" 200 - via_upstream - "-" 3 70 9 7 "203.0.113.1, 10.0.0.1" ` +
			`"curl/8 \"x\"\xff" "id-1" "cart" "10.2.0.1:8080" inbound-vip|80|http|cart.shop.svc.cluster.local - 10.96.0.1:80 10.1.0.1:4000 - default` + "\n",
		"failed": `[2026-11-22T20:30:01.005Z] "GET / HTTP/1.1" 503 UF,URX upstream_reset_before_response_started{remote_connection_failure} - ` +
			`"dial tcp: refused" 3 90 9 - "-" "-" "id-1" "cart" "10.2.0.1:8080" inbound-vip|80|http/v2|cart.shop.svc.cluster.local - 10.96.0.1:80 ` +
			"10.1.0.1:4000 - default\n",
		"tcp": `[2026-11-22T20:30:01.005Z] "- - -" 0 - - rbac_access_denied_matched_policy[none] "-" 11 22 9 - "-" "-" "-" "-" "-" - - ` +
			"10.96.0.1:80 10.1.0.1:4000 shop.example -\n",
	} {
		if diff := cmp.Diff(want, string(recs[name].appendText(nil, 9*time.Millisecond))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestAccessLogJSON(t *testing.T) {
	t.Parallel()
	for name, r := range someRecords() {
		line := r.appendJSON(nil, 9*time.Millisecond)
		var got map[string]any
		if err := json.Unmarshal(line, &got); err != nil || !bytes.HasSuffix(line, []byte("}\n")) {
			t.Errorf("%s: %q is no line of JSON: %v", name, line, err)
		}
		if name != "well" {
			continue
		}
		want := map[string]any{
			"start_time": "2026-11-22T20:30:01.005Z", "method": "GET", "path": `/a"b?q=1`, "protocol": "HTTP/1.1", "response_code": 200.,
			"response_flags": "-", "response_code_details": "via_upstream", "bytes_received": 3., "bytes_sent": 70., "duration": 9.,
			"upstream_service_time": 7., "x_forwarded_for": "203.0.113.1, 10.0.0.1", "user_agent": "curl/8 \"x\"\ufffd", "request_id": "id-1",
			"authority": "cart", "upstream_host": "10.2.0.1:8080", "upstream_cluster": "inbound-vip|80|http|cart.shop.svc.cluster.local",
			"downstream_local_address": "10.96.0.1:80", "downstream_remote_address": "10.1.0.1:4000", "route_name": "default",
			"src.identity": "spiffe://cluster.local/ns/web/sa/front", "src.workload": "front-1", "dst.workload": "cart-1", "attempts": 2.,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// TestReportingAllocatesNothing, once the labels of such a request are known, however requests alternate between endpoints.
func TestReportingAllocatesNothing(t *testing.T) {
	if meshtest.Race {
		t.Skip("the race detector makes pools forget")
	}
	recs := someRecords()
	rep := New(Config{Out: io.Discard}, zap.NewNop())
	second := someRecords()["well"] // the same labels, by way of others
	var cache Cache
	if n := testing.AllocsPerRun(200, func() {
		rep.Request(recs["well"], &cache, time.Now())
		rep.Request(second, &cache, time.Now())
	}); n > 0 {
		t.Errorf("two requests: %v allocations, want none", n)
	}
}

// gather is the metrics as a page shows them, by name.
func gather(t *testing.T, m *metrics) map[string]string {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(m)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]string)
	for _, f := range families {
		var b strings.Builder
		for _, s := range f.GetMetric() {
			for _, l := range s.GetLabel() {
				fmt.Fprintf(&b, "%s=%s ", l.GetName(), l.GetValue())
			}
			switch {
			case s.GetHistogram() != nil:
				fmt.Fprintf(&b, "%d buckets, %d, %v\n", len(s.GetHistogram().GetBucket()), s.GetHistogram().GetSampleCount(), s.GetHistogram().GetSampleSum())
			default:
				fmt.Fprintln(&b, s.GetCounter().GetValue())
			}
		}
		out[f.GetName()] = b.String()
	}
	return out
}

// TestMetricsHaveIstiosNamesAndLabels, all of them and always.
func TestMetricsHaveIstiosNamesAndLabels(t *testing.T) {
	t.Parallel()
	recs := someRecords()
	m := newMetrics()
	m.request(recs["well"], new(Cache), 5*time.Millisecond)
	grpc := someRecords()["well"]
	grpc.GRPC, grpc.GRPCStatus = true, "14"
	m.request(grpc, new(Cache), 5*time.Millisecond)
	m.close(recs["tcp"])
	got := gather(t, m)
	const (
		common = "connection_security_policy=mutual_tls destination_app=%s destination_canonical_revision=%s destination_canonical_service=%[1]s " +
			"destination_cluster=%[3]s destination_principal=%[4]s destination_service=cart.shop.svc.cluster.local destination_service_name=%[5]s " +
			"destination_service_namespace=%[6]s destination_version=%[2]s destination_workload=%[1]s destination_workload_namespace=%[6]s "
		source = "response_flags=- source_app=%s source_canonical_revision=%s source_canonical_service=%[1]s source_cluster=%[3]s " +
			"source_principal=spiffe://cluster.local/ns/web/sa/front source_version=%[2]s source_workload=%[1]s source_workload_namespace=%[4]s "
	)
	toCart := fmt.Sprintf(common, "cart", "v2", "Kubernetes", "spiffe://cluster.local/ns/shop/sa/cart", "cart", "shop")
	toNobody := fmt.Sprintf(common, "unknown", "unknown", "unknown", "unknown", "unknown", "unknown")
	ofFront := fmt.Sprintf(source, "front", "latest", "Kubernetes", "web")
	ofNobody := fmt.Sprintf(source, "unknown", "unknown", "unknown", "unknown")
	request := func(protocol, status, tail string) string {
		return strings.Replace(toCart, "destination_workload_namespace=shop ", "destination_workload_namespace=shop grpc_response_status="+status+" reporter=waypoint request_protocol="+protocol+" response_code=200 ", 1) + ofFront + tail + "\n"
	}
	both := func(tail string) string { return request("grpc", "14", tail) + request("http", "", tail) }
	tcp := func(n string) string {
		return toNobody + "reporter=waypoint request_protocol=tcp " + ofNobody + n + "\n"
	}
	sorted := func(s string) string {
		l := strings.Split(strings.TrimSuffix(s, "\n"), "\n")
		if len(l) == 2 && l[0] > l[1] {
			l[0], l[1] = l[1], l[0]
		}
		return strings.Join(l, "\n") + "\n"
	}
	for name := range got {
		got[name] = sorted(got[name])
	}
	want := map[string]string{
		"istio_requests_total":                sorted(both("1")),
		"istio_request_duration_milliseconds": sorted(both("19 buckets, 1, 5")),
		"istio_request_bytes":                 sorted(both("19 buckets, 1, 3")),
		"istio_response_bytes":                sorted(both("19 buckets, 1, 70")),
		"istio_tcp_connections_opened_total":  tcp("1"),
		"istio_tcp_connections_closed_total":  tcp("1"),
		"istio_tcp_received_bytes_total":      tcp("11"),
		"istio_tcp_sent_bytes_total":          tcp("22"),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
}

// TestClientsCannotMakeSeriesWithoutEnd: who describes itself is believed, so many at most.
func TestClientsCannotMakeSeriesWithoutEnd(t *testing.T) {
	t.Parallel()
	m := newMetrics()
	r := someRecords()["well"]
	for i := range 3 * maxTold {
		c := *r.Client
		c.Workload, c.Told = nil, &peer.Description{Cluster: "far", Namespace: "ns", Workload: fmt.Sprintf("d%d", i), Service: "s", Revision: "v1"}
		r.Client = &c
		m.request(r, new(Cache), time.Millisecond)
	}
	if n := len(m.all); n != maxTold+1 {
		t.Errorf("%d series, want %d and one for all others", n, maxTold)
	}
	text := gather(t, m)["istio_requests_total"]
	for _, want := range []string{"source_workload=d7 ", "source_canonical_revision=v1 ", "source_cluster=far ", fmt.Sprintf("source_workload_namespace=unknown %d\n", 2*maxTold)} {
		if !strings.Contains(text, want) {
			t.Errorf("the metrics do not hold %q", want)
		}
	}
}

// TestLinesOfTheAccessLogHaveAnEnd, however much a client writes.
func TestLinesOfTheAccessLogHaveAnEnd(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("\xff", 60<<10)
	r := someRecords()["well"]
	r.Target, r.UserAgent, r.RequestID, r.ForwardedFor, r.Authority = long, long, long, long, long
	text, object := r.appendText(nil, time.Second), r.appendJSON(nil, time.Second)
	if most := 5*4*maxLogged + 2048; len(text) > most || len(object) > most {
		t.Errorf("lines of %d and %d bytes, want no more than %d", len(text), len(object), most)
	}
	var any map[string]any
	if err := json.Unmarshal(object, &any); err != nil || !strings.HasSuffix(fmt.Sprint(any["user_agent"]), "...") {
		t.Errorf("an object that ends in %.100q: %v", object[len(object)-100:], err)
	}
	if !strings.Contains(string(text), `\xff..." "`) {
		t.Errorf("a line without %q: %.200q", "...", text)
	}
}
