package translate

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	networkingapi "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// ServiceEntry is Istio's declaration of services that no Service of Kubernetes describes: each of its hosts is one.
type ServiceEntry = networkingv1.ServiceEntry

// AnnotationConnectStrategy asks for the first of several connections that comes about, which nobody here makes.
const AnnotationConnectStrategy = "istio.io/connect-strategy"

// OlderEntry returns the entry that was created first; where nobody recorded that, the first by name. Either may be nil.
func OlderEntry(a, b *ServiceEntry) *ServiceEntry {
	if a == nil || b != nil && compareEntries(b, a) < 0 {
		return b
	}
	return a
}

func compareEntries(a, b *ServiceEntry) int {
	return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
}

// ServiceOfHost is the Service whose hostname, seen from the namespace, is the host; ok is false when no Service can have
// it. Services of other namespaces are no rivals: a noun's key has the namespace in it.
func ServiceOfHost(cfg Config, namespace, host string) (n Name, ok bool) {
	name, ok := strings.CutSuffix(host, "."+namespace+".svc."+cfg.ClusterDomain)
	return Name{namespace, name}, ok && name != "" && !strings.Contains(name, ".")
}

// HasHost reports whether a Service, or nil, keeps its hostname from ServiceEntries.
func HasHost(svc *corev1.Service) bool {
	return svc != nil && svc.Spec.Type != corev1.ServiceTypeExternalName
}

// TakenByService is who a host belongs to that a Service has, in a status.
const TakenByService = "the Service of that name"

// TakenByEntry is who a host belongs to that an older entry has, in a status.
func TakenByEntry(owner *ServiceEntry) string { return "ServiceEntry " + owner.Name }

// EntryHosts are the hosts that an entry declares services for, each once, in the order written.
func EntryHosts(se *ServiceEntry) []string {
	if isDynamic(se) && se.Spec.Location == networkingapi.ServiceEntry_MESH_INTERNAL {
		return nil
	}
	var hosts []string
	for _, h := range se.Spec.Hosts {
		if h = strings.ToLower(h); h == "" || slices.Contains(hosts, h) || strings.Contains(h, "*") && resolvesHosts(se) ||
			isDynamic(se) && !isPattern(h) {
			continue
		}
		hosts = append(hosts, h)
	}
	return hosts
}

// isDynamic reports whether waypoints resolve what clients ask for, among an entry's hosts.
func isDynamic(se *ServiceEntry) bool {
	return se.Spec.Resolution == networkingapi.ServiceEntry_DYNAMIC_DNS
}

// isPattern reports whether a host stands for others, but not for all.
func isPattern(host string) bool {
	suffix, wild := strings.CutPrefix(host, "*")
	return wild && strings.Trim(suffix, ".") != "" && !strings.Contains(suffix, "*")
}

// isAsked reports whether what is spoken on a port says which host is meant.
func isAsked(app mesh.AppProtocol) bool {
	switch app {
	case mesh.AppHTTP1, mesh.AppHTTP2, mesh.AppGRPC, mesh.AppGRPCWeb, mesh.AppTLS:
		return true
	default:
		return false
	}
}

// resolvesHosts reports whether the endpoints of an entry are what its hosts resolve to.
func resolvesHosts(se *ServiceEntry) bool {
	dns := se.Spec.Resolution == networkingapi.ServiceEntry_DNS || se.Spec.Resolution == networkingapi.ServiceEntry_DNS_ROUND_ROBIN
	return dns && len(se.Spec.Endpoints) == 0 && len(EntrySelector(se)) == 0
}

// EntrySelector picks the pods and WorkloadEntries of an entry's namespace that are its endpoints.
func EntrySelector(se *ServiceEntry) map[string]string {
	if se == nil || isDynamic(se) {
		return nil
	}
	return se.Spec.GetWorkloadSelector().GetLabels()
}

// EntryService is the service that an entry makes of one of its hosts, which these policies target, or nil: one whose hosts its waypoint
// has to find is nothing without a waypoint.
func (o Objects) EntryService(cfg Config, se *ServiceEntry, host string, policies []string) *mesh.Service {
	s := entryService(se, o.Namespaces[se.Namespace], host)
	o.BindService(cfg, &se.ObjectMeta).Set(s, policies)
	if s.Dynamic && s.Waypoint.IsZero() && len(s.WeightedWaypoints) == 0 {
		return nil
	}
	return s
}

// entryService is that before it is bound. namespace is the one it lives in, or nil.
func entryService(se *ServiceEntry, namespace *corev1.Namespace, host string) *mesh.Service {
	s := &mesh.Service{Name: se.Name, Namespace: se.Namespace, Hostname: host}
	for _, text := range se.Spec.Addresses {
		if p, err := vip(text); err == nil && !slices.Contains(s.VIPs, mesh.VIP{Prefix: p}) {
			s.VIPs = append(s.VIPs, mesh.VIP{Prefix: p})
		}
	}
	s.Dynamic = isDynamic(se)
	for _, p := range entryPorts(se) {
		port := mesh.Port{ServicePort: uint16(p.Number), TargetPort: entryTarget(p), App: appProtocols[strings.ToLower(p.Protocol)]}
		if !s.Dynamic || isAsked(port.App) {
			s.Ports = append(s.Ports, port)
		}
	}
	for _, san := range se.Spec.SubjectAltNames {
		if id, err := mesh.ParseIdentity(san); err == nil && !slices.Contains(s.SANs, id) {
			s.SANs = append(s.SANs, id)
		}
	}
	if se.Spec.Resolution == networkingapi.ServiceEntry_NONE {
		s.LB = mesh.LoadBalancing{Mode: mesh.LBPassthrough, AllowUnready: true}
		return s
	}
	s.LB.Mode, s.LB.Preference = distribution("", se.Annotations, namespace)
	return s
}

// vip reads an address or a range of them.
func vip(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" || a.IsUnspecified() {
			return p, fmt.Errorf("%q is neither an address nor a range of them", text)
		}
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	if p.Addr().Is4In6() {
		return p, fmt.Errorf("%q: write it as a range of IPv4 addresses", text)
	}
	return p.Masked(), nil
}

// entryPorts are the ports of an entry that the mesh carries.
func entryPorts(se *ServiceEntry) []*networkingapi.ServicePort {
	var ports []*networkingapi.ServicePort
	for _, p := range se.Spec.Ports {
		if p.GetNumber() >= 1 && p.GetNumber() <= 65535 && !strings.EqualFold(p.GetProtocol(), "udp") {
			ports = append(ports, p)
		}
	}
	return ports
}

// entryTarget is the port that endpoints listen on where they do not say otherwise.
func entryTarget(p *networkingapi.ServicePort) uint16 {
	if p.TargetPort >= 1 && p.TargetPort <= 65535 {
		return uint16(p.TargetPort)
	}
	return uint16(p.Number)
}

// entryPlaces adds the places that a workload has in the services of entries, the oldest first, and sorts them all by key.
// Where it has a place in a service of that key already, that one counts. named finds its port by an entry's port, or 0.
func entryPlaces(places []mesh.ServicePorts, entries []*ServiceEntry, named func(*networkingapi.ServicePort) uint16) []mesh.ServicePorts {
	for _, se := range slices.SortedFunc(slices.Values(entries), compareEntries) {
		var ports []mesh.Port
		for _, p := range entryPorts(se) {
			ports = append(ports, mesh.Port{ServicePort: uint16(p.Number), TargetPort: cmp.Or(named(p), entryTarget(p))})
		}
		for _, host := range EntryHosts(se) {
			key := mesh.ServiceKey(se.Namespace, host)
			if !slices.ContainsFunc(places, func(p mesh.ServicePorts) bool { return p.Service == key }) {
				places = append(places, mesh.ServicePorts{Service: key, Ports: ports})
			}
		}
	}
	slices.SortFunc(places, func(a, b mesh.ServicePorts) int { return cmp.Compare(a.Service, b.Service) })
	return places
}

// EntryWorkloads are the endpoints that are written into an entry. With a resolution by DNS and none written, they are its
// hosts.
func EntryWorkloads(cfg Config, se *ServiceEntry) []*mesh.Workload {
	var ws []*mesh.Workload
	for _, ep := range entryEndpoints(se) {
		uid := cfg.ClusterID + "/networking.istio.io/ServiceEntry/" + se.Namespace + "/" + se.Name + "/" + ep.Address
		if slices.ContainsFunc(ws, func(w *mesh.Workload) bool { return w.UID == uid }) {
			continue
		}
		w := entryWorkload(cfg, Name{se.Namespace, se.Name}, ep.WorkloadEntry)
		w.UID = uid
		w.Protocol, w.NativeTunnel = tunnel(se.Labels, se.Annotations)
		if p, native := tunnel(ep.Labels, nil); native {
			w.Protocol, w.NativeTunnel = p, native
		}
		canonical(w, se.Labels)
		w.Labels = filled(ep.Labels)
		w.Services = entryPlaces(nil, []*ServiceEntry{se}, ep.port)
		if ep.host != "" {
			key := mesh.ServiceKey(se.Namespace, ep.host)
			w.Services = slices.DeleteFunc(w.Services, func(p mesh.ServicePorts) bool { return p.Service != key })
		}
		ws = append(ws, w)
	}
	return ws
}

// endpoint is one of an entry: of all its hosts, or, where nothing but a host was written, of that.
type endpoint struct {
	*networkingapi.WorkloadEntry
	host string
}

func (ep endpoint) port(p *networkingapi.ServicePort) uint16 {
	return entryPort(ep.WorkloadEntry, p.GetName())
}

// entryEndpoints are the endpoints of an entry that its resolution allows.
func entryEndpoints(se *ServiceEntry) []endpoint {
	resolution := se.Spec.Resolution
	if resolution == networkingapi.ServiceEntry_NONE || isDynamic(se) || len(EntrySelector(se)) > 0 {
		return nil
	}
	var eps []endpoint
	for _, we := range se.Spec.Endpoints {
		if addr, err := entryAddress(we.GetAddress()); err == nil && (addr.IsValid() || resolution != networkingapi.ServiceEntry_STATIC) {
			eps = append(eps, endpoint{WorkloadEntry: we})
		}
	}
	if !resolvesHosts(se) {
		return eps
	}
	for _, host := range EntryHosts(se) {
		eps = append(eps, endpoint{WorkloadEntry: &networkingapi.WorkloadEntry{Address: host}, host: host})
	}
	return eps
}

// EntryStatus says what of an entry is not served as written, or nil. taken are its hosts that others declare too, whose
// word counts, each with who that is.
func (o Objects) EntryStatus(cfg Config, se *ServiceEntry, taken map[string]string) *Status {
	b := o.BindService(cfg, &se.ObjectMeta)
	return b.Status("ServiceEntry", &se.ObjectMeta, entryStatus(se, taken, b))
}

// noWaypoint is said of an entry that needs one.
const noWaypoint = "resolution DYNAMIC_DNS has no effect without a waypoint: label it " + LabelUseWaypoint

func entryStatus(se *ServiceEntry, taken map[string]string, b Binding) *Status {
	f := faults{kind: "ServiceEntry", namespace: se.Namespace, name: se.Name}
	spec := &se.Spec
	if isDynamic(se) {
		dynamicFaults(&f, spec)
		if b.Waypoint.IsZero() && b.Condition == nil {
			f.add(Ignored, noWaypoint)
		}
	}
	for _, host := range EntryHosts(se) {
		if owner, ok := taken[host]; ok {
			f.add(Ignored, "host %s is declared by %s, whose addresses and ports count", host, owner)
		}
	}
	if len(spec.Hosts) == 0 {
		f.add(Invalid, "there is no host")
	}
	addresses := 0
	for i, text := range spec.Addresses {
		if _, err := vip(text); err != nil {
			f.add(Invalid, "addresses[%d]: %v", i, err)
			continue
		}
		addresses++
	}
	if addresses == 0 {
		f.add(Ignored, "there are no addresses, and the mesh neither allocates any nor answers DNS yet: connections to its "+
			"hosts go where applications resolve them to")
	}
	entryPortFaults(&f, se)
	entryEndpointFaults(&f, se, addresses)
	for _, san := range spec.SubjectAltNames {
		if _, err := mesh.ParseIdentity(san); err != nil {
			f.add(Unsupported, "subjectAltNames: left out %q, which is not a SPIFFE identity", san)
		}
	}
	if len(spec.ExportTo) > 0 && !slices.Contains(spec.ExportTo, "*") {
		f.add(Unsupported, "exportTo has no effect on node proxies")
	}
	if se.Annotations[AnnotationConnectStrategy] != "" {
		f.add(Unsupported, "annotation %s has no effect", AnnotationConnectStrategy)
	}
	return f.status()
}

// dynamicFaults are those of an entry whose hosts its waypoint is to find.
func dynamicFaults(f *faults, spec *networkingapi.ServiceEntry) {
	if spec.Location == networkingapi.ServiceEntry_MESH_INTERNAL {
		f.add(Unsupported, "location MESH_INTERNAL: hosts that waypoints resolve are outside of the mesh, nothing is served")
	}
	patterns := 0
	for _, host := range spec.Hosts {
		if isPattern(strings.ToLower(host)) {
			patterns++
		} else {
			f.add(Invalid, "host %s is left out: resolution DYNAMIC_DNS is for hosts that begin with * and go on; name others with resolution DNS", host)
		}
	}
	if patterns > 1 && len(spec.Addresses) > 0 {
		f.add(Unsupported, "several hosts share the addresses: node proxies cannot tell them apart and take the first by name")
	}
}

func entryPortFaults(f *faults, se *ServiceEntry) {
	for i, p := range se.Spec.Ports {
		app, known := appProtocols[strings.ToLower(p.GetProtocol())]
		switch {
		case p.GetNumber() < 1 || p.GetNumber() > 65535:
			f.add(Invalid, "ports[%d]: %d is not a port", i, p.GetNumber())
		case p.GetTargetPort() > 65535:
			f.add(Invalid, "ports[%d].targetPort: %d is not a port", i, p.GetTargetPort())
		case strings.EqualFold(p.GetProtocol(), "udp"):
			f.add(Unsupported, "ports[%d]: left out, the mesh carries TCP only", i)
		case isDynamic(se) && !isAsked(app):
			f.add(Invalid, "ports[%d]: left out: with resolution DYNAMIC_DNS protocol is HTTP, HTTP2, GRPC, GRPC-WEB, HTTPS or TLS, which tell whom they are for", i)
		case !known && p.GetProtocol() != "":
			f.add(Unsupported, "ports[%d].protocol: %q is taken for TCP", i, p.GetProtocol())
		}
	}
}

func entryEndpointFaults(f *faults, se *ServiceEntry, addresses int) {
	spec := &se.Spec
	switch {
	case len(spec.Endpoints) == 0:
	case isDynamic(se):
		f.add(Invalid, "endpoints make no sense with resolution DYNAMIC_DNS: they are left out")
		return
	case len(EntrySelector(se)) > 0:
		f.add(Invalid, "endpoints and workloadSelector exclude each other: endpoints are left out")
		return
	case spec.Resolution == networkingapi.ServiceEntry_NONE:
		f.add(Invalid, "endpoints make no sense with resolution NONE, which keeps the destination: they are left out")
		return
	}
	seen := make(map[string]bool)
	for i, we := range spec.Endpoints {
		addr, err := entryAddress(we.GetAddress())
		switch {
		case err != nil:
			f.add(Unsupported, "endpoints[%d]: left out: %v", i, err)
			continue
		case !addr.IsValid() && spec.Resolution == networkingapi.ServiceEntry_STATIC:
			f.add(Invalid, "endpoints[%d]: left out: resolution STATIC wants an address, not %q", i, we.Address)
			continue
		case seen[we.Address]:
			f.add(Unsupported, "endpoints[%d]: left out: %s is there already", i, we.Address)
			continue
		}
		seen[we.Address] = true
		workloadFaults(f, fmt.Sprintf("endpoints[%d].", i), we)
	}
	if !resolvesHosts(se) {
		return
	}
	for _, host := range spec.Hosts {
		if strings.Contains(host, "*") {
			f.add(Invalid, "host %s is left out, for it cannot be resolved: it needs endpoints, or resolution NONE", host)
		}
	}
	if len(EntryHosts(se)) > 1 && addresses > 0 {
		f.add(Unsupported, "several hosts share the addresses: node proxies cannot tell them apart and take the first by name")
	}
}
