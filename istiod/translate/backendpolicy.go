package translate

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayxv1alpha1 "sigs.k8s.io/gateway-api/apisx/v1alpha1"

	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// The Gateway API's own ways to say how a service is talked to. They fill what DestinationRules leave open; of several that
// say the same the oldest counts.

// BackendTLSPolicy asks for TLS with the application.
type BackendTLSPolicy = gatewayv1.BackendTLSPolicy

// BackendTrafficPolicy bounds retries, and keeps clients on their endpoint.
type BackendTrafficPolicy = gatewayxv1alpha1.XBackendTrafficPolicy

// Target is what a policy of the Gateway API is for: a Service, or a ServiceEntry with all its hosts.
type Target struct {
	Kind string
	Name
}

// The kinds of targets.
const (
	targetService = "Service"
	targetEntry   = "ServiceEntry"
)

// TargetOf is what a policy must name to mean a service.
func TargetOf(svc *mesh.Service) Target {
	t := Target{Kind: targetEntry, Name: Name{svc.Namespace, svc.Name}}
	if svc.Canonical {
		t.Kind = targetService
	}
	return t
}

// target is what a reference of a policy means; ok is false when policies cannot be for that.
func target(namespace string, ref gatewayv1.LocalPolicyTargetReference) (t Target, ok bool) {
	t = Target{Kind: string(ref.Kind), Name: Name{namespace, string(ref.Name)}}
	switch {
	case ref.Group == corev1.GroupName && t.Kind == targetService, ref.Group == "networking.istio.io" && t.Kind == targetEntry:
		return t, true
	}
	return t, false
}

// TLSPolicyTargets is what a BackendTLSPolicy is for.
func TLSPolicyTargets(p *BackendTLSPolicy) []Target {
	return targets(p.Namespace, p.Spec.TargetRefs, func(ref gatewayv1.LocalPolicyTargetReferenceWithSectionName) gatewayv1.LocalPolicyTargetReference {
		return ref.LocalPolicyTargetReference
	})
}

// TrafficPolicyTargets is what a BackendTrafficPolicy is for.
func TrafficPolicyTargets(p *BackendTrafficPolicy) []Target {
	return targets(p.Namespace, p.Spec.TargetRefs, func(ref gatewayv1.LocalPolicyTargetReference) gatewayv1.LocalPolicyTargetReference { return ref })
}

// targets are those that references name, each once.
func targets[R any](namespace string, refs []R, of func(R) gatewayv1.LocalPolicyTargetReference) []Target {
	var ts []Target
	for _, ref := range refs {
		if t, ok := target(namespace, of(ref)); ok && !slices.Contains(ts, t) {
			ts = append(ts, t)
		}
	}
	return ts
}

// comparePolicyAge puts the older first. Gateway API: of equal age, the first by name.
func comparePolicyAge(a, b metav1.Object) int {
	at, bt := a.GetCreationTimestamp(), b.GetCreationTimestamp()
	return cmp.Or(at.Compare(bt.Time), cmp.Compare(a.GetNamespace(), b.GetNamespace()), cmp.Compare(a.GetName(), b.GetName()))
}

// section is a port of a target that a BackendTLSPolicy names; "": all of them.
func sections(p *BackendTLSPolicy, t Target) []string {
	var names []string
	for _, ref := range p.Spec.TargetRefs {
		if at, ok := target(p.Namespace, ref.LocalPolicyTargetReference); !ok || at != t {
			continue
		}
		name := ""
		if ref.SectionName != nil {
			name = string(*ref.SectionName)
		}
		names = append(names, name)
	}
	return names
}

// upstreamTLS is what a BackendTLSPolicy asks for. closed says why it cannot be had.
func upstreamTLS(p *BackendTLSPolicy, configMaps map[Name]*corev1.ConfigMap) (t *mesh.UpstreamTLS, closed string) {
	v := &p.Spec.Validation
	t = &mesh.UpstreamTLS{Mode: mesh.TLSSimple, ServerName: string(v.Hostname)}
	for _, san := range v.SubjectAltNames {
		switch san.Type {
		case gatewayv1.HostnameSubjectAltNameType:
			t.SANs = append(t.SANs, string(san.Hostname))
		case gatewayv1.URISubjectAltNameType:
			t.SANs = append(t.SANs, string(san.URI))
		default:
			return nil, fmt.Sprintf("validation.subjectAltNames: %q is no type", san.Type)
		}
	}
	switch {
	case v.Hostname == "":
		return nil, "validation.hostname is empty"
	case len(v.CACertificateRefs) > 0:
		var wrong []string
		if t.CAPEM, wrong = trusted(p, configMaps); len(t.CAPEM) == 0 {
			return nil, strings.Join(wrong, "; ")
		}
		return t, ""
	case v.WellKnownCACertificates == nil || *v.WellKnownCACertificates != gatewayv1.WellKnownCACertificatesSystem:
		return nil, "validation: needs caCertificateRefs, or wellKnownCACertificates: System"
	}
	t.SystemRoots = true
	return t, ""
}

// fillTLS puts what BackendTLSPolicies ask for where DestinationRules say nothing of TLS. It returns why nothing may be sent
// to the service.
func fillTLS(in TrafficInput, p *mesh.TrafficPolicy) (closed []string) {
	policies := slices.SortedFunc(slices.Values(in.TLS), func(a, b *BackendTLSPolicy) int { return comparePolicyAge(a, b) })
	read := func(section string) *mesh.UpstreamTLS {
		for _, o := range policies {
			if !slices.Contains(sections(o, TargetOf(in.Service)), section) {
				continue
			}
			t, why := upstreamTLS(o, in.ConfigMaps)
			if source := "BackendTLSPolicy/" + o.Namespace + "/" + o.Name; !slices.Contains(p.Sources, source) {
				p.Sources = append(p.Sources, source)
				if why != "" {
					closed = append(closed, "BackendTLSPolicy "+o.Namespace+"/"+o.Name+": "+why)
				}
			}
			return t
		}
		return nil
	}
	whole := read("")
	ports := make(map[uint16]*mesh.UpstreamTLS)
	for _, port := range in.Service.Ports {
		if t := read(in.Ports[port.ServicePort]); t != nil && in.Ports[port.ServicePort] != "" {
			ports[port.ServicePort] = t
		} else if whole != nil {
			ports[port.ServicePort] = whole
		}
	}
	if len(closed) > 0 {
		return closed
	}
	fill := func(list []mesh.PortSettings) {
		for i := range list {
			if list[i].Settings.TLS == nil {
				list[i].Settings.TLS = ports[list[i].Port]
			}
		}
	}
	fill(p.Ports)
	for i := range p.Subsets {
		fill(p.Subsets[i].Ports)
	}
	if p.Settings.TLS != nil {
		return nil
	}
	p.Settings.TLS = whole
	for _, port := range in.Service.Ports {
		n := port.ServicePort
		if ports[n] == whole || slices.ContainsFunc(p.Ports, func(o mesh.PortSettings) bool { return o.Port == n }) {
			continue
		}
		p.Ports = append(p.Ports, mesh.PortSettings{Port: n, Settings: mesh.TrafficSettings{
			Balancer: p.Settings.Balancer, Pool: p.Settings.Pool, Outliers: p.Settings.Outliers, TLS: ports[n],
		}})
	}
	slices.SortFunc(p.Ports, func(a, b mesh.PortSettings) int { return int(a.Port) - int(b.Port) })
	return nil
}

// fillBackend puts what BackendTrafficPolicies say where DestinationRules say nothing.
func fillBackend(in TrafficInput, p *mesh.TrafficPolicy) {
	ours := p.Settings.RetryBudget == nil
	for _, o := range slices.SortedFunc(slices.Values(in.Backends), func(a, b *BackendTrafficPolicy) int { return comparePolicyAge(a, b) }) {
		budget, persistence := backendSettings(o)
		used := false
		if budget != nil && ours && p.Settings.RetryBudget == nil {
			p.Settings.RetryBudget, used = budget, true
		}
		if persistence != nil && p.Settings.Persistence == nil {
			p.Settings.Persistence, used = persistence, true
		}
		if used {
			p.Sources = append(p.Sources, "XBackendTrafficPolicy/"+o.Namespace+"/"+o.Name)
		}
	}
}

// The defaults of a retryConstraint.
const (
	defaultRetryInterval = 10 * time.Second
	defaultRetryRate     = 10 // in a second
)

// backendSettings is what a BackendTrafficPolicy says. What is wrong with it is left out.
func backendSettings(p *BackendTrafficPolicy) (*mesh.RetryBudget, *mesh.SessionPersistence) {
	var budget *mesh.RetryBudget
	if c := p.Spec.RetryConstraint; c != nil {
		budget = &mesh.RetryBudget{Interval: defaultRetryInterval, MinRate: defaultRetryRate, MinRateInterval: time.Second}
		if b := c.Budget; b != nil {
			if b.Percent != nil && *b.Percent >= 0 && *b.Percent <= 100 {
				budget.Percent = mesh.Fraction{Numerator: uint32(*b.Percent), Denominator: 100}
			}
			budget.Interval = gatewayDuration(b.Interval, defaultRetryInterval)
		}
		if r := c.MinRetryRate; r != nil {
			if r.Count != nil && *r.Count > 0 && *r.Count <= 1_000_000 {
				budget.MinRate = uint32(*r.Count)
			}
			budget.MinRateInterval = gatewayDuration(r.Interval, time.Second)
		}
	}
	return budget, sessionPersistence(p.Spec.SessionPersistence)
}

// gatewayDuration is a duration of the Gateway API (GEP-2257), which is short and written in Go's units.
func gatewayDuration(d *gatewayv1.Duration, otherwise time.Duration) time.Duration {
	if d == nil {
		return otherwise
	}
	if v, err := time.ParseDuration(string(*d)); err == nil && v > 0 {
		return v
	}
	return otherwise
}

func sessionPersistence(s *gatewayv1.SessionPersistence) *mesh.SessionPersistence {
	if s == nil {
		return nil
	}
	name := ""
	if s.SessionName != nil {
		name = *s.SessionName
	}
	out := &mesh.SessionPersistence{Absolute: gatewayDuration(s.AbsoluteTimeout, 0)}
	if s.Type != nil && *s.Type == gatewayv1.HeaderBasedSessionPersistence {
		if out.Header = strings.ToLower(cmp.Or(name, defaultSessionHeader)); !mesh.IsHeaderName(out.Header) {
			return nil
		}
		return out
	}
	out.Cookie = name
	if c := s.CookieConfig; c != nil && c.LifetimeType != nil && *c.LifetimeType == gatewayv1.PermanentCookieLifetimeType {
		out.Permanent = out.Absolute > 0
	}
	return out
}

// defaultSessionHeader carries a session where none is named.
const defaultSessionHeader = "x-mistnet-session"

// meant is what targetRefs[i] of a policy names, and which services those are. It says why there are none.
func (f *faults) meant(i int, ref gatewayv1.LocalPolicyTargetReference, services []TrafficInput) (Target, []TrafficInput) {
	t, ok := target(f.namespace, ref)
	if !ok {
		f.add(Unsupported, "targetRefs[%d]: a %s cannot be a target", i, ref.Kind)
		return t, nil
	}
	meant := slices.DeleteFunc(slices.Clone(services), func(s TrafficInput) bool { return TargetOf(s.Service) != t })
	if len(meant) == 0 {
		f.add(Ignored, "targetRefs[%d]: there is no %s %s", i, t.Kind, t.Name.Name)
	}
	return t, meant
}

// olderPolicies are those of the rivals of a policy that came before it and are for the same, the oldest first.
func olderPolicies[P metav1.Object](p P, rivals []P, same func(P) bool) []P {
	older := slices.DeleteFunc(slices.Clone(rivals), func(o P) bool { return comparePolicyAge(o, p) >= 0 || !same(o) })
	slices.SortFunc(older, func(a, b P) int { return comparePolicyAge(a, b) })
	return older
}

// BackendTLSStatus says what of a BackendTLSPolicy has no effect, or nil, and what its status is to say of each of its targets in the
// mesh. rivals are the others that share a target with it, services those that it means.
func BackendTLSStatus(cfg Config, p *BackendTLSPolicy, configMaps map[Name]*corev1.ConfigMap, rivals []*BackendTLSPolicy,
	services []TrafficInput) (*Status, *RouteStatus) {
	f := faults{kind: "BackendTLSPolicy", namespace: p.Namespace, name: p.Name}
	told := newTLSConditions(p, configMaps)
	for i, ref := range p.Spec.TargetRefs {
		t, meant := f.meant(i, ref.LocalPolicyTargetReference, services)
		if len(meant) == 0 {
			told.target(i, gatewayv1.PolicyReasonTargetNotFound, "there is no "+t.Kind+" "+t.Name.Name)
			continue
		}
		section := ""
		if ref.SectionName != nil {
			section = string(*ref.SectionName)
		}
		if section != "" && !slices.ContainsFunc(meant, func(s TrafficInput) bool { return s.hasPort(section) }) {
			f.add(Ignored, "targetRefs[%d].sectionName: %s %s has no port of the name %s", i, t.Kind, t.Name.Name, section)
			told.target(i, gatewayv1.PolicyReasonTargetNotFound, t.Kind+" "+t.Name.Name+" has no port of the name "+section)
			continue
		}
		if older := olderPolicies(p, rivals, func(o *BackendTLSPolicy) bool { return slices.Contains(sections(o, t), section) }); len(older) > 0 {
			f.add(Conflicted, "targetRefs[%d]: BackendTLSPolicy %s counts, which is older", i, older[0].Name)
			told.target(i, gatewayv1.PolicyReasonConflicted, "BackendTLSPolicy "+older[0].Name+" counts, which is older")
		}
		for _, s := range meant {
			if said := bySettings(cfg, s); said != nil && said.TLS != nil {
				f.add(Conflicted, "targetRefs[%d]: tls of DestinationRules for %s counts", i, s.Service.Hostname)
				told.target(i, gatewayv1.PolicyReasonConflicted, "tls of DestinationRules for "+s.Service.Hostname+" counts")
			}
		}
	}
	if len(p.Spec.Options) > 0 {
		f.add(Unsupported, "options have no effect")
	}
	if _, closed := upstreamTLS(p, configMaps); closed != "" {
		f.add(Unsupported, "%s; nothing is sent to the services", closed)
	} else if len(p.Spec.Validation.CACertificateRefs) > 0 {
		_, wrong := trusted(p, configMaps)
		for _, why := range wrong {
			f.add(Invalid, "%s; the others are trusted", why)
		}
	}
	return f.status(), told.status()
}

// bySettings is what DestinationRules say of a service to most clients; nil: nothing.
func bySettings(cfg Config, in TrafficInput) *mesh.TrafficSettings {
	in.TLS, in.Backends = nil, nil
	for _, p := range TrafficPolicies(cfg, in) {
		if p.Clients == "" {
			return &p.Settings
		}
	}
	return nil
}

func (in TrafficInput) hasPort(name string) bool {
	for _, p := range in.Service.Ports {
		if in.Ports[p.ServicePort] == name {
			return true
		}
	}
	return false
}

// BackendTrafficStatus says what of a BackendTrafficPolicy has no effect, or nil. rivals are the others that share a target
// with it, services those that it means.
func BackendTrafficStatus(cfg Config, p *BackendTrafficPolicy, rivals []*BackendTrafficPolicy, services []TrafficInput) *Status {
	f := faults{kind: "XBackendTrafficPolicy", namespace: p.Namespace, name: p.Name}
	budget, persistence := backendSettings(p)
	for i, ref := range p.Spec.TargetRefs {
		t, meant := f.meant(i, ref, services)
		if len(meant) == 0 {
			continue
		}
		for _, s := range meant {
			if said := bySettings(cfg, s); said != nil && said.RetryBudget != nil && budget != nil {
				f.add(Conflicted, "targetRefs[%d]: retryBudget of DestinationRules for %s counts", i, s.Service.Hostname)
			}
		}
		for _, o := range olderPolicies(p, rivals, func(o *BackendTrafficPolicy) bool { return slices.Contains(TrafficPolicyTargets(o), t) }) {
			ob, op := backendSettings(o)
			if ob != nil && budget != nil {
				f.add(Conflicted, "targetRefs[%d]: retryConstraint of XBackendTrafficPolicy %s counts, which is older", i, o.Name)
				break
			}
			if op != nil && persistence != nil {
				f.add(Conflicted, "targetRefs[%d]: sessionPersistence of XBackendTrafficPolicy %s counts, which is older", i, o.Name)
				break
			}
		}
	}
	if p.Spec.SessionPersistence != nil && persistence == nil {
		f.add(Invalid, "sessionPersistence.sessionName: %q is no header's name", *p.Spec.SessionPersistence.SessionName)
	}
	return f.status()
}
