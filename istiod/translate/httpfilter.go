package translate

import (
	"fmt"
	"regexp"
	"strings"
	"time"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// filtered is what the filters of a rule or backend ask for.
type filtered struct {
	headers  mesh.HeaderEdits
	redirect *mesh.Redirect
	rewrite  *mesh.Rewrite
	cors     *mesh.CORS
	mirrors  []mesh.Mirror
	invalid  string // of a backend: why its share is refused
}

// filters reads the filters of a rule, or of a backend. What is not understood is not passed over (Gateway API: the filter
// must not be skipped): the rule refuses, or the backend's share is refused.
func (g *gatewayRoute) filters(n *ruleNotes, field string, list []gatewayv1.HTTPRouteFilter, ofRule bool) (out filtered) {
	refuse := func(at, format string, args ...any) {
		message := fmt.Sprintf(format, args...)
		if ofRule {
			n.refuse(at, "%s", message)
			return
		}
		n.note(Unsupported, at, "%s: its share of the requests is refused", message)
		out.invalid = n.at + dotted(at) + ": " + message
	}
	for i := range list {
		f := &list[i]
		at := fmt.Sprintf("%s[%d]", field, i)
		switch f.Type {
		case gatewayv1.HTTPRouteFilterRequestHeaderModifier:
			appendOps(&out.headers.Request, headerFilter(n, at+".requestHeaderModifier", f.RequestHeaderModifier, true))
		case gatewayv1.HTTPRouteFilterResponseHeaderModifier:
			appendOps(&out.headers.Response, headerFilter(n, at+".responseHeaderModifier", f.ResponseHeaderModifier, false))
		case gatewayv1.HTTPRouteFilterRequestRedirect:
			out.redirect = redirectFilter(n, at+".requestRedirect", f.RequestRedirect)
		case gatewayv1.HTTPRouteFilterURLRewrite:
			out.rewrite = rewriteFilter(n, at+".urlRewrite", f.URLRewrite)
		case gatewayv1.HTTPRouteFilterRequestMirror:
			if m, ok := g.mirrorFilter(n, at+".requestMirror", f.RequestMirror); ok {
				out.mirrors = append(out.mirrors, m)
			}
		case gatewayv1.HTTPRouteFilterCORS:
			if !ofRule {
				refuse(at, "CORS is for rules, not for backends")
				continue
			}
			out.cors = corsFilter(n, at+".cors", f.CORS)
		case gatewayv1.HTTPRouteFilterExtensionRef:
			ref := valueOf(f.ExtensionRef)
			g.dangle(n, InvalidKind, at+".extensionRef", fmt.Sprintf("nothing of kind %s and group %q is a filter here", ref.Kind, ref.Group))
			refuse(at+".extensionRef", "a filter that is not there")
		default:
			refuse(at+".type", "%q is not supported", f.Type)
		}
	}
	if out.redirect != nil && out.rewrite != nil {
		refuse(field, "RequestRedirect and URLRewrite exclude each other")
		out.rewrite = nil
	}
	return out
}

func appendOps(to *mesh.HeaderOps, ops mesh.HeaderOps) {
	to.Remove, to.Set, to.Add = append(to.Remove, ops.Remove...), append(to.Set, ops.Set...), append(to.Add, ops.Add...)
}

func headerFilter(n *ruleNotes, at string, in *gatewayv1.HTTPHeaderFilter, request bool) (out mesh.HeaderOps) {
	if in == nil {
		n.refuse(at, "is missing")
		return out
	}
	for i, name := range in.Remove {
		if name = strings.ToLower(name); name == "host" || !mesh.IsHeaderName(name) {
			n.refuse(fmt.Sprintf("%s.remove[%d]", at, i), "%q cannot be removed", name)
			continue
		}
		out.Remove = append(out.Remove, name)
	}
	lines := func(field string, list []gatewayv1.HTTPHeader, authority bool) (lines []mesh.Header) {
		seen := make(map[string]bool)
		for i, line := range list {
			h := mesh.Header{Name: strings.ToLower(string(line.Name)), Value: line.Value}
			at := fmt.Sprintf("%s.%s[%d]", at, field, i)
			if !seen[h.Name] && settableHeader(n, at, h, authority) { // the first of a name counts
				lines = append(lines, formatted(n, at, h, false))
			}
			seen[h.Name] = true
		}
		return lines
	}
	out.Set, out.Add = lines("set", in.Set, request), lines("add", in.Add, false)
	return out
}

func redirectFilter(n *ruleNotes, at string, in *gatewayv1.HTTPRequestRedirectFilter) *mesh.Redirect {
	out := &mesh.Redirect{Status: 302}
	if in == nil {
		n.refuse(at, "is missing")
		return out
	}
	out.Scheme, out.Authority, out.Path = valueOf(in.Scheme), string(valueOf(in.Hostname)), pathModifier(n, at+".path", in.Path)
	if in.StatusCode != nil {
		if status := redirectStatus(n, at+".statusCode", int64(*in.StatusCode)); status != 0 {
			out.Status = status
		}
	}
	switch port := valueOf(in.Port); {
	case port < 0 || port > 65535:
		n.refuse(at+".port", "%d is not a port", port)
	case port != 0:
		out.PortFrom, out.Port = mesh.RedirectPortFixed, uint16(port)
	case out.Scheme == "":
		out.PortFrom = mesh.RedirectPortRequest
	}
	return out
}

func rewriteFilter(n *ruleNotes, at string, in *gatewayv1.HTTPURLRewriteFilter) *mesh.Rewrite {
	if in == nil {
		n.refuse(at, "is missing")
		return nil
	}
	return &mesh.Rewrite{Authority: string(valueOf(in.Hostname)), Path: pathModifier(n, at+".path", in.Path)}
}

func pathModifier(n *ruleNotes, at string, in *gatewayv1.HTTPPathModifier) mesh.PathEdit {
	if in == nil {
		return mesh.PathEdit{}
	}
	switch in.Type {
	case gatewayv1.FullPathHTTPPathModifier:
		return mesh.PathEdit{Kind: mesh.ReplaceFull, Value: valueOf(in.ReplaceFullPath)}
	case gatewayv1.PrefixMatchHTTPPathModifier:
		return mesh.PathEdit{Kind: mesh.ReplacePrefix, Value: valueOf(in.ReplacePrefixMatch)}
	}
	n.refuse(at+".type", "%q is not known", in.Type)
	return mesh.PathEdit{}
}

// mirrorFilter: ok is false when nothing is mirrored.
func (g *gatewayRoute) mirrorFilter(n *ruleNotes, at string, in *gatewayv1.HTTPRequestMirrorFilter) (m mesh.Mirror, ok bool) {
	if in == nil {
		n.refuse(at, "is missing")
		return m, false
	}
	m.Percent = mesh.Fraction{Numerator: 100, Denominator: 100}
	part := func(field string, numerator, denominator int32) {
		if numerator < 0 || denominator < 1 || numerator > denominator {
			n.refuse(at+field, "%d of %d is not a part", numerator, denominator)
			return
		}
		m.Percent = fractionOf(uint32(numerator), uint32(denominator))
	}
	switch {
	case in.Percent != nil && in.Fraction != nil:
		n.refuse(at, "percent and fraction exclude each other")
	case in.Percent != nil:
		part(".percent", *in.Percent, 100)
	case in.Fraction != nil:
		whole := int32(100)
		if in.Fraction.Denominator != nil {
			whole = *in.Fraction.Denominator
		}
		part(".fraction", in.Fraction.Numerator, whole)
	}
	m.Ref = g.backendRef(n, at+".backendRef", in.BackendRef)
	return m, m.Percent.Numerator > 0
}

// corsMaxAge is how long a preflight may be remembered where maxAge does not say.
const corsMaxAge = 5

func corsFilter(n *ruleNotes, at string, in *gatewayv1.HTTPCORSFilter) *mesh.CORS {
	if in == nil {
		n.refuse(at, "is missing")
		return nil
	}
	seconds := in.MaxAge
	if seconds == 0 {
		seconds = corsMaxAge
	}
	age := time.Duration(max(seconds, 0)) * time.Second
	out := &mesh.CORS{
		AllowMethods: headerValues(n, at+".allowMethods", in.AllowMethods), AllowHeaders: headerValues(n, at+".allowHeaders", in.AllowHeaders),
		ExposeHeaders: headerValues(n, at+".exposeHeaders", in.ExposeHeaders), Credentials: valueOf(in.AllowCredentials), MaxAge: &age,
	}
	for _, o := range in.AllowOrigins {
		out.AllowOrigins = append(out.AllowOrigins, originMatch(string(o)))
	}
	return out
}

// originMatch: * is every origin, and within one stands for what is written with the letters of a hostname.
func originMatch(origin string) mesh.StringMatch {
	switch {
	case origin == "*":
		return mesh.StringMatch{Kind: mesh.MatchPresence}
	case !strings.Contains(origin, "*"):
		return mesh.StringMatch{Kind: mesh.MatchExact, Value: origin}
	}
	return mesh.StringMatch{Kind: mesh.MatchRegex, Value: strings.ReplaceAll(regexp.QuoteMeta(origin), `\*`, `[-.A-Za-z0-9]+`)}
}
