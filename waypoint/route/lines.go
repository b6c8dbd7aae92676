package route

import (
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// oneValue reports whether a header, its name in lower case, is one value however many lines it comes in: those are matched joined
// with ",". Of any other header a line is matched by itself. Which is which was measured of Envoy 1.40, by its matches of exact
// values; it joins what it has a place of its own for. Cookie lines stay apart in HTTP/1.1, and are one line in HTTP/2 (RFC 9113, 8.2.3).
func oneValue(name string) bool {
	switch name {
	case "accept", "accept-encoding", "access-control-request-headers", "access-control-request-method", "authorization",
		"cache-control", "content-encoding", "content-type", "expect", "grpc-accept-encoding", "grpc-timeout",
		"if-match", "if-modified-since", "if-none-match", "if-range", "if-unmodified-since", "origin", "pragma", "referer",
		"user-agent", "via", "x-client-trace-id", "x-forwarded-client-cert", "x-forwarded-for", "x-forwarded-host",
		"x-forwarded-port", "x-forwarded-proto", "x-request-id",
		"x-envoy-attempt-count", "x-envoy-decorator-operation", "x-envoy-downstream-service-cluster", "x-envoy-external-address",
		"x-envoy-force-trace", "x-envoy-hedge-on-per-try-timeout", "x-envoy-ip-tags", "x-envoy-max-retries",
		"x-envoy-original-path", "x-envoy-retry-grpc-on", "x-envoy-retry-on", "x-envoy-upstream-rq-timeout-ms":
		return true
	}
	return false
}

// lines reports whether a request has a header, and whether f matches it: a line of it, or what its lines are together.
func (r *Request) lines(f *field) (there, matched bool) {
	if f.name == "host" || f.name[0] == ':' || r.Header == nil {
		v, ok := r.header(f.name)
		return ok, ok && f.text.match(v)
	}
	v, at := r.Header.Next(f.name, 0)
	switch {
	case at < 0:
		return false, false
	case f.joined:
		return true, f.together(r.Header, v, at)
	}
	for at >= 0 {
		if f.text.match(v) {
			return true, true
		}
		v, at = r.Header.Next(f.name, at)
	}
	return true, false
}

// together reports whether f matches the lines of a header joined, the first of which is v. Empty ones count for nothing. Only where
// there are several and a regular expression or a suffix is asked for are they put together; a rule is seldom about that.
func (f *field) together(h Header, v string, at int) bool {
	if v == "" {
		if v, at = f.nonEmpty(h, at); at < 0 {
			return f.text.match("")
		}
	}
	next, behind := f.nonEmpty(h, at)
	if behind < 0 {
		return f.text.match(v)
	}
	switch f.text.kind {
	case mesh.MatchPresence:
		return true
	case mesh.MatchExact, mesh.MatchPrefix:
	default:
		for whole := v; ; next, behind = f.nonEmpty(h, behind) {
			if behind < 0 {
				return f.text.match(whole)
			}
			whole += "," + next
		}
	}
	for want := f.text.value; ; {
		if f.text.kind == mesh.MatchPrefix && strings.HasPrefix(v, want) {
			return true
		}
		ok := false
		if want, ok = strings.CutPrefix(want, v); !ok || behind < 0 {
			return ok && want == ""
		}
		if want, ok = strings.CutPrefix(want, ","); !ok {
			return false
		}
		v = next
		next, behind = f.nonEmpty(h, behind)
	}
}

// nonEmpty is the next line with something in it; -1 when there is none.
func (f *field) nonEmpty(h Header, at int) (v string, next int) {
	for next = at; next >= 0 && v == ""; {
		v, next = h.Next(f.name, next)
	}
	return v, next
}
