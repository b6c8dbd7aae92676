package kube

import (
	"context"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/gateway"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// Config is what is read of a cluster, and as whom. Clients and Mesh are required.
type Config struct {
	Clients   Clients
	Mesh      translate.Config
	Namespace string         // istiod's own; "": the root namespace
	Revision  string         // of this control plane: the mesh's ConfigMap is istio-<revision>, or istio for "", which is "default"
	Identity  string         // of this replica, among those that vie for the lease; "": its host's name
	Waypoints gateway.Config // what Gateways become; names of the mesh in it are filled in
	Log       *zap.Logger

	// Hidden says which rules are never reached, and why, by their keys: waypoints order them. nil: nobody asks.
	Hidden func([]*mesh.Route) map[string][]string
}

// Source reads a mesh from an API server, and keeps there what only one replica may write.
type Source struct {
	cfg      Config
	log      *zap.Logger
	feeds    []*feed
	roots    *roots
	told     *statuses
	bound    *bound
	routes   *routeStatuses
	gateways *waypoints
	trusted  *trusted // ConfigMaps
	secrets  *trusted

	revisions *revisions

	unread      unread
	unreadFeeds []*feed

	mu        sync.Mutex
	selection *selection
	pending   []index.Event
	wake      chan struct{} // holds one token while there is something pending
	leads     bool

	writing chan struct{} // holds a token while this replica writes
}

// New returns a source that does nothing until Run.
func New(cfg Config) *Source {
	cfg = cfg.withDefaults()
	s := &Source{
		cfg: cfg, log: cfg.Log, selection: newSelection(cfg.Mesh.RootNamespace), wake: make(chan struct{}, 1), writing: make(chan struct{}, 1),
	}
	s.revisions = newRevisions(cfg)
	s.roots = newRoots(cfg.Clients.Kube, s.owns, cfg.Log.Named("roots"))
	s.told = newStatuses(cfg.Clients.Dynamic, cfg.Mesh, s.speaks, cfg.Log.Named("status"))
	s.bound = newBound(cfg.Clients.Dynamic, cfg.Hidden, s.speaks, cfg.Log.Named("status"))
	s.routes = newRouteStatuses(cfg.Clients.Dynamic, cfg.Waypoints, s.speaks, cfg.Log.Named("status"))
	s.gateways = newWaypoints(cfg.Clients, cfg.waypoints(), s.known, s.revisions, cfg.Log.Named("waypoints"))
	s.trusted, s.secrets = s.newTrusted(index.ConfigMap), s.newTrusted(index.Secret)
	s.feeds = s.makeFeeds()
	s.unread = unread{log: s.log, have: make(map[string]map[translate.Name]struct{})}
	s.unreadFeeds = s.makeUnread()
	return s
}

// Slices that Kubernetes makes of a service's selector name pods only, which are known by the selector already. They
// are most of all, and change with every pod.
const slicesByHand = discoveryv1.LabelManagedBy + "!=endpointslice-controller.k8s.io"

func (s *Source) makeFeeds() []*feed {
	k := s.cfg.Clients.Kube
	all := metav1.NamespaceAll
	core := k.CoreV1()
	own := core.ConfigMaps(s.cfg.Namespace)
	mesh, copies := "metadata.name="+s.cfg.meshConfigMap(), "metadata.name="+RootConfigMap
	feeds := []*feed{
		{name: "configmaps/" + s.cfg.meshConfigMap(), client: k, versions: typed(own.List, own.Watch, mesh, ""), trim: trimMesh, take: s.takeMesh},
		{name: "namespaces", client: k, versions: typed(core.Namespaces().List, core.Namespaces().Watch, "", ""), trim: trimNamespace, take: s.takeNamespaces},
		{name: "nodes", client: k, versions: typed(core.Nodes().List, core.Nodes().Watch, "", ""), trim: trimNode, take: s.taker(index.Node)},
		{name: "pods", client: k, versions: typed(core.Pods(all).List, core.Pods(all).Watch, "", ""), trim: trimPod, take: s.taker(index.Pod), selected: true},
		{name: "services", client: k, versions: typed(core.Services(all).List, core.Services(all).Watch, "", ""), trim: trimService, take: s.takeServices, selected: true},
		{name: "endpointslices", client: k, versions: typed(k.DiscoveryV1().EndpointSlices(all).List, k.DiscoveryV1().EndpointSlices(all).Watch, "", slicesByHand),
			trim: trimSlice, take: s.taker(index.EndpointSlice), selected: true},
		{name: "configmaps/" + RootConfigMap, client: k, versions: typed(core.ConfigMaps(all).List, core.ConfigMaps(all).Watch, copies, ""),
			trim: trimConfigMap, take: s.roots.takeCopies},
	}
	feeds = append(feeds, s.makeCustom()...)
	for _, f := range feeds {
		f.init(s.log)
	}
	return feeds
}

// Run reads until ctx is done, through whatever happens to the API server. The first call of on carries everything
// there is, later ones what changed; calls never overlap.
func (s *Source) Run(ctx context.Context, on func([]index.Event)) error {
	ctx = withLog(ctx, s.log)
	g, ctx := errgroup.WithContext(ctx)
	for _, f := range slices.Concat(s.feeds, s.unreadFeeds, s.gateways.feeds) {
		g.Go(func() error { return f.run(ctx) })
	}
	g.Go(func() error {
		if !s.synced(ctx) {
			return nil
		}
		for _, t := range []*trusted{s.trusted, s.secrets} {
			t.synced(ctx)
			g.Go(func() error { t.run(ctx); return nil })
		}
		s.log.Info("the cluster was read", zap.Any("objects", s.counts()))
		g.Go(func() error { return s.lead(ctx) }) // who writes knows what is there
		return s.deliver(ctx, on)
	})
	return g.Wait()
}

// synced waits until every kind was read, and is false when ctx is done before.
func (s *Source) synced(ctx context.Context) bool {
	for _, f := range s.feeds {
		select {
		case <-f.synced:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// deliver hands over what is pending, in as large pieces as it comes.
func (s *Source) deliver(ctx context.Context, on func([]index.Event)) error {
	hand := func(events []index.Event) {
		on(events)
		s.bound.settle(events)
	}
	hand(s.takePending())
	for {
		select {
		case <-s.wake:
		case <-ctx.Done():
			return nil
		}
		if events := s.takePending(); len(events) > 0 {
			hand(events)
		}
	}
}

func (s *Source) takePending() []index.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	events := s.pending
	s.pending = nil
	return events
}

func (s *Source) counts() map[string]int {
	n := make(map[string]int, len(s.feeds))
	for _, f := range s.feeds {
		n[f.name] = f.current().Objects
	}
	return n
}

// add queues events; s.mu is held.
func (s *Source) add(events ...index.Event) {
	if len(events) == 0 {
		return
	}
	s.pending = append(s.pending, events...)
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// taker takes objects of one kind.
func (s *Source) taker(kind index.Kind) func([]change) {
	return func(changes []change) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, c := range changes {
			s.add(s.selection.pass(kind, c.name, c.object)...)
		}
	}
}

func (s *Source) takeNamespaces(changes []change) {
	s.revisions.takeNamespaces(changes)
	s.taker(index.Namespace)(changes)
	for _, c := range changes {
		ns, _ := c.object.(*corev1.Namespace)
		s.roots.takeNamespace(c.name.Name, ns != nil && ns.DeletionTimestamp == nil)
		s.told.choose(c.name.Name)
		s.bound.choose(c.name.Name)
		s.routes.choose(c.name.Name)
		s.gateways.choose(c.name.Name)
	}
}

func (s *Source) takeServices(changes []change) {
	for _, c := range changes {
		svc, _ := c.object.(*corev1.Service)
		if svc == nil {
			s.bound.take(index.Service, c.name, nil, nil)
			continue
		}
		var conditions []condition
		for _, o := range svc.Status.Conditions {
			conditions = append(conditions, condition{Type: o.Type, Status: string(o.Status), Reason: o.Reason, Message: o.Message,
				LastTransitionTime: o.LastTransitionTime.UTC().Format(time.RFC3339), ObservedGeneration: o.ObservedGeneration})
		}
		s.bound.take(index.Service, c.name, &svc.ObjectMeta, conditions)
	}
	s.taker(index.Service)(changes)
	if s.revisions.takeServices(changes) {
		s.chooseAgain()
	}
}

func (s *Source) takeEntries(changes []change) {
	plain := make([]change, len(changes))
	for i, c := range changes {
		plain[i] = c
		if se, ok := c.object.(*serviceEntry); ok {
			plain[i].object = &se.ServiceEntry
			s.bound.take(index.ServiceEntry, c.name, &se.ObjectMeta, se.conditions)
		} else {
			s.bound.take(index.ServiceEntry, c.name, nil, nil)
		}
	}
	s.taker(index.ServiceEntry)(plain)
}

// ruleTaker takes VirtualServices or DestinationRules.
func (s *Source) ruleTaker(kind index.Kind) func([]change) {
	return func(changes []change) {
		plain := make([]change, len(changes))
		for i, c := range changes {
			plain[i] = c
			r, ok := c.object.(*rule)
			if ok {
				plain[i].object = r.Object
			}
			s.bound.takeRule(kind, c.name, r)
		}
		s.taker(kind)(plain)
	}
}

// Tell takes the nouns that differ because of what Run delivered, the first time all that there are: some of them are written
// into the objects' statuses.
func (s *Source) Tell(changes []index.Change) {
	s.told.tell(changes)
	s.bound.tell(changes)
	s.routes.tell(changes)
}

func (s *Source) takePolicies(changes []change) {
	plain := make([]change, len(changes))
	for i, c := range changes {
		plain[i] = c
		p, ok := c.object.(*policy)
		if ok {
			plain[i].object = &p.AuthorizationPolicy
		}
		s.told.take(c.name, p)
	}
	s.taker(index.AuthorizationPolicy)(plain)
}

// takeMesh takes the mesh's configuration. A ConfigMap that makes no sense does not come here: what it said before stays.
func (s *Source) takeMesh(changes []change) {
	for _, c := range changes {
		m, _ := c.object.(*meshConfig)
		if m == nil {
			m = new(meshConfig)
		}
		ev := index.Event{Kind: index.MeshConfig, Name: c.name}
		if m.MeshConfig != nil {
			ev.Object = m.MeshConfig
		}
		s.mu.Lock()
		s.add(ev)
		s.mu.Unlock()
		s.gateways.set(m.waypoints)
		s.choose(m.selectors())
	}
}

func (s *Source) choose(selectors []labels.Selector) {
	s.mu.Lock()
	events, relist := s.selection.choose(selectors)
	s.add(events...)
	s.mu.Unlock()
	s.chooseAgain()
	if !relist {
		return
	}
	for _, f := range s.feeds {
		if f.selected {
			f.relist()
		}
	}
}

// chooseAgain looks again at all that this control plane may speak for.
func (s *Source) chooseAgain() {
	s.roots.choose()
	s.told.choose("")
	s.bound.choose("")
	s.routes.choose("")
	s.gateways.choose("")
}

// speaks reports whether this control plane is the one that writes what becomes of an object.
func (s *Source) speaks(namespace string, labels map[string]string) bool {
	if !s.known(namespace) {
		return false
	}
	mine, _ := s.revisions.mine(namespace, labels)
	return mine
}

// owns reports whether this control plane answers for a namespace: the default one for all of them.
func (s *Source) owns(namespace string) bool {
	mine, _ := s.revisions.mine(namespace, nil)
	return mine || s.revisions.own == defaultRevision
}

// known reports whether the mesh is to know a namespace.
func (s *Source) known(namespace string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.selection.known(namespace)
}

// Problem is an object that is not in force as written.
type Problem struct {
	Resource string
	Name     translate.Name
	Reason   string
	InForce  bool // as the reason says; otherwise what was read of it before is, if anything
}

// Problems are the objects that could not be read, of which what was read before stays in force, the policies that deny
// because they were not understood, and the objects of kinds that are not honoured.
func (s *Source) Problems() []Problem {
	var all []Problem
	for _, f := range s.feeds {
		all = append(all, f.problems()...)
	}
	all = append(all, s.told.problems()...)
	all = append(all, s.revisions.problems()...)
	all = append(all, s.unread.problems(s.known)...)
	slices.SortFunc(all, compareProblems)
	return all
}

// Feeds tells how reading goes, by kind.
func (s *Source) Feeds() []FeedStatus {
	var all []FeedStatus
	for _, f := range slices.Concat(s.feeds, s.unreadFeeds, s.gateways.feeds, s.trusted.feeds(), s.secrets.feeds()) {
		all = append(all, f.current())
	}
	return all
}
