package http2

import (
	"errors"
	"os"
	"runtime"
	"time"

	"github.com/mistnet/mistnet/internal/slab"
)

const (
	smallBytes = 4 << 10
	largeBytes = 64 << 10
	maxStaged  = 48 << 10 // payload is staged up to here; the rest of a large slab is for control frames
	maxOwed    = 1 << 20  // staged bytes of any kind; a peer that makes us owe it more is misbehaving
	maxRounds  = 4        // that a stream's goroutine writes for others before it hands over
)

var (
	smallSlabs = slab.New(smallBytes, 4096)
	largeSlabs = slab.New(largeBytes, 256)
)

// borrow returns a slice of at least n bytes, which is charged to the budget until giveBack.
func (c *conn) borrow(n int) []byte {
	var b []byte
	switch {
	case n <= smallBytes:
		b = smallSlabs.Get()
	case n <= largeBytes:
		b = largeSlabs.Get()
	default:
		b = make([]byte, n)
	}
	c.cfg.Memory.Charge(cap(b))
	return b
}

func (c *conn) giveBack(b []byte) {
	c.cfg.Memory.Release(cap(b))
	giveBack(b)
}

func giveBack(b []byte) {
	switch cap(b) {
	case smallBytes:
		smallSlabs.Put(b)
	case largeBytes:
		largeSlabs.Put(b)
	}
}

// writer is the sending half of a connection, guarded by conn.mu. There is no writer goroutine: whoever has something to
// send appends it, and if nobody is writing becomes the one who writes all that is pending with one system call. While he
// does, others append to the next batch.
type writer struct {
	busy      bool // somebody is writing
	staged    []byte
	window    int       // the connection's send window
	waiting   []*stream // for a window, or for place
	deadline  time.Time
	failAfter error   // end the connection after the next batch
	half      half    // end only our half of it, and wait for the peer's; nil: end both
	socket    *socket // for writes that do not wait; nil: there is no telling
	driver    func()  // drives, on a goroutine of its own that work counts: made once, so that starting one allocates nothing
}

// room makes place for n more bytes behind what is staged, and returns that.
func (c *conn) room(n int) []byte {
	w := &c.w
	need := len(w.staged) + n
	if need <= cap(w.staged) {
		return w.staged
	}
	if need > largeBytes {
		need *= 2
	}
	next := append(c.borrow(need)[:0], w.staged...)
	c.giveBack(w.staged)
	w.staged = next
	return next
}

// releaseLocked gives back what is not written any more.
func (c *conn) releaseLocked() {
	w := &c.w
	c.giveBack(w.staged)
	w.staged = nil
	w.wakeLocked()
}

// wakeLocked lets those who wait look again.
func (w *writer) wakeLocked() {
	for i, s := range w.waiting {
		s.queued = false
		wake(s.writable)
		w.waiting[i] = nil
	}
	w.waiting = w.waiting[:0]
}

// flush makes sure that what is staged goes out: it is written now, or by whoever is writing.
func (c *conn) flush() error {
	c.mu.Lock()
	if c.w.busy || len(c.w.staged) == 0 || c.err != nil {
		err := c.err
		c.mu.Unlock()
		return err
	}
	c.w.busy = true
	if len(c.streams) > 1 {
		// What one read brought woke several workers. Those that are ready to run append meanwhile, which is cheaper than a
		// system call each.
		c.mu.Unlock()
		runtime.Gosched()
		c.mu.Lock()
	}
	c.drive(0)
	return nil
}

// kickLocked makes sure that what is staged goes out, on another goroutine: for callers that must keep c.mu, or must not
// wait for the socket.
func (c *conn) kickLocked() {
	if c.w.busy || len(c.w.staged) == 0 || c.err != nil {
		return
	}
	c.w.busy = true
	c.work.Add(1)
	go c.w.driver() // ends with what is staged, or with the connection
}

// drive writes until nothing is staged. It is called with c.mu held and w.busy set, and releases both; after maxRounds it
// passes the role on, unless round is negative.
func (c *conn) drive(round int) {
	w := &c.w
	for {
		if len(w.staged) == 0 || c.err != nil {
			failAfter, half := w.failAfter, w.half
			w.busy = failAfter != nil // nobody writes behind the last word
			c.mu.Unlock()
			if failAfter != nil && (half == nil || half.CloseWrite() != nil) {
				c.fail(failAfter)
			}
			return
		}
		if round == maxRounds && w.failAfter == nil {
			w.busy = false
			c.kickLocked()
			c.mu.Unlock()
			return
		}
		if round >= 0 && round < maxRounds {
			round++
		}
		b := w.staged
		w.staged = nil
		w.wakeLocked()
		c.mu.Unlock()
		err := c.write(b)
		c.giveBack(b)
		if err != nil {
			c.fail(err)
		}
		c.mu.Lock()
	}
}

// write writes a batch. Only who drives calls it.
func (c *conn) write(p []byte) error {
	for {
		c.arm()
		n, err := c.raw.Write(p)
		if p = p[n:]; n == 0 || len(p) == 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		// The peer is slow, but reads. A connection that cannot go on after a timeout (TLS) says so next.
	}
}

// arm gives each write at least half the time, and sets the deadline only when less is left.
func (c *conn) arm() {
	if now := time.Now(); c.w.deadline.Sub(now) < c.cfg.WriteTimeout/2 {
		c.w.deadline = now.Add(c.cfg.WriteTimeout)
		c.mu.Lock()
		if c.w.failAfter == nil { // else there is less time
			_ = c.raw.SetWriteDeadline(c.w.deadline) // the write tells
		}
		c.mu.Unlock()
	}
}

// wake lets who waits on ch look again.
func wake(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
