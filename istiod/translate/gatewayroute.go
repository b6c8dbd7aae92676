package translate

import (
	"fmt"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// The groups of kinds that routes of the Gateway API refer to; that of a Service is "".
const (
	groupGateway    = "gateway.networking.k8s.io"
	groupNetworking = "networking.istio.io"
)

// Reasons of a Status of a route, which are those of its conditions too.
const (
	BackendNotFound StatusReason = StatusReason(gatewayv1.RouteReasonBackendNotFound)
	InvalidKind     StatusReason = StatusReason(gatewayv1.RouteReasonInvalidKind)
	RefNotPermitted StatusReason = StatusReason(gatewayv1.RouteReasonRefNotPermitted)
)

// RouteStatus is what the status of a route of the Gateway API is to say of its parents in the mesh, or that of a BackendTLSPolicy of
// its ancestors, which are its targets.
type RouteStatus struct {
	Kind       string // of the object, as in YAML: "HTTPRoute"
	Namespace  string
	Name       string
	Generation int64 // of what was looked at
	Parents    []ParentStatus
}

// Key names what the status is about: Kind namespace/name.
func (s *RouteStatus) Key() string { return s.Kind + " " + s.Namespace + "/" + s.Name }

// ParentStatus is what became of a route below one parent.
type ParentStatus struct {
	Ref        gatewayv1.ParentReference
	Conditions []Condition
}

// gatewayRoute is a route of the Gateway API under way.
type gatewayRoute struct {
	cfg  Config
	c    Catalogue
	kind mesh.RouteKind
	meta *metav1.ObjectMeta
	faults

	parents  []mesh.RouteParent
	statuses []ParentStatus // of parents in the mesh; conditions come at the end

	rules, refused     int    // how many there are, and how many of them refuse
	refusal            string // why the first one does
	unresolved         StatusReason
	unresolvedMessages []string
	routes             []*mesh.Route
}

func newGatewayRoute(cfg Config, c Catalogue, kind mesh.RouteKind, meta *metav1.ObjectMeta) *gatewayRoute {
	return &gatewayRoute{cfg: cfg, c: c, kind: kind, meta: meta, faults: faults{kind: kind.String(), namespace: meta.Namespace, name: meta.Name}}
}

func (g *gatewayRoute) protocol() mesh.RouteProtocol {
	switch g.kind {
	case mesh.KindTLSRoute:
		return mesh.RouteTLS
	case mesh.KindTCPRoute:
		return mesh.RouteTCP
	default:
		return mesh.RouteHTTP
	}
}

// attach finds the services among the parents, and reports whether there is one, known or not. Parents of other kinds are
// no business of the mesh.
func (g *gatewayRoute) attach(refs []gatewayv1.ParentReference) bool {
	for i, ref := range refs {
		kind := valueOf(ref.Kind)
		if kind != "Service" && kind != "ServiceEntry" {
			continue
		}
		at := fmt.Sprintf("parentRefs[%d]", i)
		group := string(valueOf(ref.Group))
		if ref.Group == nil { // what an API server fills in is not what is meant
			group = map[gatewayv1.Kind]string{"ServiceEntry": groupNetworking}[kind]
		}
		if kind == "Service" && group != "" || kind == "ServiceEntry" && group != groupNetworking {
			g.add(Ignored, "%s: kind %s is not of group %q; the group of a Service is \"\", that of a ServiceEntry %s", at, kind, group, groupNetworking)
			continue
		}
		reason, message := g.attachTo(ref)
		if message != "" {
			g.add(Ignored, "%s: %s", at, message)
		}
		g.statuses = append(g.statuses, ParentStatus{Ref: ref, Conditions: []Condition{
			{Type: string(gatewayv1.RouteConditionAccepted), Status: message == "", Reason: reason, Message: message}}})
	}
	g.parents = sortedParents(g.parents)
	return len(g.statuses) > 0
}

// attachTo puts the route below a parent; message says why that cannot be.
func (g *gatewayRoute) attachTo(ref gatewayv1.ParentReference) (reason, message string) {
	n := Name{g.meta.Namespace, string(ref.Name)}
	if ref.Namespace != nil {
		n.Namespace = string(*ref.Namespace)
	}
	hosts := []string{Hostname(g.cfg, n)}
	if valueOf(ref.Kind) == "ServiceEntry" {
		hosts = nil
		if se := g.c.Entry(n); se != nil {
			hosts = EntryHosts(se)
		}
	}
	nobody := string(gatewayv1.RouteReasonNoMatchingParent)
	if valueOf(ref.SectionName) != "" {
		return string(gatewayv1.RouteReasonUnsupportedValue), "sectionName has no meaning for a service: say port"
	}
	port := valueOf(ref.Port)
	if port < 0 || port > 65535 {
		return nobody, fmt.Sprintf("%d is not a port", port)
	}
	known := false
	for _, host := range hosts {
		i := slices.IndexFunc(g.c.ServicesOf(host), func(s *mesh.Service) bool { return s.Namespace == n.Namespace })
		if i < 0 {
			continue
		}
		known = true
		svc := g.c.ServicesOf(host)[i]
		if _, ok := svc.Port(uint16(port)); port != 0 && !ok {
			message = fmt.Sprintf("%s %s has no port %d", valueOf(ref.Kind), n, port)
			continue
		}
		p := mesh.RouteParent{Namespace: svc.Namespace, Hostname: svc.Hostname, Port: uint16(port)}
		if g.meta.Namespace != svc.Namespace {
			p.Clients = g.meta.Namespace // a consumer route
		}
		if svc.NamespaceOnly && p.Clients != "" {
			message = fmt.Sprintf("%s %s is not visible here", valueOf(ref.Kind), n)
			continue
		}
		g.parents = append(g.parents, p)
	}
	if !known {
		message = fmt.Sprintf("no %s %s is known to the mesh", valueOf(ref.Kind), n)
	}
	if message != "" {
		return nobody, message
	}
	return string(gatewayv1.RouteReasonAccepted), ""
}

// notes are those of the rule of that index.
func (g *gatewayRoute) notes(i int) *ruleNotes {
	return &ruleNotes{faults: &g.faults, at: fmt.Sprintf("rules[%d]", i)}
}

// rule makes a route of a rule that was translated.
func (g *gatewayRoute) rule(n *ruleNotes, i int, name *gatewayv1.SectionName, http *mesh.HTTPRule, stream *mesh.StreamRule) {
	r := &mesh.Route{Kind: g.kind, Namespace: g.meta.Namespace, Name: g.meta.Name, Protocol: g.protocol(), Rule: uint32(i),
		RuleName: string(valueOf(name)), Created: created(g.meta), Parents: g.parents, HTTP: http, Stream: stream, Invalid: n.verdict()}
	if g.rules++; r.Invalid != "" {
		if g.refused++; g.refused == 1 {
			g.refusal = r.Invalid
		}
	}
	g.routes = append(g.routes, r)
}

// dangle notes a reference that leads nowhere.
func (g *gatewayRoute) dangle(n *ruleNotes, r StatusReason, field, message string) {
	n.note(r, field, "%s", message)
	if g.unresolved == "" {
		g.unresolved = r
	}
	g.unresolvedMessages = append(g.unresolvedMessages, n.at+dotted(field)+": "+message)
}

// done puts the results together.
func (g *gatewayRoute) done() (Routing, *RouteStatus) {
	out := Routing{Status: g.status()}
	if len(g.parents) > 0 {
		out.Routes = g.routes
	}
	if len(g.statuses) == 0 {
		return out, nil
	}
	s := &RouteStatus{Kind: g.kind.String(), Namespace: g.meta.Namespace, Name: g.meta.Name, Generation: g.meta.Generation, Parents: g.statuses}
	resolved := Condition{Type: string(gatewayv1.RouteConditionResolvedRefs), Status: true, Reason: string(gatewayv1.RouteReasonResolvedRefs)}
	if g.unresolved != "" {
		resolved.Status, resolved.Reason, resolved.Message = false, string(g.unresolved), joinMessages(g.unresolvedMessages)
	}
	for i := range s.Parents {
		p := &s.Parents[i]
		accepted := &p.Conditions[0]
		switch {
		case !accepted.Status || g.refused == 0:
		case g.refused == g.rules:
			accepted.Status, accepted.Reason, accepted.Message = false, string(gatewayv1.RouteReasonUnsupportedValue), g.refusal
		default:
			p.Conditions = append(p.Conditions, Condition{Type: string(gatewayv1.RouteConditionPartiallyInvalid), Status: true,
				Reason: string(gatewayv1.RouteReasonUnsupportedValue), Message: "Dropped Rule: requests that match it are refused: " + g.refusal})
		}
		p.Conditions = append(p.Conditions, resolved)
	}
	return out, s
}

// maxConditionMessage bounds what is written into a status; the API allows 32768 bytes.
const maxConditionMessage = 2048

func joinMessages(list []string) string {
	text := list[0]
	for i, m := range list[1:] {
		if len(text)+len(m) > maxConditionMessage {
			return fmt.Sprintf("%s; and %d more", text, len(list)-1-i)
		}
		text += "; " + m
	}
	return text
}

// valueOf is what p points to, or the zero value.
func valueOf[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}
