package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	metaapi "istio.io/api/meta/v1alpha1"
	securityapi "istio.io/api/security/v1beta1"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/translate"
)

// Each trim function returns a new object with what the mesh looks at. It must leave what it returned as it is.

const (
	annotationTraffic = "networking.istio.io/traffic-distribution"
	annotationDryRun  = "istio.io/dry-run"
)

func trimmedMeta(m *metav1.ObjectMeta, annotations ...string) metav1.ObjectMeta {
	t := metav1.ObjectMeta{Name: m.Name, Namespace: m.Namespace, Labels: m.Labels, DeletionTimestamp: m.DeletionTimestamp}
	for _, key := range annotations {
		if v, ok := m.Annotations[key]; ok {
			if t.Annotations == nil {
				t.Annotations = make(map[string]string)
			}
			t.Annotations[key] = v
		}
	}
	return t
}

func trimPod(o runtime.Object) (runtime.Object, error) {
	pod, ok := o.(*corev1.Pod)
	if !ok {
		return nil, unexpected(o)
	}
	return translate.TrimPod(pod), nil
}

func trimNamespace(o runtime.Object) (runtime.Object, error) {
	ns, ok := o.(*corev1.Namespace)
	if !ok {
		return nil, unexpected(o)
	}
	return &corev1.Namespace{ObjectMeta: trimmedMeta(&ns.ObjectMeta, annotationTraffic, translate.AnnotationCanaryWeight, translate.AnnotationUnavailable),
		Status: corev1.NamespaceStatus{Phase: ns.Status.Phase}}, nil
}

func trimNode(o runtime.Object) (runtime.Object, error) {
	node, ok := o.(*corev1.Node)
	if !ok {
		return nil, unexpected(o)
	}
	return &corev1.Node{ObjectMeta: trimmedMeta(&node.ObjectMeta)}, nil
}

func trimService(o runtime.Object) (runtime.Object, error) {
	svc, ok := o.(*corev1.Service)
	if !ok {
		return nil, unexpected(o)
	}
	t := &corev1.Service{ObjectMeta: trimmedMeta(&svc.ObjectMeta, annotationTraffic, translate.AnnotationCanaryWeight), Spec: svc.Spec}
	t.ResourceVersion, t.Generation, t.Status.Conditions = svc.ResourceVersion, svc.Generation, svc.Status.Conditions
	return t, nil
}

func trimSlice(o runtime.Object) (runtime.Object, error) {
	slice, ok := o.(*discoveryv1.EndpointSlice)
	if !ok {
		return nil, unexpected(o)
	}
	return &discoveryv1.EndpointSlice{ObjectMeta: trimmedMeta(&slice.ObjectMeta), AddressType: slice.AddressType,
		Endpoints: slice.Endpoints, Ports: slice.Ports}, nil
}

func trimConfigMap(o runtime.Object) (runtime.Object, error) {
	cm, ok := o.(*corev1.ConfigMap)
	if !ok {
		return nil, unexpected(o)
	}
	return &corev1.ConfigMap{ObjectMeta: trimmedMeta(&cm.ObjectMeta), Data: cm.Data}, nil
}

func unexpected(o runtime.Object) error { return fmt.Errorf("object is a %T", o) }

// istioObject is an object of Istio's as it travels: spec and status are read apart, so that a status that
// somebody spoiled does not take a policy out of force.
type istioObject struct {
	Metadata metav1.ObjectMeta `json:"metadata"`
	Spec     json.RawMessage   `json:"spec"`
	Status   struct {
		Conditions []condition `json:"conditions"`
	} `json:"status"`
}

func readIstio(o runtime.Object) (s istioObject, err error) {
	u, ok := o.(*unstructured.Unstructured)
	if !ok {
		return s, unexpected(o)
	}
	text, err := json.Marshal(map[string]any{"metadata": u.Object["metadata"], "spec": u.Object["spec"]})
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, err
	}
	s.Status.Conditions = conditionsOf(u.Object)
	m := trimmedMeta(&s.Metadata, annotationDryRun, annotationTraffic, mesh.AnnotationRedirection, translate.AnnotationConnectStrategy,
		translate.AnnotationCanaryWeight, translate.AnnotationHealthCheck)
	m.CreationTimestamp, m.Generation = s.Metadata.CreationTimestamp, s.Metadata.Generation
	s.Metadata = m
	return s, nil
}

// decode reads a spec. unknown is what is in it that this program does not know: a newer version of the API may say
// with it whom not to let in.
func decode(spec json.RawMessage, into proto.Message) (unknown, err error) {
	if len(spec) == 0 || string(spec) == "null" {
		return nil, nil
	}
	unknown = protojson.Unmarshal(spec, into)
	if unknown == nil {
		return nil, nil
	}
	proto.Reset(into)
	return unknown, protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(spec, into)
}

// policy is an AuthorizationPolicy and what its status says now.
type policy struct {
	securityv1.AuthorizationPolicy
	conditions []condition
	unknown    string // what of it this program does not understand; such a policy denies
}

// notUnderstood makes a policy deny where it holds: translate refuses a condition without values, and what is refused
// denies.
func (p *policy) notUnderstood(reason error) {
	p.unknown = reason.Error()
	p.Spec.Action = min(p.Spec.Action, securityapi.AuthorizationPolicy_DENY)
	p.Spec.Rules = []*securityapi.Rule{{When: []*securityapi.Condition{{Key: "not understood"}}}}
}

func trimAuthorizationPolicy(o runtime.Object) (runtime.Object, error) {
	if p, ok := o.(*policy); ok {
		return p, nil
	}
	s, err := readIstio(o)
	if err != nil {
		return nil, err
	}
	p := &policy{conditions: s.Status.Conditions}
	p.ObjectMeta = s.Metadata
	p.ResourceVersion = metaVersion(o)
	unknown, err := decode(s.Spec, &p.Spec)
	if err != nil { // whom it is for cannot be told either
		proto.Reset(&p.Spec)
		unknown = err
	}
	if unknown != nil {
		p.notUnderstood(unknown)
	}
	return p, nil
}

func metaVersion(o runtime.Object) string {
	a, err := meta.Accessor(o)
	if err != nil {
		return ""
	}
	return a.GetResourceVersion()
}

func trimPeerAuthentication(o runtime.Object) (runtime.Object, error) {
	if pa, ok := o.(*securityv1.PeerAuthentication); ok {
		return pa, nil
	}
	s, err := readIstio(o)
	if err != nil {
		return nil, err
	}
	pa := &securityv1.PeerAuthentication{ObjectMeta: s.Metadata}
	_, err = decode(s.Spec, &pa.Spec)
	return pa, err
}

// serviceEntry is a ServiceEntry and what its status says now.
type serviceEntry struct {
	networkingv1.ServiceEntry
	conditions []condition
}

func trimServiceEntry(o runtime.Object) (runtime.Object, error) {
	if se, ok := o.(*serviceEntry); ok {
		return se, nil
	}
	s, err := readIstio(o)
	if err != nil {
		return nil, err
	}
	se := &serviceEntry{conditions: s.Status.Conditions}
	se.ObjectMeta = s.Metadata
	se.ResourceVersion = metaVersion(o)
	return se, understand(s.Spec, &se.Spec)
}

func trimWorkloadEntry(o runtime.Object) (runtime.Object, error) {
	if we, ok := o.(*networkingv1.WorkloadEntry); ok {
		return we, nil
	}
	s, err := readIstio(o)
	if err != nil {
		return nil, err
	}
	we := &networkingv1.WorkloadEntry{ObjectMeta: s.Metadata}
	for _, c := range s.Status.Conditions {
		if c.Type == translate.ConditionHealthy {
			we.Status.Conditions = append(we.Status.Conditions, &metaapi.IstioCondition{Type: c.Type, Status: c.Status})
		}
	}
	return we, understand(s.Spec, &we.Spec)
}

// rule is a VirtualService or DestinationRule, and what its status says now.
type rule struct {
	metav1.ObjectMeta // with its version, which the object has not: nothing else changed when that did
	runtime.Object
	conditions []condition
	meant      bool // it is for clients in the mesh
}

func trimVirtualService(o runtime.Object) (runtime.Object, error) {
	vs := &networkingv1.VirtualService{}
	return trimRule(o, vs, &vs.ObjectMeta, &vs.Spec, func() bool {
		return len(vs.Spec.Gateways) == 0 || slices.Contains(vs.Spec.Gateways, translate.MeshGateway)
	})
}

func trimDestinationRule(o runtime.Object) (runtime.Object, error) {
	dr := &networkingv1.DestinationRule{}
	return trimRule(o, dr, &dr.ObjectMeta, &dr.Spec, func() bool { return true })
}

func trimRule(o, into runtime.Object, m *metav1.ObjectMeta, spec proto.Message, meant func() bool) (runtime.Object, error) {
	if r, ok := o.(*rule); ok {
		return r, nil
	}
	s, err := readIstio(o)
	if err != nil {
		return nil, err
	}
	*m = s.Metadata
	err = understand(s.Spec, spec)
	r := &rule{ObjectMeta: s.Metadata, Object: into, conditions: s.Status.Conditions, meant: meant()}
	r.ResourceVersion = metaVersion(o)
	return r, err
}

// understand reads a spec of which nothing may be passed over.
func understand(spec json.RawMessage, into proto.Message) error {
	unknown, err := decode(spec, into)
	return errors.Join(err, unknown)
}
