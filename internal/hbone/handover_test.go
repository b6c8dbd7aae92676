package hbone_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
)

// TestServersReplaceOneAnother: while streams are opened all the time, servers shut down and others take their place, as
// ztunnels do in an upgrade. No stream is refused and none is cut, whatever it meets: a GOAWAY on its way, one that was
// there already, or a server that shuts down during the handshake.
func TestServersReplaceOneAnother(t *testing.T) {
	const replaced, clients, patience = 150, 8, time.Minute
	var current atomic.Pointer[hbone.Server]
	var conns sync.WaitGroup
	newServer := func() *hbone.Server { return &hbone.Server{TLS: serverTLS(), Handle: echo} }
	current.Store(newServer())
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var made atomic.Int64
	pool := newPool(t, func(c *hbone.PoolConfig) {
		c.MaxStreams = 2 // connections come all the time
		c.Dial = func(context.Context, netip.AddrPort) (net.Conn, error) {
			near, far := memPipe()
			srv := current.Load()
			made.Add(1)
			conns.Go(func() { srv.ServeConn(ctx, far) })
			return near, nil
		}
	})
	target := hbone.Target{Local: clientID, Addr: netip.MustParseAddrPort("10.0.0.1:15008"), Expect: []mesh.Identity{serverID}}
	var streams, served sync.WaitGroup
	var opened atomic.Int64
	over := make(chan struct{})
	for range clients {
		streams.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
				}
				if err := once(ctx, pool, target); err != nil {
					t.Errorf("after %d streams: %v", opened.Load(), err)
					return
				}
				opened.Add(1)
			}
		})
	}
	for range replaced {
		least := opened.Load() + 3
		for opened.Load() < least && !t.Failed() {
			<-time.After(100 * time.Microsecond)
		}
		old := current.Swap(newServer())
		served.Go(func() {
			if err := old.Shutdown(ctx); err != nil {
				t.Errorf("Shutdown = %v", err)
			}
		})
	}
	close(over)
	streams.Wait()
	if err := current.Load().Shutdown(ctx); err != nil {
		t.Errorf("Shutdown = %v", err)
	}
	served.Wait()
	conns.Wait()
	t.Logf("%d streams on %d connections to %d servers", opened.Load(), made.Load(), replaced+1)
}

// once opens a stream, has a line echoed, and ends it.
func once(ctx context.Context, pool *hbone.Pool, to hbone.Target) error {
	s, err := pool.Open(ctx, to, "10.0.0.1:80", hbone.Header{})
	if err != nil {
		return err
	}
	defer s.Close()
	const line = "still here"
	if _, err := io.WriteString(s, line); err != nil {
		return err
	}
	if err := s.CloseWrite(); err != nil {
		return err
	}
	got, err := io.ReadAll(s)
	if err != nil || string(got) != line {
		return fmt.Errorf("echo is %q: %w", got, err)
	}
	return nil
}
