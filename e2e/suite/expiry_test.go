package suite_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/e2e/lab"
)

// shortTTL is the lifetime of certificates in TestExpiry: renewed after half of it, on a machine that does much else.
const shortTTL = 40 * time.Second

// TestExpiry: certificates run out while istiod is away. What needs one fails and says why, nothing goes in the clear
// instead, and everything works again by itself when istiod is back.
func TestExpiry(t *testing.T) {
	s := newSpace(t, "e2e-expiry", true)
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "server", node: two, more: `livenessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 2},
    readinessProbe: {httpGet: {path: /readyz, port: 8080}, periodSeconds: 2}`},
		workload{name: "client", node: one}, workload{name: "late", node: one}) // late says nothing before they expired
	s.redirected(true)
	outside := newSpace(t, "e2e-expiry-outside", false)
	outside.deploy(workload{name: "stranger", node: one})
	const url = "http://server.e2e-expiry/"
	// By address: without istiod nothing tells where services are, and the cluster's DNS is not what is asked about.
	service, err := cluster.Client().CoreV1().Services(s.name).Get(t.Context(), "server", metav1.GetOptions{})
	s.must(err)
	fixed := "http://" + bracketed(service.Spec.ClusterIP) + "/"
	ctl := buildMistctl(s)
	ttl := func(ctx context.Context, value string) error {
		out, err := cluster.Command(ctx, ctl, "upgrade", "--timeout", "5m", "--set", "ztunnel.env.SECRET_TTL="+value).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("mistctl upgrade: %w\n%s", err, out)
		}
		return err
	}
	t.Cleanup(func() {
		if err := ttl(context.Background(), "null"); err != nil { // the test's context has ended by now
			t.Error(err)
		}
	})
	s.must(ttl(t.Context(), shortTTL.String()))
	principal := func(account string) string { return "spiffe://cluster.local/ns/" + s.name + "/sa/" + account }
	expires := func(s *space, n *lab.Node, account string) (at time.Time) {
		s.Helper()
		s.eventually("the certificate of "+account, func() error {
			c, err := s.certificate(n.Name, principal(account))
			if err == nil {
				at = parseCertificate(s.T, c.CertChain[0].PEM).NotAfter
			}
			return err
		})
		return at
	}

	steps := []struct {
		name string
		run  func(s *space)
	}{
		{"short certificates are renewed in time", func(s *space) {
			first := expires(s, one, "client")
			if left := time.Until(first); left > shortTTL {
				s.Fatalf("a certificate expires in %s, want at most %s", left, shortTTL)
			}
			s.get("client", url)
			s.eventually("the certificate is another one", func() error {
				if at := expires(s, one, "client"); !at.After(first) {
					return fmt.Errorf("it expires at %s as before", at)
				}
				return nil
			})
			s.get("client", url)
		}},
		{"expired certificates carry nothing, and logs say so", func(s *space) {
			s.get("client", url) // a tunnel is open
			s.scaleIstiod(0)
			s.eventually("all certificates have expired", func() error {
				for _, at := range []time.Time{expires(s, one, "client"), expires(s, one, "late"), expires(s, two, "server")} {
					if left := time.Until(at); left > 0 {
						return fmt.Errorf("one has %s left", left)
					}
				}
				return nil
			})
			wire := s.capture()
			for _, pod := range []string{"client", "late"} {
				if err := s.refused(pod, fixed+"?expired-words"); err != nil {
					s.Error(err)
				}
			}
			s.must(wire.Stop())
			if wire.Contains([]byte("expired-words")) {
				s.Error("a request went in the clear")
			}
			for pod, line := range map[string][]string{
				"client": {"identity", "certificate expired and renewal failed", principal("client")},
				"late":   {"access", "connection", `src.workload="late"`, "expired", principal("late")},
			} {
				s.eventually("the log tells about "+pod, func() error { return s.logged(one, line...) })
			}
			s.eventually("plaintext is let in, as before", func() error { _, err := outside.run("stranger", "get", fixed); return err })
		}},
		{"a ztunnel that crashes then guards its pods, and their probes go on", func(s *space) {
			_, err := two.Exec(s.Context(), "bash", "-c", `kill -9 $(pidof ztunnel)`)
			s.must(err)
			s.eventually("it runs again", func() error { _, err := two.Exec(s.Context(), "pidof", "ztunnel"); return err })
			// It knows no policies before istiod tells: plaintext could be forbidden.
			direct := "http://" + bracketed(s.pod("server").Status.PodIP) + ":8080/?unguarded"
			if err := outside.refused("stranger", direct); err != nil {
				s.Error(err)
			}
			if err := s.refused("client", direct); err != nil {
				s.Error(err)
			}
			wire := s.capture()
			if err := s.refused("server", "http://"+bracketed(s.pod("client").Status.PodIP)+":8080/?unguarded"); err != nil {
				s.Error(err)
			}
			s.must(wire.Stop())
			if wire.Contains([]byte("unguarded")) {
				s.Error("a request went in the clear")
			}
			s.ready("server")
		}},
		{"with istiod back everything heals", func(s *space) {
			s.scaleIstiod(1)
			for _, pod := range []string{"client", "late"} {
				s.eventually(pod+" is served", func() error { _, err := s.run(pod, "get", url); return err })
			}
			wire := s.capture()
			s.get("late", url+"?healed-words")
			s.tunnelled(wire, "healed-words")
			s.eventually("plaintext is let in", func() error { _, err := outside.run("stranger", "get", url); return err })
			if left := time.Until(expires(s, two, "server")); left <= 0 {
				s.Errorf("the server's certificate expired %s ago", -left)
			}
		}},
	}
	defer func() {
		if _, err := cluster.Kubectl(context.WithoutCancel(t.Context()), "-n", system, "scale", "deployment", "istiod", "--replicas=1"); err != nil {
			t.Error(err)
		}
	}()
	for _, step := range steps {
		if !t.Run(step.name, func(t *testing.T) { step.run(&space{t, s.name}) }) {
			return // later ones go by it
		}
	}
	s.undisturbed() // by its liveness probes, too
}
