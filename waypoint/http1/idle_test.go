package http1_test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// TestWaitingOnTCP: a real TCP connection that waits for its second request, and how the wait ends. Such a connection waits
// without a buffer, by other means than all else is read by.
func TestWaitingOnTCP(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		end    func(client *net.TCPConn, s *http1.ServerConn) error
		eof    bool
		reason http1.Reason
		target string
	}{
		"with a request": {
			end: func(c *net.TCPConn, _ *http1.ServerConn) error {
				_, err := io.WriteString(c, "GET /2 HTTP/1.1\r\nHost: a\r\n\r\n")
				return err
			},
			target: "/2",
		},
		"with half of one": {
			end: func(c *net.TCPConn, _ *http1.ServerConn) error {
				_, err := io.WriteString(c, "GET /2 HT")
				return firstOf(err, c.CloseWrite())
			},
			reason: http1.ClientClosed,
		},
		"with the client's end":   {end: func(c *net.TCPConn, _ *http1.ServerConn) error { return c.CloseWrite() }, eof: true},
		"with the client's reset": {end: func(c *net.TCPConn, _ *http1.ServerConn) error { return firstOf(c.SetLinger(0), c.Close()) }, reason: http1.ClientClosed},
		"with Drain":              {end: func(_ *net.TCPConn, s *http1.ServerConn) error { s.Drain(); return nil }, eof: true},
		"with the idle time":      {end: func(*net.TCPConn, *http1.ServerConn) error { return nil }, reason: http1.IdleTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, conn := tcpPair(t)
			cfg := http1.Config{}
			if c.reason == http1.IdleTimeout {
				cfg.IdleTimeout = 200 * time.Millisecond
			}
			s := http1.NewServerConn(conn, cfg)
			defer s.Close()
			if _, err := io.WriteString(client, "GET /1 HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			if q, err := s.ReadRequest(); err != nil || q.Target != "/1" {
				t.Fatalf("ReadRequest() = %+v, %v", q, err)
			}
			if err := s.Reply(204, "", nil); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- c.end(client, s) }()
			q, err := s.ReadRequest()
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			switch {
			case c.target != "":
				if err != nil || q.Target != c.target {
					t.Errorf("ReadRequest() = %+v, %v, want %s", q, err, c.target)
				}
			case c.eof:
				if err != io.EOF {
					t.Errorf("ReadRequest() = %v, want io.EOF", err)
				}
			default:
				if got := reasonOf(err); got != c.reason {
					t.Errorf("ReadRequest() = %v, a %v, want %v", err, got, c.reason)
				}
			}
		})
	}
}

func firstOf(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

func reasonOf(err error) http1.Reason {
	if e, ok := errors.AsType[*http1.Error](err); ok {
		return e.Reason
	}
	return http1.ReasonUnknown
}

// TestWritingOnTCP: a peer gets all that a socket does not take at once, and one that takes nothing is given up.
func TestWritingOnTCP(t *testing.T) {
	t.Parallel()
	body := strings.Repeat("0123456789abcdef", 1<<20) // more than socket buffers grow to
	for name, reads := range map[string]bool{"who reads": true, "who does not": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, conn := tcpPair(t)
			cfg := http1.Config{WriteTimeout: time.Minute}
			if !reads {
				cfg.WriteTimeout = 100 * time.Millisecond
			}
			s := http1.NewServerConn(conn, cfg)
			defer s.Close()
			if _, err := io.WriteString(client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			if _, err := s.ReadRequest(); err != nil {
				t.Fatal(err)
			}
			if !reads {
				if err := s.Reply(200, body, nil); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("Reply() to a peer that reads nothing = %v, want a deadline's end", err)
				}
				return
			}
			got := make(chan string, 1)
			go func() {
				resp, err := http.ReadResponse(bufio.NewReader(client), nil)
				if err != nil {
					got <- err.Error()
					return
				}
				b, err := io.ReadAll(resp.Body)
				if err != nil {
					b = []byte(err.Error())
				}
				got <- string(b)
			}()
			if err := s.Reply(200, body, nil); err != nil {
				t.Errorf("Reply() = %v", err)
			}
			if b := <-got; b != body {
				t.Errorf("%d bytes came, %.40q, want %d", len(b), b, len(body))
			}
		})
	}
}

// tcpPair is both ends of a connection; the first is closed with the test.
func tcpPair(t *testing.T) (client *net.TCPConn, conn net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dialled, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialled.Close() })
	if conn, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	return dialled.(*net.TCPConn), conn
}
