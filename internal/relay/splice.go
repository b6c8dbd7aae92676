package relay

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
)

const (
	spliceAfter = 256 << 10 // bytes copied before a flow is taken for bulk
	spliceChunk = 1 << 20   // at most moved by one system call
	keptPipes   = 32

	fcntlSetPipeSize = 1031 // F_SETPIPE_SZ, linux/fcntl.h; not in package syscall
	spliceMove       = 1    // SPLICE_F_MOVE
	spliceNonblock   = 2    // SPLICE_F_NONBLOCK
)

// errNoSplice says that nothing was moved because splice cannot be used here.
var errNoSplice = errors.New("relay: splice is not possible")

// pipe carries bytes between two sockets inside the kernel.
type pipe struct{ r, w int }

var pipes struct {
	mu   sync.Mutex
	free []pipe
}

func takePipe() (pipe, error) {
	pipes.mu.Lock()
	if n := len(pipes.free); n > 0 {
		p := pipes.free[n-1]
		pipes.free = pipes.free[:n-1]
		pipes.mu.Unlock()
		return p, nil
	}
	pipes.mu.Unlock()
	var fds [2]int
	if err := syscall.Pipe2(fds[:], syscall.O_CLOEXEC|syscall.O_NONBLOCK); err != nil {
		return pipe{}, err
	}
	// Where the limit for unprivileged users forbids it the pipe stays at 64 KB.
	syscall.Syscall(syscall.SYS_FCNTL, uintptr(fds[1]), fcntlSetPipeSize, spliceChunk)
	return pipe{fds[0], fds[1]}, nil
}

// putPipe keeps an empty pipe for the next user.
func putPipe(p pipe) {
	pipes.mu.Lock()
	if len(pipes.free) < keptPipes {
		pipes.free = append(pipes.free, p)
		pipes.mu.Unlock()
		return
	}
	pipes.mu.Unlock()
	p.close()
}

func (p pipe) close() {
	syscall.Close(p.r)
	syscall.Close(p.w)
}

// spliceTarget returns the socket of dst, if splice can write to it.
func spliceTarget(dst Conn) syscall.RawConn {
	if _, ok := dst.(*net.TCPConn); !ok {
		return nil
	}
	return rawConn(dst)
}

// splicer is the state of one direction that is spliced. A pipe is held only while bytes are in it.
type splicer struct {
	p      pipe
	held   bool
	inPipe int
	eof    bool
	err    error
}

// splice moves from to to until from ends. It counts bytes as they leave, one system call at a time.
func splice(to, from syscall.RawConn, n *atomic.Int64) error {
	s := &splicer{}
	defer func() {
		if s.held {
			s.p.close() // bytes are left in it
		}
	}()
	fill, drain := s.fill, func(fd uintptr) bool { return s.drain(fd, n) }
	moved := false
	for {
		if err := from.Read(fill); err != nil {
			return errRead{err}
		}
		if s.err != nil {
			if errors.Is(s.err, errNoSplice) || !moved && errors.Is(s.err, syscall.EINVAL) {
				return errNoSplice
			}
			return errRead{s.err}
		}
		if s.eof {
			return nil
		}
		moved = true
		if err := to.Write(drain); err != nil {
			return errWrite{err}
		}
		if s.err != nil {
			return errWrite{s.err}
		}
	}
}

// fill moves what the source has into a pipe, which it takes only for that.
func (s *splicer) fill(fd uintptr) bool {
	var err error
	if s.p, err = takePipe(); err != nil {
		s.err = errNoSplice // too many open files: copying needs none
		return true
	}
	for {
		n, err := syscall.Splice(int(fd), nil, s.p.w, nil, spliceChunk, spliceMove|spliceNonblock)
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			putPipe(s.p)
			return false
		case err != nil:
			s.err = err
			putPipe(s.p)
		case n == 0:
			s.eof = true
			putPipe(s.p)
		default:
			s.inPipe, s.held = int(n), true
		}
		return true
	}
}

// drain moves the pipe's contents to the destination.
func (s *splicer) drain(fd uintptr, count *atomic.Int64) bool {
	for s.inPipe > 0 {
		n, err := syscall.Splice(s.p.r, nil, int(fd), nil, s.inPipe, spliceMove|spliceNonblock)
		switch {
		case err == syscall.EINTR:
		case err == syscall.EAGAIN:
			return false
		case err != nil:
			s.err = err
			return true
		default:
			s.inPipe -= int(n)
			count.Add(n)
		}
	}
	putPipe(s.p)
	s.held = false
	return true
}
