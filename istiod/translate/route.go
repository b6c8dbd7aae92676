package translate

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Catalogue is what routes refer to by name. Package index takes note of what is asked, and translates a route again when
// one of the answers changes.
type Catalogue interface {
	// ServicesOf are the services of that hostname, in order of their namespaces.
	ServicesOf(hostname string) []*mesh.Service
	// ServicesBelow are the services whose hostnames end in the suffix, which begins with a dot or is "", in order of their keys.
	ServicesBelow(suffix string) []*mesh.Service
	// Entry is the ServiceEntry of that name, or nil.
	Entry(Name) *ServiceEntry
	// VirtualService is the VirtualService of that name, or nil.
	VirtualService(Name) *networkingv1.VirtualService
	// IsDelegated reports whether a VirtualService delegates to the one of that name.
	IsDelegated(Name) bool
	// VirtualServicesOf are the VirtualServices one of whose hosts, as VirtualServiceHosts has them, is exactly that, by name.
	VirtualServicesOf(host string) []*networkingv1.VirtualService
	// Grants are the ReferenceGrants of a namespace, in order of their names.
	Grants(namespace string) []*gatewayv1.ReferenceGrant
}

// Routing is what one object that routes means.
type Routing struct {
	Routes []*mesh.Route
	Status *Status // nil: all is as written
}

// ruleNotes gathers what is wrong with one rule. What makes a rule invalid is kept with it: it refuses requests then.
type ruleNotes struct {
	*faults
	at      string // of the rule in its object: "http[0]"
	invalid []string
}

// refuse notes what makes the rule refuse the requests it matches.
func (n *ruleNotes) refuse(field, format string, args ...any) {
	text := n.at + dotted(field) + ": " + fmt.Sprintf(format, args...)
	n.invalid = append(n.invalid, text)
	n.add(Invalid, "%s", text)
}

// note notes what of the rule is not as written.
func (n *ruleNotes) note(r StatusReason, field, format string, args ...any) {
	n.add(r, "%s: %s", n.at+dotted(field), fmt.Sprintf(format, args...))
}

// dotted puts a dot in front of the name of a field, but not of an index.
func dotted(field string) string {
	if field == "" || field[0] == '[' {
		return field
	}
	return "." + field
}

// verdict ends the notes: it says why the rule refuses the requests that it matches, or "" when it does not.
func (n *ruleNotes) verdict() string {
	if len(n.invalid) > 0 {
		n.add(Invalid, "%s: refuses the requests that it matches, as it cannot be understood", n.at)
	}
	return strings.Join(n.invalid, "; ")
}

// created is when an object was made, as routes carry it.
func created(m *metav1.ObjectMeta) time.Time {
	if m.CreationTimestamp.IsZero() {
		return time.Time{}
	}
	return m.CreationTimestamp.UTC().Truncate(time.Second)
}

// serviceOf picks, of the services of a hostname, the one that an object of the namespace means: its own namespace's,
// then that of the platform, then the first. It is nil when there is none.
func serviceOf(c Catalogue, namespace, hostname string) *mesh.Service {
	var best *mesh.Service
	rank := func(s *mesh.Service) int {
		switch {
		case s.Namespace == namespace:
			return 2
		case s.Canonical:
			return 1
		}
		return 0
	}
	for _, s := range c.ServicesOf(hostname) {
		if s.NamespaceOnly && s.Namespace != namespace {
			continue
		}
		if best == nil || rank(s) > rank(best) {
			best = s
		}
	}
	return best
}

// fullHost is a host as it is known to the mesh: a name without a dot is that of a Service of the namespace.
func fullHost(cfg Config, namespace, host string) string {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if host == "" || host == "*" || strings.Contains(host, ".") || strings.Contains(host, ":") {
		return host
	}
	return Hostname(cfg, Name{namespace, host})
}

// compareParents is the order of a route's parents.
func compareParents(a, b mesh.RouteParent) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Hostname, b.Hostname), cmp.Compare(a.Port, b.Port),
		cmp.Compare(a.Clients, b.Clients))
}

func sortedParents(parents []mesh.RouteParent) []mesh.RouteParent {
	slices.SortFunc(parents, compareParents)
	return slices.Compact(parents)
}

// routes translates all that routes, once the services are known.
func (o Objects) routes(cfg Config, n Nouns) {
	c := plainCatalogue{cfg, o, n.Services}
	take := func(r Routing, s *RouteStatus) {
		for _, route := range r.Routes {
			n.Routes[route.Key()] = route
		}
		if r.Status != nil {
			n.Statuses[r.Status.Key()] = r.Status
		}
		if s != nil {
			n.RouteStatuses[s.Key()] = s
		}
	}
	for _, vs := range o.VirtualServices {
		take(VirtualService(cfg, vs, c), nil)
	}
	for _, r := range o.HTTPRoutes {
		take(HTTPRoute(cfg, r, c))
	}
	for _, r := range o.GRPCRoutes {
		take(GRPCRoute(cfg, r, c))
	}
	for _, r := range o.TCPRoutes {
		take(TCPRoute(cfg, r, c))
	}
	for _, r := range o.TLSRoutes {
		take(TLSRoute(cfg, r, c))
	}
}

// plainCatalogue answers by looking at everything.
type plainCatalogue struct {
	cfg      Config
	o        Objects
	services map[string]*mesh.Service
}

func (c plainCatalogue) where(keep func(*mesh.Service) bool) (found []*mesh.Service) {
	for _, s := range c.services {
		if keep(s) {
			found = append(found, s)
		}
	}
	slices.SortFunc(found, func(a, b *mesh.Service) int { return cmp.Compare(a.Key(), b.Key()) })
	return found
}

func (c plainCatalogue) ServicesOf(hostname string) []*mesh.Service {
	return c.where(func(s *mesh.Service) bool { return s.Hostname == hostname })
}

func (c plainCatalogue) ServicesBelow(suffix string) []*mesh.Service {
	return c.where(func(s *mesh.Service) bool { return strings.HasSuffix(s.Hostname, suffix) })
}

func (c plainCatalogue) Entry(n Name) *ServiceEntry { return c.o.ServiceEntries[n] }

func (c plainCatalogue) VirtualService(n Name) *networkingv1.VirtualService {
	return c.o.VirtualServices[n]
}

func (c plainCatalogue) IsDelegated(n Name) bool {
	for _, vs := range c.o.VirtualServices {
		if slices.Contains(Delegates(vs), n) {
			return true
		}
	}
	return false
}

func (c plainCatalogue) VirtualServicesOf(host string) (found []*networkingv1.VirtualService) {
	for _, vs := range c.o.VirtualServices {
		if slices.Contains(VirtualServiceHosts(c.cfg, vs), host) {
			found = append(found, vs)
		}
	}
	slices.SortFunc(found, func(a, b *networkingv1.VirtualService) int {
		return compareNames(Name{a.Namespace, a.Name}, Name{b.Namespace, b.Name})
	})
	return found
}

func (c plainCatalogue) Grants(namespace string) (found []*gatewayv1.ReferenceGrant) {
	for n, g := range c.o.ReferenceGrants {
		if n.Namespace == namespace {
			found = append(found, g)
		}
	}
	slices.SortFunc(found, func(a, b *gatewayv1.ReferenceGrant) int { return cmp.Compare(a.Name, b.Name) })
	return found
}
