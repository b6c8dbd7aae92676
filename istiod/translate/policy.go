package translate

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	securityapi "istio.io/api/security/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

const annotationDryRun = "istio.io/dry-run"

// Policy returns the L4 policy of an AuthorizationPolicy, or nil when it is not for node proxies. A policy that makes
// no sense comes back with Invalid set: it denies everything in its scope. HTTP attributes cannot be seen at L4 and are
// left out in the stricter way: a rule that allows by them is dropped, one that denies by them denies without them.
func Policy(cfg Config, ap *securityv1.AuthorizationPolicy) (*mesh.Policy, *Status) {
	spec := &ap.Spec
	status := func(r StatusReason, format string, args ...any) *Status {
		return &Status{Kind: "AuthorizationPolicy", Namespace: ap.Namespace, Name: ap.Name, Reason: r,
			Message: fmt.Sprintf(format, args...)}
	}
	if TargetsWaypoint(ap) {
		return nil, status(Unsupported, "targetRefs need a waypoint, and there are none yet: nobody enforces this policy")
	}
	p := &mesh.Policy{Namespace: ap.Namespace, Name: ap.Name, Scope: scope(cfg, ap)}
	switch spec.Action {
	case securityapi.AuthorizationPolicy_ALLOW:
	case securityapi.AuthorizationPolicy_DENY:
		p.Action = mesh.Deny
	default:
		return nil, status(Unsupported, "action %s needs a waypoint; node proxies do not enforce this policy", spec.Action)
	}
	c := policyCompiler{namespace: ap.Namespace, deny: p.Action == mesh.Deny, http: make(map[string]bool)}
	if v, ok := ap.Annotations[annotationDryRun]; ok {
		dry, err := strconv.ParseBool(v)
		if err != nil {
			c.fault("metadata.annotations["+annotationDryRun+"]", "%q is neither true nor false", v)
		}
		p.DryRun = dry
	}
	for i, rule := range spec.Rules {
		if g, ok := c.rule("rules["+strconv.Itoa(i)+"]", rule); ok {
			p.Groups = append(p.Groups, g)
		}
	}
	switch {
	case len(c.faults) > 0:
		p.Groups, p.Invalid = nil, errors.Join(c.faults...).Error()
		return p, status(Invalid, "everything is denied where this policy holds: %s", strings.ReplaceAll(p.Invalid, "\n", "; "))
	case len(c.http) > 0 && c.deny:
		return p, status(Unsupported, "node proxies do not see HTTP: connections are denied without regard to %s; "+
			"use a waypoint and targetRefs", c.attributes())
	case len(c.http) > 0:
		return p, status(Unsupported, "node proxies do not see HTTP: rules that allow by %s are left out; "+
			"use a waypoint and targetRefs", c.attributes())
	}
	return p, nil
}

// Attaches reports whether the policy is one that a workload of the namespace with the labels must name.
func Attaches(cfg Config, ap *securityv1.AuthorizationPolicy, namespace string, labels map[string]string) bool {
	return (ap.Namespace == namespace || ap.Namespace == cfg.RootNamespace) && IsL4(ap) &&
		Selects(ap.Spec.GetSelector().GetMatchLabels(), labels)
}

// IsL4 reports whether the policy is one that node proxies enforce.
func IsL4(ap *securityv1.AuthorizationPolicy) bool {
	return !TargetsWaypoint(ap) &&
		(ap.Spec.Action == securityapi.AuthorizationPolicy_ALLOW || ap.Spec.Action == securityapi.AuthorizationPolicy_DENY)
}

// Enforceable returns the policy in a form that has no need of Invalid, which the wire cannot carry: what is invalid
// becomes a DENY of everything in the same scope.
func Enforceable(p *mesh.Policy) *mesh.Policy {
	if p.Invalid == "" {
		return p
	}
	return &mesh.Policy{Namespace: p.Namespace, Name: p.Name, Scope: p.Scope, Action: mesh.Deny, DryRun: p.DryRun,
		Groups: []mesh.Group{{}}}
}

// TargetsWaypoint reports whether the policy is for waypoints, and no business of node proxies.
func TargetsWaypoint(ap *securityv1.AuthorizationPolicy) bool {
	return ap.Spec.GetTargetRef() != nil || len(ap.Spec.GetTargetRefs()) > 0
}

func scope(cfg Config, ap *securityv1.AuthorizationPolicy) mesh.PolicyScope {
	switch {
	case len(ap.Spec.GetSelector().GetMatchLabels()) > 0:
		return mesh.ScopeWorkload
	case ap.Namespace == cfg.RootNamespace:
		return mesh.ScopeGlobal
	}
	return mesh.ScopeNamespace
}

// policyCompiler turns rules into groups and collects what is wrong and what is left out.
type policyCompiler struct {
	namespace string
	deny      bool
	faults    []error
	http      map[string]bool // attributes that were left out
}

func (c *policyCompiler) fault(path, format string, args ...any) {
	c.faults = append(c.faults, fmt.Errorf("%s: "+format, append([]any{path}, args...)...))
}

func (c *policyCompiler) attributes() string {
	return strings.Join(slices.Sorted(maps.Keys(c.http)), ", ")
}

// rule returns the group of a rule; ok is false when the rule can never match.
func (c *policyCompiler) rule(path string, r *securityapi.Rule) (g mesh.Group, ok bool) {
	var seen bool // an HTTP attribute in this very rule
	note := func(name string, values []string) {
		if len(values) > 0 {
			c.http[name], seen = true, true
		}
	}
	var from, to []mesh.Match
	for i, f := range r.GetFrom() {
		from = append(from, c.source(path+".from["+strconv.Itoa(i)+"].source", f.GetSource(), note))
	}
	for i, t := range r.GetTo() {
		to = append(to, c.operation(path+".to["+strconv.Itoa(i)+"].operation", t.GetOperation(), note))
	}
	g.Clauses = appendClause(g.Clauses, from)
	g.Clauses = appendClause(g.Clauses, to)
	for i, w := range r.GetWhen() {
		g.Clauses = appendClause(g.Clauses, []mesh.Match{c.condition(path+".when["+strconv.Itoa(i)+"]", w, note)})
	}
	return g, c.deny || !seen
}

// appendClause adds the alternatives as a clause, unless there are none or one of them asks for nothing: then the
// clause always holds. A proxy would skip an alternative that asks for nothing, so none is ever sent.
func appendClause(clauses []mesh.Clause, matches []mesh.Match) []mesh.Clause {
	if len(matches) == 0 || slices.ContainsFunc(matches, isEmpty) {
		return clauses
	}
	return append(clauses, mesh.Clause{Matches: matches})
}

func isEmpty(m mesh.Match) bool {
	return len(m.Namespaces)+len(m.NotNamespaces)+len(m.Principals)+len(m.NotPrincipals)+len(m.SourceIPs)+
		len(m.NotSourceIPs)+len(m.DestinationIPs)+len(m.NotDestinationIPs)+len(m.DestinationPorts)+
		len(m.NotDestPorts)+len(m.ServiceAccounts)+len(m.NotServiceAccounts) == 0
}

func (c *policyCompiler) source(path string, s *securityapi.Source, note func(string, []string)) mesh.Match {
	note("remoteIpBlocks", s.GetRemoteIpBlocks())
	note("notRemoteIpBlocks", s.GetNotRemoteIpBlocks())
	note("requestPrincipals", s.GetRequestPrincipals())
	note("notRequestPrincipals", s.GetNotRequestPrincipals())
	note("trustDomains", s.GetTrustDomains())
	note("notTrustDomains", s.GetNotTrustDomains())
	m := mesh.Match{
		Principals:         c.principals(path+".principals", s.GetPrincipals()),
		NotPrincipals:      c.principals(path+".notPrincipals", s.GetNotPrincipals()),
		Namespaces:         c.strings(path+".namespaces", s.GetNamespaces()),
		NotNamespaces:      c.strings(path+".notNamespaces", s.GetNotNamespaces()),
		SourceIPs:          c.prefixes(path+".ipBlocks", s.GetIpBlocks()),
		NotSourceIPs:       c.prefixes(path+".notIpBlocks", s.GetNotIpBlocks()),
		ServiceAccounts:    c.accounts(path+".serviceAccounts", s.GetServiceAccounts()),
		NotServiceAccounts: c.accounts(path+".notServiceAccounts", s.GetNotServiceAccounts()),
	}
	left := len(s.GetRemoteIpBlocks()) + len(s.GetNotRemoteIpBlocks()) + len(s.GetRequestPrincipals()) +
		len(s.GetNotRequestPrincipals()) + len(s.GetTrustDomains()) + len(s.GetNotTrustDomains())
	if left == 0 && isEmpty(m) {
		c.fault(path, "names no caller")
	}
	return m
}

func (c *policyCompiler) operation(path string, o *securityapi.Operation, note func(string, []string)) mesh.Match {
	note("hosts", o.GetHosts())
	note("notHosts", o.GetNotHosts())
	note("methods", o.GetMethods())
	note("notMethods", o.GetNotMethods())
	note("paths", o.GetPaths())
	note("notPaths", o.GetNotPaths())
	m := mesh.Match{
		DestinationPorts: c.ports(path+".ports", o.GetPorts()),
		NotDestPorts:     c.ports(path+".notPorts", o.GetNotPorts()),
	}
	left := len(o.GetHosts()) + len(o.GetNotHosts()) + len(o.GetMethods()) + len(o.GetNotMethods()) +
		len(o.GetPaths()) + len(o.GetNotPaths())
	if left == 0 && isEmpty(m) {
		c.fault(path, "names no operation")
	}
	return m
}

func (c *policyCompiler) condition(path string, w *securityapi.Condition, note func(string, []string)) mesh.Match {
	yes, no := w.GetValues(), w.GetNotValues()
	if len(yes)+len(no) == 0 {
		c.fault(path, "has neither values nor notValues")
	}
	values, notValues := path+".values", path+".notValues"
	switch w.GetKey() {
	case "source.ip":
		return mesh.Match{SourceIPs: c.prefixes(values, yes), NotSourceIPs: c.prefixes(notValues, no)}
	case "source.namespace":
		return mesh.Match{Namespaces: c.strings(values, yes), NotNamespaces: c.strings(notValues, no)}
	case "source.principal":
		return mesh.Match{Principals: c.principals(values, yes), NotPrincipals: c.principals(notValues, no)}
	case "destination.ip":
		return mesh.Match{DestinationIPs: c.prefixes(values, yes), NotDestinationIPs: c.prefixes(notValues, no)}
	case "destination.port":
		return mesh.Match{DestinationPorts: c.ports(values, yes), NotDestPorts: c.ports(notValues, no)}
	}
	note(w.GetKey(), []string{w.GetKey()})
	return mesh.Match{}
}

// strings reads patterns: a name, name*, *name, or * for any.
func (c *policyCompiler) strings(path string, patterns []string) []mesh.StringMatch {
	var matches []mesh.StringMatch
	for i, p := range patterns {
		m := mesh.StringMatch{Kind: mesh.MatchExact, Value: p}
		switch {
		case p == "*":
			m = mesh.StringMatch{Kind: mesh.MatchPresence}
		case strings.HasPrefix(p, "*"):
			m = mesh.StringMatch{Kind: mesh.MatchSuffix, Value: p[1:]}
		case strings.HasSuffix(p, "*"):
			m = mesh.StringMatch{Kind: mesh.MatchPrefix, Value: p[:len(p)-1]}
		}
		if p == "" || strings.Contains(m.Value, "*") {
			c.fault(path+"["+strconv.Itoa(i)+"]", "%q: want a value, value*, *value or *", p)
			continue
		}
		matches = append(matches, m)
	}
	return matches
}

// principals are strings; some write them as URIs, which can only mean one thing.
func (c *policyCompiler) principals(path string, patterns []string) []mesh.StringMatch {
	bare := make([]string, len(patterns))
	for i, p := range patterns {
		bare[i] = strings.TrimPrefix(p, "spiffe://")
	}
	return c.strings(path, bare)
}

// accounts reads namespace/account, or an account of the policy's own namespace.
func (c *policyCompiler) accounts(path string, names []string) []mesh.ServiceAccount {
	var accounts []mesh.ServiceAccount
	for i, n := range names {
		namespace, account, found := strings.Cut(n, "/")
		if !found {
			namespace, account = c.namespace, n
		}
		if namespace == "" || account == "" || strings.ContainsAny(account, "/*") || strings.Contains(namespace, "*") {
			c.fault(path+"["+strconv.Itoa(i)+"]", "%q: want an account or namespace/account", n)
			continue
		}
		accounts = append(accounts, mesh.ServiceAccount{Namespace: namespace, Name: account})
	}
	return accounts
}

func (c *policyCompiler) ports(path string, numbers []string) []uint16 {
	var ports []uint16
	for i, text := range numbers {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			c.fault(path+"["+strconv.Itoa(i)+"]", "%q is not a port", text)
			continue
		}
		ports = append(ports, uint16(n))
	}
	return ports
}

func (c *policyCompiler) prefixes(path string, blocks []string) []netip.Prefix {
	var prefixes []netip.Prefix
	for i, text := range blocks {
		p, err := parsePrefix(text)
		if err != nil {
			c.fault(path+"["+strconv.Itoa(i)+"]", "%q is neither an address nor a range of them", text)
			continue
		}
		prefixes = append(prefixes, p)
	}
	return prefixes
}

func parsePrefix(text string) (netip.Prefix, error) {
	if strings.Contains(text, "/") {
		p, err := netip.ParsePrefix(text)
		if err == nil && p.Addr().Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		return p.Masked(), err
	}
	a, err := netip.ParseAddr(text)
	if err != nil {
		return netip.Prefix{}, err
	}
	if a.Zone() != "" {
		return netip.Prefix{}, fmt.Errorf("address %q has a zone", text)
	}
	a = a.Unmap()
	return netip.PrefixFrom(a, a.BitLen()), nil
}
