package http1

import (
	"errors"
	"net"
	"time"
)

// RawConn is a connection that no longer carries HTTP/1.1: it first reads what came with the last head.
type RawConn struct {
	net.Conn
	in reader // only its buffer
}

func raw(conn net.Conn, in *reader, out *writer) *RawConn {
	c := &RawConn{Conn: conn}
	c.in.buf, c.in.r, c.in.w = in.buf, in.r, in.w
	in.buf, in.r, in.w = nil, 0, 0
	in.forget()
	out.rest()
	_ = conn.SetDeadline(time.Time{}) // the next call tells
	c.in.rest()
	return c
}

// Read reads what was buffered, then from the connection.
func (c *RawConn) Read(p []byte) (int, error) {
	if c.in.buf == nil {
		return c.Conn.Read(p)
	}
	n := copy(p, c.in.buffered())
	c.in.r += n
	c.in.rest()
	return n, nil
}

// Buffered returns how many bytes came with the last head and were not read yet.
func (c *RawConn) Buffered() int { return c.in.w - c.in.r }

// Unwrap returns the connection beneath; only once nothing is buffered may it be used instead.
func (c *RawConn) Unwrap() net.Conn { return c.Conn }

// WritesTo returns the connection that what is written goes to as it is.
func (c *RawConn) WritesTo() net.Conn { return c.Conn }

// CloseWrite closes the sending half, or everything when the connection has no halves.
func (c *RawConn) CloseWrite() error { return closeWrite(c.Conn) }

func closeWrite(conn net.Conn) error {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return conn.Close()
}

var errAnswered = errors.New("the response has begun")
