package http1_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// TestTheRestOfABodyIsDrained: the response ends before the request, and the client goes on all the same.
func TestTheRestOfABodyIsDrained(t *testing.T) {
	t.Parallel()
	upstream := listen(t, func(conn net.Conn) {
		defer conn.Close()
		r := bufio.NewReader(conn)
		if _, err := http.ReadRequest(r); err != nil {
			t.Error(err)
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")
		_, _ = io.Copy(io.Discard, r)
	})
	p := &proxy{dial: func() (net.Conn, error) { return net.Dial("tcp", upstream) }}
	conn := dial(t, p.listen(t))
	r := bufio.NewReader(conn)
	for i := range 3 {
		for _, half := range []struct{ first, second string }{
			{"Content-Length: 10\r\n\r\nhello", "world"},
			{"Transfer-Encoding: chunked\r\n\r\n5\r\nhe", "llo\r\n5\r\nworld\r\n0\r\n\r\n"},
		} {
			write(t, conn, "POST / HTTP/1.1\r\nHost: a\r\n"+half.first)
			resp, err := http.ReadResponse(r, nil)
			if err != nil || resp.StatusCode != 200 {
				t.Fatalf("round %d: %v, %v", i, resp, err)
			}
			if body, err := io.ReadAll(resp.Body); string(body) != "ok" || err != nil {
				t.Fatalf("round %d: %q, %v", i, body, err)
			}
			write(t, conn, half.second)
		}
	}
	if n := p.dialed.Load(); n != 6 {
		t.Errorf("6 requests of which no upstream read all took %d upstream connections, want 6", n)
	}
}

func TestRetryAfterAnUpstreamThatCloses(t *testing.T) {
	t.Parallel()
	for _, sent := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
		chunkedHead + "5\r\nhello\r\n0\r\nX: y\r\n\r\n",
	} {
		down, dead, alive := &wire{in: []byte(sent)}, &wire{}, &wire{in: []byte(answer)}
		s := http1.NewServerConn(down, http1.Config{})
		q, err := s.ReadRequest()
		if err != nil {
			t.Fatal(err)
		}
		x := s.Exchange(http1.NewClientConn(dead, http1.Config{}))
		if err := x.Send(nil); err != nil {
			t.Fatal(err)
		}
		if _, err = x.Receive(); err == nil || tell(err) != "503 upstream closed" {
			t.Fatalf("a dead upstream: %v", err)
		}
		if s.Answered() || !q.Body.Rewind() {
			t.Fatalf("%q cannot be tried again", sent)
		}
		carry(t, s, alive)
		if a, b := dead.out.String(), alive.out.String(); a != b || !strings.HasPrefix(down.out.String(), "HTTP/1.1 200 OK\r\n") {
			t.Errorf("%q went as %q, then as %q, answered by %q", sent, a, b, down.out.String())
		}
	}
}

// TestRequestsWithoutAClient: what mirrors or probes has no client to respond to.
func TestRequestsWithoutAClient(t *testing.T) {
	t.Parallel()
	conn := &wire{step: 50}
	up := http1.NewClientConn(conn, http1.Config{})
	for i := range 2 {
		if !up.Reusable() {
			t.Fatalf("before request %d the connection is spent", i)
		}
		conn.in = []byte("HTTP/1.1 100 Continue\r\n\r\n" + answer)
		if err := up.WriteRequest(request(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"), nil); err != nil {
			t.Fatal(err)
		}
		for status := 0; status < 200; {
			if up.Reusable() {
				t.Fatal("reusable before the response")
			}
			p, err := up.ReadResponse()
			if err != nil {
				t.Fatal(err)
			}
			if status = p.Status; status < 200 {
				continue
			}
			if up.Reusable() {
				t.Fatal("reusable before the end of the body")
			}
			if body, err := readAll(&p.Body); len(body) != 15 || err != nil {
				t.Fatalf("body %q, %v", body, err)
			}
		}
	}
	if !up.Reusable() {
		t.Error("the connection is spent")
	}
}

func TestABadRequestCostsNoUpstreamConnection(t *testing.T) {
	t.Parallel()
	s := http1.NewServerConn(&wire{in: []byte(chunkedHead + "x\r\n")}, http1.Config{})
	if _, err := s.ReadRequest(); err != nil {
		t.Fatal(err)
	}
	conn := &wire{}
	up := http1.NewClientConn(conn, http1.Config{})
	if err := s.Exchange(up).Send(nil); err == nil || tell(err) != "400 bad chunk" || !up.Reusable() || conn.writes > 0 {
		t.Errorf("Send = %v, reusable: %v, %d writes", err, up.Reusable(), conn.writes)
	}
}

func TestAbortEndsTheUpload(t *testing.T) {
	t.Parallel()
	client, proxied := net.Pipe()
	ours, theirs := net.Pipe()
	go func() { _, _ = io.WriteString(client, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhello") }()
	s := http1.NewServerConn(proxied, http1.Config{})
	if _, err := s.ReadRequest(); err != nil {
		t.Fatal(err)
	}
	x := s.Exchange(http1.NewClientConn(ours, http1.Config{}))
	if err := x.Send(nil); err != nil {
		t.Fatal(err)
	}
	req, err := http.ReadRequest(bufio.NewReader(theirs))
	if err != nil {
		t.Fatal(err)
	}
	x.Abort()
	if body, err := io.ReadAll(req.Body); err == nil {
		t.Errorf("the upstream takes %q for a complete body", body)
	}
	replied := make(chan error, 1)
	go func() { replied <- s.Reply(504, "too late", nil) }()
	r := bufio.NewReader(client)
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 504 {
		t.Fatalf("after Abort: %v, %v, want 504", resp, err)
	}
	if err := <-replied; err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.WriteString(client, "worldGET /next HTTP/1.1\r\nHost: a\r\n\r\n") }()
	if q, err := s.ReadRequest(); err != nil || q.Path != "/next" {
		t.Errorf("the next request: %v, %v", q, err)
	}
	client.Close()
	s.Close()
}

// TestUpstreamDiesAtEachByte: whatever a client takes for a complete response must be one.
func TestUpstreamDiesAtEachByte(t *testing.T) {
	t.Parallel()
	for _, whole := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\nX-Sum: 1\r\n\r\n",
		"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
	} {
		for n := 0; n <= len(whole); n++ {
			reasons := make(chan string, 1)
			p := &proxy{reasons: reasons, dial: func() (net.Conn, error) {
				ours, theirs := net.Pipe()
				go func() {
					_, _ = http.ReadRequest(bufio.NewReader(theirs))
					_, _ = io.WriteString(theirs, whole[:n])
					theirs.Close()
				}()
				return ours, nil
			}}
			client, proxied := net.Pipe()
			go p.serve(proxied)
			go func() { _, _ = io.WriteString(client, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n") }()
			got, complete := response(client)
			switch {
			case n == len(whole):
				if !complete || got != "200 hello" {
					t.Fatalf("%q: client got %s, complete: %v", whole, got, complete)
				}
			case complete && !strings.HasPrefix(got, "502 ") && !strings.HasPrefix(got, "503 "):
				t.Fatalf("%q cut at %d: client got %s, and takes it for complete", whole, n, got)
			default:
				want := "502 upstream cut"
				if n == 0 || whole[n-1] == '\n' && strings.Contains(whole[:n], "103") && strings.Count(whole[:n], "\r\n\r\n") == 1 && strings.HasSuffix(whole[:n], "\r\n\r\n") {
					want = "503 upstream closed"
				}
				if reason := <-reasons; reason != want {
					t.Fatalf("%q cut at %d: %s, want %s", whole, n, reason, want)
				}
			}
			client.Close()
		}
	}
}

// response reads one final response as a client does and tells whether it is complete.
func response(conn net.Conn) (string, bool) {
	r := bufio.NewReader(conn)
	for {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return err.Error(), false
		}
		if resp.StatusCode < 200 {
			continue
		}
		body, err := io.ReadAll(resp.Body)
		return fmt.Sprintf("%d %s", resp.StatusCode, body), err == nil
	}
}

// TestClientDiesAtEachByte: whatever an upstream takes for a complete request must be one.
func TestClientDiesAtEachByte(t *testing.T) {
	t.Parallel()
	for _, whole := range []string{
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\nX-Sum: 1\r\n\r\n",
	} {
		for n := 0; n <= len(whole); n++ {
			seen := make(chan string, 1)
			p := &proxy{dial: func() (net.Conn, error) {
				ours, theirs := net.Pipe()
				go func() {
					defer theirs.Close()
					req, err := http.ReadRequest(bufio.NewReader(theirs))
					if err != nil {
						return
					}
					body, err := io.ReadAll(req.Body)
					if err == nil {
						seen <- string(body)
						_, _ = io.WriteString(theirs, "HTTP/1.1 204 No Content\r\n\r\n")
					}
				}()
				return ours, nil
			}}
			client, proxied := net.Pipe()
			done := make(chan struct{})
			go func() { p.serve(proxied); close(done) }()
			if _, err := io.WriteString(client, whole[:n]); err != nil {
				t.Fatal(err)
			}
			if n == len(whole) {
				if got, complete := response(client); got != "204 " || !complete {
					t.Fatalf("%q: client got %s, %v", whole, got, complete)
				}
			}
			client.Close()
			<-done
			select {
			case body := <-seen:
				if n < len(whole) || body != "hello" {
					t.Fatalf("%q cut at %d: upstream saw a request with body %q", whole, n, body)
				}
			default:
				if n == len(whole) {
					t.Fatalf("%q did not reach the upstream", whole)
				}
			}
		}
	}
}
