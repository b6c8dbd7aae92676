package suite_test

import (
	"errors"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/e2e/lab"
)

// TestFaults: what is broken is felt only where it must be, and works again by itself. Every step asks for mTLS: the server
// refuses everything else.
func TestFaults(t *testing.T) {
	s := newSpace(t, "e2e-faults", true)
	s.policy("PeerAuthentication", "default", `
  mtls: {mode: STRICT}`)
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "server", node: two}, workload{name: "client", node: one})
	s.redirected(true)
	const url = "http://server/"
	s.reach("client", url)

	t.Run("without istiod old pods go on, and new ones work when it is back", func(t *testing.T) {
		s := &space{t, s.name}
		s.scaleIstiod(0)
		defer s.scaleIstiod(1)
		s.get("client", url)
		s.must(cluster.Apply(t.Context(), fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: newcomer, namespace: %s}, spec: {
			nodeName: %s, terminationGracePeriodSeconds: 1, containers: [{name: app, image: %q, args: [serve]}]}}`, s.name, one.Name, lab.AppImage)))
		s.get("client", url)
		s.scaleIstiod(1)
		s.ready("newcomer")
		s.eventually("the newcomer is served", func() error { _, err := s.run("newcomer", "get", url); return err })
	})

	t.Run("a killed ztunnel is replaced and serves the pods that were there", func(t *testing.T) {
		s := &space{t, s.name}
		for _, n := range cluster.Nodes[:2] {
			_, err := cluster.Kubectl(t.Context(), "-n", "istio-system", "delete", "pod", ztunnelOn(s, n.Name), "--grace-period=0", "--force")
			s.must(err)
		}
		s.eventually("the client is served", func() error { _, err := s.run("client", "get", url); return err })
	})

	t.Run("a killed container runtime costs nothing", func(t *testing.T) {
		s := &space{t, s.name}
		s.must(one.KillComponent(t.Context(), lab.Containerd))
		s.eventually("the client is served", func() error { _, err := s.run("client", "get", url); return err })
	})
	s.undisturbed()

	t.Run("a node comes back from a power cut with its pods in the mesh", func(t *testing.T) {
		s := &space{t, s.name}
		s.must(two.PowerOff(t.Context()))
		if err := s.refused("client", url); err != nil {
			t.Error(err)
		}
		s.must(two.PowerOn(t.Context()))
		s.must(two.WaitReady(t.Context()))
		s.eventually("the server's container runs anew", func() error {
			cs := s.pod("server").Status.ContainerStatuses
			if len(cs) != 1 || cs[0].RestartCount == 0 || !cs[0].Ready {
				return fmt.Errorf("container is %+v", cs)
			}
			return nil
		})
		s.eventually("the client is served", func() error { _, err := s.run("client", "get", url); return err })
		outside := newSpace(t, "e2e-faults-outside", false)
		outside.deploy(workload{name: "stranger", node: one})
		if err := outside.refused("stranger", "http://server.e2e-faults/"); err != nil {
			t.Errorf("a pod that came back lost its protection: %v", err)
		}
	})
}

// scaleIstiod waits until there are that many that are ready, and no others.
func (s *space) scaleIstiod(replicas int) {
	s.Helper()
	_, err := cluster.Kubectl(s.Context(), "-n", "istio-system", "scale", "deployment", "istiod", fmt.Sprintf("--replicas=%d", replicas))
	s.must(err)
	s.eventually(fmt.Sprintf("%d replicas of istiod", replicas), func() error {
		pods, err := cluster.Client().CoreV1().Pods("istio-system").List(s.Context(), metav1.ListOptions{LabelSelector: "app=istiod"})
		if err != nil {
			return err
		}
		if len(pods.Items) != replicas {
			return fmt.Errorf("there are %d pods", len(pods.Items))
		}
		for _, p := range pods.Items {
			if cs := p.Status.ContainerStatuses; p.Status.Phase != corev1.PodRunning || len(cs) == 0 || !cs[0].Ready {
				return errors.New("one is not ready")
			}
		}
		return nil
	})
}
