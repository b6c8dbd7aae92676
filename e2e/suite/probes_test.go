package suite_test

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// TestProbes: the kubelet, which has no identity, reaches pods that refuse plaintext; others on its node do not.
func TestProbes(t *testing.T) {
	s := newSpace(t, "e2e-probes", true)
	s.policy("PeerAuthentication", "default", `
  mtls: {mode: STRICT}`)
	n := cluster.Node(1)
	const often = "periodSeconds: 1, failureThreshold: 1"
	both := func(how string) string {
		return fmt.Sprintf("readinessProbe: {%[1]s, %[2]s}, livenessProbe: {%[1]s, periodSeconds: 1, failureThreshold: 3}", how, often)
	}
	// deploy waits until they are ready, which takes a probe that passed.
	s.deploy(
		workload{name: "http", node: n, more: both("httpGet: {path: /healthz, port: 8080}")},
		workload{name: "tcp", node: n, more: both("tcpSocket: {port: 9000}")},
		workload{name: "exec", node: n, more: both(`exec: {command: [/app, get, "http://127.0.0.1:8080/healthz"]}`)},
		workload{name: "startup", node: n, more: "startupProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, failureThreshold: 60}"},
		workload{name: "peer", node: n},
	)
	s.redirected(true)
	outside := newSpace(t, "e2e-probes-outside", false)
	outside.deploy(workload{name: "stranger", node: n})

	t.Run("a probe that should fail does", func(t *testing.T) {
		s := &space{t, s.name}
		s.deploy(workload{name: "turncoat", node: n, more: "readinessProbe: {httpGet: {path: /readyz, port: 8080}, " + often + "}"})
		s.get("turncoat", "http://127.0.0.1:8080/readyz")
		if _, err := s.run("turncoat", "post", "http://127.0.0.1:8080/readyz", "false"); err != nil {
			t.Fatal(err)
		}
		s.eventually("it is not ready", func() error {
			for _, c := range s.pod("turncoat").Status.Conditions {
				if c.Type == corev1.PodReady && c.Status == corev1.ConditionFalse {
					return nil
				}
			}
			return fmt.Errorf("it is")
		})
	})

	t.Run("plaintext of others is refused, mTLS is not", func(t *testing.T) {
		s := &space{t, s.name}
		url := "http://" + s.pod("http").Status.PodIP + ":8080/"
		if err := outside.refused("stranger", url); err != nil {
			t.Error(err)
		}
		s.get("peer", url)
		// From another node, a process on the host is nobody too.
		if out, err := cluster.Node(2).Exec(t.Context(), "curl", "-s", "-m", "3", url); err == nil {
			t.Errorf("a process of another node was served: %q", out)
		}
	})
	s.undisturbed()
}
