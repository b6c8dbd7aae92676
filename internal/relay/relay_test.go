package relay_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/mistnet/mistnet/internal/relay"
)

// tcpPair is the two ends of one loopback connection.
func tcpPair(t testing.TB) (near, far *net.TCPConn) {
	t.Helper()
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return c.(*net.TCPConn), s
}

// relayed is a client and a server with a pump between them.
type relayed struct {
	client, server *net.TCPConn
	counters       relay.Counters
	err            chan error
	cancel         context.CancelCauseFunc
}

func start(t testing.TB, wrap func(*net.TCPConn) relay.Conn) *relayed {
	t.Helper()
	client, a := tcpPair(t)
	b, server := tcpPair(t)
	r := &relayed{client: client, server: server, err: make(chan error, 1)}
	ctx, cancel := context.WithCancelCause(context.Background())
	r.cancel = cancel
	var pump sync.WaitGroup
	pump.Go(func() { r.err <- relay.Pump(ctx, a, wrap(b), &r.counters) })
	t.Cleanup(func() { cancel(nil); pump.Wait() })
	return r
}

func socket(c *net.TCPConn) relay.Conn { return c }

// wrapped hides that a connection is a socket, as a TLS connection does: it has no SyscallConn.
type wrapped struct{ relay.Conn }

func opaque(c *net.TCPConn) relay.Conn { return wrapped{c} }

var kinds = []struct {
	name string
	wrap func(*net.TCPConn) relay.Conn
}{{"two sockets", socket}, {"a socket and an opaque connection", opaque}}

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}

func TestPumpMovesBothWaysAndPassesOnHalfCloses(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			for _, size := range []int{0, 1, 1000, 300_000, 20 << 20} {
				r := start(t, k.wrap)
				up, down := random(size), random(size/2)
				var work sync.WaitGroup
				work.Go(func() {
					r.client.Write(up)
					r.client.CloseWrite()
				})
				got, err := io.ReadAll(r.server)
				if err != nil || !bytes.Equal(got, up) {
					t.Fatalf("server read %d bytes, %v; want the client's %d", len(got), err, len(up))
				}
				// The client half-closed; the other direction still works.
				work.Go(func() {
					r.server.Write(down)
					r.server.CloseWrite()
				})
				got, err = io.ReadAll(r.client)
				if err != nil || !bytes.Equal(got, down) {
					t.Fatalf("client read %d bytes, %v; want the server's %d", len(got), err, len(down))
				}
				work.Wait()
				if err := <-r.err; err != nil {
					t.Fatalf("Pump = %v", err)
				}
				if a, b := r.counters.AToB.Load(), r.counters.BToA.Load(); a != int64(len(up)) || b != int64(len(down)) {
					t.Errorf("counters = %d, %d; want %d, %d", a, b, len(up), len(down))
				}
			}
		})
	}
}

func TestPumpCountsWhileItRuns(t *testing.T) {
	r := start(t, socket)
	var sent int64
	for _, size := range []int{1, 1 << 20, 1, 1 << 20, 5} { // the second megabyte is spliced
		var work sync.WaitGroup
		work.Go(func() { r.client.Write(random(size)) })
		if _, err := io.ReadFull(r.server, make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		work.Wait()
		sent += int64(size)
		for r.counters.AToB.Load() < sent { // counted right after the system call that moved them
		}
		if n := r.counters.AToB.Load(); n != sent {
			t.Fatalf("counted %d bytes, want %d", n, sent)
		}
	}
}

func TestPumpPassesOnAReset(t *testing.T) {
	r := start(t, socket)
	if _, err := r.client.Write([]byte("half of a")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r.server, make([]byte, 9)); err != nil {
		t.Fatal(err)
	}
	r.client.SetLinger(0)
	r.client.Close()
	if _, err := r.server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("server read = %v, want a reset", err)
	}
	if err := <-r.err; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Pump = %v, want a reset", err)
	}
}

func TestPumpResetsBothEndsWhenItsContextEnds(t *testing.T) {
	r := start(t, socket)
	cause := errors.New("policy changed")
	r.cancel(cause)
	if err := <-r.err; !errors.Is(err, cause) {
		t.Errorf("Pump = %v, want %v", err, cause)
	}
	for name, c := range map[string]*net.TCPConn{"client": r.client, "server": r.server} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s read = %v, want a reset", name, err)
		}
	}
}

func TestPumpDeliversAnAnswerSentBeforeTheServerStoppedListening(t *testing.T) {
	r := start(t, socket)
	// The server answers early and closes with input unread, so its kernel resets.
	answer := random(100_000)
	if _, err := r.client.Write(random(1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r.server, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.server.Write(answer); err != nil {
		t.Fatal(err)
	}
	r.server.Close()
	got, err := io.ReadAll(r.client)
	if err != nil || !bytes.Equal(got, answer) {
		t.Fatalf("client read %d bytes, %v; want %d", len(got), err, len(answer))
	}
	// Now the client's further bytes have nowhere to go; it must learn so.
	for {
		if _, err := r.client.Write(random(1000)); err != nil {
			break
		}
	}
	if err := <-r.err; err == nil {
		t.Error("Pump = nil, want the failed write")
	}
}

func TestPumpAllocatesNothingInSteadyState(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := start(t, k.wrap)
			msg, buf := random(1000), make([]byte, 1000)
			trip := func() {
				r.client.Write(msg)
				io.ReadFull(r.server, buf)
				r.server.Write(msg)
				io.ReadFull(r.client, buf)
			}
			for range 100 {
				trip()
			}
			if n := testing.AllocsPerRun(500, trip); n >= 1 {
				t.Errorf("a round trip allocates %v times", n)
			}
		})
	}
}

// slowToReset is a connection nobody sends anything on, and which takes its time to be reset.
type slowToReset struct {
	net.Conn
	over    chan struct{} // closed when reads end
	release chan struct{} // closed when a reset may return; nil: at once
}

func (c *slowToReset) Read([]byte) (int, error) { <-c.over; return 0, net.ErrClosed }
func (c *slowToReset) CloseWrite() error        { return nil }
func (c *slowToReset) Close() error             { return nil }
func (c *slowToReset) Reset() error {
	select {
	case <-c.over:
	default:
		close(c.over)
	}
	if c.release != nil {
		<-c.release
	}
	return nil
}

// TestPumpReturnsWhenBothAreReset, not when the first is: what its caller does then would look like an orderly end.
func TestPumpReturnsWhenBothAreReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		over, release := make(chan struct{}), make(chan struct{}) // one for both: the first reset ends both directions
		ctx, cancel := context.WithCancelCause(t.Context())
		cause := errors.New("enough")
		returned := make(chan error, 1)
		go func() {
			returned <- relay.Pump(ctx, &slowToReset{over: over, release: release}, &slowToReset{over: over}, &relay.Counters{})
		}()
		cancel(cause)
		synctest.Wait()
		select {
		case err := <-returned:
			t.Errorf("Pump() = %v while a connection is being reset", err)
			returned <- err
		default:
		}
		close(release)
		if err := <-returned; err != cause {
			t.Errorf("Pump() = %v, want %v", err, cause)
		}
	})
}
