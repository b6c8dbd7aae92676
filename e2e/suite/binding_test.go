package suite_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestBinding is about which waypoint a service is reached through: one that is not there, with and without leave to pass it by;
// one that comes; two that share its connections. What happens and what the condition says are looked at together.
func TestBinding(t *testing.T) {
	s := newSpace(t, "e2e-binding", true)
	s.installGatewayAPI()
	s.deploy(workload{name: "web", node: cluster.Node(1)}, workload{name: "client", node: cluster.Node(2), args: []string{"wait", "1h"}})
	s.redirected(true)
	s.sees("client", s.pod("client").Status.PodIP)
	s.must(cluster.Apply(t.Context(), fmt.Sprintf(`
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside, namespace: %s, labels: {istio.io/use-waypoint: waypoint}}
spec:
  hosts: [outside.example.org]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP}]
  endpoints: [{address: 198.51.100.7}]
`, s.name)))

	s.meta("namespace", s.name, `{"annotations": {"mistnet.io/waypoint-unavailable": "deny"}}`)
	s.meta("service", "web", `{"labels": {"istio.io/use-waypoint": "waypoint"}}`)
	s.bound("service", "web", "False WaypointIsNotReady ", "refused")
	s.bound("serviceentry", "outside", "False WaypointIsNotReady ", "refused")
	s.eventually("without its waypoint nobody reaches web", func() error { return s.refused("client", "http://web/") })

	s.meta("namespace", s.name, `{"annotations": {"mistnet.io/waypoint-unavailable": null}}`)
	s.bound("service", "web", "False WaypointIsNotReady ", "traffic goes around it")
	s.sees("client", s.pod("client").Status.PodIP)

	s.gateway("waypoint")
	s.bound("service", "web", "True WaypointAccepted ", "bound to waypoint "+s.name+"/waypoint")
	s.bound("serviceentry", "outside", "True WaypointAccepted ", "bound to waypoint "+s.name+"/waypoint")
	s.sees("client", s.podOf("waypoint"))

	// It was there, so it is waited for, and not passed by.
	s.scale("waypoint", 0)
	s.bound("service", "web", "True WaypointAccepted ", "no pod is ready: connections are refused until one is")
	s.eventually("without a pod of its waypoint nobody reaches web", func() error { return s.refused("client", "http://web/") })
	s.scale("waypoint", 1)
	s.sees("client", s.podOf("waypoint"))
	s.bound("service", "web", "True WaypointAccepted bound to waypoint "+s.name+"/waypoint", "")

	s.gateway("next")
	s.meta("service", "web", `{"labels": {"istio.io/use-waypoint-canary": "next"}, "annotations": {"istio.io/use-waypoint-canary-weight": "25"}}`)
	s.bound("service", "web", "True WaypointAccepted ", "25 % of connections to canary "+s.name+"/next")
	next := "sees=" + s.podOf("next") + " "
	s.eventually("some connections go to the canary", func() error {
		if out := s.ask("client", "http://web/", 40); !strings.Contains(out, next) {
			return errors.New("none of 40 did")
		}
		return nil
	})
	const asked = 400
	out := s.ask("client", "http://web/", asked)
	if n := strings.Count(out, next); n < asked/4*6/10 || n > asked/4*14/10 || strings.Count(out, "sees="+s.podOf("waypoint")+" ") != asked-n {
		t.Errorf("%d of %d connections went to the canary, %d to the other, want about %d",
			n, asked, strings.Count(out, "sees="+s.podOf("waypoint")+" "), asked/4)
	}

	s.meta("service", "web", `{"annotations": {"istio.io/use-waypoint-canary-weight": "many"}}`)
	s.bound("service", "web", "True CanaryInvalidWeight ", `"many" is not a number from 0 to 100`)
	s.eventually("a weight that is none sends nobody to the canary", func() error {
		if out := s.ask("client", "http://web/", 40); strings.Contains(out, next) {
			return errors.New("some of 40 went there")
		}
		return nil
	})

	s.meta("service", "web", `{"labels": {"istio.io/use-waypoint": "none"}}`)
	s.bound("service", "web", "", "")
	s.sees("client", s.pod("client").Status.PodIP)
}

// meta merges into an object's metadata; null removes.
func (s *space) meta(kind, name, fields string) {
	s.Helper()
	_, err := cluster.Kubectl(s.Context(), "-n", s.name, "patch", kind, name, "--type=merge", "-p", `{"metadata": `+fields+`}`)
	s.must(err)
}

// bound waits for what a Service or ServiceEntry says of its waypoint: status and reason at the start of it, and words. Nothing
// is wanted when both are "".
func (s *space) bound(kind, name, start, words string) {
	s.Helper()
	s.says(kind, name, "istio.io/WaypointBound", start, words)
}

// says waits for a condition of an object, as bound does.
func (s *space) says(kind, name, condition, start, words string) {
	s.Helper()
	s.eventually(kind+" "+name+" has its condition", func() error {
		got, err := cluster.Kubectl(s.Context(), "-n", s.name, "get", kind, name, "-o",
			`jsonpath={range .status.conditions[?(@.type=="`+condition+`")]}{.status} {.reason} {.message}{end}`)
		if err == nil && (!strings.HasPrefix(got, start) || !strings.Contains(got, words) || start == "" && got != "") {
			err = fmt.Errorf("it is %q, want %q and %q", got, start, words)
		}
		return err
	})
}

// gateway makes a waypoint for services and waits until it works.
func (s *space) gateway(name string) {
	s.Helper()
	s.must(cluster.Apply(s.Context(), fmt.Sprintf(`
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: %s, namespace: %s, labels: {istio.io/waypoint-for: service}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
`, name, s.name)))
	_, err := cluster.Kubectl(s.Context(), "wait", "--for=condition=Programmed", "--timeout=2m", "-n", s.name, "gateway/"+name)
	s.must(err)
}

// scale has a waypoint run that many pods, and waits until it does.
func (s *space) scale(gateway string, pods int) {
	s.Helper()
	_, err := cluster.Kubectl(s.Context(), "-n", s.name, "scale", "deployment/"+gateway, fmt.Sprintf("--replicas=%d", pods))
	s.must(err)
	s.eventually(fmt.Sprintf("%s has %d pods", gateway, pods), func() error {
		all, err := cluster.Client().CoreV1().Pods(s.name).List(s.Context(), metav1.ListOptions{LabelSelector: "gateway.networking.k8s.io/gateway-name=" + gateway})
		if err == nil && len(all.Items) != pods {
			err = fmt.Errorf("it has %d", len(all.Items))
		}
		return err
	})
	if pods > 0 {
		_, err := cluster.Kubectl(s.Context(), "-n", s.name, "rollout", "status", "--timeout=2m", "deployment/"+gateway)
		s.must(err)
	}
}

// podOf is the address of the one pod of a waypoint.
func (s *space) podOf(gateway string) string {
	s.Helper()
	pods, err := cluster.Client().CoreV1().Pods(s.name).List(s.Context(), metav1.ListOptions{LabelSelector: "gateway.networking.k8s.io/gateway-name=" + gateway})
	s.must(err)
	if len(pods.Items) != 1 {
		s.Fatalf("%s has %d pods", gateway, len(pods.Items))
	}
	return pods.Items[0].Status.PodIP
}
