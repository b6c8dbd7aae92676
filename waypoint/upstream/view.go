package upstream

import (
	"sync"

	"github.com/mistnet/mistnet/internal/mesh"
)

// View is what the mesh says of services at one moment, and how they are to be talked to. It never changes.
type View struct {
	*mesh.Snapshot
	Self    *mesh.Workload                 // the waypoint's own pod; nil until istiod has told of it
	Clients string                         // the namespace whose traffic policies hold: the waypoint's own
	Traffic map[string]*mesh.TrafficPolicy // by key
	Secrets map[string]*mesh.Credential    // by key; they go into no dump

	targets *targets // made of these, as they were asked for
}

// NewView is what is known to a waypoint of that namespace in the beginning.
func NewView(clients string) View {
	return View{Snapshot: &mesh.Snapshot{}, Clients: clients, Traffic: map[string]*mesh.TrafficPolicy{}, targets: new(targets)}
}

// Renew is called on the copy of a view that is to differ from it.
func (v *View) Renew() { v.targets = new(targets) }

// TrafficFor returns what is to be done with a service; nil when nobody said anything.
func (v *View) TrafficFor(svc *mesh.Service) *mesh.TrafficPolicy {
	if len(v.Traffic) == 0 {
		return nil
	}
	if p := v.Traffic[v.Clients+"/"+svc.Key()]; p != nil {
		return p
	}
	return v.Traffic["/"+svc.Key()]
}

// secret is the credential that t is begun with; nil when it names none. False: this waypoint was not given it, or it lacks
// what verifies the application.
func (v *View) secret(t *mesh.UpstreamTLS) (c *mesh.Credential, ok bool) {
	if t == nil || t.Credential == "" {
		return nil, true
	}
	c = v.Secrets[t.Credential]
	ok = c != nil && (len(c.Roots) > 0 || t.InsecureSkipVerify) && (len(c.Certificate) > 0 || t.Mode != mesh.TLSMutual)
	return c, ok
}

// targets are those of one view that were asked for.
type targets struct {
	mu    sync.RWMutex
	known map[ClusterKey]*Target // nil: there is no such service or subset, or it must not be talked to
}

// Target is a port of a service, by its key, or of a subset of it; nil when there is none, or nothing may be sent to it.
func (v *View) Target(u *Pool, key ClusterKey) *Target {
	v.targets.mu.RLock()
	t, ok := v.targets.known[key]
	v.targets.mu.RUnlock()
	if ok {
		return t
	}
	t = v.resolve(u, key)
	if v.Service(key.Service) == nil {
		return nil // names that requests make up are not to fill memory
	}
	v.targets.mu.Lock()
	defer v.targets.mu.Unlock()
	if v.targets.known == nil {
		v.targets.known = make(map[ClusterKey]*Target)
	}
	v.targets.known[key] = t
	return t
}

func (v *View) resolve(u *Pool, key ClusterKey) *Target {
	svc := v.Service(key.Service)
	if svc == nil || v.Self == nil {
		return nil
	}
	policy := v.TrafficFor(svc)
	if policy != nil && policy.Invalid != "" {
		return nil
	}
	settings, ok := policy.For(key.Subset, key.Port)
	if !ok {
		return nil
	}
	tls := originated(&settings)
	secret, ok := v.secret(tls)
	if !ok {
		return nil
	}
	t := &Target{Service: svc, Settings: settings, tls: tls, secret: secret, Hash: hashOf(settings.Balancer), Connect: ConnectTimeout,
		Cluster: u.cluster(key), port: key.Port, self: v.Self, endpoints: v.Endpoints(key.Service),
		mesh: v.Snapshot}
	p, _ := svc.Port(key.Port)
	t.App = p.App
	if settings.Pool != nil {
		t.Shared.MaxRequests = settings.Pool.MaxRequests
		if settings.Pool.ConnectTimeout > 0 {
			t.Connect = settings.Pool.ConnectTimeout
		}
	}
	if policy != nil && key.Subset != "" {
		t.labels = policy.Subset(key.Subset).Labels
	}
	return t
}
