package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/memlimit"
)

const (
	defaultServerStreams = 200
	defaultHandshake     = 10 * time.Second
)

// Server accepts tunnels.
type Server struct {
	// TLS verifies the peer; GetConfigForClient is honoured. Not to be changed once the server is in use.
	TLS *tls.Config
	// Handle serves one request on a goroutine of its own. Its context ends with the connection, when the client gives
	// up before the answer or resets the stream with an error, and when Handle returns. The stream ends with Handle.
	Handle func(ctx context.Context, r *Request)
	Log    *zap.Logger // nil: none

	MaxStreams       int              // per connection; zero: 200
	Memory           *memlimit.Budget // what connections hold is charged to; nil: none
	HandshakeTimeout time.Duration    // of TLS; zero: 10 s
	StdlibRecords    bool             // leave TLS records to crypto/tls, instead of only the handshake

	prepared atomic.Pointer[tunedConfig]

	mu     sync.Mutex
	conns  map[*conn]struct{}
	closed bool
}

// tunedConfig remembers the tuned copy of a configuration.
type tunedConfig struct{ from, to *tls.Config }

func (s *Server) maxStreams() int {
	if s.MaxStreams > 0 {
		return s.MaxStreams
	}
	return defaultServerStreams
}

func (s *Server) config() *tls.Config {
	if t := s.prepared.Load(); t != nil && t.from == s.TLS {
		return t.to
	}
	cfg := tuned(s.TLS, serverCurves)
	if choose := cfg.GetConfigForClient; choose != nil {
		var last atomic.Pointer[tunedConfig]
		cfg.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			c, err := choose(h)
			if c == nil || err != nil {
				return nil, err
			}
			if t := last.Load(); t != nil && t.from == c {
				return t.to, nil
			}
			t := &tunedConfig{c, tuned(c, serverCurves)}
			last.Store(t)
			return t.to, nil
		}
	}
	s.prepared.Store(&tunedConfig{s.TLS, cfg})
	return cfg
}

// ServeConn serves one connection, of which it takes ownership: TLS handshake, then HTTP/2 until the connection ends and
// every handler has returned. The error says why it ended; nil when both sides were done with it. When ctx ends the
// connection is closed at once.
func (s *Server) ServeConn(ctx context.Context, raw net.Conn) error {
	defer raw.Close()
	log := s.Log
	if log == nil {
		log = zap.NewNop()
	}
	if !s.Memory.Admit(connBytes) {
		return &StageError{StageTLS, ErrNoMemory}
	}
	defer s.Memory.Release(connBytes)
	if err := tune(raw); err != nil {
		log.Debug("socket options not set", zap.Error(err))
	}
	timeout := s.HandshakeTimeout
	if timeout == 0 {
		timeout = defaultHandshake
	}
	hctx, cancel := context.WithTimeout(ctx, timeout)
	h, err := serverHandshake(hctx, raw, s.config(), s.StdlibRecords, s.Memory)
	cancel()
	if err != nil {
		return &StageError{StageTLS, fmt.Errorf("handshake with %s: %w", raw.RemoteAddr(), err)}
	}
	c := newConn(ctx, h, log)
	c.server = s
	closing := s.track(c)
	defer s.untrack(c)
	stop := context.AfterFunc(ctx, func() { c.fail(context.Cause(ctx)) })
	defer stop()
	c.start()
	if closing {
		c.drain() // its peer may have sent a request already, and learns at once that there is room for no more
	}
	err = c.serve()
	c.handlers.Wait()
	return err
}

// track adds a connection and reports whether the server is shutting down.
func (s *Server) track(c *conn) (closing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns == nil {
		s.conns = make(map[*conn]struct{})
	}
	s.conns[c] = struct{}{}
	return s.closed
}

func (s *Server) untrack(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// Shutdown tells every client to open no more streams, waits until the streams that exist have ended, and closes. When
// ctx ends first it closes what is left at once and returns the cause. Connections whose handshake ends later are served in
// the same way: what their clients have asked already, and no more. Shutdown waits for those that are there; the others are
// waited for by whoever called ServeConn.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	drained := make(map[*conn]bool)
	for {
		var next *conn
		s.mu.Lock()
		for c := range s.conns {
			if !drained[c] {
				next = c
				break
			}
		}
		s.mu.Unlock()
		if next == nil {
			break
		}
		drained[next] = true
		next.drain()
	}
	for c := range drained {
		select {
		case <-c.ctx.Done():
		case <-ctx.Done():
			s.mu.Lock()
			left := slices.Collect(maps.Keys(s.conns))
			s.mu.Unlock()
			for _, c := range left {
				c.fail(ErrClosed)
			}
			return context.Cause(ctx)
		}
	}
	return nil
}

// Request is one request of a client. Exactly one of Accept and Reject answers it.
type Request struct {
	Method     string // CONNECT, unless the client has lost its way
	Authority  string // host:port as the client sent it
	Header     Header
	RemoteAddr netip.AddrPort
	LocalAddr  netip.AddrPort
	TLS        tls.ConnectionState // of the connection; the peer was verified by the TLS configuration

	stream *Stream
}

var errAnswered = errors.New("hbone: request was answered already")

// Accept answers 200, with the baggage if it is not "", and returns the tunnel.
func (r *Request) Accept(baggage string) (*Stream, error) {
	if err := r.answer(200, baggage, http2.FlagHeadersEndHeaders); err != nil {
		return nil, err
	}
	return r.stream, nil
}

// Reject answers with a status other than 200 and ends the stream.
func (r *Request) Reject(status int) error {
	if status < 300 || status > 599 {
		return fmt.Errorf("reject request: status %d is not a refusal", status)
	}
	if err := r.answer(status, "", http2.FlagHeadersEndHeaders|http2.FlagHeadersEndStream); err != nil {
		return err
	}
	s := r.stream
	s.c.mu.Lock()
	s.sentEnd = true
	if s.gotEnd {
		s.c.forgetLocked(s)
		s.c.mu.Unlock()
		return nil
	}
	s.c.mu.Unlock()
	s.reset(http2.ErrCodeNo) // nothing more is wanted of the request, RFC 9113, 8.1
	return nil
}

func (r *Request) answer(status int, baggage string, flags http2.Flags) error {
	s := r.stream
	c := s.c
	c.mu.Lock()
	if s.answered {
		c.mu.Unlock()
		return errAnswered
	}
	if err := s.writeErrLocked(); err != nil {
		c.mu.Unlock()
		return fmt.Errorf("answer request: %w", err)
	}
	s.answered = true
	c.budget.resets++
	b := c.w.staged
	at := len(b)
	b = appendFrameHeader(b, 0, http2.FrameHeaders, flags, s.id)
	c.w.staged = c.splitHeaders(appendStatus(b, status, baggage), at)
	c.send(false)
	return nil
}
