package xds_test

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/delta/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/mistnet/mistnet/api/security"
	"github.com/mistnet/mistnet/api/workload"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

// stranger is Envoy's own control-plane library as the server.
type stranger struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	delta delta.Server
}

func (s *stranger) DeltaAggregatedResources(
	stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer,
) error {
	return s.delta.DeltaStreamHandler(stream, "")
}

type silent struct{}

func (silent) OnDeltaStreamOpen(context.Context, int64, string) error             { return nil }
func (silent) OnDeltaStreamClosed(int64, *core.Node)                              {}
func (silent) OnStreamDeltaRequest(int64, *discovery.DeltaDiscoveryRequest) error { return nil }
func (silent) OnStreamDeltaResponse(int64, *discovery.DeltaDiscoveryRequest, *discovery.DeltaDiscoveryResponse) {
}

func startStranger(t *testing.T, addresses, policies *cache.LinearCache) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cert, _ := certificate()
	g := grpc.NewServer(append(xds.ServerOptions(), grpc.Creds(credentials.NewServerTLSFromCert(&cert)))...)
	mux := &cache.MuxCache{
		ClassifyDelta: func(r *cache.DeltaRequest) string { return r.GetTypeUrl() },
		Caches:        map[string]cache.Cache{address: addresses, policy: policies},
	}
	ctx, cancel := context.WithCancel(context.Background())
	discovery.RegisterAggregatedDiscoveryServiceServer(g, &stranger{delta: delta.NewServer(ctx, mux, silent{})})
	var serving sync.WaitGroup
	serving.Go(func() { _ = g.Serve(ln) })
	t.Cleanup(func() {
		cancel()
		g.Stop()
		serving.Wait()
	})
	return ln.Addr().String()
}

func podNamed(name, node string) *workload.Address {
	return &workload.Address{Type: &workload.Address_Workload{Workload: &workload.Workload{Uid: name, Node: node}}}
}

// reader applies what comes to a snapshot, as ztunnel does.
type reader struct {
	mu       sync.Mutex
	snapshot *mesh.Snapshot
	changed  chan struct{}
}

func (r *reader) apply(_ context.Context, u xds.Update) []xds.Rejection {
	r.mu.Lock()
	defer r.mu.Unlock()
	var upserts []wds.Named
	for _, res := range u.Upserts {
		upserts = append(upserts, wds.Named{Name: res.Name, Body: res.Body})
	}
	d, bad := wds.Delta(r.snapshot, u.TypeURL, upserts, u.Removes)
	r.snapshot = r.snapshot.Apply(d)
	close(r.changed)
	r.changed = make(chan struct{})
	var rejected []xds.Rejection
	for name, err := range bad {
		rejected = append(rejected, xds.Rejection{Name: name, Err: err})
	}
	return rejected
}

func (r *reader) await(t *testing.T, what string, is func(*mesh.Snapshot) bool) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		r.mu.Lock()
		s, changed := r.snapshot, r.changed
		r.mu.Unlock()
		if is(s) {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("it never came to be that %s", what)
		}
	}
}

func TestClientAgainstEnvoysControlPlane(t *testing.T) {
	t.Parallel()
	addresses := cache.NewLinearCache(address, cache.WithInitialResources(map[string]types.Resource{
		"a": podNamed("a", "node-1"), "b": podNamed("b", "node-1"), "bad": podNamed("mismatch", ""),
	}))
	policies := cache.NewLinearCache(policy, cache.WithInitialResources(map[string]types.Resource{
		"shop/p": &security.Authorization{Namespace: "shop", Name: "p", Scope: security.Scope_NAMESPACE},
	}))
	addr := startStranger(t, addresses, policies)

	for _, wildcard := range []bool{true, false} {
		r := &reader{snapshot: &mesh.Snapshot{}, changed: make(chan struct{})}
		p := newProxy()
		cfg := p.config(addr)
		cfg.Apply = r.apply
		cfg.Subscriptions = []xds.Subscription{{TypeURL: policy, Wildcard: true}, {TypeURL: address, Wildcard: wildcard}}
		p.start(t, cfg)
		awaitClosed(t, "sync", p.Synced())
		if !wildcard {
			for _, name := range []string{"a", "b"} { // it leaves names that do not exist without an answer
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				if err := p.Resolve(ctx, address, name); err != nil {
					t.Fatalf("Resolve(%q) = %v", name, err)
				}
			}
		}
		r.await(t, "a, b and a policy are known, and nothing else", func(s *mesh.Snapshot) bool {
			w, n, a := s.Counts()
			return s.Workload("a") != nil && s.Workload("b") != nil && s.Policy("shop/p") != nil && w == 2 && n == 0 && a == 1
		})
		if err := addresses.UpdateResources(map[string]types.Resource{"a": podNamed("a", "node-2")}, []string{"b"}); err != nil {
			t.Fatal(err)
		}
		r.await(t, "a is on node-2 and b is gone", func(s *mesh.Snapshot) bool {
			return s.Workload("a").Node == "node-2" && s.Workload("b") == nil
		})
		if err := addresses.UpdateResources(map[string]types.Resource{
			"a": podNamed("a", "node-1"), "b": podNamed("b", "node-1"),
		}, nil); err != nil {
			t.Fatal(err)
		}
		r.await(t, "b is back", func(s *mesh.Snapshot) bool { return s.Workload("b") != nil })
	}
}
