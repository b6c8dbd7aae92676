package http2_test

import (
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/http2"
)

// memConn is one end of an in-memory connection with a buffer, so that neither side needs the other to write. Unless
// room is set, when a full buffer makes writers wait.
type memConn struct {
	in, out *memBuffer
}

type memBuffer struct {
	mu       sync.Mutex
	cond     *sync.Cond
	b        []byte
	r        int
	room     int  // 0: any
	paused   bool // nobody reads
	closed   bool
	deadline time.Time // of the reader
	timer    *time.Timer
	late     time.Time // of the writer
	clock    *time.Timer
}

func newMemBuffer() *memBuffer {
	b := &memBuffer{}
	b.cond = sync.NewCond(&b.mu)
	return b
}

func memPipe() (a, b *memConn) {
	x, y := newMemBuffer(), newMemBuffer()
	return &memConn{x, y}, &memConn{y, x}
}

func (c *memConn) Read(p []byte) (int, error) {
	b := c.in
	b.mu.Lock()
	defer b.mu.Unlock()
	for (b.paused || b.r == len(b.b)) && !b.closed {
		if !b.deadline.IsZero() && !time.Now().Before(b.deadline) {
			return 0, os.ErrDeadlineExceeded
		}
		b.cond.Wait()
	}
	n := copy(p, b.b[b.r:])
	if b.r += n; b.r == len(b.b) {
		b.b, b.r = b.b[:0], 0
	}
	if b.room > 0 {
		b.cond.Broadcast()
	}
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

func (c *memConn) Write(p []byte) (int, error) {
	b := c.out
	b.mu.Lock()
	defer b.mu.Unlock()
	written := 0
	for {
		if b.closed {
			return written, io.ErrClosedPipe
		}
		n := len(p)
		if b.room > 0 {
			n = min(n, b.room-(len(b.b)-b.r))
		}
		b.b = append(b.b, p[:n]...)
		written += n
		b.cond.Broadcast()
		if p = p[n:]; len(p) == 0 {
			return written, nil
		}
		if !b.late.IsZero() && !time.Now().Before(b.late) {
			return written, os.ErrDeadlineExceeded
		}
		b.cond.Wait()
	}
}

func (c *memConn) Close() error {
	for _, b := range []*memBuffer{c.in, c.out} {
		b.mu.Lock()
		b.closed = true
		b.cond.Broadcast()
		b.mu.Unlock()
	}
	return nil
}

// CloseWrite ends this direction, behind what was written.
func (c *memConn) CloseWrite() error {
	b := c.out
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return io.ErrClosedPipe
	}
	b.closed = true
	b.cond.Broadcast()
	return nil
}

func (b *memBuffer) arm(field *time.Time, timer **time.Timer, t time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	*field = t
	if *timer != nil {
		(*timer).Stop()
		*timer = nil
	}
	if !t.IsZero() {
		*timer = time.AfterFunc(time.Until(t), func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.cond.Broadcast()
		})
	}
	b.cond.Broadcast()
}

func (c *memConn) SetReadDeadline(t time.Time) error {
	c.in.arm(&c.in.deadline, &c.in.timer, t)
	return nil
}

func (c *memConn) SetWriteDeadline(t time.Time) error {
	c.out.arm(&c.out.late, &c.out.clock, t)
	return nil
}

func (c *memConn) SetDeadline(t time.Time) error {
	_ = c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

func (c *memConn) LocalAddr() net.Addr  { return &net.TCPAddr{} }
func (c *memConn) RemoteAddr() net.Addr { return &net.TCPAddr{} }

// proxy is a worker that carries every request to one upstream connection, as a waypoint does.
func proxy(tb testing.TB, up *http2.ClientConn) func() func(*http2.ServerStream) {
	return func() func(*http2.ServerStream) {
		var e http1.Edits
		return func(st *http2.ServerStream) {
			q, err := st.Request()
			if err != nil {
				_ = st.ReplyError(err, nil)
				return
			}
			if _, ok := q.Value("x-absent"); ok || q.Path == "" || q.Authority == "" {
				tb.Error("misread")
			}
			e.Reset()
			e.Set("x-envoy-attempt-count", "1")
			e.Set("x-forwarded-proto", "https")
			e.Remove("x-custom")
			far := up.Open()
			if far == nil {
				_ = st.Reply(503, "no room", nil)
				return
			}
			defer far.Free()
			x := st.Exchange(far)
			if err := x.Send(&e); err != nil {
				_ = st.ReplyError(err, nil)
				return
			}
			if _, err := x.Receive(); err != nil {
				_ = st.ReplyError(err, nil)
				return
			}
			e.Reset()
			e.Set("server", "istio-envoy")
			_ = x.Respond(&e)
		}
	}
}
