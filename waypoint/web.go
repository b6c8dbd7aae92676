package waypoint

import (
	"io"
	"strconv"

	"github.com/mistnet/mistnet/waypoint/grpcweb"
	"github.com/mistnet/mistnet/waypoint/http1"
)

// webCall is what there is to know of a call by gRPC-Web (grpc/grpc, PROTOCOL-WEB.md) on a port that is declared to be of it: its
// request goes on as one of gRPC, and what comes back is made what the client reads. Other requests of the port go on as they are.
type webCall struct {
	asText bool // what the client wants to read is text
	asks   grpcweb.Decoder
	says   grpcweb.Encoder
}

// maxWebMessage is how much goes into grpc-message of a response that is none of gRPC, as with Envoy.
const maxWebMessage = 16 << 10

// callWeb finds out whether a request is one of gRPC-Web. Rules and policies see what its client wrote.
func (s *session) callWeb(contentType string) {
	text, ok := grpcweb.Parse(contentType)
	if !ok || s.q.Upgrade != "" {
		return
	}
	accept, _ := s.q.Value("accept")
	s.web, s.req.GRPC = new(webCall), true
	s.web.asText, _ = grpcweb.Parse(accept)
	s.web.says.Text = s.web.asText
	if text {
		s.q.Body.Through(&s.web.asks)
	}
}

// request makes the head of a request that of gRPC.
func (*webCall) request(q *http1.Request, e *http1.Edits) {
	e.Set("content-type", "application/grpc")
	if _, ok := q.Value("grpc-accept-encoding"); !ok {
		e.Set("grpc-accept-encoding", "identity")
	}
	q.WantTrailers()
}

// pass gives the client the response of an exchange.
func (s *session) pass(x exchange, resp *http1.Response) error {
	if s.web != nil {
		if err := s.webResponse(resp); err != nil {
			x.Abort()
			return err
		}
	}
	return x.Respond(&s.edits)
}

// webResponse makes a response ready for a client of gRPC-Web: its messages and trailers as they come, or what it says in the head if it
// is none of gRPC.
func (s *session) webResponse(resp *http1.Response) error {
	contentType, _ := resp.Value("content-type")
	s.edits.Set("content-type", grpcweb.ContentType(s.web.asText))
	asText, web := grpcweb.Parse(contentType)
	if resp.Body.Absent() || resp.Body.Done() && resp.Body.Trailers().Len() == 0 {
		return nil
	}
	if resp.Status == 200 && (isGRPC(contentType) || web && !asText) {
		resp.Body.Through(&s.web.says)
		return nil
	}
	var text []byte
	for len(text) < maxWebMessage {
		p, err := resp.Body.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		text = append(text, p[:min(len(p), maxWebMessage-len(text))]...)
	}
	s.setWebStatus(string(text), grpcStatus(resp.Status))
	resp.Body.Through(nothing{})
	return nil
}

// sendWeb replies to a client of gRPC-Web, with the edits made so far: by a head only, which says what went wrong as HTTP and as gRPC
// have it.
func (s *session) sendWeb(r reply, status uint32) {
	s.edits.Set("content-type", grpcweb.ContentType(s.web.asText))
	if r.status/100 != 3 {
		s.setWebStatus(r.body, status)
	}
	r.body = ""
	s.reply(r)
}

func (s *session) setWebStatus(message string, status uint32) {
	s.log.GRPCStatus = strconv.Itoa(int(status))
	s.edits.Set("grpc-status", s.log.GRPCStatus)
	if message != "" {
		s.edits.Set("grpc-message", grpcMessage(message))
	}
}

// nothing is an http1.Translator that lets none of a body pass.
type nothing struct{}

func (nothing) Translate(p []byte) ([]byte, int, error) { return nil, len(p), nil }
func (nothing) End(*http1.Fields) ([]byte, error)       { return nil, nil }
func (nothing) Restart()                                {}
