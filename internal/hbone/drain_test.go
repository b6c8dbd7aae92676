package hbone_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistnet/mistnet/internal/hbone"
)

func sscan(frame string, stream, n *int) (int, error) {
	return fmt.Sscanf(frame, "DATA %d %d bytes", stream, n)
}

func TestShutdownLetsStreamsEnd(t *testing.T) {
	srv := &hbone.Server{Handle: echo}
	toServer(t, srv, func(t *testing.T, w *wire) {
		w.accepted(1)
		done := make(chan error, 1)
		go func() { done <- srv.Shutdown(context.Background()) }()
		w.expect(fmt.Sprintf("GOAWAY %d NO_ERROR", 1<<31-1), "PING")
		w.accepted(3) // was on its way when the client learnt of it
		w.WritePing(true, [8]byte{'d', 'r', 'a', 'i', 'n'})
		w.expect("GOAWAY 3 NO_ERROR")
		w.connect(5)
		w.expect() // ignored, the client was told
		w.WriteData(1, true, []byte("late"))
		w.expect("DATA 1 4 bytes", "DATA 1 0 bytes end")
		select {
		case err := <-done:
			t.Fatalf("Shutdown = %v with a stream open", err)
		default:
		}
		w.WriteData(3, true, nil)
		w.expect("DATA 3 0 bytes end", "GOAWAY 5 NO_ERROR", "gone")
		if err := <-done; err != nil {
			t.Errorf("Shutdown = %v", err)
		}
	})
}

func TestShutdownCutsStreamsWhenItsContextEnds(t *testing.T) {
	srv := &hbone.Server{Handle: accept}
	toServer(t, srv, func(t *testing.T, w *wire) {
		w.accepted(1)
		ctx, cancel := context.WithTimeout(context.Background(), 25*time.Second)
		defer cancel()
		if err := srv.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown = %v", err)
		}
		if got := w.take(); got[len(got)-1] != "gone" {
			t.Errorf("peer sent %q, want it gone", got)
		}
	})
}

func TestServerGivesUpOnASilentClient(t *testing.T) {
	var ended chan error // made in the bubble, so that waiting on it lets time pass
	handle := func(ctx context.Context, r *hbone.Request) {
		r.Accept("")
		<-ctx.Done()
		ended <- context.Cause(ctx)
	}
	toServer(t, &hbone.Server{Handle: handle}, func(t *testing.T, w *wire) {
		ended = make(chan error, 1)
		w.accepted(1)
		if err := <-ended; !errors.Is(err, hbone.ErrPingTimeout) {
			t.Errorf("the stream's context ended with %v", err)
		}
	})
}

func TestHandshakeTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer near.Close()
		srv := &hbone.Server{TLS: serverTLS(), Handle: accept}
		start := time.Now()
		err := srv.ServeConn(context.Background(), far)
		var stage *hbone.StageError
		if !errors.As(err, &stage) || stage.Stage != hbone.StageTLS || time.Since(start) != 10*time.Second {
			t.Errorf("ServeConn = %v after %v", err, time.Since(start))
		}
	})
}

func TestABackedUpStreamHoldsOneWindowAndBlocksNobody(t *testing.T) {
	toServer(t, &hbone.Server{Handle: accept}, func(t *testing.T, w *wire) { // reads nothing
		for i := range 8 { // 32 MiB in all: twice the connection's window
			id := uint32(2*i + 1)
			w.accepted(id)
			for range 4 {
				w.WriteData(id, false, make([]byte, 1<<20))
			}
			for _, f := range w.take() {
				if f != "WINDOW_UPDATE 0 +8388608" {
					t.Fatalf("peer sent %q; only the connection's window may reopen", f)
				}
			}
		}
		w.WriteData(1, false, []byte("x"))
		w.expect("RST_STREAM 1 FLOW_CONTROL_ERROR")
	})
}

func TestTheConnectionWindowStaysShutWhileTooMuchWaits(t *testing.T) {
	var read chan struct{}
	handle := func(ctx context.Context, r *hbone.Request) {
		s, err := r.Accept("")
		if err != nil {
			return
		}
		<-read
		io.Copy(io.Discard, s)
	}
	toServer(t, &hbone.Server{Handle: handle}, func(t *testing.T, w *wire) {
		read = make(chan struct{})
		opened := 16 << 20
		sent := 0
		for id := uint32(1); opened-sent >= 4<<20; id += 2 {
			w.accepted(id)
			for range 4 {
				w.WriteData(id, false, make([]byte, 1<<20))
			}
			sent += 4 << 20
			for _, f := range w.take() {
				if f != "WINDOW_UPDATE 0 +8388608" {
					t.Fatalf("peer sent %q", f)
				}
				opened += 8 << 20
			}
			if sent > 100<<20 {
				t.Fatal("the connection holds more than 100 MiB")
			}
		}
		close(read)
		reopened := false
		for _, f := range w.take() {
			reopened = reopened || len(f) > 15 && f[:15] == "WINDOW_UPDATE 0"
		}
		if !reopened {
			t.Error("the window did not reopen when the streams were read")
		}
	})
}

func TestPoolDialsOnceForManyAndReusesSlots(t *testing.T) {
	var dials atomic.Int32
	addr := serve(t, &hbone.Server{Handle: echo})
	p := newPool(t, func(c *hbone.PoolConfig) {
		dial := c.Dial
		c.Dial = func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
			dials.Add(1)
			return dial(ctx, a)
		}
	})
	openMany := func(n int) []*hbone.Stream {
		streams := make([]*hbone.Stream, n)
		var work sync.WaitGroup
		for i := range n {
			work.Go(func() { streams[i] = open(t, p, addr) })
		}
		work.Wait()
		return streams
	}
	first := openMany(100)
	if n := dials.Load(); n != 1 {
		t.Fatalf("100 tunnels made %d connections, want 1", n)
	}
	second := openMany(1)
	if n := dials.Load(); n != 2 {
		t.Fatalf("101 tunnels made %d connections, want 2", n)
	}
	for _, s := range append(first, second...) {
		s.CloseWrite()
		if _, err := io.Copy(io.Discard, s); err != nil {
			t.Fatal(err)
		}
		s.Close()
	}
	openMany(200) // both connections are full again
	if n := dials.Load(); n != 2 {
		t.Fatalf("after all tunnels ended, 200 more made %d connections, want the same 2", n)
	}
}

func TestCloseTargetsEndsStreams(t *testing.T) {
	addr := serve(t, &hbone.Server{Handle: echo})
	p := newPool(t, nil)
	s := open(t, p, addr)
	p.CloseTargets(func(to hbone.Target) bool { return to.Addr != addr })
	s.Write([]byte("x"))
	if _, err := io.ReadFull(s, make([]byte, 1)); err != nil {
		t.Fatalf("a target that was kept: %v", err)
	}
	p.CloseTargets(func(to hbone.Target) bool { return to.Addr == addr })
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, hbone.ErrClosed) {
		t.Errorf("Read = %v, want %v", err, hbone.ErrClosed)
	}
	open(t, p, addr) // a new connection is made
}

func TestOpenStopsWithItsContext(t *testing.T) {
	hold := func(ctx context.Context, r *hbone.Request) { <-ctx.Done() }
	addr := serve(t, &hbone.Server{Handle: hold})
	p := newPool(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := p.Open(ctx, target(addr), "10.0.0.1:80", hbone.Header{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Open = %v", err)
	}
}
