package load

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// h2Server answers on one connection: a request without a body with AnswerBytes, any other as if it were a unary gRPC call, with
// the message that came. It does not look at requests' headers.
type h2Server struct {
	*h2Conn
	plain   []byte
	bodies  map[uint32][]byte // of requests that have not ended
	waiting []h2Answer        // for the connection's window
}

type h2Answer struct {
	stream uint32
	body   []byte
	grpc   bool
}

// The header blocks of answers.
var (
	plainHeaders = []hpack.HeaderField{
		{Name: ":status", Value: "200"}, {Name: "content-type", Value: "text/plain"}, {Name: "content-length", Value: strconv.Itoa(AnswerBytes)},
	}
	grpcHeaders  = []hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/grpc"}}
	grpcTrailers = []hpack.HeaderField{{Name: "grpc-status", Value: "0"}}
)

// serveH2 serves a connection of which buffered has been read.
func serveH2(c net.Conn, buffered []byte) error {
	s := &h2Server{h2Conn: newH2Conn(c), plain: pattern(AnswerBytes), bodies: make(map[uint32][]byte)}
	s.w = copy(s.in, buffered)
	for s.w < len(http2.ClientPreface) {
		if err := s.fill(); err != nil {
			return err
		}
	}
	s.r = len(http2.ClientPreface)
	s.settings()
	for {
		if err := s.turn(); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

// turn answers all that has been read, and reads on.
func (s *h2Server) turn() error {
	for {
		f, p, ok, err := s.next()
		if err != nil {
			return err
		}
		if !ok {
			break
		}
		if err := s.take(f, p); err != nil {
			return err
		}
	}
	s.send()
	if err := s.flush(); err != nil {
		return err
	}
	return s.fill()
}

func (s *h2Server) take(f http2.FrameHeader, p []byte) error {
	if mine, err := s.keep(f, p); mine || err != nil {
		return err
	}
	switch f.Type {
	case http2.FrameHeaders:
		if f.Flags&http2.FlagHeadersEndHeaders == 0 {
			return fmt.Errorf("headers of stream %d longer than a frame", f.StreamID)
		}
		if f.Flags&http2.FlagHeadersEndStream != 0 {
			s.waiting = append(s.waiting, h2Answer{stream: f.StreamID, body: s.plain})
			return nil
		}
		s.bodies[f.StreamID] = nil
	case http2.FrameData:
		if f.Flags&http2.FlagDataPadded != 0 && len(p) > 0 {
			p = p[1:max(1, len(p)-int(p[0]))]
		}
		body := append(s.bodies[f.StreamID], p...)
		if f.Flags&http2.FlagDataEndStream == 0 {
			s.bodies[f.StreamID] = body
			return nil
		}
		delete(s.bodies, f.StreamID)
		s.waiting = append(s.waiting, h2Answer{stream: f.StreamID, body: body, grpc: true})
	case http2.FrameRSTStream:
		delete(s.bodies, f.StreamID)
	}
	return nil
}

// send appends the answers that the connection's window has room for. A stream's own always has: it is larger than an answer.
func (s *h2Server) send() {
	n := 0
	for ; n < len(s.waiting) && len(s.waiting[n].body) <= s.window; n++ {
		a := s.waiting[n]
		if !a.grpc {
			s.headers(a.stream, plainHeaders, 0)
			s.data(a.stream, a.body, true)
			continue
		}
		s.headers(a.stream, grpcHeaders, 0)
		s.data(a.stream, a.body, false)
		s.headers(a.stream, grpcTrailers, http2.FlagHeadersEndStream)
	}
	s.waiting = append(s.waiting[:0], s.waiting[n:]...)
}
