package kube

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/istiod/gateway"
	"github.com/mistnet/mistnet/istiod/translate"
)

// lookAgain is how often what is not watched is looked at: ConfigMaps that Gateways name, and Services that others run.
const lookAgain = 10 * time.Second

// waypoints makes every Gateway of this mesh's classes a running waypoint, and says in its status how that goes. What a
// Gateway becomes is decided in package gateway.
type waypoints struct {
	clients Clients
	cfg     gateway.Config
	known   func(namespace string) bool // whether the mesh is to know what is in it
	rev     *revisions
	log     *zap.Logger
	queue   keyQueue
	feeds   []*feed // of what runs them

	mu       sync.Mutex
	settings gateway.Settings              // of the mesh, as they are now
	gateways map[string]*gatewayv1.Gateway // by namespace/name
	classes  map[string]*gatewayv1.GatewayClass
	objects  map[objectKey]*unstructured.Unstructured // that carry gateway.LabelManaged
	applied  map[objectKey]appliedForm
}

// objectKey names an object of what a Gateway becomes.
type objectKey struct{ resource, namespace, name string }

// Keys of the queue: namespace/name of a Gateway, or this and the name of a class.
const classKey = "class "

// The kinds of objects that run a Gateway.
var ownedKinds = []schema.GroupVersionResource{
	{Version: "v1", Resource: "serviceaccounts"}, {Group: "apps", Version: "v1", Resource: "deployments"}, {Version: "v1", Resource: "services"},
	{Group: "autoscaling", Version: "v2", Resource: "horizontalpodautoscalers"}, {Group: "policy", Version: "v1", Resource: "poddisruptionbudgets"},
}

func newWaypoints(clients Clients, cfg gateway.Config, known func(string) bool, rev *revisions, log *zap.Logger) *waypoints {
	w := &waypoints{
		clients: clients, cfg: cfg, known: known, rev: rev, log: log, gateways: make(map[string]*gatewayv1.Gateway), classes: make(map[string]*gatewayv1.GatewayClass),
		objects: make(map[objectKey]*unstructured.Unstructured), applied: make(map[objectKey]appliedForm),
	}
	for _, r := range ownedKinds {
		v := untyped(clients.Dynamic, apiGroup{r.Group, []string{r.Version}}, r.Resource)[0]
		w.feeds = append(w.feeds, &feed{name: r.Resource + "/waypoint", client: clients.Dynamic, trim: trimOwned,
			versions: []version{narrowed(v, "", gateway.LabelManaged+"="+gateway.Managed)},
			take:     func(changes []change) { w.takeOwned(r.Resource, changes) }})
	}
	for _, f := range w.feeds {
		f.init(log)
	}
	return w
}

// set takes the mesh's settings of waypoints. Those that run with others are replaced, one pod after the other.
func (w *waypoints) set(settings gateway.Settings) {
	w.mu.Lock()
	w.settings = settings
	w.mu.Unlock()
	w.choose("")
}

func trimOwned(o runtime.Object) (runtime.Object, error) {
	u, ok := o.(*unstructured.Unstructured)
	if !ok {
		return nil, unexpected(o)
	}
	u.SetManagedFields(nil)
	return u, nil
}

func (w *waypoints) takeGateways(changes []change) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range changes {
		key := c.name.String()
		if gw, ok := c.object.(*gatewayv1.Gateway); ok {
			w.gateways[key] = gw
		} else {
			delete(w.gateways, key)
		}
		w.queue.add(key)
	}
}

// takeClasses also wakes those of a name that should exist: when the kind comes to be served there is no object of it.
func (w *waypoints) takeClasses(changes []change) {
	w.mu.Lock()
	defer w.mu.Unlock()
	changed := make(map[string]bool)
	for _, c := range changes {
		changed[c.name.Name] = true
		if class, ok := c.object.(*gatewayv1.GatewayClass); ok {
			w.classes[c.name.Name] = class
		} else {
			delete(w.classes, c.name.Name)
		}
	}
	for name := range w.cfg.Classes() {
		changed[name] = true
	}
	for name := range changed {
		w.queue.add(classKey + name)
	}
	for key, gw := range w.gateways {
		if changed[string(gw.Spec.GatewayClassName)] {
			w.queue.add(key)
		}
	}
}

func (w *waypoints) takeOwned(resource string, changes []change) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range changes {
		key := objectKey{resource, c.name.Namespace, c.name.Name}
		old := w.objects[key]
		now, ok := c.object.(*unstructured.Unstructured)
		if ok {
			w.objects[key] = now
		} else {
			delete(w.objects, key)
		}
		for _, u := range []*unstructured.Unstructured{old, now} {
			if u == nil {
				continue
			}
			for _, ref := range u.GetOwnerReferences() {
				if ref.Kind == "Gateway" {
					w.queue.add(translate.Name{Namespace: c.name.Namespace, Name: ref.Name}.String())
				}
			}
		}
	}
}

// choose looks again at the Gateways of every namespace, or at those of one: it may be known now.
func (w *waypoints) choose(namespace string) {
	for _, key := range w.all() {
		if namespace == "" || strings.HasPrefix(key, namespace+"/") {
			w.queue.add(key)
		}
	}
}

// all are the keys of what there is and what should be.
func (w *waypoints) all() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	keys := slices.Collect(maps.Keys(w.gateways))
	for name := range w.cfg.Classes() {
		keys = append(keys, classKey+name)
	}
	for name := range w.classes {
		keys = append(keys, classKey+name)
	}
	return keys
}

// run writes until ctx is done: whoever calls it leads.
func (w *waypoints) run(ctx context.Context) {
	for _, f := range w.feeds { // or what is there would be taken for missing
		select {
		case <-f.synced:
		case <-ctx.Done():
			return
		}
	}
	var g errgroup.Group
	g.Go(func() error { w.queue.work(ctx, w.log, w.all, w.write); return nil })
	g.Go(func() error {
		tick := time.NewTicker(lookAgain)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
				w.lookAgain()
			}
		}
	})
	_ = g.Wait() // neither fails
}

// lookAgain has those Gateways looked at that depend on what is not watched.
func (w *waypoints) lookAgain() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for key, gw := range w.gateways {
		if name, err := gateway.Parameters(gw); name != "" || err != nil || gateway.Manual(gw) {
			w.queue.add(key)
		}
	}
}

func (w *waypoints) write(ctx context.Context, key string) error {
	if name, ok := strings.CutPrefix(key, classKey); ok {
		return w.writeClass(ctx, name)
	}
	gw := w.ours(key)
	if gw == nil {
		return nil
	}
	var o gateway.Observed
	var err error
	if gateway.Manual(gw) {
		o, err = w.observeManual(ctx, gw)
	} else {
		o, err = w.deploy(ctx, gw)
	}
	return errors.Join(err, w.writeStatus(ctx, gw, o))
}

const gatewayKind = "gateways.gateway.networking.k8s.io"

func keyName(key string) translate.Name {
	namespace, name, _ := strings.Cut(key, "/")
	return translate.Name{Namespace: namespace, Name: name}
}

// ours is a Gateway that this mesh is to run, or nil.
func (w *waypoints) ours(key string) *gatewayv1.Gateway {
	w.mu.Lock()
	gw := w.gateways[key]
	mine := false
	if gw != nil {
		name := string(gw.Spec.GatewayClassName)
		controller := w.cfg.Classes()[name] // which is about to be made
		if class := w.classes[name]; class != nil {
			controller = string(class.Spec.ControllerName)
		}
		mine = w.cfg.Controls(controller)
	}
	w.mu.Unlock()
	if !mine || gw.DeletionTimestamp != nil || !w.known(gw.Namespace) {
		w.rev.leave(gatewayKind, keyName(key), "")
		return nil
	}
	mine, why := w.rev.mine(gw.Namespace, gw.Labels)
	w.rev.leave(gatewayKind, keyName(key), why)
	if !mine {
		return nil
	}
	return gw
}

func (w *waypoints) writeStatus(ctx context.Context, gw *gatewayv1.Gateway, o gateway.Observed) error {
	status := w.cfg.Status(gw, o, metav1.Now().Rfc3339Copy())
	if equality.Semantic.DeepEqual(status, gw.Status) {
		return nil
	}
	return w.patchStatus(ctx, "gateways", "Gateway", &gw.ObjectMeta, status)
}

func (w *waypoints) patchStatus(ctx context.Context, resource, kind string, m *metav1.ObjectMeta, status any) error {
	// The version: what others wrote meanwhile is not overwritten, but read and tried again.
	meta := map[string]any{"name": m.Name, "resourceVersion": m.ResourceVersion}
	if m.Namespace != "" {
		meta["namespace"] = m.Namespace
	}
	patch, err := json.Marshal(map[string]any{
		"apiVersion": gatewayv1.GroupVersion.String(), "kind": kind, "metadata": meta, "status": status,
	})
	if err != nil {
		return err
	}
	force := true
	_, err = w.clients.Dynamic.Resource(gatewayResource(resource)).Namespace(m.Namespace).
		Patch(ctx, m.Name, types.ApplyPatchType, patch, metav1.PatchOptions{FieldManager: fieldManager, Force: &force}, "status")
	if apierrors.IsNotFound(err) {
		return nil // it is gone
	}
	return err
}

// gatewayResource is a kind of the Gateway API in the version that is written.
func gatewayResource(resource string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: gatewayAPI.name, Version: gatewayAPI.versions[0], Resource: resource}
}

// writeClass makes a class that should exist, and says of ours that they are accepted. What is in a class is left alone.
func (w *waypoints) writeClass(ctx context.Context, name string) error {
	w.mu.Lock()
	class := w.classes[name]
	w.mu.Unlock()
	if class == nil {
		return w.makeClass(ctx, name)
	}
	if !w.cfg.Controls(string(class.Spec.ControllerName)) || class.DeletionTimestamp != nil {
		return nil
	}
	mine, _ := w.rev.mine("", class.Labels)
	if gateway.AcceptedBy(class, mine) {
		return nil
	}
	status := w.cfg.ClassStatus(class, metav1.Now().Rfc3339Copy())
	if equality.Semantic.DeepEqual(status, class.Status) {
		return nil
	}
	return w.patchStatus(ctx, "gatewayclasses", "GatewayClass", &class.ObjectMeta, status)
}

func (w *waypoints) makeClass(ctx context.Context, name string) error {
	controller := w.cfg.Classes()[name]
	if controller == "" {
		return nil
	}
	u := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": gatewayv1.GroupVersion.String(), "kind": "GatewayClass", "metadata": map[string]any{"name": name},
		"spec": map[string]any{"controllerName": controller, "description": gateway.ClassDescription},
	}}
	_, err := w.clients.Dynamic.Resource(gatewayResource("gatewayclasses")).
		Create(ctx, u, metav1.CreateOptions{FieldManager: fieldManager})
	switch {
	case apierrors.IsNotFound(err), apierrors.IsAlreadyExists(err): // the kind is not served; somebody was faster
		return nil
	case err == nil:
		w.log.Info("gateway class made", zap.String("class", name))
	}
	return err
}
