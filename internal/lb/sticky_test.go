package lb_test

import (
	"fmt"
	"math"
	"net/netip"
	"testing"

	"github.com/mistnet/mistnet/internal/lb"
	"github.com/mistnet/mistnet/internal/mesh"
)

// stickyRequest is of a service with endpoints of these capacities, from client n.
func stickyRequest(client int, capacities ...uint32) *lb.Request {
	r := &lb.Request{
		Service: &mesh.Service{Ports: []mesh.Port{{ServicePort: 80, TargetPort: 8080}}, LB: mesh.LoadBalancing{Sticky: true}},
		From:    &mesh.Workload{UID: fmt.Sprint("Kubernetes//Pod/shop/client-", client)},
		Dst:     netip.MustParseAddrPort("10.96.0.1:80"),
	}
	for i, c := range capacities {
		r.Endpoints = append(r.Endpoints, mesh.Endpoint{Workload: &mesh.Workload{
			UID: fmt.Sprint("Kubernetes//Pod/shop/web-", i), Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})}, Healthy: true, Capacity: c,
		}})
	}
	return r
}

func stuckTo(t *testing.T, r *lb.Request) string {
	t.Helper()
	c, err := lb.Pick(r, func(uint64) uint64 { t.Fatal("chance was asked"); return 0 })
	if err != nil {
		t.Fatal(err)
	}
	return c.Endpoint.Workload.UID
}

func TestStickyClientsAreSpreadByCapacity(t *testing.T) {
	t.Parallel()
	const clients = 20_000
	count := make(map[string]float64)
	for n := range clients {
		r := stickyRequest(n, 1, 2, 3, 0)
		count[stuckTo(t, r)]++
	}
	for i, share := range []float64{1.0 / 6, 2.0 / 6, 3.0 / 6, 0} {
		got := count[fmt.Sprint("Kubernetes//Pod/shop/web-", i)] / clients
		if math.Abs(got-share) > 0.015 {
			t.Errorf("endpoint %d has %.3f of the clients, want %.3f", i, got, share)
		}
	}
}

func TestStickyClientsMoveOnlyWhenTheyMust(t *testing.T) {
	t.Parallel()
	moved := 0
	for n := range 2000 {
		before := stuckTo(t, stickyRequest(n, 1, 1, 1))
		more := stuckTo(t, stickyRequest(n, 1, 1, 1, 1))
		if more != before {
			moved++
			if more != "Kubernetes//Pod/shop/web-3" {
				t.Fatalf("client %d moved from %s to %s when web-3 came", n, before, more)
			}
		}
		r := stickyRequest(n, 1, 1, 1)
		r.Endpoints[0].Workload.Healthy = false
		if after := stuckTo(t, r); before != "Kubernetes//Pod/shop/web-0" && after != before {
			t.Fatalf("client %d moved from %s to %s when web-0 went", n, before, after)
		}
	}
	if moved < 400 || moved > 600 {
		t.Errorf("%d of 2000 clients moved to the fourth endpoint, want a quarter", moved)
	}
}

func TestStickyPickAllocatesNothing(t *testing.T) {
	r := stickyRequest(1, 1, 2, 3)
	if n := testing.AllocsPerRun(100, func() { _, _ = lb.Pick(r, nil) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
