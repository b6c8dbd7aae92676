package linux

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// NetNS is a handle on a network namespace. It keeps the namespace alive even when its last process and its name are
// gone. A nil *NetNS means the namespace of the process itself. Methods may be called from several goroutines.
type NetNS struct {
	file *os.File
}

// OpenNetNS opens the namespace named by path: a bind mount below /run/netns, or /proc/PID/ns/net. The error says so when
// path is not a network namespace.
func OpenNetNS(path string) (*NetNS, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	return NetNSFromFile(f)
}

// NetNSFromFile makes a handle of an open descriptor, for example one received over a unix socket. It takes ownership of f
// and closes it also when it fails. A file that is not a network namespace is refused.
func NetNSFromFile(f *os.File) (*NetNS, error) {
	if f == nil {
		return nil, errors.New("open network namespace: no file")
	}
	n := &NetNS{file: f}
	err := n.control(func(fd int) error {
		var fs unix.Statfs_t
		if err := unix.Fstatfs(fd, &fs); err != nil {
			return os.NewSyscallError("fstatfs", err)
		}
		if int64(fs.Type) != unix.NSFS_MAGIC {
			return errors.New("not a namespace (did its owner exit and leave the bind mount's file behind?)")
		}
		kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
		if err != nil {
			return os.NewSyscallError("ioctl NS_GET_NSTYPE", err)
		}
		if kind != unix.CLONE_NEWNET {
			return fmt.Errorf("a namespace of another kind (%#x), not of the network", kind)
		}
		return nil
	})
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: %w", f.Name(), err)
	}
	return n, nil
}

// ID returns the namespace's inode number, which no two namespaces that exist at the same time share. It is what
// /proc/PID/ns/net prints in brackets.
func (n *NetNS) ID() (uint64, error) {
	if n == nil {
		home, err := homeNS()
		if err != nil {
			return 0, err
		}
		return inode(home)
	}
	var id uint64
	err := n.control(func(fd int) (err error) {
		id, err = inode(fd)
		return err
	})
	return id, err
}

func inode(fd int) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, os.NewSyscallError("fstat", err)
	}
	return st.Ino, nil
}

// Close gives the handle up. Sockets opened in the namespace stay usable. Closing a nil *NetNS does nothing.
func (n *NetNS) Close() error {
	if n == nil {
		return nil
	}
	return n.file.Close()
}

// errAborted is what Do returns when fn ended its goroutine instead of returning.
var errAborted = errors.New("function in network namespace ended its goroutine")

// Do runs fn inside the namespace, on a goroutine and thread of its own, and returns fn's error. What fn opens belongs to
// the namespace, and so do the processes it starts; goroutines it starts do not. Do may be nested. With a nil *NetNS fn
// runs on the caller's goroutine, wherever that is.
//
// Entering needs CAP_SYS_ADMIN; without it the error is EPERM.
func (n *NetNS) Do(fn func() error) error {
	if n == nil {
		return fn()
	}
	home, err := homeNS()
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		err := errAborted
		defer func() { done <- err }()
		err = n.enter(home, fn)
	}()
	return <-done
}

// enter is the body of Do's goroutine. A thread that cannot be brought home stays locked to this goroutine, which is about
// to end: the runtime then throws the thread away instead of running other goroutines in the wrong namespace.
func (n *NetNS) enter(home int, fn func() error) error {
	runtime.LockOSThread()
	err := n.control(func(fd int) error { return os.NewSyscallError("setns", unix.Setns(fd, unix.CLONE_NEWNET)) })
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace %s: %w", n.file.Name(), err)
	}
	restored := false
	restore := func() error {
		if err := unix.Setns(home, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("leave network namespace %s: %w", n.file.Name(), os.NewSyscallError("setns", err))
		}
		restored = true
		runtime.UnlockOSThread()
		return nil
	}
	defer func() {
		if !restored { // fn ended the goroutine, as testing.T.Fatal does, or restoring failed and is tried once more
			_ = restore()
		}
	}()
	err = fn()
	if rerr := restore(); rerr != nil {
		return errors.Join(err, rerr)
	}
	return err
}

// control calls fn with the descriptor, which stays open as long as fn runs.
func (n *NetNS) control(fn func(fd int) error) error {
	raw, err := n.file.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := raw.Control(func(fd uintptr) { ferr = fn(int(fd)) }); err != nil {
		return os.ErrClosed // the only reason; the os package's own error does not say so to errors.Is
	}
	return ferr
}

// homeNS is the descriptor of the namespace the process lives in. It is opened from a goroutine that just started, whose
// thread therefore is not inside any Do: a thread that is, is locked to another goroutine.
var homeNS = sync.OnceValues(func() (int, error) {
	type result struct {
		fd  int
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		done <- result{fd, err}
	}()
	r := <-done
	if r.err != nil {
		return -1, fmt.Errorf("open own network namespace: %w", r.err)
	}
	return r.fd, nil
})

// socket opens a non-blocking TCP socket of family inside the namespace.
func (n *NetNS) socket(family int) (int, error) {
	fd := -1
	err := n.Do(func() (err error) {
		fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		if fd >= 0 { // opened, but the thread could not come home
			unix.Close(fd)
		}
		return -1, err
	}
	return fd, nil
}
