// Package files reads a mesh from a directory of YAML, so that none of it needs Kubernetes.
//
// It joins two watched directories into one stream of index events: the one people write, and the one in which node
// agents tell the state of pods, as kubelets tell an API server. A pod's state overlays the pod of the same name:
// annotations are added, the status is replaced. State of a pod that nobody wrote is no pod.
package files

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/yamldir"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// Config is where the mesh is written.
type Config struct {
	Dir       string         // objects, by people; must exist
	StatusDir string         // state of pods, by node agents; "": none; made when missing
	Mesh      translate.Name // ConfigMap of the mesh's configuration; zero: istio-system/istio
	HeldFile  string         // where the last good forms of broken objects outlive a restart; "": they do not
	Log       *zap.Logger    // nil: none
}

// Source is the two directories joined.
type Source struct {
	cfg Config
	log *zap.Logger

	mu       sync.Mutex
	on       func([]index.Event)
	waiting  int                            // directories not read yet
	pending  []index.Event                  // until both are
	written  map[translate.Name]*corev1.Pod // pods as people wrote them
	state    map[translate.Name]*corev1.Pod // and as agents told
	inForce  map[yamldir.Key]yamldir.Object // as people wrote them
	held     held
	mesh     meshConfig
	problems map[string][]yamldir.Problem // by directory, with full paths
}

// Place is where an object was written.
type Place struct {
	Kind      string `json:"kind"` // group/kind
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	File      string `json:"file"`
	Line      int    `json:"line"`
}

// New returns a source that does nothing until Run.
func New(cfg Config) *Source {
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.Mesh == (translate.Name{}) {
		cfg.Mesh = translate.Name{Namespace: mesh.RootNamespace, Name: "istio"}
	}
	return &Source{
		cfg: cfg, log: cfg.Log, mesh: meshConfig{key: yamldir.Key{Kind: yamldir.KindConfigMap, Namespace: cfg.Mesh.Namespace, Name: cfg.Mesh.Name}},
		written: make(map[translate.Name]*corev1.Pod), state: make(map[translate.Name]*corev1.Pod),
		inForce: make(map[yamldir.Key]yamldir.Object), held: held{path: cfg.HeldFile, log: cfg.Log}, problems: make(map[string][]yamldir.Problem),
	}
}

// Run watches until ctx is done. The first call of on carries everything there is, later ones what changed; calls
// never overlap.
func (s *Source) Run(ctx context.Context, on func([]index.Event)) error {
	dirs := map[string]func(yamldir.Change) []index.Event{s.cfg.Dir: s.writtenChange}
	if s.cfg.StatusDir != "" {
		if same(s.cfg.StatusDir, s.cfg.Dir) {
			return fmt.Errorf("the directory of statuses must lie outside of the directory of objects, %s", s.cfg.Dir)
		}
		if err := os.MkdirAll(s.cfg.StatusDir, 0o755); err != nil {
			return fmt.Errorf("make the directory of statuses: %w", err)
		}
		dirs[s.cfg.StatusDir] = s.stateChange
	}
	s.mu.Lock()
	s.on, s.waiting = on, len(dirs)
	s.mu.Unlock()
	g, ctx := errgroup.WithContext(ctx)
	for dir, take := range dirs {
		first := true
		g.Go(func() error {
			return yamldir.Watch(ctx, dir, func(c yamldir.Change) {
				s.take(dir, c, take, first)
				first = false
			})
		})
	}
	return g.Wait()
}

// same reports whether status files would be read as objects.
func same(status, dir string) bool {
	rel, err := filepath.Rel(dir, status)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, ".."+string(filepath.Separator))
}

func (s *Source) take(dir string, c yamldir.Change, events func(yamldir.Change) []index.Event, first bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if dir == s.cfg.Dir {
		c = s.mesh.check(c)
	}
	s.report(dir, c)
	s.pending = append(s.pending, events(c)...)
	if first {
		s.waiting--
	}
	if s.waiting > 0 {
		return
	}
	if ready := s.pending; len(ready) > 0 || first {
		s.pending = nil
		s.on(ready)
	}
}

// report keeps the problems of a directory and logs those that came and went.
func (s *Source) report(dir string, c yamldir.Change) {
	now := make([]yamldir.Problem, len(c.Problems))
	for i, p := range c.Problems {
		p.File = filepath.Join(dir, p.File)
		now[i] = p
	}
	before := s.problems[dir]
	s.problems[dir] = now
	for _, p := range now {
		if !slices.Contains(before, p) {
			s.log.Warn("object refused", fields(p)...)
		}
	}
	for _, p := range before {
		if !slices.Contains(now, p) {
			s.log.Info("problem gone", fields(p)...)
		}
	}
	for _, i := range c.Ignored {
		s.log.Info("kind ignored", zap.String("file", filepath.Join(dir, i.File)), zap.Int("line", i.Line),
			zap.String("kind", i.APIVersion+" "+i.Kind))
	}
}

func fields(p yamldir.Problem) []zap.Field {
	return []zap.Field{zap.String("file", p.File), zap.Int("line", p.Line), zap.Stringer("object", p.Key), zap.String("reason", p.Reason)}
}

// Problems are all current ones, ordered by file and line.
func (s *Source) Problems() []yamldir.Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []yamldir.Problem
	for _, dir := range slices.Sorted(maps.Keys(s.problems)) {
		all = append(all, s.problems[dir]...)
	}
	return all
}

// Places are all objects in force and where they were written, ordered by file and line.
func (s *Source) Places() []Place {
	s.mu.Lock()
	defer s.mu.Unlock()
	places := make([]Place, 0, len(s.inForce))
	for key, o := range s.inForce {
		places = append(places, Place{Kind: key.Kind, Namespace: key.Namespace, Name: key.Name,
			File: filepath.Join(s.cfg.Dir, o.File), Line: o.Line})
	}
	slices.SortFunc(places, func(a, b Place) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Name, b.Name))
	})
	return places
}

func (s *Source) writtenChange(c yamldir.Change) []index.Event {
	upserts, deletes := c.Upserts, c.Deletes
	if s.held.restored == nil {
		upserts = append(slices.Clone(upserts), s.held.load(c)...)
	} else {
		deletes = append(slices.Clone(deletes), s.held.settle(c)...)
	}
	var events []index.Event
	for _, o := range upserts {
		s.inForce[o.Key] = o
		events = s.event(events, o.Key, o.Value)
	}
	for _, key := range deletes {
		delete(s.inForce, key)
		events = s.event(events, key, nil)
	}
	s.held.save(c.Problems, s.inForce)
	return events
}

// kinds are those of YAML that an index knows.
var kinds = map[string]index.Kind{
	yamldir.KindNamespace: index.Namespace, yamldir.KindNode: index.Node, yamldir.KindPod: index.Pod,
	yamldir.KindService: index.Service, yamldir.KindEndpointSlice: index.EndpointSlice,
	yamldir.KindAuthorizationPolicy: index.AuthorizationPolicy, yamldir.KindPeerAuthentication: index.PeerAuthentication,
	yamldir.KindServiceEntry: index.ServiceEntry, yamldir.KindWorkloadEntry: index.WorkloadEntry,
	yamldir.KindVirtualService: index.VirtualService, yamldir.KindDestinationRule: index.DestinationRule,
	yamldir.KindHTTPRoute: index.HTTPRoute, yamldir.KindGRPCRoute: index.GRPCRoute,
	yamldir.KindTCPRoute: index.TCPRoute, yamldir.KindTLSRoute: index.TLSRoute,
	yamldir.KindGateway: index.Gateway, yamldir.KindGatewayClass: index.GatewayClass, yamldir.KindReferenceGrant: index.ReferenceGrant,
	yamldir.KindConfigMap: index.ConfigMap, yamldir.KindSecret: index.Secret,
	yamldir.KindBackendTLSPolicy: index.BackendTLSPolicy, yamldir.KindXBackendTraffic: index.XBackendTrafficPolicy,
}

func (s *Source) event(events []index.Event, key yamldir.Key, value runtime.Object) []index.Event {
	kind, ok := kinds[key.Kind]
	if !ok {
		return events
	}
	name := translate.Name{Namespace: key.Namespace, Name: key.Name}
	if key == s.mesh.key {
		events = append(events, index.Event{Kind: index.MeshConfig, Name: name, Object: s.mesh.read(value)})
	}
	if kind != index.Pod {
		return append(events, index.Event{Kind: kind, Name: name, Object: value})
	}
	if pod, ok := value.(*corev1.Pod); ok {
		s.written[name] = pod
	} else {
		delete(s.written, name)
	}
	return append(events, s.podEvent(name))
}

func (s *Source) stateChange(c yamldir.Change) []index.Event {
	var events []index.Event
	for _, o := range c.Upserts {
		if pod, ok := o.Value.(*corev1.Pod); ok {
			name := translate.Name{Namespace: o.Key.Namespace, Name: o.Key.Name}
			s.state[name] = pod
			events = append(events, s.podEvent(name))
		}
	}
	for _, key := range c.Deletes {
		if key.Kind == yamldir.KindPod {
			name := translate.Name{Namespace: key.Namespace, Name: key.Name}
			delete(s.state, name)
			events = append(events, s.podEvent(name))
		}
	}
	return events
}

// podEvent is the pod as it now stands: as written, under what its agent told.
func (s *Source) podEvent(name translate.Name) index.Event {
	ev := index.Event{Kind: index.Pod, Name: name}
	pod, state := s.written[name], s.state[name]
	switch {
	case pod == nil:
	case state == nil:
		ev.Object = pod
	default:
		merged := pod.DeepCopy()
		if merged.Annotations == nil {
			merged.Annotations = make(map[string]string)
		}
		maps.Copy(merged.Annotations, state.Annotations)
		merged.Status = state.Status
		ev.Object = merged
	}
	return ev
}
