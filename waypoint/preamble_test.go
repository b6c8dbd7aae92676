package waypoint_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// listens is an application of connections.
func listens(t *testing.T, serve func(net.Conn)) netip.AddrPort {
	t.Helper()
	ln := listen(t, loopback()+":0")
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				serve(conn)
			}()
		}
	}()
	return addrPort(ln.Addr())
}

// TestTheApplicationIsToldOfTheClient by a PROXY header, in front of requests and of other connections.
func TestTheApplicationIsToldOfTheClient(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, listens(t, func(conn net.Conn) {
		r := bufio.NewReader(conn)
		line, _ := r.ReadString('\n')
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, req.Body)
			fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(line), line)
		}
	}))
	first := make(chan string, 1)
	l.service("raw", "10.9.0.2", mesh.AppTCP, listens(t, func(conn net.Conn) {
		head := make([]byte, 28+5)
		_, _ = io.ReadFull(conn, head)
		first <- string(head)
	}))
	l.known("cart", "raw")
	l.traffic("cart", mesh.TrafficSettings{ProxyProtocol: mesh.ProxyProtocolV1})
	l.traffic("raw", mesh.TrafficSettings{ProxyProtocol: mesh.ProxyProtocolV2})
	for range 2 { // the second time on the same connection
		_, body := l.get(cart + "/")
		if f := strings.Fields(body); len(f) != 6 || strings.Join(f[:4], " ") != "PROXY TCP4 127.0.0.1 10.9.0.1" || f[5] != "80" {
			t.Errorf("the application was told %q, want PROXY TCP4 127.0.0.1 10.9.0.1 and ports", body)
		}
	}
	conn, err := l.open(t.Context(), "10.9.0.2:80")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "hello")
	const want = "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x7f\x00\x00\x01\x0a\x09\x00\x02"
	if got := <-first; !strings.HasPrefix(got, want) || got[26:] != "\x00\x50hello" {
		t.Errorf("the application was told %q, want a header of version 2 and then hello", got)
	}
}

// TestConnectionsGoThroughAForwardProxy that is asked for them, and is refused by.
func TestConnectionsGoThroughAForwardProxy(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	forward := listens(t, func(conn net.Conn) {
		r := bufio.NewReader(conn)
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		if req.Method != "CONNECT" || req.Host != "far.example:5432" {
			fmt.Fprintf(conn, "HTTP/1.1 403 Forbidden\r\n\r\n")
			return
		}
		fmt.Fprint(conn, "HTTP/1.1 200 OK\r\nX-Via: proxy\r\n\r\ngreeting ") // the far end speaks first
		_, _ = io.Copy(conn, r)
	})
	l.service("db", "10.9.0.1", mesh.AppTCP, forward)
	l.service("no", "10.9.0.2", mesh.AppTCP, forward)
	l.known("db", "no")
	l.traffic("db", mesh.TrafficSettings{Tunnel: &mesh.ForwardTunnel{TargetHost: "far.example", TargetPort: 5432}})
	l.traffic("no", mesh.TrafficSettings{Tunnel: &mesh.ForwardTunnel{TargetHost: "else.example", TargetPort: 5432}})
	conn, err := l.open(t.Context(), "10.9.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(conn, "echo")
	_ = conn.CloseWrite()
	if got, err := io.ReadAll(conn); string(got) != "greeting echo" || err != nil {
		t.Errorf("through the proxy came %q, %v; want greeting echo", got, err)
	}
	if conn, err := l.open(t.Context(), "10.9.0.2:80"); err == nil {
		conn.Close()
		t.Error("what the proxy refuses was opened")
	}
	l.eventually("logged", func() bool { return strings.Contains(l.log.String(), "403 Forbidden") })
}

// TestConnectionsLastAsLongAsTheyMay: one that passes nothing, and one that passes all the time.
func TestConnectionsLastAsLongAsTheyMay(t *testing.T) {
	t.Parallel()
	idle := 100 * time.Millisecond
	for name, tc := range map[string]struct {
		pool  mesh.ConnectionPool
		talks bool
		flags string
	}{
		"idle":    {mesh.ConnectionPool{TCPIdleTimeout: &idle}, false, "SI"},
		"too old": {mesh.ConnectionPool{MaxConnectionDuration: 200 * time.Millisecond}, true, "DT"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, nil)
			l.service("db", "10.9.0.1", mesh.AppTCP, listens(t, func(conn net.Conn) { _, _ = io.Copy(conn, conn) }))
			l.known("db")
			l.traffic("db", mesh.TrafficSettings{Pool: &tc.pool})
			conn, err := l.open(t.Context(), "10.9.0.1:80")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			buf := make([]byte, 4)
			for err == nil && tc.talks {
				if _, err = fmt.Fprint(conn, "ping"); err == nil {
					_, err = io.ReadFull(conn, buf)
				}
			}
			if _, err := conn.Read(buf); err == nil || err == io.EOF {
				t.Errorf("the connection ends with %v, want a reset", err)
			}
			l.eventually("logged", func() bool { return strings.Contains(l.log.String(), `"response_flags":"`+tc.flags+`"`) })
		})
	}
}

// TestRequestsOfAConnection: no more than the policy says, and none on a connection that has waited for too long.
func TestRequestsOfAConnection(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	moment := time.Nanosecond
	for i, tc := range []struct {
		pool mesh.ConnectionPool
		want string
	}{
		{mesh.ConnectionPool{MaxPerConnection: 3}, "[3 3 3 1]"}, {mesh.ConnectionPool{HTTPIdleTimeout: &moment}, "[1 1 1 1 1 1 1 1 1 1]"},
		{mesh.ConnectionPool{}, "[10]"},
	} {
		name, vip := fmt.Sprint("cart", i), fmt.Sprint("10.9.0.", i+1)
		l.service(name, vip, mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.RemoteAddr) }))
		l.known(name)
		l.traffic(name, mesh.TrafficSettings{Pool: &tc.pool})
		var runs []int
		last := ""
		for range 10 {
			_, body := l.get("http://" + vip + "/")
			if body != last {
				runs = append(runs, 0)
			}
			runs[len(runs)-1]++
			last = body
		}
		if got := fmt.Sprint(runs); got != tc.want {
			t.Errorf("%+v: 10 requests went over connections in runs of %s, want %s", tc.pool, got, tc.want)
		}
	}
}
