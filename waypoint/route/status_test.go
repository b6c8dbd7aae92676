package route_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/route"
)

// TestStatusesStandForEachOther: the first table is Istio's for replies of the proxy, the second google.rpc.Code's.
func TestStatusesStandForEachOther(t *testing.T) {
	t.Parallel()
	for http, want := range map[uint16]uint32{400: 13, 401: 16, 403: 7, 404: 12, 429: 14, 502: 14, 503: 14, 504: 14, 418: 2, 500: 2} {
		if got := route.GRPCStatus(http); got != want {
			t.Errorf("GRPCStatus(%d) = %d, want %d", http, got, want)
		}
	}
	want := []uint16{200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401}
	for grpc := range want {
		if got := route.HTTPStatus(uint32(grpc)); got != want[grpc] {
			t.Errorf("HTTPStatus(%d) = %d, want %d", grpc, got, want[grpc])
		}
	}
}

// TestEachRetryCondition asks every outcome of every condition alone: what is listed is tried again, all else is not.
func TestEachRetryCondition(t *testing.T) {
	t.Parallel()
	outcomes := map[string]route.Outcome{
		"200": {Status: 200}, "409": {Status: 409}, "418": {Status: 418}, "500": {Status: 500}, "502": {Status: 502}, "504": {Status: 504},
		"505": {Status: 505}, "header": {Status: 200, Header: true}, "limited": {Status: 429, Ratelimited: true},
		"limited 503": {Status: 503, Ratelimited: true},
	}
	for code := range uint32(17) {
		outcomes[fmt.Sprint("grpc ", code)] = route.Outcome{Status: 200, GRPC: true, GRPCStatus: code}
	}
	var resets []string
	for r := route.ResetConnect; r <= route.ResetHTTP3; r++ {
		outcomes[r.String()] = route.Outcome{Reset: r, Sent: true}
		if r != route.ResetOverflow {
			resets = append(resets, r.String())
		}
	}
	outcomes["unsent"] = route.Outcome{Reset: route.ResetConnection}
	resets = append(resets, "unsent")
	want := map[mesh.RetryOn][]string{
		mesh.RetryOn5xx:               append([]string{"500", "502", "504", "505"}, resets...),
		mesh.RetryOnGatewayError:      append([]string{"502", "504"}, resets...),
		mesh.RetryOnReset:             resets,
		mesh.RetryOnResetBefore:       {"unsent"},
		mesh.RetryOnConnectFailure:    {"connect failure"},
		mesh.RetryOnRatelimited:       {"limited", "limited 503"},
		mesh.RetryOnRetriable4xx:      {"409"},
		mesh.RetryOnRefusedStream:     {"refused stream"},
		mesh.RetryOnStatusCodes:       {"418"},
		mesh.RetryOnHeaders:           {"header"},
		mesh.RetryOnHTTP3PostConnect:  {"http3 post connect failure"},
		mesh.RetryOnCancelled:         {"grpc 1"},
		mesh.RetryOnDeadlineExceeded:  {"grpc 4"},
		mesh.RetryOnInternal:          {"grpc 13"},
		mesh.RetryOnResourceExhausted: {"grpc 8"},
		mesh.RetryOnUnavailable:       {"grpc 14"},
	}
	for on := mesh.RetryOn(1); on <= mesh.RetryOnAll; on <<= 1 {
		table, _ := route.Compile([]*mesh.Route{{
			Kind: mesh.KindVirtualService, Namespace: "a", Name: "b", Protocol: mesh.RouteHTTP,
			Parents: []mesh.RouteParent{{Namespace: "a", Hostname: "x"}},
			HTTP:    &mesh.HTTPRule{Retry: &mesh.Retry{Attempts: 1, On: on, Codes: []uint16{418}}},
		}})
		rule, _ := table.Match("a/x", 80, &route.Request{Path: "/"})
		if want[on] == nil {
			t.Errorf("condition %#x is not in the table", uint32(on))
		}
		for name, o := range outcomes {
			if got := rule.Retry.Retriable(o); got != slices.Contains(want[on], name) {
				t.Errorf("condition %#x: Retriable(%s) = %v", uint32(on), name, got)
			}
		}
	}
}
