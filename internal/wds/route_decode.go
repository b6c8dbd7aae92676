package wds

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/mistnet/mistnet/api/route"
	"github.com/mistnet/mistnet/internal/mesh"
)

// DecodeRoute reads the bytes of a mistnet.route.v1.Route. An error names each field at fault, fields this version does
// not know among them, and then the route is nil.
func DecodeRoute(body []byte) (*mesh.Route, error) {
	var m pb.Route
	if err := proto.Unmarshal(body, &m); err != nil {
		return nil, fmt.Errorf("decode route: %w", err)
	}
	r, err := routeFromProto(&m)
	if err != nil {
		return nil, fmt.Errorf("decode route %q: %w", m.GetNamespace()+"/"+m.GetName(), err)
	}
	return r, nil
}

func routeFromProto(m *pb.Route) (*mesh.Route, error) {
	r := routeReader{}
	r.unknownFields("", m.ProtoReflect())
	out := &mesh.Route{
		Kind: mesh.RouteKind(r.enum("kind", m.GetKind(), false)), Namespace: r.filled("namespace", m.GetNamespace()),
		Name: r.filled("name", m.GetName()), Protocol: mesh.RouteProtocol(r.enum("protocol", m.GetProtocol(), false)),
		Rule: m.GetRule(), RuleName: m.GetRuleName(), Invalid: m.GetInvalid(),
	}
	if c := m.GetCreated(); c != nil {
		if err := c.CheckValid(); err != nil {
			r.fail("created", err)
		} else if out.Created = c.AsTime(); c.GetNanos() != 0 {
			r.fail("created", errors.New("holds a fraction of a second"))
		}
	}
	r.kindAndProtocol(out)
	if len(m.GetParents()) == 0 {
		r.fail("parents", errors.New("is empty"))
	}
	out.Parents = each(m.GetParents(), "parents", func(at string, p *pb.Parent) mesh.RouteParent {
		return mesh.RouteParent{
			Namespace: r.filled(at+".namespace", p.GetNamespace()), Hostname: r.filled(at+".hostname", p.GetHostname()),
			Port: r.port(at+".port", p.GetPort()), Clients: p.GetClients(),
		}
	})
	switch a := m.GetAction().(type) {
	case *pb.Route_Http:
		if out.Protocol != mesh.RouteHTTP {
			r.fail("http", fmt.Errorf("protocol is %v", out.Protocol))
		}
		out.HTTP = r.httpRule("http", a.Http)
	case *pb.Route_Stream:
		if out.Protocol == mesh.RouteHTTP {
			r.fail("stream", fmt.Errorf("protocol is %v", out.Protocol))
		}
		out.Stream = r.streamRule("stream", a.Stream, out.Protocol)
	default:
		r.fail("action", errors.New("neither http nor stream"))
	}
	if err := errors.Join(r.errs...); err != nil {
		return nil, err
	}
	return out, nil
}

func (r *routeReader) kindAndProtocol(out *mesh.Route) {
	want := mesh.RouteProtocolUnknown
	switch out.Kind {
	case mesh.KindHTTPRoute, mesh.KindGRPCRoute:
		want = mesh.RouteHTTP
	case mesh.KindTLSRoute:
		want = mesh.RouteTLS
	case mesh.KindTCPRoute:
		want = mesh.RouteTCP
	case mesh.KindVirtualService, mesh.KindRouteUnknown:
		return
	}
	if out.Protocol != want {
		r.fail("protocol", fmt.Errorf("is %v, and a %v is %v", out.Protocol, out.Kind, want))
	}
}

func (r *routeReader) httpRule(at string, m *pb.HTTPRule) *mesh.HTTPRule {
	out := &mesh.HTTPRule{
		Matches:  each(m.GetMatches(), at+".matches", r.httpMatch),
		Redirect: r.redirect(at+".redirect", m.GetRedirect()), Backends: r.backends(at+".backends", m.GetBackends()),
		Rewrite: r.rewrite(at+".rewrite", m.GetRewrite()), Headers: r.edits(at+".headers", m.GetHeaders()),
		Fault: r.fault(at+".fault", m.GetFault()), CORS: r.cors(at+".cors", m.GetCors()),
		Mirrors: each(m.GetMirrors(), at+".mirrors", r.mirror), Timeout: r.duration(at+".timeout", m.GetTimeout()),
		TryTimeout: r.duration(at+".try_timeout", m.GetTryTimeout()), Retry: r.retry(at+".retry", m.GetRetry()),
		Persistence: r.persistence(at+".persistence", m.GetPersistence()),
	}
	if d := m.GetDirect(); d != nil {
		out.Direct = &mesh.DirectResponse{Status: r.within(at+".direct.status", d.GetStatus(), 200, 599), Body: filledBytes(d.GetBody())}
	}
	return out
}

func (r *routeReader) httpMatch(at string, m *pb.HTTPMatch) mesh.HTTPMatch {
	return mesh.HTTPMatch{
		Name: m.GetName(), Path: r.path(at+".path", m.GetPath()), Scheme: r.optionalText(at+".scheme", m.GetScheme()),
		Method: r.optionalText(at+".method", m.GetMethod()), Authority: r.optionalText(at+".authority", m.GetAuthority()),
		Headers:        r.named(at+".headers", m.GetHeaders(), true),
		WithoutHeaders: r.named(at+".without_headers", m.GetWithoutHeaders(), true),
		QueryParams:    r.named(at+".query_params", m.GetQueryParams(), false),
		Port:           r.port(at+".port", m.GetPort()), SourceLabels: filledMap(m.GetSourceLabels()),
		SourceNamespace: m.GetSourceNamespace(), GRPC: m.GetGrpc(),
	}
}

func (r *routeReader) path(at string, m *pb.PathMatch) mesh.PathMatch {
	p := mesh.PathMatch{IgnoreCase: m.GetIgnoreCase()}
	switch t := m.GetMatchType().(type) {
	case *pb.PathMatch_Exact:
		p.Kind, p.Value = mesh.PathExact, t.Exact
	case *pb.PathMatch_Prefix:
		p.Kind, p.Value = mesh.PathPrefix, t.Prefix
	case *pb.PathMatch_Segment:
		p.Kind, p.Value = mesh.PathSegment, t.Segment
	case *pb.PathMatch_Regex:
		p.Kind, p.Value = mesh.PathRegex, r.regex(at+".regex", t.Regex)
	}
	return p
}

func (r *routeReader) text(at string, m *pb.StringMatch) mesh.StringMatch {
	switch t := m.GetMatchType().(type) {
	case *pb.StringMatch_Exact:
		return mesh.StringMatch{Kind: mesh.MatchExact, Value: t.Exact}
	case *pb.StringMatch_Prefix:
		return mesh.StringMatch{Kind: mesh.MatchPrefix, Value: t.Prefix}
	case *pb.StringMatch_Suffix:
		return mesh.StringMatch{Kind: mesh.MatchSuffix, Value: t.Suffix}
	case *pb.StringMatch_Regex:
		return mesh.StringMatch{Kind: mesh.MatchRegex, Value: r.regex(at+".regex", t.Regex)}
	case *pb.StringMatch_Presence:
		if t.Presence {
			return mesh.StringMatch{Kind: mesh.MatchPresence}
		}
	}
	r.fail(at, errors.New("no match type"))
	return mesh.StringMatch{}
}

func (r *routeReader) optionalText(at string, m *pb.StringMatch) *mesh.StringMatch {
	if m == nil {
		return nil
	}
	t := r.text(at, m)
	return &t
}

func (r *routeReader) named(at string, ms []*pb.NamedMatch, header bool) []mesh.NamedMatch {
	return each(ms, at, func(at string, m *pb.NamedMatch) mesh.NamedMatch {
		name := r.filled(at+".name", m.GetName())
		if header && !mesh.IsHeaderName(strings.TrimPrefix(name, ":")) {
			r.fail(at+".name", fmt.Errorf("%q is not the name of a header in lower case", name))
		}
		return mesh.NamedMatch{Name: name, Match: r.text(at+".match", m.GetMatch())}
	})
}

func (r *routeReader) ref(at string, m *pb.BackendRef) mesh.BackendRef {
	b := mesh.BackendRef{
		Namespace: m.GetNamespace(), Hostname: m.GetHostname(), Port: r.port(at+".port", m.GetPort()),
		Subset: m.GetSubset(), Invalid: m.GetInvalid(),
	}
	if b.Invalid == "" && (b.Hostname == "" || b.Namespace == "") {
		r.fail(at, errors.New("names no service"))
	}
	return b
}

func (r *routeReader) backends(at string, ms []*pb.Backend) []mesh.Backend {
	total := uint64(0)
	out := each(ms, at, func(at string, m *pb.Backend) mesh.Backend {
		total += uint64(m.GetWeight())
		return mesh.Backend{
			Ref: r.ref(at+".ref", m.GetRef()), Weight: m.GetWeight(), Headers: r.edits(at+".headers", m.GetHeaders()),
			Redirect: r.redirect(at+".redirect", m.GetRedirect()), Rewrite: r.rewrite(at+".rewrite", m.GetRewrite()),
			Mirrors: each(m.GetMirrors(), at+".mirrors", r.mirror),
		}
	})
	if total > math.MaxUint32 {
		r.fail(at, fmt.Errorf("the weights add up to %d, more than %d", total, uint32(math.MaxUint32)))
	}
	return out
}

func (r *routeReader) mirror(at string, m *pb.Mirror) mesh.Mirror {
	return mesh.Mirror{Ref: r.ref(at+".ref", m.GetRef()), Percent: r.fraction(at+".percent", m.GetPercent())}
}

func (r *routeReader) redirect(at string, m *pb.Redirect) *mesh.Redirect {
	if m == nil {
		return nil
	}
	out := &mesh.Redirect{
		Status: uint16(m.GetStatus()), Scheme: m.GetScheme(), Authority: m.GetAuthority(),
		PortFrom: mesh.RedirectPort(r.enum(at+".port_from", m.GetPortFrom(), true)),
		Port:     r.port(at+".port", m.GetPort()), Path: r.pathEdit(at+".path", m.GetPath()),
	}
	switch m.GetStatus() {
	case 301, 302, 303, 307, 308:
	default:
		r.fail(at+".status", fmt.Errorf("%d is not 301, 302, 303, 307 or 308", m.GetStatus()))
	}
	if out.PortFrom == mesh.RedirectPortFixed && out.Port == 0 {
		r.fail(at+".port", errors.New("is empty"))
	}
	return out
}

func (r *routeReader) rewrite(at string, m *pb.Rewrite) *mesh.Rewrite {
	if m == nil {
		return nil
	}
	return &mesh.Rewrite{Path: r.pathEdit(at+".path", m.GetPath()), Authority: m.GetAuthority()}
}

func (r *routeReader) pathEdit(at string, m *pb.PathEdit) mesh.PathEdit {
	switch t := m.GetEdit().(type) {
	case *pb.PathEdit_Full:
		return mesh.PathEdit{Kind: mesh.ReplaceFull, Value: t.Full}
	case *pb.PathEdit_Prefix:
		return mesh.PathEdit{Kind: mesh.ReplacePrefix, Value: t.Prefix}
	case *pb.PathEdit_Regex_:
		return mesh.PathEdit{
			Kind: mesh.ReplaceRegex, Regex: r.regex(at+".regex.match", t.Regex.GetMatch()), Value: t.Regex.GetReplacement(),
		}
	}
	if m != nil {
		r.fail(at, errors.New("no edit"))
	}
	return mesh.PathEdit{}
}

func (r *routeReader) edits(at string, m *pb.HeaderEdits) mesh.HeaderEdits {
	return mesh.HeaderEdits{Request: r.ops(at+".request", m.GetRequest()), Response: r.ops(at+".response", m.GetResponse())}
}

func (r *routeReader) ops(at string, m *pb.HeaderOps) mesh.HeaderOps {
	for i, name := range m.GetRemove() {
		if !mesh.IsHeaderName(name) {
			r.fail(fmt.Sprintf("%s.remove[%d]", at, i), fmt.Errorf("%q is not the name of a header in lower case", name))
		}
	}
	return mesh.HeaderOps{
		Remove: filledList(m.GetRemove()), Set: each(m.GetSet(), at+".set", r.header), Add: each(m.GetAdd(), at+".add", r.header),
	}
}

func (r *routeReader) header(at string, m *pb.Header) mesh.Header {
	if !mesh.IsHeaderName(m.GetName()) && m.GetName() != ":authority" {
		r.fail(at+".name", fmt.Errorf("%q is not the name of a header in lower case", m.GetName()))
	}
	if !mesh.IsHeaderValue(m.GetValue()) {
		r.fail(at+".value", errors.New("holds a control character"))
	}
	return mesh.Header{Name: m.GetName(), Value: m.GetValue(), Format: m.GetFormat()}
}

func (r *routeReader) fault(at string, m *pb.Fault) *mesh.Fault {
	if m == nil {
		return nil
	}
	f := &mesh.Fault{
		Delay: mesh.Delay{Percent: r.fraction(at+".delay_percent", m.GetDelayPercent()), Fixed: r.duration(at+".delay", m.GetDelay())},
		Abort: mesh.Abort{Percent: r.fraction(at+".abort_percent", m.GetAbortPercent()), GRPCStatus: m.GetGrpcStatus()},
	}
	if m.GetHttpStatus() != 0 {
		f.Abort.HTTPStatus = r.within(at+".http_status", m.GetHttpStatus(), 200, 599)
	}
	if m.GetGrpcStatus() > 16 {
		r.fail(at+".grpc_status", fmt.Errorf("%d is not 0 to 16", m.GetGrpcStatus()))
	}
	return f
}

func (r *routeReader) cors(at string, m *pb.CORS) *mesh.CORS {
	if m == nil {
		return nil
	}
	return &mesh.CORS{
		AllowOrigins: each(m.GetAllowOrigins(), at+".allow_origins", r.text),
		AllowMethods: r.values(at+".allow_methods", m.GetAllowMethods()), AllowHeaders: r.values(at+".allow_headers", m.GetAllowHeaders()),
		ExposeHeaders: r.values(at+".expose_headers", m.GetExposeHeaders()), MaxAge: r.optionalDuration(at+".max_age", m.GetMaxAge()),
		Credentials: m.GetCredentials(), ForwardUnmatched: m.GetForwardUnmatched(),
	}
}

func (r *routeReader) values(at string, list []string) []string {
	for i, v := range list {
		if !mesh.IsHeaderValue(v) {
			r.fail(fmt.Sprintf("%s[%d]", at, i), errors.New("holds a control character"))
		}
	}
	return filledList(list)
}

func (r *routeReader) retry(at string, m *pb.Retry) *mesh.Retry {
	if m == nil {
		return nil
	}
	out := &mesh.Retry{
		Attempts: m.GetAttempts(), Backoff: r.duration(at+".backoff", m.GetBackoff()), OtherLocalities: m.GetOtherLocalities(),
		PreviousHosts: mesh.PreviousHosts(r.enum(at+".previous_hosts", m.GetPreviousHosts(), true)),
		Codes:         r.statuses(at+".codes", m.GetCodes()),
	}
	for i, c := range m.GetOn() {
		if n := r.enum(fmt.Sprintf("%s.on[%d]", at, i), c, false); n > 0 {
			out.On |= 1 << (n - 1)
		}
	}
	return out
}

func (r *routeReader) persistence(at string, m *pb.SessionPersistence) *mesh.SessionPersistence {
	if m == nil {
		return nil
	}
	s := &mesh.SessionPersistence{
		Header: m.GetHeader(), Cookie: m.GetCookie(), Path: m.GetPath(), Permanent: m.GetPermanent(),
		Absolute: r.duration(at+".absolute_timeout", m.GetAbsoluteTimeout()),
	}
	if s.Header != "" && !mesh.IsHeaderName(s.Header) {
		r.fail(at+".header", fmt.Errorf("%q is not the name of a header in lower case", s.Header))
	}
	if s.Header != "" && s.Cookie != "" {
		r.fail(at+".cookie", errors.New("a header does it already"))
	}
	if s.Permanent && s.Absolute == 0 {
		r.fail(at+".absolute_timeout", errors.New("is empty, and a permanent cookie needs one"))
	}
	return s
}

func (r *routeReader) streamRule(at string, m *pb.StreamRule, protocol mesh.RouteProtocol) *mesh.StreamRule {
	return &mesh.StreamRule{
		Matches: each(m.GetMatches(), at+".matches", func(at string, m *pb.StreamMatch) mesh.StreamMatch {
			if protocol == mesh.RouteTLS && len(m.GetSni()) == 0 {
				r.fail(at+".sni", errors.New("is empty"))
			}
			for i, name := range m.GetSni() {
				if name == "" || strings.Contains(strings.TrimPrefix(name, "*"), "*") {
					r.fail(fmt.Sprintf("%s.sni[%d]", at, i), fmt.Errorf("%q is neither a name nor *.suffix", name))
				}
			}
			return mesh.StreamMatch{
				SNI: filledList(m.GetSni()), Destinations: each(m.GetDestinations(), at+".destinations", r.prefix),
				Sources: each(m.GetSources(), at+".sources", r.prefix), Port: r.port(at+".port", m.GetPort()),
				SourceLabels: filledMap(m.GetSourceLabels()), SourceNamespace: m.GetSourceNamespace(),
			}
		}),
		Backends: r.backends(at+".backends", m.GetBackends()),
	}
}

func (r *routeReader) regex(at, expr string) string {
	if err := mesh.CheckRegex(expr); err != nil {
		r.fail(at, err)
	}
	return expr
}

func (r *routeReader) fraction(at string, m *pb.Fraction) mesh.Fraction {
	if m.GetNumerator() > m.GetDenominator() {
		r.fail(at, fmt.Errorf("%d/%d is more than the whole", m.GetNumerator(), m.GetDenominator()))
	}
	return mesh.Fraction{Numerator: m.GetNumerator(), Denominator: m.GetDenominator()}
}

func (r *routeReader) duration(at string, m *durationpb.Duration) time.Duration {
	if m == nil {
		return 0
	}
	if err := m.CheckValid(); err != nil {
		r.fail(at, err)
		return 0
	}
	d := m.AsDuration()
	if d < 0 || d == math.MaxInt64 {
		r.fail(at, fmt.Errorf("%d s is out of range", m.GetSeconds()))
	}
	return d
}

func (r *routeReader) optionalDuration(at string, m *durationpb.Duration) *time.Duration {
	if m == nil {
		return nil
	}
	d := r.duration(at, m)
	return &d
}
