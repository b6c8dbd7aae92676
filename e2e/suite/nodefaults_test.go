package suite_test

import (
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/e2e/lab"
)

// ztunnelKills is how often it is killed in a row: the kubelet waits 10, 20, 40 seconds before it starts it again.
const ztunnelKills = 3

// TestNodeFaults: whatever happens to a node, traffic between pods of another goes on without one failure, and the node's
// own pods are in the mesh again when it is over.
func TestNodeFaults(t *testing.T) {
	s := newSpace(t, "e2e-node-faults", true)
	s.policy("PeerAuthentication", "default", `
  mtls: {mode: STRICT}`)
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "near", node: one}, workload{name: "far", node: two}, workload{name: "client", node: one})
	s.redirected(true)
	outside := newSpace(t, "e2e-node-faults-outside", false)
	outside.deploy(workload{name: "stranger", node: one})
	service, err := cluster.Client().CoreV1().Services(s.name).Get(t.Context(), "near", metav1.GetOptions{})
	s.must(err)
	// By address: the cluster's DNS may live on the other node.
	near := "http://" + bracketed(service.Spec.ClusterIP) + "/"
	s.deploy(
		workload{name: "loader", node: one, args: []string{"load", near, "20"}},
		workload{name: "holder", node: one, args: []string{"hold", bracketed(s.pod("near").Status.PodIP) + ":9000", "50ms"}},
		workload{name: "farholder", node: one, args: []string{"hold", bracketed(s.pod("far").Status.PodIP) + ":9000", "50ms"}},
	)
	if service, err = cluster.Client().CoreV1().Services(s.name).Get(t.Context(), "far", metav1.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	far := "http://" + bracketed(service.Spec.ClusterIP) + "/"
	s.reach("client", far)

	// while checks that nobody on the first node notices.
	while := func(what string, do func(s *space)) {
		t.Run(what, func(t *testing.T) {
			s := &space{t, s.name}
			_, before := s.load("loader")
			s.ticks("holder")
			do(s)
			s.ticks("holder")
			if sent, after := s.load("loader"); after > before {
				logs, _ := cluster.Kubectl(t.Context(), "-n", s.name, "logs", "loader")
				t.Errorf("%d of %d requests failed meanwhile on %s:\n%s", after-before, sent, one.Name, complaints(logs))
			}
			for _, pod := range []string{"holder", "loader"} {
				if n := s.pod(pod).Status.ContainerStatuses[0].RestartCount; n > 0 {
					t.Errorf("%s was started %d times again", pod, n)
				}
			}
		})
	}
	served := func(s *space, pod string) {
		s.Helper()
		url := "http://" + bracketed(s.pod(pod).Status.PodIP) + ":8080/"
		s.eventually(pod+" is served", func() error { _, err := s.run("client", "get", url); return err })
		if err := outside.refused("stranger", url); err != nil {
			s.Errorf("%s lost its protection: %v", pod, err)
		}
	}
	killZtunnel := func(s *space) {
		s.Helper()
		s.eventually("ztunnel is killed", func() error {
			_, err := two.Exec(s.Context(), "bash", "-c", `kill -9 $(pidof ztunnel)`)
			return err
		})
	}

	while("connection tables are flushed", func(s *space) {
		for _, n := range []*lab.Node{one, two} {
			_, err := n.Exec(s.Context(), "conntrack", "-F")
			s.must(err)
		}
		s.ticks("farholder")
		s.get("client", far)
	})
	while("kubelet and kube-proxy are killed", func(s *space) {
		s.must(two.KillComponent(s.Context(), lab.Kubelet))
		s.must(two.KillComponent(s.Context(), lab.KubeProxy))
		s.get("client", far)
		s.ticks("farholder")
		s.undisturbed()
	})
	while("containerd is killed while pods start", func(s *space) {
		names := s.plain(two, "early", 5)
		s.must(two.KillComponent(s.Context(), lab.Containerd))
		for _, name := range names {
			s.ready(name)
			served(s, name)
		}
		s.ticks("farholder")
	})
	while("ztunnel is killed while a pod starts", func(s *space) {
		names := s.plain(two, "midway", 1)
		killZtunnel(s)
		s.ready(names[0])
		served(s, names[0])
	})
	while("ztunnel is killed again and again", func(s *space) {
		for range ztunnelKills {
			killZtunnel(s)
			served(s, "far")
		}
	})
	while("the power is cut on a node of twenty pods", func(s *space) {
		names := s.plain(two, "many", 20)
		for _, name := range names {
			s.ready(name)
		}
		s.must(two.PowerOff(s.Context()))
		if err := s.refused("client", far); err != nil {
			s.Error(err)
		}
		s.must(two.PowerOn(s.Context()))
		s.must(two.WaitReady(s.Context()))
		for _, name := range append(names, "far") {
			s.eventually(name+"'s container runs anew", func() error {
				cs := s.pod(name).Status.ContainerStatuses
				if len(cs) != 1 || cs[0].RestartCount == 0 || !cs[0].Ready {
					return fmt.Errorf("container is %+v", cs)
				}
				return nil
			})
			served(s, name)
		}
	})
}

// plain applies pods that serve, NAME-1 and so on, and does not wait for them.
func (s *space) plain(n *lab.Node, name string, count int) (names []string) {
	s.Helper()
	var b strings.Builder
	for i := range count {
		names = append(names, fmt.Sprintf("%s-%d", name, i+1))
		fmt.Fprintf(&b, "---\n"+`{apiVersion: v1, kind: Pod, metadata: {name: %s, namespace: %s}, spec: {nodeName: %s,
			terminationGracePeriodSeconds: 1, containers: [{name: app, image: %q, args: [serve]}]}}`+"\n", names[i], s.name, n.Name, lab.AppImage)
	}
	// A new namespace's account may be a moment late.
	s.eventually("pods are accepted", func() error { return cluster.Apply(s.Context(), b.String()) })
	return names
}
