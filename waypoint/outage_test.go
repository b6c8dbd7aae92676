package waypoint_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
)

// TestEndpointsByName: one that resolves is reached by the family of addresses the waypoint has, and what does not is told.
func TestEndpointsByName(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	at := appAt(t, "127.0.0.1", func(http.ResponseWriter, *http.Request) {})
	for name, host := range map[string]string{"here": "localhost", "nowhere": "no such name"} {
		svc := l.service(name, map[string]string{"here": "10.9.0.1", "nowhere": "10.9.0.2"}[name], mesh.AppHTTP1)
		l.workloads(&mesh.Workload{
			UID: "Kubernetes/networking.istio.io/ServiceEntry/shop/" + name, Name: name, Namespace: "shop", Hostname: host,
			Services: []mesh.ServicePorts{{Service: svc.Key(), Ports: []mesh.Port{{ServicePort: 80, TargetPort: at.Port()}}}},
		})
	}
	l.known("here", "nowhere")
	l.becomes("its endpoint is known", "http://10.9.0.1/", http.StatusOK)
	for range 20 {
		if resp, body := l.get("http://10.9.0.1/", "Connection", "close"); resp.StatusCode != http.StatusOK {
			t.Fatalf("GET by name = %d %q, want 200", resp.StatusCode, body)
		}
	}
	l.eventually("what cannot be resolved is told", func() bool {
		resp, body := l.get("http://10.9.0.2/")
		return resp.StatusCode == http.StatusServiceUnavailable && strings.Contains(body, "resolve no such name")
	})
}

// TestIstiodIsGone: what the waypoint knows, it goes on with: requests, new connections, policies, readiness.
func TestIstiodIsGone(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	cart := l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "cart"))
	l.service("empty", "10.9.0.2", mesh.AppHTTP1)
	l.known("cart", "empty")
	l.policy("no-admin", mesh.Deny, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "/admin"})
	l.guarded(cart, "shop/no-admin")
	l.becomes("guarded", "http://10.9.0.1/admin", http.StatusForbidden)
	l.stopIstiod()
	l.eventually("noticed", func() bool { return strings.Contains(l.log.String(), `"scope":"xds"`) })
	l.client.CloseIdleConnections()
	_ = l.pool.Close()
	l.connect() // new tunnels
	for path, want := range map[string]int{"http://10.9.0.1/": 200, "http://10.9.0.1/admin": 403, "http://10.9.0.2/": 503} {
		if resp, body := l.get(path); resp.StatusCode != want {
			t.Errorf("GET %s = %d %q, want %d", path, resp.StatusCode, body, want)
		}
	}
	if got := l.page(":15021/healthz/ready"); got != "ready\n" {
		t.Errorf("it says %q of its readiness", got)
	}
}
