package kube_test

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clienttesting "k8s.io/client-go/testing"

	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/kube"
	"github.com/mistnet/mistnet/istiod/translate"
)

// patches are the writes of conditions, as the API server gets them.
type patches chan patch

type patch struct {
	Name   string
	Fault  string // what of the request is not as it must be
	Status struct {
		Conditions []map[string]any `json:"conditions"`
	} `json:"status"`
}

func (c *cluster) patches() patches {
	return c.patchesOf("authorizationpolicies")
}

func (c *cluster) patchesOf(resources ...string) patches {
	ch := make(patches, 100)
	record := func(a clienttesting.Action) (bool, runtime.Object, error) {
		pa := a.(clienttesting.PatchActionImpl)
		p := patch{Name: pa.Namespace + "/" + pa.Name}
		if err := json.Unmarshal(pa.Patch, &p); err != nil {
			p.Fault = err.Error()
		}
		if o := pa.PatchOptions; pa.Subresource != "status" || pa.PatchType != "application/apply-patch+yaml" || o.Force == nil || !*o.Force || o.FieldManager != "mistnet-istiod" {
			p.Fault = fmt.Sprintf("%s %s %+v", pa.Subresource, pa.PatchType, o)
		}
		ch <- p
		return true, &unstructured.Unstructured{Object: map[string]any{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy"}}, nil
	}
	for _, r := range resources {
		c.dynamic.PrependReactor("patch", r, record)
	}
	return ch
}

func (p patches) next(t *testing.T) patch {
	t.Helper()
	select {
	case got := <-p:
		if got.Fault != "" {
			t.Errorf("patch of %s: %s", got.Name, got.Fault)
		}
		return got
	case <-time.After(patience):
		t.Fatal("nothing was written")
		return patch{}
	}
}

// TestRootCertificateIsInEveryNamespace also follows one that is new, and mends a copy that somebody changed or deleted.
func TestRootCertificateIsInEveryNamespace(t *testing.T) {
	t.Parallel()
	now := metav1.Now()
	going := namespace("going", nil)
	going.DeletionTimestamp, going.Finalizers = &now, []string{"kubernetes"}
	c := newCluster(t, namespace("shop", nil), namespace("kube-system", nil), going)
	c.start()
	c.source.WriteRoot([]byte("ROOT 1"))
	holds := func(ns, want string) {
		t.Helper()
		c.eventually(fmt.Sprintf("%s holds %s", ns, want), func(ctx context.Context) bool {
			cm, err := c.kube.CoreV1().ConfigMaps(ns).Get(ctx, "istio-ca-root-cert", metav1.GetOptions{})
			return err == nil && cm.Data["root-cert.pem"] == want && cm.Labels["istio.io/config"] == "true"
		})
	}
	holds("shop", "ROOT 1")
	holds("kube-system", "ROOT 1")
	ctx := t.Context()
	if _, err := c.kube.CoreV1().Namespaces().Create(ctx, namespace("new", nil), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	holds("new", "ROOT 1")
	spoiled := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "istio-ca-root-cert", Namespace: "shop"}, Data: map[string]string{"root-cert.pem": "EVIL"}}
	if _, err := c.kube.CoreV1().ConfigMaps("shop").Update(ctx, spoiled, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	holds("shop", "ROOT 1")
	if err := c.kube.CoreV1().ConfigMaps("shop").Delete(ctx, "istio-ca-root-cert", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	holds("shop", "ROOT 1")
	c.source.WriteRoot([]byte("ROOT 2"))
	holds("new", "ROOT 2")
	if _, err := c.kube.CoreV1().ConfigMaps("going").Get(ctx, "istio-ca-root-cert", metav1.GetOptions{}); err == nil {
		t.Error("a namespace that is being deleted was written to")
	}
}

// eventually waits for what the writers do.
func (c *cluster) eventually(what string, holds func(context.Context) bool) {
	c.t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !holds(c.t.Context()) {
		select {
		case <-tick.C:
		case <-deadline:
			c.t.Fatalf("never: %s", what)
		}
	}
}

func TestConditionsOfPolicies(t *testing.T) {
	t.Parallel()
	spec := func(action string, rule map[string]any) map[string]any {
		return map[string]any{"action": action, "rules": []any{rule}}
	}
	http := map[string]any{"to": []any{map[string]any{"operation": map[string]any{"methods": []any{"GET"}}}}}
	plain := map[string]any{"from": []any{map[string]any{"source": map[string]any{"namespaces": []any{"shop"}}}}}
	future := spec("ALLOW", plain)
	future["futureField"] = "yes"
	for name, c := range map[string]struct {
		spec map[string]any
		have []any
		want []map[string]any // without times and messages; nil: nothing is written
	}{
		"as written": {spec: spec("ALLOW", plain), want: []map[string]any{
			{"type": "ZtunnelAccepted", "status": "True", "reason": "Accepted", "observedGeneration": 3.0}}},
		"stricter than written": {spec: spec("DENY", http), want: []map[string]any{
			{"type": "ZtunnelAccepted", "status": "True", "reason": "UnsupportedValue", "observedGeneration": 3.0}}},
		"not enforced": {spec: spec("AUDIT", plain), want: []map[string]any{
			{"type": "ZtunnelAccepted", "status": "False", "reason": "UnsupportedValue", "observedGeneration": 3.0}}},
		"makes no sense": {spec: spec("ALLOW", map[string]any{"from": []any{map[string]any{"source": map[string]any{"ipBlocks": []any{"x"}}}}}), want: []map[string]any{
			{"type": "ZtunnelAccepted", "status": "False", "reason": "Invalid", "observedGeneration": 3.0}}},
		"says more than we know": {spec: future, want: []map[string]any{
			{"type": "ZtunnelAccepted", "status": "False", "reason": "Invalid", "observedGeneration": 3.0}}},
		"conditions of others stay": {spec: spec("ALLOW", plain), have: []any{map[string]any{"type": "Audited", "status": "True", "reason": "Accepted"}},
			want: []map[string]any{{"type": "Audited", "status": "True", "reason": "Accepted"},
				{"type": "ZtunnelAccepted", "status": "True", "reason": "Accepted", "observedGeneration": 3.0}}},
		"one that is old is renewed": {spec: spec("ALLOW", plain), have: []any{map[string]any{"type": "ZtunnelAccepted", "status": "True", "reason": "Accepted",
			"message": "attached to ztunnel", "observedGeneration": "2", "lastTransitionTime": "2020-01-01T00:00:00Z"}},
			want: []map[string]any{{"type": "ZtunnelAccepted", "status": "True", "reason": "Accepted", "observedGeneration": 3.0}}},
		"what is right is left alone, also as Istio writes it": {spec: spec("ALLOW", plain), have: []any{map[string]any{"type": "ZtunnelAccepted", "status": "True", "reason": "Accepted",
			"message": "attached to ztunnel", "observedGeneration": "3", "lastTransitionTime": "2020-01-01T00:00:00Z"}}},
		"one for a waypoint has none": {spec: map[string]any{"targetRefs": []any{map[string]any{"kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "wp"}}}},
		"one that is for a waypoint now loses its own": {spec: map[string]any{"targetRefs": []any{map[string]any{"kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "wp"}}},
			have: []any{map[string]any{"type": "ZtunnelAccepted", "status": "True"}}, want: []map[string]any{}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ap := object("AuthorizationPolicy", "shop", "ap", c.spec)
			if c.have != nil {
				ap.Object["status"] = map[string]any{"conditions": c.have}
			}
			marker := allow("shop", "zz-marker", "shop") // is written in any case
			cl := newCluster(t, namespace("shop", nil), ap, marker)
			written := cl.patches()
			cl.start()
			if c.want == nil {
				if p := written.next(t); p.Name != "shop/zz-marker" {
					t.Errorf("%s was written: %+v", p.Name, p)
				}
				return
			}
			for {
				p := written.next(t)
				if p.Name != "shop/ap" {
					continue
				}
				for _, got := range p.Status.Conditions {
					if got["type"] == "ZtunnelAccepted" {
						if at, err := time.Parse(time.RFC3339, fmt.Sprint(got["lastTransitionTime"])); err != nil || (name == "one that is old is renewed") != (at.Year() == 2020) {
							t.Errorf("lastTransitionTime = %v", got["lastTransitionTime"])
						}
						if got["message"] == "" {
							t.Error("there is no message")
						}
					}
					delete(got, "lastTransitionTime")
					delete(got, "message")
				}
				if diff := cmp.Diff(c.want, p.Status.Conditions); diff != "" {
					t.Errorf("conditions (-want +got):\n%s", diff)
				}
				return
			}
		})
	}
}

// TestAPolicyThatIsNotUnderstoodDenies: it came through a newer API, and may say whom not to let in.
func TestAPolicyThatIsNotUnderstoodDenies(t *testing.T) {
	t.Parallel()
	future := allow("shop", "guard", "shop")
	if err := unstructured.SetNestedField(future.Object, "x", "spec", "futureField"); err != nil {
		t.Fatal(err)
	}
	broken := object("AuthorizationPolicy", "shop", "broken", map[string]any{"selector": "web"})
	c := newCluster(t, pod("shop", "web", "10.0.0.1"), future, broken)
	c.start()
	for _, key := range []string{"shop/guard", "shop/broken"} {
		p := c.index.Nouns().Policies[key]
		if p == nil || p.Invalid == "" {
			t.Errorf("policy %s = %+v, want one that denies", key, p)
		}
	}
	if got := c.index.Nouns().Workloads["Kubernetes//Pod/shop/web"].Policies; len(got) != 1 || got[0] != "shop/guard" {
		t.Errorf("policies of web = %v, want the selected one", got)
	}
	if got := c.source.Problems(); len(got) != 2 || got[0].Name != (translate.Name{Namespace: "shop", Name: "broken"}) {
		t.Errorf("problems = %+v, want both policies", got)
	}
}

// TestOneReplicaWrites: the second writes when the first has gone.
func TestOneReplicaWrites(t *testing.T) {
	t.Parallel()
	c := newCluster(t, namespace("shop", nil))
	run := func(identity string) (*kube.Source, func()) {
		s := kube.New(kube.Config{Clients: kube.Clients{Kube: c.kube, Dynamic: c.dynamic}, Identity: identity})
		s.WriteRoot([]byte("ROOT of " + identity))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx, func([]index.Event) {}) }()
		stop := func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run = %v", err)
			}
		}
		return s, stop
	}
	first, stopFirst := run("a")
	c.eventually("a leads", func(context.Context) bool { return first.Leads() })
	second, stopSecond := run("b")
	defer stopSecond()
	holds := func(want string) func(context.Context) bool {
		return func(ctx context.Context) bool {
			cm, err := c.kube.CoreV1().ConfigMaps("shop").Get(ctx, "istio-ca-root-cert", metav1.GetOptions{})
			return err == nil && cm.Data["root-cert.pem"] == want
		}
	}
	c.eventually("a writes", holds("ROOT of a"))
	if second.Leads() {
		t.Error("both lead")
	}
	stopFirst()
	if first.Leads() {
		t.Error("a leads after it stopped")
	}
	c.eventually("b writes", holds("ROOT of b"))
	lease, err := c.kube.CoordinationV1().Leases("istio-system").Get(t.Context(), "istio-leader", metav1.GetOptions{})
	if err != nil || lease.Spec.HolderIdentity == nil || *lease.Spec.HolderIdentity != "b" {
		t.Errorf("lease = %+v, %v, want b to hold it", lease, err)
	}
}

// TestConditionsAreForWhatIsSelected: policies of other namespaces may be another control plane's to speak of.
func TestConditionsAreForWhatIsSelected(t *testing.T) {
	t.Parallel()
	in := map[string]string{"mesh": "yes"}
	mesh := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio"},
		Data: map[string]string{"mesh": "discoverySelectors:\n- matchLabels: {mesh: \"yes\"}\n"}}
	c := newCluster(t, mesh, namespace("in", in), namespace("out", nil), allow("in", "one", "shop"), allow("out", "two", "shop"))
	written := c.patches()
	c.start()
	for name := ""; name != "in/one"; {
		if name = written.next(t).Name; name == "out/two" {
			t.Error("a condition is written in a namespace that is not selected")
		}
	}
	policies := c.dynamic.Resource(schema.GroupVersionResource{Group: "security.istio.io", Version: "v1", Resource: "authorizationpolicies"})
	if _, err := policies.Namespace("in").Create(t.Context(), allow("in", "three", "shop"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for name := ""; name != "in/three"; { // by then the other's turn has come and gone
		if name = written.next(t).Name; name == "out/two" {
			t.Error("a condition is written in a namespace that is not selected")
		}
	}
	if _, err := c.kube.CoreV1().Namespaces().Update(t.Context(), namespace("out", in), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	for name := ""; name != "out/two"; { // the fake does not keep what is written: it may be written again
		name = written.next(t).Name
	}
}
