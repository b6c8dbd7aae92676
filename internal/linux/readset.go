package linux

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ReadSet tells which of many sockets can be read, to one goroutine that waits for all of them: an epoll(7) set. It is itself
// waited for in the Go network poller, so it keeps no thread.
type ReadSet struct {
	file   *os.File
	raw    syscall.RawConn
	look   func(fd uintptr) bool // bound once, so that a wait allocates nothing
	events [128]unix.EpollEvent
	n      int
	err    error
}

// NewReadSet makes an empty set. Errors hold their errno: EMFILE, ENFILE, ENOMEM.
func NewReadSet() (*ReadSet, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // else os.NewFile does not hand it to the poller
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	s := &ReadSet{file: os.NewFile(uintptr(fd), "epoll")}
	s.look = s.ready
	if err := s.file.SetReadDeadline(time.Time{}); err != nil {
		return nil, errors.Join(fmt.Errorf("have an epoll set polled: %w", err), s.file.Close())
	}
	if s.raw, err = s.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, s.file.Close())
	}
	return s, nil
}

// Watch asks to be told once, by its key, when a socket can be read or its peer sends no more; at once, if that is so already. A
// socket may be watched again and again, and leaves the set when it is closed. It must have no second descriptor.
func (s *ReadSet) Watch(c syscall.RawConn, key uint64) error {
	var failed error
	err := c.Control(func(socket uintptr) {
		failed = s.watch(int(socket), key)
	})
	return errors.Join(err, failed)
}

func (s *ReadSet) watch(socket int, key uint64) error {
	e := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLONESHOT, Fd: int32(uint32(key)), Pad: int32(uint32(key >> 32))}
	var failed error
	err := s.raw.Control(func(fd uintptr) {
		if failed = unix.EpollCtl(int(fd), unix.EPOLL_CTL_MOD, socket, &e); failed == unix.ENOENT { // its first time
			failed = unix.EpollCtl(int(fd), unix.EPOLL_CTL_ADD, socket, &e)
		}
	})
	return errors.Join(err, os.NewSyscallError("epoll_ctl", failed))
}

// Wait waits for sockets to be told of, and appends their keys to dst. The error is os.ErrClosed after Close, or the kernel's. One
// goroutine at a time may wait.
func (s *ReadSet) Wait(dst []uint64) ([]uint64, error) {
	s.n, s.err = 0, nil
	if err := s.raw.Read(s.look); err != nil { // that it was closed is all that can come between
		return dst, fmt.Errorf("wait for sockets: %w", os.ErrClosed)
	}
	if s.err != nil {
		return dst, os.NewSyscallError("epoll_wait", s.err)
	}
	for _, e := range s.events[:s.n] {
		dst = append(dst, uint64(uint32(e.Fd))|uint64(uint32(e.Pad))<<32)
	}
	return dst, nil
}

// ready takes what there is. False: nothing yet.
func (s *ReadSet) ready(fd uintptr) bool {
	for {
		s.n, s.err = unix.EpollWait(int(fd), s.events[:], 0)
		if s.err != unix.EINTR {
			return s.n != 0 || s.err != nil
		}
	}
}

// Close ends the set, and a Wait with it. The sockets go on.
func (s *ReadSet) Close() error { return s.file.Close() }
