package translate

import (
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	networkingapi "istio.io/api/networking/v1alpha3"

	"github.com/mistnet/mistnet/internal/accesslog"
	"github.com/mistnet/mistnet/internal/mesh"
)

// httpRule returns what an entry of http says; ok is false when it is not for the mesh.
func (v *vsTranslator) httpRule(n *ruleNotes, h vsHTTP) (*mesh.HTTPRule, bool) {
	in := h.rule
	matches, ok := v.matches(n, in.GetMatch())
	if !ok {
		return nil, false
	}
	out := &mesh.HTTPRule{
		Matches: matches, Headers: headerEdits(n, "headers", in.GetHeaders()), Fault: fault(n, in.GetFault()), CORS: corsPolicy(n, in.GetCorsPolicy()),
		Timeout: duration(n, "timeout", in.GetTimeout()), Mirrors: v.mirrors(n, h.namespace, in),
	}
	switch {
	case in.GetRedirect() != nil:
		out.Redirect = redirect(n, in.GetRedirect())
		if len(in.GetRoute()) > 0 {
			n.note(Ignored, "route", "has no effect besides redirect")
		}
		if in.GetDirectResponse() != nil {
			n.note(Ignored, "directResponse", "has no effect besides redirect")
		}
	case in.GetDirectResponse() != nil:
		out.Direct = directResponse(n, in.GetDirectResponse())
		if len(in.GetRoute()) > 0 {
			n.note(Ignored, "route", "has no effect besides directResponse")
		}
	case len(in.GetRoute()) == 0:
		n.refuse("", "neither route nor redirect nor directResponse says what is to happen")
	default:
		if out.Backends = v.backends(n, h.namespace, in.GetRoute()); len(out.Backends) == 1 {
			ofOneDestination(&out.Headers, &out.Backends[0].Headers)
		}
		out.Rewrite = rewrite(n, in.GetRewrite())
		out.Retry, out.TryTimeout = v.cfg.Retry, v.cfg.TryTimeout
		if in.GetRetries() != nil {
			out.Retry, out.TryTimeout = retries(n, in.GetRetries())
		}
	}
	return out, true
}

func (v *vsTranslator) backends(n *ruleNotes, namespace string, list []*networkingapi.HTTPRouteDestination) (backends []mesh.Backend) {
	for i, d := range list {
		at := fmt.Sprintf("route[%d]", i)
		backends = append(backends, mesh.Backend{
			Ref: v.destination(n, at, namespace, d.GetDestination()), Weight: weight(n, at, d.GetWeight()),
			Headers: headerEdits(n, at+".headers", d.GetHeaders()),
		})
	}
	checkWeights(n, backends)
	return backends
}

// ofOneDestination makes the changes of a rule's only destination the rule's own, the last: with several, each has its own, and the
// rule's come last.
func ofOneDestination(rule, destination *mesh.HeaderEdits) {
	authority := slices.ContainsFunc(rule.Request.Set, isAuthority)
	for _, h := range destination.Request.Set {
		if !authority || !isAuthority(h) { // the rule's word on the host is the stronger one
			rule.Request.Set = append(rule.Request.Set, h)
		}
	}
	destination.Request.Set = nil
	appendOps(&rule.Request, destination.Request)
	appendOps(&rule.Response, destination.Response)
	*destination = mesh.HeaderEdits{}
}

func weight(n *ruleNotes, at string, w int32) uint32 {
	if w < 0 {
		n.refuse(at+".weight", "%d is less than 0", w)
		return 0
	}
	return uint32(w)
}

// checkWeights refuses a rule whose destinations have no weight, or more than can be counted.
func checkWeights(n *ruleNotes, backends []mesh.Backend) {
	total := uint64(0)
	for _, b := range backends {
		total += uint64(b.Weight)
	}
	switch {
	case total > math.MaxUint32:
		n.refuse("route", "the weights add up to %d, more than %d", total, uint32(math.MaxUint32))
		clear(backends)
		for i := range backends {
			backends[i].Ref.Invalid = "weights without sense"
		}
	case total == 0 && len(backends) > 1:
		n.refuse("route", "the weights add up to 0")
	}
}

// mirrors are those of mirror and of mirrors. Without a percentage all requests are mirrored.
func (v *vsTranslator) mirrors(n *ruleNotes, namespace string, in *networkingapi.HTTPRoute) (mirrors []mesh.Mirror) {
	whole := mesh.Fraction{Numerator: 100, Denominator: 100}
	mirror := func(at string, d *networkingapi.Destination, part mesh.Fraction) {
		if part.Numerator > 0 {
			mirrors = append(mirrors, mesh.Mirror{Ref: v.destination(n, at, namespace, d), Percent: part})
		}
	}
	if in.GetMirror() != nil {
		part := whole
		//lint:ignore SA1019 deprecated, and still written
		switch old := in.GetMirrorPercent(); {
		case in.GetMirrorPercentage() != nil:
			part = percentage(n, "mirrorPercentage", in.GetMirrorPercentage())
		case old != nil:
			part = percentage(n, "mirrorPercent", &networkingapi.Percent{Value: float64(old.GetValue())})
		}
		mirror("mirror", in.GetMirror(), part)
	}
	for i, m := range in.GetMirrors() {
		at, part := fmt.Sprintf("mirrors[%d]", i), whole
		if m.GetPercentage() != nil {
			part = percentage(n, at+".percentage", m.GetPercentage())
		}
		mirror(at, m.GetDestination(), part)
	}
	return mirrors
}

// percentage is a part of the whole, to a millionth. An absent one is nothing.
func percentage(n *ruleNotes, field string, p *networkingapi.Percent) mesh.Fraction {
	v := p.GetValue()
	if !(v >= 0 && v <= 100) {
		n.refuse(field, "%v is not 0 to 100", v)
		return mesh.Fraction{}
	}
	if v == math.Trunc(v) {
		return fractionOf(uint32(v), 100)
	}
	return fractionOf(uint32(math.Round(v*10_000)), 1_000_000)
}

// fractionOf is none of the whole as the zero value.
func fractionOf(part, whole uint32) mesh.Fraction {
	if part == 0 {
		return mesh.Fraction{}
	}
	return mesh.Fraction{Numerator: part, Denominator: whole}
}

func headerEdits(n *ruleNotes, at string, h *networkingapi.Headers) mesh.HeaderEdits {
	return mesh.HeaderEdits{
		Request: headerOps(n, at+".request", h.GetRequest(), true), Response: headerOps(n, at+".response", h.GetResponse(), false),
	}
}

func headerOps(n *ruleNotes, at string, ops *networkingapi.Headers_HeaderOperations, request bool) (out mesh.HeaderOps) {
	for _, name := range ops.GetRemove() {
		switch name = strings.ToLower(name); {
		case name == "host" && request:
			n.note(Ignored, at+".remove", "the host of a request cannot be removed")
		case name == "host", !mesh.IsHeaderName(name):
			n.refuse(at+".remove", "%q cannot be removed", name)
		default:
			out.Remove = append(out.Remove, name)
		}
	}
	lines := func(field string, m map[string]string) (lines []mesh.Header) {
		for _, name := range slices.Sorted(maps.Keys(m)) {
			h := mesh.Header{Name: strings.ToLower(name), Value: m[name]}
			if h.Value == "" {
				n.note(Ignored, at+field, "%q stays as it is: there is no value", h.Name)
			}
			if settableHeader(n, at+field, h, request) {
				lines = append(lines, formatted(n, at+field, h, true))
			}
		}
		return lines
	}
	out.Set = lines(".set", ops.GetSet())
	set := slices.ContainsFunc(out.Set, isAuthority)
	for _, h := range lines(".add", ops.GetAdd()) {
		switch {
		case !isAuthority(h):
			out.Add = append(out.Add, h)
		case !set: // a request has one host: to add it is to set it, unless that is done already
			out.Set = append(out.Set, h)
		}
	}
	return out
}

func isAuthority(h mesh.Header) bool { return h.Name == "host" || h.Name == ":authority" }

// settableHeader refuses the rule for what cannot be a line of a header, and leaves out what is the connection's. authority: host and
// :authority may be set.
func settableHeader(n *ruleNotes, field string, h mesh.Header, authority bool) bool {
	switch {
	case isAuthority(h) && !authority, !isAuthority(h) && !mesh.IsHeaderName(h.Name):
		n.refuse(field, "%q cannot be set", h.Name)
	case !mesh.IsHeaderValue(h.Value):
		n.refuse(field, "the value of %q holds a control character", h.Name)
	case mesh.IsConnectionHeader(h.Name):
		n.note(Ignored, field, "%q stays as it is: it is between neighbours", h.Name)
	default:
		return true
	}
	return false
}

// operator is a command operator of Envoy.
var operator = regexp.MustCompile(`%[A-Z][A-Z0-9_]*(\([^)]*\))?(:[0-9]+)?%`)

// formatted is a header whose value may have command operators of Envoy, as in the formats of its logs. doubled: percent signs are
// written twice in values without operators too, as in a VirtualService; a Gateway API value without operators is what it is.
func formatted(n *ruleNotes, field string, h mesh.Header, doubled bool) mesh.Header {
	text := strings.ReplaceAll(h.Value, "%%", "\x00")
	plain := h
	if doubled {
		plain.Value = strings.ReplaceAll(text, "\x00", "%")
	}
	if !operator.MatchString(text) {
		return plain
	}
	f, err := accesslog.ParseHeader(h.Value)
	switch {
	case err != nil:
		n.note(Unsupported, field, "the value of %q is sent as it is written: %v", h.Name, err)
		return plain
	case isAuthority(h):
		n.refuse(field, "%q cannot be set to a value with operators", h.Name)
	case len(f.Never) > 0:
		n.note(Unsupported, field, "nothing is put in the place of %s in %q", strings.Join(f.Never, ", "), h.Name)
	}
	h.Format = true
	return h
}

func duration(n *ruleNotes, field string, d *durationpb.Duration) time.Duration {
	if d == nil {
		return 0
	}
	if err := d.CheckValid(); err != nil || d.AsDuration() < 0 || d.AsDuration() == math.MaxInt64 {
		n.refuse(field, "%v is out of range", d)
		return 0
	}
	return d.AsDuration()
}

func redirect(n *ruleNotes, in *networkingapi.HTTPRedirect) *mesh.Redirect {
	out := &mesh.Redirect{Status: 301, Scheme: in.GetScheme(), Authority: in.GetAuthority()}
	if code := in.GetRedirectCode(); code != 0 {
		if out.Status = redirectStatus(n, "redirect.redirectCode", int64(code)); out.Status == 0 {
			out.Status = 301
		}
	}
	switch p := in.GetRedirectPort().(type) {
	case *networkingapi.HTTPRedirect_Port:
		if p.Port == 0 || p.Port > 65535 {
			n.refuse("redirect.port", "%d is not a port", p.Port)
			break
		}
		out.PortFrom, out.Port = mesh.RedirectPortFixed, uint16(p.Port)
	case *networkingapi.HTTPRedirect_DerivePort:
		if p.DerivePort == networkingapi.HTTPRedirect_FROM_REQUEST_PORT {
			out.PortFrom = mesh.RedirectPortRequest
		}
	}
	switch {
	case in.GetUri() != "" && in.GetPrefixRewrite() != "":
		n.refuse("redirect", "uri and prefixRewrite exclude each other")
	case in.GetUri() != "":
		out.Path = mesh.PathEdit{Kind: mesh.ReplaceFull, Value: in.GetUri()}
	case in.GetPrefixRewrite() != "":
		out.Path = mesh.PathEdit{Kind: mesh.ReplacePrefix, Value: in.GetPrefixRewrite()}
	}
	return out
}

// redirectStatus is 0 for what is not the status of a redirect.
func redirectStatus(n *ruleNotes, field string, code int64) uint16 {
	switch code {
	case 301, 302, 303, 307, 308:
		return uint16(code)
	}
	n.refuse(field, "%d is not 301, 302, 303, 307 or 308", code)
	return 0
}

func directResponse(n *ruleNotes, in *networkingapi.HTTPDirectResponse) *mesh.DirectResponse {
	out := &mesh.DirectResponse{Status: 500}
	if s := in.GetStatus(); s < 200 || s > 599 {
		n.refuse("directResponse.status", "%d is not 200 to 599", s)
	} else {
		out.Status = uint16(s)
	}
	switch b := in.GetBody().GetSpecifier().(type) {
	case *networkingapi.HTTPBody_String_:
		out.Body = []byte(b.String_)
	case *networkingapi.HTTPBody_Bytes:
		out.Body = b.Bytes
	}
	if len(out.Body) == 0 {
		out.Body = nil
	}
	return out
}

func rewrite(n *ruleNotes, in *networkingapi.HTTPRewrite) *mesh.Rewrite {
	if in == nil {
		return nil
	}
	out := &mesh.Rewrite{Authority: in.GetAuthority()}
	switch expr := in.GetUriRegexRewrite(); {
	case in.GetUri() != "" && expr != nil:
		n.refuse("rewrite", "uri and uriRegexRewrite exclude each other")
	case in.GetUri() != "":
		out.Path = mesh.PathEdit{Kind: mesh.ReplacePrefix, Value: in.GetUri()}
	case expr != nil && compiles(n, "rewrite.uriRegexRewrite.match", expr.GetMatch()):
		out.Path = mesh.PathEdit{Kind: mesh.ReplaceRegex, Regex: expr.GetMatch(), Value: expr.GetRewrite()}
	}
	return out
}
