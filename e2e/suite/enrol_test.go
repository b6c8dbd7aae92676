package suite_test

import (
	"context"
	"net"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/netlab"
)

const hbonePort = 15008

// TestEnrol: a label on a namespace brings running pods into the mesh, and out again, and nobody who talks notices.
func TestEnrol(t *testing.T) {
	s := newSpace(t, "e2e-enrol", false)
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "server", node: two})
	server := net.JoinHostPort(s.pod("server").Status.PodIP, "9000")
	s.deploy(
		workload{name: "holder", node: one, args: []string{"hold", server, "50ms"}},
		workload{name: "loader", node: one, args: []string{"load", "http://server/load", "20"}},
		workload{name: "client", node: one},
	)
	s.load("loader")
	s.ticks("holder")

	wire := s.capture()
	s.get("client", "http://server/?before-the-mesh")
	if !wire.Contains([]byte("before-the-mesh")) {
		t.Fatal("plain traffic between nodes is not seen on the wire: the capture is blind")
	}

	s.label(true)
	s.redirected(true)
	s.ticks("holder")
	s.undisturbed()
	wire = s.capture()
	s.get("client", "http://server/?in-the-mesh")
	s.tunnelled(wire, "in-the-mesh")

	t.Run("a new pod is meshed before its init container speaks", func(t *testing.T) {
		s := &space{t, s.name}
		wire := s.capture()
		s.deploy(workload{name: "late", node: one, init: []string{"get", "http://server/?first-words"}})
		logs, err := cluster.Kubectl(t.Context(), "-n", s.name, "logs", "late", "-c", "init")
		s.must(err)
		if !strings.HasPrefix(logs, "200 ") {
			t.Errorf("the init container got %q", logs)
		}
		s.tunnelled(wire, "first-words")
	})

	s.label(false)
	s.redirected(false)
	s.ticks("holder")
	wire = s.capture()
	s.get("client", "http://server/?after-the-mesh")
	if !wire.Contains([]byte("after-the-mesh")) {
		t.Error("traffic of pods that left the mesh is not plain")
	}
	if sent, failed := s.load("loader"); failed > 0 {
		logs, _ := cluster.Kubectl(t.Context(), "-n", s.name, "logs", "loader")
		t.Errorf("%d of %d requests failed meanwhile:\n%s", failed, sent, logs)
	}
	s.undisturbed()
}

// capture records the wire between the nodes until the test ends.
func (s *space) capture() *netlab.Capture {
	s.Helper()
	c, err := cluster.Capture(context.WithoutCancel(s.Context()))
	s.must(err)
	s.Cleanup(func() { _ = c.Stop() })
	return c
}

// tunnelled fails unless something went through tunnels since the capture began, and the words did not pass in the clear.
func (s *space) tunnelled(c *netlab.Capture, words string) {
	s.Helper()
	s.must(c.Stop()) // a capture with losses proves nothing
	bytes := 0
	for _, f := range c.Flows() {
		if f.Dst.Port() == hbonePort {
			bytes += f.Payload
		}
	}
	if bytes == 0 {
		s.Errorf("nothing went to port %d between the nodes", hbonePort)
	}
	if c.Contains([]byte(words)) {
		s.Errorf("%q passed between the nodes in the clear", words)
	}
}
