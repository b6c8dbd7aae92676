package waypoint

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/parking"
)

// clientIdle is how long a client's HTTP/1.1 connection may wait for its next request.
const clientIdle = time.Hour

// resting is an HTTP/1.1 connection, and all that is left of it while it is parked: a session is made anew when the client asks for
// something again.
type resting struct {
	*tunnel
	ctx  context.Context // the scope of the connection
	conn relay.Conn
	kept bool // it has been parked before, and is in nobody's hands but the lot's
	used bool // it has brought a request, and so is HTTP/1.1
}

// serveHTTP serves requests until the connection ends, which the caller then closes, or has been idle for long enough to be parked:
// then it is no longer the caller's.
func (t *tunnel) serveHTTP(ctx context.Context, conn relay.Conn) (parked bool) {
	r := &resting{tunnel: t, ctx: ctx, conn: conn}
	return r.serve()
}

// serve serves requests until there is an end, or parks the connection.
func (r *resting) serve() (parked bool) {
	if idle := r.requests(); !idle {
		return false
	}
	if p, ok := r.conn.(*relay.Peeked); ok { // its head has been read, or it would not be idle
		r.conn = p.Conn
	}
	if !r.kept {
		r.kept = true
		r.hold().Keep()
	}
	if !r.lot.Park(r, r.conn, clientIdle) {
		r.Expire()
	}
	return true
}

// requests serves requests until there is none, and then closes the connection, or none for a while: idle.
func (r *resting) requests() (idle bool) {
	s := r.session()
	known := true // to others, by when it is closed
	defer func() {
		switch {
		case !idle:
			_ = s.conn.Close()
		case !known:
			r.spare.put(s)
		}
	}()
	r.sessions.add(s.conn, r.hold() != nil)
	defer r.sessions.remove(s.conn)
	// A client that is gone ends the wait for its response. One that has reset its stream mildly may still be read to its end: the
	// connection's scope goes on.
	ctx := r.ctx
	if st, ok := r.hold().(*hbone.Stream); ok {
		var gone context.CancelFunc
		ctx, gone = context.WithCancel(ctx)
		defer gone()
		st.OnReset(gone)
		defer st.OnReset(nil)
	}
	stop := context.AfterFunc(ctx, s.hangUp)
	defer func() { known = !stop() }()
	for {
		q, err := s.conn.ReadRequest()
		switch {
		case errors.Is(err, http1.ErrIdle):
			s.conn.Release()
			return true
		case s.serveNext(ctx, r, q, err):
			return false
		}
		r.used = true
	}
}

// session makes a session of the connection, or a spare one into that.
func (r *resting) session() *session {
	s := r.spare.take()
	if s == nil {
		s = &session{conn: http1.NewServerConn(r.conn, http1.Config{HTTP10: r.cfg.HTTP10, IdleTimeout: clientIdle})}
	} else {
		s.conn.Renew(r.conn)
	}
	s.tunnel, s.down = r.tunnel, s.conn
	return s
}

// spares are sessions of connections that were parked, for the next ones. They are nobody's memory for long: the collector takes those
// that were not asked for from one of its cycles to the next.
type spares struct{ pool sync.Pool }

// take returns a session of nothing, with a connection to be renewed; nil: there is none.
func (p *spares) take() *session {
	s, _ := p.pool.Get().(*session)
	return s
}

// put takes a session that is idle, and that nobody else knows any more. What it remembers of its connection is forgotten.
func (p *spares) put(s *session) {
	conn, edits := s.conn, s.edits
	edits.Reset()
	*s = session{conn: conn, edits: edits}
	conn.Renew(nil)
	p.pool.Put(s)
}

// hold is what keeps the scope of the connection open while it is parked; nil: it cannot be.
func (r *resting) hold() hold {
	conn := r.conn
	if p, ok := conn.(*relay.Peeked); ok {
		conn = p.Conn
	}
	if !parking.Takes(conn) {
		return nil
	}
	switch c := conn.(type) {
	case *hbone.Stream:
		return c
	case *net.TCPConn:
		if conns := daemon.Scope(r.ctx); conns != nil {
			return scope{conns}
		}
	}
	return nil
}

// hold keeps something open from Keep until Done.
type hold interface {
	Keep()
	Done()
}

// scope is the connections that a listener waits for.
type scope struct{ *sync.WaitGroup }

// Keep implements hold.
func (s scope) Keep() { s.Add(1) }

// Resume implements parking.Guest: the client has said something, or is gone.
func (r *resting) Resume() {
	defer daemon.Recover(r.conn)
	parked := false
	defer func() {
		if !parked {
			r.Expire()
		}
	}()
	if tcp, ok := r.conn.(*net.TCPConn); ok { // a stream ends with its connection
		stop := context.AfterFunc(r.ctx, func() { _ = tcp.Close() })
		defer stop()
	}
	parked = r.serve()
}

// Expire implements parking.Guest.
func (r *resting) Expire() {
	_ = r.conn.Close()
	r.hold().Done()
}

// dozer is a connection that ends its wait for a request when it has waited for a while.
type dozer interface{ Doze() }

// dozeInterval is how often connections are looked at: one waits with a goroutine for once to twice as long, then without. It must be
// long enough that it costs a busy connection nothing.
const dozeInterval = 50 * time.Millisecond

// dozeEach bounds what that costs with very many: a look at one takes some 50 ns.
const dozeEach = 25 * time.Microsecond

// doze looks at all that can be parked, and again while there is one.
func (ss *sessions) doze() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	n := 0
	for c, dozes := range ss.all {
		if dozes {
			c.(dozer).Doze()
			n++
		}
	}
	if ss.dozing = n > 0; ss.dozing {
		ss.clock.Reset(max(dozeInterval, time.Duration(n)*dozeEach))
	}
}

// tidy gives memory back when still nobody is served.
func (ss *sessions) tidy() {
	if ss.count() > 0 {
		return // whoever leaves last has it called again
	}
	ss.tidying.Lock()
	defer ss.tidying.Unlock()
	if again := ss.trimmer.trim(time.Now()); again > 0 {
		ss.tidier.Reset(again)
	}
}
