package http1

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"sync/atomic"
	"time"
)

// ClientConn is a connection to an upstream: it carries one exchange after the other. Not safe for concurrent use,
// Close excepted.
type ClientConn struct {
	conn   net.Conn
	cfg    Config
	in     reader
	out    writer
	resp   Response
	method string      // of the request on its way
	ask    string      // the upgrade it asked for
	busy   bool        // an exchange began that did not end
	sent   bool        // its request was written by WriteRequest, to the end
	body   bool        // its request has one
	broken atomic.Bool // can carry no other exchange
}

// NewClientConn makes an upstream connection of conn, which it owns from now on.
func NewClientConn(conn net.Conn, cfg Config) *ClientConn {
	c := &ClientConn{conn: conn, cfg: cfg.filled()}
	c.in.conn = conn
	c.out = writer{conn: conn, as: ofRequest, timeout: c.cfg.WriteTimeout}
	return c
}

// Reusable reports whether the connection can carry another request: the last exchange ended in order on both sides, the
// upstream keeps the connection, and sent nothing beyond its response.
func (c *ClientConn) Reusable() bool {
	if c.sent && c.resp.Status >= 200 && c.resp.Body.Done() {
		c.End()
	}
	return !c.broken.Load() && !c.busy && c.in.r == c.in.w
}

// Doubtful reports whether the upstream may yet say more than its last response, which would be taken for that to the next request: it has
// read a body in which it may have found a request of its own, or answered without a body where it would have had one to say. Who has a
// doubt looks for what came before he asks again.
func (c *ClientConn) Doubtful() bool {
	return c.body || c.method == "HEAD" || c.resp.Status == 204 || c.resp.Status == 304
}

// SetDeadline bounds the exchange in progress, or the next one: the wait for the response and for its body. The zero
// time takes the bound away.
func (c *ClientConn) SetDeadline(t time.Time) {
	c.in.until = t
	c.in.late.until.Store(nil)
}

// Hasten is SetDeadline from another goroutine, while the exchange is in progress: it holds for the wait that is under way, too. The zero
// time changes nothing.
func (c *ClientConn) Hasten(t time.Time) {
	if !t.IsZero() {
		c.in.hasten(t)
	}
}

// Close closes the connection.
func (c *ClientConn) Close() error {
	c.broken.Store(true)
	return c.conn.Close()
}

// WriteRequest writes the request, edited, with its body, and waits for that: an Exchange sends while it receives.
func (c *ClientConn) WriteRequest(q *Request, e *Edits) error {
	if err := c.Begin(q, e); err != nil {
		return err
	}
	err := c.SendBody(&q.Body)
	c.sent = err == nil
	return err
}

// Begin implements Upstream.
func (c *ClientConn) Begin(q *Request, e *Edits) error {
	if err := c.out.requestHead(q, e); err != nil {
		return err
	}
	c.method, c.ask, c.busy, c.sent = q.Method, q.Upgrade, true, false
	c.body = !q.Body.Absent()
	c.resp.Status = 0
	return nil
}

// SendBody implements Upstream.
func (c *ClientConn) SendBody(b *Body) error {
	kind, _ := b.framing()
	return c.out.body(b, kind)
}

// ReadResponse reads the next response head, be it an interim one. The response is valid until the next call.
func (c *ClientConn) ReadResponse() (*Response, error) {
	c.in.window = 0
	c.in.arm(c.in.limit())
	if err := c.resp.read(&c.in, &c.cfg, c.method, c.ask); err != nil {
		c.broken.Store(true)
		return nil, err
	}
	c.in.beginBody(c.cfg.StreamTimeout, 1)
	return &c.resp, nil
}

// End implements Upstream: the exchange is over on both sides.
func (c *ClientConn) End() {
	c.busy, c.sent = !c.resp.Body.Done(), false
	if c.resp.close || c.resp.Tunnel || !c.busy && c.hides() {
		c.broken.Store(true)
	}
	if c.in.late.moved.Load() {
		c.in.late.until.Store(nil)
		c.in.arm(time.Time{}) // the connection's deadline is over with the exchange's
	}
	c.out.rest()
	c.in.rest()
}

// hides reports whether more has come inside of TLS than was asked for. It was read together with what was, and lies where nobody who
// looks at the socket finds it.
func (c *ClientConn) hides() bool {
	t, ok := c.conn.(*tls.Conn)
	if !ok {
		return false
	}
	c.in.arm(past) // nothing more is read from the socket
	var b [1]byte
	n, err := t.Read(b[:])
	return n > 0 || !errors.Is(err, os.ErrDeadlineExceeded)
}

// Drop implements Upstream.
func (c *ClientConn) Drop() {
	c.out.rest()
	c.in.drop()
}

// Raw gives the connection away after an exchange that ended in a tunnel.
func (c *ClientConn) Raw() *RawConn {
	c.broken.Store(true)
	return raw(c.conn, &c.in, &c.out)
}
