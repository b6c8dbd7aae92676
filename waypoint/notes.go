package waypoint

import (
	"cmp"

	"github.com/mistnet/mistnet/internal/accesslog"
	"github.com/mistnet/mistnet/waypoint/http1"
)

// noteNothing makes room for the headers that the access log wants of a request. Its memory is used again.
func (s *session) noteNothing() {
	n := len(s.rep.Headers())
	if n == 0 {
		return
	}
	if len(s.notes) < n {
		s.notes = make([]string, n)
	}
	s.log.Headers = s.notes
}

// note keeps what the access log wants of a head with the edits to it.
func (s *session) note(of accesslog.Section, f *http1.Fields, e *http1.Edits) {
	if s.log.Headers == nil {
		return
	}
	wanted := s.rep.Headers()
	for i := range wanted {
		if h := &wanted[i]; h.Of == of {
			s.log.Headers[i] = h.Pick(func(name string) string { return s.headerValue(name, of, f, e) })
		}
	}
}

// headerValue is one of a request's or response's headers, or of HTTP/2's pseudo-headers, as it goes on.
func (s *session) headerValue(name string, of accesslog.Section, f *http1.Fields, e *http1.Edits) string {
	if of == accesslog.Request {
		switch name {
		case ":method":
			return s.q.Method
		case ":scheme":
			return s.req.Scheme
		case ":path":
			return cmp.Or(e.Target(), s.q.Target)
		case ":authority", "host":
			return cmp.Or(e.Host(), s.q.Authority)
		case "x-request-id":
			return s.log.RequestID
		}
	}
	v, _ := e.Value(f, name)
	return v
}

// countRequests makes the messages count that a try sends to the endpoint it was given.
func (s *session) countRequests() {
	if !s.req.GRPC {
		return
	}
	s.rep.CountCall(&s.log, &s.calls, &s.asks, &s.answers)
	s.q.Body.Tap(&s.asks)
}

// countResponses makes those of its response count.
func (s *session) countResponses(resp *http1.Response) {
	if s.req.GRPC {
		resp.Body.Tap(&s.answers)
	}
}
