package kube

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/istiod/gateway"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// routeStatuses keeps status.parents of the Gateway API's routes as they should be, for parents that are services, and likewise
// status.ancestors of BackendTLSPolicies, whose entries are of the same form. What
// should be, the index says (Tell); what is, comes with the objects. Entries of other controllers stay as they are.
type routeStatuses struct {
	client     dynamic.Interface
	controller gatewayv1.GatewayController                           // that speaks here
	retired    []gatewayv1.GatewayController                         // names by which it spoke before, under other settings
	speaks     func(namespace string, labels map[string]string) bool // whether this control plane does, for an object
	log        *zap.Logger
	queue      keyQueue

	mu     sync.Mutex
	routes map[string]*toldRoute             // by translate.RouteStatus.Key
	want   map[string]*translate.RouteStatus // likewise
}

// toldRoute is what of a route its status depends on.
type toldRoute struct {
	resource   schema.GroupVersionResource
	apiVersion string
	kind       string
	name       translate.Name
	labels     map[string]string
	version    string // metadata.resourceVersion
	generation int64
	meant      bool // one of its parents is a service
	parents    []gatewayv1.RouteParentStatus
}

func newRouteStatuses(client dynamic.Interface, cfg gateway.Config, speaks func(string, map[string]string) bool, log *zap.Logger) *routeStatuses {
	s := &routeStatuses{client: client, controller: gateway.IstioController, retired: []gatewayv1.GatewayController{gateway.Controller},
		speaks: speaks, log: log, routes: make(map[string]*toldRoute), want: make(map[string]*translate.RouteStatus)}
	if cfg.IgnoreIstio { // Istio's entries are Istio's then
		s.controller, s.retired = gateway.Controller, nil
	}
	return s
}

// take takes routes that changed.
func (s *routeStatuses) take(k customKind, changes []change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range changes {
		key := (&translate.RouteStatus{Kind: k.kind.String(), Namespace: c.name.Namespace, Name: c.name.Name}).Key()
		r := k.told(c)
		if r == nil || !r.meant && !slices.ContainsFunc(r.parents, s.ours) {
			delete(s.routes, key)
			continue
		}
		s.routes[key] = r
		s.queue.add(key)
	}
}

// told is what is looked at of a route, or nil when it is gone.
func (k customKind) told(c change) *toldRoute {
	if c.object == nil {
		return nil
	}
	parents, status := parentsOf(c.object)
	r := &toldRoute{kind: k.kind.String(), name: c.name, meant: isMeshRoute(parents), parents: status}
	if m, err := meta.Accessor(c.object); err == nil {
		r.labels, r.version, r.generation = m.GetLabels(), m.GetResourceVersion(), m.GetGeneration()
	}
	gv := c.object.GetObjectKind().GroupVersionKind().GroupVersion()
	r.resource, r.apiVersion = gv.WithResource(k.resource), gv.String()
	return r
}

// parentsOf are the parents of a route, and what its status says of them.
func parentsOf(o runtime.Object) ([]gatewayv1.ParentReference, []gatewayv1.RouteParentStatus) {
	switch r := o.(type) {
	case *gatewayv1.HTTPRoute:
		return r.Spec.ParentRefs, r.Status.Parents
	case *gatewayv1.GRPCRoute:
		return r.Spec.ParentRefs, r.Status.Parents
	case *gatewayv1.TCPRoute:
		return r.Spec.ParentRefs, r.Status.Parents
	case *gatewayv1.TLSRoute:
		return r.Spec.ParentRefs, r.Status.Parents
	case *gatewayv1.BackendTLSPolicy:
		var targets []gatewayv1.ParentReference
		for _, t := range r.Spec.TargetRefs {
			targets = append(targets, gatewayv1.ParentReference{Group: &t.Group, Kind: &t.Kind, Name: t.Name})
		}
		var entries []gatewayv1.RouteParentStatus
		for _, a := range r.Status.Ancestors {
			entries = append(entries, gatewayv1.RouteParentStatus{ParentRef: a.AncestorRef, ControllerName: a.ControllerName, Conditions: a.Conditions})
		}
		return targets, entries
	}
	return nil, nil
}

// tell takes what the index found different.
func (s *routeStatuses) tell(changes []index.Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range changes {
		if c.Key.Kind != index.NounRouteStatus {
			continue
		}
		if c.RouteStatus == nil {
			delete(s.want, c.Key.Name)
		} else {
			s.want[c.Key.Name] = c.RouteStatus
		}
		s.queue.add(c.Key.Name)
	}
}

// choose looks again at the routes of every namespace, or at those of one: this control plane may speak for them now.
func (s *routeStatuses) choose(namespace string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, r := range s.routes {
		if namespace == "" || r.name.Namespace == namespace {
			s.queue.add(key)
		}
	}
}

func (s *routeStatuses) run(ctx context.Context) { s.queue.work(ctx, s.log, s.all, s.write) }

func (s *routeStatuses) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.routes))
}

// ours reports whether an entry is one that this program wrote and may change. Istio writes entries for gateways by
// another name.
func (s *routeStatuses) ours(p gatewayv1.RouteParentStatus) bool {
	return p.ControllerName == s.controller || slices.Contains(s.retired, p.ControllerName)
}

func (s *routeStatuses) write(ctx context.Context, key string) error {
	s.mu.Lock()
	r, want := s.routes[key], s.want[key]
	s.mu.Unlock()
	switch {
	case r == nil, !s.speaks(r.name.Namespace, r.labels):
		return nil
	case r.meant && (want == nil || want.Generation != r.generation):
		return nil // the index has not come to it yet
	}
	all, differs := s.merge(r.parents, want, time.Now())
	if !differs {
		return nil
	}
	patch, err := json.Marshal(map[string]any{
		"apiVersion": r.apiVersion, "kind": r.kind,
		// The version: what others wrote meanwhile is not overwritten, but read and tried again.
		"metadata": map[string]any{"name": r.name.Name, "namespace": r.name.Namespace, "resourceVersion": r.version},
		"status":   r.status(all),
	})
	if err != nil {
		return err
	}
	force := true
	_, err = s.client.Resource(r.resource).Namespace(r.name.Namespace).
		Patch(ctx, r.name.Name, types.ApplyPatchType, patch, metav1.PatchOptions{FieldManager: fieldManager, Force: &force}, "status")
	if apierrors.IsNotFound(err) {
		return nil // it is gone
	}
	return err
}

// status is how the entries are written.
func (r *toldRoute) status(entries []gatewayv1.RouteParentStatus) map[string]any {
	if r.kind != index.BackendTLSPolicy.String() {
		return map[string]any{"parents": entries}
	}
	ancestors := make([]gatewayv1.PolicyAncestorStatus, 0, len(entries))
	for _, e := range entries {
		ancestors = append(ancestors, gatewayv1.PolicyAncestorStatus{AncestorRef: e.ParentRef, ControllerName: e.ControllerName, Conditions: e.Conditions})
	}
	return map[string]any{"ancestors": ancestors}
}

// maxAncestors is how many entries a policy's status may have (Gateway API, PolicyStatus): those of others come first.
const maxAncestors = 16

// merge puts what is wanted after the entries that others wrote. The list is one value to the API server.
func (s *routeStatuses) merge(have []gatewayv1.RouteParentStatus, want *translate.RouteStatus, now time.Time) (all []gatewayv1.RouteParentStatus, differs bool) {
	all = []gatewayv1.RouteParentStatus{}
	var old []gatewayv1.RouteParentStatus
	for _, p := range have {
		if s.ours(p) {
			old = append(old, p)
		} else {
			all = append(all, p)
		}
	}
	var made []gatewayv1.RouteParentStatus
	if want != nil {
		for _, p := range want.Parents {
			made = append(made, s.entry(p, want.Generation, old, now))
		}
	}
	if want != nil && want.Kind == index.BackendTLSPolicy.String() {
		made = made[:min(len(made), max(0, maxAncestors-len(all)))]
	}
	return append(all, made...), !equality.Semantic.DeepEqual(old, made)
}

// entry is what is to be said of one parent. A condition whose status stays keeps its time.
func (s *routeStatuses) entry(p translate.ParentStatus, generation int64, old []gatewayv1.RouteParentStatus, now time.Time) gatewayv1.RouteParentStatus {
	var before []metav1.Condition
	for _, o := range old {
		if o.ControllerName == s.controller && equality.Semantic.DeepEqual(o.ParentRef, p.Ref) {
			before = o.Conditions
		}
	}
	e := gatewayv1.RouteParentStatus{ParentRef: p.Ref, ControllerName: s.controller}
	for _, c := range p.Conditions {
		n := metav1.Condition{Type: c.Type, Status: metav1.ConditionFalse, Reason: c.Reason, Message: c.Message, ObservedGeneration: generation,
			LastTransitionTime: metav1.NewTime(now.Truncate(time.Second))}
		if c.Status {
			n.Status = metav1.ConditionTrue
		}
		if was := meta.FindStatusCondition(before, c.Type); was != nil && was.Status == n.Status && !was.LastTransitionTime.IsZero() {
			n.LastTransitionTime = was.LastTransitionTime
		}
		e.Conditions = append(e.Conditions, n)
	}
	return e
}
