package suite_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/istiod/ca"
)

const home = "istio-system" // of the control plane

// TestReplicas: of two replicas of istiod the one that writes is killed. Nobody who talks notices, and the other writes on.
func TestReplicas(t *testing.T) {
	s, check := underLoad(t, "e2e-replicas")
	s.scaleIstiod(2)
	defer s.scaleIstiod(1)
	leader := ""
	s.eventually("one of the replicas leads", func() (err error) { leader, err = s.leader(); return err })
	s.policy("AuthorizationPolicy", "before", "\n  rules: [{}]")
	s.condition("before", "True", "Accepted")

	_, err := cluster.Kubectl(t.Context(), "-n", home, "delete", "pod", leader, "--grace-period=0", "--force")
	s.must(err)
	s.policy("AuthorizationPolicy", "after", "\n  rules: [{}]")
	s.condition("after", "True", "Accepted")
	s.eventually("the other replica leads", func() error {
		now, err := s.leader()
		if err == nil && now == leader {
			err = errors.New("it is the one that was killed")
		}
		return err
	})
	check()
}

// TestRootRotation: as an operator does it, by cacerts: both roots, then the new key. New pods are certified below the new
// root and old ones below the old, and all understand each other.
func TestRootRotation(t *testing.T) {
	s, check := underLoad(t, "e2e-rotation")
	secrets := cluster.Client().CoreV1().Secrets(home)
	own, err := secrets.Get(t.Context(), "istio-ca-secret", metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		t.Skip("this mesh is not certified by an authority of its own")
	}
	s.must(err)
	before := ca.SecretFiles(own.Data)
	after, err := ca.NewRoot("cluster.local")
	s.must(err)
	both := append(bytes.Clone(before["root-cert.pem"]), after["root-cert.pem"]...)

	s.istiodEnv("CA_ROOT_OVERLAP=15s")
	defer s.istiodEnv("CA_ROOT_OVERLAP-")
	defer func() { _ = secrets.Delete(context.WithoutCancel(t.Context()), "cacerts", metav1.DeleteOptions{}) }()
	plug := func(keys map[string][]byte) {
		t.Helper()
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: home, Name: "cacerts"}, Data: map[string][]byte{
			"ca-cert.pem": keys["ca-cert.pem"], "ca-key.pem": keys["ca-key.pem"], "root-cert.pem": both, "cert-chain.pem": {}}}
		_, err := secrets.Update(t.Context(), secret, metav1.UpdateOptions{})
		if apierrors.IsNotFound(err) {
			_, err = secrets.Create(t.Context(), secret, metav1.CreateOptions{})
		}
		s.must(err)
	}
	server := "spiffe://cluster.local/ns/" + s.name + "/sa/server"

	plug(before)
	s.eventually("every namespace has both roots", func() error {
		all, err := cluster.Client().CoreV1().ConfigMaps("").List(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=istio-ca-root-cert"})
		if err != nil {
			return err
		}
		for _, cm := range all.Items {
			if cm.Data["root-cert.pem"] != string(both) {
				return fmt.Errorf("%s has %d roots", cm.Namespace, strings.Count(cm.Data["root-cert.pem"], "BEGIN"))
			}
		}
		return nil
	})
	s.eventually("node proxies trust both, without a restart", func() error {
		c, err := s.certificate(cluster.Node(2).Name, server)
		if err == nil && len(c.RootCerts) != 2 {
			err = fmt.Errorf("%d roots", len(c.RootCerts))
		}
		return err
	})
	old, err := s.certificate(cluster.Node(2).Name, server)
	s.must(err)

	plug(after)
	s.eventually("a new pod is certified below the new root", func() error { // the authority takes its time
		name := fmt.Sprint("late-", time.Now().Unix())
		s.deploy(workload{name: name, node: cluster.Node(1)})
		s.reach(name, "http://server/")
		s.reach("client", "http://"+name+"/")
		c, err := s.certificate(cluster.Node(1).Name, "spiffe://cluster.local/ns/"+s.name+"/sa/"+name)
		if err != nil {
			return err
		}
		if leaf, root := parseCertificate(t, c.CertChain[0].PEM), parseCertificate(t, string(after["root-cert.pem"])); leaf.CheckSignatureFrom(root) != nil {
			return errors.New("it is below the old one")
		}
		return nil
	})
	if now, err := s.certificate(cluster.Node(2).Name, server); err != nil || now.CertChain[0].PEM != old.CertChain[0].PEM {
		t.Errorf("%v: the server's certificate is another meanwhile: nothing was shown of old ones", err)
	}
	check()
}

// TestAPIServerDown: pods talk on without an API server, and everything goes on by itself when it is back.
// MISTNET_E2E_OUTAGE says how long it is down.
func TestAPIServerDown(t *testing.T) {
	outage := time.Minute
	if text := os.Getenv("MISTNET_E2E_OUTAGE"); text != "" {
		var err error
		if outage, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	s, check := underLoad(t, "e2e-apiserver")
	before := s.restarts()
	s.must(cluster.Stop(t.Context(), "kube-apiserver"))
	select {
	case <-time.After(outage):
	case <-t.Context().Done():
	}
	s.must(cluster.Start("kube-apiserver"))
	s.must(cluster.WaitForAPI(t.Context()))

	s.policy("AuthorizationPolicy", "nobody", "\n  selector: {matchLabels: {app: server}}\n  action: DENY\n  rules: [{from: [{source: {principals: [cluster.local/ns/e2e-apiserver/sa/client]}}]}]")
	s.eventually("a new policy acts", func() error { return s.refused("client", "http://server/") })
	s.condition("nobody", "True", "Accepted")
	s.unpolicy("AuthorizationPolicy", "nobody")
	s.eventually("a policy that went does not act", func() error { _, err := s.run("client", "get", "http://server/"); return err })
	s.deploy(workload{name: "late", node: cluster.Node(1)})
	s.reach("late", "http://server/")
	wire := s.capture()
	s.get("late", "http://server/?from-late")
	s.tunnelled(wire, "from-late")
	check()
	if now := s.restarts(); now != before {
		t.Errorf("restarts of the mesh's own pods: %s; before: %s", now, before)
	}
}

// TestDefinitionsAreUpstreams: what the API server holds of Istio's kinds is what their module has.
func TestDefinitionsAreUpstreams(t *testing.T) {
	s := newSpace(t, "e2e-definitions", false)
	// As somebody who owns none of their fields: it is an error when applying the file would change anything.
	out, err := cluster.Kubectl(t.Context(), "diff", "--server-side", "--field-manager=e2e", "--force-conflicts",
		"-f", "../../manifests/charts/base/files/customresourcedefinitions.gen.yaml")
	if err != nil {
		s.Errorf("%v\n%s", err, out)
	}
}

// underLoad makes a namespace in which only mTLS is served, and a client that asks a server of another node all the time.
// The function it returns fails the test when one of these requests failed.
func underLoad(t *testing.T, name string) (*space, func()) {
	t.Helper()
	s := newSpace(t, name, true)
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "server", node: two}, workload{name: "client", node: one})
	s.redirected(true)
	s.eventually("the server is reached in a tunnel", func() error {
		wire := s.capture()
		s.reach("client", "http://server/?are-we-there")
		if wire.Contains([]byte("are-we-there")) {
			return errors.New("it is reached in the clear")
		}
		return nil
	})
	s.policy("PeerAuthentication", "default", "\n  mtls: {mode: STRICT}")
	// By its address: without the API server Kubernetes may forget, for a moment, that pods of services are ready.
	s.deploy(workload{name: "loader", node: one, args: []string{"load", "http://" + bracketed(s.pod("server").Status.PodIP) + ":8080/", "10"}})
	_, before := s.load("loader") // what failed while the loader itself joined is not the test's
	return s, func() {
		t.Helper()
		if sent, failed := s.load("loader"); failed > before {
			logs, _ := cluster.Kubectl(s.Context(), "-n", s.name, "logs", "loader", "--tail=40")
			s.Errorf("%d of %d requests failed:\n%s", failed-before, sent, logs)
		}
	}
}

// condition waits for what istiod says of an AuthorizationPolicy.
func (s *space) condition(policy, status, reason string) {
	s.Helper()
	s.eventually(fmt.Sprintf("%s has its condition", policy), func() error {
		got, err := cluster.Kubectl(s.Context(), "-n", s.name, "get", "authorizationpolicy", policy, "-o",
			`jsonpath={range .status.conditions[?(@.type=="ZtunnelAccepted")]}{.status} {.reason} {.message}{end}`)
		if err == nil && !strings.HasPrefix(got, status+" "+reason+" ") {
			err = fmt.Errorf("it is %q, want %s %s", got, status, reason)
		}
		return err
	})
}

// leader is the replica of istiod that writes.
func (s *space) leader() (string, error) {
	lease, err := cluster.Client().CoordinationV1().Leases(home).Get(s.Context(), "istio-leader", metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	if lease.Spec.HolderIdentity == nil || *lease.Spec.HolderIdentity == "" {
		return "", errors.New("nobody leads")
	}
	_, err = cluster.Client().CoreV1().Pods(home).Get(s.Context(), *lease.Spec.HolderIdentity, metav1.GetOptions{})
	return *lease.Spec.HolderIdentity, err
}

// istiodEnv sets a variable of istiod's, or takes it away, and waits for the replicas that have it.
func (s *space) istiodEnv(setting string) {
	s.Helper()
	_, err := cluster.Kubectl(context.WithoutCancel(s.Context()), "-n", home, "set", "env", "deployment/istiod", setting)
	s.must(err)
	_, err = cluster.Kubectl(context.WithoutCancel(s.Context()), "-n", home, "rollout", "status", "deployment/istiod", "--timeout=3m")
	s.must(err)
}

// restarts tells how often containers of the mesh itself were started again.
func (s *space) restarts() string {
	s.Helper()
	var all []string
	s.eventually("the mesh's pods", func() error {
		pods, err := cluster.Client().CoreV1().Pods(home).List(s.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		all = nil
		for _, p := range pods.Items {
			for _, c := range p.Status.ContainerStatuses {
				all = append(all, fmt.Sprintf("%s=%d", p.Name, c.RestartCount))
			}
		}
		return nil
	})
	return strings.Join(all, " ")
}

// certificate is what config_dump shows of one.
type certificate struct {
	Identity             string
	CertChain, RootCerts []struct{ PEM string }
}

// certificate asks a node's ztunnel for that of an identity.
func (s *space) certificate(node, identity string) (c certificate, err error) {
	s.Helper()
	text, err := s.admin(ztunnelOn(s, node), "15000", "/config_dump")
	if err != nil {
		return c, err
	}
	var dump struct{ Certificates []certificate }
	if err := json.Unmarshal([]byte(text), &dump); err != nil {
		return c, err
	}
	for _, c := range dump.Certificates {
		if c.Identity == identity && len(c.CertChain) > 0 {
			return c, nil
		}
	}
	return c, fmt.Errorf("no certificate of %s on %s", identity, node)
}

func parseCertificate(t *testing.T, text string) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Fatalf("no certificate in %q", text)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// admin gets a page that answers on a pod's loopback only.
func (s *space) admin(pod, port, path string) (string, error) {
	s.Helper()
	ctx, stop := context.WithTimeout(s.Context(), patience)
	defer stop()
	forward := cluster.Command(ctx, "kubectl", "-n", home, "port-forward", "pod/"+pod, ":"+port)
	out, err := forward.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := forward.Start(); err != nil {
		return "", err
	}
	defer func() { stop(); _ = forward.Wait() }()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("forward a port to %s: %w", pod, err)
	}
	addr, _, _ := strings.Cut(strings.TrimPrefix(line, "Forwarding from "), " ")
	return fromOutside(ctx, "http://"+addr+path)
}
