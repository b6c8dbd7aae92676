package waypoint_test

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
)

// TestAnAnswerThatNobodyAskedFor is given to nobody: what an application says behind an answer that was over, it says to no other client.
func TestAnAnswerThatNobodyAskedFor(t *testing.T) {
	t.Parallel()
	const poison = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
	for name, c := range map[string]struct{ method, body, answer string }{
		"the body of a HEAD":          {"HEAD", "", "HTTP/1.1 200 OK\r\nContent-Length: 44\r\n\r\n"},
		"a body where none is":        {"GET", "", "HTTP/1.1 204 No Content\r\n\r\n"},
		"a body that is not modified": {"GET", "", "HTTP/1.1 304 Not Modified\r\nContent-Length: 44\r\n\r\n"},
		"a second answer to a body":   {"PUT", "hidden", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"},
	} {
		test := func(t *testing.T, secret bool) {
			t.Parallel()
			l := newLab(t, nil)
			ln := listen(t, loopback()+":0")
			at := addrPort(ln.Addr())
			if secret {
				cert := l.ca.Issue(mesh.Identity{}, meshtest.Server("cart"))
				ln = tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{*cert}})
				defer ln.Close()
			}
			said := make(chan struct{})
			go func() {
				for first := true; ; first = false {
					conn, err := ln.Accept()
					if err != nil {
						return
					}
					go func() {
						defer conn.Close()
						answers(conn, first, c.answer, poison, said)
					}()
				}
			}()
			l.service("cart", "10.9.0.1", mesh.AppHTTP1, at)
			l.known("cart")
			if secret {
				l.traffic("cart", mesh.TrafficSettings{TLS: &mesh.UpstreamTLS{Mode: mesh.TLSSimple, InsecureSkipVerify: true}})
			}
			text := c.method + " / HTTP/1.1\r\nHost: a\r\n"
			if c.body != "" {
				text += "Content-Length: 6\r\n"
			}
			s, err := l.open(t.Context(), "10.9.0.1:80")
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			_ = s.SetDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.WriteString(s, text+"\r\n"+c.body); err != nil {
				t.Fatal(err)
			}
			resp, err := http.ReadResponse(bufio.NewReader(s), &http.Request{Method: c.method})
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			<-said
			if _, body := l.get("http://10.9.0.1/"); body != "mine" {
				t.Errorf("another client is answered %q, want mine", body)
			}
		}
		t.Run(name, func(t *testing.T) { test(t, false) })
		t.Run(name+", inside of TLS", func(t *testing.T) { test(t, true) })
	}
}

// answers says to the first request of the first connection, and what nobody asked for behind it; to all others "mine".
func answers(conn net.Conn, first bool, answer, behind string, said chan<- struct{}) {
	r := bufio.NewReader(conn)
	for {
		q, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, q.Body)
		if !first {
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nmine")
			continue
		}
		first = false
		_, _ = io.WriteString(conn, answer)
		time.Sleep(5 * time.Millisecond) // so that it comes by itself
		_, _ = io.WriteString(conn, behind)
		close(said)
	}
}
