package http1_test

import (
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// steps are in what portions bytes come: a parser must not care.
var steps = []int{0, 1, 2, 7}

func requests(sent []byte, step int) (got []string) {
	s := http1.NewServerConn(&wire{in: sent, step: step}, http1.Config{})
	defer s.Close()
	for {
		q, err := s.ReadRequest()
		if err == io.EOF {
			return got
		}
		if err != nil {
			return append(got, tell(err))
		}
		got = append(got, tellRequest(q))
		if err := s.Reply(204, "", nil); err != nil {
			return append(got, err.Error())
		}
	}
}

func TestRequestCorpus(t *testing.T) {
	t.Parallel()
	for _, c := range stories(t, "requests.txt") {
		for _, step := range steps {
			if diff := cmp.Diff(c.want, requests([]byte(c.sent), step)); diff != "" {
				t.Errorf("%s, %d bytes at a time (-want +got):\n%s", c.name, step, diff)
			}
		}
	}
}

func TestResponseCorpus(t *testing.T) {
	t.Parallel()
	for _, c := range stories(t, "responses.txt") {
		for _, step := range steps {
			conn := &wire{in: []byte(c.sent), step: step}
			up := http1.NewClientConn(conn, http1.Config{})
			if err := up.WriteRequest(request(t, c.method+" / HTTP/1.1\r\nHost: a\r\n\r\n"), nil); err != nil {
				t.Fatal(err)
			}
			var got []string
			for range c.want {
				p, err := up.ReadResponse()
				if err != nil {
					got = append(got, tell(err))
					break
				}
				got = append(got, tellResponse(p, c.method))
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("%s, %d bytes at a time (-want +got):\n%s", c.name, step, diff)
			}
		}
	}
}

const chunkedHead = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"

func TestChunkCorpus(t *testing.T) {
	t.Parallel()
	for _, c := range stories(t, "chunks.txt") {
		for _, step := range steps {
			got := requests([]byte(chunkedHead+c.sent), step)
			if diff := cmp.Diff([]string{"POST a / chunked " + c.want[0]}, got); diff != "" {
				t.Errorf("%s, %d bytes at a time (-want +got):\n%s", c.name, step, diff)
			}
		}
	}
}

// request parses one request.
func request(t testing.TB, text string) *http1.Request {
	t.Helper()
	q, err := http1.NewServerConn(&wire{in: []byte(text)}, http1.Config{}).ReadRequest()
	if err != nil {
		t.Fatalf("ReadRequest(%q): %v", text, err)
	}
	return q
}

func TestHeadBounds(t *testing.T) {
	t.Parallel()
	head := func(n, each int) string {
		return "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("X: "+strings.Repeat("y", each)+"\r\n", n) + "\r\n"
	}
	for name, c := range map[string]struct {
		sent, want string
		cfg        http1.Config
	}{
		"100 fields":          {sent: head(99, 1), want: "GET a / none"},
		"101 fields":          {sent: head(100, 1), want: "431 head too large"},
		"60 KiB":              {sent: head(1, 60<<10-len(head(1, 0))), want: "GET a / none"},
		"a byte more":         {sent: head(1, 60<<10-len(head(1, 0))+1), want: "431 head too large"},
		"a line without end":  {sent: strings.Repeat("G", 61<<10), want: "431 head too large"},
		"a configured limit":  {sent: head(3, 1), want: "431 head too large", cfg: http1.Config{Fields: 3}},
		"configured bytes":    {sent: head(3, 100), want: "431 head too large", cfg: http1.Config{HeadBytes: 200}},
		"a limit nobody has":  {sent: head(1, 61<<10), want: "431 head too large", cfg: http1.Config{HeadBytes: 1 << 20}},
		"a long field's name": {sent: "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("x", 50<<10) + ": y\r\n\r\n", want: "GET a / none"},
	} {
		for _, step := range []int{0, 1000} {
			s := http1.NewServerConn(&wire{in: []byte(c.sent), step: step}, c.cfg)
			got := ""
			if q, err := s.ReadRequest(); err != nil {
				got = tell(err)
			} else {
				got = tellRequest(q)
			}
			if got != c.want {
				t.Errorf("%s: %s, want %s", name, got, c.want)
			}
		}
	}
}

func TestChunkBounds(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ sent, want string }{
		"an extension too long":    {"1;" + strings.Repeat("x", 300) + "\r\na\r\n0\r\n\r\n", "400 bad chunk"},
		"extensions without end":   {strings.Repeat("1;"+strings.Repeat("x", 200)+"\r\na\r\n", 100) + "0\r\n\r\n", "400 bad chunk"},
		"a size line without end":  {strings.Repeat("0", 5000), "400 bad chunk"},
		"too many trailers":        {"0\r\n" + strings.Repeat("x: y\r\n", 33) + "\r\n", "400 bad trailer"},
		"trailers too long":        {"0\r\nx: " + strings.Repeat("y", 9<<10) + "\r\n\r\n", "400 bad trailer"},
		"many trailers to be lost": {"0\r\n" + strings.Repeat("host: y\r\n", 2000) + "\r\n", "400 bad trailer"},
	} {
		if diff := cmp.Diff([]string{"POST a / chunked " + c.want}, requests([]byte(chunkedHead+c.sent), 0)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestHTTP10WhereAllowed(t *testing.T) {
	t.Parallel()
	for sent, want := range map[string]string{
		"GET /x HTTP/1.0\r\n\r\n":                                              "GET  /x none",
		"GET /x HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n":         "GET a /x none",
		"POST /x HTTP/1.0\r\nContent-Length: 1\r\n\r\nx":                       "POST  /x 1 \"x\"",
		"POST /x HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n":      "400 bad framing",
		"GET /x HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n":                        "400 bad host",
		"GET / HTTP/0.9\r\n\r\n":                                               "505 bad version",
		"GET /x HTTP/1.0\r\n\r\nGET /never HTTP/1.0\r\n\r\n":                   "GET  /x none",
		"GET /x HTTP/1.0\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n": "GET  /x none",
	} {
		conn := &wire{in: []byte(sent)}
		s := http1.NewServerConn(conn, http1.Config{HTTP10: true})
		q, err := s.ReadRequest()
		if err != nil {
			if got := tell(err); got != want {
				t.Errorf("%q: %s, want %s", sent, got, want)
			}
			continue
		}
		if got := tellRequest(q); got != want || q.Upgrade != "" {
			t.Errorf("%q: %s (upgrade %q), want %s", sent, got, q.Upgrade, want)
		}
		if err := s.Reply(200, "ok", nil); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(conn.out.String(), "\r\nConnection: close\r\n") {
			t.Errorf("%q answered %q, want the connection closed", sent, conn.out.String())
		}
		if _, err := s.ReadRequest(); err != io.EOF {
			t.Errorf("%q: next request: %v, want EOF", sent, err)
		}
	}
}

func TestHTTP2PrefaceIsNotConsumed(t *testing.T) {
	t.Parallel()
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04"
	for _, step := range steps {
		s := http1.NewServerConn(&wire{in: []byte(preface), step: step}, http1.Config{})
		_, err := s.ReadRequest()
		if got := tell(err); got != "0 http2 preface" {
			t.Fatal(got)
		}
		got, err := io.ReadAll(s.Raw())
		if string(got) != preface || err != nil {
			t.Errorf("Raw reads %q, %v, want %q", got, err, preface)
		}
	}
}

func ExampleError() {
	s := http1.NewServerConn(&wire{in: []byte("GET /#x HTTP/1.1\r\nHost: a\r\n\r\n")}, http1.Config{})
	_, err := s.ReadRequest()
	fmt.Println(err)
	// Output: bad target: a target with a fragment
}
