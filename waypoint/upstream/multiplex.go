package upstream

import (
	"context"
	"net"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/http2"
)

// shared are the HTTP/2 connections to an endpoint, each of which carries many requests. mu of Pool guards it.
type shared struct {
	conns []sharedConn
	dial  *dialing // nil: nobody is dialling
}

// sharedConn is one of them.
type sharedConn struct {
	*http2.ClientConn
	tunnel *hbone.Stream // that carries it; nil: none does
}

// draining reports whether it is inside of a tunnel that is about to end.
func (c *sharedConn) draining() bool { return c.tunnel != nil && c.tunnel.Draining() }

// open opens a stream on a connection that has room, or returns nil. One whose tunnel drains ends with the streams it has.
func (s *shared) open() *http2.ClientStream {
	for i := range s.conns {
		c := &s.conns[i]
		if c.draining() {
			c.Retire()
			continue
		}
		if st := c.Open(); st != nil {
			return st
		}
	}
	return nil
}

// dialing is one attempt to connect, which everybody who needs the endpoint waits for.
type dialing struct {
	done chan struct{}
	err  error
}

// http2Config bounds a connection, by what a pool's settings say of HTTP/2 and the memory of all.
func (u *Pool) http2Config(p *mesh.ConnectionPool) http2.Config {
	if p == nil {
		return http2.Config{Memory: u.mem}
	}
	return http2.Config{
		Memory: u.mem, MaxStreams: int(p.MaxStreams), MaxRequests: int(p.MaxPerConnection),
		PingInterval: p.HTTP2PingInterval, PingTimeout: p.HTTP2PingTimeout,
	}
}

// Stream opens a stream to an endpoint, on a connection with room or a new one.
func (u *Pool) Stream(ctx context.Context, to Pick, h hbone.Header, pool *mesh.ConnectionPool, within time.Duration) (*Conn, error) {
	for reused := true; ; reused = false {
		st, d, err := u.streamOr(ctx, to, h, pool, within)
		if err != nil {
			return nil, err
		}
		if st != nil {
			return &Conn{Stream: st, use: st.Use(), to: to.endpoint, Reused: reused}, nil
		}
		select {
		case <-d.done:
			if d.err != nil {
				return nil, d.err
			}
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// StreamNow opens a stream on a connection that is there and has room, or returns nil.
func (u *Pool) StreamNow(p *Pick) *Conn {
	e := p.endpoint
	u.mu.Lock()
	defer u.mu.Unlock()
	there := u.endpoints[e.key]
	if there == nil {
		return nil
	}
	st := there.shared.open()
	if st == nil {
		return nil
	}
	return &Conn{Stream: st, use: st.Use(), to: e, Reused: true}
}

// streamOr opens a stream on a connection that is there, or returns the attempt to wait for.
func (u *Pool) streamOr(ctx context.Context, to Pick, h hbone.Header, pool *mesh.ConnectionPool, within time.Duration) (*http2.ClientStream, *dialing, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.registered(&to)
	s := &to.endpoint.shared
	if st := s.open(); st != nil {
		return st, nil, nil
	}
	if u.closed {
		return nil, nil, net.ErrClosed
	}
	if s.dial == nil {
		d := &dialing{done: make(chan struct{})}
		s.dial = d
		// The attempt outlives a caller who gives up: others may be waiting for it too.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), within)
		stop := context.AfterFunc(u.ctx, cancel)
		u.work.Go(func() {
			defer cancel()
			defer stop()
			u.share(ctx, to, h, u.http2Config(pool), d)
		})
	}
	return nil, s.dial, nil
}

// share connects, and then serves the connection until it ends.
func (u *Pool) share(ctx context.Context, to Pick, h hbone.Header, cfg http2.Config, d *dialing) {
	conn, err := u.Dial(ctx, to, h, "h2")
	var c *http2.ClientConn
	s := &to.endpoint.shared
	u.mu.Lock()
	s.dial, d.err = nil, err
	if err == nil {
		c = http2.NewClientConn(conn, cfg)
		s.conns = append(s.conns, sharedConn{c, tunnelOf(conn)})
	}
	closed := u.closed
	u.mu.Unlock()
	close(d.done)
	if err != nil {
		return
	}
	if closed {
		c.Close()
	}
	u.carry(to.endpoint, c)
}

// carry serves a connection of an endpoint until it ends.
func (u *Pool) carry(e *endpoint, c *http2.ClientConn) {
	if err := c.Run(); err != nil {
		u.log.Debug("connection ended", zap.Stringer("dst.addr", e.key.addr), zap.Error(err))
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	s := &e.shared
	if i := slices.IndexFunc(s.conns, func(there sharedConn) bool { return there.ClientConn == c }); i >= 0 {
		s.conns = slices.Delete(s.conns, i, i+1)
	}
}

// Alone opens a stream on a connection that is made for it and carries no other, so that nobody else's requests can end it.
func (u *Pool) Alone(ctx context.Context, to Pick, h hbone.Header, pool *mesh.ConnectionPool) (*Conn, error) {
	conn, err := u.Dial(ctx, to, h, "h2")
	if err != nil {
		return nil, err
	}
	cfg := u.http2Config(pool)
	cfg.MaxRequests = 1
	c := http2.NewClientConn(conn, cfg)
	st := c.Open()
	u.mu.Lock()
	defer u.mu.Unlock()
	if st == nil || u.closed {
		c.Close()
		return nil, net.ErrClosed
	}
	up := &Conn{Stream: st, use: st.Use(), to: to.endpoint}
	u.registered(&to)
	e := to.endpoint
	e.shared.conns = append(e.shared.conns, sharedConn{c, tunnelOf(conn)}) // closeShared is to find it
	u.work.Go(func() { u.carry(e, c) })
	return up, nil
}

// registered makes the endpoint of a pick the one that others find. mu of Pool is held.
func (u *Pool) registered(to *Pick) {
	if there := u.endpoints[to.endpoint.key]; there != nil {
		to.endpoint = there
		return
	}
	u.endpoints[to.endpoint.key] = to.endpoint // it was forgotten meanwhile
}

// unused are the connections without a stream since before then, and those that may carry no other. mu of Pool is held.
func (s *shared) unused(then time.Time) (old []sharedConn) {
	for _, c := range s.conns {
		if since, idle := c.Idle(); idle && since.Before(then) || c.draining() {
			old = append(old, c)
		}
	}
	return old
}

// closeShared closes every shared connection, busy or not.
func (u *Pool) closeShared() {
	var all []sharedConn
	u.mu.Lock()
	for _, e := range u.endpoints {
		all = append(all, e.shared.conns...)
	}
	u.mu.Unlock()
	for _, c := range all {
		c.Close()
	}
}
