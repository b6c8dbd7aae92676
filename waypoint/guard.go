package waypoint

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/mistnet/mistnet/waypoint/upstream"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/waypoint/route"
)

// guard is the policies that govern what goes to one service: the waypoint's own, which name its Gateway or its class, and
// those that target the service. All are in one set, so that any ALLOW policy among them lets in what it matches, and
// nothing else is let in as soon as there is one.
type guard struct {
	policies []*mesh.Policy // that set was compiled from
	set      *authz.Set
	missing  []string // keys of those that have not arrived: until they do, everything is denied
}

// govern finds the waypoint itself in the mesh, and compiles what guards it and the services that an update touched. Policies
// of the waypoint's namespace and of the mesh are for workloads, not for waypoints.
func (s *state) govern(v *view, u xds.Update) {
	old := v.Self
	v.Self = v.Pod(s.cfg.Namespace, s.cfg.PodName)
	if old == nil && v.Self != nil {
		s.log.Info("known to the mesh", zap.String("workload", v.Self.UID))
	}
	touched := make(map[string]struct{})
	if u.TypeURL == mesh.TypeAuthorization || !slices.Equal(ownPolicies(old), ownPolicies(v.Self)) {
		for key := range v.guards {
			touched[key] = struct{}{}
		}
	}
	for _, r := range u.Upserts {
		touched[r.Name] = struct{}{}
	}
	for _, name := range u.Removes {
		touched[name] = struct{}{}
	}
	v.own = s.guard(v, nil, v.own)
	guards := v.guards
	copied := false
	for key := range touched {
		svc := v.Service(key)
		if guards[key] == nil && (svc == nil || len(svc.Policies) == 0) {
			continue
		}
		if !copied {
			guards, copied = maps.Clone(guards), true
		}
		if svc == nil || len(svc.Policies) == 0 {
			delete(guards, key)
			continue
		}
		if guards == nil {
			guards = make(map[string]*guard)
		}
		guards[key] = s.guard(v, svc.Policies, guards[key])
	}
	v.guards = guards
}

func (g *guard) policy(key string) *mesh.Policy {
	if g == nil {
		return nil
	}
	for _, p := range g.policies {
		if p.Key() == key {
			return p
		}
	}
	return nil
}

// ownPolicies are the keys of those that hold for all that goes through the waypoint.
func ownPolicies(self *mesh.Workload) []string {
	if self == nil {
		return nil
	}
	return mergeKeys(self.Policies, self.TargetPolicies)
}

// guard compiles the waypoint's own policies and these more, as far as that was not done for old. A policy that is gone and
// still named stays: who named it is about to change, and until then nothing is open that was closed, or closed that was open.
func (s *state) guard(v *view, more []string, old *guard) *guard {
	g := &guard{}
	for _, key := range mergeKeys(ownPolicies(v.Self), more) {
		if p := cmp.Or(v.Policy(key), old.policy(key)); p != nil {
			g.policies = append(g.policies, p)
		} else {
			g.missing = append(g.missing, key)
		}
	}
	if old != nil && slices.Equal(old.policies, g.policies) {
		g.set = old.set
		return g
	}
	var err error
	if g.set, err = authz.Compile(g.policies); err != nil {
		s.log.Warn("policy cannot be compiled and denies", zap.Error(err))
	}
	return g
}

// mergeKeys are both lists as one, each key once, in order: which of several policies is named as the one that decided does
// not depend on how they came to hold.
func mergeKeys(a, b []string) []string {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

// guardOf returns what governs traffic to a service, or to a workload: then service is "".
func (v *view) guardOf(service string) *guard {
	if g := v.guards[service]; g != nil {
		return g
	}
	return v.own
}

// missingPolicies are the keys of all policies that hold here and have not arrived.
func (v *view) missingPolicies() []string {
	var all []string
	if v.own != nil {
		all = v.own.missing
	}
	for _, g := range v.guards {
		all = append(slices.Clip(all), g.missing...)
	}
	return mergeKeys(all, nil)
}

// verdict is whether something may go through.
type verdict struct {
	ok      bool
	denied  bool   // a policy denies it, or might: no other verdict lets it in
	unknown bool   // the policies are not all known
	details string // Envoy's word for a refusal
}

// authorize decides whether a request or connection to a service may go through. service is "" for what is addressed to a
// workload.
func (v *view) authorize(service string, r *authz.Request) verdict {
	g := v.guardOf(service)
	if v.Self == nil || g == nil || len(g.missing) > 0 {
		return verdict{denied: true, unknown: true, details: "rbac_access_denied_matched_policy[not_known]"}
	}
	d := g.set.Check(r)
	if d.Allow {
		return verdict{ok: true}
	}
	if d.Policy == "" {
		return verdict{details: "rbac_access_denied_matched_policy[none]"}
	}
	namespace, name, _ := strings.Cut(d.Policy, "/")
	return verdict{denied: true, details: "rbac_access_denied_matched_policy[ns[" + namespace + "]-policy[" + name + "]]"}
}

// authorize decides whether a connection, or a request if there is one, may go through by what v knows. Where a gateway speaks for
// the client, neither may be denied, and one of them must be let in: policies may mean either.
func (t *tunnel) authorize(v *view, http *authz.HTTP) verdict {
	return t.authorizeTo(v, t.to.service, t.to.port, http)
}

// authorizeTo is authorize for a port of another service.
func (t *tunnel) authorizeTo(v *view, service string, port uint16, http *authz.HTTP) verdict {
	r := authz.Request{Peer: t.client.ID, Src: t.client.Addr, Dst: netip.AddrPortFrom(t.to.addr.Addr(), port), HTTP: http}
	d := v.authorize(service, &r)
	if t.client.Gateway == nil || d.denied {
		return d
	}
	r.Peer, r.Src = t.client.Gateway.ID, t.client.Gateway.Addr
	if other := v.authorize(service, &r); other.denied || !d.ok {
		return other
	}
	return d
}

// authorizeLead decides whether a rule may lead to another service what it was asked for. Who writes rules in the namespace of that service
// may. Those of others are not to bring anybody past its policies: its pods let this waypoint in, which stands before them.
func (t *tunnel) authorizeLead(v *view, rule *route.Rule, to upstream.ClusterKey, http *authz.HTTP) verdict {
	if rule.Route == nil || to.Service == t.to.service {
		return verdict{ok: true}
	}
	svc := v.Service(to.Service)
	if svc == nil || svc.Namespace == rule.Route.Namespace || !t.state.serves(v, svc) {
		return verdict{ok: true}
	}
	return t.authorizeTo(v, to.Service, to.Port, http)
}
