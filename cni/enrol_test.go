package cni_test

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistnet/mistnet/cni"
	"github.com/mistnet/mistnet/cni/plugin"
	"github.com/mistnet/mistnet/internal/linux"
)

func TestARunningPodIsCapturedOnceZtunnelServesIt(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	pods := podYAML("shop", "web-1", "u-1", "")
	n.write("shop.yaml", namespace("shop", "")+pods)
	stop := n.start()
	s := newSandbox(t)
	n.add(s.event("shop", "web-1", "u-1", "c-1"))
	var before, during atomic.Int64 // how often ztunnel was asked, and the pod was captured by then
	z := &ztunnel{t: t, events: make(chan string, 1000), onAdd: func() {
		before.Add(1)
		if s.captured() {
			during.Add(1)
		}
	}}
	why := errors.New("port 15008 is in use")
	z.refuse.Store(&why)
	n.connect(z)
	n.write("shop.yaml", namespace("shop", "ambient")+pods)
	z.await("refused u-1")
	n.redirection("shop/web-1", "pending")
	if s.captured() {
		t.Error("captured though ztunnel refused it")
	}
	z.refuse.Store(nil)
	z.await(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
	n.redirection("shop/web-1", "enabled")
	if !s.captured() {
		t.Error("announced before it is captured")
	}
	if before.Load() < 2 || during.Load() > 0 {
		t.Errorf("ztunnel was asked %d times, and %d times the pod was captured by then, want never", before.Load(), during.Load())
	}
	if !s.spares() {
		t.Error("connections that are older than the rules would be reset")
	}
	s2 := newSandbox(t)
	n.write("new.yaml", podYAML("shop", "web-2", "u-2", ""))
	n.add(s2.event("shop", "web-2", "u-2", "c-2"))
	if !s2.captured() || s2.spares() {
		t.Errorf("a new pod is captured: %t, spares what is under way: %t, want all captured", s2.captured(), s2.spares())
	}
	stop()
	n.start()
	z.await(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
	if code, why := n.ask(http.MethodPost, plugin.PathCheck, s.event("shop", "web-1", "u-1", "c-1")); code != http.StatusOK {
		t.Errorf("CHECK of a pod that joined says %d %s", code, why)
	}
	if !s.spares() || s2.spares() {
		t.Error("another agent forgets which pod joined while it ran")
	}
}

// What ztunnel carries for a pod goes on when the pod leaves the mesh, and so does what peers send who do not know yet.
func TestAPodThatLeavesIsServedUntilItsConnectionsEnd(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	const grace = time.Second
	n.config = func(c *cni.Config) { c.ReleaseGrace = grace }
	pods := podYAML("shop", "web-1", "u-1", "")
	n.write("shop.yaml", namespace("shop", "ambient")+pods)
	n.start()
	z, _ := n.ztunnel()
	z.expect("synced []")
	s := newSandbox(t)
	n.add(s.event("shop", "web-1", "u-1", "c-1"))
	z.expect(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))

	ns, err := linux.OpenNetNS(s.path())
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	ln, err := ns.Listen(t.Context(), linux.ListenOptions{Addr: netip.MustParseAddrPort("[::]:15008")})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	peer, err := ns.Dial(t.Context(), linux.DialOptions{Remote: netip.MustParseAddrPort("127.0.0.1:15008"), Timeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	carried, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer carried.Close()

	began := time.Now()
	n.write("shop.yaml", namespace("shop", "")+pods)
	n.redirection("shop/web-1", "")
	redirects := func() bool {
		return strings.Contains(s.exec("iptables", "-t", "nat", "-S"), "REDIRECT")
	}
	n.eventually("redirection has ended", func() bool { return !redirects() })
	marks := s.exec("iptables", "-t", "mangle", "-S")
	if !strings.Contains(marks, "CONNMARK") {
		t.Errorf("what the connection needs is gone:\n%s", marks)
	}
	// It comes back before it has left.
	n.write("shop.yaml", namespace("shop", "ambient")+pods)
	n.redirection("shop/web-1", "enabled")
	n.eventually("it is captured", s.captured)
	n.write("shop.yaml", namespace("shop", "")+pods)
	n.redirection("shop/web-1", "")
	select {
	case got := <-z.events:
		t.Errorf("ztunnel was told %q while it carries a connection", got)
	case <-time.After(2 * grace):
	}
	abort(peer)
	abort(carried)
	z.expect("del u-1")
	if took := time.Since(began); took < grace {
		t.Errorf("ztunnel was told after %v, want %v at least", took, grace)
	}
	n.eventually("nothing is left", func() bool { return !strings.Contains(s.exec("iptables", "-t", "mangle", "-S"), "CONNMARK") })
	if s.captured() {
		t.Error("rules are left")
	}
}

// abort ends a connection with a reset: no trace of it stays in the kernel.
func abort(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = c.Close()
}
