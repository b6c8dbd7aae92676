package index

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayxv1alpha1 "sigs.k8s.io/gateway-api/apisx/v1alpha1"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/translate"
)

// traffic is who says how which service is talked to.
type traffic struct {
	rules    map[string]set[name]             // DestinationRules by their host in full
	wild     set[string]                      // those hosts that begin with *
	named    map[string]set[string]           // keys of services by hostname
	declared map[translate.Target]set[string] // keys of services by what declares them
	tls      map[translate.Target]set[name]   // BackendTLSPolicies by what they are for
	trusting map[name]set[name]               // BackendTLSPolicies by the ConfigMaps whose certificates they trust
	backends map[translate.Target]set[name]   // BackendTrafficPolicies, likewise
	listed   map[string][]string              // keys of the traffic policies of a service

	dirtyServices                       set[string] // by key
	dirtyRules, dirtyTLS, dirtyBackends set[name]
}

func newTraffic() traffic {
	t := traffic{rules: make(map[string]set[name]), wild: make(set[string]), named: make(map[string]set[string]),
		declared: make(map[translate.Target]set[string]), tls: make(map[translate.Target]set[name]),
		trusting: make(map[name]set[name]), backends: make(map[translate.Target]set[name]), listed: make(map[string][]string)}
	t.clean()
	return t
}

func (t *traffic) clean() {
	t.dirtyServices, t.dirtyRules, t.dirtyTLS, t.dirtyBackends = make(set[string]), make(set[name]), make(set[name]), make(set[name])
}

func (x *Index) destinationRule(n name, now *networkingv1.DestinationRule) {
	t := &x.traffic
	touch := func(dr *networkingv1.DestinationRule, change func(map[string]set[name], string, name)) {
		host := translate.RuleHost(x.cfg, dr)
		change(t.rules, host, n)
		delete(t.wild, host)
		if strings.HasPrefix(host, "*") && len(t.rules[host]) > 0 {
			t.wild[host] = struct{}{}
		}
		for key := range x.covered(host) {
			t.dirtyServices[key] = struct{}{}
		}
		for sibling := range t.rules[host] {
			t.dirtyRules[sibling] = struct{}{}
		}
	}
	if old := x.objects.DestinationRules[n]; old != nil {
		touch(old, unlink)
		x.credentials.link(old, n, unlink)
	}
	keep(x.objects.DestinationRules, n, now)
	if now != nil {
		touch(now, link)
		x.credentials.link(now, n, link)
	}
	t.dirtyRules[n] = struct{}{}
}

// covered are the keys of the services that a host stands for.
func (x *Index) covered(host string) set[string] {
	suffix, wild := strings.CutPrefix(host, "*")
	if !wild {
		return x.traffic.named[host]
	}
	all := make(set[string])
	for hostname, keys := range x.traffic.named {
		if strings.HasSuffix(hostname, suffix) {
			for key := range keys {
				all[key] = struct{}{}
			}
		}
	}
	return all
}

// covering yields the DestinationRules whose host stands for a service.
func (x *Index) covering(hostname string, yield func(name)) {
	for n := range x.traffic.rules[hostname] {
		yield(n)
	}
	for host := range x.traffic.wild {
		if host != hostname && strings.HasSuffix(hostname, host[1:]) {
			for n := range x.traffic.rules[host] {
				yield(n)
			}
		}
	}
}

func (x *Index) backendTLSPolicy(n name, now *gatewayv1.BackendTLSPolicy) {
	t := &x.traffic
	if old := x.objects.BackendTLSPolicies[n]; old != nil {
		x.retarget(t.tls, t.dirtyTLS, translate.TLSPolicyTargets(old), n, unlink)
		for _, cm := range translate.TrustedConfigMaps(old) {
			unlink(t.trusting, cm, n)
		}
	}
	keep(x.objects.BackendTLSPolicies, n, now)
	if now != nil {
		x.retarget(t.tls, t.dirtyTLS, translate.TLSPolicyTargets(now), n, link)
		for _, cm := range translate.TrustedConfigMaps(now) {
			link(t.trusting, cm, n)
		}
	}
	t.dirtyTLS[n] = struct{}{}
}

func (x *Index) configMap(n name, now *corev1.ConfigMap) {
	keep(x.objects.ConfigMaps, n, now)
	t := &x.traffic
	x.markRules(x.credentials.byConfigMap[n])
	for policy := range t.trusting[n] {
		t.dirtyTLS[policy] = struct{}{}
		for _, target := range translate.TLSPolicyTargets(x.objects.BackendTLSPolicies[policy]) {
			for key := range t.declared[target] {
				t.dirtyServices[key] = struct{}{}
			}
		}
	}
}

func (x *Index) backendTrafficPolicy(n name, now *gatewayxv1alpha1.XBackendTrafficPolicy) {
	t := &x.traffic
	if old := x.objects.BackendTrafficPolicies[n]; old != nil {
		x.retarget(t.backends, t.dirtyBackends, translate.TrafficPolicyTargets(old), n, unlink)
	}
	keep(x.objects.BackendTrafficPolicies, n, now)
	if now != nil {
		x.retarget(t.backends, t.dirtyBackends, translate.TrafficPolicyTargets(now), n, link)
	}
	t.dirtyBackends[n] = struct{}{}
}

// retarget links a policy to what it is for, or unlinks it, and marks that and its rivals.
func (x *Index) retarget(by map[translate.Target]set[name], dirty set[name], targets []translate.Target, n name,
	change func(map[translate.Target]set[name], translate.Target, name)) {
	for _, t := range targets {
		change(by, t, n)
		x.mark(dirty, by[t])
		for key := range x.traffic.declared[t] {
			x.traffic.dirtyServices[key] = struct{}{}
		}
	}
}

// declare notes a service that has been made again, before it is put, with all that speaks of it.
func (x *Index) declare(key string, now *mesh.Service) {
	t := &x.traffic
	if old := x.nouns.Services[key]; old != nil {
		x.markSpeaking(old)
		unlink(t.named, old.Hostname, key)
		unlink(t.declared, translate.TargetOf(old), key)
	}
	if now != nil {
		x.markSpeaking(now)
		link(t.named, now.Hostname, key)
		link(t.declared, translate.TargetOf(now), key)
	}
	t.dirtyServices[key] = struct{}{}
}

// markSpeaking marks what speaks of a service: what becomes of it may be another thing now.
func (x *Index) markSpeaking(svc *mesh.Service) {
	t := &x.traffic
	x.covering(svc.Hostname, func(n name) { t.dirtyRules[n] = struct{}{} })
	x.mark(t.dirtyTLS, t.tls[translate.TargetOf(svc)])
	x.mark(t.dirtyBackends, t.backends[translate.TargetOf(svc)])
}

func (x *Index) refreshTraffic() {
	t := &x.traffic
	for key := range t.dirtyServices {
		x.refreshTrafficOf(key)
		if svc := x.nouns.Services[key]; svc != nil { // what DestinationRules say, others cannot
			x.mark(t.dirtyTLS, t.tls[translate.TargetOf(svc)])
			x.mark(t.dirtyBackends, t.backends[translate.TargetOf(svc)])
		}
	}
	for n := range t.dirtyRules {
		x.refreshRule(n)
	}
	for n := range t.dirtyTLS {
		var s *translate.Status
		var told *translate.RouteStatus
		if p := x.objects.BackendTLSPolicies[n]; p != nil {
			targets := translate.TLSPolicyTargets(p)
			s, told = translate.BackendTLSStatus(x.cfg, p, x.objects.ConfigMaps, rivals(x.objects.BackendTLSPolicies, t.tls, targets), x.meant(targets))
		}
		x.putStatus(BackendTLSPolicy, n, s)
		x.putRouteStatus((&translate.RouteStatus{Kind: BackendTLSPolicy.String(), Namespace: n.Namespace, Name: n.Name}).Key(), told)
	}
	for n := range t.dirtyBackends {
		var s *translate.Status
		if p := x.objects.BackendTrafficPolicies[n]; p != nil {
			targets := translate.TrafficPolicyTargets(p)
			s = translate.BackendTrafficStatus(x.cfg, p, rivals(x.objects.BackendTrafficPolicies, t.backends, targets), x.meant(targets))
		}
		x.putStatus(XBackendTrafficPolicy, n, s)
	}
	t.clean()
}

// rivals are the policies that share a target.
func rivals[P any](objects map[name]*P, by map[translate.Target]set[name], targets []translate.Target) []*P {
	var all []*P
	for _, t := range targets {
		for n := range by[t] {
			if o := objects[n]; !slices.Contains(all, o) {
				all = append(all, o)
			}
		}
	}
	return all
}

// meant are the services that targets stand for, in the order of their keys.
func (x *Index) meant(targets []translate.Target) []translate.TrafficInput {
	keys := make(set[string])
	for _, t := range targets {
		for key := range x.traffic.declared[t] {
			keys[key] = struct{}{}
		}
	}
	var all []translate.TrafficInput
	for _, key := range sorted(keys) {
		all = append(all, x.trafficInput(x.nouns.Services[key]))
	}
	return all
}

func sorted(s set[string]) []string {
	keys := make([]string, 0, len(s))
	for k := range s {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func (x *Index) trafficInput(svc *mesh.Service) translate.TrafficInput {
	at := translate.TargetOf(svc)
	var in translate.TrafficInput
	if svc.Canonical {
		in = translate.NewTrafficInput(svc, x.objects.Services[at.Name], nil)
	} else {
		in = translate.NewTrafficInput(svc, nil, x.objects.ServiceEntries[at.Name])
	}
	in.ConfigMaps, in.Secrets = x.objects.ConfigMaps, x.objects.Secrets
	x.covering(svc.Hostname, func(n name) { in.Rules = append(in.Rules, x.objects.DestinationRules[n]) })
	for n := range x.traffic.tls[at] {
		in.TLS = append(in.TLS, x.objects.BackendTLSPolicies[n])
	}
	for n := range x.traffic.backends[at] {
		in.Backends = append(in.Backends, x.objects.BackendTrafficPolicies[n])
	}
	return in
}

func (x *Index) refreshTrafficOf(service string) {
	var policies []*mesh.TrafficPolicy
	if svc := x.nouns.Services[service]; svc != nil {
		policies = translate.TrafficPolicies(x.cfg, x.trafficInput(svc))
	}
	keys := make([]string, 0, len(policies))
	for _, p := range policies {
		keys = append(keys, p.Key())
		x.putTraffic(p.Key(), p)
	}
	for _, key := range x.traffic.listed[service] {
		if !slices.Contains(keys, key) {
			x.putTraffic(key, nil)
		}
	}
	if len(keys) == 0 {
		delete(x.traffic.listed, service)
	} else {
		x.traffic.listed[service] = keys
	}
}

func (x *Index) refreshRule(n name) {
	var s *translate.Status
	if dr := x.objects.DestinationRules[n]; dr != nil {
		host := translate.RuleHost(x.cfg, dr)
		var siblings []*networkingv1.DestinationRule
		for o := range x.traffic.rules[host] {
			if o != n && o.Namespace == n.Namespace {
				siblings = append(siblings, x.objects.DestinationRules[o])
			}
		}
		s = x.objects.DestinationRuleStatus(x.cfg, dr, siblings, len(x.covered(host)) > 0)
	}
	x.putStatus(DestinationRule, n, s)
}
