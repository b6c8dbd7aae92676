package gateway

import (
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// FieldManager owns, in the sense of server-side apply, what a Gateway becomes. It is Istio's name: whoever takes over
// from the other drops the fields that only the other wrote, arguments of a container for instance.
const FieldManager = "istio.io/gateway-controller"

const (
	portHBONE = mesh.PortHBONE
	proxyID   = 1337          // user and group, those of Istio's proxies
	container = "istio-proxy" // the name that overlays written for Istio mention

	grace      = 30 * time.Second // of a pod, unless an overlay says otherwise
	drainDelay = 5 * time.Second  // waypoint's own default
	spareTime  = 5 * time.Second  // between the last connection's end and the kill
)

// Plan is what a Gateway becomes: objects to apply, of which those of a kind that is not among them should not exist. own
// are the Gateway's own overlays. An error is the fault of an overlay.
func (c Config) Plan(gw *gatewayv1.Gateway, own Overlays) ([]*unstructured.Unstructured, error) {
	overlays := []Overlays{c.Defaults[""], c.Defaults[string(gw.Spec.GatewayClassName)], own}
	if err := own.check(); err != nil {
		return nil, err
	}
	var all []*unstructured.Unstructured
	for _, o := range []struct {
		key      string
		object   runtime.Object
		like     any
		optional bool
	}{
		{key: keyAccount, object: c.account(gw), like: corev1.ServiceAccount{}},
		{key: keyDeployment, object: c.deployment(gw), like: appsv1.Deployment{}},
		{key: keyService, object: c.service(gw), like: corev1.Service{}},
		{key: keyAutoscaler, object: c.autoscaler(gw), like: autoscalingv2.HorizontalPodAutoscaler{}, optional: true},
		{key: keyBudget, object: c.budget(gw), like: policyv1.PodDisruptionBudget{}, optional: true},
	} {
		plain, err := runtime.DefaultUnstructuredConverter.ToUnstructured(o.object)
		if err != nil {
			return nil, err
		}
		delete(plain, "status")
		merged, any, err := overlaid(plain, o.like, o.key, overlays)
		if err != nil {
			return nil, err
		}
		if o.optional && !any {
			continue
		}
		u := &unstructured.Unstructured{Object: merged}
		if o.key == keyDeployment {
			if err := fitGrace(u); err != nil {
				return nil, fmt.Errorf("%s: %w", o.key, err)
			}
		}
		all = append(all, u)
	}
	return all, nil
}

// meta is what all objects of a Gateway have in common.
func (c Config) meta(gw *gatewayv1.Gateway, name string) metav1.ObjectMeta {
	labels, annotations := c.metadata(gw)
	labels[LabelName], labels[LabelClass], labels[LabelManaged] = NamesOf(gw).Label, string(gw.Spec.GatewayClassName), Managed
	return metav1.ObjectMeta{
		Name: name, Namespace: gw.Namespace, Labels: labels, Annotations: annotations,
		OwnerReferences: []metav1.OwnerReference{{APIVersion: gatewayv1.GroupVersion.String(), Kind: "Gateway", Name: gw.Name, UID: gw.UID}},
	}
}

func (c Config) metadata(gw *gatewayv1.Gateway) (labels, annotations map[string]string) {
	in := gw.Spec.Infrastructure
	if in == nil {
		in = new(gatewayv1.GatewayInfrastructure)
	}
	labels, annotations = metadata(in.Labels, gw.Labels), metadata(in.Annotations, gw.Annotations)
	if _, said := labels[labelNetwork]; !said && c.Network != "" {
		labels[labelNetwork] = c.Network
	}
	return labels, annotations
}

func (c Config) account(gw *gatewayv1.Gateway) *corev1.ServiceAccount {
	return &corev1.ServiceAccount{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ServiceAccount"},
		ObjectMeta: c.meta(gw, NamesOf(gw).ServiceAccount)}
}

func (c Config) service(gw *gatewayv1.Gateway) *corev1.Service {
	s := &corev1.Service{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}, ObjectMeta: c.meta(gw, NamesOf(gw).Service)}
	if _, said := s.Annotations[annotationDist]; !said {
		s.Annotations[annotationDist] = "PreferClose" // what a node near by can do need not cross zones
	}
	port := func(name string, number int32, protocol string) corev1.ServicePort {
		return corev1.ServicePort{Name: name, Port: number, Protocol: corev1.ProtocolTCP, AppProtocol: &protocol, TargetPort: intstr.FromInt32(number)}
	}
	families := corev1.IPFamilyPolicyPreferDualStack
	s.Spec = corev1.ServiceSpec{
		Type: corev1.ServiceTypeClusterIP, IPFamilyPolicy: &families, Selector: map[string]string{LabelName: NamesOf(gw).Label},
		Ports: []corev1.ServicePort{port("status-port", mesh.PortReadiness, "tcp"), port("mesh", portHBONE, "hbone")},
	}
	if t := gw.Annotations[AnnotationType]; t != "" {
		s.Spec.Type = corev1.ServiceType(t)
	}
	if s.Spec.Type == corev1.ServiceTypeLoadBalancer && len(gw.Spec.Addresses) == 1 {
		s.Spec.LoadBalancerIP = gw.Spec.Addresses[0].Value
	}
	return s
}

func (c Config) autoscaler(gw *gatewayv1.Gateway) *autoscalingv2.HorizontalPodAutoscaler {
	name := NamesOf(gw).Service
	return &autoscalingv2.HorizontalPodAutoscaler{
		TypeMeta: metav1.TypeMeta{APIVersion: "autoscaling/v2", Kind: "HorizontalPodAutoscaler"}, ObjectMeta: c.meta(gw, name),
		Spec: autoscalingv2.HorizontalPodAutoscalerSpec{MaxReplicas: 1,
			ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{APIVersion: "apps/v1", Kind: "Deployment", Name: name}},
	}
}

func (c Config) budget(gw *gatewayv1.Gateway) *policyv1.PodDisruptionBudget {
	n := NamesOf(gw)
	return &policyv1.PodDisruptionBudget{
		TypeMeta: metav1.TypeMeta{APIVersion: "policy/v1", Kind: "PodDisruptionBudget"}, ObjectMeta: c.meta(gw, n.Service),
		Spec: policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{LabelName: n.Label}}},
	}
}

// fitGrace tells the waypoint how long its connections may take to end, so that it has ended before it is killed.
func fitGrace(u *unstructured.Unstructured) error {
	text, err := json.Marshal(u.Object)
	if err != nil {
		return err
	}
	var d appsv1.Deployment
	if err := json.Unmarshal(text, &d); err != nil {
		return err
	}
	total, delay, found := grace, drainDelay, false
	if s := d.Spec.Template.Spec.TerminationGracePeriodSeconds; s != nil {
		total = time.Duration(*s) * time.Second
	}
	for i, k := range d.Spec.Template.Spec.Containers {
		if k.Name != container {
			continue
		}
		for _, e := range k.Env {
			switch e.Name {
			case envDeadline:
				return nil // an overlay says so
			case envDrainDelay:
				if delay, err = time.ParseDuration(e.Value); err != nil {
					return fmt.Errorf("%s: %w", envDrainDelay, err)
				}
			}
		}
		env := map[string]any{"name": envDeadline, "value": max(0, total-delay-spareTime).String()}
		containers, _, err := unstructured.NestedSlice(u.Object, "spec", "template", "spec", "containers")
		if err != nil {
			return err
		}
		c, _ := containers[i].(map[string]any)
		have, _ := c["env"].([]any)
		c["env"], found = append(have, env), true
		if err := unstructured.SetNestedSlice(u.Object, containers, "spec", "template", "spec", "containers"); err != nil {
			return err
		}
	}
	if !found {
		return fmt.Errorf("there is no container %s any more", strconv.Quote(container))
	}
	return nil
}
