package suite_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestWaypoint tells a waypoint's life, while clients on both nodes ask on new connections and none of them notices: made by
// mistctl, used by a namespace, given routes and policies, restarted, changed by somebody, removed.
func TestWaypoint(t *testing.T) {
	s := newSpace(t, "e2e-waypoint", true)
	s.installGatewayAPI()
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "web", node: one}, workload{name: "canary", node: two}, workload{name: "client", node: two, args: []string{"wait", "1h"}})
	loads := []workload{{name: "load-one", node: one, args: []string{"load", "http://web/", "20"}}, {name: "load-two", node: two, args: []string{"load", "http://web/", "20"}}}
	s.deploy(loads...)
	s.redirected(true)
	// Some come before the mesh knows of everything.
	lost := make(map[string]int)
	s.reach("client", "http://web/")
	for _, w := range loads {
		_, lost[w.name] = s.load(w.name)
	}
	unhurt := func(when string) {
		t.Helper()
		for _, w := range loads {
			sent, failed := s.load(w.name)
			if failed > lost[w.name] {
				logs, _ := cluster.Kubectl(t.Context(), "-n", s.name, "logs", w.name)
				t.Errorf("%s: %d more of %d requests of %s failed\n%s", when, failed-lost[w.name], sent, w.name, complaints(logs))
			}
			lost[w.name] = failed
		}
	}
	ctl := buildMistctl(s)
	mistctl := func(args ...string) {
		t.Helper()
		out, err := cluster.Command(t.Context(), append(append([]string{ctl, "waypoint"}, args...), "-n", s.name)...).CombinedOutput()
		if err != nil {
			t.Fatalf("mistctl waypoint %v: %v\n%s", args, err, out)
		}
		t.Logf("%s", out)
	}
	s.sees("client", s.pod("client").Status.PodIP)

	mistctl("apply", "--enroll-namespace", "--wait", "--waypoint-timeout", "2m")
	s.sees("client", s.waypoint())
	unhurt("while a waypoint came")

	s.must(cluster.Apply(t.Context(), fmt.Sprintf(`
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: %[1]s}
spec:
  hosts: [web]
  http: [{route: [{destination: {host: web}, weight: 90}, {destination: {host: canary}, weight: 10}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: %[1]s}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}]
  action: DENY
  rules: [{to: [{operation: {paths: ["/admin*"]}}]}]
`, s.name)))
	s.must(cluster.Apply(t.Context(), fmt.Sprintf(`
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: lost, namespace: %[1]s}
spec: {host: nobody}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web-too, namespace: %[1]s}
spec:
  hosts: [web]
  http: [{directResponse: {status: 503}}]
`, s.name)))
	s.says("virtualservice", "web", "WaypointAccepted", "True Accepted ", "")
	s.says("virtualservice", "web-too", "WaypointAccepted", "True Conflicted ", "VirtualService/"+s.name+"/web/http/0 comes first")
	s.says("destinationrule", "lost", "WaypointAccepted", "False Ignored ", "nobody")
	s.eventually("the waypoint denies a path", func() error {
		out := s.get("client", "http://web/admin/users")
		if !strings.HasPrefix(out, "403 ") {
			return errors.New(out)
		}
		return nil
	})
	s.eventually("some requests go to the canary", func() error {
		if out := s.ask("client", "http://web/", 40); !strings.Contains(out, " canary ") {
			return errors.New("none of 40 did")
		}
		return nil
	})
	const asked = 400
	out := s.ask("client", "http://web/", asked)
	if n := strings.Count(out, " canary "); n < asked/10/2 || n > asked/10*2 || strings.Count(out, "200 ") != asked {
		t.Errorf("%d of %d requests went to the canary, want about %d; %d were answered 200", n, asked, asked/10, strings.Count(out, "200 "))
	}
	unhurt("while routes and policies came")

	s.asksWhetherWell()
	unhurt("while endpoints were asked whether they are well")

	before := s.waypoint()
	for _, args := range [][]string{{"rollout", "restart"}, {"rollout", "status", "--timeout=3m"}} {
		_, err := cluster.Kubectl(t.Context(), append(args, "-n", s.name, "deployment/waypoint")...)
		s.must(err)
	}
	s.sees("client", s.waypoint())
	if after := s.waypoint(); after == before {
		t.Errorf("the waypoint is %s as before: nothing was restarted", after)
	}
	s.eventually("the old waypoint has ended", func() error {
		pods, err := cluster.Client().CoreV1().Pods(s.name).List(t.Context(), metav1.ListOptions{LabelSelector: waypointLabel})
		if err == nil && len(pods.Items) > 1 {
			err = fmt.Errorf("%d pods", len(pods.Items))
		}
		return err
	})
	unhurt("while the waypoint was restarted")

	_, err := cluster.Kubectl(t.Context(), "-n", s.name, "patch", "deployment/waypoint", "--type=json", "-p", `[{"op": "replace", "path": "/spec/template/spec/terminationGracePeriodSeconds", "value": 1}]`)
	s.must(err)
	s.eventually("istiod mends the Deployment", func() error {
		d, err := cluster.Client().AppsV1().Deployments(s.name).Get(t.Context(), "waypoint", metav1.GetOptions{})
		if err == nil && *d.Spec.Template.Spec.TerminationGracePeriodSeconds != 30 {
			err = errors.New("it is as somebody changed it")
		}
		return err
	})

	mistctl("delete", "waypoint")
	s.sees("client", s.pod("client").Status.PodIP)
	s.eventually("everything of the waypoint is gone", s.noWaypoint)
	unhurt("while the waypoint went")
}

// asksWhetherWell has the waypoint ask the two pods of a service, of which one says that it is not well, and then that it is.
func (s *space) asksWhetherWell() {
	s.Helper()
	_, err := cluster.Kubectl(s.Context(), "-n", s.name, "label", "pods", "web", "canary", "pair=yes")
	s.must(err)
	s.must(cluster.Apply(s.Context(), fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: pair, namespace: %[1]s}
spec: {selector: {pair: "yes"}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: pair, namespace: %[1]s, annotations: {mistnet.io/health-check: "{path: /readyz, interval: 1s, unhealthyThreshold: 2}"}}
spec: {host: pair}
`, s.name)))
	s.reach("client", "http://pair/")
	both := func(out string) bool {
		return strings.Contains(out, " web node=") && strings.Contains(out, " canary node=")
	}
	for _, step := range []struct {
		say, what string
		ok        func(answers string) bool
	}{
		{"true", "both pods are well", both},
		{"false", "who is not well gets no requests", func(out string) bool { return !strings.Contains(out, " canary node=") }},
		{"true", "it is well again", both},
	} {
		_, err := s.run("canary", "post", "http://127.0.0.1:8080/readyz", step.say)
		s.must(err)
		const asked = 40
		s.eventually(step.what, func() error {
			out := s.ask("client", "http://pair/", asked)
			if n := strings.Count(out, "200 "); n != asked {
				return fmt.Errorf("%d of %d were answered 200", n, asked)
			}
			if !step.ok(out) {
				return errors.New(out)
			}
			return nil
		})
	}
	s.says("destinationrule", "pair", "WaypointAccepted", "True Accepted ", "")
}

const waypointLabel = "gateway.networking.k8s.io/gateway-name=waypoint"

// waypoint is the address of the waypoint's pod, the youngest that is ready.
func (s *space) waypoint() (ip string) {
	s.Helper()
	s.eventually("there is a waypoint", func() error {
		pods, err := cluster.Client().CoreV1().Pods(s.name).List(s.Context(), metav1.ListOptions{LabelSelector: waypointLabel})
		if err != nil {
			return err
		}
		for _, p := range pods.Items {
			if p.DeletionTimestamp == nil && p.Status.PodIP != "" {
				ip = p.Status.PodIP
				return nil
			}
		}
		return errors.New("no pod")
	})
	return ip
}

// sees waits until a server sees a pod's requests come from an address.
func (s *space) sees(pod, addr string) {
	s.Helper()
	s.eventually("requests of "+pod+" come from "+addr, func() error {
		out, err := s.run(pod, "get", "http://web/")
		if err == nil && !strings.Contains(out, "sees="+addr+" ") {
			err = errors.New(out)
		}
		return err
	})
}

func (s *space) ask(pod, url string, count int) string {
	s.Helper()
	out, err := s.run(pod, "get", url, fmt.Sprint(count))
	s.must(err)
	return out
}

// noWaypoint is nil when nothing is there any more of what istiod made of the Gateway.
func (s *space) noWaypoint() error {
	c, ctx := cluster.Client(), context.WithoutCancel(s.Context())
	_, deployment := c.AppsV1().Deployments(s.name).Get(ctx, "waypoint", metav1.GetOptions{})
	_, service := c.CoreV1().Services(s.name).Get(ctx, "waypoint", metav1.GetOptions{})
	_, account := c.CoreV1().ServiceAccounts(s.name).Get(ctx, "waypoint", metav1.GetOptions{})
	for what, err := range map[string]error{"Deployment": deployment, "Service": service, "ServiceAccount": account} {
		if !apierrors.IsNotFound(err) {
			return fmt.Errorf("%s: %w", what, errors.Join(err, errors.New("it is there")))
		}
	}
	pods, err := c.CoreV1().Pods(s.name).List(ctx, metav1.ListOptions{LabelSelector: waypointLabel})
	if err == nil && len(pods.Items) > 0 {
		err = fmt.Errorf("%d pods are left", len(pods.Items))
	}
	return err
}
