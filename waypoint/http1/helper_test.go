package http1_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// carry takes the request that s has read to an upstream, and its response back.
func carry(t *testing.T, s *http1.ServerConn, up net.Conn) {
	t.Helper()
	x := s.Exchange(http1.NewClientConn(up, http1.Config{}))
	if err := x.Send(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := x.Receive(); err != nil {
		t.Fatal(err)
	}
	if err := x.Respond(nil); err != nil {
		t.Fatal(err)
	}
}

// wire is a connection whose peer sends what it is given, step bytes at a time, and then ends.
type wire struct {
	in     []byte
	step   int
	out    bytes.Buffer
	writes int
}

func (w *wire) Read(p []byte) (int, error) {
	if len(w.in) == 0 {
		return 0, io.EOF
	}
	n := min(len(p), len(w.in))
	if w.step > 0 {
		n = min(n, w.step)
	}
	copy(p, w.in[:n])
	w.in = w.in[n:]
	return n, nil
}

func (w *wire) Write(p []byte) (int, error)      { w.writes++; return w.out.Write(p) }
func (w *wire) Close() error                     { return nil }
func (w *wire) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (w *wire) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (w *wire) SetDeadline(time.Time) error      { return nil }
func (w *wire) SetReadDeadline(time.Time) error  { return nil }
func (w *wire) SetWriteDeadline(time.Time) error { return nil }

// story is one case of a file in testdata.
type story struct {
	name, method, sent string
	want               []string
}

func stories(t testing.TB, file string) []story {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	var all []story
	for i, line := range strings.Split(string(text), "\n") {
		mark, rest, _ := strings.Cut(line, " ")
		switch {
		case line == "":
		case mark == "#":
			if len(all) == 0 || all[len(all)-1].want != nil {
				all = append(all, story{method: "GET"})
			}
			all[len(all)-1].name = rest
		case mark == "?":
			all[len(all)-1].method = rest
		case mark == ">":
			s, err := strconv.Unquote(rest)
			if err != nil {
				t.Fatalf("%s:%d: %v", file, i+1, err)
			}
			all[len(all)-1].sent += s
		case mark == "=":
			all[len(all)-1].want = append(all[len(all)-1].want, rest)
		default:
			t.Fatalf("%s:%d: line begins with %q", file, i+1, mark)
		}
	}
	if len(all) < 5 {
		t.Fatalf("%s has %d stories: the test is blind", file, len(all))
	}
	return all
}

func tell(err error) string {
	x, ok := errors.AsType[*http1.Error](err)
	if !ok {
		return "no http1.Error: " + err.Error()
	}
	return fmt.Sprintf("%d %s", x.Status, x.Reason)
}

func readAll(b *http1.Body) ([]byte, error) {
	all := []byte{}
	for {
		p, err := b.Next()
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		if len(p) == 0 {
			return all, errors.New("an empty piece")
		}
		all = append(all, p...)
	}
}

func tellBody(b *http1.Body, declared string) string {
	body, err := readAll(b)
	if err != nil {
		return declared + " " + tell(err)
	}
	s := fmt.Sprintf("%s %q", declared, body)
	for n, v := range b.Trailers().All() {
		s += fmt.Sprintf(" %s: %s", n, v)
	}
	return s
}

func tellRequest(q *http1.Request) string {
	path := q.Path
	if q.Query {
		path += "?" + q.RawQuery
	}
	_, length := q.Value("content-length")
	declared := "none"
	switch n := q.Body.Len(); {
	case n < 0:
		declared = "chunked"
	case length:
		declared = strconv.FormatInt(n, 10)
	}
	s := fmt.Sprintf("%s %s %s ", q.Method, q.Authority, path)
	if declared == "none" {
		return s + declared
	}
	return s + tellBody(&q.Body, declared)
}

func tellResponse(p *http1.Response, method string) string {
	declared := ""
	_, length := p.Value("content-length")
	_, coded := p.Value("transfer-encoding")
	switch {
	case p.Status < 200, p.Status == 204, p.Status == 304, method == "HEAD":
		return fmt.Sprintf("%d none", p.Status)
	case length:
		declared = strconv.FormatInt(p.Body.Len(), 10)
	case coded:
		declared = "chunked"
	default:
		declared = "close"
	}
	return fmt.Sprintf("%d %s", p.Status, tellBody(&p.Body, declared))
}
