package istiod

import (
	"maps"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// mirror is the shell around the index: it locks it for readers and publishes what changes.
type mirror struct {
	log     *zap.Logger
	publish func([]xds.Change)
	applied func(changes []index.Change, took time.Duration) // who counts them, and tells of them
	filled  chan struct{}                                    // closed once the first events were published

	mu sync.RWMutex
	x  *index.Index

	once sync.Once
}

func newMirror(cfg translate.Config, log *zap.Logger) *mirror {
	return &mirror{log: log, filled: make(chan struct{}), x: index.New(cfg)}
}

// apply takes events, one batch at a time, and returns when clients have been woken.
func (m *mirror) apply(events []index.Event) {
	start := time.Now()
	m.mu.Lock()
	changes := m.x.Apply(events...)
	m.mu.Unlock()
	if out := m.encode(changes); len(out) > 0 {
		m.publish(out)
	}
	m.applied(changes, time.Since(start))
	m.once.Do(func() { close(m.filled) })
	m.log.Debug("configuration changed", zap.Int("objects", len(events)), zap.Int("nouns", len(changes)), zap.Duration("took", time.Since(start)))
}

// encode makes resources of nouns. The server sends policies before what they guard, and removes them after.
func (m *mirror) encode(changes []index.Change) []xds.Change {
	policies, addresses := xds.Change{TypeURL: mesh.TypeAuthorization}, xds.Change{TypeURL: mesh.TypeAddress}
	credentials := xds.Change{TypeURL: mesh.TypeCredential}
	routes, traffic := xds.Change{TypeURL: mesh.TypeRoute}, xds.Change{TypeURL: mesh.TypeTrafficPolicy}
	for _, c := range changes {
		switch c.Key.Kind {
		case index.NounPolicy:
			m.add(&policies, c.Key, c.Policy != nil, func() (xds.Resource, error) { return policyResource(c.Policy) })
		case index.NounCredential:
			m.add(&credentials, c.Key, c.Credential != nil, func() (xds.Resource, error) { return credentialResource(c.Credential) })
		case index.NounTraffic:
			m.add(&traffic, c.Key, c.Traffic != nil, func() (xds.Resource, error) { return trafficResource(c.Traffic) })
		case index.NounRoute:
			m.add(&routes, c.Key, c.Route != nil, func() (xds.Resource, error) { return routeResource(c.Route) })
		case index.NounService:
			m.add(&addresses, c.Key, c.Service != nil, func() (xds.Resource, error) { return serviceResource(c.Service) })
		case index.NounWorkload:
			m.add(&addresses, c.Key, c.Workload != nil, func() (xds.Resource, error) { return workloadResource(c.Workload) })
		case index.NounStatus:
			m.tell(c)
		case index.NounRouteStatus, index.NounConditions: // for the source, to which applied passes them
		}
	}
	var out []xds.Change
	for _, c := range []xds.Change{policies, credentials, traffic, routes, addresses} {
		if len(c.Upserts)+len(c.Removes) > 0 {
			out = append(out, c)
		}
	}
	return out
}

func (m *mirror) add(to *xds.Change, key index.Key, present bool, make func() (xds.Resource, error)) {
	if !present {
		to.Removes = append(to.Removes, key.Name)
		return
	}
	r, err := make()
	if err != nil {
		m.log.Error("noun cannot be sent, its last good form stays", zap.Stringer("kind", key.Kind), zap.String("name", key.Name), zap.Error(err))
		return
	}
	r.Name = key.Name
	to.Upserts = append(to.Upserts, r)
}

// policyResource encodes a policy; one that cannot be is sent as one that denies.
func policyResource(p *mesh.Policy) (xds.Resource, error) {
	body, err := wds.EncodePolicy(translate.Enforceable(p))
	if err != nil {
		broken := *p
		broken.Invalid = err.Error()
		body, err = wds.EncodePolicy(translate.Enforceable(&broken))
	}
	return xds.Resource{Body: body}, err
}

// trafficResource encodes a traffic policy; one that cannot be is sent as one by which nothing is sent.
func trafficResource(p *mesh.TrafficPolicy) (xds.Resource, error) {
	body, err := wds.EncodeTrafficPolicy(p)
	if err != nil {
		body, err = wds.EncodeTrafficPolicy(&mesh.TrafficPolicy{Namespace: p.Namespace, Hostname: p.Hostname, Clients: p.Clients,
			Sources: p.Sources, Invalid: err.Error()})
	}
	return xds.Resource{Body: body}, err
}

// credentialResource encodes what only its readers may have.
func credentialResource(c *translate.Credential) (xds.Resource, error) {
	body, err := wds.EncodeCredential(&c.Credential)
	return xds.Resource{Body: body, Private: true, Readers: c.Readers}, err
}

// routeResource encodes a rule; one that cannot be is sent as one that refuses what it would have matched, and more.
func routeResource(r *mesh.Route) (xds.Resource, error) {
	body, err := wds.EncodeRoute(r)
	if err != nil {
		refuses := *r
		refuses.HTTP, refuses.Stream, refuses.Invalid = nil, nil, err.Error()
		if r.Protocol == mesh.RouteHTTP {
			refuses.HTTP = &mesh.HTTPRule{}
		} else {
			refuses.Stream = &mesh.StreamRule{}
		}
		body, err = wds.EncodeRoute(&refuses)
	}
	return xds.Resource{Body: body}, err
}

func serviceResource(s *mesh.Service) (xds.Resource, error) {
	body, err := wds.EncodeService(s)
	return xds.Resource{Body: body, Aliases: wds.ServiceAliases(s)}, err
}

func workloadResource(w *mesh.Workload) (xds.Resource, error) {
	body, err := wds.EncodeWorkload(w)
	follows := make([]string, len(w.Services))
	for i, place := range w.Services {
		follows[i] = place.Service
	}
	return xds.Resource{Body: body, Aliases: wds.WorkloadAliases(w), Follows: follows}, err
}

// tell logs what became of an object that is not served as written.
func (m *mirror) tell(c index.Change) {
	if c.Status == nil {
		m.log.Info("object served as written", zap.String("object", c.Key.Name))
		return
	}
	m.log.Warn("object not served as written", zap.String("object", c.Key.Name),
		zap.String("reason", string(c.Status.Reason)), zap.String("message", c.Status.Message))
}

// Runs implements ca.NodeWorkloads.
func (m *mirror) Runs(node, namespace, serviceAccount string) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.x.Runs(node, namespace, serviceAccount)
}

// nouns is all nouns as they stand, for people to see: so without credentials.
func (m *mirror) nouns() translate.Nouns {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := m.x.Nouns()
	return translate.Nouns{Workloads: maps.Clone(n.Workloads), Services: maps.Clone(n.Services),
		Policies: maps.Clone(n.Policies), Routes: maps.Clone(n.Routes), Traffic: maps.Clone(n.Traffic), Statuses: maps.Clone(n.Statuses),
		RouteStatuses: maps.Clone(n.RouteStatuses)}
}

// counts is how many objects and nouns there are, by kind.
func (m *mirror) counts() (objects, nouns map[string]int) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := m.x.Nouns()
	return m.x.Objects(), map[string]int{index.NounWorkload.String(): len(n.Workloads), index.NounService.String(): len(n.Services),
		index.NounPolicy.String(): len(n.Policies), index.NounRoute.String(): len(n.Routes), index.NounTraffic.String(): len(n.Traffic),
		index.NounStatus.String(): len(n.Statuses)}
}
