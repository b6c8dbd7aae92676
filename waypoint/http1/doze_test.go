package http1_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// TestDozeEndsAWait: a wait that two calls in a row have seen, and neither a new one, nor a request that is on its way.
func TestDozeEndsAWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client, conn := net.Pipe()
		defer client.Close()
		s := http1.NewServerConn(conn, clock)
		var ended chan error
		var q *http1.Request
		read := func() {
			ended = make(chan error, 1)
			go func() {
				var err error
				q, err = s.ReadRequest()
				ended <- err
			}()
			synctest.Wait()
		}
		waits := func(when string) {
			t.Helper()
			synctest.Wait()
			select {
			case err := <-ended:
				t.Fatalf("%s: ReadRequest() = %v, want it to wait", when, err)
			default:
			}
		}
		send := func(text string) {
			t.Helper()
			if _, err := io.WriteString(client, text); err != nil {
				t.Fatal(err)
			}
		}
		s.Doze() // before there is a wait
		s.Doze()
		read()
		s.Doze()
		waits("after one Doze")
		s.Doze()
		if err := <-ended; err != http1.ErrIdle {
			t.Fatalf("after two: ReadRequest() = %v, want ErrIdle", err)
		}
		read()
		s.Doze()
		waits("after one Doze of the next wait")
		send("POST / HTTP/1.1\r\n")
		s.Doze()
		s.Doze()
		waits("within a head")
		send("Host: a\r\nContent-Length: 2\r\n\r\n")
		if err := <-ended; err != nil || q.Method != "POST" {
			t.Fatalf("ReadRequest() = %+v, %v", q, err)
		}
		body := make(chan string, 1)
		go func() {
			p, err := q.Body.Next()
			body <- fmt.Sprint(string(p), err)
		}()
		synctest.Wait()
		s.Doze()
		s.Doze()
		send("ab")
		if got := <-body; got != "ab<nil>" {
			t.Errorf("the body is %q, want ab", got)
		}
		go func() { _, _ = http.ReadResponse(bufio.NewReader(client), nil) }()
		if err := s.Reply(204, "", nil); err != nil {
			t.Fatal(err)
		}
		read()
		s.Doze()
		s.Doze()
		if err := <-ended; err != http1.ErrIdle {
			t.Fatalf("the next wait: ReadRequest() = %v, want ErrIdle", err)
		}
		s = http1.NewServerConn(s.Release(), clock)
		read()
		time.Sleep(clock.IdleTimeout * 3 / 4) // of the bubble's clock: no deadline of the wait before holds
		waits("on the released connection")
		s.Drain()
		if err := <-ended; err != io.EOF {
			t.Errorf("after Drain: ReadRequest() = %v, want io.EOF", err)
		}
		_ = s.Close()
	})
}

// TestRenewForgets: a connection that was renewed knows nothing of the last one.
func TestRenewForgets(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		first, conn := net.Pipe()
		defer first.Close()
		s := http1.NewServerConn(conn, clock)
		exchange := func(client net.Conn, head string) (*http1.Request, *http.Response) {
			t.Helper()
			go func() { _, _ = io.WriteString(client, head) }()
			q, err := s.ReadRequest()
			if err != nil {
				t.Fatal(err)
			}
			answer := make(chan *http.Response, 1)
			go func() {
				resp, _ := http.ReadResponse(bufio.NewReader(client), nil)
				answer <- resp
			}()
			if err := s.Reply(204, "", nil); err != nil {
				t.Fatal(err)
			}
			return q, <-answer
		}
		exchange(first, "GET /secret?a=b HTTP/1.1\r\nHost: first\r\nAuthorization: mine\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
		go func() {
			synctest.Wait()
			s.Doze()
			s.Doze()
		}()
		if _, err := s.ReadRequest(); err != http1.ErrIdle {
			t.Fatalf("ReadRequest() = %v, want ErrIdle", err)
		}
		s.Release()
		s.Wind()
		s.Drain()
		second, conn := net.Pipe()
		defer second.Close()
		s.Renew(conn)
		q, resp := exchange(second, "GET / HTTP/1.1\r\nHost: second\r\n\r\n")
		if v, ok := q.Value("authorization"); ok || q.Len() != 1 || q.Authority != "second" || q.Path != "/" || q.Query || q.Upgrade != "" {
			t.Errorf("the request of the next connection is %+v with authorization %q", q, v)
		}
		if resp == nil || resp.StatusCode != 204 || resp.Close {
			t.Errorf("its response is %+v, want 204 on a connection that stays", resp)
		}
		_ = s.Close()
	})
}

// TestDozeHurtsNoRequest: however a Doze falls together with a request's arrival, the request is served.
func TestDozeHurtsNoRequest(t *testing.T) {
	t.Parallel()
	const requests = 1000
	client, conn := tcpPair(t)
	var mu sync.Mutex
	s := http1.NewServerConn(conn, http1.Config{})
	done := make(chan struct{})
	var others sync.WaitGroup
	others.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				mu.Lock()
				now := s
				mu.Unlock()
				now.Doze()
				runtime.Gosched() // there may be one processor for all
			}
		}
	})
	others.Go(func() {
		defer client.Close()
		r := bufio.NewReader(client)
		for i := range requests {
			text := fmt.Sprintf("POST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody", i)
			cut := i % len(text)
			_, err := io.WriteString(client, text[:cut])
			_, err2 := io.WriteString(client, text[cut:])
			if err = errors.Join(err, err2); err != nil {
				t.Errorf("request %d: %v", i, err)
				return
			}
			resp, err := http.ReadResponse(r, nil)
			if err != nil || resp.StatusCode != 204 {
				t.Errorf("response %d: %v, %v", i, resp, err)
				return
			}
		}
	})
	served, idle := 0, 0
	for {
		q, err := s.ReadRequest()
		if err == io.EOF {
			break
		}
		if err == http1.ErrIdle {
			if idle++; idle%2 == 0 { // on the same connection, or a new one
				mu.Lock()
				s = http1.NewServerConn(s.Release(), http1.Config{})
				mu.Unlock()
			}
			continue
		}
		if err != nil {
			t.Errorf("ReadRequest() = %v", err)
			break
		}
		for err == nil {
			_, err = q.Body.Next()
		}
		if err != io.EOF {
			t.Errorf("body of %s: %v", q.Target, err)
		}
		if err := s.Reply(204, "", nil); err != nil {
			t.Errorf("Reply() = %v", err)
		}
		served++
	}
	close(done)
	_ = s.Close()
	others.Wait()
	if served != requests || idle == 0 {
		t.Errorf("%d requests served, %d waits ended, want %d and some", served, idle, requests)
	}
}
