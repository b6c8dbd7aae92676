package control

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

// The two waypoints of the mesh, by the names of their Gateways. They differ in their policies only.
const (
	Plain   = "plain"   // one policy, which allows
	Guarded = "guarded" // Policies, the last of which allows
)

// What there is a lot of.
const (
	Rules    = 1000
	Policies = 100
)

// Namespace is where all of the mesh is.
const Namespace = "bench"

// Service is what a workload of the bench asks for.
type Service struct {
	Name    string
	VIP     netip.AddrPort
	Gateway string
	HTTP2   bool
	Rules   int
}

// The services. Each has the same one endpoint.
var (
	One      = Service{Name: "one", VIP: netip.MustParseAddrPort("10.9.0.1:80"), Gateway: Plain, Rules: 1}
	Thousand = Service{Name: "thousand", VIP: netip.MustParseAddrPort("10.9.0.2:80"), Gateway: Plain, Rules: Rules}
	Two      = Service{Name: "two", VIP: netip.MustParseAddrPort("10.9.0.3:80"), Gateway: Plain, HTTP2: true, Rules: 1}
	Checked  = Service{Name: "checked", VIP: netip.MustParseAddrPort("10.9.0.4:80"), Gateway: Guarded, Rules: 1}
)

func (s *Service) hostname() string {
	return s.Name + "." + Namespace + ".svc." + mesh.DefaultClusterDomain
}

// Places are where the mesh's workloads are.
type Places struct {
	Client netip.Addr
	// Waypoints are the addresses that waypoints are known by.
	Waypoints map[string]netip.Addr
	Server    netip.AddrPort
}

// Identity is that of a service account of the mesh.
func Identity(account string) mesh.Identity {
	return mesh.Identity{TrustDomain: mesh.DefaultTrustDomain, Namespace: Namespace, ServiceAccount: account}
}

// Pod is the name of a waypoint's pod.
func Pod(gateway string) string { return gateway + "-1" }

// Changes is the mesh as resources.
func Changes(at Places) ([]xds.Change, error) {
	address, routes, policies := xds.Change{TypeURL: mesh.TypeAddress}, xds.Change{TypeURL: mesh.TypeRoute}, xds.Change{TypeURL: mesh.TypeAuthorization}
	var first error
	add := func(to *xds.Change, name string, body []byte, err error) {
		if err != nil && first == nil {
			first = fmt.Errorf("encode %s: %w", name, err)
		}
		to.Upserts = append(to.Upserts, xds.Resource{Name: name, Body: body})
	}
	server := workload("server", at.Server.Addr())
	for _, s := range []Service{One, Thousand, Two, Checked} {
		server.Services = append(server.Services, mesh.ServicePorts{
			Service: mesh.ServiceKey(Namespace, s.hostname()), Ports: []mesh.Port{{ServicePort: s.VIP.Port(), TargetPort: at.Server.Port()}},
		})
		svc := s.service()
		body, err := wds.EncodeService(svc)
		add(&address, svc.Key(), body, err)
		for i := range s.Rules {
			r := s.rule(i)
			body, err := wds.EncodeRoute(r)
			add(&routes, r.Key(), body, err)
		}
	}
	workloads := []*mesh.Workload{server, workload("client", at.Client)}
	for gateway, ps := range map[string][]*mesh.Policy{Plain: {policy(Plain, 0, mesh.Allow, "/")}, Guarded: guards()} {
		w := workload(Pod(gateway), at.Waypoints[gateway])
		w.ServiceAccount = gateway
		for _, p := range ps {
			w.Policies = append(w.Policies, p.Key())
			body, err := wds.EncodePolicy(p)
			add(&policies, p.Key(), body, err)
		}
		workloads = append(workloads, w)
	}
	for _, w := range workloads {
		body, err := wds.EncodeWorkload(w)
		add(&address, w.UID, body, err)
	}
	return []xds.Change{policies, routes, {TypeURL: mesh.TypeTrafficPolicy}, address}, first
}

func workload(name string, addr netip.Addr) *mesh.Workload {
	return &mesh.Workload{
		UID: mesh.DefaultClusterID + "//Pod/" + Namespace + "/" + name, Name: name, Namespace: Namespace, Addrs: []netip.Addr{addr},
		TrustDomain: mesh.DefaultTrustDomain, ServiceAccount: name, ClusterID: mesh.DefaultClusterID, Healthy: true, Capacity: 1,
		CanonicalName: name, OwnerName: name,
	}
}

func (s *Service) service() *mesh.Service {
	app := mesh.AppHTTP1
	if s.HTTP2 {
		app = mesh.AppHTTP2
	}
	return &mesh.Service{
		Name: s.Name, Namespace: Namespace, Hostname: s.hostname(), VIPs: []mesh.VIP{{Prefix: netip.PrefixFrom(s.VIP.Addr(), 32)}},
		Ports: []mesh.Port{{ServicePort: s.VIP.Port(), App: app}},
		Waypoint: mesh.GatewayAddress{
			Namespace: Namespace, Hostname: s.Gateway + "." + Namespace + ".svc." + mesh.DefaultClusterDomain, Port: mesh.PortHBONE,
		},
	}
}

// Prefix is the path prefix of the rule of that index, of a service with as many.
func Prefix(rule, of int) string {
	if of == 1 {
		return "/"
	}
	return fmt.Sprintf("/r%03d/", rule)
}

// Path is what clients ask of a service: its last rule is for it.
func (s *Service) Path() string { return Prefix(s.Rules-1, s.Rules) + "items?page=1" }

// rule is one with everything an Istio user's Envoy has a filter for: CORS, and a fault that befalls nobody.
func (s *Service) rule(i int) *mesh.Route {
	return &mesh.Route{
		Kind: mesh.KindVirtualService, Namespace: Namespace, Name: s.Name, Protocol: mesh.RouteHTTP, Rule: uint32(i), Created: time.Unix(1, 0).UTC(),
		Parents: []mesh.RouteParent{{Namespace: Namespace, Hostname: s.hostname()}},
		HTTP: &mesh.HTTPRule{
			Matches:  []mesh.HTTPMatch{{Path: mesh.PathMatch{Kind: mesh.PathPrefix, Value: Prefix(i, s.Rules)}}},
			Backends: []mesh.Backend{{Ref: mesh.BackendRef{Namespace: Namespace, Hostname: s.hostname()}, Weight: 1}},
			CORS:     &mesh.CORS{AllowOrigins: []mesh.StringMatch{{Kind: mesh.MatchExact, Value: "https://pages.test"}}, AllowMethods: []string{"GET"}},
			Fault:    &mesh.Fault{Abort: mesh.Abort{HTTPStatus: 503}},
		},
	}
}

// guards deny by paths nobody asks for, and allow by such, but for the last.
func guards() []*mesh.Policy {
	var ps []*mesh.Policy
	for i := range Policies {
		action, prefix := mesh.Deny, fmt.Sprintf("/denied-%d/", i)
		if i >= Policies/2 {
			action, prefix = mesh.Allow, fmt.Sprintf("/allowed-%d/", i)
		}
		if i == Policies-1 {
			prefix = "/"
		}
		ps = append(ps, policy(Guarded, i, action, prefix))
	}
	return ps
}

func policy(gateway string, i int, action mesh.PolicyAction, prefix string) *mesh.Policy {
	return &mesh.Policy{
		Namespace: Namespace, Name: fmt.Sprintf("%s-%d", gateway, i), Scope: mesh.ScopeWorkload, Action: action,
		Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{Operation: &mesh.Operation{
			Methods: []mesh.StringMatch{{Kind: mesh.MatchExact, Value: "GET"}, {Kind: mesh.MatchExact, Value: "POST"}},
			Paths:   []mesh.StringMatch{{Kind: mesh.MatchPrefix, Value: prefix}},
		}}}}}}},
	}
}
