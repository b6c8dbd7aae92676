package suite_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestIdentity: each service account is somebody on the wire, and policies at every level judge by who that is.
func TestIdentity(t *testing.T) {
	s := newSpace(t, "e2e-identity", true)
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "server", node: two}, workload{name: "good", node: one}, workload{name: "bad", node: one})
	s.redirected(true)
	outside := newSpace(t, "e2e-outside", false)
	outside.deploy(workload{name: "stranger", node: one})

	url := "http://server.e2e-identity/"
	for _, pod := range []string{"good", "bad"} {
		s.get(pod, url)
	}
	outside.get("stranger", url) // permissive until somebody says otherwise

	t.Run("access logs of both nodes name both identities", func(t *testing.T) {
		s := &space{t, s.name}
		s.get("good", url)
		for _, n := range cluster.Nodes[:2] {
			s.eventually("the access log on "+n.Name, func() error {
				logs, err := cluster.Kubectl(t.Context(), "-n", "istio-system", "logs", "--since=60s", ztunnelOn(s, n.Name))
				if err != nil {
					return err
				}
				for line := range strings.Lines(logs) {
					if strings.Contains(line, "spiffe://cluster.local/ns/e2e-identity/sa/good") &&
						strings.Contains(line, "spiffe://cluster.local/ns/e2e-identity/sa/server") {
						return nil
					}
				}
				return fmt.Errorf("no line with both:\n%s", logs)
			})
		}
	})

	t.Run("an authorization policy acts within a second of its condition", func(t *testing.T) {
		s := &space{t, s.name}
		s.policy("AuthorizationPolicy", "only-good", `
  selector: {matchLabels: {app: server}}
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/e2e-identity/sa/good]}}]}]`)
		s.within(time.Second, "the policy refuses bad", func() error { return s.refused("bad", url) })
		s.get("good", url)
		if err := outside.refused("stranger", url); err != nil {
			t.Error(err)
		}
		s.eventually("the policy says that it is accepted", func() error {
			status, err := cluster.Kubectl(t.Context(), "-n", s.name, "get", "authorizationpolicy", "only-good",
				"-o", `jsonpath={.status.conditions[?(@.type=="ZtunnelAccepted")].status}`)
			if err == nil && status != "True" {
				err = fmt.Errorf("condition is %q", status)
			}
			return err
		})
		s.unpolicy("AuthorizationPolicy", "only-good")
		s.within(time.Second, "without the policy bad is served", func() error { _, err := s.run("bad", "get", url); return err })
	})

	t.Run("strict mTLS refuses plaintext, for a namespace, a workload and a port", func(t *testing.T) {
		s := &space{t, s.name}
		s.policy("PeerAuthentication", "default", `
  mtls: {mode: STRICT}`)
		s.within(time.Second, "the namespace refuses plaintext", func() error { return outside.refused("stranger", url) })
		s.get("bad", url)
		s.policy("PeerAuthentication", "server", `
  selector: {matchLabels: {app: server}}
  mtls: {mode: STRICT}
  portLevelMtls: {8080: {mode: PERMISSIVE}}`)
		s.within(time.Second, "the port lets plaintext in", func() error { _, err := outside.run("stranger", "get", url); return err })
		if err := outside.refused("stranger", "http://server.e2e-identity:9000/"); err != nil {
			t.Errorf("the other port: %v", err)
		}
		s.unpolicy("PeerAuthentication", "server")
		s.within(time.Second, "the namespace's rule holds again", func() error { return outside.refused("stranger", url) })
		s.unpolicy("PeerAuthentication", "default")
		s.within(time.Second, "without policies plaintext is served", func() error { _, err := outside.run("stranger", "get", url); return err })
	})

	t.Run("a policy in the root namespace holds everywhere", func(t *testing.T) {
		s := &space{t, s.name}
		root := &space{t, "istio-system"}
		root.policy("AuthorizationPolicy", "e2e-nobody-bad", `
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/e2e-identity/sa/bad]}}]}]`)
		defer root.unpolicy("AuthorizationPolicy", "e2e-nobody-bad")
		s.within(time.Second, "the policy refuses bad", func() error { return s.refused("bad", url) })
		s.get("good", url)
	})
	s.undisturbed()
}

// policy applies an object of security.istio.io.
func (s *space) policy(kind, name, spec string) {
	s.Helper()
	s.must(cluster.Apply(s.Context(), fmt.Sprintf("apiVersion: security.istio.io/v1\nkind: %s\nmetadata: {name: %s, namespace: %s}\nspec:%s\n",
		kind, name, s.name, spec)))
}

func (s *space) unpolicy(kind, name string) {
	s.Helper()
	_, err := cluster.Kubectl(s.Context(), "-n", s.name, "delete", strings.ToLower(kind), name, "--wait=true")
	s.must(err)
}

// refused is an error when the pod is served.
func (s *space) refused(pod, url string) error {
	if out, err := s.run(pod, "get", url); err == nil {
		return fmt.Errorf("%s/%s was served: %s", s.name, pod, out)
	}
	return nil
}

// within fails the test when what fn checks took longer than limit to become so. The time the last check itself took, which
// goes mostly to kubectl, does not count.
func (s *space) within(limit time.Duration, what string, fn func() error) {
	s.Helper()
	began, checked := time.Now(), time.Time{}
	s.eventually(what, func() error { checked = time.Now(); return fn() })
	if took := checked.Sub(began); took > limit {
		s.Errorf("%s only after %s, want %s", what, took, limit)
	}
}

// ztunnelOn names the ztunnel of a node.
func ztunnelOn(s *space, node string) string {
	s.Helper()
	pods, err := cluster.Client().CoreV1().Pods("istio-system").List(s.Context(),
		metav1.ListOptions{LabelSelector: "app=ztunnel", FieldSelector: "spec.nodeName=" + node})
	s.must(err)
	if len(pods.Items) != 1 {
		s.Fatalf("%s runs %d ztunnels", node, len(pods.Items))
	}
	return pods.Items[0].Name
}
