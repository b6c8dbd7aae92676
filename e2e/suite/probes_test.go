package suite_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// TestProbes: the kubelet, which has no identity, reaches pods that refuse plaintext; others do not.
func TestProbes(t *testing.T) {
	s := newSpace(t, "e2e-probes", true)
	s.policy("PeerAuthentication", "default", `
  mtls: {mode: STRICT}`)
	n := cluster.Node(1)
	const often = "periodSeconds: 1, failureThreshold: 1"
	// A node under load takes its time to answer, and a container that is started again would be told from one that is not.
	both := func(how string) string {
		return fmt.Sprintf("readinessProbe: {%[1]s, %[2]s}, livenessProbe: {%[1]s, periodSeconds: 1, timeoutSeconds: 5, failureThreshold: 6}", how, often)
	}
	const ports = ", ports: [{name: web, containerPort: 8080}, {name: calls, containerPort: 9090}]"
	// deploy waits until they are ready, which takes a probe that passed.
	s.deploy(
		workload{name: "http", node: n, more: both("httpGet: {path: /healthz, port: 8080}")},
		workload{name: "named", node: n, more: both("httpGet: {path: /healthz, port: web}") + ports},
		workload{name: "header", node: n, more: both("httpGet: {path: /healthz, port: 8080, httpHeaders: [{name: Host, value: probe.example}]}")},
		workload{name: "tcp", node: n, more: both("tcpSocket: {port: 9000}")},
		workload{name: "grpc", node: n, more: both("grpc: {port: 9090}")},
		workload{name: "services", node: n, more: "readinessProbe: {grpc: {port: 9090, service: readiness}, " + often +
			"}, livenessProbe: {grpc: {port: 9090, service: liveness}, periodSeconds: 1, timeoutSeconds: 5, failureThreshold: 6}"},
		workload{name: "exec", node: n, more: both(`exec: {command: [/app, get, "http://127.0.0.1:8080/healthz"]}`)},
		workload{name: "startup", node: n, more: "startupProbe: {grpc: {port: 9090}, periodSeconds: 1, failureThreshold: 60}"},
		workload{name: "hostport", node: n, more: both("httpGet: {path: /healthz, port: 8080}") + ", ports: [{containerPort: 8080, hostPort: 18080}]"},
		// The kubelet asks the node instead, where the port leads to the pod's.
		workload{name: "byhost", node: n, more: both(fmt.Sprintf("httpGet: {path: /healthz, host: %s, port: 18081}", n.IP)) +
			", ports: [{containerPort: 8080, hostPort: 18081}]"},
		workload{name: "peer", node: n},
	)
	s.redirected(true)
	outside := newSpace(t, "e2e-probes-outside", false)
	outside.deploy(workload{name: "stranger", node: n})

	for _, how := range []struct{ pod, probe string }{
		{"turncoat", "httpGet: {path: /readyz, port: 8080}"},
		{"turncall", "grpc: {port: 9090, service: readiness}"},
	} {
		t.Run("a probe that should fail does: "+how.probe, func(t *testing.T) {
			s := &space{t, s.name}
			s.deploy(workload{name: how.pod, node: n, more: "readinessProbe: {" + how.probe + ", " + often + "}"})
			if _, err := s.run(how.pod, "post", "http://127.0.0.1:8080/readyz", "false"); err != nil {
				t.Fatal(err)
			}
			s.eventually("it is not ready", func() error {
				for _, c := range s.pod(how.pod).Status.Conditions {
					if c.Type == corev1.PodReady && c.Status == corev1.ConditionFalse {
						return nil
					}
				}
				return errors.New("it is")
			})
		})
	}

	t.Run("plaintext of others is refused, mTLS is not", func(t *testing.T) {
		s := &space{t, s.name}
		for _, ip := range s.pod("http").Status.PodIPs {
			for _, port := range []string{"8080", "9090"} {
				url := "http://" + net.JoinHostPort(ip.IP, port) + "/"
				if err := outside.refused("stranger", url); err != nil {
					t.Error(err)
				}
				// From another node, a process on the host is nobody too.
				if out, err := cluster.Node(2).Exec(t.Context(), "curl", "-s", "-m", "3", url); err == nil {
					t.Errorf("a process of another node was served at %s: %q", url, out)
				}
			}
			s.get("peer", "http://"+net.JoinHostPort(ip.IP, "8080")+"/")
		}
	})

	// What rules by address can and cannot tell apart: docs/security.md says it to operators.
	t.Run("whatever runs on the network of the pod's own node passes as the kubelet does", func(t *testing.T) {
		s := &space{t, s.name}
		for _, ip := range s.pod("http").Status.PodIPs {
			url := "http://" + net.JoinHostPort(ip.IP, "8080") + "/"
			out, err := n.Exec(t.Context(), "curl", "-s", "-m", "10", url)
			if err != nil {
				t.Errorf("a process of the node was not served: the promise in docs/security.md is too weak: %q, %v", out, err)
			}
			// Whoever it was, the application sees the address of probes, and not one that somebody could be trusted for.
			want := mesh.ProbeAddrIPv4
			if netip.MustParseAddr(ip.IP).Is6() {
				want = mesh.ProbeAddrIPv6
			}
			if !strings.Contains(out, "sees="+want) {
				t.Errorf("the application was shown %q, want the probes' address %s", out, want)
			}
		}
	})

	t.Run("a host port of a strict pod serves nobody from outside", func(t *testing.T) {
		s := &space{t, s.name}
		address := net.JoinHostPort(n.IP.String(), "18080")
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		c, err := cluster.DialContext(ctx, "tcp", address)
		if err != nil {
			return // refused or reset at once
		}
		defer c.Close()
		fmt.Fprintf(c, "GET / HTTP/1.0\r\n\r\n")
		buf := make([]byte, 100)
		if got, err := c.Read(buf); err == nil {
			t.Errorf("%s answered %s", address, strconv.Quote(string(buf[:got])))
		}
		s.get("peer", "http://http/")
	})
	s.undisturbed()
}
