package wds

import (
	"fmt"
	"net/netip"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/mistnet/mistnet/api/route"
	"github.com/mistnet/mistnet/internal/mesh"
)

// EncodeRoute returns r as the bytes of a mistnet.route.v1.Route. Equal routes give equal bytes. It fails on what
// DecodeRoute would refuse, naming the field.
func EncodeRoute(r *mesh.Route) ([]byte, error) {
	if r.HTTP != nil && r.Stream != nil {
		return nil, fmt.Errorf("encode route %q: both http and stream", r.Key())
	}
	m := routeToProto(r)
	if _, err := routeFromProto(m); err != nil {
		return nil, fmt.Errorf("encode route %q: %w", r.Key(), err)
	}
	return deterministic.Marshal(m)
}

func routeToProto(r *mesh.Route) *pb.Route {
	m := &pb.Route{
		Kind: pb.Kind(r.Kind), Namespace: r.Namespace, Name: r.Name, Protocol: pb.Protocol(r.Protocol), Rule: r.Rule,
		RuleName: r.RuleName, Invalid: r.Invalid,
	}
	if !r.Created.IsZero() {
		m.Created = timestamppb.New(r.Created)
	}
	m.Parents = list(r.Parents, func(p mesh.RouteParent) *pb.Parent {
		return &pb.Parent{Namespace: p.Namespace, Hostname: p.Hostname, Port: uint32(p.Port), Clients: p.Clients}
	})
	if r.HTTP != nil {
		m.Action = &pb.Route_Http{Http: httpRuleToProto(r.HTTP)}
	}
	if r.Stream != nil {
		m.Action = &pb.Route_Stream{Stream: &pb.StreamRule{
			Matches: list(r.Stream.Matches, streamMatchToProto), Backends: list(r.Stream.Backends, backendToProto),
		}}
	}
	return m
}

func httpRuleToProto(r *mesh.HTTPRule) *pb.HTTPRule {
	m := &pb.HTTPRule{
		Matches: list(r.Matches, httpMatchToProto), Redirect: redirectToProto(r.Redirect),
		Backends: list(r.Backends, backendToProto), Rewrite: rewriteToProto(r.Rewrite), Headers: editsToProto(r.Headers),
		Mirrors: list(r.Mirrors, mirrorToProto), Timeout: duration(r.Timeout), TryTimeout: duration(r.TryTimeout),
		Persistence: persistenceToProto(r.Persistence),
	}
	if d := r.Direct; d != nil {
		m.Direct = &pb.DirectResponse{Status: uint32(d.Status), Body: d.Body}
	}
	if f := r.Fault; f != nil {
		m.Fault = &pb.Fault{
			DelayPercent: fraction(f.Delay.Percent), Delay: duration(f.Delay.Fixed),
			AbortPercent: fraction(f.Abort.Percent), HttpStatus: uint32(f.Abort.HTTPStatus), GrpcStatus: f.Abort.GRPCStatus,
		}
	}
	if c := r.CORS; c != nil {
		m.Cors = &pb.CORS{
			AllowOrigins: list(c.AllowOrigins, textToProto), AllowMethods: c.AllowMethods, AllowHeaders: c.AllowHeaders,
			ExposeHeaders: c.ExposeHeaders, MaxAge: optionalDuration(c.MaxAge), Credentials: c.Credentials,
			ForwardUnmatched: c.ForwardUnmatched,
		}
	}
	if r.Retry != nil {
		m.Retry = retryToProto(r.Retry)
	}
	return m
}

func retryToProto(r *mesh.Retry) *pb.Retry {
	m := &pb.Retry{
		Attempts: r.Attempts, Codes: numbers(r.Codes), Backoff: duration(r.Backoff), OtherLocalities: r.OtherLocalities,
		PreviousHosts: pb.Retry_PreviousHosts(r.PreviousHosts),
	}
	for bit := range 32 {
		if r.On&(1<<bit) != 0 {
			m.On = append(m.On, pb.Retry_Condition(bit+1))
		}
	}
	return m
}

func httpMatchToProto(h mesh.HTTPMatch) *pb.HTTPMatch {
	m := &pb.HTTPMatch{
		Name: h.Name, Scheme: optionalText(h.Scheme), Method: optionalText(h.Method), Authority: optionalText(h.Authority),
		Headers: list(h.Headers, namedToProto), WithoutHeaders: list(h.WithoutHeaders, namedToProto),
		QueryParams: list(h.QueryParams, namedToProto), Port: uint32(h.Port), SourceLabels: h.SourceLabels,
		SourceNamespace: h.SourceNamespace, Grpc: h.GRPC,
	}
	if h.Path == (mesh.PathMatch{}) {
		return m
	}
	m.Path = &pb.PathMatch{IgnoreCase: h.Path.IgnoreCase}
	switch h.Path.Kind {
	case mesh.PathExact:
		m.Path.MatchType = &pb.PathMatch_Exact{Exact: h.Path.Value}
	case mesh.PathPrefix:
		m.Path.MatchType = &pb.PathMatch_Prefix{Prefix: h.Path.Value}
	case mesh.PathSegment:
		m.Path.MatchType = &pb.PathMatch_Segment{Segment: h.Path.Value}
	case mesh.PathRegex:
		m.Path.MatchType = &pb.PathMatch_Regex{Regex: h.Path.Value}
	case mesh.PathAny:
	}
	return m
}

// textToProto leaves the type out of a match that never holds, which is refused.
func textToProto(s mesh.StringMatch) *pb.StringMatch {
	switch s.Kind {
	case mesh.MatchExact:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Exact{Exact: s.Value}}
	case mesh.MatchPrefix:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Prefix{Prefix: s.Value}}
	case mesh.MatchSuffix:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Suffix{Suffix: s.Value}}
	case mesh.MatchRegex:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Regex{Regex: s.Value}}
	case mesh.MatchPresence:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Presence{Presence: true}}
	case mesh.MatchNever:
	}
	return &pb.StringMatch{}
}

func optionalText(s *mesh.StringMatch) *pb.StringMatch {
	if s == nil {
		return nil
	}
	return textToProto(*s)
}

func namedToProto(n mesh.NamedMatch) *pb.NamedMatch {
	return &pb.NamedMatch{Name: n.Name, Match: textToProto(n.Match)}
}

func refToProto(b mesh.BackendRef) *pb.BackendRef {
	return &pb.BackendRef{
		Namespace: b.Namespace, Hostname: b.Hostname, Port: uint32(b.Port), Subset: b.Subset, Invalid: b.Invalid,
	}
}

func backendToProto(b mesh.Backend) *pb.Backend {
	return &pb.Backend{
		Ref: refToProto(b.Ref), Weight: b.Weight, Headers: editsToProto(b.Headers), Redirect: redirectToProto(b.Redirect),
		Rewrite: rewriteToProto(b.Rewrite), Mirrors: list(b.Mirrors, mirrorToProto),
	}
}

func mirrorToProto(m mesh.Mirror) *pb.Mirror {
	return &pb.Mirror{Ref: refToProto(m.Ref), Percent: fraction(m.Percent)}
}

func redirectToProto(r *mesh.Redirect) *pb.Redirect {
	if r == nil {
		return nil
	}
	return &pb.Redirect{
		Status: uint32(r.Status), Scheme: r.Scheme, Authority: r.Authority, PortFrom: pb.Redirect_PortFrom(r.PortFrom),
		Port: uint32(r.Port), Path: pathEditToProto(r.Path),
	}
}

func rewriteToProto(r *mesh.Rewrite) *pb.Rewrite {
	if r == nil {
		return nil
	}
	return &pb.Rewrite{Path: pathEditToProto(r.Path), Authority: r.Authority}
}

func pathEditToProto(e mesh.PathEdit) *pb.PathEdit {
	switch e.Kind {
	case mesh.ReplaceFull:
		return &pb.PathEdit{Edit: &pb.PathEdit_Full{Full: e.Value}}
	case mesh.ReplacePrefix:
		return &pb.PathEdit{Edit: &pb.PathEdit_Prefix{Prefix: e.Value}}
	case mesh.ReplaceRegex:
		return &pb.PathEdit{Edit: &pb.PathEdit_Regex_{Regex: &pb.PathEdit_Regex{Match: e.Regex, Replacement: e.Value}}}
	case mesh.KeepPath:
	}
	return nil
}

func editsToProto(e mesh.HeaderEdits) *pb.HeaderEdits {
	req, resp := opsToProto(e.Request), opsToProto(e.Response)
	if req == nil && resp == nil {
		return nil
	}
	return &pb.HeaderEdits{Request: req, Response: resp}
}

func opsToProto(o mesh.HeaderOps) *pb.HeaderOps {
	if len(o.Remove) == 0 && len(o.Set) == 0 && len(o.Add) == 0 {
		return nil
	}
	return &pb.HeaderOps{Remove: o.Remove, Set: list(o.Set, headerToProto), Add: list(o.Add, headerToProto)}
}

func headerToProto(h mesh.Header) *pb.Header {
	return &pb.Header{Name: h.Name, Value: h.Value, Format: h.Format}
}

func persistenceToProto(s *mesh.SessionPersistence) *pb.SessionPersistence {
	if s == nil {
		return nil
	}
	return &pb.SessionPersistence{
		Header: s.Header, Cookie: s.Cookie, Path: s.Path, AbsoluteTimeout: duration(s.Absolute), Permanent: s.Permanent,
	}
}

func streamMatchToProto(s mesh.StreamMatch) *pb.StreamMatch {
	return &pb.StreamMatch{
		Sni: s.SNI, Destinations: list(s.Destinations, prefixToProto), Sources: list(s.Sources, prefixToProto),
		Port: uint32(s.Port), SourceLabels: s.SourceLabels, SourceNamespace: s.SourceNamespace,
	}
}

func prefixToProto(p netip.Prefix) *pb.Prefix {
	if !p.IsValid() {
		return &pb.Prefix{}
	}
	return &pb.Prefix{Address: p.Addr().AsSlice(), Length: uint32(p.Bits())}
}

func fraction(f mesh.Fraction) *pb.Fraction {
	if f == (mesh.Fraction{}) {
		return nil
	}
	return &pb.Fraction{Numerator: f.Numerator, Denominator: f.Denominator}
}

// duration leaves zero out, which is what its absence means.
func duration(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

func optionalDuration(d *time.Duration) *durationpb.Duration {
	if d == nil {
		return nil
	}
	return durationpb.New(*d)
}

func numbers[T ~uint16](from []T) []uint32 {
	return list(from, func(n T) uint32 { return uint32(n) })
}

// list translates each of from. Of none it makes nil.
func list[A, B any](from []A, one func(A) B) []B {
	if len(from) == 0 {
		return nil
	}
	to := make([]B, len(from))
	for i, a := range from {
		to[i] = one(a)
	}
	return to
}
