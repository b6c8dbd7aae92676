package hbone_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/relay"
)

var _ relay.Receiver = (*hbone.Stream)(nil)

// tunnelled is two proxies joined by a tunnel: what is dialled at proxy reaches the accept side of app.
type tunnelled struct {
	proxy *net.TCPListener // captured connections of the client's pod
	app   *net.TCPListener // the server application
	pumps sync.WaitGroup
	errs  chan error // of the server's side of each pump
}

func newTunnelled(t testing.TB) *tunnelled {
	t.Helper()
	listen := func() *net.TCPListener {
		ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		return ln
	}
	m := &tunnelled{proxy: listen(), app: listen(), errs: make(chan error, 10_000)}
	addr := serve(t, &hbone.Server{Handle: func(ctx context.Context, r *hbone.Request) {
		app, err := net.DialTCP("tcp", nil, m.app.Addr().(*net.TCPAddr))
		if err != nil {
			r.Reject(503)
			return
		}
		s, err := r.Accept("")
		if err != nil {
			app.Close()
			return
		}
		var n relay.Counters
		m.errs <- relay.Pump(ctx, app, s, &n)
	}})
	pool := newPool(t, nil)
	ctx, cancel := context.WithCancel(context.Background())
	m.pumps.Go(func() {
		for {
			c, err := m.proxy.AcceptTCP()
			if err != nil {
				return
			}
			m.pumps.Go(func() { m.outbound(ctx, pool, addr, c) })
		}
	})
	t.Cleanup(func() {
		m.proxy.Close()
		m.app.Close()
		cancel()
		m.pumps.Wait()
	})
	return m
}

func (m *tunnelled) outbound(ctx context.Context, pool *hbone.Pool, addr netip.AddrPort, c *net.TCPConn) {
	s, err := pool.Open(ctx, target(addr), "10.0.0.1:80", hbone.Header{Baggage: "k8s.namespace.name=shop"})
	if err != nil {
		c.SetLinger(0)
		c.Close()
		return
	}
	var n relay.Counters
	relay.Pump(ctx, c, s, &n)
}

// connect returns both ends of a tunnelled connection.
func (m *tunnelled) connect(t testing.TB) (client, server *net.TCPConn) {
	t.Helper()
	c, err := net.DialTCP("tcp", nil, m.proxy.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	s, err := m.app.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return c, s
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}

func TestTunnelledConnectionsCarryBytesAndHalfCloses(t *testing.T) {
	m := newTunnelled(t)
	for _, size := range []int{0, 1, 1000, 16384, 1 << 20, 12 << 20} {
		client, server := m.connect(t)
		up, down := random(size), random(size/2+1)
		var work sync.WaitGroup
		work.Go(func() { client.Write(up); client.CloseWrite() })
		got, err := io.ReadAll(server)
		if err != nil || !bytes.Equal(got, up) {
			t.Fatalf("server read %d bytes, %v; want %d", len(got), err, len(up))
		}
		work.Go(func() { server.Write(down); server.CloseWrite() })
		got, err = io.ReadAll(client)
		if err != nil || !bytes.Equal(got, down) {
			t.Fatalf("client read %d bytes, %v; want %d", len(got), err, len(down))
		}
		work.Wait()
		if err := <-m.errs; err != nil {
			t.Fatalf("Pump = %v", err)
		}
	}
}

func TestAResetOfOneEndResetsTheOther(t *testing.T) {
	m := newTunnelled(t)
	for _, clientFirst := range []bool{true, false} {
		client, server := m.connect(t)
		if !clientFirst {
			client, server = server, client
		}
		if _, err := client.Write([]byte("half of a")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(server, make([]byte, 9)); err != nil {
			t.Fatal(err)
		}
		client.SetLinger(0)
		client.Close()
		if _, err := server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read = %v, want a reset", err)
		}
	}
}

func TestAnAnswerSentBeforeTheServerStoppedListeningArrives(t *testing.T) {
	m := newTunnelled(t)
	for range 20 {
		client, server := m.connect(t)
		answer := random(100_000)
		if _, err := client.Write(random(1000)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(server, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		if _, err := server.Write(answer); err != nil {
			t.Fatal(err)
		}
		server.Close()
		for range 3 { // has nowhere to go; the server's kernel answers with a reset
			client.Write(random(1000))
		}
		got, err := io.ReadAll(client)
		if err != nil || !bytes.Equal(got, answer) {
			t.Fatalf("client read %d bytes, %v; want %d", len(got), err, len(answer))
		}
		for {
			if _, err := client.Write(random(1000)); err != nil {
				break // and the client learns of it
			}
		}
	}
}

func TestASlowApplicationDoesNotBlockItsNeighbours(t *testing.T) {
	m := newTunnelled(t)
	slow, _ := m.connect(t) // its server never reads
	var work sync.WaitGroup
	work.Go(func() { slow.Write(make([]byte, 64<<20)) })
	client, server := m.connect(t)
	want := random(20 << 20) // more than the connection's window
	work.Go(func() { client.Write(want); client.CloseWrite() })
	got, err := io.ReadAll(server)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("neighbour read %d bytes, %v", len(got), err)
	}
	slow.SetLinger(0)
	slow.Close()
	work.Wait()
}

func TestAnIdleTunnelledConnectionCostsOneGoroutinePerSide(t *testing.T) {
	m := newTunnelled(t)
	m.connect(t) // warms the tunnel
	trip := func(c, s net.Conn) {
		c.Write([]byte("x"))
		if _, err := io.ReadFull(s, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	before := runtime.NumGoroutine()
	const n = 50
	for range n {
		c, s := m.connect(t)
		trip(c, s)
		trip(s, c)
	}
	// A goroutine per proxy, one of which is the server's handler, and whatever is just finishing.
	got := 0
	for range 1_000_000 {
		if got = runtime.NumGoroutine() - before; got <= 2*n {
			return
		}
		runtime.Gosched()
	}
	t.Errorf("%d idle connections through two proxies use %d goroutines, want %d", n, got, 2*n)
}
