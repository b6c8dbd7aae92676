package wds

import (
	"errors"
	"fmt"
	"net/netip"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/mistnet/mistnet/api/security"
	"github.com/mistnet/mistnet/internal/mesh"
)

// EncodePolicy returns p as the bytes of an istio.security.Authorization. Equal policies give equal bytes. It fails on
// what the message cannot carry, naming the field; an invalid policy cannot be sent at all.
func EncodePolicy(p *mesh.Policy) ([]byte, error) {
	m, err := policyToProto(p)
	if err != nil {
		return nil, fmt.Errorf("encode policy %q: %w", p.Key(), err)
	}
	return deterministic.Marshal(m)
}

// DecodePolicy reads the bytes of an istio.security.Authorization.
//
// When the rules cannot be understood, completely, it returns an error that names each field at fault together with the
// policy, whose Invalid says the same and whose scope is right: such a policy denies. A field this version does not know
// counts as one of them, since a match with one condition overlooked is wider than what its author wrote. The policy is
// nil when not even its name and scope are legible.
func DecodePolicy(body []byte) (*mesh.Policy, error) {
	var m pb.Authorization
	if err := proto.Unmarshal(body, &m); err != nil {
		return nil, fmt.Errorf("decode policy: %w", err)
	}
	p, err := policyFromProto(&m)
	if err != nil {
		return p, fmt.Errorf("decode policy %q: %w", m.GetNamespace()+"/"+m.GetName(), err)
	}
	return p, nil
}

func policyFromProto(m *pb.Authorization) (*mesh.Policy, error) {
	if m.GetName() == "" {
		return nil, errors.New("name: is empty")
	}
	if m.GetNamespace() == "" {
		return nil, errors.New("namespace: is empty")
	}
	if m.GetScope() < pb.Scope_GLOBAL || m.GetScope() > pb.Scope_WORKLOAD_SELECTOR {
		return nil, fmt.Errorf("scope: unknown value %d", m.GetScope())
	}
	p := &mesh.Policy{
		Namespace: m.GetNamespace(), Name: m.GetName(), Scope: mesh.PolicyScope(m.GetScope()), DryRun: m.GetDryRun(),
	}
	var r ruleReader
	switch m.GetAction() {
	case pb.Action_ALLOW:
	case pb.Action_DENY:
		p.Action = mesh.Deny
	default:
		r.fail("action", fmt.Errorf("unknown value %d", m.GetAction()))
	}
	for i, g := range m.GetGroups() {
		p.Groups = append(p.Groups, r.group(fmt.Sprintf("groups[%d]", i), g))
	}
	if err := errors.Join(r.errs...); err != nil {
		p.Groups, p.Invalid = nil, err.Error()
		return p, err
	}
	return p, nil
}

// ruleReader reads rules and gathers every fault with the path of its field.
type ruleReader struct{ errs []error }

func (r *ruleReader) fail(path string, err error) {
	r.errs = append(r.errs, fmt.Errorf("%s: %w", path, err))
}

func (r *ruleReader) known(path string, m protoreflect.ProtoMessage) {
	if len(m.ProtoReflect().GetUnknown()) > 0 {
		r.fail(path, errors.New("holds a field this version does not know"))
	}
}

func (r *ruleReader) group(path string, m *pb.Group) mesh.Group {
	var g mesh.Group
	r.known(path, m)
	for i, c := range m.GetRules() {
		g.Clauses = append(g.Clauses, r.clause(fmt.Sprintf("%s.rules[%d]", path, i), c))
	}
	return g
}

func (r *ruleReader) clause(path string, m *pb.Rules) mesh.Clause {
	var c mesh.Clause
	r.known(path, m)
	for i, mm := range m.GetMatches() {
		c.Matches = append(c.Matches, r.match(fmt.Sprintf("%s.matches[%d]", path, i), mm))
	}
	return c
}

func (r *ruleReader) match(path string, m *pb.Match) mesh.Match {
	r.known(path, m)
	if len(m.GetExtensions()) > 0 {
		r.fail(path+".extensions", fmt.Errorf("%q is not supported", m.GetExtensions()[0].GetName()))
	}
	return mesh.Match{
		Namespaces:         r.strings(path+".namespaces", m.GetNamespaces()),
		NotNamespaces:      r.strings(path+".not_namespaces", m.GetNotNamespaces()),
		Principals:         r.strings(path+".principals", m.GetPrincipals()),
		NotPrincipals:      r.strings(path+".not_principals", m.GetNotPrincipals()),
		SourceIPs:          r.prefixes(path+".source_ips", m.GetSourceIps()),
		NotSourceIPs:       r.prefixes(path+".not_source_ips", m.GetNotSourceIps()),
		DestinationIPs:     r.prefixes(path+".destination_ips", m.GetDestinationIps()),
		NotDestinationIPs:  r.prefixes(path+".not_destination_ips", m.GetNotDestinationIps()),
		DestinationPorts:   r.ports(path+".destination_ports", m.GetDestinationPorts()),
		NotDestPorts:       r.ports(path+".not_destination_ports", m.GetNotDestinationPorts()),
		ServiceAccounts:    r.accounts(path+".service_accounts", m.GetServiceAccounts()),
		NotServiceAccounts: r.accounts(path+".not_service_accounts", m.GetNotServiceAccounts()),
		Operation:          r.operation(path+".operation", m.GetOperation()),
	}
}

// operation returns nil for one that asks for nothing.
func (r *ruleReader) operation(path string, m *pb.Operation) *mesh.Operation {
	if m == nil {
		return nil
	}
	r.known(path, m)
	o := &mesh.Operation{
		Hosts: r.strings(path+".hosts", m.GetHosts()), NotHosts: r.strings(path+".not_hosts", m.GetNotHosts()),
		Methods: r.strings(path+".methods", m.GetMethods()), NotMethods: r.strings(path+".not_methods", m.GetNotMethods()),
		Paths: r.strings(path+".paths", m.GetPaths()), NotPaths: r.strings(path+".not_paths", m.GetNotPaths()),
	}
	for i, h := range m.GetHeaders() {
		at := fmt.Sprintf("%s.headers[%d]", path, i)
		r.known(at, h)
		if h.GetName() == "" || len(h.GetValues())+len(h.GetNotValues()) == 0 {
			r.fail(at, errors.New("without a name, or without values"))
		}
		o.Headers = append(o.Headers, mesh.HeaderCondition{
			Name:   h.GetName(),
			Values: r.strings(at+".values", h.GetValues()), NotValues: r.strings(at+".not_values", h.GetNotValues()),
		})
	}
	if o.IsZero() {
		return nil
	}
	return o
}

func (r *ruleReader) strings(path string, list []*pb.StringMatch) []mesh.StringMatch {
	var out []mesh.StringMatch
	for i, m := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		r.known(at, m)
		switch t := m.GetMatchType().(type) {
		case *pb.StringMatch_Exact:
			out = append(out, mesh.StringMatch{Kind: mesh.MatchExact, Value: t.Exact})
		case *pb.StringMatch_Prefix:
			out = append(out, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: t.Prefix})
		case *pb.StringMatch_Suffix:
			out = append(out, mesh.StringMatch{Kind: mesh.MatchSuffix, Value: t.Suffix})
		case *pb.StringMatch_Presence:
			out = append(out, mesh.StringMatch{Kind: mesh.MatchPresence})
		case *pb.StringMatch_Template:
			out = append(out, mesh.StringMatch{Kind: mesh.MatchTemplate, Value: t.Template})
		default:
			r.fail(at, errors.New("no match type"))
		}
	}
	return out
}

func (r *ruleReader) prefixes(path string, list []*pb.Address) []netip.Prefix {
	var out []netip.Prefix
	for i, m := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		r.known(at, m)
		length := m.GetLength()
		p, err := prefix(m.GetAddress(), &length)
		if err != nil {
			r.fail(at, err)
		}
		out = append(out, p)
	}
	return out
}

func (r *ruleReader) ports(path string, list []uint32) []uint16 {
	var out []uint16
	for i, n := range list {
		p, err := port(n)
		if err != nil {
			r.fail(fmt.Sprintf("%s[%d]", path, i), err)
		}
		out = append(out, p)
	}
	return out
}

func (r *ruleReader) accounts(path string, list []*pb.ServiceAccountMatch) []mesh.ServiceAccount {
	var out []mesh.ServiceAccount
	for i, m := range list {
		r.known(fmt.Sprintf("%s[%d]", path, i), m)
		out = append(out, mesh.ServiceAccount{Namespace: m.GetNamespace(), Name: m.GetServiceAccount()})
	}
	return out
}

func policyToProto(p *mesh.Policy) (*pb.Authorization, error) {
	if p.Invalid != "" {
		return nil, fmt.Errorf("is invalid: %s", p.Invalid)
	}
	m := &pb.Authorization{
		Name: p.Name, Namespace: p.Namespace, Scope: pb.Scope(p.Scope), Action: pb.Action(p.Action), DryRun: p.DryRun,
	}
	var errs []error
	if p.Name == "" || p.Namespace == "" {
		errs = append(errs, errors.New("name, namespace: is empty"))
	}
	for i, g := range p.Groups {
		pg := &pb.Group{}
		for j, c := range g.Clauses {
			pc := &pb.Rules{}
			for k, mm := range c.Matches {
				pm, err := matchToProto(fmt.Sprintf("groups[%d].rules[%d].matches[%d].", i, j, k), mm)
				errs = append(errs, err)
				pc.Matches = append(pc.Matches, pm)
			}
			pg.Rules = append(pg.Rules, pc)
		}
		m.Groups = append(m.Groups, pg)
	}
	return m, errors.Join(errs...)
}

// matchToProto begins every error with at, where the match is.
func matchToProto(at string, m mesh.Match) (*pb.Match, error) {
	out := &pb.Match{
		DestinationPorts: portNumbers(m.DestinationPorts), NotDestinationPorts: portNumbers(m.NotDestPorts),
		ServiceAccounts: accountsToProto(m.ServiceAccounts), NotServiceAccounts: accountsToProto(m.NotServiceAccounts),
	}
	var errs []error
	var err error
	if out.Operation, err = operationToProto(at+"operation.", m.Operation); err != nil {
		errs = append(errs, err)
	}
	if err := stringsToProto(at, []stringList{
		{"namespaces", m.Namespaces, &out.Namespaces},
		{"not_namespaces", m.NotNamespaces, &out.NotNamespaces},
		{"principals", m.Principals, &out.Principals},
		{"not_principals", m.NotPrincipals, &out.NotPrincipals},
	}); err != nil {
		errs = append(errs, err)
	}
	for _, f := range []struct {
		field string
		from  []netip.Prefix
		to    *[]*pb.Address
	}{
		{"source_ips", m.SourceIPs, &out.SourceIps},
		{"not_source_ips", m.NotSourceIPs, &out.NotSourceIps},
		{"destination_ips", m.DestinationIPs, &out.DestinationIps},
		{"not_destination_ips", m.NotDestinationIPs, &out.NotDestinationIps},
	} {
		for i, p := range f.from {
			if !p.IsValid() {
				errs = append(errs, fmt.Errorf("%s%s[%d]: is not a prefix", at, f.field, i))
				continue
			}
			*f.to = append(*f.to, &pb.Address{Address: p.Addr().AsSlice(), Length: uint32(p.Bits())})
		}
	}
	return out, errors.Join(errs...)
}

// operationToProto begins every error with at. It returns nil for an operation that asks for nothing.
func operationToProto(at string, o *mesh.Operation) (*pb.Operation, error) {
	if o.IsZero() {
		return nil, nil
	}
	out := &pb.Operation{}
	lists := []stringList{
		{"hosts", o.Hosts, &out.Hosts}, {"not_hosts", o.NotHosts, &out.NotHosts},
		{"methods", o.Methods, &out.Methods}, {"not_methods", o.NotMethods, &out.NotMethods},
		{"paths", o.Paths, &out.Paths}, {"not_paths", o.NotPaths, &out.NotPaths},
	}
	var errs []error
	for i, h := range o.Headers {
		if h.Name == "" || len(h.Values)+len(h.NotValues) == 0 {
			errs = append(errs, fmt.Errorf("%sheaders[%d]: without a name, or without values", at, i))
		}
		ph := &pb.HeaderMatch{Name: h.Name}
		out.Headers = append(out.Headers, ph)
		lists = append(lists, stringList{fmt.Sprintf("headers[%d].values", i), h.Values, &ph.Values},
			stringList{fmt.Sprintf("headers[%d].not_values", i), h.NotValues, &ph.NotValues})
	}
	errs = append(errs, stringsToProto(at, lists))
	return out, errors.Join(errs...)
}

// stringList is where one list of strings comes from and goes to.
type stringList struct {
	field string
	from  []mesh.StringMatch
	to    *[]*pb.StringMatch
}

func stringsToProto(at string, lists []stringList) error {
	var errs []error
	for _, f := range lists {
		for i, sm := range f.from {
			x, err := stringToProto(sm)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s%s[%d]: %w", at, f.field, i, err))
			}
			*f.to = append(*f.to, x)
		}
	}
	return errors.Join(errs...)
}

func stringToProto(m mesh.StringMatch) (*pb.StringMatch, error) {
	switch m.Kind {
	case mesh.MatchExact:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Exact{Exact: m.Value}}, nil
	case mesh.MatchPrefix:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Prefix{Prefix: m.Value}}, nil
	case mesh.MatchSuffix:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Suffix{Suffix: m.Value}}, nil
	case mesh.MatchPresence:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Presence{Presence: &pb.Empty{}}}, nil
	case mesh.MatchTemplate:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Template{Template: m.Value}}, nil
	case mesh.MatchNever:
	}
	return nil, errors.New("no match type")
}

func portNumbers(ports []uint16) []uint32 {
	var out []uint32
	for _, p := range ports {
		out = append(out, uint32(p))
	}
	return out
}

func accountsToProto(list []mesh.ServiceAccount) []*pb.ServiceAccountMatch {
	var out []*pb.ServiceAccountMatch
	for _, a := range list {
		out = append(out, &pb.ServiceAccountMatch{Namespace: a.Namespace, ServiceAccount: a.Name})
	}
	return out
}
