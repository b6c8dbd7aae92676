package waypoint_test

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
	"github.com/mistnet/mistnet/waypoint"
)

// frugal is an application that answers every request alike, without allocating.
func frugal(t testing.TB) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", loopback()+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	answer := []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello")
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				b := make([]byte, 4096)
				for n := 0; ; {
					k, err := conn.Read(b[n:])
					if err != nil {
						return
					}
					if n += k; bytes.HasSuffix(b[:n], []byte("\r\n\r\n")) {
						if _, err := conn.Write(answer); err != nil {
							return
						}
						n = 0
					}
				}
			}()
		}
	}()
	return addrPort(ln.Addr())
}

// TestTheCommonRequestAllocatesLittle: of all the programs of a request's way, which run in this process, the waypoint is the
// only one that allocates for each.
func TestTheCommonRequestAllocatesLittle(t *testing.T) {
	if meshtest.Race {
		t.Skip("the race detector makes pools forget")
	}
	l := newLab(t, func(c *waypoint.Config) { c.AccessLog = false })
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, frugal(t))
	l.known("cart")
	l.routes(mesh.KindVirtualService, mesh.HTTPRule{
		Matches: []mesh.HTTPMatch{{Path: mesh.PathMatch{Kind: mesh.PathPrefix, Value: "/a"}}}, Backends: []mesh.Backend{to("cart", 1)},
	})
	s, err := l.open(t.Context(), "10.9.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_ = s.SetDeadline(time.Now().Add(time.Minute))
	ask := []byte("GET /a/b?c=d HTTP/1.1\r\nHost: cart.shop\r\nUser-Agent: test\r\nAccept: */*\r\n\r\n")
	answer := make([]byte, 4096)
	exchange := func() {
		if _, err := s.Write(ask); err != nil {
			t.Fatal(err)
		}
		for n := 0; !bytes.HasSuffix(answer[:n], []byte("\r\n\r\nhello")); {
			k, err := s.Read(answer[n:])
			if n += k; err != nil && err != io.EOF {
				t.Fatal(err)
			}
		}
	}
	for range 100 {
		exchange()
	}
	const most = 1 // the request's id
	if n := testing.AllocsPerRun(2000, exchange); n > most {
		t.Errorf("a request allocates %v times, want at most %d", n, most)
	} else {
		t.Logf("a request allocates %v times", n)
	}
}
