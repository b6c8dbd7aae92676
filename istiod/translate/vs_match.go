package translate

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	networkingapi "istio.io/api/networking/v1alpha3"

	"github.com/mistnet/mistnet/internal/mesh"
)

// claimHeader begins the names of headers that stand for what a token says of a request.
const claimHeader = "@request.auth.claims"

// matches are the conditions of a rule; ok is false when all of them are for gateways, so that the rule is not for the mesh.
func (v *vsTranslator) matches(n *ruleNotes, list []*networkingapi.HTTPMatchRequest) (matches []mesh.HTTPMatch, ok bool) {
	for i, m := range list {
		if forMesh(m.GetGateways()) {
			matches = append(matches, httpMatch(n, fmt.Sprintf("match[%d]", i), m))
		}
	}
	return matches, len(list) == 0 || len(matches) > 0
}

func httpMatch(n *ruleNotes, at string, m *networkingapi.HTTPMatchRequest) mesh.HTTPMatch {
	out := mesh.HTTPMatch{
		Name: m.GetName(), Path: uriMatch(n, at, m), Scheme: optionalText(n, at+".scheme", m.GetScheme()),
		Method: optionalText(n, at+".method", m.GetMethod()), Authority: optionalText(n, at+".authority", m.GetAuthority()),
		Headers: namedTexts(n, at+".headers", m.GetHeaders(), true), WithoutHeaders: namedTexts(n, at+".withoutHeaders", m.GetWithoutHeaders(), true),
		QueryParams: namedTexts(n, at+".queryParams", m.GetQueryParams(), false),
		Port:        matchPort(n, at+".port", m.GetPort()), SourceLabels: labelsOf(m.GetSourceLabels()), SourceNamespace: m.GetSourceNamespace(),
	}
	if m.GetStatPrefix() != "" {
		n.note(Ignored, at+".statPrefix", "has no effect")
	}
	return out
}

func labelsOf(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	return m
}

func uriMatch(n *ruleNotes, at string, m *networkingapi.HTTPMatchRequest) mesh.PathMatch {
	fold := m.GetIgnoreUriCase()
	switch t := m.GetUri().GetMatchType().(type) {
	case *networkingapi.StringMatch_Exact:
		return mesh.PathMatch{Kind: mesh.PathExact, Value: t.Exact, IgnoreCase: fold}
	case *networkingapi.StringMatch_Prefix:
		return mesh.PathMatch{Kind: mesh.PathPrefix, Value: t.Prefix, IgnoreCase: fold}
	case *networkingapi.StringMatch_Regex:
		if fold {
			n.note(Ignored, at+".ignoreUriCase", "has no effect on an expression, which can say (?i) itself")
		}
		if compiles(n, at+".uri.regex", t.Regex) {
			return mesh.PathMatch{Kind: mesh.PathRegex, Value: t.Regex}
		}
	}
	return mesh.PathMatch{}
}

// compiles reports whether an expression is one, and no costly one, and refuses the rule if not.
func compiles(n *ruleNotes, field, expr string) bool {
	if err := mesh.CheckRegex(expr); err != nil {
		n.refuse(field, "%v", err)
		return false
	}
	return true
}

// text is the test that a StringMatch asks for; ok is false when it asks for nothing, or for what makes no sense.
func text(n *ruleNotes, field string, m *networkingapi.StringMatch) (t mesh.StringMatch, ok bool) {
	switch t := m.GetMatchType().(type) {
	case *networkingapi.StringMatch_Exact:
		return mesh.StringMatch{Kind: mesh.MatchExact, Value: t.Exact}, true
	case *networkingapi.StringMatch_Prefix:
		return mesh.StringMatch{Kind: mesh.MatchPrefix, Value: t.Prefix}, true
	case *networkingapi.StringMatch_Regex:
		return mesh.StringMatch{Kind: mesh.MatchRegex, Value: t.Regex}, compiles(n, field+".regex", t.Regex)
	}
	return t, false
}

func optionalText(n *ruleNotes, field string, m *networkingapi.StringMatch) *mesh.StringMatch {
	if t, ok := text(n, field, m); ok {
		return &t
	}
	return nil
}

// namedTexts are the tests on headers or query parameters, by name. One that says nothing asks for presence, as does the
// expression *.
func namedTexts(n *ruleNotes, field string, m map[string]*networkingapi.StringMatch, headers bool) (out []mesh.NamedMatch) {
	for _, name := range slices.Sorted(maps.Keys(m)) {
		at := fmt.Sprintf("%s[%s]", field, name)
		named := mesh.NamedMatch{Name: name, Match: mesh.StringMatch{Kind: mesh.MatchPresence}}
		if headers {
			named.Name = strings.ToLower(name)
			if strings.HasPrefix(named.Name, claimHeader) {
				n.refuse(at, "claims of tokens can be looked at by gateways only")
				continue
			}
			if !mesh.IsHeaderName(strings.TrimPrefix(named.Name, ":")) {
				n.refuse(at, "is not the name of a header")
				continue
			}
		} else if name == "" {
			n.refuse(field, "a parameter without a name")
			continue
		}
		if m[name].GetMatchType() != nil && m[name].GetRegex() != "*" {
			var ok bool
			if named.Match, ok = text(n, at, m[name]); !ok {
				continue
			}
		}
		out = append(out, named)
	}
	return out
}

func matchPort(n *ruleNotes, field string, port uint32) uint16 {
	if port > 65535 {
		n.refuse(field, "%d is not a port", port)
		return 0
	}
	return uint16(port)
}

// tlsRule returns what an entry of tls says; ok is false when it is not for the mesh.
func (v *vsTranslator) tlsRule(n *ruleNotes, t *networkingapi.TLSRoute) (*mesh.StreamRule, bool) {
	s := &mesh.StreamRule{Backends: v.streamBackends(n, t.GetRoute())}
	meant := len(t.GetMatch()) == 0
	if meant {
		n.refuse("match", "is empty, and needs sniHosts")
	}
	for i, m := range t.GetMatch() {
		if !forMesh(m.GetGateways()) {
			continue
		}
		meant = true
		at := fmt.Sprintf("match[%d]", i)
		out := mesh.StreamMatch{Port: matchPort(n, at+".port", m.GetPort()), SourceLabels: labelsOf(m.GetSourceLabels()),
			SourceNamespace: m.GetSourceNamespace(), Destinations: prefixes(n, at+".destinationSubnets", m.GetDestinationSubnets())}
		for j, host := range m.GetSniHosts() {
			if host == "" || strings.Contains(strings.TrimPrefix(host, "*"), "*") {
				n.refuse(fmt.Sprintf("%s.sniHosts[%d]", at, j), "%q is neither a name nor *.suffix", host)
				continue
			}
			out.SNI = append(out.SNI, strings.ToLower(host))
		}
		if len(m.GetSniHosts()) == 0 {
			n.refuse(at+".sniHosts", "is empty")
		}
		if len(out.SNI) == 0 {
			out.SNI = []string{"*"}
		}
		s.Matches = append(s.Matches, out)
	}
	return s, meant
}

// tcpRule returns what an entry of tcp says; ok is false when it is not for the mesh.
func (v *vsTranslator) tcpRule(n *ruleNotes, t *networkingapi.TCPRoute) (*mesh.StreamRule, bool) {
	s := &mesh.StreamRule{Backends: v.streamBackends(n, t.GetRoute())}
	for i, m := range t.GetMatch() {
		if !forMesh(m.GetGateways()) {
			continue
		}
		at := fmt.Sprintf("match[%d]", i)
		out := mesh.StreamMatch{Port: matchPort(n, at+".port", m.GetPort()), SourceLabels: labelsOf(m.GetSourceLabels()),
			SourceNamespace: m.GetSourceNamespace(), Destinations: prefixes(n, at+".destinationSubnets", m.GetDestinationSubnets())}
		if m.GetSourceSubnet() != "" {
			out.Sources = prefixes(n, at+".sourceSubnet", []string{m.GetSourceSubnet()})
		}
		s.Matches = append(s.Matches, out)
	}
	return s, len(t.GetMatch()) == 0 || len(s.Matches) > 0
}

func (v *vsTranslator) streamBackends(n *ruleNotes, list []*networkingapi.RouteDestination) (backends []mesh.Backend) {
	for i, d := range list {
		at := fmt.Sprintf("route[%d]", i)
		backends = append(backends, mesh.Backend{
			Ref: v.destination(n, at, v.vs.Namespace, d.GetDestination()), Weight: weight(n, at, d.GetWeight()),
		})
	}
	checkWeights(n, backends)
	return backends
}

func prefixes(n *ruleNotes, field string, list []string) (out []netip.Prefix) {
	for i, text := range list {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			var a netip.Addr
			if a, err = netip.ParseAddr(text); err == nil {
				p, err = a.Prefix(a.BitLen())
			}
		}
		if err != nil || p.Addr().Zone() != "" {
			n.refuse(fmt.Sprintf("%s[%d]", field, i), "%q is neither an address nor a range of them", text)
			continue
		}
		out = append(out, p.Masked())
	}
	return out
}
