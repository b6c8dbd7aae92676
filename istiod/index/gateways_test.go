package index_test

import (
	"testing"

	typeapi "istio.io/api/type/v1beta1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// bind lets an object or namespace ask for a waypoint, or be a part of one.
func (w *world) bind(m *metav1.ObjectMeta) {
	label := func(key string, values ...string) {
		if w.IntN(3) == 0 {
			metav1.SetMetaDataLabel(m, key, pick(w, values...))
		}
	}
	label(translate.LabelUseWaypoint, "x0", "x1", "none", "")
	label(translate.LabelUseWaypointNamespace, "one", "two")
	label(translate.LabelUseCanary, "x1", "x2")
	label(translate.LabelIngressUseWaypoint, "true", "false")
	label(mesh.LabelGatewayName, "x0", "x3")
	if w.IntN(2) == 0 {
		metav1.SetMetaDataAnnotation(m, translate.AnnotationCanaryWeight, pick(w, "0", "20", "many"))
	}
	if w.IntN(4) == 0 {
		metav1.SetMetaDataAnnotation(m, translate.AnnotationUnavailable, pick(w, "deny", "allow"))
	}
}

func (w *world) gateway(meta metav1.ObjectMeta) *gatewayv1.Gateway {
	o := &gatewayv1.Gateway{ObjectMeta: meta}
	o.Labels = nil
	o.Spec.GatewayClassName = pick[gatewayv1.ObjectName](w, "istio-waypoint", "istio-waypoint", "istio-waypoint", "mistnet-waypoint", "other")
	if w.often() {
		metav1.SetMetaDataLabel(&o.ObjectMeta, translate.LabelWaypointFor, pick(w, "service", "workload", "all", "all", "none"))
	}
	if w.IntN(4) == 0 {
		metav1.SetMetaDataAnnotation(&o.ObjectMeta, "gateway.istio.io/name-override", pick(w, "x2", "x4"))
		metav1.SetMetaDataAnnotation(&o.ObjectMeta, translate.AnnotationInboundBinding, pick(w, "PROXY/15088", "NONE", "PROXY/x"))
	}
	from := pick(w, gatewayv1.NamespacesFromAll, gatewayv1.NamespacesFromSame, gatewayv1.NamespacesFromSelector)
	o.Spec.Listeners = []gatewayv1.Listener{{Name: "mesh", Protocol: "HBONE", Port: 15008, AllowedRoutes: &gatewayv1.AllowedRoutes{
		Namespaces: &gatewayv1.RouteNamespaces{From: &from, Selector: &metav1.LabelSelector{
			MatchLabels: map[string]string{translate.LabelIngressUseWaypoint: "true"}}}}}}
	if w.often() {
		kind := pick(w, gatewayv1.IPAddressType, gatewayv1.HostnameAddressType)
		o.Status.Addresses = []gatewayv1.GatewayStatusAddress{{Type: &kind, Value: pick(w, "10.96.0.1", "x1.one.svc.cluster.local")}}
	}
	return o
}

func (w *world) gatewayClass(name string) *gatewayv1.GatewayClass {
	o := &gatewayv1.GatewayClass{ObjectMeta: metav1.ObjectMeta{Name: name}}
	o.Spec.ControllerName = pick[gatewayv1.GatewayController](w, mesh.ControllerIstioMesh, mesh.ControllerMesh, "example.com/other")
	if w.often() {
		metav1.SetMetaDataLabel(&o.ObjectMeta, translate.LabelWaypointFor, pick(w, "workload", "all"))
	}
	return o
}

func (w *world) targets() []*typeapi.PolicyTargetReference {
	name := pick(w, "x0", "x1", "x2")
	refs := []*typeapi.PolicyTargetReference{
		{Kind: "Service", Name: name}, {Group: "networking.istio.io", Kind: "ServiceEntry", Name: name},
		{Group: "gateway.networking.k8s.io", Kind: "Gateway", Name: name},
		{Group: "gateway.networking.k8s.io", Kind: "GatewayClass", Name: pick(w, "istio-waypoint", "other")},
		{Kind: "Secret", Name: name},
	}
	w.Shuffle(len(refs), func(i, j int) { refs[i], refs[j] = refs[j], refs[i] })
	return refs[:1+w.IntN(2)]
}

// TestAGatewayTouchesWhatGoesThroughIt and nothing else: one object of many changes one noun of many.
func TestAGatewayTouchesWhatGoesThroughIt(t *testing.T) {
	t.Parallel()
	x := index.New(translate.Config{})
	apply := func(kind index.Kind, o interface {
		metav1.Object
		runtime.Object
	}) []index.Change {
		return x.Apply(index.Event{Kind: kind, Name: translate.Name{Namespace: o.GetNamespace(), Name: o.GetName()}, Object: o})
	}
	service := func(name string, labels map[string]string) {
		o := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: labels}}
		o.Spec.ClusterIP = "10.96.0.1"
		apply(index.Service, o)
	}
	service("cart", map[string]string{translate.LabelUseWaypoint: "gate"})
	service("web", nil)
	service("gate", nil)
	gw := &gatewayv1.Gateway{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "gate"}}
	gw.Spec.GatewayClassName = "istio-waypoint"
	if got := apply(index.Gateway, gw); len(got) != 2 || got[0].Status == nil || got[1].Conditions == nil {
		t.Errorf("a Gateway without an address changed %v, want what is told of the one service that asks for it", got)
	}
	ready := gw.DeepCopy()
	ready.Status.Addresses = []gatewayv1.GatewayStatusAddress{{Value: "10.96.0.1"}}
	got := apply(index.Gateway, ready)
	if len(got) != 3 || got[0].Service == nil || got[0].Service.Waypoint.Hostname != "gate.shop.svc.cluster.local" || got[1].Status != nil ||
		got[2].Conditions == nil {
		t.Errorf("a Gateway that became ready changed %+v, want the service and what is told of it", got)
	}
	if got := apply(index.Gateway, ready.DeepCopy()); len(got) != 0 {
		t.Errorf("a Gateway that did not change changed %v", got)
	}
}

// TestAWaypointIsThereWhenItsServiceIs where nobody writes statuses.
func TestAWaypointIsThereWhenItsServiceIs(t *testing.T) {
	t.Parallel()
	x := index.New(translate.Config{NoStatus: true})
	at := func(name string) translate.Name { return translate.Name{Namespace: "shop", Name: name} }
	service := func(name string, labels map[string]string) *corev1.Service {
		o := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: labels}}
		o.Spec.ClusterIP = "None"
		return o
	}
	gw := &gatewayv1.Gateway{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "gate"}}
	gw.Spec.GatewayClassName = "istio-waypoint"
	x.Apply(index.Event{Kind: index.Gateway, Name: at("gate"), Object: gw},
		index.Event{Kind: index.Service, Name: at("cart"), Object: service("cart", map[string]string{translate.LabelUseWaypoint: "gate"})})
	bound := func() bool { return !x.Nouns().Services["shop/cart.shop.svc.cluster.local"].Waypoint.IsZero() }
	if bound() {
		t.Error("a service is bound to a waypoint that has no Service")
	}
	x.Apply(index.Event{Kind: index.Service, Name: at("gate"), Object: service("gate", nil)})
	if !bound() {
		t.Error("a service is not bound to a waypoint whose Service came")
	}
	x.Apply(index.Event{Kind: index.Service, Name: at("gate")})
	if bound() {
		t.Error("a service is bound to a waypoint whose Service went")
	}
}
