package http1_test

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// typical is what a browser or a mesh client sends.
const typical = "GET /api/v1/carts/42?fields=items,total HTTP/1.1\r\nHost: cart.shop.svc.cluster.local\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36\r\n" +
	"Accept: application/json, text/plain, */*\r\nAccept-Encoding: gzip, deflate, br\r\nAccept-Language: en-US,en;q=0.9\r\nCookie: session=0123456789abcdef0123456789abcdef; theme=dark\r\n" +
	"Authorization: Bearer eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl\r\nX-Request-Id: 00000000-0000-4000-8000-000000000000\r\nX-Forwarded-For: 10.0.0.1\r\n" +
	"X-Forwarded-Proto: http\r\nTraceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nConnection: keep-alive\r\nX-Custom: value\r\n\r\n"

const answer = "HTTP/1.1 200 OK\r\nServer: app/1\r\nDate: Sun, 22 Nov 2026 17:00:00 GMT\r\nContent-Type: application/json\r\nContent-Length: 15\r\nVary: Accept\r\n\r\n{\"hello\":\"you\"}"

// loop is a connection whose peer sends the same messages for ever, and reads everything.
type loop struct {
	messages [][]byte
	i        int
	wrote    int
}

func (l *loop) Read(p []byte) (int, error) {
	m := l.messages[l.i%len(l.messages)]
	l.i++
	return copy(p, m), nil
}

func (l *loop) Write(p []byte) (int, error)      { l.wrote += len(p); return len(p), nil }
func (l *loop) Close() error                     { return nil }
func (l *loop) LocalAddr() net.Addr              { return nil }
func (l *loop) RemoteAddr() net.Addr             { return nil }
func (l *loop) SetDeadline(time.Time) error      { return nil }
func (l *loop) SetReadDeadline(time.Time) error  { return nil }
func (l *loop) SetWriteDeadline(time.Time) error { return nil }

// differing returns requests that differ in their X-Request-Id, as those of many users do, or copies of one.
func differing(n int) (all [][]byte) {
	for i := range n {
		all = append(all, []byte(strings.Replace(typical, "8000-00000000000", "8000-0000000000"+string(rune('0'+i%10)), 1)))
	}
	return all
}

// once carries one request through both connections, as a proxy does: read, look, edit, send, receive, edit, respond.
func once(tb testing.TB, s *http1.ServerConn, up *http1.ClientConn, e *http1.Edits) {
	q, err := s.ReadRequest()
	if err != nil {
		tb.Fatal(err)
	}
	if v, ok := q.Value("x-request-id"); !ok || v == "" {
		tb.Fatal("no x-request-id")
	}
	if _, ok := q.Value("x-absent"); ok || q.Path == "" || q.Authority == "" {
		tb.Fatal("misread")
	}
	e.Reset()
	e.Set("x-envoy-attempt-count", "1")
	e.Set("x-forwarded-proto", "https")
	e.Remove("x-custom")
	x := s.Exchange(up)
	if err := x.Send(e); err != nil {
		tb.Fatal(err)
	}
	if _, err := x.Receive(); err != nil {
		tb.Fatal(err)
	}
	e.Reset()
	e.Set("server", "istio-envoy")
	if err := x.Respond(e); err != nil {
		tb.Fatal(err)
	}
	if !up.Reusable() {
		tb.Fatal("the upstream connection is spent")
	}
}

func pair(requests ...[]byte) (*http1.ServerConn, *http1.ClientConn) {
	return http1.NewServerConn(&loop{messages: requests}, http1.Config{}), http1.NewClientConn(&loop{messages: [][]byte{[]byte(answer)}}, http1.Config{})
}

func TestAllocations(t *testing.T) {
	var e http1.Edits
	for _, c := range []struct {
		name     string
		requests [][]byte
		most     float64
	}{
		{"the same request again", differing(1), 0},
		{"another request each time", differing(7), 1},
		{"a small body", [][]byte{[]byte("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello")}, 0},
		{"a small body in chunks", [][]byte{[]byte("POST / HTTP/1.1\r\nHost: a\r\nX-Request-Id: 1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")}, 0},
	} {
		if i := bytes.Index(c.requests[0], []byte("X-Request-Id")); i < 0 {
			c.requests[0] = bytes.Replace(c.requests[0], []byte("Host: a\r\n"), []byte("Host: a\r\nX-Request-Id: 1\r\n"), 1)
		}
		s, up := pair(c.requests...)
		if n := testing.AllocsPerRun(200, func() { once(t, s, up, &e) }); n > c.most {
			t.Errorf("%s: %v allocations for request and response, want at most %v", c.name, n, c.most)
		}
	}
}

func TestOneWritePerMessage(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, sent, answer string
		writes             int
	}{
		{"no bodies", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 204 No Content\r\n\r\n", 1},
		{"small bodies", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", answer, 1},
		{"chunks", chunkedHead + strings.Repeat("5\r\nhello\r\n", 20) + "0\r\nX: y\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("5\r\nhello\r\n", 20) + "0\r\n\r\n", 1},
	} {
		down, upstream := &wire{in: []byte(c.sent)}, &wire{in: []byte(c.answer)}
		s := http1.NewServerConn(down, http1.Config{})
		if _, err := s.ReadRequest(); err != nil {
			t.Fatal(err)
		}
		carry(t, s, upstream)
		if down.writes != c.writes || upstream.writes != c.writes {
			t.Errorf("%s: %d writes to the client, %d to the upstream, want %d", c.name, down.writes, upstream.writes, c.writes)
		}
	}
}

// cpu reports the processor time of an operation: the wall's means nothing on a machine that others use.
func cpu(b *testing.B) func() {
	used := func() int64 {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return u.Utime.Nano() + u.Stime.Nano()
	}
	begin := used()
	return func() { b.ReportMetric(float64(used()-begin)/float64(b.N), "cpu-ns/op") }
}

// BenchmarkHeadOfNetHTTP is the same head read by net/http, which answers nothing here.
func BenchmarkHeadOfNetHTTP(b *testing.B) {
	in := bytes.NewReader(nil)
	r := bufio.NewReader(in)
	b.ReportAllocs()
	done := cpu(b)
	for b.Loop() {
		in.Reset([]byte(typical))
		r.Reset(in)
		if _, err := http.ReadRequest(r); err != nil {
			b.Fatal(err)
		}
	}
	done()
}

// TestBulkIsWrittenAsItIsRead: no small writes between large ones, however the body is framed.
func TestBulkIsWrittenAsItIsRead(t *testing.T) {
	t.Parallel()
	body := strings.Repeat("x", 2<<20)
	for name, sent := range map[string]string{
		"length": "HTTP/1.1 200 OK\r\nContent-Length: 2097152\r\n\r\n" + body,
		"close":  "HTTP/1.1 200 OK\r\n\r\n" + body,
		"chunks": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("8000\r\n"+body[:32<<10]+"\r\n", 64) + "0\r\n\r\n",
	} {
		down := &wire{in: []byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n")}
		s := http1.NewServerConn(down, http1.Config{})
		if _, err := s.ReadRequest(); err != nil {
			t.Fatal(err)
		}
		carry(t, s, &wire{in: []byte(sent)})
		resp, err := http.ReadResponse(bufio.NewReader(&down.out), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(resp.Body); string(got) != body || err != nil {
			t.Errorf("%s: %d bytes arrived, %v", name, len(got), err)
		}
		if down.writes > 36 {
			t.Errorf("%s: 2 MiB took %d writes, want one for each 64 KiB read, and a few", name, down.writes)
		}
	}
}

func BenchmarkRequestHead(b *testing.B) {
	for name, n := range map[string]int{"same": 1, "differing": 7} {
		b.Run(name, func(b *testing.B) {
			s := http1.NewServerConn(&loop{messages: differing(n)}, http1.Config{})
			b.ReportAllocs()
			done := cpu(b)
			for b.Loop() {
				if _, err := s.ReadRequest(); err != nil {
					b.Fatal(err)
				}
				if err := s.Reply(204, "", nil); err != nil {
					b.Fatal(err)
				}
			}
			done()
		})
	}
}

func BenchmarkExchange(b *testing.B) {
	for name, n := range map[string]int{"same": 1, "differing": 7} {
		b.Run(name, func(b *testing.B) {
			s, up := pair(differing(n)...)
			var e http1.Edits
			b.ReportAllocs()
			done := cpu(b)
			for b.Loop() {
				once(b, s, up, &e)
			}
			done()
		})
	}
}

func BenchmarkValue(b *testing.B) {
	q := request(b, typical)
	for _, name := range []string{"x-request-id", "x-custom", "x-absent"} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			done := cpu(b)
			for b.Loop() {
				q.Value(name)
			}
			done()
		})
	}
}
