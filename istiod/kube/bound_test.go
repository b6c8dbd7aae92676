package kube_test

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/kube"
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

// TestConditionsOfRules say what the mesh makes of each, when it has come to it, and nothing of those for gateways alone.
func TestConditionsOfRules(t *testing.T) {
	t.Parallel()
	virtual := func(name string, gateways ...any) *unstructured.Unstructured {
		u := object("VirtualService", "shop", name, map[string]any{"hosts": []any{"cart"}, "gateways": gateways,
			"http": []any{map[string]any{"directResponse": map[string]any{"status": int64(200)}}}})
		u.SetAPIVersion("networking.istio.io/v1")
		return u
	}
	good, bad, partly, edge := virtual("good"), virtual("bad", "mesh", "edge"), virtual("partly"), virtual("edge", "edge")
	edge.Object["status"] = map[string]any{"conditions": []any{map[string]any{"type": "WaypointAccepted", "status": "True"}, // from before it was for gateways
		map[string]any{"type": "example.com/Seen", "status": "True"}}}
	dr := object("DestinationRule", "shop", "dr", map[string]any{"host": "cart"})
	dr.SetAPIVersion("networking.istio.io/v1")
	c := newCluster(t, namespace("shop", nil))
	for resource, list := range map[string][]*unstructured.Unstructured{"virtualservices": {good, bad, partly, edge}, "destinationrules": {dr}} {
		for _, o := range list {
			if err := c.dynamic.Tracker().Create(schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: resource}, o, "shop"); err != nil {
				t.Fatal(err)
			}
		}
	}
	patches := c.patchesOf("virtualservices", "destinationrules")
	find := func(routes []*mesh.Route) map[string][]string {
		if len(routes) < 2 {
			return nil
		}
		return map[string][]string{"VirtualService/shop/partly/http/0": {"good comes first"}, "HTTPRoute/shop/partly/http/0": {"not of this kind"}}
	}
	c.startWith(kube.Config{Clients: kube.Clients{Kube: c.kube, Dynamic: c.dynamic}, Identity: "replica-1", Hidden: find})
	c.eventually("this replica writes", func(context.Context) bool { return c.source.Leads() })
	c.source.Tell([]index.Change{
		wrong("VirtualService", "bad", translate.Ignored, "hosts[0]: nobody"),
		wrong("VirtualService", "partly", translate.Unsupported, "http[0].tls: left out"),
		wrong("DestinationRule", "dr", translate.Conflicted, "DestinationRule shop/older counts"),
	})
	says := func(status, reason, message string) []map[string]any {
		return []map[string]any{{"type": "WaypointAccepted", "status": status, "reason": reason, "message": message, "observedGeneration": 3.0}}
	}
	want := map[string][]map[string]any{
		"shop/good":   says("True", "Accepted", "waypoints of its hosts do as it says"),
		"shop/bad":    says("False", "Ignored", "hosts[0]: nobody"),
		"shop/partly": says("True", "UnsupportedValue", "http[0].tls: left out"),
		"shop/dr":     says("False", "Conflicted", "DestinationRule shop/older counts"),
		"shop/edge":   {{"type": "example.com/Seen", "status": "True"}},
	}
	for range len(want) {
		p := patches.next(t)
		if diff := cmp.Diff(want[p.Name], p.plain()); diff != "" {
			t.Errorf("conditions of %s (-want +got):\n%s", p.Name, diff)
		}
		delete(want, p.Name)
	}
	c.source.Tell([]index.Change{routeOf("good", 1), routeOf("partly", 2)})
	const hides = "http rule 0: good comes first"
	if diff := cmp.Diff(says("True", "UnsupportedValue", "http[0].tls: left out; "+hides), patches.next(t).plain()); diff != "" {
		t.Errorf("conditions of a rule that another hides (-want +got):\n%s", diff)
	}
	c.source.Tell([]index.Change{wrong("VirtualService", "partly", "", "")})
	if diff := cmp.Diff(says("True", "Conflicted", hides), patches.next(t).plain()); diff != "" {
		t.Errorf("conditions of a rule that another hides (-want +got):\n%s", diff)
	}
	c.source.Tell([]index.Change{wrong("VirtualService", "bad", "", "")})
	for p := patches.next(t); p.Name != "shop/bad" || p.plain()[0]["status"] != "True"; p = patches.next(t) {
		if p.Name != "shop/bad" {
			t.Errorf("written when another became right: %+v", p)
		}
	}
}

// routeOf is the rule of a VirtualService for every request of service cart.
func routeOf(name string, born int64) index.Change {
	r := &mesh.Route{Kind: mesh.KindVirtualService, Namespace: "shop", Name: name, Protocol: mesh.RouteHTTP, Created: time.Unix(born, 0),
		Parents: []mesh.RouteParent{{Namespace: "shop", Hostname: "cart.shop.svc.cluster.local"}},
		HTTP:    &mesh.HTTPRule{Direct: &mesh.DirectResponse{Status: 200}}}
	return index.Change{Key: index.Key{Kind: index.NounRoute, Name: r.Key()}, Route: r}
}

// wrong is what the mesh does not do as an object says, as the index says it; nothing without a reason.
func wrong(kind, name string, reason translate.StatusReason, message string) index.Change {
	s := &translate.Status{Kind: kind, Namespace: "shop", Name: name, Reason: reason, Message: message}
	change := index.Change{Key: index.Key{Kind: index.NounStatus, Name: s.Key()}}
	if reason != "" {
		change.Status = s
	}
	return change
}
