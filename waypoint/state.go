package waypoint

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/mistnet/mistnet/waypoint/upstream"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/controlplane"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/waypoint/peer"
	"github.com/mistnet/mistnet/waypoint/route"
)

// view is what every decision reads: the mesh, and what was compiled from it. It never changes.
type view struct {
	upstream.View
	routes   map[string]*mesh.Route // by key
	table    *route.Table
	problems []route.Problem
	backends map[string]bool // keys of services that rules send to besides those that were asked for

	own    *guard            // what governs all that goes through this waypoint
	guards map[string]*guard // and, for services that policies target, what governs those; by key
}

// state turns xDS deltas into the next view and publishes it by one atomic store.
type state struct {
	cfg     *Config
	log     *zap.Logger
	current atomic.Pointer[view]
	mu      sync.Mutex // held by the one who makes the next view
	peers   peer.Finder

	// changed is called after each new view in which other policies hold.
	changed func(*view)
	// published is called after each new view.
	published func()
}

func newState(cfg *Config, log *zap.Logger) *state {
	s := &state{
		cfg: cfg, log: log, changed: func(*view) {}, published: func() {},
		peers: peer.Finder{Network: cfg.Network, Namespace: cfg.Namespace, TrustDomain: cfg.TrustDomain, Trusted: cfg.trusted()},
	}
	s.current.Store(&view{
		View: upstream.NewView(cfg.Namespace), routes: map[string]*mesh.Route{},
	})
	return s
}

func (s *state) load() *view { return s.current.Load() }

// apply takes one xDS response; it is the xds.Client's Apply. What is rejected leaves the last good one in force.
func (s *state) apply(_ context.Context, u xds.Update) []xds.Rejection {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.load()
	next := *old
	next.Renew()
	var rejected []xds.Rejection
	switch u.TypeURL {
	case mesh.TypeRoute:
		rejected = next.applyRoutes(u)
		s.report(next.problems)
	case mesh.TypeTrafficPolicy:
		rejected = next.applyTraffic(u)
	case mesh.TypeCredential:
		rejected = next.applyCredentials(u)
	default:
		rejected = next.applyMesh(u)
		s.govern(&next, u)
	}
	s.current.Store(&next)
	if !governedAlike(old, &next) {
		s.changed(&next)
	}
	s.published()
	return rejected
}

// applyMesh takes workloads, services and policies.
func (v *view) applyMesh(u xds.Update) []xds.Rejection {
	delta, rejected := controlplane.Delta(wds.Delta, v.Snapshot, u)
	if !delta.IsEmpty() {
		v.Snapshot = v.Apply(delta)
	}
	return rejected
}

// applyRoutes replaces rules and compiles all.
func (v *view) applyRoutes(u xds.Update) []xds.Rejection {
	var rejected []xds.Rejection
	v.routes = maps.Clone(v.routes)
	for _, name := range u.Removes {
		delete(v.routes, name)
	}
	for _, r := range u.Upserts {
		m, err := wds.DecodeRoute(r.Body)
		if err == nil && m.Key() != r.Name {
			err = fmt.Errorf("decode route: %q is not the resource's name", m.Key())
		}
		if err != nil {
			rejected = append(rejected, xds.Rejection{Name: r.Name, Err: err})
			continue
		}
		v.routes[r.Name] = m
	}
	v.table, v.problems = route.Compile(slices.Collect(maps.Values(v.routes)))
	v.backends = make(map[string]bool)
	for _, r := range v.routes {
		var list []mesh.Backend
		switch {
		case r.HTTP != nil:
			list = r.HTTP.Backends
		case r.Stream != nil:
			list = r.Stream.Backends
		}
		for i := range list {
			v.backends[mesh.ServiceKey(list[i].Ref.Namespace, list[i].Ref.Hostname)] = true
		}
	}
	return rejected
}

// applyTraffic replaces traffic policies. One that cannot be read, and has no last good one, closes its service: it may
// have asked for TLS.
func (v *view) applyTraffic(u xds.Update) []xds.Rejection {
	var rejected []xds.Rejection
	v.Traffic = maps.Clone(v.Traffic)
	for _, name := range u.Removes {
		delete(v.Traffic, name)
	}
	for _, r := range u.Upserts {
		p, err := wds.DecodeTrafficPolicy(r.Body)
		if err == nil && p.Key() != r.Name {
			err = fmt.Errorf("decode traffic policy: %q is not the resource's name", p.Key())
		}
		if err == nil {
			v.Traffic[r.Name] = p
			continue
		}
		rejected = append(rejected, xds.Rejection{Name: r.Name, Err: err})
		if v.Traffic[r.Name] == nil {
			v.Traffic[r.Name] = illegible(r.Name, err)
		}
	}
	return rejected
}

// applyCredentials replaces credentials.
func (v *view) applyCredentials(u xds.Update) []xds.Rejection {
	var rejected []xds.Rejection
	v.Secrets = maps.Clone(v.Secrets)
	for _, name := range u.Removes {
		delete(v.Secrets, name)
	}
	for _, r := range u.Upserts {
		c, err := wds.DecodeCredential(r.Body)
		if err == nil && c.Key() != r.Name {
			err = fmt.Errorf("decode credential: %q is not the resource's name", c.Key())
		}
		if err != nil {
			rejected = append(rejected, xds.Rejection{Name: r.Name, Err: err})
			continue
		}
		if v.Secrets == nil {
			v.Secrets = make(map[string]*mesh.Credential)
		}
		v.Secrets[r.Name] = c
	}
	return rejected
}

func illegible(name string, err error) *mesh.TrafficPolicy {
	clients, rest, _ := strings.Cut(name, "/")
	namespace, hostname, _ := strings.Cut(rest, "/")
	return &mesh.TrafficPolicy{Clients: clients, Namespace: namespace, Hostname: hostname, Invalid: err.Error()}
}

func (s *state) report(problems []route.Problem) {
	for _, p := range problems {
		s.log.Debug("route problem", zap.Stringer("problem", p))
	}
}

// errUnknownSelf refuses everything while it is not known which policies hold here.
var errUnknownSelf = errors.New("istiod has not told of this waypoint's own pod, so its policies are not known")
