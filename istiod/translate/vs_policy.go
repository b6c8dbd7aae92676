package translate

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	networkingapi "istio.io/api/networking/v1alpha3"

	"github.com/mistnet/mistnet/internal/mesh"
)

// retryConditions are Envoy's names.
var retryConditions = map[string]mesh.RetryOn{
	"5xx":                        mesh.RetryOn5xx,
	"gateway-error":              mesh.RetryOnGatewayError,
	"reset":                      mesh.RetryOnReset,
	"reset-before-request":       mesh.RetryOnResetBefore,
	"connect-failure":            mesh.RetryOnConnectFailure,
	"envoy-ratelimited":          mesh.RetryOnRatelimited,
	"retriable-4xx":              mesh.RetryOnRetriable4xx,
	"refused-stream":             mesh.RetryOnRefusedStream,
	"retriable-status-codes":     mesh.RetryOnStatusCodes,
	"retriable-headers":          mesh.RetryOnHeaders,
	"http3-post-connect-failure": mesh.RetryOnHTTP3PostConnect,
	"cancelled":                  mesh.RetryOnCancelled,
	"deadline-exceeded":          mesh.RetryOnDeadlineExceeded,
	"internal":                   mesh.RetryOnInternal,
	"resource-exhausted":         mesh.RetryOnResourceExhausted,
	"unavailable":                mesh.RetryOnUnavailable,
}

// DefaultRetry is a mesh's defaultHttpRetryPolicy as Config has it, and how long each try may take, 0 for as long as it wants.
func DefaultRetry(in *networkingapi.HTTPRetry) (r *mesh.Retry, try time.Duration, err error) {
	n := ruleNotes{faults: &faults{}, at: "defaultHttpRetryPolicy"}
	r, try = retries(&n, in)
	if s := n.status(); s != nil {
		return nil, 0, errors.New(s.Message)
	}
	return r, try, nil
}

func retries(n *ruleNotes, in *networkingapi.HTTPRetry) (r *mesh.Retry, try time.Duration) {
	r = &mesh.Retry{Backoff: duration(n, "retries.backoff", in.GetBackoff()), OtherLocalities: in.GetRetryRemoteLocalities().GetValue()}
	if in.GetAttempts() > 0 {
		r.Attempts = uint32(in.GetAttempts())
	}
	if ignore := in.GetRetryIgnorePreviousHosts(); ignore != nil {
		r.PreviousHosts = mesh.PreviousHostsAllow
		if ignore.GetValue() {
			r.PreviousHosts = mesh.PreviousHostsAvoid
		}
	}
	for name := range strings.SplitSeq(in.GetRetryOn(), ",") {
		name = strings.TrimSpace(name)
		if name == "" {
			continue
		}
		if on, ok := retryConditions[name]; ok {
			r.On |= on
			continue
		}
		code, err := strconv.ParseUint(name, 10, 16)
		if err != nil || code < 100 || code > 599 {
			n.note(Unsupported, "retries.retryOn", "left out %q, which is neither a condition nor a status", name)
			continue
		}
		r.On |= mesh.RetryOnStatusCodes
		if !slices.Contains(r.Codes, uint16(code)) {
			r.Codes = append(r.Codes, uint16(code))
		}
	}
	return r, duration(n, "retries.perTryTimeout", in.GetPerTryTimeout())
}

// grpcStatuses are the names of gRPC's statuses by their numbers.
var grpcStatuses = []string{"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
	"PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL",
	"UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"}

// fault is nil where nothing fails. An absent percentage is none, as Istio has it.
func fault(n *ruleNotes, in *networkingapi.HTTPFaultInjection) *mesh.Fault {
	var out mesh.Fault
	if d := in.GetDelay(); d != nil {
		part := d.GetPercentage()
		//lint:ignore SA1019 deprecated, and still written
		if old := d.GetPercent(); part == nil && old != 0 {
			part = &networkingapi.Percent{Value: float64(old)}
		}
		switch {
		case d.GetExponentialDelay() != nil:
			n.note(Unsupported, "fault.delay.exponentialDelay", "has no effect")
		case part == nil:
			n.note(Ignored, "fault.delay", "without a percentage nothing is delayed")
		default:
			out.Delay = mesh.Delay{Percent: percentage(n, "fault.delay.percentage", part), Fixed: duration(n, "fault.delay.fixedDelay", d.GetFixedDelay())}
		}
	}
	if a := in.GetAbort(); a != nil {
		abort, ok := abortStatus(n, a)
		switch {
		case !ok:
		case a.GetPercentage() == nil:
			n.note(Ignored, "fault.abort", "without a percentage nothing is aborted")
		default:
			abort.Percent = percentage(n, "fault.abort.percentage", a.GetPercentage())
			out.Abort = abort
		}
	}
	if out.Delay.Percent.Numerator == 0 {
		out.Delay = mesh.Delay{}
	}
	if out.Abort.Percent.Numerator == 0 {
		out.Abort = mesh.Abort{}
	}
	if out == (mesh.Fault{}) {
		return nil
	}
	return &out
}

func abortStatus(n *ruleNotes, in *networkingapi.HTTPFaultInjection_Abort) (a mesh.Abort, ok bool) {
	switch t := in.GetErrorType().(type) {
	case *networkingapi.HTTPFaultInjection_Abort_HttpStatus:
		if t.HttpStatus < 200 || t.HttpStatus > 599 {
			n.refuse("fault.abort.httpStatus", "%d is not 200 to 599", t.HttpStatus)
			return a, false
		}
		a.HTTPStatus = uint16(t.HttpStatus)
		return a, true
	case *networkingapi.HTTPFaultInjection_Abort_GrpcStatus:
		code := slices.Index(grpcStatuses, strings.ToUpper(t.GrpcStatus))
		if number, err := strconv.Atoi(t.GrpcStatus); err == nil {
			code = number
		}
		if code < 0 || code >= len(grpcStatuses) {
			n.refuse("fault.abort.grpcStatus", "%q is not a status of gRPC", t.GrpcStatus)
			return a, false
		}
		a.GRPCStatus = uint32(code)
		return a, true
	case *networkingapi.HTTPFaultInjection_Abort_Http2Error:
		n.note(Unsupported, "fault.abort.http2Error", "has no effect")
	default:
		n.note(Ignored, "fault.abort", "without a status nothing is aborted")
	}
	return a, false
}

func corsPolicy(n *ruleNotes, in *networkingapi.CorsPolicy) *mesh.CORS {
	if in == nil {
		return nil
	}
	out := &mesh.CORS{
		AllowMethods:     headerValues(n, "corsPolicy.allowMethods", in.GetAllowMethods()),
		AllowHeaders:     headerValues(n, "corsPolicy.allowHeaders", in.GetAllowHeaders()),
		ExposeHeaders:    headerValues(n, "corsPolicy.exposeHeaders", in.GetExposeHeaders()),
		Credentials:      in.GetAllowCredentials().GetValue(),
		ForwardUnmatched: in.GetUnmatchedPreflights() != networkingapi.CorsPolicy_IGNORE,
	}
	if in.GetMaxAge() != nil {
		age := duration(n, "corsPolicy.maxAge", in.GetMaxAge())
		out.MaxAge = &age
	}
	origins := in.GetAllowOrigins()
	//lint:ignore SA1019 deprecated, and still written
	for _, o := range in.GetAllowOrigin() {
		origins = append(origins[:len(origins):len(origins)], &networkingapi.StringMatch{MatchType: &networkingapi.StringMatch_Exact{Exact: o}})
	}
	for i, o := range origins {
		if o.GetExact() == "*" {
			out.AllowOrigins = append(out.AllowOrigins, mesh.StringMatch{Kind: mesh.MatchPresence})
			continue
		}
		if t, ok := text(n, fmt.Sprintf("corsPolicy.allowOrigins[%d]", i), o); ok {
			out.AllowOrigins = append(out.AllowOrigins, t)
		}
	}
	return out
}

// headerValues are values that are written into headers; the list is nil where there is none.
func headerValues[S ~string](n *ruleNotes, field string, list []S) (values []string) {
	for i, v := range list {
		if !mesh.IsHeaderValue(string(v)) {
			n.refuse(fmt.Sprintf("%s[%d]", field, i), "holds a control character")
			continue
		}
		values = append(values, string(v))
	}
	return values
}
