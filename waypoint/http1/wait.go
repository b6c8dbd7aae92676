package http1

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// ErrIdle ends a ReadRequest that has waited for a while without a byte: see Doze.
var ErrIdle = errors.New("nothing was asked for a while")

// wait is the wait of a connection for its next request, as others see it who may end it.
type wait struct {
	state   atomic.Uint32
	rousing sync.Mutex // held while the wait is ended from outside, so that its end does not spoil what comes after it
}

// The states of a wait.
const (
	busy    = iota // there is none
	waiting        // for a request, without a byte of it
	dozing         // so at the last Doze already
	roused         // ended by somebody else
)

// rouse ends the wait if it is in one of the given states.
func (s *ServerConn) rouse(states ...uint32) {
	s.wait.rousing.Lock()
	defer s.wait.rousing.Unlock()
	for _, from := range states {
		if s.wait.state.CompareAndSwap(from, roused) {
			_ = s.conn.SetReadDeadline(past) // a closed connection waits for nothing
			return
		}
	}
}

// await waits for the first byte of a request, holding no buffer, or of a tunnel's stream a small one.
func (s *ServerConn) await() error {
	s.in.rest()
	s.out.rest()
	// The deadline is left as it is while it is not much too early: setting it costs more than asking the clock.
	if now := time.Now(); s.in.deadline.Sub(now) < s.cfg.IdleTimeout*3/4 || s.in.deadline.Sub(now) > s.cfg.IdleTimeout {
		s.in.arm(now.Add(s.cfg.IdleTimeout))
	}
	s.wait.state.Store(waiting)
	if s.draining.Load() { // after the state was set, so that Drain either sees it or was seen
		s.awake()
		return io.EOF
	}
	err := s.in.fillIdle()
	was := s.awake()
	switch {
	case err == nil:
		return nil
	case err == io.EOF, s.draining.Load() && errors.Is(err, os.ErrDeadlineExceeded):
		return io.EOF
	case errors.Is(err, os.ErrDeadlineExceeded) && was == roused:
		return ErrIdle
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fail(IdleTimeout, err)
	}
	return fail(ClientClosed, err)
}

// awake ends the wait and returns the state it was in.
func (s *ServerConn) awake() uint32 {
	was := s.wait.state.Swap(busy)
	if was == roused {
		s.wait.rousing.Lock() // the deadline is set, or about to be
		s.in.deadline = past
		s.wait.rousing.Unlock()
	}
	return was
}

// Doze is to be called every so often. If the connection has waited for a request since the call before, ReadRequest returns ErrIdle:
// it may be called again, or the connection be put aside by Release. Safe to call at any time from any goroutine.
func (s *ServerConn) Doze() {
	if !s.wait.state.CompareAndSwap(waiting, dozing) && s.wait.state.Load() == dozing {
		s.rouse(dozing)
	}
}

// Drain makes the connection close once its exchange, if there is one, has ended. Safe to call at any time from any
// goroutine.
func (s *ServerConn) Drain() {
	s.draining.Store(true)
	s.rouse(waiting, dozing)
}

// Release gives the connection away after ErrIdle, without deadlines: nothing was read that is not answered, and a new ServerConn can
// serve it on.
func (s *ServerConn) Release() net.Conn {
	s.in.drop()
	s.out.rest()
	_ = s.conn.SetDeadline(time.Time{}) // the next call tells
	return s.conn
}

// Renew makes s a downstream connection of conn, bounded as the last one was, with the memory that has grown: only after Release, and
// when nobody else knows s any more. Nothing of what was read before stays.
func (s *ServerConn) Renew(conn net.Conn) {
	fields, trailers, tcp := s.req.Fields, s.req.Body.trailers, s.in.tcp
	fields.forget()
	trailers.forget()
	if tcp != nil {
		*tcp = receiver{read: tcp.read}
	}
	*s = ServerConn{cfg: s.cfg}
	s.req.Fields, s.req.Body.trailers, s.in.tcp = fields, trailers, tcp
	s.begin(conn)
}
