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

	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// bound keeps the conditions by which Services and ServiceEntries tell which waypoint they are bound to.
type bound struct {
	client dynamic.Interface
	log    *zap.Logger
	known  func(namespace string) bool
	queue  keyQueue

	mu    sync.Mutex
	have  map[string]*bindable             // by kind and namespace/name
	told  map[string]*translate.Conditions // what the mesh has, likewise
	heard bool                             // of all of them at least once: before, what is not told of is not known
}

// bindable is an object that may be bound, and what its status says now.
type bindable struct {
	kind       index.Kind
	name       translate.Name
	version    string
	generation int64
	conditions []condition
}

// boundTypes are the types of condition that are written here and by nobody else.
var boundTypes = []string{translate.ConditionWaypointBound, translate.ConditionWaypointMissing}

func newBound(client dynamic.Interface, known func(string) bool, log *zap.Logger) *bound {
	return &bound{client: client, known: known, log: log, have: make(map[string]*bindable), told: make(map[string]*translate.Conditions)}
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
	b.have[key] = &bindable{kind: kind, name: n, version: m.ResourceVersion, generation: m.Generation, conditions: conditions}
	if b.told[key] != nil || len(conditions) > 0 {
		b.queue.add(key)
	}
}

// tell takes what changed of what the mesh has.
func (b *bound) tell(changes []index.Change) {
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
		if c.Key.Kind == index.NounConditions && (kind == index.Service.String() || kind == index.ServiceEntry.String()) {
			keepConditions(b.told, c.Key.Name, c.Conditions)
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
		if len(o.conditions) > 0 {
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
	o, told, heard := b.have[key], b.told[key], b.heard
	b.mu.Unlock()
	if o == nil || !heard || !b.known(o.name.Namespace) {
		return nil
	}
	all, differs := merge(o.conditions, boundTypes, conditionsTold(told, o.generation), time.Now())
	if !differs {
		return nil
	}
	resource, apiVersion := schema.GroupVersionResource{Version: "v1", Resource: "services"}, "v1"
	if o.kind == index.ServiceEntry {
		resource = schema.GroupVersionResource{Group: networkingKinds.name, Version: "v1", Resource: "serviceentries"}
		apiVersion = resource.GroupVersion().String()
	} else { // each condition is a value of its own: those of others are not ours to write
		all = slices.DeleteFunc(all, func(c condition) bool { return !slices.Contains(boundTypes, c.Type) })
	}
	patch, err := json.Marshal(map[string]any{
		"apiVersion": apiVersion, "kind": o.kind.String(),
		"metadata": map[string]any{"name": o.name.Name, "namespace": o.name.Namespace, "resourceVersion": o.version},
		"status":   map[string]any{"conditions": all},
	})
	if err != nil {
		return err
	}
	force := true
	_, err = b.client.Resource(resource).Namespace(o.name.Namespace).
		Patch(ctx, o.name.Name, types.ApplyPatchType, patch, metav1.PatchOptions{FieldManager: fieldManager, Force: &force}, "status")
	if apierrors.IsNotFound(err) {
		return nil // it is gone
	}
	return err
}
