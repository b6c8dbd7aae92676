package linux_test

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mistnet/mistnet/internal/linux"
)

// TestNow: neither call waits, even for a socket that others would wait for, and what ends a socket is told.
func TestNow(t *testing.T) {
	t.Parallel()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0) // they block
	if err != nil {
		t.Fatal(err)
	}
	a, b := uintptr(fds[0]), uintptr(fds[1])
	buf := make([]byte, 64<<10)
	if n, err := linux.ReadNow(a, buf); n != 0 || !errors.Is(err, unix.EAGAIN) {
		t.Errorf("ReadNow() of nothing = %d, %v, want EAGAIN", n, err)
	}
	sent := 0
	for {
		n, err := linux.WriteNow(b, buf)
		if sent += n; err != nil {
			if !errors.Is(err, unix.EAGAIN) {
				t.Fatalf("WriteNow() after %d bytes = %v, want EAGAIN", sent, err)
			}
			break
		}
	}
	if sent == 0 {
		t.Error("WriteNow() has written nothing")
	}
	if err := unix.Shutdown(int(b), unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	for got := 0; ; {
		n, err := linux.ReadNow(a, buf)
		if err != nil {
			t.Fatalf("ReadNow() after %d bytes = %v", got, err)
		}
		if got += n; n == 0 {
			if got != sent {
				t.Errorf("%d bytes read of %d", got, sent)
			}
			break
		}
	}
	if err := unix.Close(int(b)); err != nil {
		t.Fatal(err)
	}
	if n, err := linux.WriteNow(a, buf); n != 0 || !errors.Is(err, unix.EPIPE) {
		t.Errorf("WriteNow() to one that is closed = %d, %v, want EPIPE", n, err)
	}
	if err := unix.Close(int(a)); err != nil {
		t.Fatal(err)
	}
	if _, err := linux.ReadNow(^uintptr(0), buf); !errors.Is(err, unix.EBADF) {
		t.Errorf("ReadNow() of no socket = %v, want EBADF", err)
	}
}
