package ztunnel

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/zds"
)

// noAuthority signs nothing.
type noAuthority struct{}

func (noAuthority) Sign(context.Context, mesh.Identity, []byte, time.Duration) ([]string, error) {
	return nil, errors.New("istiod is away")
}

// TestWithoutACertificateNothingIsTakenOver: a new ztunnel leaves the pods to the old one, and is not ready, while it could
// not carry their connections. Once a pod it could not take is gone, it is ready.
func TestWithoutACertificateNothingIsTakenOver(t *testing.T) {
	ids := identity.NewManager(identity.ManagerConfig{CA: noAuthority{}})
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- ids.Run(ctx) }()
	defer func() { cancel(); <-ran }()
	ready := 0
	ps := &pods{
		proxy: &proxy{cfg: &Config{TrustDomain: "cluster.local"}, log: zap.NewNop(), ids: ids, conns: newConns()},
		pods:  make(map[string]*pod), complete: func() { ready++ },
	}
	ps.connected()
	netns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	info := zds.Info{UID: "1", Name: "cart-1", Namespace: "shop", ServiceAccount: "cart"}
	if err := ps.Add(ctx, info, netns); err == nil || !strings.Contains(err.Error(), "istiod is away") {
		t.Errorf("Add = %v, want the reason why there is no certificate", err)
	}
	if len(ps.list()) > 0 {
		t.Error("the pod's listeners were opened")
	}
	if err := ps.Synced(ctx, []string{"1"}); err != nil || ready != 0 {
		t.Errorf("Synced = %v, ready %d times: one pod is not served", err, ready)
	}
	if err := ps.Del(ctx, "1"); err != nil || ready != 1 {
		t.Errorf("Del = %v, ready %d times, want once", err, ready)
	}
}
