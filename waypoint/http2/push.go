package http2

import (
	"net"
	"runtime"
	"syscall"
)

// push writes what is staged as far as the socket takes it at once. The rest waits on a goroutine of its own.
func (c *conn) push() {
	c.mu.Lock()
	if c.w.socket == nil {
		c.kickLocked()
		c.mu.Unlock()
		return
	}
	if c.w.busy || len(c.w.staged) == 0 && c.w.failAfter == nil || c.err != nil {
		c.mu.Unlock()
		return
	}
	c.w.busy = true
	for range maxRounds {
		if len(c.w.staged) == 0 || c.err != nil || c.w.failAfter != nil {
			break
		}
		b := c.w.staged
		c.w.staged = nil
		c.w.wakeLocked()
		c.mu.Unlock()
		c.arm()
		n, err := c.w.socket.write(b)
		if err != nil {
			c.giveBack(b)
			c.fail(err)
			c.mu.Lock()
			break
		}
		c.mu.Lock()
		if n < len(b) {
			c.waitLocked(b, n)
			return
		}
		c.giveBack(b)
	}
	if c.err == nil && (len(c.w.staged) > 0 || c.w.failAfter != nil) {
		c.waitLocked(nil, 0)
		return
	}
	c.w.busy = false
	c.mu.Unlock()
}

// gather lets others who are ready to run append to what is staged, as flush does. The caller pushes afterwards.
func (c *conn) gather() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.w.socket == nil || c.w.busy || len(c.streams) < 2 || c.err != nil {
		return
	}
	c.w.busy = true
	c.mu.Unlock()
	runtime.Gosched()
	c.mu.Lock()
	c.w.busy = false
}

// waitLocked writes b[n:] and what is staged on a goroutine of its own. It releases c.mu.
func (c *conn) waitLocked(b []byte, n int) {
	defer c.mu.Unlock()
	if c.err != nil {
		c.w.busy = false
		c.giveBack(b)
		return
	}
	c.work.Go(func() {
		var err error
		if n < len(b) {
			err = c.write(b[n:])
		}
		c.giveBack(b)
		if err != nil {
			c.fail(err)
		}
		c.mu.Lock()
		c.drive(-1)
	})
}

// socket writes to a TCP connection without waiting. Only who drives uses it.
type socket struct {
	raw syscall.RawConn
	p   []byte
	n   int
	err error
	try func(fd uintptr) bool
}

// writesTo is the connection that another one's writes go to as they are.
func writesTo(conn net.Conn) net.Conn {
	for {
		c, ok := conn.(interface{ WritesTo() net.Conn })
		if !ok {
			return conn
		}
		conn = c.WritesTo()
	}
}

// socketOf finds the socket that a connection's writes go to as they are.
func socketOf(conn net.Conn) *socket {
	tcp, ok := writesTo(conn).(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil
	}
	s := &socket{raw: raw}
	s.try = s.once
	return s
}

func (s *socket) write(p []byte) (int, error) {
	s.p, s.n, s.err = p, 0, nil
	err := s.raw.Write(s.try)
	s.p = nil
	if s.err != nil {
		err = s.err
	}
	return s.n, err
}

// once always says that it is done: it must not wait.
func (s *socket) once(fd uintptr) bool {
	for {
		n, err := syscall.Write(int(fd), s.p)
		switch err {
		case nil:
			s.n = n
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
		default:
			s.err = err
		}
		return true
	}
}
