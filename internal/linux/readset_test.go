package linux_test

import (
	"errors"
	"net"
	"os"
	"slices"
	"testing"

	"github.com/mistnet/mistnet/internal/linux"
)

// TestReadSet: a socket is told of once for each time it is watched, with all the bits of its key; closed ones are not, and Close ends
// the wait.
func TestReadSet(t *testing.T) {
	t.Parallel()
	s, err := linux.NewReadSet()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var clients, servers []*net.TCPConn
	for range 3 {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conn, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		clients, servers = append(clients, c.(*net.TCPConn)), append(servers, conn.(*net.TCPConn))
	}
	watch := func(i int, key uint64) error {
		raw, err := servers[i].SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		return s.Watch(raw, key)
	}
	told := func(want ...uint64) {
		t.Helper()
		var got []uint64
		for len(got) < len(want) {
			if got, err = s.Wait(got); err != nil {
				t.Fatal(err)
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("Wait() = %x, want %x", got, want)
		}
	}
	const first, second, third = 1<<63 | 1, 1<<33 | 2, 3
	for i, key := range []uint64{first, second, third} {
		if err := watch(i, key); err != nil {
			t.Fatal(err)
		}
	}
	for _, i := range []int{0, 0, 1} { // the second byte of 0 is no second news
		if _, err := clients[i].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	told(second, first)
	if err := watch(0, first+1); err != nil { // not read yet
		t.Fatal(err)
	}
	told(first + 1)
	if err := clients[2].CloseWrite(); err != nil {
		t.Fatal(err)
	}
	told(third)
	if err := servers[1].Close(); err != nil {
		t.Fatal(err)
	}
	if err := watch(1, 9); err == nil {
		t.Error("Watch of a closed socket succeeded")
	}
	ended := make(chan error)
	go func() {
		_, err := s.Wait(nil)
		ended <- err
	}()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait() after Close = %v, want os.ErrClosed", err)
	}
}
