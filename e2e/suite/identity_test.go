package suite_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
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

	t.Run("an authorization policy of a namespace, and of a port", func(t *testing.T) {
		s := &space{t, s.name}
		s.policy("AuthorizationPolicy", "space", `
  action: ALLOW
  rules: [{from: [{source: {namespaces: [e2e-identity]}}]}]`)
		s.within(time.Second, "the namespace's policy refuses the stranger", func() error { return outside.refused("stranger", url) })
		s.get("good", url)
		s.policy("AuthorizationPolicy", "port", `
  selector: {matchLabels: {app: server}}
  action: DENY
  rules: [{to: [{operation: {ports: ["9000"]}}]}]`)
		s.within(time.Second, "the port is shut", func() error { return s.refused("good", "http://server.e2e-identity:9000/") })
		s.get("good", url)
		s.unpolicy("AuthorizationPolicy", "port")
		s.unpolicy("AuthorizationPolicy", "space")
		s.within(time.Second, "without the policies the stranger is served", func() error { _, err := outside.run("stranger", "get", url); return err })
	})

	t.Run("strict mTLS of the whole mesh, and namespaces, workloads and ports that say otherwise", func(t *testing.T) {
		s := &space{t, s.name}
		root := &space{t, "istio-system"}
		root.policy("PeerAuthentication", "default", `
  mtls: {mode: STRICT}`)
		defer root.unpolicy("PeerAuthentication", "default")
		s.within(time.Second, "the mesh refuses plaintext", func() error { return outside.refused("stranger", url) })
		s.get("bad", url)
		s.policy("PeerAuthentication", "default", `
  mtls: {mode: PERMISSIVE}`)
		s.within(time.Second, "the namespace lets plaintext in", func() error { _, err := outside.run("stranger", "get", url); return err })
		s.policy("PeerAuthentication", "server", `
  selector: {matchLabels: {app: server}}
  portLevelMtls: {8080: {mode: STRICT}}`)
		s.within(time.Second, "the port refuses plaintext", func() error { return outside.refused("stranger", url) })
		s.get("bad", url)
		s.unpolicy("PeerAuthentication", "server")
		s.unpolicy("PeerAuthentication", "default")
		s.within(time.Second, "the mesh's rule holds again", func() error { return outside.refused("stranger", url) })
	})

	t.Run("a policy that makes no sense says so, and denies", func(t *testing.T) {
		s := &space{t, s.name}
		s.policy("AuthorizationPolicy", "nonsense", `
  selector: {matchLabels: {app: server}}
  action: DENY
  rules: [{from: [{source: {ipBlocks: [nonsense]}}]}]`)
		s.within(time.Second, "everybody is refused", func() error { return s.refused("good", url) })
		s.condition("nonsense", "False", "Invalid")
		if why := s.why("nonsense"); !strings.Contains(why, "ipBlocks[0]") || !strings.Contains(why, "denied") {
			t.Errorf("the condition's message is %q", why)
		}
		s.unpolicy("AuthorizationPolicy", "nonsense")
		s.within(time.Second, "without it good is served", func() error { _, err := s.run("good", "get", url); return err })

		err := cluster.Apply(t.Context(), fmt.Sprintf("{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: typo, namespace: %s}, spec: {action: DENIED}}", s.name))
		if err == nil || !strings.Contains(err.Error(), "DENIED") {
			t.Errorf("the API server says of an action that there is not: %v", err)
		}
	})

	t.Run("what node proxies cannot do is said, and left out on the strict side", func(t *testing.T) {
		s := &space{t, s.name}
		s.policy("AuthorizationPolicy", "get-only", `
  selector: {matchLabels: {app: server}}
  action: ALLOW
  rules: [{to: [{operation: {methods: [GET]}}]}]`)
		s.condition("get-only", "True", "UnsupportedValue")
		s.within(time.Second, "a rule by HTTP lets nobody in", func() error { return s.refused("good", url) })
		s.unpolicy("AuthorizationPolicy", "get-only")
		s.policy("AuthorizationPolicy", "audit", `
  selector: {matchLabels: {app: server}}
  action: AUDIT
  rules: [{}]`)
		s.condition("audit", "False", "UnsupportedValue")
		s.eventually("good is served", func() error { _, err := s.run("good", "get", url); return err })
		s.unpolicy("AuthorizationPolicy", "audit")
	})

	t.Run("how long a policy takes is measured where it acts", func(t *testing.T) {
		s := &space{t, s.name}
		s.deploy(workload{name: "loader", node: one, args: []string{"load", url, "20"}})
		s.load("loader")
		for range 5 {
			s.policy("AuthorizationPolicy", "not-loader", `
  selector: {matchLabels: {app: server}}
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/e2e-identity/sa/loader]}}]}]`)
			applied := time.Now()
			var failed time.Time
			s.eventually("the loader is refused", func() (err error) { failed, err = s.failedSince("loader", applied.Add(-time.Second)); return err })
			t.Logf("the first request was refused %s after kubectl apply returned", failed.Sub(applied).Round(time.Millisecond))
			if failed.Sub(applied) > patience/10 {
				t.Errorf("that is too long, even on a busy machine")
			}
			s.unpolicy("AuthorizationPolicy", "not-loader")
			s.eventually("the loader is served again", func() error {
				_, before := s.load("loader")
				if _, now := s.load("loader"); now != before {
					return fmt.Errorf("%d failed meanwhile", now-before)
				}
				return nil
			})
		}
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

// why is the message of a policy's condition.
func (s *space) why(policy string) string {
	s.Helper()
	got, err := cluster.Kubectl(s.Context(), "-n", s.name, "get", "authorizationpolicy", policy, "-o",
		`jsonpath={.status.conditions[?(@.type=="ZtunnelAccepted")].message}`)
	s.must(err)
	return got
}

// failedSince is when a pod that runs "load" first failed after a time, by its node's clock.
func (s *space) failedSince(pod string, since time.Time) (time.Time, error) {
	logs, err := cluster.Kubectl(s.Context(), "-n", s.name, "logs", pod, "--timestamps", "--since-time="+since.UTC().Format(time.RFC3339Nano))
	if err != nil {
		return time.Time{}, err
	}
	for line := range strings.Lines(logs) {
		stamp, said, _ := strings.Cut(line, " ")
		at, err := time.Parse(time.RFC3339Nano, stamp)
		if err == nil && at.After(since) && !strings.HasPrefix(said, "sent ") {
			return at, nil
		}
	}
	return time.Time{}, fmt.Errorf("no request failed since %s", since)
}

// within fails the test when what fn checks took longer than limit to become so. The time the last check itself took, which
// goes mostly to kubectl, does not count; that of checks before it does, so that one more is let pass: a check that came just
// too early says nothing of the time until the next.
func (s *space) within(limit time.Duration, what string, fn func() error) {
	s.Helper()
	began := time.Now()
	var checks []time.Time
	s.eventually(what, func() error { checks = append(checks, time.Now()); return fn() })
	early := checks[max(0, len(checks)-2)]
	if took := early.Sub(began); took > limit {
		s.Errorf("%s only after %s, want %s", what, took, limit)
	}
}

// ztunnelOn names the ztunnel of a node; one that an upgrade has replaced may still be going.
func ztunnelOn(s *space, node string) string {
	s.Helper()
	pods, err := cluster.Client().CoreV1().Pods("istio-system").List(s.Context(),
		metav1.ListOptions{LabelSelector: "app=ztunnel", FieldSelector: "spec.nodeName=" + node})
	s.must(err)
	stay := slices.DeleteFunc(pods.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
	if len(stay) != 1 {
		s.Fatalf("%s runs %d ztunnels", node, len(stay))
	}
	return stay[0].Name
}
