package http1_test

import (
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// framed is the end of a head and a body, in the ways that HTTP/1.1 has to send one.
var framed = map[string]func(body string) string{
	"a length": func(body string) string { return fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body) },
	"one chunk": func(body string) string {
		return fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\nX: y\r\n\r\n", len(body), body)
	},
	"many chunks": func(body string) string {
		var s strings.Builder
		s.WriteString("Transfer-Encoding: chunked\r\n\r\n")
		for len(body) > 0 {
			n := min(1000, len(body))
			fmt.Fprintf(&s, "%x;x=y\r\n%s\r\n", n, body[:n])
			body = body[n:]
		}
		return s.String() + "0\r\nX: y\r\n\r\n"
	},
}

// pattern is a body of n bytes, of which no part is like another.
func pattern(n int) string {
	var s strings.Builder
	for i := 0; s.Len() < n; i++ {
		fmt.Fprintf(&s, "%d ", i)
	}
	return s.String()[:n]
}

// TestBodiesThatWereReadInPart can be read again, and once more, as long as a buffer holds what has come of them: whatever their framing
// is, however they come, and wherever they begin. What is too long for that is read to its end all the same.
func TestBodiesThatWereReadInPart(t *testing.T) {
	t.Parallel()
	const (
		kept = 60 << 10 // a buffer holds that much of a body
		lost = 66 << 10
	)
	for _, size := range []int{1, 100, 3900, 4100, 10_000, 50_000, 70_000, 200_000} {
		for _, before := range []int{0, 2000, 4000, 50_000} {
			for framing, frame := range framed {
				for _, step := range []int{0, 37, 3000, 20_000} {
					name := fmt.Sprintf("%d bytes in %s, %d at a time, behind a request of %d", size, framing, step, before)
					first := "GET /first HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", before) + "\r\n\r\nPUT / HTTP/1.1\r\nHost: a\r\n"
					body := pattern(size)
					text := frame(body)
					all := first + text + "GET /next HTTP/1.1\r\nHost: a\r\n\r\n"
					conn := &wire{in: []byte(all), step: step}
					came := func() int { return len(all) - len(conn.in) - len(first) - strings.Index(text, "\r\n\r\n") - 4 }
					s := http1.NewServerConn(conn, http1.Config{})
					if _, err := s.ReadRequest(); err != nil {
						t.Fatal(err)
					}
					if err := s.Reply(204, "", nil); err != nil {
						t.Fatal(err)
					}
					q, err := s.ReadRequest()
					if err != nil {
						t.Fatal(err)
					}
					var got string
					gone := false
					for _, pieces := range []int{1, 2, 5, 40, 1 << 30} {
						err = nil
						for n := 0; n < pieces && err == nil; n++ {
							var p []byte
							p, err = q.Body.Next()
							got += string(p)
						}
						if err != nil && err != io.EOF || !strings.HasPrefix(body, got) || err == io.EOF && got != body {
							t.Fatalf("%s: after %d pieces %d bytes were read, %v", name, pieces, len(got), err)
						}
						again := q.Body.Rewind()
						if n := came(); n <= kept && !again || (n >= lost || gone) && again {
							t.Fatalf("%s: rewound after %d pieces, of %d bytes of which %d have come: %v", name, pieces, len(got), n, again)
						}
						if again {
							got = ""
						}
						gone = !again
					}
					if !gone {
						rest, err := readAll(&q.Body)
						if got = string(rest); err != nil {
							t.Fatalf("%s: %v", name, err)
						}
					}
					if v, ok := q.Body.Trailers().Value("x"); got != body || ok != (framing != "a length") || ok && v != "y" {
						t.Fatalf("%s: at last %d bytes, with a trailer %q", name, len(got), v)
					}
					if err := s.Reply(204, "", nil); err != nil {
						t.Fatal(err)
					}
					if q, err := s.ReadRequest(); err != nil || q.Path != "/next" {
						t.Fatalf("%s: the next request: %v", name, err)
					}
				}
			}
		}
	}
}

// endless is a connection whose peer sends the same text for ever, 900 bytes at a time, and reads everything.
type endless struct {
	loop
	text string
	at   int
}

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p[:min(len(p), 900)], e.text[e.at:])
	e.at = (e.at + n) % len(e.text)
	return n, nil
}

// TestReadingAgainAllocatesNothing: what is kept of a body lies where it was read, and its slabs come back.
func TestReadingAgainAllocatesNothing(t *testing.T) {
	body := pattern(70_000)
	for _, size := range []int{10_000, 70_000} {
		text := fmt.Sprintf("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", size, body[:size])
		s := http1.NewServerConn(&endless{text: text}, http1.Config{})
		if n := testing.AllocsPerRun(200, func() {
			q, err := s.ReadRequest()
			if err != nil {
				t.Fatal(err)
			}
			for pass, stop := range []int{3000, 9000, 1 << 20} {
				for n := 0; n < stop && err == nil; {
					var p []byte
					p, err = q.Body.Next()
					n += len(p)
				}
				if pass < 2 && !q.Body.Rewind() {
					t.Fatalf("%d bytes cannot be read again", stop)
				}
			}
			if err != io.EOF {
				t.Fatal(err)
			}
			if err := s.Reply(204, "", nil); err != nil {
				t.Fatal(err)
			}
		}); n > 0 {
			t.Errorf("%d bytes: %v allocations", size, n)
		}
	}
}
