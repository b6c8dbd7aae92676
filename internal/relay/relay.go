package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Conn is one end of a relay: a connection that can be closed in one direction.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// Counters are the bytes relayed so far. They are live: others may read them while the relay runs.
type Counters struct{ AToB, BToA atomic.Int64 }

// Receiver is implemented by tunnel streams, which push what they receive to a Sink from their reader goroutine.
type Receiver interface {
	Receive(to Sink)
}

// Sink takes what a Receiver receives. TryWrite must not block and returns how much it took; Write may block. Done is
// called once, last: with nil at the peer's half-close, after everything before it was taken, else with an error.
type Sink = interface {
	TryWrite(p []byte) (int, error)
	Write(p []byte) (int, error)
	Done(err error)
}

// resetter is implemented by connections that can be ended with an error visible to the peer.
type resetter interface{ Reset() error }

// lingerTime bounds how long, after one direction failed, the other may go on delivering what was already sent.
const lingerTime = 5 * time.Second

// Pump copies both ways until both directions have ended, and closes both connections. It returns nil if both ended by
// half-close. An error of either connection reaches the other as a reset. When ctx ends both are reset at once and Pump
// returns context.Cause(ctx). Pump owns both connections; nobody else may read, write or close them meanwhile.
func Pump(ctx context.Context, a, b Conn, n *Counters) error {
	p := &pump{a: a, b: b}
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() { p.abort(context.Cause(ctx)) })
		defer stop()
	}
	switch {
	case canPush(b, a):
		p.push(b.(Receiver), a, &n.BToA)
		p.copy(b, a, &n.AToB, &p.aToB)
	case canPush(a, b):
		p.push(a.(Receiver), b, &n.AToB)
		p.copy(a, b, &n.BToA, &p.bToA)
	default:
		p.done.Go(func() { p.copy(a, b, &n.BToA, &p.bToA) })
		p.copy(b, a, &n.AToB, &p.aToB)
	}
	p.done.Wait()
	return p.finish()
}

// canPush reports whether what arrives on from can be written to the socket to by from's own goroutine.
func canPush(from, to Conn) bool {
	_, pushes := from.(Receiver)
	return pushes && rawConn(to) != nil
}

func rawConn(c Conn) syscall.RawConn {
	if _, pushes := c.(Receiver); pushes {
		return nil
	}
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return rc
}

// direction is how one direction ended.
type direction struct {
	over bool
	err  error // nil: half-closed
}

type pump struct {
	a, b Conn
	done sync.WaitGroup // of the second direction

	mu         sync.Mutex
	aToB, bToA direction
	cause      error // of an abort
	resetting  sync.WaitGroup
	linger     *time.Timer
}

// copy moves src to dst and passes on the end.
func (p *pump) copy(dst, src Conn, n *atomic.Int64, d *direction) {
	p.end(d, transfer(dst, src, n))
}

// errRead and errWrite say which side of a direction failed.
type errRead struct{ err error }

func (e errRead) Error() string { return fmt.Sprintf("read: %v", e.err) }
func (e errRead) Unwrap() error { return e.err }

type errWrite struct{ err error }

func (e errWrite) Error() string { return fmt.Sprintf("write: %v", e.err) }
func (e errWrite) Unwrap() error { return e.err }

// end records the end of a direction. A failed read means that the source died, so everything ends. A failed write
// means that the destination takes no more; what it had sent before may still be on its way, and gets lingerTime.
func (p *pump) end(d *direction, err error) {
	var w errWrite
	p.mu.Lock()
	d.over, d.err = true, err
	if errors.As(err, &w) && p.cause == nil && !(p.aToB.over && p.bToA.over) {
		p.linger = time.AfterFunc(lingerTime, func() { p.abort(err) })
		p.mu.Unlock()
		return
	}
	p.mu.Unlock()
	if err != nil {
		p.abort(err)
	}
}

// abort resets both connections, which ends both directions.
func (p *pump) abort(cause error) {
	p.mu.Lock()
	if p.cause != nil {
		p.mu.Unlock()
		return
	}
	// A connection that was sent everything, and its half-close, is spared: a reset could destroy what it has not read.
	spareA, spareB := p.bToA.over && p.bToA.err == nil, p.aToB.over && p.aToB.err == nil
	p.cause = cause
	p.resetting.Add(1)
	p.mu.Unlock()
	defer p.resetting.Done()
	var w errWrite
	if !errors.As(cause, &w) {
		spareA, spareB = false, false
	}
	// Streams first: closing a socket waits for whoever uses it, who may be waiting for the stream.
	ends := [...]struct {
		Conn
		spare bool
	}{{p.b, spareB}, {p.a, spareA}}
	if _, stream := p.a.(Receiver); stream {
		ends[0], ends[1] = ends[1], ends[0]
	}
	for _, c := range ends {
		if c.spare {
			c.Close()
		} else {
			reset(c.Conn)
		}
	}
}

func (p *pump) finish() error {
	p.mu.Lock()
	cause := p.cause
	failed := errors.Join(p.aToB.err, p.bToA.err)
	if p.linger != nil {
		p.linger.Stop()
	}
	p.mu.Unlock()
	if cause != nil {
		p.resetting.Wait() // the first reset ends both directions, and who called Pump closes in an orderly way what is left to close
		return cause
	}
	if failed != nil {
		p.abort(failed)
		return failed
	}
	return errors.Join(closeQuietly(p.a), closeQuietly(p.b))
}

func closeQuietly(c Conn) error {
	if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// reset ends c so that its peer sees an error.
func reset(c Conn) {
	switch c := c.(type) {
	case resetter:
		c.Reset()
	case interface{ SetLinger(sec int) error }:
		c.SetLinger(0) // RST instead of FIN
	}
	c.Close()
}

// halfClose passes on the end of a direction.
func halfClose(dst Conn) error {
	err := dst.CloseWrite()
	if err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, syscall.ENOTCONN) {
		return errWrite{err}
	}
	return nil
}

// transfer moves src to dst until src ends, and half-closes dst.
func transfer(dst, src Conn, n *atomic.Int64) error {
	from := rawConn(src)
	if from == nil {
		return transferPlain(dst, src, n)
	}
	r := &borrower{rc: from}
	r.fn = r.readOnce
	to := spliceTarget(dst)
	for {
		b, err := r.read()
		if len(b) > 0 {
			k, werr := dst.Write(b)
			n.Add(int64(k))
			if werr != nil {
				r.release()
				return errWrite{werr}
			}
		}
		full := len(b) == len(r.slab)
		r.release()
		if err == io.EOF {
			return halfClose(dst)
		}
		if err != nil {
			return errRead{err}
		}
		r.moved += len(b)
		if to != nil && full && r.moved >= spliceAfter {
			if err := splice(to, from, n); err != errNoSplice {
				if err == nil {
					return halfClose(dst)
				}
				return err
			}
			to = nil
		}
	}
}

// transferPlain is transfer for a source that cannot tell when it is readable, such as a tunnel stream.
func transferPlain(dst, src Conn, n *atomic.Int64) error {
	b := smallSlabs.Get()
	defer smallSlabs.Put(b)
	for {
		k, err := src.Read(b)
		if k > 0 {
			k, werr := dst.Write(b[:k])
			n.Add(int64(k))
			if werr != nil {
				return errWrite{werr}
			}
		}
		if err == io.EOF {
			return halfClose(dst)
		}
		if err != nil {
			return errRead{err}
		}
	}
}

// borrower reads a socket into a slab that it takes when there is something to read.
type borrower struct {
	rc    syscall.RawConn
	fn    func(fd uintptr) bool
	slab  []byte
	n     int
	err   error
	large bool
	moved int
}

func (r *borrower) read() ([]byte, error) {
	if err := r.rc.Read(r.fn); err != nil {
		return nil, err
	}
	return r.slab[:r.n], r.err
}

func (r *borrower) readOnce(fd uintptr) bool {
	if r.large {
		r.slab = largeSlabs.Get()
	} else {
		r.slab = smallSlabs.Get()
	}
	for {
		n, err := syscall.Read(int(fd), r.slab)
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			r.release()
			return false
		case err != nil:
			r.n, r.err = 0, err
		case n == 0:
			r.n, r.err = 0, io.EOF
		default:
			r.n, r.err = n, nil
		}
		return true
	}
}

// release returns the slab. The next will be large if this one was filled.
func (r *borrower) release() {
	if r.slab == nil {
		return
	}
	if r.large {
		largeSlabs.Put(r.slab)
	} else {
		smallSlabs.Put(r.slab)
	}
	r.large = r.n == len(r.slab) || r.large && r.n >= smallBytes
	r.slab = nil
}
