package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/mistnet/mistnet/internal/controlplane"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/zds"
)

// noAuthority signs nothing.
type noAuthority struct{}

func (noAuthority) Sign(context.Context, mesh.Identity, []byte, time.Duration) ([]string, error) {
	return nil, errors.New("istiod is away")
}

// uncertified is a node's pods whose certificates nobody signs; ready counts when they were all served.
func uncertified(t *testing.T) (ps *pods, ready *int) {
	t.Helper()
	ids := identity.NewManager(identity.ManagerConfig{CA: noAuthority{}})
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- ids.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ran })
	ready = new(int)
	ps = &pods{
		proxy: &proxy{cfg: &Config{Config: controlplane.Config{TrustDomain: "cluster.local"}}, log: zap.NewNop(), ids: ids, conns: newConns()},
		pods:  make(map[string]*pod), complete: func() { *ready++ },
	}
	ps.connected()
	return ps, ready
}

// newNetNS makes a network namespace that lives as long as what is opened in it.
func newNetNS(t *testing.T) *os.File {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root to make a network namespace")
		}
		t.Skip("needs root to make a network namespace")
	}
	type made struct {
		f   *os.File
		err error
	}
	result := make(chan made)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		var f *os.File
		if err == nil {
			f, err = os.Open("/proc/thread-self/ns/net")
		}
		result <- made{f, err}
	}()
	m := <-result
	if m.err != nil {
		t.Fatal(m.err)
	}
	return m.f
}

var uncertifiedPod = zds.Info{UID: "1", Name: "cart-1", Namespace: "shop", ServiceAccount: "cart"}

// TestWithoutACertificateNothingIsTakenOver: a new ztunnel leaves the pods to the old one, and is not ready, while it could
// not carry their connections. Once a pod it could not take is gone, it is ready.
func TestWithoutACertificateNothingIsTakenOver(t *testing.T) {
	file := newNetNS(t)
	again, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", file.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	netns, err := linux.NetNSFromFile(again)
	if err != nil {
		t.Fatal(err)
	}
	defer netns.Close()
	old, err := netns.Listen(t.Context(), linux.ListenOptions{
		Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), mesh.PortHBONE), Mark: mesh.MarkZtunnel, ReusePort: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()

	ps, ready := uncertified(t)
	ctx := t.Context()
	if err := ps.Add(ctx, uncertifiedPod, file); err == nil || !strings.Contains(err.Error(), "istiod is away") {
		t.Errorf("Add = %v, want the reason why there is no certificate", err)
	}
	if len(ps.list()) > 0 {
		t.Error("the pod's listeners were opened")
	}
	if err := ps.Synced(ctx, []string{"1"}); err != nil || *ready != 0 {
		t.Errorf("Synced = %v, ready %d times: one pod is not served", err, *ready)
	}
	if err := ps.Del(ctx, "1"); err != nil || *ready != 1 {
		t.Errorf("Del = %v, ready %d times, want once", err, *ready)
	}
}

// TestWithoutACertificateOrphansAreServed: after a crash there is no old ztunnel, and plaintext needs no certificate.
func TestWithoutACertificateOrphansAreServed(t *testing.T) {
	file := newNetNS(t)
	ps, ready := uncertified(t)
	ctx := t.Context()
	if err := ps.Add(ctx, uncertifiedPod, file); err != nil {
		t.Fatal(err)
	}
	if len(ps.list()) != 1 {
		t.Error("the pod's listeners were not opened")
	}
	if err := ps.Synced(ctx, []string{"1"}); err != nil || *ready != 1 {
		t.Errorf("Synced = %v, ready %d times, want once", err, *ready)
	}
	if err := ps.Del(ctx, "1"); err != nil {
		t.Error(err)
	}
}
