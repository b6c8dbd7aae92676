package waypoint

import (
	"strconv"
	"strings"

	"github.com/mistnet/mistnet/internal/accesslog"
	"github.com/mistnet/mistnet/waypoint/http1"
)

// gRPC's status codes that are answered here.
const (
	grpcUnknown          = 2
	grpcPermissionDenied = 7
	grpcUnimplemented    = 12
	grpcInternal         = 13
	grpcUnavailable      = 14
	grpcUnauthenticated  = 16
)

// isGRPC reports whether a body of that type is one of gRPC. That of gRPC-Web is one only where it is translated.
func isGRPC(contentType string) bool {
	rest, ok := strings.CutPrefix(contentType, "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// grpcStatus is what an answer of the waypoint's own with that status says in gRPC.
func grpcStatus(status int) uint32 {
	switch status {
	case 400:
		return grpcInternal
	case 401:
		return grpcUnauthenticated
	case 403:
		return grpcPermissionDenied
	case 404:
		return grpcUnimplemented
	case 429, 502, 503, 504:
		return grpcUnavailable
	}
	return grpcUnknown
}

// sendGRPC replies to a gRPC client, with the edits made so far: by a head only, whose status is 200 and which says what
// went wrong.
func (s *session) sendGRPC(r reply, status uint32) {
	s.log.GRPCStatus = strconv.Itoa(int(status))
	s.edits.Set("content-type", "application/grpc")
	s.edits.Set("grpc-status", s.log.GRPCStatus)
	if r.body != "" {
		s.edits.Set("grpc-message", grpcMessage(r.body))
	}
	r.status, r.body = 200, ""
	s.reply(r)
}

// grpcMessage is a text as grpc-message carries it: what is not printable ASCII, and the percent sign, escaped.
func grpcMessage(text string) string {
	const hex = "0123456789ABCDEF"
	b := make([]byte, 0, len(text))
	for i := range len(text) {
		if c := text[i]; c < ' ' || c > '~' || c == '%' {
			b = append(b, '%', hex[c>>4], hex[c&15])
		} else {
			b = append(b, c)
		}
	}
	return string(b)
}

// noteGRPC records what is behind the body of a response that has ended: of gRPC the status, which is in its head if it has none.
func (s *session) noteGRPC(resp *http1.Response) {
	if s.log.Headers != nil {
		s.note(accesslog.Trailer, resp.Body.Trailers(), nil)
	}
	if !s.req.GRPC {
		return
	}
	status, ok := resp.Body.Trailers().Value("grpc-status")
	if !ok {
		status, ok = resp.Value("grpc-status")
	}
	if n, err := strconv.ParseUint(status, 10, 8); ok && err == nil && n <= 16 { // a label is of a closed set
		s.log.GRPCStatus = strconv.Itoa(int(n))
	}
}
