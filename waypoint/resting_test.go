package waypoint_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
	"github.com/mistnet/mistnet/waypoint"
)

// connections is what the waypoint says of its clients' HTTP connections.
func (l *lab) connections() (serving, parked int) {
	var d struct {
		HTTPConnections struct{ Serving, Parked int }
	}
	if err := json.Unmarshal([]byte(l.page(":15000/config_dump")), &d); err != nil {
		return -1, -1
	}
	return d.HTTPConnections.Serving, d.HTTPConnections.Parked
}

// allParked waits until so many connections are parked and no other is there.
func (l *lab) allParked(want int) {
	l.t.Helper()
	l.eventually(fmt.Sprintf("%d connections parked", want), func() bool {
		serving, parked := l.connections()
		return serving == 0 && parked == want
	})
}

// ask makes a request and reads its response.
func ask(conn net.Conn, path string) (*http.Response, string, error) {
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: cart\r\n\r\n", path); err != nil {
		return nil, "", err
	}
	resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 512), nil)
	if err != nil {
		return nil, "", err
	}
	body, err := io.ReadAll(resp.Body)
	return resp, string(body), err
}

// idleLab is a lab whose service cart is reached in both ways: by tunnels and on announced connections.
func idleLab(t *testing.T) (l *lab, ways map[string]func() (net.Conn, error)) {
	at := loopback() + ":15088"
	l = newLab(t, func(c *waypoint.Config) { c.ProxyAddr, c.AccessLog, c.SniffTimeout = at, false, 10*time.Second })
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, frugal(t))
	l.service("unknown", "10.9.0.2", mesh.AppUnknown, frugal(t))
	l.known("cart", "unknown")
	header := announcement("127.0.0.1:4711", "10.9.0.1:80", "\xd0spiffe://cluster.local/ns/web/sa/front")
	return l, map[string]func() (net.Conn, error){
		"announced": func() (net.Conn, error) {
			conn, err := net.Dial("tcp", at)
			if err != nil {
				return nil, err
			}
			_, err = conn.Write(header)
			return conn, err
		},
		"tunnelled": func() (net.Conn, error) { return l.open(t.Context(), "10.9.0.1:80") },
		"tunnelled, its protocol found out": func() (net.Conn, error) {
			return l.open(t.Context(), "10.9.0.2:80")
		},
	}
}

// TestIdleConnectionsHoldLittle: connections that wait for their next request have no goroutine each, and take memory within bounds.
// Both ends are in this process and count.
func TestIdleConnectionsHoldLittle(t *testing.T) {
	const conns = 1000
	most := map[string]uint64{"announced": 4 << 10, "tunnelled": 8 << 10}
	for way, most := range most {
		t.Run(way, func(t *testing.T) {
			l, ways := idleLab(t)
			one, err := ways[way]()
			if err != nil {
				t.Fatal(err)
			}
			defer one.Close()
			if _, _, err := ask(one, "/"); err != nil { // so that what is there once is there before
				t.Fatal(err)
			}
			l.allParked(1)
			goroutines, bytes := runtime.NumGoroutine(), inUse()
			all := make([]net.Conn, conns)
			for i := range all {
				if all[i], err = ways[way](); err != nil {
					t.Fatal(err)
				}
				defer all[i].Close()
				if _, _, err := ask(all[i], "/"); err != nil {
					t.Fatal(err)
				}
			}
			l.allParked(conns + 1)
			if n := runtime.NumGoroutine() - goroutines; n > conns/8 { // spare workers, tunnels' connections
				t.Errorf("%d connections that wait hold %d goroutines", conns, n)
			}
			each := (inUse() - bytes) / conns
			t.Logf("%d bytes a connection, %d goroutines more for %d", each, runtime.NumGoroutine()-goroutines, conns)
			if !meshtest.Race && each > most {
				t.Errorf("a connection that waits holds %d bytes, want at most %d", each, most)
			}
			for i, conn := range all { // none of them is lost, and they are parked again
				if resp, body, err := ask(conn, "/again"); err != nil || resp.StatusCode != 200 || body != "hello" {
					t.Fatalf("connection %d after its rest: %v, %q, %v", i, resp, body, err)
				}
			}
			l.allParked(conns + 1)
			for _, conn := range append(all, one) {
				_ = conn.Close()
			}
			l.allParked(0)
		})
	}
}

// inUse is the memory of heap and stacks that is in use.
func inUse() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what the first has finalized
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// TestWakingCostsLittle: a connection that is asked on after a rest is served with what served the others.
func TestWakingCostsLittle(t *testing.T) {
	if meshtest.Race { // a sync.Pool forgets on purpose
		t.Skip("with the race detector memory means nothing")
	}
	const conns, most = 100, 1500
	l, ways := idleLab(t)
	all := make([]net.Conn, conns)
	var b [1024]byte
	round := func() {
		for i, conn := range all {
			if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: cart\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			for n := 0; !bytes.HasSuffix(b[:n], []byte("hello")); {
				k, err := conn.Read(b[n:])
				if err != nil {
					t.Fatalf("connection %d: %q, %v", i, b[:n], err)
				}
				n += k
			}
		}
	}
	for i := range all {
		var err error
		if all[i], err = ways["announced"](); err != nil {
			t.Fatal(err)
		}
		defer all[i].Close()
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // it would take what waits to be used again
	round()
	l.allParked(conns)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	round()
	runtime.ReadMemStats(&after)
	each := (after.TotalAlloc - before.TotalAlloc) / conns
	t.Logf("%d bytes allocated for each", each)
	if each > most {
		t.Errorf("a connection that is asked on allocates %d bytes, want at most %d", each, most)
	}
}

// TestMemoryIsGivenBack when all connections are parked, or gone.
func TestMemoryIsGivenBack(t *testing.T) {
	for way, ask := range map[string]func(*testing.T, *lab, net.Conn){
		"HTTP/1.1, parked": func(t *testing.T, l *lab, conn net.Conn) {
			if _, _, err := ask(conn, "/"); err != nil {
				t.Fatal(err)
			}
			l.allParked(1)
		},
		"HTTP/2, gone": func(t *testing.T, l *lab, conn net.Conn) {
			client := http2Over(conn)
			resp, err := client.Get("http://cart/")
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			client.CloseIdleConnections()
			l.allParked(0)
		},
	} {
		t.Run(way, func(t *testing.T) {
			held := func() uint64 {
				s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/unused:bytes"}, {Name: "/memory/classes/heap/free:bytes"}}
				metrics.Read(s)
				return s[0].Value.Uint64() + s[1].Value.Uint64() + s[2].Value.Uint64()
			}
			debug.FreeOSMemory()
			l, ways := idleLab(t)
			before := held()
			grown := max(64<<20, before) // what is worth while depends on what other tests have left
			big := make([]byte, grown)
			for i := 0; i < len(big); i += 4096 {
				big[i] = 1
			}
			runtime.KeepAlive(big)
			if n := held(); n < before+grown/2 {
				t.Fatalf("the heap holds %d bytes, %d before: it has not grown", n, before)
			}
			conn, err := ways["announced"]()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ask(t, l, conn)
			l.eventually("memory given back", func() bool { return held() < before+grown/2 })
		})
	}
}

// http2Over is a client that speaks HTTP/2 on a connection.
func http2Over(conn net.Conn) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Client{Transport: &http.Transport{
		Protocols: protocols, DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}}
}

// TestHowIdleConnectionsGoOn: each is parked, asked on again, and parked again; and then ends by its client, or by drain.
func TestHowIdleConnectionsGoOn(t *testing.T) {
	t.Parallel()
	l, ways := idleLab(t)
	open := make(map[string]net.Conn)
	for way, dial := range ways {
		conn, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		open[way] = conn
		if way != "tunnelled, its protocol found out" { // that one takes silence for a protocol whose server speaks first
			l.eventually("a connection without a request parked", func() bool { _, parked := l.connections(); return parked == 1 })
		}
		for range 3 {
			if resp, body, err := ask(conn, "/"); err != nil || resp.StatusCode != 200 || body != "hello" {
				t.Fatalf("%s: %v, %q, %v", way, resp, body, err)
			}
			l.allParked(1)
		}
		// A request in pieces, the first of which wakes the connection.
		for _, part := range []string{"G", "ET / HTTP/1.1\r\nHo", "st: cart\r\n\r\nGET /next HTTP/1.1\r\n"} {
			if _, err := io.WriteString(conn, part); err != nil {
				t.Fatal(err)
			}
			l.eventually("the connection served", func() bool { serving, _ := l.connections(); return serving == 1 })
		}
		if _, err := io.WriteString(conn, "Host: cart\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(conn)
		for i := range 2 {
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatalf("%s: response %d to two requests in pieces: %v", way, i, err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
		}
		l.allParked(1)
		half := conn.(interface{ CloseWrite() error })
		if err := half.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if n, err := r.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("%s: read after our end: %d bytes, %v, want EOF", way, n, err)
		}
		l.allParked(0)
	}
}

// TestIdleConnectionsTakeHTTP2: a connection that says nothing for long may turn out to be of HTTP/2.
func TestIdleConnectionsTakeHTTP2(t *testing.T) {
	t.Parallel()
	l, ways := idleLab(t)
	for _, way := range []string{"announced", "tunnelled"} {
		conn, err := ways[way]()
		if err != nil {
			t.Fatal(err)
		}
		l.allParked(1)
		client := http2Over(conn)
		resp, err := client.Get("http://cart/")
		if err != nil {
			t.Fatalf("%s: %v", way, err)
		}
		_ = resp.Body.Close()
		if resp.ProtoMajor != 2 || resp.StatusCode != 200 {
			t.Errorf("%s: %s %s", way, resp.Proto, resp.Status)
		}
		client.CloseIdleConnections()
		l.allParked(0)
	}
}

// TestDrainEndsIdleConnections at once, while a request that is under way on a connection that had been parked is answered.
func TestDrainEndsIdleConnections(t *testing.T) {
	t.Parallel()
	asked, answer := make(chan struct{}), make(chan struct{})
	at := loopback() + ":15088"
	l := newLab(t, func(c *waypoint.Config) { c.ProxyAddr = at })
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			asked <- struct{}{}
			<-answer
		}
	}))
	l.known("cart")
	header := announcement("127.0.0.1:4711", "10.9.0.1:80", "\xd0spiffe://cluster.local/ns/web/sa/front")
	var idle, slow []net.Conn
	for i := range 8 {
		var conn net.Conn
		var err error
		if i%2 == 0 {
			if conn, err = net.Dial("tcp", at); err == nil {
				_, err = conn.Write(header)
			}
		} else {
			conn, err = l.open(t.Context(), "10.9.0.1:80")
		}
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, _, err := ask(conn, "/"); err != nil {
			t.Fatal(err)
		}
		if i < 4 {
			slow = append(slow, conn)
		} else {
			idle = append(idle, conn)
		}
	}
	l.allParked(8)
	var answered sync.WaitGroup
	for _, conn := range slow {
		answered.Go(func() {
			resp, _, err := ask(conn, "/slow")
			if err != nil || resp.StatusCode != 200 || !resp.Close {
				t.Errorf("a request under way when drain began: %v, %v; want 200 that closes", resp, err)
			}
		})
	}
	for range slow {
		<-asked
	}
	l.stop()
	for i, conn := range idle {
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err != io.EOF && !isGone(err) {
			t.Errorf("idle connection %d when drain began: %v, want its end", i, err)
		}
	}
	close(answer)
	answered.Wait()
	l.end()
}

// isGone reports whether a stream has ended with its connection.
func isGone(err error) bool {
	return errors.Is(err, hbone.ErrPeerClosed) || errors.Is(err, net.ErrClosed)
}
