package translate

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Backing is a service and one of its EndpointSlices.
type Backing struct {
	Service *corev1.Service
	Slice   *discoveryv1.EndpointSlice
}

// ServiceOf is the service a slice belongs to; its Name is "" when it belongs to none.
func ServiceOf(slice *discoveryv1.EndpointSlice) Name {
	return Name{slice.Namespace, slice.Labels[discoveryv1.LabelServiceName]}
}

// PodsOf are the pods a slice names.
func PodsOf(slice *discoveryv1.EndpointSlice) []Name {
	var pods []Name
	for i := range slice.Endpoints {
		if ref := slice.Endpoints[i].TargetRef; ref != nil && ref.Kind == "Pod" {
			pods = append(pods, Name{slice.Namespace, ref.Name})
		}
	}
	return pods
}

// Slice returns a workload for every address of a slice that is not a pod's: things outside of the cluster that
// somebody listed by hand. svc is the service it belongs to, or nil when not known: then there is nothing to reach
// them by.
func Slice(cfg Config, slice *discoveryv1.EndpointSlice, svc *corev1.Service) ([]*mesh.Workload, *Status) {
	if svc == nil || svc.Spec.Type == corev1.ServiceTypeExternalName {
		return nil, nil
	}
	var bad *Status
	refuse := func(addr string) {
		bad = &Status{Kind: "EndpointSlice", Namespace: slice.Namespace, Name: slice.Name, Reason: Unsupported,
			Message: "left out " + addr + ": only addresses can be reached"}
	}
	ports := slicePorts(svc, slice)
	var ws []*mesh.Workload
	seen := make(map[netip.Addr]bool)
	for i := range slice.Endpoints {
		ep := &slice.Endpoints[i]
		if ep.TargetRef != nil && ep.TargetRef.Kind == "Pod" {
			continue
		}
		for _, text := range ep.Addresses {
			a, err := netip.ParseAddr(text)
			if err != nil || a.Zone() != "" || a.IsUnspecified() {
				refuse(text)
				continue
			}
			if a = a.Unmap(); seen[a] {
				continue
			}
			seen[a] = true
			ws = append(ws, sliceWorkload(cfg, slice, ep, a, mesh.ServicePorts{Service: serviceKey(cfg, svc), Ports: ports}))
		}
	}
	return ws, bad
}

func sliceWorkload(cfg Config, slice *discoveryv1.EndpointSlice, ep *discoveryv1.Endpoint, a netip.Addr, place mesh.ServicePorts) *mesh.Workload {
	w := &mesh.Workload{
		UID:               cfg.ClusterID + "/discovery.k8s.io/EndpointSlice/" + slice.Namespace + "/" + slice.Name + "/" + a.String(),
		Name:              slice.Name,
		Namespace:         slice.Namespace,
		Addrs:             []netip.Addr{a},
		TrustDomain:       cfg.TrustDomain,
		ServiceAccount:    mesh.DefaultServiceAccount,
		ClusterID:         cfg.ClusterID,
		Healthy:           ep.Conditions.Ready == nil || *ep.Conditions.Ready,
		Capacity:          1,
		Kind:              mesh.KindPod,
		OwnerName:         slice.Name,
		CanonicalName:     slice.Name,
		CanonicalRevision: defaultCanonicalVersion,
		Services:          []mesh.ServicePorts{place},
	}
	if ep.NodeName != nil {
		w.Node = *ep.NodeName
	}
	if ep.Zone != nil {
		w.Locality.Zone = *ep.Zone
	}
	return w
}

// slicePorts maps the service's ports to the slice's, which carry the same names.
func slicePorts(svc *corev1.Service, slice *discoveryv1.EndpointSlice) []mesh.Port {
	var ports []mesh.Port
	for _, p := range tcpPorts(svc) {
		target := sliceTarget(slice, p.Name)
		if target == 0 && p.TargetPort.Type == intstr.Int {
			target = targetNumber(p)
		}
		if target != 0 {
			ports = append(ports, mesh.Port{ServicePort: uint16(p.Port), TargetPort: target})
		}
	}
	return ports
}

func sliceTarget(slice *discoveryv1.EndpointSlice, name string) uint16 {
	for _, p := range slice.Ports {
		named := ""
		if p.Name != nil {
			named = *p.Name
		}
		tcp := p.Protocol == nil || *p.Protocol == corev1.ProtocolTCP
		if named == name && tcp && p.Port != nil {
			return portNumber(*p.Port)
		}
	}
	return 0
}
