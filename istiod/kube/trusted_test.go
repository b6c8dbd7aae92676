package kube_test

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/mistnet/mistnet/istiod/translate"
)

// TestTrustedConfigMapsAreWatched: what a BackendTLSPolicy refers to is there with the first delivery, follows the ConfigMap, is
// watched by name only, and no longer than it is referred to.
func TestTrustedConfigMapsAreWatched(t *testing.T) {
	t.Parallel()
	policy := gatewayAPI("BackendTLSPolicy", "shop", "tls", map[string]any{
		"targetRefs": []any{map[string]any{"group": "", "kind": "Service", "name": "web"}},
		"validation": map[string]any{"hostname": "x", "caCertificateRefs": []any{map[string]any{"group": "", "kind": "ConfigMap", "name": "roots"}}},
	})
	web := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"}}
	web.Spec.ClusterIP, web.Spec.Ports = "10.96.0.1", []corev1.ServicePort{{Name: "http", Port: 80}}
	roots := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "roots"},
		Data: map[string]string{"ca.crt": "nothing yet", "other": "not read"}}
	c := newCluster(t, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, web, roots, policy)
	c.start()
	const key = "/shop/web.shop.svc.cluster.local"
	first := c.index.Nouns().Traffic[key]
	if first == nil || !strings.Contains(first.Invalid, "there is no certificate in it") {
		t.Fatalf("the first delivery says %+v, want what is wrong with the ConfigMap", first)
	}

	roots.Data["ca.crt"] = aRoot
	if _, err := c.kube.CoreV1().ConfigMaps("shop").Update(t.Context(), roots, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("its certificates are trusted", func(n translate.Nouns) bool {
		p := n.Traffic[key]
		return p != nil && p.Invalid == "" && p.Settings.TLS != nil && string(p.Settings.TLS.CAPEM) == aRoot
	})
	watched := func() (n int) {
		for _, f := range c.source.Feeds() {
			if f.Resource == "configmaps/shop/roots" {
				n++
			}
		}
		return n
	}
	if watched() != 1 {
		t.Errorf("feeds: %+v, want one of configmaps/shop/roots", c.source.Feeds())
	}

	policies := schema.GroupVersionResource{Group: "gateway.networking.k8s.io", Version: "v1", Resource: "backendtlspolicies"}
	if err := c.dynamic.Resource(policies).Namespace("shop").Delete(t.Context(), "tls", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("nothing is asked for", func(n translate.Nouns) bool { return n.Traffic[key] == nil })
	c.until("the ConfigMap is forgotten", func(translate.Nouns) bool { return c.index.Objects()["ConfigMap"] == 0 })
	if watched() != 0 {
		t.Errorf("feeds: %+v, want none of configmaps/shop/roots", c.source.Feeds())
	}
}

// aRoot is a certificate that signed itself.
const aRoot = `-----BEGIN CERTIFICATE-----
MIIBfDCCASGgAwIBAgIUEkkpKT/uASgDr2hf/1YxCyBpu90wCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHc2hvcCBjYTAgFw0yNjExMjMwMDEyMjFaGA8yMTI2MTAzMDAw
MTIyMVowEjEQMA4GA1UEAwwHc2hvcCBjYTBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABM1fnsJwHNRVtgu/zkT7e9HunDQtRW9hSTtomkgi/Vl3b2ygG/LJUEijBbfk
nVkMHsEZ6/4gFoSNhQXitboz5zejUzBRMB0GA1UdDgQWBBReuuko9d2zsupNVVB6
vYMbWpZLLDAfBgNVHSMEGDAWgBReuuko9d2zsupNVVB6vYMbWpZLLDAPBgNVHRMB
Af8EBTADAQH/MAoGCCqGSM49BAMCA0kAMEYCIQC/KcSLH8GmW+8sKkp+D0rW/IpC
U26FGy+pJm8dum3B7wIhAManrJ+H7VgyNJSYY3NSvV/ui1iyAcqgbmret0/BP5Pn
-----END CERTIFICATE-----
`
