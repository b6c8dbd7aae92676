package hbone_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/hbone"
)

// counted counts the writes on a connection and the TLS records of application data in them.
type counted struct {
	net.Conn
	mu              sync.Mutex
	writes, records int
	rest            []byte // of a record header or body that a write ended in
}

func (c *counted) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.writes++
	b := append(c.rest, p...)
	for len(b) >= 5 {
		n := 5 + int(b[3])<<8 + int(b[4])
		if len(b) < n {
			break
		}
		if b[0] == 23 {
			c.records++
		}
		b = b[n:]
	}
	c.rest = append([]byte(nil), b...)
	c.mu.Unlock()
	return c.Conn.Write(p)
}

func (c *counted) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.writes, c.records = 0, 0
}

// countedTunnel is a tunnel in memory, inside a bubble, with its client's and server's writes counted.
func countedTunnel(t *testing.T, handle func(ctx context.Context, r *hbone.Request), test func(s *hbone.Stream, client, server *counted)) {
	synctest.Test(t, func(t *testing.T) {
		near, far := memPipe()
		client, server := &counted{Conn: near}, &counted{Conn: far}
		srv := &hbone.Server{TLS: serverTLS(), Handle: handle}
		var served sync.WaitGroup
		served.Go(func() { srv.ServeConn(context.Background(), server) })
		p := hbone.NewPool(hbone.PoolConfig{
			Dial: func(context.Context, netip.AddrPort) (net.Conn, error) { return client, nil },
			TLS:  func(context.Context, hbone.Target) (*tls.Config, error) { return clientTLS(), nil },
		})
		s := open(t, p, netip.MustParseAddrPort("10.0.0.2:15008"))
		synctest.Wait()
		client.reset()
		server.reset()
		test(s, client, server)
		p.Close()
		served.Wait()
	})
}

func TestBulkFillsRecordsAndWrites(t *testing.T) {
	countedTunnel(t, func(_ context.Context, r *hbone.Request) {
		if s, err := r.Accept(""); err == nil {
			io.Copy(io.Discard, s)
		}
	}, func(s *hbone.Stream, client, server *counted) {
		const chunk, chunks = 4 * (64<<10 - 9), 64 // what a relay writes at a time: four frames
		buf := make([]byte, chunk)
		for range chunks {
			if n, err := s.Write(buf); n != chunk || err != nil {
				t.Fatalf("Write = %d, %v", n, err)
			}
		}
		synctest.Wait()
		// 16 records for each chunk, one write for each, and the answer to the server's window updates: none.
		if client.records > 16*chunks+8 || client.writes > chunks+8 {
			t.Errorf("16 MB took %d records and %d writes, want %d and %d", client.records, client.writes, 16*chunks, chunks)
		}
		// The connection's window is returned every 8 MiB, the stream's every 2.
		if server.writes > 12 {
			t.Errorf("receiving 16 MB took %d writes, want about 10", server.writes)
		}
	})
}

func TestASmallMessageIsOneRecordInOneWrite(t *testing.T) {
	countedTunnel(t, echo, func(s *hbone.Stream, client, server *counted) {
		msg, buf := make([]byte, 1000), make([]byte, 1000)
		for range 100 {
			s.Write(msg)
			if _, err := io.ReadFull(s, buf); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		for name, c := range map[string]*counted{"client": client, "server": server} {
			if c.records != 100 || c.writes != 100 {
				t.Errorf("100 round trips took the %s %d records and %d writes", name, c.records, c.writes)
			}
		}
	})
}

func TestManyWritersShareRecordsAndWrites(t *testing.T) {
	countedTunnel(t, echo, func(s *hbone.Stream, client, _ *counted) {
		var work sync.WaitGroup
		const writers, each = 16, 100
		work.Go(func() { io.CopyN(io.Discard, s, writers*each*100) })
		for range writers {
			work.Go(func() {
				for range each {
					s.Write(make([]byte, 100))
				}
			})
		}
		work.Wait()
		if client.writes > writers*each {
			t.Errorf("%d messages took %d writes", writers*each, client.writes)
		}
	})
}

func TestARoundTripThroughTwoProxiesDoesNotAllocate(t *testing.T) {
	m := newTunnelled(t)
	c, s := m.connect(t)
	msg, buf := make([]byte, 1000), make([]byte, 1000)
	trip := func() {
		c.Write(msg)
		io.ReadFull(s, buf)
		s.Write(msg)
		io.ReadFull(c, buf)
	}
	for range 200 {
		trip()
	}
	// crypto/tls would allocate one small reader per record it receives: that there is none says whose records they are.
	if n := testing.AllocsPerRun(500, trip); n > 0 {
		t.Errorf("a round trip allocates %v times, want none", n)
	}
}

// Short connections whose two ends reset at once leave frames on streams that are over. They must not look like a flood.
func TestFastShortConnectionsAreNoFlood(t *testing.T) {
	toServer(t, &hbone.Server{Handle: func(_ context.Context, r *hbone.Request) {
		if s, err := r.Accept(""); err == nil {
			s.Reset()
		}
	}}, func(t *testing.T, w *wire) {
		for i := range 20_000 {
			id := uint32(2*i + 1)
			w.connect(id)
			synctest.Wait()
			w.WriteRSTStream(id, http2.ErrCodeConnect)
		}
		w.WritePing(false, [8]byte{})
		got := w.take()
		if last := got[len(got)-1]; last != "PING ack" {
			t.Errorf("at the end the peer sent %q", last)
		}
	})
}
