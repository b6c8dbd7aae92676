package suite_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/e2e/lab"
)

// TestOperationsL7 does at noon what operators do: it replaces every program, there and back, lets an autoscaler change the
// number of waypoints, and drains a node, while clients on both nodes send requests through a waypoint of two replicas with a
// disruption budget. No request fails, over new connections, kept ones and gRPC; a WebSocket may be cut, when its proxy has
// waited for it, and is opened anew at the first attempt.
func TestOperationsL7(t *testing.T) {
	s := newSpace(t, "e2e-operations", true)
	s.installGatewayAPI()
	s.scaled(2)
	s.must(cluster.Apply(t.Context(), fmt.Sprintf(`
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: %[1]s}
spec:
  gatewayClassName: istio-waypoint
  infrastructure: {parametersRef: {group: "", kind: ConfigMap, name: options}}
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: v1
kind: Service
metadata: {name: calls, namespace: %[1]s}
spec: {selector: {app: web}, ports: [{name: grpc, port: 90, targetPort: 9090}]}
`, s.name)))
	_, err := cluster.Kubectl(t.Context(), "label", "namespace", s.name, "istio.io/use-waypoint=waypoint")
	s.must(err)
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "web", node: one}, workload{name: "client", node: one, args: []string{"wait", "1h"}})
	s.redirected(true)
	s.replicas(2)
	s.passes("client", "http://web/")
	// By address: the one replica of the cluster's DNS may be on the node that is drained.
	web, grpc := s.clusterIP("web"), s.clusterIP("calls")
	var loads []workload
	for name, node := range map[string]*lab.Node{"one": one, "two": two} {
		loads = append(loads,
			workload{name: "new-" + name, node: node, args: []string{"load", "http://" + web + "/", "20"}},
			workload{name: "kept-" + name, node: node, args: []string{"keep", "http://" + web + "/", "20"}},
			workload{name: "grpc-" + name, node: node, args: []string{"calls", net.JoinHostPort(grpc, "90"), "20"}},
			workload{name: "socket-" + name, node: node, args: []string{"sockets", "http://" + web + "/socket", "20"}})
	}
	s.deploy(loads...)
	s.redirected(true)
	lost, cut := make(map[string]int), make(map[string]int)
	for _, w := range loads {
		_, lost[w.name] = s.load(w.name)
	}
	unhurt := func(t *testing.T, when, onlyOn string) {
		t.Helper()
		for _, w := range loads {
			if onlyOn != "" && w.node.Name != onlyOn {
				continue
			}
			sent, failed := s.load(w.name)
			logs, _ := cluster.Kubectl(t.Context(), "-n", s.name, "logs", w.name)
			t.Logf("%s: %s sent %d in all, %d failed", when, w.name, sent, failed)
			if failed > lost[w.name] {
				t.Errorf("%s: %d more of %d of %s failed\n%s", when, failed-lost[w.name], sent, w.name, complaints(logs))
			}
			lost[w.name] = failed
			if strings.HasPrefix(w.name, "socket-") {
				all := cuts.FindAllString(logs, -1)
				t.Logf("%s: %s was cut %d times\n%s", when, w.name, len(all)-cut[w.name], strings.Join(all[cut[w.name]:], "\n"))
				cut[w.name] = len(all)
			}
		}
	}

	before := s.tag()
	next := before + "-noon"
	retag(s, before, next)
	ctl := buildMistctl(s)
	for _, step := range []struct{ name, tag string }{{"upgrade", next}, {"rollback", before}} {
		t.Run(step.name, func(t *testing.T) {
			s := &space{t, s.name}
			old, waypoints := s.meshPods(), s.waypoints()
			began := time.Now()
			out, err := cluster.Command(t.Context(), ctl, "upgrade", "--timeout", "5m", "--set", "global.tag="+step.tag).CombinedOutput()
			if err != nil {
				t.Fatalf("mistctl upgrade: %v\n%s", err, out)
			}
			s.eventually("every old program is gone", func() error {
				for name := range s.meshPods() {
					if old[name] {
						return fmt.Errorf("%s is still there", name)
					}
				}
				return nil
			})
			s.replaced(waypoints)
			t.Logf("it took %v", time.Since(began).Round(time.Second))
			unhurt(t, step.name, "")
		})
	}

	t.Run("autoscaler", func(t *testing.T) {
		s := &space{t, s.name}
		for _, n := range []int{4, 1, 2} {
			s.scaled(n)
			s.replicas(n)
			unhurt(t, fmt.Sprintf("%d waypoints", n), "")
		}
	})

	t.Run("drain of a node", func(t *testing.T) {
		s := &space{t, s.name}
		s.eventually("the budget knows the waypoints", func() error {
			b, err := cluster.Client().PolicyV1().PodDisruptionBudgets(s.name).Get(t.Context(), "waypoint", metav1.GetOptions{})
			if err == nil && b.Status.DisruptionsAllowed != 1 {
				err = fmt.Errorf("%d may end, of %d", b.Status.DisruptionsAllowed, b.Status.CurrentHealthy)
			}
			return err
		})
		s.Cleanup(func() { _, _ = cluster.Kubectl(context.WithoutCancel(t.Context()), "uncordon", one.Name, two.Name) })
		// The worst case: the only istiod is there too, so that nobody tells ztunnels of the waypoint's end.
		for _, args := range [][]string{{"cordon", one.Name}, {"-n", system, "rollout", "restart", "deployment/istiod"},
			{"-n", system, "rollout", "status", "deployment/istiod", "--timeout=2m"}, {"uncordon", one.Name}} {
			_, err := cluster.Kubectl(t.Context(), args...)
			s.must(err)
		}
		out, err := cluster.Kubectl(t.Context(), "drain", two.Name, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=3m")
		s.must(err)
		t.Logf("%s", out)
		s.replicas(2)
		unhurt(t, "drain", one.Name)
		_, err = cluster.Kubectl(t.Context(), "uncordon", two.Name)
		s.must(err)
	})
}

var cuts = regexp.MustCompile(`(?m)^.* cut \d+ after .*$`)

// scaled says how many waypoints there are to be, by an autoscaler that has no choice.
func (s *space) scaled(n int) {
	s.Helper()
	s.must(cluster.Apply(s.Context(), fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: options, namespace: %s}
data:
  horizontalPodAutoscaler: "spec: {minReplicas: %d, maxReplicas: %[2]d}"
  podDisruptionBudget: "spec: {minAvailable: 1}"
`, s.name, n)))
}

// waypoints are the waypoint's pods, those that are ending among them.
func (s *space) waypoints() map[string]bool {
	s.Helper()
	pods, err := cluster.Client().CoreV1().Pods(s.name).List(s.Context(), metav1.ListOptions{LabelSelector: waypointLabel})
	s.must(err)
	names := map[string]bool{}
	for _, p := range pods.Items {
		names[p.Name] = true
	}
	return names
}

// replicas waits until that many waypoints serve, and no other pod of it is there.
func (s *space) replicas(n int) {
	s.Helper()
	s.eventually(fmt.Sprintf("%d waypoints", n), func() error {
		d, err := cluster.Client().AppsV1().Deployments(s.name).Get(s.Context(), "waypoint", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if int(d.Status.AvailableReplicas) != n || int(d.Status.UpdatedReplicas) != n || d.Status.ObservedGeneration < d.Generation {
			return fmt.Errorf("status: %+v", d.Status)
		}
		if all := s.waypoints(); len(all) != n {
			return fmt.Errorf("pods %v", all)
		}
		return nil
	})
}

// replaced waits until none of these pods is there any more and two others serve.
func (s *space) replaced(old map[string]bool) {
	s.Helper()
	s.eventually("every old waypoint is gone", func() error {
		for name := range s.waypoints() {
			if old[name] {
				return errors.New(name + " is still there")
			}
		}
		return nil
	})
	s.replicas(2)
}

// passes waits until requests come from a waypoint.
func (s *space) passes(pod, url string) {
	s.Helper()
	own := s.pod(pod).Status.PodIP
	s.eventually("requests of "+pod+" pass a waypoint", func() error {
		out, err := s.run(pod, "get", url)
		if err == nil && strings.Contains(out, "sees="+own+" ") {
			err = errors.New(out)
		}
		return err
	})
}

func (s *space) clusterIP(service string) string {
	s.Helper()
	svc, err := cluster.Client().CoreV1().Services(s.name).Get(s.Context(), service, metav1.GetOptions{})
	s.must(err)
	return svc.Spec.ClusterIP
}
