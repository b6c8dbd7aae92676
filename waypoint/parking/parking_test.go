package parking_test

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/waypoint/parking"
)

// guest is a connection that counts what becomes of it.
type guest struct {
	conn    net.Conn
	ended   chan string // "resumed" or "expired"
	resumed func(g *guest)
}

func (g *guest) Resume() {
	if g.resumed != nil {
		g.resumed(g)
		return
	}
	g.ended <- "resumed"
}

func (g *guest) Expire() {
	_ = g.conn.Close()
	g.ended <- "expired"
}

func lotOf(t testing.TB, look time.Duration) *parking.Lot {
	t.Helper()
	l, err := parking.NewLooking(look)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
		if n := l.Waiting(); n != 0 {
			t.Errorf("%d guests are left after Close", n)
		}
	})
	return l
}

// pairOf returns both ends of a TCP connection.
func pairOf(t testing.TB) (client, server *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// TestHowAWaitEnds: each guest is resumed or expires, whatever comes before it waits or while it does.
func TestHowAWaitEnds(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		before, while func(l *parking.Lot, client *net.TCPConn) error
		wait          time.Duration
		want          string
	}{
		"with bytes":               {while: func(_ *parking.Lot, c *net.TCPConn) error { _, err := c.Write([]byte("x")); return err }, want: "resumed"},
		"with bytes that are here": {before: func(_ *parking.Lot, c *net.TCPConn) error { _, err := c.Write([]byte("x")); return err }, want: "resumed"},
		"with the peer's end":      {while: func(_ *parking.Lot, c *net.TCPConn) error { return c.CloseWrite() }, want: "resumed"},
		"with an end that is here": {before: func(_ *parking.Lot, c *net.TCPConn) error { return c.Close() }, want: "resumed"},
		"with a reset": {while: func(_ *parking.Lot, c *net.TCPConn) error {
			_ = c.SetLinger(0)
			return c.Close()
		}, want: "resumed"},
		"with its time": {wait: time.Millisecond, want: "expired"},
		"with Drain":    {while: func(l *parking.Lot, _ *net.TCPConn) error { l.Drain(); return nil }, want: "expired"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lotOf(t, 10*time.Millisecond)
			client, server := pairOf(t)
			g := &guest{conn: server, ended: make(chan string, 2)}
			if c.before != nil {
				if err := c.before(l, client); err != nil {
					t.Fatal(err)
				}
			}
			wait := time.Hour
			if c.wait > 0 {
				wait = c.wait
			}
			if !l.Park(g, server, wait) {
				t.Fatal("Park() = false")
			}
			if c.while != nil {
				if err := c.while(l, client); err != nil {
					t.Fatal(err)
				}
			}
			if got := <-g.ended; got != c.want {
				t.Errorf("the guest is %s, want it %s", got, c.want)
			}
			if n := l.Waiting(); n != 0 {
				t.Errorf("%d guests wait on", n)
			}
		})
	}
}

// TestWhatIsNotParked: nobody is taken after Drain, a closed connection never, nor one that cannot tell when it can be read.
func TestWhatIsNotParked(t *testing.T) {
	t.Parallel()
	l := lotOf(t, time.Hour)
	_, closed := pairOf(t)
	_ = closed.Close()
	pipe, other := net.Pipe()
	defer other.Close()
	_, late := pairOf(t)
	for _, c := range []struct {
		name string
		conn net.Conn
		do   func()
	}{{"closed", closed, nil}, {"pipe", pipe, nil}, {"after Drain", late, l.Drain}} {
		if c.do != nil {
			c.do()
		}
		if l.Park(&guest{conn: c.conn, ended: make(chan string, 1)}, c.conn, time.Hour) {
			t.Errorf("%s: Park() = true", c.name)
		}
	}
	if parking.Takes(pipe) || !parking.Takes(late) {
		t.Errorf("Takes(pipe) = %t, Takes(TCP) = %t", parking.Takes(pipe), parking.Takes(late))
	}
}

// TestEachIsServedOnce: connections that are parked again and again answer all that is asked, while others end by all means at once.
// What two of them owned at a time, the race detector would see.
func TestEachIsServedOnce(t *testing.T) {
	t.Parallel()
	const conns, rounds = 64, 50
	l := lotOf(t, time.Millisecond)
	var clients sync.WaitGroup
	for i := range conns {
		client, server := pairOf(t)
		served := 0 // without a lock: a guest has one owner
		g := &guest{conn: server, ended: make(chan string, 1)}
		g.resumed = func(g *guest) {
			var b [1]byte
			if _, err := io.ReadFull(server, b[:]); err != nil {
				g.ended <- "over"
				return
			}
			served++
			if _, err := server.Write(b[:]); err != nil {
				g.ended <- "over"
				return
			}
			wait := time.Hour
			if i%4 == 0 && served == rounds/2 {
				wait = 0 // its time is over at once, or its next byte is here before
			}
			if !l.Park(g, server, wait) {
				g.ended <- "refused"
			}
		}
		if !l.Park(g, server, time.Hour) {
			t.Fatal("Park() = false")
		}
		clients.Go(func() {
			defer client.Close()
			for n := range rounds {
				var b [1]byte
				if _, err := client.Write([]byte{byte(n)}); err != nil {
					break
				}
				if _, err := io.ReadFull(client, b[:]); err != nil {
					break
				}
				if b[0] != byte(n) {
					t.Errorf("connection %d answers %d to %d", i, b[0], n)
				}
			}
		})
		t.Cleanup(func() {
			got := <-g.ended
			if got == "over" && served != rounds && i%4 != 0 {
				t.Errorf("connection %d answered %d times, want %d", i, served, rounds)
			}
			if i%4 != 0 && got != "over" {
				t.Errorf("connection %d is %s, want it to end with its client", i, got)
			}
		})
	}
	clients.Wait()
}
