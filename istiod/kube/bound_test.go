package kube_test

import (
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// told is what the mesh has of an object, as the index says it.
func told(kind, name string, list ...translate.Condition) index.Change {
	c := &translate.Conditions{Kind: kind, Namespace: "shop", Name: name, List: list}
	change := index.Change{Key: index.Key{Kind: index.NounConditions, Name: c.Key()}}
	if len(list) > 0 {
		change.Conditions = c
	}
	return change
}

// plain are a patch's conditions without times.
func (p patch) plain() []map[string]any {
	for _, c := range p.Status.Conditions {
		delete(c, "lastTransitionTime")
	}
	return p.Status.Conditions
}

// TestConditionsOfWhatIsBound are written when the mesh has told of everything, when they differ, and taken away again.
func TestConditionsOfWhatIsBound(t *testing.T) {
	t.Parallel()
	service := func(name string, conditions ...metav1.Condition) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, Status: corev1.ServiceStatus{Conditions: conditions}}
	}
	yes := translate.Condition{Type: "istio.io/WaypointBound", Status: true, Reason: "WaypointAccepted", Message: "bound to waypoint shop/gate"}
	no := translate.Condition{Type: "istio.io/WaypointBound", Reason: "WaypointIsNotReady", Message: "there is no Gateway shop/gate"}
	needs := translate.Condition{Type: "istio.io/WaypointMissing", Status: true, Reason: "NoWaypoint", Message: "label it"}
	since := metav1.Unix(1577836800, 0)
	others := metav1.Condition{Type: "example.com/Seen", Status: "True", Reason: "Seen", LastTransitionTime: since}
	written := metav1.Condition{Type: yes.Type, Status: "True", Reason: yes.Reason, Message: yes.Message, LastTransitionTime: since}
	entry := object("ServiceEntry", "shop", "entry", map[string]any{"hosts": []any{"a.example"}})
	entry.SetAPIVersion("networking.istio.io/v1")
	entry.Object["status"] = map[string]any{"conditions": []any{map[string]any{"type": "example.com/Seen", "status": "True"}}}
	c := newCluster(t, namespace("shop", nil), service("new", others), service("right", written), service("stale", written, others))
	if err := c.dynamic.Tracker().Create(schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "serviceentries"}, entry, "shop"); err != nil {
		t.Fatal(err)
	}
	patches := c.patchesOf("services", "serviceentries")
	c.start()
	c.eventually("this replica writes", func(context.Context) bool { return c.source.Leads() })
	select {
	case p := <-patches:
		t.Errorf("written before anything was told: %+v", p)
	default:
	}
	c.source.Tell([]index.Change{told("Service", "new", yes), told("Service", "right", yes), told("ServiceEntry", "entry", no, needs)})
	accepted := map[string]any{"type": yes.Type, "status": "True", "reason": yes.Reason, "message": yes.Message}
	want := map[string][]map[string]any{
		"shop/new":   {accepted}, // what others wrote is theirs
		"shop/stale": {},
		"shop/entry": { // the list is one value
			{"type": "example.com/Seen", "status": "True"},
			{"type": no.Type, "status": "False", "reason": no.Reason, "message": no.Message, "observedGeneration": 3.0},
			{"type": needs.Type, "status": "True", "reason": needs.Reason, "message": needs.Message, "observedGeneration": 3.0},
		},
	}
	for range len(want) {
		p := patches.next(t)
		if diff := cmp.Diff(want[p.Name], p.plain()); diff != "" {
			t.Errorf("conditions of %s (-want +got):\n%s", p.Name, diff)
		}
		delete(want, p.Name)
	}
	c.source.Tell([]index.Change{told("Service", "right")})
	if p := patches.next(t); p.Name != "shop/right" || len(p.Status.Conditions) != 0 {
		t.Errorf("when nobody asks for a waypoint any more, %+v is written, want none of shop/right", p)
	}
}

// TestConditionsOfPoliciesWithTargets come from the mesh, since they depend on the targets.
func TestConditionsOfPoliciesWithTargets(t *testing.T) {
	t.Parallel()
	ap := object("AuthorizationPolicy", "shop", "ap", map[string]any{"targetRefs": []any{map[string]any{"kind": "Service", "name": "cart"}}})
	ap.Object["status"] = map[string]any{"conditions": []any{
		map[string]any{"type": "ZtunnelAccepted", "status": "True"}, map[string]any{"type": "WaypointAccepted", "status": "True", "reason": "Accepted"}}}
	c := newCluster(t, namespace("shop", nil), ap)
	patches := c.patches()
	c.start()
	if p := patches.next(t); len(p.Status.Conditions) != 1 || p.Status.Conditions[0]["type"] != "WaypointAccepted" {
		t.Errorf("written before anything was told: %+v, want what was said for node proxies gone and the rest as it was", p)
	}
	missing := translate.Condition{Type: "WaypointAccepted", Reason: "TargetNotFound", Message: "there is no Service shop/cart"}
	c.source.Tell([]index.Change{told("AuthorizationPolicy", "ap", missing)})
	want := []map[string]any{{"type": "WaypointAccepted", "status": "False", "reason": missing.Reason, "message": missing.Message, "observedGeneration": 3.0}}
	p := patches.next(t)
	for len(p.Status.Conditions) > 0 && p.Status.Conditions[0]["status"] == "True" {
		p = patches.next(t) // what was tried again meanwhile
	}
	if diff := cmp.Diff(want, p.plain()); diff != "" {
		t.Errorf("conditions (-want +got):\n%s", diff)
	}
}
