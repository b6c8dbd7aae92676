package cni_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"net/netip"

	"github.com/mistnet/mistnet/cni"
	"github.com/mistnet/mistnet/cni/rules"
)

func TestDecide(t *testing.T) {
	t.Parallel()
	type labels = map[string]string
	ambient, none := labels{"istio.io/dataplane-mode": "ambient"}, labels{"istio.io/dataplane-mode": "none"}
	for _, c := range []struct {
		name        string
		namespace   string
		nsLabels    labels
		labels      labels
		annotations labels
		spec        corev1.PodSpec
		policy      cni.Policy
		want        cni.Verdict
	}{
		{name: "nothing says ambient", want: cni.Verdict{Why: "no label"}},
		{name: "the namespace says ambient", nsLabels: ambient, want: cni.Verdict{Enrolled: true, Why: "label of the namespace"}},
		{name: "the pod says ambient", labels: ambient, want: cni.Verdict{Enrolled: true, Why: "label of the pod"}},
		{name: "the pod opts out", nsLabels: ambient, labels: none, want: cni.Verdict{Why: "label of the pod says none"}},
		{name: "the pod opts in where the namespace opts out", nsLabels: none, labels: ambient,
			want: cni.Verdict{Enrolled: true, Why: "label of the pod"}},
		{name: "the namespace says something else", nsLabels: labels{"istio.io/dataplane-mode": "sidecar"},
			want: cni.Verdict{Why: "no label"}},
		{name: "the pod's label is empty", nsLabels: ambient, labels: labels{"istio.io/dataplane-mode": ""},
			want: cni.Verdict{Enrolled: true, Why: "label of the namespace"}},
		{name: "host network", labels: ambient, spec: corev1.PodSpec{HostNetwork: true},
			want: cni.Verdict{Why: "shares the host's network"}},
		{name: "sidecar", nsLabels: ambient, annotations: labels{"sidecar.istio.io/status": "{}"},
			want: cni.Verdict{Why: "has a sidecar"}},
		{name: "excluded namespace", namespace: "kube-system", labels: ambient,
			policy: cni.Policy{ExcludeNamespaces: []string{"istio-system", "kube-system"}},
			want:   cni.Verdict{Why: "namespace is excluded"}},
		{name: "ztunnel", namespace: "istio-system", nsLabels: ambient, labels: labels{"app": "ztunnel"},
			want: cni.Verdict{Why: "is a ztunnel"}},
		{name: "an application called ztunnel", nsLabels: ambient, labels: labels{"app": "ztunnel"},
			want: cni.Verdict{Enrolled: true, Why: "label of the namespace"}},
		{name: "service account", nsLabels: ambient, spec: corev1.PodSpec{ServiceAccountName: "cart"},
			want: cni.Verdict{Enrolled: true, Why: "label of the namespace", ServiceAccount: "cart"}},
		{name: "ingress mode", nsLabels: ambient, annotations: labels{"ambient.istio.io/bypass-inbound-capture": "true"},
			want: cni.Verdict{Enrolled: true, Why: "label of the namespace", Options: rules.Options{Ingress: true}}},
		{name: "DNS by default", nsLabels: ambient, policy: cni.Policy{DNS: true},
			want: cni.Verdict{Enrolled: true, Why: "label of the namespace", Options: rules.Options{DNS: true}}},
		{name: "no DNS for this pod", nsLabels: ambient, policy: cni.Policy{DNS: true},
			annotations: labels{"ambient.istio.io/dns-capture": "false"},
			want:        cni.Verdict{Enrolled: true, Why: "label of the namespace"}},
		{name: "DNS for this pod", nsLabels: ambient, annotations: labels{"ambient.istio.io/dns-capture": "true"},
			want: cni.Verdict{Enrolled: true, Why: "label of the namespace", Options: rules.Options{DNS: true}}},
		{name: "virtual interfaces", nsLabels: ambient, annotations: labels{"istio.io/reroute-virtual-interfaces": "tap0, tap1"},
			want: cni.Verdict{Enrolled: true, Why: "label of the namespace",
				Options: rules.Options{VirtualInterfaces: []string{"tap0", "tap1"}}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if c.namespace == "" {
				c.namespace = "shop"
			}
			if c.want.ServiceAccount == "" {
				c.want.ServiceAccount = "default"
			}
			pod := &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Namespace: c.namespace, Name: "web-1", Labels: c.labels, Annotations: c.annotations},
				Spec:       c.spec,
			}
			got := c.policy.Decide(pod, c.nsLabels)
			if d := cmp.Diff(c.want, got, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{})); d != "" {
				t.Errorf("Decide (-want +got):\n%s", d)
			}
		})
	}
}
