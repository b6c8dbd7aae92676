package translate

import (
	"fmt"
	"slices"
	"strings"

	networkingapi "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// MeshGateway is the gateway that stands for everybody in the mesh.
const MeshGateway = "mesh"

// VirtualService returns the routes of a VirtualService: one for each rule, in its order, with those of a delegate in the
// place of the rule that delegates. Its parents are the services that its hosts name, or cover with a wildcard unless a
// VirtualService names them more closely.
func VirtualService(cfg Config, vs *networkingv1.VirtualService, c Catalogue) Routing {
	v := vsTranslator{cfg: cfg, vs: vs, c: c, faults: faults{kind: "VirtualService", namespace: vs.Namespace, name: vs.Name}}
	if isDelegate(vs) {
		if !c.IsDelegated(Name{vs.Namespace, vs.Name}) {
			v.add(Ignored, "without hosts it is for others to delegate to, and none does")
		}
		if len(vs.Spec.Tls)+len(vs.Spec.Tcp) > 0 {
			v.add(Ignored, "tls and tcp cannot be delegated to")
		}
		return Routing{Status: v.status()}
	}
	parents := v.parents()
	if len(parents) > 0 {
		v.rules(parents)
	}
	return Routing{Routes: v.routes, Status: v.status()}
}

// VirtualServiceHosts are the hosts for which a VirtualService speaks in the mesh, fully qualified, each once; none when it
// speaks for gateways only.
func VirtualServiceHosts(cfg Config, vs *networkingv1.VirtualService) []string {
	if !forMesh(vs.Spec.Gateways) {
		return nil
	}
	var hosts []string
	for _, h := range vs.Spec.Hosts {
		if h = fullHost(cfg, vs.Namespace, h); h != "" && !slices.Contains(hosts, h) {
			hosts = append(hosts, h)
		}
	}
	return hosts
}

// Delegates are the VirtualServices that one delegates to.
func Delegates(vs *networkingv1.VirtualService) []Name {
	var names []Name
	for _, h := range vs.Spec.Http {
		if d := h.GetDelegate(); d != nil {
			names = append(names, delegateName(vs.Namespace, d))
		}
	}
	return names
}

// isDelegate: others say for which hosts its rules are.
func isDelegate(vs *networkingv1.VirtualService) bool { return len(vs.Spec.Hosts) == 0 }

// forMesh reports whether a list of gateways includes the mesh, which it does when it is empty.
func forMesh(gateways []string) bool {
	return len(gateways) == 0 || slices.Contains(gateways, MeshGateway)
}

type vsTranslator struct {
	cfg Config
	vs  *networkingv1.VirtualService
	c   Catalogue
	faults
	routes []*mesh.Route
}

// parents are the services whose traffic the rules are for.
func (v *vsTranslator) parents() []mesh.RouteParent {
	spec := &v.vs.Spec
	for i, g := range spec.Gateways {
		if g != MeshGateway {
			v.add(Unsupported, "gateways[%d]: left out %s: there are no gateways of Istio's kind here, only the mesh", i, g)
		}
	}
	if !forMesh(spec.Gateways) {
		v.add(Ignored, "none of its gateways is mesh: its rules have no effect, and ingress is not served yet; add mesh to have them at waypoints")
		return nil
	}
	clients := exportedTo(v.cfg, v.vs)
	if len(clients) == 0 {
		v.add(Ignored, "exportTo: nobody is to see it")
		return nil
	}
	var parents []mesh.RouteParent
	for i, host := range spec.Hosts {
		full := fullHost(v.cfg, v.vs.Namespace, host)
		found := v.servicesOf(full, clients)
		switch {
		case len(found) > 0:
		case v.covers(full):
			v.add(Ignored, "hosts[%d]: of the services that %s covers none is left: other VirtualServices name each more closely, or it is "+
				"not seen from the namespaces of exportTo", i, host)
		default:
			v.add(Ignored, "hosts[%d]: no service %s is known to the mesh", i, host)
		}
		parents = append(parents, found...)
	}
	return sortedParents(parents)
}

// covers reports whether a wildcard stands for any service, be it one that others name more closely.
func (v *vsTranslator) covers(host string) bool {
	suffix, wild := strings.CutPrefix(host, "*")
	return wild && (suffix == "" || suffix[0] == '.') && len(v.c.ServicesBelow(suffix)) > 0
}

// servicesOf are the parents that a host stands for.
func (v *vsTranslator) servicesOf(host string, clients []string) (parents []mesh.RouteParent) {
	suffix, wild := strings.CutPrefix(host, "*")
	wild = wild && (suffix == "" || suffix[0] == '.')
	services := v.c.ServicesOf(host)
	if wild {
		services = v.c.ServicesBelow(suffix)
	}
	for _, s := range services {
		for _, client := range clients {
			if wild && s.Hostname != host && v.closer(s.Hostname, suffix, client) || s.NamespaceOnly && client != s.Namespace {
				continue
			}
			parents = append(parents, mesh.RouteParent{Namespace: s.Namespace, Hostname: s.Hostname, Clients: client})
		}
	}
	return parents
}

// closer reports whether a VirtualService that the client sees names the service more closely than a wildcard with the
// suffix does.
func (v *vsTranslator) closer(hostname, suffix, client string) bool {
	seen := func(host string) bool {
		return slices.ContainsFunc(v.c.VirtualServicesOf(host), func(vs *networkingv1.VirtualService) bool {
			to := exportedTo(v.cfg, vs)
			return slices.Contains(to, "") || slices.Contains(to, client)
		})
	}
	if seen(hostname) {
		return true
	}
	for rest := hostname; ; {
		i := strings.IndexByte(rest[1:], '.')
		if i < 0 {
			return false
		}
		if rest = rest[1+i:]; len(rest) <= len(suffix) {
			return false
		}
		if seen("*" + rest) {
			return true
		}
	}
}

// exportedTo are the namespaces whose clients see a VirtualService: "" for all of them, none for nobody.
func exportedTo(cfg Config, vs *networkingv1.VirtualService) []string {
	exportTo := vs.Spec.ExportTo
	if len(exportTo) == 0 {
		exportTo = cfg.VirtualServiceExportTo
	}
	if len(exportTo) == 0 || slices.Contains(exportTo, "*") {
		return []string{""}
	}
	var clients []string
	for _, to := range exportTo {
		switch to {
		case "~", "":
			continue
		case ".":
			to = vs.Namespace
		}
		if !slices.Contains(clients, to) {
			clients = append(clients, to)
		}
	}
	return clients
}

// rules makes a route of every rule.
func (v *vsTranslator) rules(parents []mesh.RouteParent) {
	route := func(protocol mesh.RouteProtocol, i int) *mesh.Route {
		return &mesh.Route{Kind: mesh.KindVirtualService, Namespace: v.vs.Namespace, Name: v.vs.Name, Protocol: protocol, Rule: uint32(i),
			Created: created(&v.vs.ObjectMeta), Parents: parents}
	}
	for i, h := range v.http() {
		n := ruleNotes{faults: &v.faults, at: h.at}
		r := route(mesh.RouteHTTP, i)
		var ok bool
		if r.HTTP, ok = v.httpRule(&n, h); !ok {
			continue
		}
		r.RuleName, r.Invalid = h.rule.GetName(), n.verdict()
		v.routes = append(v.routes, r)
	}
	for i, t := range v.vs.Spec.Tls {
		n := ruleNotes{faults: &v.faults, at: fmt.Sprintf("tls[%d]", i)}
		r := route(mesh.RouteTLS, i)
		var ok bool
		if r.Stream, ok = v.tlsRule(&n, t); !ok {
			continue
		}
		r.Invalid = n.verdict()
		v.routes = append(v.routes, r)
	}
	for i, t := range v.vs.Spec.Tcp {
		n := ruleNotes{faults: &v.faults, at: fmt.Sprintf("tcp[%d]", i)}
		r := route(mesh.RouteTCP, i)
		var ok bool
		if r.Stream, ok = v.tcpRule(&n, t); !ok {
			continue
		}
		r.Invalid = n.verdict()
		v.routes = append(v.routes, r)
	}
}

// destination is where a destination of the namespace leads.
func (v *vsTranslator) destination(n *ruleNotes, field, namespace string, d *networkingapi.Destination) mesh.BackendRef {
	if d.GetHost() == "" {
		n.note(Invalid, field, "destination.host is empty: its share of the requests is refused")
		return mesh.BackendRef{Invalid: "destination without a host"}
	}
	host := fullHost(v.cfg, namespace, d.GetHost())
	ref := mesh.BackendRef{Hostname: host, Subset: d.GetSubset()}
	refuse := func(format string, args ...any) mesh.BackendRef {
		ref.Invalid = fmt.Sprintf(format, args...)
		n.note(Invalid, field, "%s: its share of the requests is refused", ref.Invalid)
		return ref
	}
	number := d.GetPort().GetNumber()
	if number > 65535 {
		return refuse("%d is not a port", number)
	}
	ref.Port = uint16(number)
	svc := serviceOf(v.c, namespace, host)
	if svc == nil {
		return refuse("no service %s is known to the mesh", host)
	}
	ref.Namespace = svc.Namespace
	switch {
	case ref.Port == 0 && len(svc.Ports) == 1:
		ref.Port = svc.Ports[0].ServicePort
	case ref.Port != 0:
		if _, ok := svc.Port(ref.Port); !ok {
			return refuse("service %s has no port %d", host, ref.Port)
		}
	}
	return ref
}
