package http1_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// clock configures short and round times.
var clock = http1.Config{
	IdleTimeout: 60 * time.Second, HeadTimeout: 10 * time.Second, BodyTimeout: 20 * time.Second, BodyMinimum: 10,
	StreamTimeout: 30 * time.Second, WriteTimeout: 40 * time.Second, DrainBytes: 1000, DrainTimeout: 5 * time.Second,
}

// drip sends text n bytes at a time, waiting before each portion.
func drip(conn net.Conn, text string, n int, wait time.Duration) {
	for text != "" {
		time.Sleep(wait) // of the bubble's clock
		k := min(n, len(text))
		if _, err := io.WriteString(conn, text[:k]); err != nil {
			return
		}
		text = text[k:]
	}
}

func TestIdleConnectionsEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client, conn := net.Pipe()
		s := http1.NewServerConn(conn, clock)
		begin := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			drip(client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n", 100, 50*time.Second)
			_, _ = http.ReadResponse(bufio.NewReader(client), nil)
		})
		if _, err := s.ReadRequest(); err != nil {
			t.Fatal(err)
		}
		if err := s.Reply(200, "ok", nil); err != nil {
			t.Fatal(err)
		}
		_, err := s.ReadRequest()
		if got := tell(err); got != "0 idle timeout" {
			t.Fatalf("next request: %s, want an idle timeout", got)
		}
		if d := time.Since(begin); d < 50*time.Second+45*time.Second || d > 110*time.Second {
			t.Errorf("ended after %v, want 60 s, or three quarters of it, behind 50 s", d)
		}
		s.Close()
		client.Close()
		wg.Wait()
	})
}

func TestHeadsMustComeInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client, conn := net.Pipe()
		s := http1.NewServerConn(conn, clock)
		begin := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			drip(client, "GET / HTTP/1.1\r\nHost: a\r\n"+strings.Repeat("X: y\r\n", 10)+"\r\n", 1, time.Second)
		})
		_, err := s.ReadRequest()
		if got, d := tell(err), time.Since(begin); got != "408 head timeout" || d != 11*time.Second {
			t.Errorf("a byte each second: %s after %v, want a head timeout 10 s after the first", got, d)
		}
		conn.Close()
		client.Close()
		wg.Wait()
	})
}

func TestBodiesMustProgress(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		bytes int
		each  time.Duration
		want  string
		after time.Duration
	}{
		{"ten bytes in each window", 1, 1900 * time.Millisecond, "ok", 0},
		{"fewer bytes in each window", 1, 2500 * time.Millisecond, "408 body timeout", 40 * time.Second},
		{"nothing", 1, time.Hour, "408 body timeout", 40 * time.Second},
		{"bursts", 15, 25 * time.Second, "ok", 0},
	} {
		for _, head := range []string{"Content-Length: 100\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n64\r\n"} {
			synctest.Test(t, func(t *testing.T) {
				client, conn := net.Pipe()
				s := http1.NewServerConn(conn, clock)
				var wg sync.WaitGroup
				wg.Go(func() {
					_, _ = io.WriteString(client, "POST / HTTP/1.1\r\nHost: a\r\n"+head)
					drip(client, strings.Repeat("x", 100), c.bytes, c.each)
					_, _ = io.WriteString(client, "\r\n0\r\n\r\n")
				})
				q, err := s.ReadRequest()
				if err != nil {
					t.Fatal(err)
				}
				begin, got := time.Now(), "ok"
				if body, err := readAll(&q.Body); err != nil {
					got = tell(err)
				} else if len(body) != 100 {
					t.Errorf("%s: %d bytes", c.name, len(body))
				}
				if d := time.Since(begin); got != c.want || c.after > 0 && d != c.after {
					t.Errorf("%s: %s after %v, want %s after %v", c.name, got, d, c.want, c.after)
				}
				conn.Close()
				client.Close()
				wg.Wait()
			})
		}
	}
}

// TestASlowUpstreamIsNotTheClientsFault: the client's windows run out while the upstream takes its time.
func TestASlowUpstreamIsNotTheClientsFault(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		body := strings.Repeat("x", 300<<10)
		reasons := make(chan string, 1)
		cfg := clock
		cfg.BodyTimeout = 3 * time.Second
		p := &proxy{cfg: cfg, reasons: reasons, dial: func() (net.Conn, error) {
			ours, theirs := net.Pipe()
			go func() {
				defer theirs.Close()
				r := bufio.NewReaderSize(theirs, 64<<10)
				req, err := http.ReadRequest(r)
				if err != nil {
					t.Error(err)
					return
				}
				got := 0
				for buf := make([]byte, 20<<10); ; {
					time.Sleep(4 * time.Second) // per 20 KiB of the 64 that one write brings
					n, err := req.Body.Read(buf)
					if got += n; err != nil {
						break
					}
				}
				fmt.Fprintf(theirs, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n%06d", got)
			}()
			return ours, nil
		}}
		client, conn := net.Pipe()
		go p.serve(conn)
		go func() {
			_, _ = fmt.Fprintf(client, "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		}()
		if got, complete := response(client); got != "200 307200" || !complete {
			t.Errorf("got %s, %v", got, complete)
		}
		client.Close()
		select {
		case r := <-reasons:
			t.Errorf("failed: %s", r)
		default:
		}
	})
}

// upstreamThat makes a proxy whose upstream reads a request and goes on with act.
func upstreamThat(t *testing.T, act func(net.Conn), cfg http1.Config) (client net.Conn, reasons chan string) {
	reasons = make(chan string, 4)
	p := &proxy{cfg: cfg, reasons: reasons, dial: func() (net.Conn, error) {
		ours, theirs := net.Pipe()
		go func() {
			defer theirs.Close()
			if _, err := http.ReadRequest(bufio.NewReader(theirs)); err == nil {
				act(theirs)
			}
		}()
		return ours, nil
	}}
	client, conn := net.Pipe()
	go p.serve(conn)
	t.Cleanup(func() { client.Close() })
	return client, reasons
}

func TestAnUpstreamThatStandsStill(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, sent, answer string
		got                string
		complete           bool
		after              time.Duration
	}{
		{"in its response", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
			"200 hello", false, 60 * time.Second}, // two windows
		{"while it is sent a body", "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("x", 100000), "",
			"504 504 upstream timeout\n", true, 40 * time.Second}, // a write
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				stuck := make(chan struct{})
				client, reasons := upstreamThat(t, func(conn net.Conn) {
					if c.answer != "" {
						_, _ = io.WriteString(conn, c.answer)
					}
					<-stuck
				}, clock)
				go func() { _, _ = io.WriteString(client, c.sent) }()
				begin := time.Now()
				if got, complete := response(client); got != c.got || complete != c.complete {
					t.Errorf("got %s, complete: %v, want %s, %v", got, complete, c.got, c.complete)
				}
				if got, d := <-reasons, time.Since(begin); got != "504 upstream timeout" || d != c.after {
					t.Errorf("ended after %v with %s, want an upstream timeout after %v", d, got, c.after)
				}
				close(stuck)
			})
		})
	}
}

func TestDeadlineOfAnExchange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for _, answer := range []string{"", "HTTP/1.1 2", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"} {
			ours, theirs := net.Pipe()
			go func() {
				_, _ = http.ReadRequest(bufio.NewReader(theirs))
				_, _ = io.WriteString(theirs, answer)
			}()
			up := http1.NewClientConn(ours, clock)
			begin := time.Now()
			up.SetDeadline(begin.Add(7 * time.Second))
			if err := up.WriteRequest(request(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"), nil); err != nil {
				t.Fatal(err)
			}
			p, err := up.ReadResponse()
			if err == nil {
				_, err = readAll(&p.Body)
			}
			if d := time.Since(begin); err == nil || tell(err) != "504 upstream timeout" || d != 7*time.Second {
				t.Errorf("%q: %v after %v, want a timeout after 7 s", answer, err, d)
			}
			up.Close()
			theirs.Close()
		}
	})
}

func TestAClientThatReadsNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client, reasons := upstreamThat(t, func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
		}, clock)
		begin := time.Now()
		if _, err := io.WriteString(client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if got, d := <-reasons, time.Since(begin); got != "0 client closed" || d != 40*time.Second {
			t.Errorf("ended after %v with %s, want the write's timeout", d, got)
		}
	})
}

func TestDrainClosesBetweenRequests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client, conn := net.Pipe()
		s := http1.NewServerConn(conn, clock)
		ended := make(chan error, 1)
		go func() {
			_, err := s.ReadRequest()
			ended <- err
		}()
		synctest.Wait()
		begin := time.Now()
		s.Drain()
		if err := <-ended; err != io.EOF || time.Since(begin) != 0 {
			t.Errorf("the idle connection ended with %v after %v, want EOF at once", err, time.Since(begin))
		}
		conn.Close()
		client.Close()

		client, conn = net.Pipe()
		s = http1.NewServerConn(conn, clock)
		go func() { _, _ = io.WriteString(client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n") }()
		if _, err := s.ReadRequest(); err != nil {
			t.Fatal(err)
		}
		s.Drain()
		go func() { ended <- s.Reply(200, "ok", nil) }()
		if resp, err := http.ReadResponse(bufio.NewReader(client), nil); err != nil || !resp.Close {
			t.Errorf("the busy connection answered %v, %v, want a response that closes", resp, err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if _, err := s.ReadRequest(); err != io.EOF {
			t.Errorf("the busy connection goes on: %v", err)
		}
		conn.Close()
		client.Close()
	})
}

// TestWindServesOneMore: unlike Drain it lets an idle connection have the request that is on its way.
func TestWindServesOneMore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client, conn := net.Pipe()
		defer client.Close()
		s := http1.NewServerConn(conn, clock)
		defer conn.Close()
		served := make(chan error, 1)
		go func() {
			if _, err := s.ReadRequest(); err != nil {
				served <- err
				return
			}
			served <- s.Reply(200, "ok", nil)
		}()
		synctest.Wait()
		s.Wind()
		synctest.Wait()
		go func() { _, _ = io.WriteString(client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n") }()
		if resp, err := http.ReadResponse(bufio.NewReader(client), nil); err != nil || resp.StatusCode != 200 || !resp.Close {
			t.Errorf("the request behind Wind got %v, %v, want 200 that closes", resp, err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		if _, err := s.ReadRequest(); err != io.EOF {
			t.Errorf("the connection goes on: %v", err)
		}
	})
}

// TestUnreadBodiesAreDrainedOrClosed: after a reply that did not wait for the body, the connection goes on only if the
// rest is short and comes soon.
func TestUnreadBodiesAreDrainedOrClosed(t *testing.T) {
	t.Parallel()
	const next = "GET /next HTTP/1.1\r\nHost: a\r\n\r\n"
	for _, c := range []struct {
		name, head, body string
		next             bool
		after            time.Duration
	}{
		{name: "a short rest", head: "Content-Length: 500\r\n\r\n", body: strings.Repeat("x", 500), next: true},
		{name: "a short rest in chunks", head: "Transfer-Encoding: chunked\r\n\r\n", body: "3\r\nabc\r\n0\r\nX: y\r\n\r\n", next: true},
		{name: "a long rest", head: "Content-Length: 5000\r\n\r\n", body: strings.Repeat("x", 5000)},
		{name: "a long rest in chunks", head: "Transfer-Encoding: chunked\r\n\r\n", body: strings.Repeat("3\r\nabc\r\n", 500) + "0\r\n\r\n"},
		{name: "a rest that never comes", head: "Content-Length: 500\r\n\r\n", after: 5 * time.Second},
		{name: "a body that waits for 100", head: "Content-Length: 500\r\nExpect: 100-continue\r\n\r\n"},
		{name: "a broken rest", head: "Transfer-Encoding: chunked\r\n\r\n", body: "x\r\n"},
	} {
		synctest.Test(t, func(t *testing.T) {
			client, conn := net.Pipe()
			s := http1.NewServerConn(conn, clock)
			go func() {
				_, _ = io.WriteString(client, "POST / HTTP/1.1\r\nHost: a\r\n"+c.head)
				_, _ = http.ReadResponse(bufio.NewReader(client), nil)
				if c.body != "" {
					_, _ = io.WriteString(client, c.body+next)
				}
			}()
			if _, err := s.ReadRequest(); err != nil {
				t.Fatal(err)
			}
			if err := s.Reply(403, "no", nil); err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			q, err := s.ReadRequest()
			if c.next && (err != nil || q.Path != "/next") || !c.next && err != io.EOF || time.Since(begin) != c.after {
				t.Errorf("%s: next request: %v after %v, want one: %v after %v", c.name, err, time.Since(begin), c.next, c.after)
			}
			conn.Close()
			client.Close()
		})
	}
}
