package http1

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
)

// idler waits for a TCP connection without a slab to read into: thousands of connections wait for a request at any time.
type idler struct {
	raw  syscall.RawConn       // nil: not known yet
	read func(fd uintptr) bool // bound once, so that a wait allocates nothing
	n    int
	err  error
}

// fillIdle is fill for an empty reader whose connection may be silent for long: nothing is borrowed before there is something to
// read. Of a tunnel's stream that cannot be known.
func (r *reader) fillIdle() error {
	if r.idle == nil || r.idle.raw == nil {
		tcp, ok := r.conn.(*net.TCPConn)
		if !ok {
			return r.fill()
		}
		raw, err := tcp.SyscallConn()
		if err != nil {
			return err
		}
		if r.idle == nil {
			r.idle = &idler{read: r.readReady}
		}
		r.idle.raw = raw
	}
	i := r.idle
	i.n, i.err = 0, nil
	if err := i.raw.Read(i.read); err != nil {
		return err
	}
	switch {
	case i.err != nil:
		return &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", i.err)}
	case i.n == 0:
		return io.EOF
	}
	r.w, r.came = i.n, r.came+i.n
	return nil
}

// readReady reads what there is. False: nothing yet.
func (r *reader) readReady(fd uintptr) bool {
	i := r.idle
	r.buf = forReading(smallBytes)
	for {
		i.n, i.err = syscall.Read(int(fd), r.buf)
		if !errors.Is(i.err, syscall.EINTR) {
			break
		}
	}
	if i.n > 0 {
		return true
	}
	i.n = 0
	giveBack(r.buf)
	r.buf = nil
	return !errors.Is(i.err, syscall.EAGAIN)
}
