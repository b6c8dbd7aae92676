package linux_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/linux"
)

const (
	handovers = 200                  // how often a listener is replaced while clients connect
	settle    = 2 * time.Millisecond // between taking over and closing; see TakeOver
)

// TestTakeOverLosesNoConnection replaces a listener again and again. The old one closes with connections that nobody
// accepted: that is what a kernel without the program resets.
func TestTakeOverLosesNoConnection(t *testing.T) {
	for _, ip := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
		t.Run(ip.String(), func(t *testing.T) {
			served, lost, left := handOver(t, ip, linux.TakeOver)
			if lost > 0 {
				t.Errorf("%d of %d connections were lost in %d handovers", lost, served+lost, handovers)
			}
			if left == 0 {
				t.Error("no listener closed with connections it had not accepted: nothing was shown")
			}
			t.Logf("%d connections served, %d of them moved from a listener that closed", served, left)
		})
	}
}

// TestWithoutTakeOverConnectionsAreLost shows that the other test can fail.
func TestWithoutTakeOverConnectionsAreLost(t *testing.T) {
	served, lost, _ := handOver(t, netip.MustParseAddr("127.0.0.1"), func(*net.TCPListener) error { return nil })
	t.Logf("%d of %d connections lost", lost, served+lost)
	if lost == 0 {
		t.Error("no connection was lost: the kernel moves connections by itself, or the test proves nothing")
	}
}

// TestTakeOverFallsBack: when the newest listener goes first, the older one has everything again, also what waited.
func TestTakeOverFallsBack(t *testing.T) {
	ns := newNS(t)
	old, addr := listen(t, ns, linux.ListenOptions{Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), 0), ReusePort: true})
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), addr.Port())
	newest, _ := listen(t, ns, linux.ListenOptions{Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), addr.Port()), ReusePort: true})
	for _, l := range []*net.TCPListener{old, newest} {
		if err := linux.TakeOver(l); err != nil {
			t.Fatal(err)
		}
	}
	var waiting []*net.TCPConn
	for range 8 { // all to the newest
		c, err := ns.Dial(t.Context(), linux.DialOptions{Remote: to, Timeout: 5 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		waiting = append(waiting, c)
	}
	if err := old.SetDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := old.Accept(); err == nil {
		t.Error("the older listener got a connection")
	}
	newest.Close()
	for range waiting {
		if err := old.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		c, err := old.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		i := slices.IndexFunc(waiting, func(w *net.TCPConn) bool { return w.LocalAddr().String() == c.RemoteAddr().String() })
		if i < 0 {
			t.Fatalf("accepted %s, whom nobody knows", c.RemoteAddr())
		}
		echoes(t, waiting[i], c)
	}
	dialed(t, ns, old, linux.DialOptions{Remote: to})
}

// handOver serves clients by a chain of listeners on one port. Each is replaced while connections wait at it that it will
// not accept: its successor listens, takeOver is called, and it closes. handOver counts exchanges that succeeded and that
// failed, and the least number of connections that waited at a listener that closed.
func handOver(t *testing.T, ip netip.Addr, takeOver func(*net.TCPListener) error) (served, lost, left int64) {
	ns := newNS(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	everywhere := netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
	current, addr := listen(t, ns, linux.ListenOptions{Addr: everywhere, ReusePort: true})
	if err := takeOver(current); err != nil {
		t.Fatal(err)
	}
	const clients, waiting = 16, 8
	var ok, failed, connected atomic.Int64
	var ends sync.WaitGroup
	defer ends.Wait()
	over := make(chan struct{})
	for range clients {
		ends.Go(func() {
			for ctx.Err() == nil {
				if err := exchange(ctx, ns, netip.AddrPortFrom(ip, addr.Port()), &connected); err != nil {
					failed.Add(1)
				} else {
					ok.Add(1)
				}
				select {
				case <-over:
					return
				default:
				}
			}
		})
	}
	soon := time.NewTicker(100 * time.Microsecond) // to look whether clients have connected
	defer soon.Stop()
	accept := func(within time.Duration) bool {
		if err := current.SetDeadline(time.Now().Add(within)); err != nil {
			t.Fatal(err)
		}
		c, err := current.AcceptTCP()
		if err != nil {
			return false
		}
		ends.Go(func() { defer c.Close(); _, _ = io.Copy(c, c) })
		return true
	}
	for range handovers {
		for range clients {
			accept(time.Second)
		}
		for connected.Load() < waiting && ctx.Err() == nil {
			<-soon.C
		}
		left += waiting
		next, _ := listen(t, ns, linux.ListenOptions{Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), addr.Port()), ReusePort: true})
		if err := takeOver(next); err != nil {
			t.Fatal(err)
		}
		<-time.After(settle)
		current.Close()
		current = next
	}
	close(over)
	for accept(time.Second) {
	}
	if ctx.Err() != nil {
		t.Fatal("it took too long")
	}
	return ok.Load(), failed.Load(), left
}

// exchange makes one connection and has its bytes echoed. connected counts those that wait for that.
func exchange(ctx context.Context, ns *linux.NetNS, to netip.AddrPort, connected *atomic.Int64) error {
	c, err := ns.Dial(ctx, linux.DialOptions{Remote: to, Timeout: 10 * time.Second})
	if err != nil {
		return err
	}
	defer c.Close()
	connected.Add(1)
	defer connected.Add(-1)
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	want := []byte("still here")
	if _, err := c.Write(want); err != nil {
		return err
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !slices.Equal(got, want) {
		return errors.New("other bytes came back")
	}
	return nil
}
