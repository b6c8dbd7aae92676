package suite_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// TestRouteStatus is about what the API server has of the Gateway API's routes of services: one that is good, one of a service
// that is not there, and one that goes to such a service.
func TestRouteStatus(t *testing.T) {
	s := newSpace(t, "e2e-route-status", true)
	s.installGatewayAPI()
	s.gateway("waypoint")
	var routes strings.Builder
	for _, kind := range []string{"HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute"} {
		hosts := ""
		if kind == "TLSRoute" {
			hosts = "\n  hostnames: [web." + s.name + ".svc.cluster.local]"
		}
		for _, r := range []struct{ name, parent, backend string }{{"good", "web", "web"}, {"no-parent", "nobody", "web"}, {"no-backend", "web", "nobody"}} {
			fmt.Fprintf(&routes, `---
apiVersion: gateway.networking.k8s.io/v1
kind: %s
metadata: {name: %s, namespace: %s}
spec:%s
  parentRefs: [{group: "", kind: Service, name: %s, port: %d}]
  rules: [{backendRefs: [{name: %s, port: 80}]}]
`, kind, r.name, s.name, hosts, r.parent, map[string]int{"HTTPRoute": 80, "GRPCRoute": 81, "TCPRoute": 82, "TLSRoute": 83}[kind], r.backend)
		}
	}
	s.must(cluster.Apply(t.Context(), fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: web, namespace: %[1]s, labels: {istio.io/use-waypoint: waypoint}}
spec: {ports: [{name: http, port: 80}, {name: grpc, port: 81}, {name: tcp, port: 82}, {name: tls, port: 83}]}
`, s.name)+routes.String()))
	for _, kind := range []string{"httproute", "grpcroute", "tcproute", "tlsroute"} {
		for name, want := range map[string]map[string]string{
			"good":       {"Accepted": "True Accepted", "ResolvedRefs": "True ResolvedRefs"},
			"no-parent":  {"Accepted": "False NoMatchingParent"},
			"no-backend": {"Accepted": "True Accepted", "ResolvedRefs": "False BackendNotFound"},
		} {
			s.parent(kind+"/"+name, want)
		}
	}
}

// condition is one of an object's conditions, as the API server has it.
type condition struct{ Type, Status, Reason, Message string }

// parent waits until a route has that status, "STATUS REASON" by condition, from one parent.
func (s *space) parent(route string, want map[string]string) {
	s.Helper()
	s.eventually(fmt.Sprintf("%s says %v", route, want), func() error {
		var o struct {
			Status struct {
				Parents []struct {
					ControllerName string
					Conditions     []condition
				}
			}
		}
		out, err := cluster.Kubectl(s.Context(), "-n", s.name, "get", route, "-o", "json")
		if err == nil {
			err = json.Unmarshal([]byte(out), &o)
		}
		if err != nil {
			return err
		}
		if len(o.Status.Parents) != 1 || o.Status.Parents[0].ControllerName != "istio.io/mesh-controller" {
			return fmt.Errorf("parents: %+v", o.Status.Parents)
		}
		got := map[string]string{}
		for _, c := range o.Status.Parents[0].Conditions {
			got[c.Type] = c.Status + " " + c.Reason
		}
		for t, w := range want {
			if got[t] != w {
				return fmt.Errorf("%v", o.Status.Parents[0].Conditions)
			}
		}
		return nil
	})
}
