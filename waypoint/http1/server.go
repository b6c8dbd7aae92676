package http1

import (
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"time"
)

// Config bounds what a peer may do. Zero fields take the value in parentheses.
type Config struct {
	HeadBytes int  // of a head (and at most: 60 KiB); more is 431
	Fields    int  // of a head (and at most: 100)
	HTTP10    bool // serve HTTP/1.0 requests, each closing its connection, instead of refusing them with 426

	IdleTimeout   time.Duration // from one request to the next (1 h)
	HeadTimeout   time.Duration // from a head's first bytes to its end (10 s)
	BodyTimeout   time.Duration // in which a request body that is waited for must bring BodyMinimum; missed twice, it is 408 (60 s)
	BodyMinimum   int           // bytes (512)
	StreamTimeout time.Duration // in which a response body must bring a byte; missed twice, it is cut (5 min)
	WriteTimeout  time.Duration // in which, or in half of it, a peer must take a byte of what is written (30 s)

	DrainBytes   int           // of a request body read and thrown away to keep the connection (256 KiB)
	DrainTimeout time.Duration // in which that must end; also how long a closing connection listens on (2 s)
}

func (c Config) filled() Config {
	if c.HeadBytes <= 0 || c.HeadBytes > maxHeadBytes {
		c.HeadBytes = maxHeadBytes
	}
	if c.Fields <= 0 || c.Fields > maxFields {
		c.Fields = maxFields
	}
	for _, d := range [...]struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.IdleTimeout, time.Hour},
		{&c.HeadTimeout, 10 * time.Second},
		{&c.BodyTimeout, time.Minute},
		{&c.StreamTimeout, 5 * time.Minute},
		{&c.WriteTimeout, 30 * time.Second},
		{&c.DrainTimeout, 2 * time.Second},
	} {
		if *d.field <= 0 {
			*d.field = d.value
		}
	}
	if c.BodyMinimum <= 0 {
		c.BodyMinimum = 512
	}
	if c.DrainBytes <= 0 {
		c.DrainBytes = 256 << 10
	}
	return c
}

// ServerConn is a downstream connection: ReadRequest, then exactly one of an Exchange that responds and Reply, and
// again. Not safe for concurrent use, Drain excepted.
type ServerConn struct {
	conn net.Conn
	cfg  Config
	in   reader
	out  writer
	req  Request
	x    Exchange

	open      bool // a request was read whose exchange has not ended
	answered  bool // its response head was written
	continued bool // it was told to send its body
	last      bool // the connection ends with this exchange
	linger    bool // the client may still be sending

	winding  atomic.Bool
	draining atomic.Bool
	wait     wait
}

// NewServerConn makes a downstream connection of conn, which it owns from now on.
func NewServerConn(conn net.Conn, cfg Config) *ServerConn {
	s := &ServerConn{cfg: cfg.filled()}
	s.begin(conn)
	return s
}

func (s *ServerConn) begin(conn net.Conn) {
	s.conn, s.in.conn = conn, conn
	s.out.conn, s.out.as, s.out.timeout = conn, ofResponse, s.cfg.WriteTimeout
}

// ReadRequest waits for the next request and reads its head. The error is io.EOF when there will be none, because either
// side wants so, ErrIdle when Doze ended the wait, or an *Error, which ReplyError answers. The request is valid until the next call.
func (s *ServerConn) ReadRequest() (*Request, error) {
	if s.open {
		if !s.settle() {
			return nil, io.EOF
		}
	}
	s.in.forget()
	s.in.window, s.in.until = 0, time.Time{}
	s.answered, s.continued, s.last = false, false, false
	if s.in.r == s.in.w {
		if err := s.await(); err != nil {
			return nil, err
		}
	}
	s.in.headIn = s.cfg.HeadTimeout
	err := s.req.read(&s.in, &s.cfg)
	s.in.headIn = 0
	s.open = true
	if err != nil {
		s.last, s.linger = true, true
		return nil, err
	}
	s.in.beginBody(s.cfg.BodyTimeout, s.cfg.BodyMinimum)
	return &s.req, nil
}

// settle ends an exchange so that the next can begin, reading the rest of its body if that is short. False: the
// connection must close.
func (s *ServerConn) settle() bool {
	if s.last || !s.answered || s.out.err != nil {
		return false
	}
	s.open = false
	b := &s.req.Body
	if b.Done() || b.kind == bodyNone {
		return true
	}
	s.last, s.linger = true, true // unless we get through
	if s.held() {
		return false
	}
	s.in.window = 0
	s.in.arm(time.Now().Add(s.cfg.DrainTimeout))
	for n := 0; n <= s.cfg.DrainBytes; {
		p, err := b.Next()
		if err == io.EOF {
			s.linger = false
			return true
		}
		if err != nil {
			return false
		}
		n += len(p)
	}
	return false
}

// held reports whether the body is one that the client holds back, or longer than we read for nothing.
func (s *ServerConn) held() bool {
	b := &s.req.Body
	return !b.Done() && b.kind != bodyNone && (s.req.Continue && !s.continued && len(s.in.buffered()) == 0 || b.kind == bodyLength && b.left > int64(s.cfg.DrainBytes))
}

// Continue tells a client that waits for it to send the body, for filters that want to see it. An Exchange passes on the
// upstream's word instead.
func (s *ServerConn) Continue() error {
	if !s.req.Continue || s.continued || s.answered {
		return nil
	}
	s.continued = true
	if err := s.out.need(32); err != nil {
		return err
	}
	s.out.buf = append(s.out.buf, "HTTP/1.1 100 Continue\r\n\r\n"...)
	return s.out.flush()
}

// Answered reports whether a response head left, so that Reply would come too late.
func (s *ServerConn) Answered() bool { return s.answered }

// Wind makes the connection close with the next exchange that ends, and says so to the client. One that waits for a request
// goes on to wait for one: unlike Drain it loses none that is on its way. Safe to call at any time from any goroutine.
func (s *ServerConn) Wind() { s.winding.Store(true) }

// ends reports whether the connection is to close with its exchange.
func (s *ServerConn) ends() bool { return s.req.close || s.draining.Load() || s.winding.Load() }

// Reply answers the request, or the one that could not be read, itself: with a plain text body (Edits may say
// otherwise) that a HEAD request does not get.
func (s *ServerConn) Reply(status int, body string, e *Edits) error {
	if s.answered {
		return errAnswered
	}
	if err := e.failed(); err != nil {
		return err
	}
	none := Fields{}
	s.last = s.last || s.ends() || s.held()
	s.linger = s.linger || s.last && !s.req.Body.Done() && s.req.Body.kind != bodyNone
	size := 256 + len(body)
	if e != nil {
		size += e.size
	}
	if err := s.out.need(size); err != nil {
		return err
	}
	b := appendStatus(s.out.buf, status, statusText(status))
	b = e.fields(b, &none)
	bodyless := status == 204 || status == 304 || status < 200
	if !bodyless {
		if body != "" && !e.has(&none, nameContentType) {
			b = append(b, "Content-Type: text/plain\r\n"...)
		}
		b = appendFraming(b, bodyLength, int64(len(body)))
	}
	if !e.has(&none, nameDate) {
		b = s.out.appendDate(b)
	}
	switch {
	case status == 426:
		b = append(b, "Connection: close, Upgrade\r\nUpgrade: HTTP/1.1\r\n"...) // RFC 9110, 15.5.22
		s.last = true
	case s.last:
		b = append(b, "Connection: close\r\n"...)
	}
	b = append(b, crlf...)
	if !bodyless && s.req.Method != "HEAD" {
		b = append(b, body...)
	}
	s.out.buf = b
	s.answered = true
	return s.out.flush()
}

// ReplyError answers what ReadRequest or an Exchange failed with, if that can be answered: no response head left yet,
// and the error has a status.
func (s *ServerConn) ReplyError(err error, e *Edits) error {
	x := asError(err, ReasonUnknown)
	if x.Status == 0 || s.answered {
		return nil
	}
	if x.Client() {
		s.last, s.linger = true, true
	}
	return s.Reply(x.Status, strconv.Itoa(x.Status)+" "+x.Reason.String()+"\n", e)
}

// Raw gives the connection away: after an exchange that ended in a tunnel, or when ReadRequest met another protocol.
func (s *ServerConn) Raw() *RawConn {
	s.linger = false
	return raw(s.conn, &s.in, &s.out)
}

// Close closes the connection. If the client may still be sending, it first says that nothing more will come and
// listens on for a moment: closing at once would make the kernel take back what the client has not read yet (RFC 9112,
// 9.6).
func (s *ServerConn) Close() error {
	if s.linger && s.out.err == nil {
		if half, ok := s.conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
			s.in.window = 0
			s.in.arm(time.Now().Add(s.cfg.DrainTimeout))
			for n := 0; n < s.cfg.DrainBytes; n += len(s.in.buffered()) {
				s.in.r = s.in.w
				if s.in.fill() != nil {
					break
				}
			}
		}
	}
	err := s.conn.Close()
	s.in.drop()
	s.out.rest()
	return err
}
