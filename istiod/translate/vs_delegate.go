package translate

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	networkingapi "istio.io/api/networking/v1alpha3"
)

// vsHTTP is an entry of http as it counts: with what was delegated in its place.
type vsHTTP struct {
	rule      *networkingapi.HTTPRoute
	at        string // where it is written
	namespace string // of the object it is written in: short names are of that
}

func delegateName(namespace string, d *networkingapi.Delegate) Name {
	if d.GetNamespace() != "" {
		namespace = d.GetNamespace()
	}
	return Name{namespace, d.GetName()}
}

// http are the entries of http, with the delegates' in the place of those that delegate.
func (v *vsTranslator) http() []vsHTTP {
	var all []vsHTTP
	for i, rule := range v.vs.Spec.Http {
		at := fmt.Sprintf("http[%d]", i)
		if rule.GetDelegate() == nil {
			all = append(all, vsHTTP{rule, at, v.vs.Namespace})
			continue
		}
		all = append(all, v.delegated(at, rule)...)
	}
	return all
}

// delegated are the entries of the delegate that a rule names, each within what the rule matches.
func (v *vsTranslator) delegated(at string, root *networkingapi.HTTPRoute) (all []vsHTTP) {
	n := delegateName(v.vs.Namespace, root.GetDelegate())
	at += ".delegate"
	d := v.c.VirtualService(n)
	switch {
	case len(root.GetRoute()) > 0 || root.GetRedirect() != nil || root.GetDirectResponse() != nil:
		v.add(Ignored, "%s: the rule says itself what is to happen, besides", at)
	case d == nil:
		v.add(Invalid, "%s: there is no VirtualService %s: the rule matches nothing", at, n)
		return nil
	case !isDelegate(d):
		v.add(Invalid, "%s: VirtualService %s has hosts of its own, and cannot be delegated to: the rule matches nothing", at, n)
		return nil
	case !slices.Contains(exportedTo(v.cfg, d), "") && !slices.Contains(exportedTo(v.cfg, d), v.vs.Namespace):
		v.add(Invalid, "%s: VirtualService %s is not exported to this namespace: the rule matches nothing", at, n)
		return nil
	}
	if d == nil || !isDelegate(d) {
		return []vsHTTP{{root, strings.TrimSuffix(at, ".delegate"), v.vs.Namespace}}
	}
	for j, rule := range d.Spec.Http {
		from := fmt.Sprintf("%s of %s, http[%d]", at, n, j)
		if rule.GetDelegate() != nil {
			v.add(Unsupported, "%s: a delegate cannot delegate further: the rule matches nothing", from)
			continue
		}
		matches, ok := mergeMatches(root.GetMatch(), rule.GetMatch())
		if !ok {
			v.add(Ignored, "%s: matches nothing that is delegated to it", from)
			continue
		}
		all = append(all, vsHTTP{v.merge(root, rule, matches), from, n.Namespace})
	}
	return all
}

// merge is a delegate's rule, with what it leaves open from the rule that delegates.
func (v *vsTranslator) merge(root, leaf *networkingapi.HTTPRoute, matches []*networkingapi.HTTPMatchRequest) *networkingapi.HTTPRoute {
	m := proto.Clone(leaf).(*networkingapi.HTTPRoute)
	m.Name, m.Match = joinNames(root.GetName(), leaf.GetName()), matches
	if m.Rewrite == nil {
		m.Rewrite = root.GetRewrite()
	}
	if m.Timeout == nil {
		m.Timeout = root.GetTimeout()
	}
	if m.Retries == nil {
		m.Retries = root.GetRetries()
	}
	if m.Fault == nil {
		m.Fault = root.GetFault()
	}
	if m.Mirror == nil {
		m.Mirror = v.qualified(root.GetMirror())
	}
	if len(m.Mirrors) == 0 {
		for _, policy := range root.GetMirrors() {
			m.Mirrors = append(m.Mirrors, &networkingapi.HTTPMirrorPolicy{Destination: v.qualified(policy.GetDestination()), Percentage: policy.GetPercentage()})
		}
	}
	if m.MirrorPercentage == nil {
		m.MirrorPercentage = root.GetMirrorPercentage()
	}
	//lint:ignore SA1019 deprecated, and still written
	if m.MirrorPercent == nil {
		//lint:ignore SA1019 the same
		m.MirrorPercent = root.GetMirrorPercent()
	}
	if m.CorsPolicy == nil {
		m.CorsPolicy = root.GetCorsPolicy()
	}
	if m.Headers == nil {
		m.Headers = root.GetHeaders()
	}
	return m
}

// qualified is a destination that means the same in another namespace.
func (v *vsTranslator) qualified(d *networkingapi.Destination) *networkingapi.Destination {
	if d == nil {
		return nil
	}
	return &networkingapi.Destination{Host: fullHost(v.cfg, v.vs.Namespace, d.GetHost()), Subset: d.GetSubset(), Port: d.GetPort()}
}

func joinNames(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + "-" + b
}

// mergeMatches are the matches of a delegate's rule within those of the rule that delegates; ok is false when there is
// nothing in both.
func mergeMatches(roots, leaves []*networkingapi.HTTPMatchRequest) (merged []*networkingapi.HTTPMatchRequest, ok bool) {
	if len(roots) == 0 || len(leaves) == 0 {
		return append(slices.Clone(roots), leaves...), true
	}
	for _, root := range roots {
		for _, leaf := range leaves {
			if !matchesDiffer(root, leaf) {
				merged = append(merged, mergeMatch(root, leaf))
			}
		}
	}
	return merged, len(merged) > 0
}

func mergeMatch(root, leaf *networkingapi.HTTPMatchRequest) *networkingapi.HTTPMatchRequest {
	m := proto.Clone(leaf).(*networkingapi.HTTPMatchRequest)
	m.Name = joinNames(root.GetName(), leaf.GetName())
	if m.Uri == nil {
		m.IgnoreUriCase = root.GetIgnoreUriCase()
	}
	for _, f := range []struct {
		to   **networkingapi.StringMatch
		from *networkingapi.StringMatch
	}{{&m.Uri, root.GetUri()}, {&m.Scheme, root.GetScheme()}, {&m.Method, root.GetMethod()}, {&m.Authority, root.GetAuthority()}} {
		if *f.to == nil {
			*f.to = f.from
		}
	}
	m.Headers = union(root.GetHeaders(), leaf.GetHeaders())
	m.WithoutHeaders = union(root.GetWithoutHeaders(), leaf.GetWithoutHeaders())
	m.QueryParams = union(root.GetQueryParams(), leaf.GetQueryParams())
	m.SourceLabels = union(root.GetSourceLabels(), leaf.GetSourceLabels())
	if m.Port == 0 {
		m.Port = root.GetPort()
	}
	if m.SourceNamespace == "" {
		m.SourceNamespace = root.GetSourceNamespace()
	}
	if len(m.Gateways) == 0 {
		m.Gateways = root.GetGateways()
	}
	if m.StatPrefix == "" {
		m.StatPrefix = root.GetStatPrefix()
	}
	return m
}

// union has what is in both maps; what is in over counts.
func union[V any](under, over map[string]V) map[string]V {
	if len(under) == 0 {
		return over
	}
	m := maps.Clone(under)
	maps.Copy(m, over)
	return m
}

// matchesDiffer reports whether a delegate's match goes beyond the one that delegates to it.
func matchesDiffer(root, leaf *networkingapi.HTTPMatchRequest) bool {
	texts := func(roots, leaves map[string]*networkingapi.StringMatch) bool {
		for k, l := range leaves {
			if textsDiffer(roots[k], l) {
				return true
			}
		}
		return false
	}
	for k, v := range leaf.GetSourceLabels() {
		if have, ok := root.GetSourceLabels()[k]; ok && have != v {
			return true
		}
	}
	return root.GetUri() != nil && leaf.GetUri() != nil && root.GetIgnoreUriCase() != leaf.GetIgnoreUriCase() || textsDiffer(root.GetUri(), leaf.GetUri()) ||
		textsDiffer(root.GetScheme(), leaf.GetScheme()) || textsDiffer(root.GetMethod(), leaf.GetMethod()) ||
		textsDiffer(root.GetAuthority(), leaf.GetAuthority()) || texts(root.GetHeaders(), leaf.GetHeaders()) ||
		texts(root.GetWithoutHeaders(), leaf.GetWithoutHeaders()) || texts(root.GetQueryParams(), leaf.GetQueryParams()) ||
		root.GetPort() != 0 && leaf.GetPort() != 0 && root.GetPort() != leaf.GetPort() ||
		root.GetSourceNamespace() != "" && leaf.GetSourceNamespace() != "" && root.GetSourceNamespace() != leaf.GetSourceNamespace()
}

// textsDiffer reports whether leaf may hold where root does not. Of expressions that cannot be told: only one of the two
// may say something then.
func textsDiffer(root, leaf *networkingapi.StringMatch) bool {
	if root.GetMatchType() == nil || leaf.GetMatchType() == nil {
		return false
	}
	switch r := root.GetMatchType().(type) {
	case *networkingapi.StringMatch_Exact:
		l, ok := leaf.GetMatchType().(*networkingapi.StringMatch_Exact)
		return !ok || l.Exact != r.Exact
	case *networkingapi.StringMatch_Prefix:
		switch l := leaf.GetMatchType().(type) {
		case *networkingapi.StringMatch_Exact:
			return !strings.HasPrefix(l.Exact, r.Prefix)
		case *networkingapi.StringMatch_Prefix:
			return !strings.HasPrefix(l.Prefix, r.Prefix)
		}
	}
	return true
}
