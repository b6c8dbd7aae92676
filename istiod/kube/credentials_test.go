package kube_test

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clienttesting "k8s.io/client-go/testing"

	"github.com/mistnet/mistnet/istiod/translate"
)

func credentialRule(name string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
		"metadata": map[string]any{"namespace": "shop", "name": "tls"},
		"spec":     map[string]any{"host": "web", "trafficPolicy": map[string]any{"tls": map[string]any{"mode": "SIMPLE", "credentialName": name}}}}}
}

func webService() *corev1.Service {
	web := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"}}
	web.Spec.ClusterIP, web.Spec.Ports = "10.96.0.1", []corev1.ServicePort{{Name: "http", Port: 80}}
	return web
}

var rules = schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "destinationrules"}

// TestNamedSecretsAreWatched: those that a DestinationRule names are there with the first delivery, are followed, asked for by name
// only, trimmed to what waypoints may have, and forgotten with the rule; others are never asked for.
func TestNamedSecretsAreWatched(t *testing.T) {
	t.Parallel()
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "cert"},
		Data: map[string][]byte{"ca.crt": []byte("nothing yet"), "password": []byte("hush")}}
	c := newCluster(t, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, webService(), secret, credentialRule("cert"))
	var wide atomic.Int32
	c.kube.PrependReactor("*", "secrets", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if l, ok := a.(clienttesting.ListAction); ok && l.GetListRestrictions().Fields.Empty() {
			wide.Add(1)
		}
		return false, nil, nil
	})
	c.start()
	const key = "/shop/web.shop.svc.cluster.local"
	first := c.index.Nouns().Traffic[key]
	if first == nil || !strings.Contains(first.Invalid, "there is no certificate in it") {
		t.Fatalf("the first delivery says %+v, want what is wrong with the Secret", first)
	}
	secret.Data["ca.crt"] = []byte(aRoot)
	if _, err := c.kube.CoreV1().Secrets("shop").Update(t.Context(), secret, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("the service is open", func(n translate.Nouns) bool {
		p := n.Traffic[key]
		return p != nil && p.Invalid == "" && p.Settings.TLS != nil && p.Settings.TLS.Credential == "shop/cert"
	})
	if wide.Load() > 0 {
		t.Error("Secrets were asked for that nobody names")
	}
	watched := func() (names []string) {
		for _, f := range c.source.Feeds() {
			if strings.HasPrefix(f.Resource, "secrets/") {
				names = append(names, f.Resource)
			}
		}
		return names
	}
	if got := watched(); len(got) != 2 { // and cert-cacert
		t.Errorf("feeds: %v, want two", got)
	}
	secret.Data["ca.crt"] = nil
	if _, err := c.kube.CoreV1().Secrets("shop").Update(t.Context(), secret, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("the service is closed", func(n translate.Nouns) bool { return strings.Contains(n.Traffic[key].Invalid, "it has no ca.crt") })
	if err := c.dynamic.Resource(rules).Namespace("shop").Delete(t.Context(), "tls", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("nothing is asked for", func(n translate.Nouns) bool { return n.Traffic[key] == nil })
	c.until("the Secret is forgotten", func(translate.Nouns) bool { return c.index.Objects()["Secret"] == 0 })
	if got := watched(); len(got) != 0 {
		t.Errorf("feeds: %v, want none", got)
	}
}

// TestSecretsThatMayNotBeRead close what names them, and nothing waits for them.
func TestSecretsThatMayNotBeRead(t *testing.T) {
	t.Parallel()
	c := newCluster(t, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, webService(), credentialRule("cert"))
	c.kube.PrependReactor("*", "secrets", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "secrets"}, "cert", nil)
	})
	start := time.Now()
	c.start()
	if took := time.Since(start); took > 8*time.Second {
		t.Errorf("the first delivery took %v", took)
	}
	got := c.index.Nouns().Traffic["/shop/web.shop.svc.cluster.local"]
	if got == nil || !strings.Contains(got.Invalid, "there is no Secret shop/cert that istiod may read") {
		t.Errorf("the first delivery says %+v, want that the Secret cannot be read", got)
	}
}
