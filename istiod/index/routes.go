package index

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/translate"
)

// What says where requests go. A route refers to others by name: services, delegates, grants. What it asked for when it was
// translated is remembered, and it is translated again when an answer changes.

// router is an object that routes.
type router struct {
	kind Kind
	name name
}

// topic is what a route may ask about.
type topic struct {
	about about
	text  string // a hostname or suffix
	name  name   // of an object; of grants the namespace
}

type about uint8

const (
	aboutHost           about = iota // the services of a hostname
	aboutSuffix                      // those whose hostnames end in a suffix
	aboutHosted                      // the VirtualServices of a host
	aboutEntry                       // a ServiceEntry
	aboutVirtualService              // a VirtualService
	aboutDelegated                   // whether one delegates to a VirtualService
	aboutGrants                      // the ReferenceGrants of a namespace
)

// routing says who asked about what, and knows the answers.
type routing struct {
	asked  map[router][]topic
	asking map[topic]set[router]
	made   map[router][]string // keys of the routes made from an object

	hosts     map[string]set[string] // keys of services by hostname
	below     map[string]set[string] // and by each suffix of it
	hosted    map[string]set[name]   // VirtualServices by each of their hosts
	delegated map[name]set[name]     // VirtualServices that delegate, by whom they name
	grants    map[string]set[name]   // ReferenceGrants by namespace
}

func newRouting() routing {
	return routing{asked: make(map[router][]topic), asking: make(map[topic]set[router]), made: make(map[router][]string),
		hosts: make(map[string]set[string]), below: make(map[string]set[string]), hosted: make(map[string]set[name]),
		delegated: make(map[name]set[name]), grants: make(map[string]set[name])}
}

// tell marks the routes that asked about something that is different now.
func (x *Index) tell(t topic) { maps.Copy(x.dirty.routes, x.routing.asking[t]) }

// serviceChanged follows the noun of a service.
func (x *Index) serviceChanged(key string, there bool) {
	_, hostname, _ := strings.Cut(key, "/")
	x.tell(topic{about: aboutHost, text: hostname})
	record := unlink[string, string]
	if there {
		record = link[string, string]
	}
	record(x.routing.hosts, hostname, key)
	for suffix := range suffixes(hostname) {
		record(x.routing.below, suffix, key)
		x.tell(topic{about: aboutSuffix, text: suffix})
	}
}

// suffixes are what a wildcard that covers a hostname may end in, the longest first: all of it, each part that begins with
// a dot, and "".
func suffixes(hostname string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for rest := hostname; rest != ""; {
			if (rest[0] == '.') && !yield(rest) {
				return
			}
			i := strings.IndexByte(rest[1:], '.')
			if i < 0 {
				break
			}
			rest = rest[1+i:]
		}
		yield("")
	}
}

func (x *Index) virtualService(n name, now *networkingv1.VirtualService) {
	if old := x.objects.VirtualServices[n]; old != nil {
		for _, h := range translate.VirtualServiceHosts(x.cfg, old) {
			unlink(x.routing.hosted, h, n)
			x.tell(topic{about: aboutHosted, text: h})
		}
		for _, d := range translate.Delegates(old) {
			unlink(x.routing.delegated, d, n)
			x.tell(topic{about: aboutDelegated, name: d})
		}
	}
	keep(x.objects.VirtualServices, n, now)
	if now != nil {
		for _, h := range translate.VirtualServiceHosts(x.cfg, now) {
			link(x.routing.hosted, h, n)
			x.tell(topic{about: aboutHosted, text: h})
		}
		for _, d := range translate.Delegates(now) {
			link(x.routing.delegated, d, n)
			x.tell(topic{about: aboutDelegated, name: d})
		}
	}
	x.tell(topic{about: aboutVirtualService, name: n})
	x.dirty.routes[router{VirtualService, n}] = struct{}{}
}

func (x *Index) httpRoute(n name, now *gatewayv1.HTTPRoute) {
	keep(x.objects.HTTPRoutes, n, now)
	x.dirty.routes[router{HTTPRoute, n}] = struct{}{}
}

func (x *Index) grpcRoute(n name, now *gatewayv1.GRPCRoute) {
	keep(x.objects.GRPCRoutes, n, now)
	x.dirty.routes[router{GRPCRoute, n}] = struct{}{}
}

func (x *Index) tcpRoute(n name, now *gatewayv1.TCPRoute) {
	keep(x.objects.TCPRoutes, n, now)
	x.dirty.routes[router{TCPRoute, n}] = struct{}{}
}

func (x *Index) tlsRoute(n name, now *gatewayv1.TLSRoute) {
	keep(x.objects.TLSRoutes, n, now)
	x.dirty.routes[router{TLSRoute, n}] = struct{}{}
}

func (x *Index) referenceGrant(n name, now *gatewayv1.ReferenceGrant) {
	keep(x.objects.ReferenceGrants, n, now)
	if now != nil {
		link(x.routing.grants, n.Namespace, n)
	} else {
		unlink(x.routing.grants, n.Namespace, n)
	}
	x.tell(topic{about: aboutGrants, name: name{Namespace: n.Namespace}})
}

func (x *Index) refreshRoute(r router) {
	c := catalogue{x: x, asked: make(set[topic])}
	var out translate.Routing
	var s *translate.RouteStatus
	o := &x.objects
	switch r.kind {
	case VirtualService:
		if vs := o.VirtualServices[r.name]; vs != nil {
			out = translate.VirtualService(x.cfg, vs, c)
		}
	case HTTPRoute:
		if route := o.HTTPRoutes[r.name]; route != nil {
			out, s = translate.HTTPRoute(x.cfg, route, c)
		}
	case GRPCRoute:
		if route := o.GRPCRoutes[r.name]; route != nil {
			out, s = translate.GRPCRoute(x.cfg, route, c)
		}
	case TCPRoute:
		if route := o.TCPRoutes[r.name]; route != nil {
			out, s = translate.TCPRoute(x.cfg, route, c)
		}
	case TLSRoute:
		if route := o.TLSRoutes[r.name]; route != nil {
			out, s = translate.TLSRoute(x.cfg, route, c)
		}
	default:
	}
	x.remember(r, c.asked)
	keys := make([]string, 0, len(out.Routes))
	for _, route := range out.Routes {
		keys = append(keys, route.Key())
		x.putRoute(route.Key(), route)
	}
	for _, key := range x.routing.made[r] {
		if !slices.Contains(keys, key) {
			x.putRoute(key, nil)
		}
	}
	if len(keys) == 0 {
		delete(x.routing.made, r)
	} else {
		x.routing.made[r] = keys
	}
	x.putStatus(r.kind, r.name, out.Status)
	if r.kind != VirtualService {
		x.putRouteStatus((&translate.RouteStatus{Kind: r.kind.String(), Namespace: r.name.Namespace, Name: r.name.Name}).Key(), s)
	}
}

// remember records what a route asked about, instead of what it asked about before.
func (x *Index) remember(r router, asked set[topic]) {
	for _, t := range x.routing.asked[r] {
		if _, still := asked[t]; !still {
			unlink(x.routing.asking, t, r)
		}
	}
	if len(asked) == 0 {
		delete(x.routing.asked, r)
		return
	}
	for t := range asked {
		link(x.routing.asking, t, r)
	}
	x.routing.asked[r] = slices.Collect(maps.Keys(asked))
}

// catalogue answers from the index, and takes note of what was asked.
type catalogue struct {
	x     *Index
	asked set[topic]
}

func (c catalogue) note(t topic) { c.asked[t] = struct{}{} }

func (c catalogue) services(keys set[string]) []*mesh.Service {
	found := make([]*mesh.Service, 0, len(keys))
	for key := range keys {
		found = append(found, c.x.nouns.Services[key])
	}
	slices.SortFunc(found, func(a, b *mesh.Service) int { return cmp.Compare(a.Key(), b.Key()) })
	return found
}

func (c catalogue) ServicesOf(hostname string) []*mesh.Service {
	c.note(topic{about: aboutHost, text: hostname})
	return c.services(c.x.routing.hosts[hostname])
}

func (c catalogue) ServicesBelow(suffix string) []*mesh.Service {
	c.note(topic{about: aboutSuffix, text: suffix})
	return c.services(c.x.routing.below[suffix])
}

func (c catalogue) Entry(n translate.Name) *translate.ServiceEntry {
	c.note(topic{about: aboutEntry, name: n})
	return c.x.objects.ServiceEntries[n]
}

func (c catalogue) VirtualService(n translate.Name) *networkingv1.VirtualService {
	c.note(topic{about: aboutVirtualService, name: n})
	return c.x.objects.VirtualServices[n]
}

func (c catalogue) IsDelegated(n translate.Name) bool {
	c.note(topic{about: aboutDelegated, name: n})
	return len(c.x.routing.delegated[n]) > 0
}

func (c catalogue) VirtualServicesOf(host string) (found []*networkingv1.VirtualService) {
	c.note(topic{about: aboutHosted, text: host})
	for n := range c.x.routing.hosted[host] {
		found = append(found, c.x.objects.VirtualServices[n])
	}
	return found
}

func (c catalogue) Grants(namespace string) (found []*gatewayv1.ReferenceGrant) {
	c.note(topic{about: aboutGrants, name: name{Namespace: namespace}})
	for n := range c.x.routing.grants[namespace] {
		found = append(found, c.x.objects.ReferenceGrants[n])
	}
	return found
}
