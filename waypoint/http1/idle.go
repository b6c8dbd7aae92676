package http1

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"github.com/mistnet/mistnet/internal/linux"
)

// receiver reads from a TCP connection. It can wait without a slab to read into: thousands of connections wait for a request at any time.
type receiver struct {
	raw  syscall.RawConn       // nil: not known yet
	read func(fd uintptr) bool // bound once, so that a wait allocates nothing
	into []byte                // nil: a slab is borrowed once there is something to read
	n    int
	err  error
}

// receiver returns that of the connection; nil: it is not TCP.
func (r *reader) receiver() *receiver {
	if r.tcp != nil && r.tcp.raw != nil {
		return r.tcp
	}
	tcp, ok := r.conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil // it is closed, which reading tells
	}
	if r.tcp == nil {
		r.tcp = &receiver{read: r.readReady}
	}
	r.tcp.raw = raw
	return r.tcp
}

// fillIdle is fill for an empty reader whose connection may be silent for long: nothing is borrowed before there is something to
// read. Of a tunnel's stream that cannot be known.
func (r *reader) fillIdle() error {
	i := r.receiver()
	if i == nil {
		return r.fill()
	}
	n, err := r.receive(i, nil)
	if err != nil {
		return err
	}
	r.w, r.came = n, r.came+n
	return nil
}

// read waits for bytes of the connection.
func (r *reader) read(p []byte) (int, error) {
	if i := r.receiver(); i != nil && len(p) > 0 {
		return r.receive(i, p)
	}
	return r.conn.Read(p)
}

// receive reads into p, or if that is nil, into a slab of the reader.
func (r *reader) receive(i *receiver, p []byte) (int, error) {
	i.into, i.n, i.err = p, 0, nil
	err := i.raw.Read(i.read)
	i.into = nil
	switch {
	case err != nil:
		return 0, err
	case i.err != nil:
		return 0, failedCall("read", "recvfrom", r.conn, i.err)
	case i.n == 0:
		return 0, io.EOF
	}
	return i.n, nil
}

// readReady reads what there is. False: nothing yet.
func (r *reader) readReady(fd uintptr) bool {
	i := r.tcp
	if i.into != nil {
		i.n, i.err = linux.ReadNow(fd, i.into)
		return !errors.Is(i.err, syscall.EAGAIN)
	}
	r.buf = forReading(smallBytes)
	if i.n, i.err = linux.ReadNow(fd, r.buf); i.n > 0 {
		return true
	}
	giveBack(r.buf)
	r.buf = nil
	return !errors.Is(i.err, syscall.EAGAIN)
}

// failedCall is the error of a system call as package net makes it.
func failedCall(op, call string, conn net.Conn, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: conn.LocalAddr(), Addr: conn.RemoteAddr(), Err: os.NewSyscallError(call, err)}
}

// sender writes to a TCP connection.
type sender struct {
	raw   syscall.RawConn
	write func(fd uintptr) bool // bound once
	rest  []byte
	err   error
}

// send writes to the connection until everything is written, or an error. It returns how much was.
func (w *writer) send(p []byte) (int, error) {
	if w.tcp == nil {
		tcp, ok := w.conn.(*net.TCPConn)
		if !ok {
			return w.conn.Write(p)
		}
		raw, err := tcp.SyscallConn()
		if err != nil {
			return 0, err
		}
		w.tcp = &sender{raw: raw}
		w.tcp.write = w.tcp.writeReady
	}
	s := w.tcp
	s.rest, s.err = p, nil
	err := s.raw.Write(s.write)
	n := len(p) - len(s.rest)
	s.rest = nil
	if err == nil && s.err != nil {
		err = failedCall("write", "sendto", w.conn, s.err)
	}
	return n, err
}

// writeReady writes what the socket takes. False: it takes no more now.
func (s *sender) writeReady(fd uintptr) bool {
	for len(s.rest) > 0 {
		var n int
		if n, s.err = linux.WriteNow(fd, s.rest); s.err != nil {
			if errors.Is(s.err, syscall.EAGAIN) {
				s.err = nil
				return false
			}
			return true
		}
		s.rest = s.rest[n:]
	}
	return true
}
