package translate

import (
	"fmt"
	"math"
	"slices"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// backendRef is where a reference to a backend leads. A Service or, by kind Hostname, anything the mesh knows under a name.
// What lies in another namespace needs a ReferenceGrant there, unless it is a parent of the route: its traffic went there
// anyway.
func (g *gatewayRoute) backendRef(n *ruleNotes, field string, in gatewayv1.BackendObjectReference) mesh.BackendRef {
	refuse := func(r StatusReason, format string, args ...any) mesh.BackendRef {
		message := fmt.Sprintf(format, args...)
		g.dangle(n, r, field, message+": its share of the requests is refused")
		return mesh.BackendRef{Invalid: message}
	}
	group, kind := string(valueOf(in.Group)), string(valueOf(in.Kind))
	if kind == "" {
		kind = "Service"
	}
	namespace := g.meta.Namespace
	if in.Namespace != nil {
		namespace = string(*in.Namespace)
	}
	var svc *mesh.Service
	name := Name{namespace, string(in.Name)}
	switch {
	case group == "" && kind == "Service":
		host := Hostname(g.cfg, name)
		parent := slices.ContainsFunc(g.parents, func(p mesh.RouteParent) bool { return p.Namespace == namespace && p.Hostname == host })
		if namespace != g.meta.Namespace && !parent && !g.granted(name) {
			return refuse(RefNotPermitted, "no ReferenceGrant of namespace %s lets a %s of this one refer to Service %s", namespace, g.kind, in.Name)
		}
		services := g.c.ServicesOf(host)
		if i := slices.IndexFunc(services, func(s *mesh.Service) bool { return s.Namespace == namespace }); i >= 0 {
			svc = services[i]
		}
		if svc == nil {
			return refuse(BackendNotFound, "no Service %s is known to the mesh", name)
		}
	case group == groupNetworking && kind == "Hostname":
		if svc = serviceOf(g.c, g.meta.Namespace, fullHost(g.cfg, g.meta.Namespace, string(in.Name))); svc == nil {
			return refuse(BackendNotFound, "no service %s is known to the mesh", in.Name)
		}
	default:
		return refuse(InvalidKind, "a %s of group %q is not a backend; Service of \"\" and Hostname of %s are", kind, group, groupNetworking)
	}
	ref := mesh.BackendRef{Namespace: svc.Namespace, Hostname: svc.Hostname}
	number := valueOf(in.Port)
	switch {
	case number == 0 && len(svc.Ports) == 1:
		ref.Port = svc.Ports[0].ServicePort
	case number == 0:
		return refuse(BackendNotFound, "%s has %d ports, and no port is named", svc.Hostname, len(svc.Ports))
	case number > 0 && number <= math.MaxUint16:
		ref.Port = uint16(number)
	}
	if _, ok := svc.Port(ref.Port); !ok {
		return refuse(BackendNotFound, "%s has no port %d", svc.Hostname, number)
	}
	return ref
}

// granted reports whether a ReferenceGrant lets routes of this kind and namespace refer to a Service.
func (g *gatewayRoute) granted(to Name) bool {
	return slices.ContainsFunc(g.c.Grants(to.Namespace), func(grant *gatewayv1.ReferenceGrant) bool {
		return slices.ContainsFunc(grant.Spec.From, func(f gatewayv1.ReferenceGrantFrom) bool {
			return f.Group == groupGateway && string(f.Kind) == g.kind.String() && string(f.Namespace) == g.meta.Namespace
		}) && slices.ContainsFunc(grant.Spec.To, func(t gatewayv1.ReferenceGrantTo) bool {
			return t.Group == "" && t.Kind == "Service" && (valueOf(t.Name) == "" || string(*t.Name) == to.Name)
		})
	})
}

// share is the weight of a backend, 1 where none is given.
func share(n *ruleNotes, field string, w *int32) uint32 {
	switch {
	case w == nil:
		return 1
	case *w < 0:
		n.refuse(field+".weight", "%d is less than 0", *w)
		return 0
	}
	return uint32(*w)
}

// streamBackends are those of a rule about connections.
func (g *gatewayRoute) streamBackends(n *ruleNotes, refs []gatewayv1.BackendRef) (backends []mesh.Backend) {
	for i, ref := range refs {
		at := fmt.Sprintf("backendRefs[%d]", i)
		backends = append(backends, mesh.Backend{Ref: g.backendRef(n, at, ref.BackendObjectReference), Weight: share(n, at, ref.Weight)})
	}
	return backends
}
