package translate

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// A service's traffic policy is made of the DestinationRules whose host covers it and of the Gateway API's policies that
// target it. Which DestinationRules count depends on who asks: those of the client's namespace come first, then the
// service's own, then those of the root namespace. A waypoint is the client of what it serves. So a service has one
// policy for most namespaces and another for each that sees other rules.

// DestinationRule is Istio's declaration of how services are talked to.
type DestinationRule = networkingv1.DestinationRule

// TrafficInput is what the traffic policies of one service depend on.
type TrafficInput struct {
	Service  *mesh.Service
	Rules    []*DestinationRule      // those whose host covers the service, in any order
	TLS      []*BackendTLSPolicy     // those that target it, in any order
	Backends []*BackendTrafficPolicy // likewise

	ConfigMaps map[Name]*corev1.ConfigMap // that TLS may refer to, by name
	Secrets    map[Name]*corev1.Secret    // likewise

	SANs  []string          // subjectAltNames of the ServiceEntry that declares it
	Ports map[uint16]string // names of its ports
}

// NewTrafficInput is what is known of a service by its declaration: its Service, or else its ServiceEntry.
func NewTrafficInput(s *mesh.Service, svc *corev1.Service, se *ServiceEntry) TrafficInput {
	in := TrafficInput{Service: s, Ports: make(map[uint16]string)}
	if svc != nil {
		for _, p := range tcpPorts(svc) {
			in.Ports[uint16(p.Port)] = p.Name
		}
		return in
	}
	if se != nil {
		in.SANs = se.Spec.SubjectAltNames
		for _, p := range entryPorts(se) {
			in.Ports[uint16(p.Number)] = p.Name
		}
	}
	return in
}

// TrafficPolicies are what is said about a service as a backend, for each namespace of clients that is told another thing
// than the rest: those first, by name, then that of all others.
func TrafficPolicies(cfg Config, in TrafficInput) []*mesh.TrafficPolicy {
	rules := slices.DeleteFunc(slices.Clone(in.Rules), func(dr *DestinationRule) bool { return dr.Spec.WorkloadSelector != nil })
	common := inForce(cfg, in.Service, "", rules)
	clients := make(map[string]bool)
	for _, dr := range rules {
		clients[dr.Namespace] = true
		for _, to := range exportOf(cfg, dr) {
			clients[to] = true
		}
	}
	var policies []*mesh.TrafficPolicy
	for _, client := range slices.Sorted(maps.Keys(clients)) {
		if strings.ContainsAny(client, ".*~") || client == "" {
			continue
		}
		if own := inForce(cfg, in.Service, client, rules); !slices.Equal(own, common) {
			policies = append(policies, trafficPolicy(cfg, in, client, own))
		}
	}
	if len(common)+len(in.TLS)+len(in.Backends) > 0 {
		policies = append(policies, trafficPolicy(cfg, in, "", common))
	}
	return policies
}

// inForce are the rules that hold for clients of a namespace, "" for one that nobody mentions, the oldest first. The first
// namespace that has any for the service decides, by those of them with the most specific host.
func inForce(cfg Config, svc *mesh.Service, client string, rules []*DestinationRule) []*DestinationRule {
	find := func(namespace string, visible func(*DestinationRule) bool) []*DestinationRule {
		var found []*DestinationRule
		best := ""
		for _, dr := range rules {
			host := RuleHost(cfg, dr)
			if dr.Namespace != namespace || !visible(dr) || !covers(host, svc.Hostname) {
				continue
			}
			switch c := compareHosts(host, best); {
			case found == nil || c < 0:
				best, found = host, []*DestinationRule{dr}
			case c == 0:
				found = append(found, dr)
			}
		}
		slices.SortFunc(found, compareRules)
		return found
	}
	exported := func(dr *DestinationRule) bool { return visibleTo(cfg, dr, client) }
	if client == cfg.RootNamespace {
		// What the root namespace says to everybody must not hide from it what a service's own says.
		exported := func(dr *DestinationRule) bool { return exported(dr) && !visibleTo(cfg, dr, "") }
		if found := find(client, exported); found != nil {
			return found
		}
	} else if found := find(client, exported); client != "" && found != nil {
		return found
	}
	if found := find(svc.Namespace, exported); found != nil {
		return found
	}
	return find(cfg.RootNamespace, exported)
}

// visibleTo reports whether clients of a namespace, or "" for one that nobody mentions, see a rule (exportTo).
func visibleTo(cfg Config, dr *DestinationRule, client string) bool {
	to := exportOf(cfg, dr)
	return len(to) == 0 || slices.ContainsFunc(to, func(to string) bool {
		return to == "*" || client != "" && (to == client || to == "." && dr.Namespace == client)
	})
}

// exportOf is the exportTo that holds for a rule.
func exportOf(cfg Config, dr *DestinationRule) []string {
	if len(dr.Spec.ExportTo) == 0 {
		return cfg.DestinationRuleExportTo
	}
	return dr.Spec.ExportTo
}

// RuleHost is the host that a DestinationRule is about, in full. It may begin with "*".
func RuleHost(cfg Config, dr *DestinationRule) string {
	return fullHost(cfg, dr.Namespace, dr.Spec.Host)
}

// covers reports whether host, which may begin with "*", stands for hostname.
func covers(host, hostname string) bool {
	if suffix, wild := strings.CutPrefix(host, "*"); wild {
		return strings.HasSuffix(hostname, suffix)
	}
	return host == hostname
}

// compareHosts puts exact hosts before wildcards, and long wildcards before short ones.
func compareHosts(a, b string) int {
	wild := func(host string) int {
		if strings.HasPrefix(host, "*") {
			return 1
		}
		return 0
	}
	return cmp.Or(cmp.Compare(wild(a), wild(b)), wild(a)*cmp.Compare(len(b), len(a)))
}

func compareRules(a, b *DestinationRule) int {
	return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// trafficPolicy merges rules about one host, the oldest first: its trafficPolicy counts, subsets are added up.
func trafficPolicy(cfg Config, in TrafficInput, clients string, rules []*DestinationRule) *mesh.TrafficPolicy {
	p := &mesh.TrafficPolicy{Namespace: in.Service.Namespace, Hostname: in.Service.Hostname, Clients: clients}
	decided := false
	var health *mesh.HealthCheck
	var closed []string
	for _, dr := range rules {
		p.Sources = append(p.Sources, "DestinationRule/"+dr.Namespace+"/"+dr.Name)
		var fs ruleFaults
		r := ruleReader{dr: dr, sans: in.SANs, faults: &fs, secrets: in.Secrets, noSecrets: cfg.NoSecrets, configMaps: in.ConfigMaps}
		if dr.Spec.TrafficPolicy != nil && !decided {
			decided = true
			p.Settings, p.Ports = r.settings("trafficPolicy", dr.Spec.TrafficPolicy)
		}
		for i, s := range dr.Spec.Subsets {
			if s.GetName() != "" && !slices.ContainsFunc(p.Subsets, func(o mesh.Subset) bool { return o.Name == s.GetName() }) {
				p.Subsets = append(p.Subsets, r.subset(i, s))
			}
		}
		if h, _ := healthCheck(dr); h != nil && health == nil { // what is wrong with it, DestinationRuleStatus says
			health = h
		}
		if why := fs.closing(); why != "" {
			closed = append(closed, "DestinationRule "+dr.Namespace+"/"+dr.Name+": "+why)
		}
	}
	slices.SortFunc(p.Subsets, func(a, b mesh.Subset) int { return cmp.Compare(a.Name, b.Name) })
	p.Settings.Health = health
	closed = append(closed, fillTLS(in, p)...)
	fillBackend(in, p)
	p.Invalid = strings.Join(closed, "; ")
	return p
}

// Covers reports whether a DestinationRule is about a service.
func Covers(cfg Config, dr *DestinationRule, svc *mesh.Service) bool {
	return covers(RuleHost(cfg, dr), svc.Hostname)
}

// DestinationRuleStatus says what of a DestinationRule has no effect, or nil. siblings are the others of its namespace about
// the same host; known is whether the host covers any service.
func (o Objects) DestinationRuleStatus(cfg Config, dr *DestinationRule, siblings []*DestinationRule, known bool) *Status {
	f := faults{kind: "DestinationRule", namespace: dr.Namespace, name: dr.Name}
	switch {
	case dr.Spec.Host == "":
		f.add(Invalid, "host is empty")
		return f.status()
	case dr.Spec.WorkloadSelector != nil:
		f.add(Ignored, "workloadSelector selects clients with a proxy of their own, and a waypoint is none of them: the rule has no effect")
		return f.status()
	case len(exportOf(cfg, dr)) > 0 && !slices.ContainsFunc(exportOf(cfg, dr), func(to string) bool { return to != "" && to != "~" }):
		f.add(Ignored, "exportTo: the rule is for nobody")
		return f.status()
	case !known:
		f.add(Ignored, "host %s is that of no service", RuleHost(cfg, dr))
	}
	var fs ruleFaults
	r := ruleReader{dr: dr, faults: &fs, secrets: o.Secrets, noSecrets: cfg.NoSecrets, configMaps: o.ConfigMaps}
	r.settings("trafficPolicy", dr.Spec.TrafficPolicy)
	for i, s := range dr.Spec.Subsets {
		r.subset(i, s)
	}
	for _, fault := range fs {
		f.add(fault.reason, "%s", fault.text)
	}
	r.shadowed(cfg, &f, siblings)
	return f.status()
}

// shadowed adds what an older rule about the same host has said already.
func (r *ruleReader) shadowed(cfg Config, f *faults, siblings []*DestinationRule) {
	dr := r.dr
	older := slices.DeleteFunc(slices.Clone(siblings), func(o *DestinationRule) bool {
		return o.Spec.WorkloadSelector != nil || compareRules(o, dr) >= 0 || !sees(cfg, o, dr)
	})
	slices.SortFunc(older, compareRules)
	healthCheckFaults(f, dr, older)
	if i := slices.IndexFunc(older, func(o *DestinationRule) bool { return o.Spec.TrafficPolicy != nil }); i >= 0 && dr.Spec.TrafficPolicy != nil {
		f.add(Conflicted, "trafficPolicy: that of DestinationRule %s counts, which is older", older[i].Name)
	}
	for i, s := range dr.Spec.Subsets {
		named := func(o string) bool { return o == s.GetName() }
		if s.GetName() == "" {
			continue
		}
		if slices.ContainsFunc(subsetNames(dr)[:i], named) {
			f.add(Conflicted, "subsets[%d]: left out, there is another %s above", i, s.GetName())
			continue
		}
		if j := slices.IndexFunc(older, func(o *DestinationRule) bool { return slices.ContainsFunc(subsetNames(o), named) }); j >= 0 {
			f.add(Conflicted, "subsets[%d]: %s of DestinationRule %s counts, which is older", i, s.GetName(), older[j].Name)
		}
	}
}

func subsetNames(dr *DestinationRule) []string {
	names := make([]string, len(dr.Spec.Subsets))
	for i, s := range dr.Spec.Subsets {
		names[i] = s.GetName()
	}
	return names
}

// sees reports whether every client that sees a rule sees another, too.
func sees(cfg Config, other, dr *DestinationRule) bool {
	for _, client := range append([]string{"", dr.Namespace}, exportOf(cfg, dr)...) {
		if !strings.ContainsAny(client, ".*~") && visibleTo(cfg, dr, client) && !visibleTo(cfg, other, client) {
			return false
		}
	}
	return true
}
