package waypoint

import (
	"cmp"
	"strconv"
	"time"

	"github.com/mistnet/mistnet/internal/accesslog"
	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/route"
)

// requestEdits are the changes to the request: ours, then those of the backend, then those of the rule.
func (s *session) requestEdits(p *plan, until time.Time) {
	e := &s.edits
	e.Reset()
	e.Set("x-request-id", s.log.RequestID)
	if _, ok := s.q.Value("x-forwarded-proto"); !ok {
		e.Set("x-forwarded-proto", "http")
	}
	if s.certificate != "" {
		e.Set("x-forwarded-client-cert", s.certificate)
	}
	e.Set("x-envoy-attempt-count", strconv.Itoa(int(s.log.Attempts)))
	if left := p.left(until); left > 0 {
		e.Set("x-envoy-expected-rq-timeout-ms", strconv.FormatInt(max(left.Milliseconds(), 1), 10))
		if s.req.GRPC { // also what the rule says, and what other tries have used up
			var b [9]byte
			e.Set("grpc-timeout", string(route.AppendGRPCTimeout(b[:0], left)))
		}
	}
	if n, ok := s.hopsLeft(); ok {
		e.Set("max-forwards", strconv.FormatUint(n-1, 10))
	}
	if p.path != s.q.Path {
		if p.path != s.req.Path {
			e.Set("x-envoy-original-path", s.withQuery(s.req.Path))
		}
		e.SetTarget(s.withQuery(p.path))
	}
	if p.host != s.q.Authority {
		e.Set("x-envoy-original-host", s.q.Authority)
		e.Set("host", p.host)
	}
	if s.web != nil {
		s.web.request(s.q, e)
	}
	p.backend.Request.Apply((*requestHeaders)(s))
	s.rule.Request.Apply((*requestHeaders)(s))
}

// withQuery is a path with the request's query.
func (s *session) withQuery(path string) string {
	if !s.q.Query {
		return path
	}
	return path + "?" + s.q.RawQuery
}

// responseEdits are the changes to the response, whose fields are f.
func (s *session) responseEdits(p *plan, f *http1.Fields, took time.Duration) {
	e := &s.edits
	e.Reset()
	e.Set("server", serverName)
	e.Set("x-envoy-upstream-service-time", strconv.FormatInt(took.Milliseconds(), 10))
	e.Remove("x-envoy-peer-metadata")
	e.Remove("x-envoy-peer-metadata-id")
	if s.cookie != "" {
		e.Add("set-cookie", s.cookie)
	}
	if s.stays.value != "" {
		e.Add(cmp.Or(s.stays.of.Header, "set-cookie"), s.stays.value)
	}
	s.response = f
	p.backend.Response.Apply((*responseHeaders)(s))
	s.rule.Response.Apply((*responseHeaders)(s))
	s.response = nil
	s.corsHeaders() // the rule's policy has the last word, as in answers of our own
}

// replyEdits are the changes of the rule to an answer that the waypoint gives itself; those of a rule that cannot be understood are
// not made, nor any to the answer to a CORS preflight.
func (s *session) replyEdits(r *reply) {
	if s.rule == nil || s.rule.Refuse != 0 || r.details == "cors" {
		return
	}
	s.log.Status = r.status // which operators may ask for
	if b := s.flight.backend; b != nil {
		b.Response.Apply((*responseHeaders)(s))
	}
	s.rule.Response.Apply((*responseHeaders)(s))
}

// requestHeaders let rules change the headers of a session's request, responseHeaders those of its response: route.EditableHeader.
type (
	requestHeaders  session
	responseHeaders session
)

func (s *requestHeaders) Del(name string)        { s.edits.Remove(name) }
func (s *requestHeaders) Set(name, value string) { s.edits.Set(name, value) }
func (s *requestHeaders) Add(name, value string) { s.edits.Add(name, value) }

// Fill knows the request as it came, but for the headers that were changed before: as Envoy does, which rewrites path and authority
// later.
func (s *requestHeaders) Fill(f *accesslog.Format) string {
	return (*session)(s).fill(f, func(of accesslog.Section, name string) string {
		switch {
		case of != accesslog.Request:
			return ""
		case name == ":path":
			return s.q.Target
		case name == ":authority", name == "host":
			return s.q.Authority
		}
		return (*session)(s).headerValue(name, of, &s.q.Fields, &s.edits)
	})
}

func (s *responseHeaders) Del(name string)        { s.edits.Remove(name) }
func (s *responseHeaders) Set(name, value string) { s.edits.Set(name, value) }
func (s *responseHeaders) Add(name, value string) { s.edits.Add(name, value) }

// Fill knows the request as it came.
func (s *responseHeaders) Fill(f *accesslog.Format) string {
	return (*session)(s).fill(f, func(of accesslog.Section, name string) string {
		switch of {
		case accesslog.Request:
			return (*session)(s).headerValue(name, of, &s.q.Fields, nil)
		case accesslog.Response:
			return (*session)(s).headerValue(name, of, s.response, &s.edits)
		}
		return ""
	})
}

// fill puts what operators ask for in their place. What clients wrote cannot end a line: it is of headers, which were read.
func (s *session) fill(f *accesslog.Format, header func(of accesslog.Section, name string) string) string {
	var b []byte
	for i := range f.Parts {
		p := &f.Parts[i]
		switch p.Op {
		case accesslog.Literal:
			b = append(b, p.Text...)
		case accesslog.FromHeader:
			h := &f.Headers[p.At]
			v := h.Pick(func(name string) string { return header(h.Of, name) })
			if p.Most > 0 && len(v) > p.Most {
				v = v[:p.Most]
			}
			b = append(b, v...)
		default:
			b = s.log.AppendOperator(b, p, s.cfg.PodName)
		}
	}
	return string(b)
}
