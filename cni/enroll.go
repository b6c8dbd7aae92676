package cni

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/cni/rules"
	"github.com/mistnet/mistnet/internal/mesh"
)

// Annotations on a pod that steer its enrolment.
const (
	annotationSidecar    = "sidecar.istio.io/status"                 // set by whoever injected a sidecar
	annotationBypass     = "ambient.istio.io/bypass-inbound-capture" // true: inbound plaintext is not captured
	annotationDNS        = "ambient.istio.io/dns-capture"            // true or false: overrides the agent's default
	annotationInterfaces = "istio.io/reroute-virtual-interfaces"     // names of devices, separated by commas
)

// Policy is what the operator decides for all pods of the node.
type Policy struct {
	ExcludeNamespaces []string
	DNS               bool // capture DNS unless a pod says otherwise
}

// Verdict is whether a pod is in the mesh, and why.
type Verdict struct {
	Enrolled       bool
	Why            string // for the log; from a closed set
	ServiceAccount string
	Options        rules.Options // of an enrolled pod
}

// Decide says whether a pod is in the mesh. NamespaceLabels are those of the pod's namespace.
//
// A label on the pod wins over the namespace's. No label brings in a pod that shares the host's network, has a sidecar,
// is itself a ztunnel, or lives in an excluded namespace.
func (p Policy) Decide(pod *corev1.Pod, namespaceLabels map[string]string) Verdict {
	v := Verdict{ServiceAccount: pod.Spec.ServiceAccountName}
	if v.ServiceAccount == "" {
		v.ServiceAccount = mesh.DefaultServiceAccount
	}
	label := pod.Labels[mesh.LabelDataplaneMode]
	_, sidecar := pod.Annotations[annotationSidecar]
	switch {
	case pod.Spec.HostNetwork:
		v.Why = "shares the host's network"
	case slices.Contains(p.ExcludeNamespaces, pod.Namespace):
		v.Why = "namespace is excluded"
	case sidecar:
		v.Why = "has a sidecar"
	case pod.Namespace == mesh.RootNamespace && pod.Labels["app"] == "ztunnel":
		v.Why = "is a ztunnel"
	case label == mesh.DataplaneModeNone:
		v.Why = "label of the pod says none"
	case label == mesh.DataplaneModeAmbient:
		v.Enrolled, v.Why = true, "label of the pod"
	case namespaceLabels[mesh.LabelDataplaneMode] == mesh.DataplaneModeAmbient:
		v.Enrolled, v.Why = true, "label of the namespace"
	default:
		v.Why = "no label"
	}
	if v.Enrolled {
		v.Options = p.options(pod)
	}
	return v
}

func (p Policy) options(pod *corev1.Pod) rules.Options {
	o := rules.Options{
		DNS:               p.DNS,
		Ingress:           strings.EqualFold(pod.Annotations[annotationBypass], "true"),
		VirtualInterfaces: rules.ParseInterfaces(pod.Annotations[annotationInterfaces]),
	}
	switch strings.ToLower(pod.Annotations[annotationDNS]) {
	case "true":
		o.DNS = true
	case "false":
		o.DNS = false
	}
	return o
}
