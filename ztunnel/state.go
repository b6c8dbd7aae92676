package ztunnel

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/controlplane"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

// view is what every decision reads: a snapshot and the policies compiled from it. It never changes.
type view struct {
	*mesh.Snapshot
	compiled *policyCache
	next     chan struct{} // closed when another view replaces this one
}

// policyCache holds the compiled policies of each workload seen since the policies last changed.
type policyCache struct {
	sets sync.Map // what governs a workload (string) → *authz.Set
	log  *zap.Logger
}

// policies returns the compiled policies that govern w, and the keys of those it names that have not arrived.
func (v *view) policies(w *mesh.Workload) (*authz.Set, []string) {
	key := w.Namespace + "|" + strings.Join(w.Policies, "|")
	if set, ok := v.compiled.sets.Load(key); ok {
		return set.(*authz.Set), nil
	}
	ps, missing := v.PoliciesFor(w)
	set, err := authz.Compile(ps)
	if err != nil {
		v.compiled.log.Warn("policy cannot be compiled and denies", zap.Error(err), zap.String("namespace", w.Namespace))
	}
	if len(missing) == 0 {
		v.compiled.sets.Store(key, set)
	}
	return set, missing
}

// state turns xDS deltas into the next view and publishes it by one atomic store.
type state struct {
	log     *zap.Logger
	current atomic.Pointer[view]
	mu      sync.Mutex // held by the one who makes the next view

	// changed is called after each new view that may alter an authorization: policies or workloads differ.
	changed func(*view)
}

func newState(log *zap.Logger) *state {
	s := &state{log: log}
	s.current.Store(s.view(&mesh.Snapshot{}))
	return s
}

func (s *state) view(snap *mesh.Snapshot) *view {
	return &view{Snapshot: snap, compiled: &policyCache{log: s.log}, next: make(chan struct{})}
}

func (s *state) load() *view { return s.current.Load() }

// apply takes one xDS response; it is the xds.Client's Apply.
func (s *state) apply(_ context.Context, u xds.Update) []xds.Rejection {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.load()
	delta, rejected := controlplane.Delta(wds.DeltaL4, old.Snapshot, u)
	if delta.IsEmpty() {
		return rejected
	}
	next := s.view(old.Apply(delta))
	if len(delta.Policies)+len(delta.RemovePolicies) == 0 {
		next.compiled = old.compiled
	}
	s.current.Store(next)
	close(old.next)
	if s.changed != nil {
		s.changed(next)
	}
	return rejected
}

// await returns the first view for which ok holds, or the last one seen when ctx is done.
func (s *state) await(ctx context.Context, ok func(*view) bool) (*view, bool) {
	for {
		v := s.load()
		if ok(v) {
			return v, true
		}
		select {
		case <-ctx.Done():
			return v, false
		case <-v.next:
		}
	}
}
