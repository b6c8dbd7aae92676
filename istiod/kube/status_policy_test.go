package kube_test

import (
	"context"
	"encoding/json"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clienttesting "k8s.io/client-go/testing"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/google/go-cmp/cmp"
)

// TestStatusOfBackendTLSPolicies: each target in the mesh is an ancestor, with what became of it; entries of others stay, and the
// status follows what the policy trusts.
func TestStatusOfBackendTLSPolicies(t *testing.T) {
	t.Parallel()
	resource := schema.GroupVersionResource{Group: "gateway.networking.k8s.io", Version: "v1", Resource: "backendtlspolicies"}
	policy := gatewayAPI("BackendTLSPolicy", "shop", "tls", map[string]any{
		"targetRefs": []any{map[string]any{"group": "", "kind": "Service", "name": "web"}, map[string]any{"group": "", "kind": "Service", "name": "gone"},
			map[string]any{"group": "apps", "kind": "Deployment", "name": "web"}},
		"validation": map[string]any{"hostname": "x", "caCertificateRefs": []any{map[string]any{"group": "", "kind": "ConfigMap", "name": "roots"}}},
	})
	policy.Object["status"] = map[string]any{"ancestors": []any{map[string]any{"controllerName": "example.com/gateway",
		"ancestorRef": map[string]any{"name": "edge"}, "conditions": []any{map[string]any{"type": "Accepted", "status": "True", "reason": "Accepted",
			"message": "", "lastTransitionTime": "2020-01-01T00:00:00Z", "observedGeneration": int64(1)}}}}}
	roots := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "roots"}, Data: map[string]string{"ca.crt": "nothing yet"}}
	c := newCluster(t, namespace("shop", nil), service("shop", "web", "10.96.0.1"), roots, policy)
	c.tells = true
	var mu sync.Mutex
	var last []gatewayv1.RouteParentStatus
	writes := 0
	c.dynamic.PrependReactor("patch", "backendtlspolicies", func(a clienttesting.Action) (bool, runtime.Object, error) {
		p := a.(clienttesting.PatchActionImpl)
		var body struct {
			Kind   string
			Status gatewayv1.PolicyStatus
		}
		if err := json.Unmarshal(p.Patch, &body); err != nil || body.Kind != "BackendTLSPolicy" || p.Subresource != "status" || p.PatchOptions.FieldManager != "mistnet-istiod" {
			t.Errorf("patch of %q: %v: %s", p.Subresource, err, p.Patch)
		}
		old, err := c.dynamic.Tracker().Get(resource, p.Namespace, p.Name)
		if err != nil {
			return true, nil, err
		}
		now := old.DeepCopyObject()
		text, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&body.Status)
		if err != nil {
			return true, nil, err
		}
		now.(interface{ UnstructuredContent() map[string]any }).UnstructuredContent()["status"] = text
		mu.Lock()
		defer mu.Unlock()
		last, writes = nil, writes+1
		for _, e := range body.Status.Ancestors {
			last = append(last, gatewayv1.RouteParentStatus{ParentRef: e.AncestorRef, ControllerName: e.ControllerName, Conditions: e.Conditions})
		}
		return true, now, c.dynamic.Tracker().Update(resource, now, p.Namespace)
	})
	c.start()
	until := func(what, web string) {
		t.Helper()
		want := []string{"example.com/gateway edge Accepted=True/Accepted@1/2020", "istio.io/mesh-controller web " + web}
		got := []string{}
		c.eventually(what, func(context.Context) bool {
			select {
			case events := <-c.batches:
				c.apply(events)
			default:
			}
			mu.Lock()
			defer mu.Unlock()
			got = short(last)
			return len(got) == 3 && got[1] == want[1]
		})
		if diff := cmp.Diff(want, got[:2]); diff != "" || !strings.HasPrefix(got[2], "istio.io/mesh-controller gone Accepted=False/TargetNotFound@") {
			t.Errorf("ancestors (-want +got):\n%s%s", diff, got[2])
		}
	}
	until("what is wrong with the certificates", "Accepted=False/NoValidCACertificate@3 ResolvedRefs=False/InvalidCACertificateRef@3")
	roots.Data["ca.crt"] = aRoot
	if _, err := c.kube.CoreV1().ConfigMaps("shop").Update(t.Context(), roots, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	until("that they are good", "Accepted=True/Accepted@3 ResolvedRefs=True/ResolvedRefs@3")
	mu.Lock()
	defer mu.Unlock()
	if writes != 2 {
		t.Errorf("written %d times, want 2", writes)
	}
}
