package http2

import (
	"io"
	"net"
	"time"

	"golang.org/x/net/http2"
)

// Tunnel is a stream that no longer carries HTTP but bytes of another protocol both ways (RFC 8441, 5): the end of a direction
// is END_STREAM, an end that is none RST_STREAM. It reads and writes within the stream's windows. One goroutine may read while
// another writes; Close and Reset are safe at any time from any goroutine.
type Tunnel struct {
	s    *stream
	rest []byte // was taken from the stream, and not read yet
	over bool   // nothing follows rest
}

// Tunnel is the stream of a request that was answered by a response with Tunnel set.
func (st *ServerStream) Tunnel() *Tunnel { return &Tunnel{s: &st.stream} }

// Tunnel is the stream after a response with Tunnel set.
func (st *ClientStream) Tunnel() *Tunnel { return &Tunnel{s: &st.stream} }

// Read implements net.Conn.
func (t *Tunnel) Read(p []byte) (int, error) {
	for len(t.rest) == 0 {
		if t.over {
			return 0, io.EOF
		}
		var err error
		if t.rest, t.over, err = t.s.Next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, t.rest)
	t.rest = t.rest[n:]
	return n, nil
}

// Write implements net.Conn. It returns when the peer's window has taken all of p.
func (t *Tunnel) Write(p []byte) (int, error) {
	if err := t.s.write(p, false); err != nil {
		return 0, err
	}
	return len(p), t.flush()
}

// CloseWrite says that nothing follows.
func (t *Tunnel) CloseWrite() error {
	if err := t.s.write(nil, true); err != nil {
		return err
	}
	return t.flush()
}

func (t *Tunnel) flush() error {
	if err := t.s.c.flush(); err != nil {
		return t.s.blame(err)
	}
	return nil
}

// Close ends both directions. Unless both had ended in order the peer sees an error.
func (t *Tunnel) Close() error { return t.Reset() }

// Reset ends both directions so that the peer sees an error.
func (t *Tunnel) Reset() error {
	t.s.c.mu.Lock()
	defer t.s.c.mu.Unlock()
	if t.s.err == nil && !(t.s.sentEnd && t.s.gotEnd) {
		t.s.resetLocked(http2.ErrCodeCancel, &resetError{code: http2.ErrCodeCancel})
	}
	return nil
}

// LocalAddr implements net.Conn.
func (t *Tunnel) LocalAddr() net.Addr { return t.s.c.raw.LocalAddr() }

// RemoteAddr implements net.Conn.
func (t *Tunnel) RemoteAddr() net.Addr { return t.s.c.raw.RemoteAddr() }

// SetDeadline implements net.Conn. What began to wait before does not see it.
func (t *Tunnel) SetDeadline(at time.Time) error {
	t.s.c.mu.Lock()
	t.s.deadline = at
	t.s.c.mu.Unlock()
	return nil
}

// SetReadDeadline is SetDeadline.
func (t *Tunnel) SetReadDeadline(at time.Time) error { return t.SetDeadline(at) }

// SetWriteDeadline is SetDeadline.
func (t *Tunnel) SetWriteDeadline(at time.Time) error { return t.SetDeadline(at) }
