package linux

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ReadNow reads what a socket has, at most len(b) bytes, and EAGAIN when it has nothing; 0 is its end. It waits for nothing, and so does not
// tell the scheduler that it might: a call that does is taken for one that hangs when it lasts for 20 µs, as sending over a virtual
// link does, and its processor is given to another thread. b must not be empty.
func ReadNow(socket uintptr, b []byte) (int, error) {
	return now(unix.SYS_RECVFROM, socket, b, unix.MSG_DONTWAIT)
}

// WriteNow is the same for writing: it returns how much the socket took, or EAGAIN.
func WriteNow(socket uintptr, b []byte) (int, error) {
	return now(unix.SYS_SENDTO, socket, b, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
}

func now(call, socket uintptr, b []byte, flags uintptr) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall6(call, socket, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), flags, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}
