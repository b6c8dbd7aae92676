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

// Policy returns the noun of an AuthorizationPolicy, or nil when nobody enforces it. One that makes no sense comes back with
// Invalid set: it denies everything in its scope.
//
// What those who enforce it cannot judge is left out in the stricter way: a rule that allows by it is dropped, one that
// denies by it denies without it. To node proxies, who enforce what has no targets, that is all of HTTP; to waypoints it is
// what a token says of a request.
func Policy(cfg Config, ap *securityv1.AuthorizationPolicy) (*mesh.Policy, *Status) {
	status := func(r StatusReason, format string, args ...any) *Status {
		return &Status{Kind: "AuthorizationPolicy", Namespace: ap.Namespace, Name: ap.Name, Reason: r,
			Message: fmt.Sprintf(format, args...)}
	}
	spec, targeted := &ap.Spec, TargetsWaypoint(ap)
	p := &mesh.Policy{Namespace: ap.Namespace, Name: ap.Name, Scope: scope(cfg, ap)}
	switch spec.Action {
	case securityapi.AuthorizationPolicy_ALLOW:
	case securityapi.AuthorizationPolicy_DENY:
		p.Action = mesh.Deny
	case securityapi.AuthorizationPolicy_CUSTOM:
		if !targeted {
			return nil, status(Unsupported, "action %s needs a waypoint; node proxies do not enforce this policy", spec.Action)
		}
		p.Action = mesh.Deny // whom nobody can ask lets nobody in
	default:
		return nil, status(Unsupported, "action %s has no effect: nobody keeps a record", spec.Action)
	}
	c := policyCompiler{namespace: ap.Namespace, deny: p.Action == mesh.Deny, requests: targeted, left: make(map[string]bool)}
	if v, ok := ap.Annotations[annotationDryRun]; ok {
		dry, err := strconv.ParseBool(v)
		if err != nil {
			c.fault("metadata.annotations["+annotationDryRun+"]", "%q is neither true nor false", v)
		}
		p.DryRun = dry
	}
	c.targets(ap)
	for i, rule := range spec.Rules {
		p.Groups = append(p.Groups, c.rule("rules["+strconv.Itoa(i)+"]", rule)...)
	}
	who, advice := "node proxies do not see HTTP", "; use a waypoint and targetRefs"
	if targeted {
		who, advice = "waypoints cannot judge everything yet", ""
	}
	switch {
	case len(c.faults) > 0:
		p.Groups, p.Invalid = nil, errors.Join(c.faults...).Error()
		return p, status(Invalid, "everything is denied where this policy holds: %s", strings.ReplaceAll(p.Invalid, "\n", "; "))
	case spec.Action == securityapi.AuthorizationPolicy_CUSTOM:
		return p, status(Unsupported, "action CUSTOM: nobody can be asked yet, so that what the rules match is denied")
	case len(c.left) > 0 && c.deny:
		return p, status(Unsupported, "%s: connections are denied without regard to %s%s", who, c.attributes(), advice)
	case len(c.left) > 0:
		return p, status(Unsupported, "%s: rules that allow by %s are left out%s", who, c.attributes(), advice)
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

func scope(cfg Config, ap *securityv1.AuthorizationPolicy) mesh.PolicyScope {
	switch {
	case len(ap.Spec.GetSelector().GetMatchLabels()) > 0, TargetsWaypoint(ap):
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
	requests  bool // those who enforce it see requests
	faults    []error
	left      map[string]bool // attributes that were left out
}

func (c *policyCompiler) fault(path, format string, args ...any) {
	c.faults = append(c.faults, fmt.Errorf("%s: "+format, append([]any{path}, args...)...))
}

func (c *policyCompiler) attributes() string {
	return strings.Join(slices.Sorted(maps.Keys(c.left)), ", ")
}

// ruleCompiler is one rule under way.
type ruleCompiler struct {
	*policyCompiler
	skipped bool // something of this very rule was left out
}

// leave notes an attribute that cannot be judged, if it has values, and reports whether it has.
func (c *ruleCompiler) leave(name string, values []string) bool {
	if len(values) == 0 {
		return false
	}
	c.left[name], c.skipped = true, true
	return true
}

// rule returns the groups of a rule, none when it can never match.
func (c *policyCompiler) rule(path string, r *securityapi.Rule) []mesh.Group {
	rc := &ruleCompiler{policyCompiler: c}
	var from [][]mesh.Match // of each source what must hold, all of it
	split := false
	for i, f := range r.GetFrom() {
		m := rc.source(path+".from["+strconv.Itoa(i)+"].source", f.GetSource())
		from, split = append(from, m), split || len(m) > 1
	}
	var to []mesh.Match
	for i, t := range r.GetTo() {
		to = append(to, rc.operation(path+".to["+strconv.Itoa(i)+"].operation", t.GetOperation()))
	}
	rest := appendClause(nil, to)
	for i, w := range r.GetWhen() {
		rest = appendClause(rest, []mesh.Match{rc.condition(path+".when["+strconv.Itoa(i)+"]", w)})
	}
	if rc.skipped && !c.deny {
		return nil
	}
	if !split { // what any of the sources matches
		var any []mesh.Match
		for _, m := range from {
			any = append(any, m[0])
		}
		return []mesh.Group{{Clauses: slices.Concat(appendClause(nil, any), rest)}}
	}
	var groups []mesh.Group
	for _, all := range from {
		var clauses []mesh.Clause
		for _, m := range all {
			clauses = appendClause(clauses, []mesh.Match{m})
		}
		groups = append(groups, mesh.Group{Clauses: slices.Concat(clauses, rest)})
	}
	return groups
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
		len(m.NotDestPorts)+len(m.ServiceAccounts)+len(m.NotServiceAccounts) == 0 && m.Operation.IsZero()
}

// source returns what must hold of the caller: a match, and further ones where a match cannot say it all. Its trust domain
// is how its principal begins. To a waypoint the caller's own address, which remoteIpBlocks asks for, is the one it knows the
// client by: it believes no header of a request.
func (c *ruleCompiler) source(path string, s *securityapi.Source) []mesh.Match {
	left := c.leave("requestPrincipals", s.GetRequestPrincipals())
	left = c.leave("notRequestPrincipals", s.GetNotRequestPrincipals()) || left
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
	also := mesh.Match{Principals: c.trustDomains(path+".trustDomains", "trustDomains", s.GetTrustDomains())}
	m.NotPrincipals = append(m.NotPrincipals, c.trustDomains(path+".notTrustDomains", "notTrustDomains", s.GetNotTrustDomains())...)
	if c.requests {
		also.SourceIPs = c.prefixes(path+".remoteIpBlocks", s.GetRemoteIpBlocks())
		m.NotSourceIPs = append(m.NotSourceIPs, c.prefixes(path+".notRemoteIpBlocks", s.GetNotRemoteIpBlocks())...)
	} else {
		left = c.leave("remoteIpBlocks", s.GetRemoteIpBlocks()) || left
		left = c.leave("notRemoteIpBlocks", s.GetNotRemoteIpBlocks()) || left
	}
	left = left || len(s.GetTrustDomains())+len(s.GetNotTrustDomains()) > 0
	if len(m.Principals) == 0 {
		m.Principals, also.Principals = also.Principals, nil
	}
	if len(m.SourceIPs) == 0 {
		m.SourceIPs, also.SourceIPs = also.SourceIPs, nil
	}
	switch {
	case !isEmpty(also):
		return []mesh.Match{m, also}
	case !left && isEmpty(m):
		c.fault(path, "names no caller")
	}
	return []mesh.Match{m}
}

// trustDomains are matches of principals. How a trust domain ends cannot be told from them.
func (c *ruleCompiler) trustDomains(path, name string, patterns []string) []mesh.StringMatch {
	var matches []mesh.StringMatch
	for i, m := range c.strings(path, patterns) {
		switch m.Kind {
		case mesh.MatchExact:
			m = mesh.StringMatch{Kind: mesh.MatchPrefix, Value: m.Value + "/"}
		case mesh.MatchSuffix:
			c.leave(name, patterns)
			return nil
		default:
		}
		if strings.Contains(strings.TrimSuffix(m.Value, "/"), "/") {
			c.fault(path+"["+strconv.Itoa(i)+"]", "%q is no trust domain", patterns[i])
		}
		matches = append(matches, m)
	}
	return matches
}

func (c *ruleCompiler) operation(path string, o *securityapi.Operation) mesh.Match {
	m := mesh.Match{
		DestinationPorts: c.ports(path+".ports", o.GetPorts()),
		NotDestPorts:     c.ports(path+".notPorts", o.GetNotPorts()),
	}
	left := false
	if c.requests {
		op := &mesh.Operation{
			Hosts: c.strings(path+".hosts", o.GetHosts()), NotHosts: c.strings(path+".notHosts", o.GetNotHosts()),
			Methods: c.strings(path+".methods", o.GetMethods()), NotMethods: c.strings(path+".notMethods", o.GetNotMethods()),
			Paths: c.paths(path+".paths", o.GetPaths()), NotPaths: c.paths(path+".notPaths", o.GetNotPaths()),
		}
		if !op.IsZero() {
			m.Operation = op
		}
	} else {
		left = c.leave("hosts", o.GetHosts())
		left = c.leave("notHosts", o.GetNotHosts()) || left
		left = c.leave("methods", o.GetMethods()) || left
		left = c.leave("notMethods", o.GetNotMethods()) || left
		left = c.leave("paths", o.GetPaths()) || left
		left = c.leave("notPaths", o.GetNotPaths()) || left
	}
	if !left && isEmpty(m) {
		c.fault(path, "names no operation")
	}
	return m
}

func (c *ruleCompiler) condition(path string, w *securityapi.Condition) mesh.Match {
	yes, no := w.GetValues(), w.GetNotValues()
	if len(yes)+len(no) == 0 {
		c.fault(path, "has neither values nor notValues")
	}
	values, notValues := path+".values", path+".notValues"
	key := w.GetKey()
	switch key {
	case "source.ip":
		return mesh.Match{SourceIPs: c.prefixes(values, yes), NotSourceIPs: c.prefixes(notValues, no)}
	case "source.namespace":
		return mesh.Match{Namespaces: c.strings(values, yes), NotNamespaces: c.strings(notValues, no)}
	case "source.principal":
		return mesh.Match{Principals: c.principals(values, yes), NotPrincipals: c.principals(notValues, no)}
	case "source.serviceAccount":
		return mesh.Match{ServiceAccounts: c.accounts(values, yes), NotServiceAccounts: c.accounts(notValues, no)}
	case "source.trustDomain":
		return mesh.Match{Principals: c.trustDomains(values, key, yes), NotPrincipals: c.trustDomains(notValues, key, no)}
	case "destination.ip":
		return mesh.Match{DestinationIPs: c.prefixes(values, yes), NotDestinationIPs: c.prefixes(notValues, no)}
	case "destination.port":
		return mesh.Match{DestinationPorts: c.ports(values, yes), NotDestPorts: c.ports(notValues, no)}
	case "remote.ip":
		if c.requests {
			return mesh.Match{SourceIPs: c.prefixes(values, yes), NotSourceIPs: c.prefixes(notValues, no)}
		}
	}
	if header, ok := strings.CutPrefix(key, "request.headers["); ok && c.requests {
		name, ok := strings.CutSuffix(header, "]")
		if !ok || name == "" || strings.ContainsAny(name, "[] ") {
			c.fault(path+".key", "%q names no header", key)
		}
		if strings.HasPrefix(name, ":") && name != ":authority" && name != ":method" {
			c.leave(key, []string{key})
			return mesh.Match{}
		}
		return mesh.Match{Operation: &mesh.Operation{Headers: []mesh.HeaderCondition{{
			Name: strings.ToLower(name), Values: c.strings(values, yes), NotValues: c.strings(notValues, no),
		}}}}
	}
	c.leave(key, []string{key})
	return mesh.Match{}
}

// strings reads patterns: a name, name*, *name, or * for any.
func (c *policyCompiler) strings(path string, patterns []string) []mesh.StringMatch {
	var matches []mesh.StringMatch
	for i, p := range patterns {
		if m, ok := c.pattern(path+"["+strconv.Itoa(i)+"]", p); ok {
			matches = append(matches, m)
		}
	}
	return matches
}

func (c *policyCompiler) pattern(path, p string) (m mesh.StringMatch, ok bool) {
	m = mesh.StringMatch{Kind: mesh.MatchExact, Value: p}
	switch {
	case p == "*":
		m = mesh.StringMatch{Kind: mesh.MatchPresence}
	case strings.HasPrefix(p, "*"):
		m = mesh.StringMatch{Kind: mesh.MatchSuffix, Value: p[1:]}
	case strings.HasSuffix(p, "*"):
		m = mesh.StringMatch{Kind: mesh.MatchPrefix, Value: p[:len(p)-1]}
	}
	if p == "" || strings.Contains(m.Value, "*") {
		c.fault(path, "%q: want a value, value*, *value or *", p)
		return m, false
	}
	return m, true
}

// paths are patterns, some of them templates.
func (c *policyCompiler) paths(path string, patterns []string) []mesh.StringMatch {
	var matches []mesh.StringMatch
	for i, p := range patterns {
		at := path + "[" + strconv.Itoa(i) + "]"
		if strings.Contains(p, mesh.TemplateSegment) || strings.Contains(p, mesh.TemplateRest) {
			if err := mesh.CheckPathTemplate(p); err != nil {
				c.fault(at, "%v", err)
			}
			matches = append(matches, mesh.StringMatch{Kind: mesh.MatchTemplate, Value: p})
		} else if m, ok := c.pattern(at, p); ok {
			matches = append(matches, m)
		}
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
