package mesh

import (
	"fmt"
	"net/netip"
	"strings"
)

// Policy is one authorization policy as data (istio.security.Authorization); package authz compiles it.
//
// It matches a connection when any of its Groups does; a Group when all of its Clauses do; a Clause when it is empty or
// any of its Matches does.
type Policy struct {
	Namespace string
	Name      string
	Scope     PolicyScope
	Action    PolicyAction
	Groups    []Group
	DryRun    bool

	// Invalid says why the policy could not be understood. Such a policy denies everything in its scope: an
	// unreadable rule must not become an open door.
	Invalid string
}

// Key names the policy in the mesh: namespace/name.
func (p *Policy) Key() string { return p.Namespace + "/" + p.Name }

// Group is a conjunction of clauses.
type Group struct{ Clauses []Clause }

// Clause is a disjunction of matches.
type Clause struct{ Matches []Match }

// Match holds when every kind of field that is set does: one of the listed values matches, and none of the Not ones.
// One in which nothing is set is skipped: it does not hold.
type Match struct {
	Namespaces, NotNamespaces           []StringMatch
	Principals, NotPrincipals           []StringMatch // without spiffe://
	SourceIPs, NotSourceIPs             []netip.Prefix
	DestinationIPs, NotDestinationIPs   []netip.Prefix
	DestinationPorts, NotDestPorts      []uint16
	ServiceAccounts, NotServiceAccounts []ServiceAccount

	Operation *Operation // what only a waypoint can see; nil: whatever is asked for
}

// Operation holds for an HTTP request as a Match does: every kind of field that is set must. Where requests cannot be seen,
// it never holds in an ALLOW policy, and always in a DENY policy: what is not known is not let through.
type Operation struct {
	Hosts, NotHosts     []StringMatch // :authority or Host, with its port and without; letters' case does not count
	Methods, NotMethods []StringMatch
	Paths, NotPaths     []StringMatch // normalised, without the query
	Headers             []HeaderCondition
}

// IsZero reports whether nothing is set.
func (o *Operation) IsZero() bool {
	return o == nil || len(o.Hosts)+len(o.NotHosts)+len(o.Methods)+len(o.NotMethods)+len(o.Paths)+len(o.NotPaths)+len(o.Headers) == 0
}

// HeaderCondition holds when the header's value matches one of Values, if there are any, and none of NotValues. One that is
// missing matches nothing.
type HeaderCondition struct {
	Name              string // lower case
	Values, NotValues []StringMatch
}

// ServiceAccount is an account of a namespace, in whatever trust domain.
type ServiceAccount struct{ Namespace, Name string }

// StringMatch is a test on one string.
type StringMatch struct {
	Kind  MatchKind
	Value string
}

// The parts of a path template that stand for something.
const (
	TemplateSegment = "{*}"  // one segment of a path that is not empty
	TemplateRest    = "{**}" // any number of segments, or none
)

// CheckPathTemplate says what is wrong with the value of a MatchTemplate: it begins with a slash, each {*} and {**} is a
// segment by itself, {**} comes once and after every {*}, and nothing else holds a brace or an asterisk.
func CheckPathTemplate(text string) error {
	if !strings.HasPrefix(text, "/") {
		return fmt.Errorf("path template %q does not begin with a slash", text)
	}
	rest := false
	for segment := range strings.SplitSeq(text[1:], "/") {
		switch {
		case rest && (segment == TemplateSegment || segment == TemplateRest):
			return fmt.Errorf("path template %q has more to fill in after {**}", text)
		case segment == TemplateRest:
			rest = true
		case segment != TemplateSegment && strings.ContainsAny(segment, "{}*"):
			return fmt.Errorf("path template %q: %q is neither {*}, {**} nor a plain segment", text, segment)
		}
	}
	return nil
}

// MatchKind is how a StringMatch reads its value.
type MatchKind uint8

// The kinds of string match.
const (
	MatchNever    MatchKind = iota // the zero value matches nothing
	MatchExact                     // the whole string
	MatchPrefix                    // how it begins
	MatchSuffix                    // how it ends
	MatchPresence                  // any string but ""
	MatchTemplate                  // a path of this form (CheckPathTemplate); for Operation.Paths and NotPaths only
)

// PolicyScope is which workloads a policy is for.
type PolicyScope uint8

// The scopes, with Istio's numbers.
const (
	ScopeGlobal    PolicyScope = iota // every workload
	ScopeNamespace                    // those of the policy's namespace
	ScopeWorkload                     // those that name the policy
)

// PolicyAction is what a policy that matches does.
type PolicyAction uint8

// The actions, with Istio's numbers.
const (
	Allow PolicyAction = iota
	Deny
)

func (a PolicyAction) String() string {
	if a == Deny {
		return "DENY"
	}
	return "ALLOW"
}

func (s PolicyScope) String() string {
	switch s {
	case ScopeGlobal:
		return "Global"
	case ScopeNamespace:
		return "Namespace"
	case ScopeWorkload:
	}
	return "WorkloadSelector"
}
