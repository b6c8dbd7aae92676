package kube

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// bound keeps the conditions of what waypoints serve: by which Services and ServiceEntries tell which waypoint they are bound to,
// and VirtualServices and DestinationRules what the mesh makes of them.
type bound struct {
	client dynamic.Interface
	log    *zap.Logger
	speaks func(namespace string, labels map[string]string) bool // whether this control plane does, for an object
	queue  keyQueue
	hidden *hidden

	mu    sync.Mutex
	have  map[string]*bindable             // by kind and namespace/name
	told  map[string]*translate.Conditions // what the mesh has, likewise
	wrong map[string]*translate.Status     // what the mesh does not do as written, likewise
	heard bool                             // of all of them at least once: before, what is not told of is not known
}

// bindable is an object that has such conditions, and what its status says now.
type bindable struct {
	kind       index.Kind
	name       translate.Name
	labels     map[string]string
	version    string
	generation int64
	conditions []condition
	judged     bool // a rule for clients in the mesh, of which the mesh says what it makes of it
}

// boundKinds are the kinds whose conditions are written here, where they are, and which types of condition are written by
// nobody else.
var boundKinds = map[index.Kind]struct {
	resource schema.GroupVersionResource
	own      []string
}{
	index.Service:         {schema.GroupVersionResource{Version: "v1", Resource: "services"}, bindingTypes},
	index.ServiceEntry:    {networking("serviceentries"), bindingTypes},
	index.VirtualService:  {networking("virtualservices"), []string{translate.ConditionWaypointAccepted}},
	index.DestinationRule: {networking("destinationrules"), []string{translate.ConditionWaypointAccepted}},
}

var bindingTypes = []string{translate.ConditionWaypointBound, translate.ConditionWaypointMissing}

func networking(resource string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: networkingKinds.name, Version: networkingKinds.versions[0], Resource: resource}
}

func newBound(client dynamic.Interface, find func([]*mesh.Route) map[string][]string, speaks func(string, map[string]string) bool, log *zap.Logger) *bound {
	b := &bound{client: client, speaks: speaks, log: log, have: make(map[string]*bindable),
		told: make(map[string]*translate.Conditions), wrong: make(map[string]*translate.Status)}
	b.hidden = newHidden(find, b.queue.add)
	return b
}

func bindableKey(kind index.Kind, n translate.Name) string { return kind.String() + " " + n.String() }

// take takes an object that changed; conditions are those of its status. It is gone when m is nil.
func (b *bound) take(kind index.Kind, n translate.Name, m *metav1.ObjectMeta, conditions []condition) {
	b.mu.Lock()
	defer b.mu.Unlock()
	key := bindableKey(kind, n)
	if m == nil {
		delete(b.have, key)
		return
	}
	b.have[key] = &bindable{kind: kind, name: n, labels: m.Labels, version: m.ResourceVersion, generation: m.Generation, conditions: conditions}
	if b.told[key] != nil || len(conditions) > 0 {
		b.queue.add(key)
	}
}

// takeRule takes a VirtualService or DestinationRule that changed, nil when it is gone. What it says of it waits for settle.
func (b *bound) takeRule(kind index.Kind, n translate.Name, r *rule) {
	b.mu.Lock()
	defer b.mu.Unlock()
	key := bindableKey(kind, n)
	if r == nil {
		delete(b.have, key)
		return
	}
	b.have[key] = &bindable{kind: kind, name: n, labels: r.Labels, version: r.ResourceVersion, generation: r.Generation, conditions: r.conditions, judged: r.meant}
}

// settle looks at the rules among what the mesh was given: it has told of all that is wrong with them.
func (b *bound) settle(events []index.Event) {
	for _, e := range events {
		if e.Kind == index.VirtualService || e.Kind == index.DestinationRule {
			b.queue.add(bindableKey(e.Kind, e.Name))
		}
	}
}

// tell takes what changed of what the mesh has.
func (b *bound) tell(changes []index.Change) {
	b.hidden.tell(changes)
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.heard {
		b.heard = true
		for key := range b.have {
			b.queue.add(key)
		}
	}
	for _, c := range changes {
		kind, _, _ := strings.Cut(c.Key.Name, " ")
		switch {
		case c.Key.Kind == index.NounConditions && (kind == index.Service.String() || kind == index.ServiceEntry.String()):
			keepNoun(b.told, c.Key.Name, c.Conditions)
			b.queue.add(c.Key.Name)
		case c.Key.Kind == index.NounStatus && (kind == index.VirtualService.String() || kind == index.DestinationRule.String()):
			keepNoun(b.wrong, c.Key.Name, c.Status)
			b.queue.add(c.Key.Name)
		}
	}
}

// choose looks again at what is in a namespace: it may be known now.
func (b *bound) choose(namespace string) {
	for _, key := range b.all() {
		if _, n, _ := strings.Cut(key, " "); namespace == "" || strings.HasPrefix(n, namespace+"/") {
			b.queue.add(key)
		}
	}
}

func (b *bound) run(ctx context.Context) { b.queue.work(ctx, b.log, b.all, b.write) }

// all are those whose status says something, or should.
func (b *bound) all() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	keys := make(map[string]bool)
	for key, o := range b.have {
		if len(o.conditions) > 0 || o.judged {
			keys[key] = true
		}
	}
	for key := range b.told {
		keys[key] = true
	}
	return slices.Collect(maps.Keys(keys))
}

func (b *bound) write(ctx context.Context, key string) error {
	b.mu.Lock()
	o, told, wrong, heard := b.have[key], b.told[key], b.wrong[key], b.heard
	b.mu.Unlock()
	if o == nil || !heard || !b.speaks(o.name.Namespace, o.labels) {
		return nil
	}
	want := conditionsTold(told, o.generation)
	if o.judged {
		want = []condition{judgement(wrong, b.hidden.of(key), o.generation)}
	}
	k := boundKinds[o.kind]
	all, differs := merge(o.conditions, k.own, want, time.Now())
	if !differs {
		return nil
	}
	if o.kind == index.Service { // each condition is a value of its own: those of others are not ours to write
		all = slices.DeleteFunc(all, func(c condition) bool { return !slices.Contains(k.own, c.Type) })
	}
	patch, err := json.Marshal(map[string]any{
		"apiVersion": k.resource.GroupVersion().String(), "kind": o.kind.String(),
		"metadata": map[string]any{"name": o.name.Name, "namespace": o.name.Namespace, "resourceVersion": o.version},
		"status":   map[string]any{"conditions": all},
	})
	if err != nil {
		return err
	}
	force := true
	_, err = b.client.Resource(k.resource).Namespace(o.name.Namespace).
		Patch(ctx, o.name.Name, types.ApplyPatchType, patch, metav1.PatchOptions{FieldManager: fieldManager, Force: &force}, "status")
	if apierrors.IsNotFound(err) {
		return nil // it is gone
	}
	return err
}

// judgement is what the mesh makes of a rule, nil: what is written; hidden is what of it nobody reaches. It is True while the rule
// has effect, though perhaps not all of it.
func judgement(wrong *translate.Status, hidden string, generation int64) condition {
	c := condition{Type: translate.ConditionWaypointAccepted, Status: "True", Reason: translate.ReasonAccepted,
		Message: "waypoints of its hosts do as it says", ObservedGeneration: generation}
	if hidden != "" {
		c.Reason, c.Message = string(translate.Conflicted), hidden
	}
	if wrong == nil {
		return c
	}
	c.Reason, c.Message = string(wrong.Reason), wrong.Message
	if hidden != "" {
		c.Message += "; " + hidden
	}
	if wrong.Reason != translate.Unsupported {
		c.Status = "False"
	}
	return c
}
