package http1

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"
)

// Errors of the reader that its users turn into an Error.
var (
	errTooLarge  = errors.New("more than the limit")
	errStopped   = errors.New("the exchange is over")
	errSlow      = errors.New("too few bytes in the time given")
	errWouldWait = errors.New("not read yet")
)

// past is a deadline that makes every waiting call return.
var past = time.Unix(1, 0)

// reader is a connection's inbound half: a borrowed slab, of which buf[r:w] waits to be looked at.
type reader struct {
	conn net.Conn
	buf  []byte // nil while nothing is borrowed
	r, w int
	tcp  *receiver // nil: not needed yet

	kept  kept    // of what was read
	ahead Flusher // flushed before waiting: whatever waits here may be the answer to what waits there
	still bool    // do not wait for the connection: looking ahead

	deadline time.Time     // as set on the connection; zero: none
	until    time.Time     // no deadline of a body goes beyond; zero: none
	late     lateLimit     // the same, from another goroutine
	window   time.Duration // of a body: least bytes must come in each; 0: no deadline of its own
	least    int
	came     int           // bytes since the window began
	missed   bool          // the last window brought less than least
	waited   time.Duration // in the window, while missed
	armed    bool          // window is running
	headIn   time.Duration // a head that is not complete by now must be within; 0: no such
	left     atomic.Int64  // of a body by length, for who does not read it himself
	stop     atomic.Bool   // set from another goroutine, with a deadline in the past
}

func (r *reader) buffered() []byte { return r.buf[r.r:r.w] }

// arm sets the deadline unless it is set already.
func (r *reader) arm(t time.Time) {
	moved := r.late.moved.Load()
	if r.deadline.Equal(t) && !moved {
		return
	}
	if moved {
		r.late.moved.Store(false)
	}
	r.deadline = t
	_ = r.conn.SetReadDeadline(t)                                                   // fails on a closed connection only, which the next read tells
	if late := r.late.until.Load(); late != nil && (t.IsZero() || late.Before(t)) { // it came meanwhile
		r.deadline = *late
		_ = r.conn.SetReadDeadline(*late)
	}
}

// lateLimit is a limit that is found out while another goroutine reads.
type lateLimit struct {
	until atomic.Pointer[time.Time] // nil: there is none
	moved atomic.Bool               // the connection's deadline may not be the reader's any more
}

// hasten bounds all reads, from outside of the goroutine that reads, also the one that is under way.
func (r *reader) hasten(t time.Time) {
	r.late.until.Store(&t)
	r.late.moved.Store(true)
	_ = r.conn.SetReadDeadline(t) // as above
}

// limit is what no deadline goes beyond; zero: none.
func (r *reader) limit() time.Time {
	if late := r.late.until.Load(); late != nil {
		return *late
	}
	return r.until
}

// forReading borrows a slab to read into. It is so much shorter that what fills it can be written as one chunk from a slab of
// the same size.
func forReading(n int) []byte {
	b := borrow(n)
	return b[:len(b)-aroundChunk]
}

// room makes place for at least one byte: the slab's start is reused, then a larger slab borrowed.
func (r *reader) room() error {
	if r.kept.marked {
		if r.roomBehind() {
			return nil
		}
		r.rest() // how much comes at once from here on is to be seen
	}
	if r.buf == nil {
		r.buf = forReading(smallBytes)
		return nil
	}
	if r.r == r.w && r.r > 0 {
		full := r.w == len(r.buf)
		r.r, r.w = 0, 0
		if full && cap(r.buf) < largeBytes { // it comes in bulk
			giveBack(r.buf)
			r.buf = forReading(largeBytes)
		}
		return nil
	}
	if r.w < len(r.buf) && (r.r == 0 || len(r.buf)-r.w >= 512) {
		return nil
	}
	if r.r > 0 {
		r.w = copy(r.buf, r.buf[r.r:r.w])
		r.r = 0
	}
	if r.w < len(r.buf) {
		return nil
	}
	if cap(r.buf) >= largeBytes {
		return errTooLarge
	}
	next := forReading(largeBytes)
	copy(next, r.buf)
	giveBack(r.buf)
	r.buf = next
	return nil
}

// fill waits for at least one more byte. The error is io.EOF at the end, errStopped, errSlow, errTooLarge,
// os.ErrDeadlineExceeded or the connection's.
func (r *reader) fill() error {
	if r.still {
		return errWouldWait
	}
	if r.ahead != nil {
		if err := r.ahead.Flush(); err != nil {
			return err
		}
	}
	if err := r.room(); err != nil {
		return err
	}
	if r.headIn > 0 {
		r.arm(time.Now().Add(r.headIn))
		r.headIn = 0
	}
	if r.window > 0 && !r.armed {
		r.armed, r.missed = true, false
		r.openWindow(time.Now())
	}
	for range 100 {
		var asked time.Time
		if r.missed {
			asked = time.Now()
		}
		if r.stop.Load() {
			return errStopped
		}
		n, err := r.read(r.buf[r.w:])
		if r.missed {
			r.waited += time.Since(asked)
		}
		if n > 0 {
			r.w += n
			r.came += n
			return nil
		}
		switch {
		case err == nil:
		case r.stop.Load():
			return errStopped
		case errors.Is(err, os.ErrDeadlineExceeded) && r.window > 0 && r.armed:
			if err := r.closeWindow(); err != nil {
				return err
			}
		default:
			return err
		}
	}
	return io.ErrNoProgress
}

func (r *reader) openWindow(now time.Time) {
	r.came, r.waited = 0, 0
	t := now.Add(r.window)
	if until := r.limit(); !until.IsZero() && until.Before(t) {
		t = until
	}
	r.arm(t)
}

// closeWindow judges a window that ended and opens the next. A peer is slow after two windows in a row with less than
// the least, and only if it was waited for during half of the second: we may have been waiting for the other side. The
// clock is read only after a first bad window.
func (r *reader) closeWindow() error {
	now := time.Now()
	if until := r.limit(); !until.IsZero() && !now.Before(until) {
		return os.ErrDeadlineExceeded
	}
	if r.came >= r.least {
		r.missed = false
	} else if r.missed && r.waited >= r.window/2 {
		return errSlow
	} else {
		r.missed = true
	}
	r.openWindow(now)
	return nil
}

// beginBody starts the watch over a body's progress with its first wait.
func (r *reader) beginBody(window time.Duration, least int) {
	r.window, r.least, r.armed = window, least, false
}

// line returns the next line without its CRLF and consumes it. It is valid until the next fill.
func (r *reader) line(most int) ([]byte, error) {
	for scan := 0; ; {
		b := r.buffered()
		if i := bytes.IndexByte(b[scan:], '\n'); i >= 0 {
			end := scan + i
			if end == 0 || b[end-1] != '\r' {
				return nil, errBareLF
			}
			if end-1 > most {
				return nil, errTooLarge
			}
			r.r += end + 1
			return b[:end-1], nil
		}
		if len(b) > most+1 {
			return nil, errTooLarge
		}
		scan = len(b)
		if err := r.fill(); err != nil {
			return nil, err
		}
	}
}

// rest gives an empty slab back, and keeps nothing of what was read.
func (r *reader) rest() {
	r.forget()
	if r.buf != nil && r.r == r.w {
		giveBack(r.buf)
		r.buf, r.r, r.w = nil, 0, 0
	}
}

// drop gives the slab back, whatever is in it.
func (r *reader) drop() {
	r.r = r.w
	r.rest()
}
