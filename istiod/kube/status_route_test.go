package kube_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	clienttesting "k8s.io/client-go/testing"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/istiod/gateway"
)

// routeWrite is one write of the status of a route.
type routeWrite struct {
	name    string
	parents []gatewayv1.RouteParentStatus
}

// routeStatuses are the writes of the status of routes, as the API server gets them.
func (c *cluster) routeStatuses() <-chan routeWrite {
	ch := make(chan routeWrite, 100)
	c.dynamic.PrependReactor("patch", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		pa, ok := a.(clienttesting.PatchActionImpl)
		if !ok || !strings.HasSuffix(pa.Resource.Resource, "routes") {
			return false, nil, nil
		}
		var body struct {
			APIVersion string `json:"apiVersion"`
			Kind       string
			Status     struct{ Parents []gatewayv1.RouteParentStatus }
		}
		err := json.Unmarshal(pa.Patch, &body)
		if pa.Subresource != "status" || pa.PatchType != "application/apply-patch+yaml" || pa.PatchOptions.FieldManager != "mistnet-istiod" ||
			err != nil || body.APIVersion != "gateway.networking.k8s.io/v1" || !strings.EqualFold(body.Kind+"s", pa.Resource.Resource) {
			c.t.Errorf("patch of %s %s: %v: %s", pa.Subresource, pa.PatchType, err, pa.Patch)
		}
		ch <- routeWrite{pa.Resource.Resource + " " + pa.Namespace + "/" + pa.Name, body.Status.Parents}
		return true, &unstructured.Unstructured{Object: map[string]any{"apiVersion": body.APIVersion, "kind": body.Kind}}, nil
	})
	return ch
}

// short is an entry in few words; times that are not of long ago are left out.
func short(entries []gatewayv1.RouteParentStatus) []string {
	var all []string
	for _, e := range entries {
		text := string(e.ControllerName) + " " + string(e.ParentRef.Name)
		for _, c := range e.Conditions {
			text += fmt.Sprintf(" %s=%s/%s@%d", c.Type, c.Status, c.Reason, c.ObservedGeneration)
			if c.LastTransitionTime.Year() == 2020 {
				text += "/2020"
			}
		}
		all = append(all, text)
	}
	return all
}

func TestStatusOfRoutes(t *testing.T) {
	t.Parallel()
	ref := map[string]any{"group": "", "kind": "Service", "name": "web"}
	rule := func(backend string) []any {
		return []any{map[string]any{"backendRefs": []any{map[string]any{"name": backend, "port": int64(80)}}}}
	}
	entry := func(controller string, generation int64) map[string]any {
		condition := func(kind string) map[string]any {
			return map[string]any{"type": kind, "status": "True", "reason": kind, "message": "", "observedGeneration": generation,
				"lastTransitionTime": "2020-01-01T00:00:00Z"}
		}
		return map[string]any{"parentRef": ref, "controllerName": controller, "conditions": []any{condition("Accepted"), condition("ResolvedRefs")}}
	}
	const good = "istio.io/mesh-controller web Accepted=True/Accepted@3 ResolvedRefs=True/ResolvedRefs@3"
	for name, c := range map[string]struct {
		kind    string // "": HTTPRoute
		parents []any  // nil: Service web
		backend string
		have    []any
		ignore  bool // leave Istio's Gateways to Istio
		want    []string
	}{
		"as written":      {backend: "web", want: []string{good}},
		"of another kind": {kind: "TCPRoute", backend: "web", want: []string{good}},
		"a backend that is not there": {backend: "gone", want: []string{
			"istio.io/mesh-controller web Accepted=True/Accepted@3 ResolvedRefs=False/BackendNotFound@3"}},
		"a parent that is not there": {backend: "web", parents: []any{ref, map[string]any{"group": "", "kind": "Service", "name": "gone"}}, want: []string{
			good, "istio.io/mesh-controller gone Accepted=False/NoMatchingParent@3 ResolvedRefs=True/ResolvedRefs@3"}},
		"entries of others stay": {backend: "web", have: []any{entry("example.com/gateway", 1)}, want: []string{
			"example.com/gateway web Accepted=True/Accepted@1/2020 ResolvedRefs=True/ResolvedRefs@1/2020", good}},
		"one that is old is renewed, and keeps the time of what stays": {backend: "gone", have: []any{entry("istio.io/mesh-controller", 2)}, want: []string{
			"istio.io/mesh-controller web Accepted=True/Accepted@3/2020 ResolvedRefs=False/BackendNotFound@3"}},
		"what is right is left alone":   {backend: "web", have: []any{entry("istio.io/mesh-controller", 3)}},
		"one under the other name goes": {backend: "web", have: []any{entry("mistnet.io/mesh-controller", 3)}, want: []string{good}},
		"beside Istio, under our own name": {backend: "web", ignore: true, have: []any{entry("istio.io/mesh-controller", 1)}, want: []string{
			"istio.io/mesh-controller web Accepted=True/Accepted@1/2020 ResolvedRefs=True/ResolvedRefs@1/2020",
			"mistnet.io/mesh-controller web Accepted=True/Accepted@3 ResolvedRefs=True/ResolvedRefs@3"}},
		"one for a gateway has none": {backend: "web", parents: []any{map[string]any{"name": "edge"}}, have: []any{entry("example.com/gateway", 1)}},
		"one that is for a gateway now loses its own": {backend: "web", parents: []any{map[string]any{"name": "edge"}},
			have: []any{entry("istio.io/mesh-controller", 2)}, want: []string{}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if c.kind == "" {
				c.kind = "HTTPRoute"
			}
			if c.parents == nil {
				c.parents = []any{ref}
			}
			route := gatewayAPI(c.kind, "shop", "a", map[string]any{"parentRefs": c.parents, "rules": rule(c.backend)})
			route.Object["status"] = map[string]any{"parents": c.have}
			// It is written in any case.
			marker := gatewayAPI("HTTPRoute", "shop", "zz-marker", map[string]any{"parentRefs": []any{ref}, "rules": rule("web")})
			cl := newCluster(t, namespace("shop", nil), service("shop", "web", "10.96.0.1"), route, marker)
			cl.tells = true
			written := cl.routeStatuses()
			cl.startWaypoints(gateway.Config{IgnoreIstio: c.ignore})
			var got []routeWrite
			for len(got) == 0 || c.want != nil && !strings.HasSuffix(got[len(got)-1].name, "/a") {
				select {
				case one := <-written:
					got = append(got, one)
				case <-time.After(patience):
					t.Fatalf("written: %+v", got)
				}
			}
			last := got[len(got)-1]
			if c.want == nil {
				if strings.HasSuffix(last.name, "/a") {
					t.Errorf("%s was written: %q", last.name, short(last.parents))
				}
				return
			}
			if diff := cmp.Diff(append([]string{}, c.want...), append([]string{}, short(last.parents)...)); diff != "" {
				t.Errorf("parents (-want +got):\n%s", diff)
			}
		})
	}
}
