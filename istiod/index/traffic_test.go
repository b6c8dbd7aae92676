package index_test

import (
	"strconv"
	"testing"

	networkingapi "istio.io/api/networking/v1alpha3"
	typeapi "istio.io/api/type/v1beta1"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayxv1alpha1 "sigs.k8s.io/gateway-api/apisx/v1alpha1"

	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

func (w *world) destinationRule(meta metav1.ObjectMeta) *networkingv1.DestinationRule {
	meta.CreationTimestamp = metav1.Unix(int64(w.IntN(3)), 0)
	o := &networkingv1.DestinationRule{ObjectMeta: meta}
	o.Spec.Host = pick(w, "x1", "x2", "x1.one.svc.cluster.local", "a.example", "*.example", "*.one.svc.cluster.local", "*.cluster.local", "*", "")
	o.Spec.ExportTo = pick(w, nil, nil, []string{"."}, []string{"*"}, []string{"~"}, []string{"one"}, []string{".", "two"})
	if w.often() {
		o.Spec.TrafficPolicy = &networkingapi.TrafficPolicy{ConnectionPool: &networkingapi.ConnectionPoolSettings{
			Tcp: &networkingapi.ConnectionPoolSettings_TCPSettings{MaxConnections: int32(w.IntN(4) - 1)}}}
		if w.IntN(4) == 0 {
			o.Spec.TrafficPolicy.Tls = &networkingapi.ClientTLSSettings{Mode: networkingapi.ClientTLSSettings_TLSmode(w.IntN(4))}
			if w.often() {
				o.Spec.TrafficPolicy.Tls.CredentialName = pick(w, "x1", "x2", "x2-cacert", "kubernetes://one/x1", "configmap://one/x1", "kubernetes://two/x2")
			}
		}
		if w.IntN(4) == 0 {
			o.Spec.TrafficPolicy.RetryBudget = &networkingapi.TrafficPolicy_RetryBudget{}
		}
	}
	for range w.IntN(3) {
		o.Spec.Subsets = append(o.Spec.Subsets, &networkingapi.Subset{Name: pick(w, "v1", "v2", ""), Labels: w.labels()})
	}
	if w.IntN(8) == 0 {
		o.Spec.WorkloadSelector = &typeapi.WorkloadSelector{MatchLabels: w.labels()}
	}
	return o
}

func (w *world) targetRef() gatewayv1.LocalPolicyTargetReference {
	ref := gatewayv1.LocalPolicyTargetReference{Kind: "Service", Name: gatewayv1.ObjectName("x" + strconv.Itoa(w.IntN(5)))}
	switch w.IntN(4) {
	case 0:
		ref.Group, ref.Kind = "networking.istio.io", "ServiceEntry"
	case 1:
		ref.Kind = pick[gatewayv1.Kind](w, "Service", "Pod")
	}
	return ref
}

func (w *world) tlsPolicy(meta metav1.ObjectMeta) *translate.BackendTLSPolicy {
	meta.CreationTimestamp = metav1.Unix(int64(w.IntN(3)), 0)
	o := &translate.BackendTLSPolicy{ObjectMeta: meta}
	for range w.IntN(3) {
		ref := gatewayv1.LocalPolicyTargetReferenceWithSectionName{LocalPolicyTargetReference: w.targetRef()}
		if w.IntN(3) == 0 {
			section := pick[gatewayv1.SectionName](w, "p", "http", "q")
			ref.SectionName = &section
		}
		o.Spec.TargetRefs = append(o.Spec.TargetRefs, ref)
	}
	o.Spec.Validation.Hostname = pick[gatewayv1.PreciseHostname](w, "a", "b", "c", "")
	system := gatewayv1.WellKnownCACertificatesSystem
	o.Spec.Validation.WellKnownCACertificates = &system
	if w.often() {
		o.Spec.Validation.CACertificateRefs = []gatewayv1.LocalObjectReference{{Kind: "ConfigMap", Name: gatewayv1.ObjectName("x" + strconv.Itoa(w.IntN(5)))}}
	}
	return o
}

func (w *world) backendPolicy(meta metav1.ObjectMeta) *translate.BackendTrafficPolicy {
	meta.CreationTimestamp = metav1.Unix(int64(w.IntN(3)), 0)
	o := &translate.BackendTrafficPolicy{ObjectMeta: meta}
	for range w.IntN(3) {
		o.Spec.TargetRefs = append(o.Spec.TargetRefs, w.targetRef())
	}
	if w.often() {
		percent := w.IntN(100)
		o.Spec.RetryConstraint = &gatewayxv1alpha1.RetryConstraint{Budget: &gatewayxv1alpha1.BudgetDetails{Percent: &percent}}
	}
	if w.often() {
		name := pick(w, "sid", "a b")
		kind := pick(w, gatewayv1.CookieBasedSessionPersistence, gatewayv1.HeaderBasedSessionPersistence)
		o.Spec.SessionPersistence = &gatewayv1.SessionPersistence{SessionName: &name, Type: &kind}
	}
	return o
}

// BenchmarkDestinationRuleEvent: one rule about one service costs no more when there are more of both.
func BenchmarkDestinationRuleEvent(b *testing.B) {
	for _, services := range []int{100, 10_000} {
		b.Run(strconv.Itoa(services), func(b *testing.B) {
			x, w := index.New(translate.Config{}), newWorld(1)
			rule := func(i int) *networkingv1.DestinationRule {
				dr := w.destinationRule(metav1.ObjectMeta{Namespace: "shop", Name: "d" + strconv.Itoa(i)})
				dr.Spec.Host, dr.Spec.ExportTo, dr.Spec.WorkloadSelector = "s"+strconv.Itoa(i), nil, nil
				dr.Spec.TrafficPolicy = &networkingapi.TrafficPolicy{ConnectionPool: &networkingapi.ConnectionPoolSettings{
					Tcp: &networkingapi.ConnectionPoolSettings_TCPSettings{MaxConnections: int32(1 + i%2)}}}
				return dr
			}
			apply := func(kind index.Kind, name string, svc *corev1.Service, dr *networkingv1.DestinationRule) []index.Change {
				ev := index.Event{Kind: kind, Name: translate.Name{Namespace: "shop", Name: name}}
				if svc != nil {
					ev.Object = svc
				} else {
					ev.Object = dr
				}
				return x.Apply(ev)
			}
			for i := range services {
				s := w.service(metav1.ObjectMeta{Namespace: "shop", Name: "s" + strconv.Itoa(i)})
				s.Spec.Type, s.Spec.ClusterIP = corev1.ServiceTypeClusterIP, "10.96.0.1"
				apply(index.Service, s.Name, s, nil)
				apply(index.DestinationRule, "d"+strconv.Itoa(i), nil, rule(i))
			}
			one := [2]*networkingv1.DestinationRule{rule(1), rule(1)}
			one[1].Spec.TrafficPolicy.ConnectionPool.Tcp.MaxConnections = 99
			for i := 0; b.Loop(); i++ {
				if got := apply(index.DestinationRule, "d1", nil, one[(i+1)%2]); len(got) == 0 {
					b.Fatal("nothing changed")
				}
			}
		})
	}
}

// someCert is a certificate that signed itself, with someKey.
const someCert = `-----BEGIN CERTIFICATE-----
MIIBeDCCAR+gAwIBAgIUaULCSGzP92qMIJ/bYj/RQyXIekswCgYIKoZIzj0EAwIw
ETEPMA0GA1UEAwwGZWdyZXNzMCAXDTI2MTEyMzAyMDUxOVoYDzIxMjYxMDMwMDIw
NTE5WjARMQ8wDQYDVQQDDAZlZ3Jlc3MwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AAQ+Xi2jjk54XLDJPThBAZeN0UH/RKJgQrt75s7UDavPGgiWPk59nuG7HFO5EaMW
3/4BTaktQUBhwQl/Xui5cabZo1MwUTAdBgNVHQ4EFgQUx0YwIJEaokkNPSEEfgvu
wKBR/GUwHwYDVR0jBBgwFoAUx0YwIJEaokkNPSEEfgvuwKBR/GUwDwYDVR0TAQH/
BAUwAwEB/zAKBggqhkjOPQQDAgNHADBEAiBe3cR8MXxDfyRwlC8Wj0JmvOCY6pjG
PrMVXwZsBPf8oAIgTG2vmVsosnVk7OiZG93z5/StMRJVCdgdFdzzX/RAEQ4=
-----END CERTIFICATE-----
`

const someKey = `-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgLvu96WVDdvZ4xga1
jwJhvFO+EhnuclwyLDMz81q5IUChRANCAAQ+Xi2jjk54XLDJPThBAZeN0UH/RKJg
Qrt75s7UDavPGgiWPk59nuG7HFO5EaMW3/4BTaktQUBhwQl/Xui5cabZ
-----END PRIVATE KEY-----
`

// someCA is a certificate that signed itself.
const someCA = `-----BEGIN CERTIFICATE-----
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
