package relay

import (
	"sync/atomic"
	"syscall"
)

// socketSink writes what a tunnel receives to an application's socket.
type socketSink struct {
	p    *pump
	d    *direction
	conn Conn
	rc   syscall.RawConn
	n    *atomic.Int64

	// Of TryWrite, which is called by one goroutine at a time.
	fn   func(fd uintptr) bool
	rest []byte
	err  error
}

// push makes src write to dst by itself.
func (p *pump) push(src Receiver, dst Conn, n *atomic.Int64) {
	k := &socketSink{p: p, conn: dst, rc: rawConn(dst), n: n, d: &p.bToA}
	if dst == p.b {
		k.d = &p.aToB
	}
	k.fn = k.writeSome
	p.done.Add(1) // until Done
	src.Receive(k)
}

// TryWrite writes as much as the socket takes at once.
func (k *socketSink) TryWrite(b []byte) (int, error) {
	k.rest, k.err = b, nil
	err := k.rc.Write(k.fn)
	if err == nil {
		err = k.err
	}
	n := len(b) - len(k.rest)
	k.rest = nil
	k.n.Add(int64(n))
	if err != nil {
		return n, errWrite{err}
	}
	return n, nil
}

func (k *socketSink) writeSome(fd uintptr) bool {
	for len(k.rest) > 0 {
		n, err := syscall.Write(int(fd), k.rest)
		switch {
		case err == syscall.EINTR:
		case err == syscall.EAGAIN:
			return true
		case err != nil:
			k.err = err
			return true
		default:
			k.rest = k.rest[n:]
		}
	}
	return true
}

// Write writes all of b and may wait for the socket.
func (k *socketSink) Write(b []byte) (int, error) {
	n, err := k.conn.Write(b)
	k.n.Add(int64(n))
	if err != nil {
		return n, errWrite{err}
	}
	return n, nil
}

// Done passes on the end of what the tunnel received.
func (k *socketSink) Done(err error) {
	if err == nil {
		err = halfClose(k.conn)
	}
	k.p.end(k.d, err)
	k.p.done.Done()
}
