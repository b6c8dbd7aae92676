package index_test

import (
	"strconv"
	"testing"

	networkingapi "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

func (w *world) virtualService(meta metav1.ObjectMeta) *networkingv1.VirtualService {
	meta.CreationTimestamp = metav1.Unix(int64(w.IntN(3)), 0)
	o := &networkingv1.VirtualService{ObjectMeta: meta}
	for range w.IntN(3) {
		o.Spec.Hosts = append(o.Spec.Hosts, pick(w, "x1", "x2.one.svc.cluster.local", "a.example", "*.example", "*.svc.cluster.local", "*"))
	}
	o.Spec.Gateways = pick(w, nil, nil, []string{"mesh", "edge"}, []string{"edge"})
	o.Spec.ExportTo = pick(w, nil, nil, []string{"."}, []string{"two"}, []string{"~"})
	for range w.IntN(3) {
		rule := &networkingapi.HTTPRoute{}
		if w.often() {
			rule.Match = []*networkingapi.HTTPMatchRequest{{Uri: &networkingapi.StringMatch{MatchType: &networkingapi.StringMatch_Prefix{Prefix: pick(w, "/a", "/b")}}}}
		}
		if w.IntN(3) == 0 {
			rule.Delegate = &networkingapi.Delegate{Name: "x" + strconv.Itoa(w.IntN(5)), Namespace: pick(w, "", "one", "two")}
		} else {
			rule.Route = []*networkingapi.HTTPRouteDestination{{Destination: w.destination()}}
		}
		o.Spec.Http = append(o.Spec.Http, rule)
	}
	if w.IntN(4) == 0 {
		o.Spec.Tcp = []*networkingapi.TCPRoute{{Route: []*networkingapi.RouteDestination{{Destination: w.destination()}}}}
		o.Spec.Tls = []*networkingapi.TLSRoute{{Match: []*networkingapi.TLSMatchAttributes{{SniHosts: []string{"a.example"}}},
			Route: []*networkingapi.RouteDestination{{Destination: w.destination()}}}}
	}
	return o
}

func (w *world) destination() *networkingapi.Destination {
	d := &networkingapi.Destination{Host: pick(w, "x1", "x3", "x1.two.svc.cluster.local", "a.example", "b.example")}
	if w.often() {
		d.Port = &networkingapi.PortSelector{Number: pick[uint32](w, 80, 81)}
	}
	return d
}

func (w *world) parents() (spec gatewayv1.CommonRouteSpec) {
	for range w.IntN(3) {
		ref := gatewayv1.ParentReference{Name: gatewayv1.ObjectName("x" + strconv.Itoa(w.IntN(5)))}
		ref.Kind = new(pick[gatewayv1.Kind](w, "Service", "Service", "ServiceEntry", "Gateway"))
		if w.IntN(3) == 0 {
			ref.Namespace = new(pick[gatewayv1.Namespace](w, "one", "two"))
		}
		if w.IntN(3) == 0 {
			ref.Port = new(pick[int32](w, 80, 81))
		}
		spec.ParentRefs = append(spec.ParentRefs, ref)
	}
	return spec
}

func (w *world) backend() (ref gatewayv1.BackendRef) {
	ref.Name = gatewayv1.ObjectName("x" + strconv.Itoa(w.IntN(5)))
	if w.IntN(3) == 0 {
		ref.Namespace = new(pick[gatewayv1.Namespace](w, "one", "two"))
	}
	if w.IntN(6) == 0 {
		ref.Group, ref.Kind, ref.Name = new(gatewayv1.Group("networking.istio.io")), new(gatewayv1.Kind("Hostname")), pick[gatewayv1.ObjectName](w, "a.example", "b.example")
	}
	if w.often() {
		ref.Port = new(pick[int32](w, 80, 81))
	}
	return ref
}

func (w *world) httpRoute(meta metav1.ObjectMeta) *gatewayv1.HTTPRoute {
	meta.CreationTimestamp = metav1.Unix(int64(w.IntN(3)), 0)
	o := &gatewayv1.HTTPRoute{ObjectMeta: meta, Spec: gatewayv1.HTTPRouteSpec{CommonRouteSpec: w.parents()}}
	for range w.IntN(3) {
		rule := gatewayv1.HTTPRouteRule{BackendRefs: []gatewayv1.HTTPBackendRef{{BackendRef: w.backend()}}}
		if w.IntN(3) == 0 {
			rule.Filters = []gatewayv1.HTTPRouteFilter{{Type: gatewayv1.HTTPRouteFilterRequestMirror,
				RequestMirror: &gatewayv1.HTTPRequestMirrorFilter{BackendRef: w.backend().BackendObjectReference}}}
		}
		if w.IntN(4) == 0 {
			rule.Filters = append(rule.Filters, gatewayv1.HTTPRouteFilter{Type: gatewayv1.HTTPRouteFilterExtensionRef})
		}
		o.Spec.Rules = append(o.Spec.Rules, rule)
	}
	return o
}

func (w *world) grpcRoute(meta metav1.ObjectMeta) *gatewayv1.GRPCRoute {
	o := &gatewayv1.GRPCRoute{ObjectMeta: meta, Spec: gatewayv1.GRPCRouteSpec{CommonRouteSpec: w.parents()}}
	o.Spec.Rules = []gatewayv1.GRPCRouteRule{{BackendRefs: []gatewayv1.GRPCBackendRef{{BackendRef: w.backend()}}}}
	return o
}

func (w *world) tcpRoute(meta metav1.ObjectMeta) *gatewayv1.TCPRoute {
	o := &gatewayv1.TCPRoute{ObjectMeta: meta, Spec: gatewayv1.TCPRouteSpec{CommonRouteSpec: w.parents()}}
	o.Spec.Rules = []gatewayv1.TCPRouteRule{{BackendRefs: []gatewayv1.BackendRef{w.backend(), w.backend()}}}
	return o
}

func (w *world) tlsRoute(meta metav1.ObjectMeta) *gatewayv1.TLSRoute {
	o := &gatewayv1.TLSRoute{ObjectMeta: meta, Spec: gatewayv1.TLSRouteSpec{CommonRouteSpec: w.parents(), Hostnames: []gatewayv1.Hostname{"a.example"}}}
	o.Spec.Rules = []gatewayv1.TLSRouteRule{{BackendRefs: []gatewayv1.BackendRef{w.backend()}}}
	return o
}

func (w *world) grant(meta metav1.ObjectMeta) *gatewayv1.ReferenceGrant {
	o := &gatewayv1.ReferenceGrant{ObjectMeta: meta}
	o.Spec.From = []gatewayv1.ReferenceGrantFrom{{Group: "gateway.networking.k8s.io", Kind: pick[gatewayv1.Kind](w, "HTTPRoute", "TCPRoute"),
		Namespace: pick[gatewayv1.Namespace](w, "one", "two")}}
	to := gatewayv1.ReferenceGrantTo{Kind: "Service"}
	if w.IntN(3) == 0 {
		to.Name = new(gatewayv1.ObjectName("x" + strconv.Itoa(w.IntN(5))))
	}
	o.Spec.To = []gatewayv1.ReferenceGrantTo{to}
	return o
}

// TestARouteCostsWhatItTouches: among ten thousand routes a change translates again those that refer to what changed.
func TestARouteCostsWhatItTouches(t *testing.T) {
	x := index.New(translate.Config{})
	var events []index.Event
	const routes = 10_000
	for i := range routes {
		name := translate.Name{Namespace: "ns" + strconv.Itoa(i%100), Name: "s" + strconv.Itoa(i)}
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: name.Namespace, Name: name.Name}}
		svc.Spec.ClusterIP, svc.Spec.Ports = "10.96.0.1", []corev1.ServicePort{{Port: 80}}
		vs := &networkingv1.VirtualService{ObjectMeta: svc.ObjectMeta}
		vs.Spec.Hosts = []string{name.Name}
		vs.Spec.Http = []*networkingapi.HTTPRoute{{Route: []*networkingapi.HTTPRouteDestination{{Destination: &networkingapi.Destination{Host: name.Name}}}}}
		events = append(events, index.Event{Kind: index.Service, Name: name, Object: svc}, index.Event{Kind: index.VirtualService, Name: name, Object: vs})
	}
	x.Apply(events...)
	if got := len(x.Nouns().Routes); got != routes {
		t.Fatalf("routes = %d, want %d", got, routes)
	}
	one, ok := events[0].Object.(*corev1.Service)
	if !ok {
		t.Fatal("the first event is not of a service")
	}
	ports := []corev1.ServicePort{{Port: 80}, {Port: 81}}
	allocs := testing.AllocsPerRun(10, func() {
		next := one.DeepCopy()
		next.Spec.Ports = ports[:1+(len(one.Spec.Ports)%2)]
		one = next
		changes := x.Apply(index.Event{Kind: index.Service, Name: events[0].Name, Object: next})
		if len(changes) != 2 { // the service, and its route, which has a port when there is one only
			t.Errorf("changes = %v, want the service and its route", changes)
		}
	})
	if allocs > 500 {
		t.Errorf("a change of one service allocates %v times, want what one route needs", allocs)
	}
}
