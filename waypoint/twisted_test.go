package waypoint_test

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/mistnet/mistnet/internal/mesh"
)

// frames speaks HTTP/2 to a service by hand, on a connection of its own: send writes frames, and what stream 1 is answered comes back:
// a status, "reset", "end" of the whole connection, or "nothing" where it waits for more.
func (l *lab) frames(authority string, send func(w *handWire)) string {
	l.t.Helper()
	s, err := l.open(l.t.Context(), authority)
	if err != nil {
		l.t.Fatal(err)
	}
	defer s.Close()
	w := &handWire{Framer: http2.NewFramer(s, s)}
	w.AllowIllegalWrites = true
	w.enc = hpack.NewEncoder(&w.block)
	if _, err := io.WriteString(s, http2.ClientPreface); err != nil {
		l.t.Fatal(err)
	}
	_ = w.WriteSettings()
	send(w)
	_ = s.SetReadDeadline(time.Now().Add(10 * time.Second))
	w.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	for status := ""; ; {
		f, err := w.ReadFrame()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return "nothing"
		case err != nil:
			return cmp.Or(status, "end")
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if w.waits && f.IsAck() {
				_ = s.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			}
		case *http2.MetaHeadersFrame:
			if v := f.PseudoValue("status"); f.StreamID == 1 && v != "100" {
				status = v
			}
		case *http2.RSTStreamFrame:
			if f.StreamID == 1 {
				return cmp.Or(status, "reset")
			}
		}
		if h := f.Header(); h.StreamID == 1 && h.Type <= http2.FrameHeaders && h.Flags.Has(http2.FlagDataEndStream) {
			return status
		}
	}
}

// handWire writes frames that no client should.
type handWire struct {
	*http2.Framer
	enc   *hpack.Encoder
	block bytes.Buffer
	waits bool // what was sent is not the whole of the request
}

func (w *handWire) headers(stream uint32, end bool, fields ...string) {
	w.block.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = w.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	_ = w.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, EndStream: end, EndHeaders: true, BlockFragment: w.block.Bytes()})
}

func (w *handWire) data(stream uint32, end bool, text string) {
	_ = w.WriteData(stream, end, []byte(text))
}

// get and post are heads, with more fields behind.
func get(path string, more ...string) []string {
	return append([]string{":method", "GET", ":scheme", "http", ":authority", "a", ":path", path}, more...)
}

func post(more ...string) []string {
	return append([]string{":method", "POST", ":scheme", "http", ":authority", "a", ":path", "/"}, more...)
}

// twisted is what a client writes to hide something, and what it may be answered: statuses and words of frames, "|" between them.
type twisted struct {
	name, may string
	send      func(w *handWire)
}

// head is one whole request of these fields.
func head(fields ...string) func(*handWire) {
	return func(w *handWire) { w.headers(1, true, fields...) }
}

// body is one request of these fields with a body.
func body(text string, fields ...string) func(*handWire) {
	return func(w *handWire) {
		w.headers(1, false, fields...)
		w.data(1, true, text)
	}
}

// trailed is one request of these fields, a body, and these trailers.
func trailed(text string, fields []string, trailers ...string) func(*handWire) {
	return func(w *handWire) {
		w.headers(1, false, fields...)
		w.data(1, false, text)
		w.headers(1, true, trailers...)
	}
}

const smuggled = "GET /admin HTTP/1.1\r\nHost: a\r\n\r\n"

// line is a request whose pseudo-header fields are these.
func line(method, scheme, authority, path string, more ...string) []string {
	return append([]string{":method", method, ":scheme", scheme, ":authority", authority, ":path", path}, more...)
}

var twists = []twisted{
	{"a request, whole", "200", head(get("/")...)},
	{"a body, whole", "200", body("abc", post("content-length", "3")...)},
	{"a body that is a request", "200", body(smuggled, post()...)},
	{"a body that ends in chunks", "200", body("0\r\n\r\n"+smuggled, post()...)},
	{"CRLF in a value", "reset", head(get("/", "x", "y\r\nTransfer-Encoding: chunked\r\n\r\n"+smuggled)...)},
	{"LF in a value", "reset", head(get("/", "x", "y\nTransfer-Encoding: chunked")...)},
	{"CR in a value", "reset", head(get("/", "x", "y\rTransfer-Encoding: chunked")...)},
	{"NUL in a value", "reset", head(get("/", "x", "y\x00z")...)},
	{"CRLF in a name", "reset", head(get("/", "x: y\r\ntransfer-encoding", "chunked")...)},
	{"a colon in a name", "reset", head(get("/", "transfer-encoding: chunked\r\nx", "y")...)},
	{"a colon before a name", "reset", head(get("/", ":x", "y")...)},
	{"a space in a name", "reset", head(get("/", "content-length ", "3")...)},
	{"NUL in a name", "reset", head(get("/", "x\x00", "y")...)},
	{"a name of nothing", "reset", head(get("/", "", "y")...)},
	{"capital letters in a name", "reset", head(get("/", "Transfer-Encoding", "chunked")...)},
	{"letters beyond ASCII in a name", "reset", head(get("/", "\u017fet-cookie", "y")...)},
	{"CRLF in the path", "reset", head(get("/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\nx:")...)},
	{"a space in the path", "reset", head(get("/ HTTP/1.1 /admin")...)},
	{"a request behind the path", "400|reset", head(get("/ HTTP/1.1\r\nHost: a\r\n\r\nGET /admin")...)},
	{"NUL in the path", "400", head(get("/\x00admin")...)},
	{"a tab in the path", "400", head(get("/\tadmin")...)},
	{"bytes beyond ASCII in the path", "400", head(get("/\u2025/admin")...)},
	{"CRLF in the method", "reset", head(line("GET /admin HTTP/1.1\r\nHost: a\r\n\r\nGET", "http", "a", "/")...)},
	{"a space in the method", "reset", head(line("GET /admin HTTP/1.1", "http", "a", "/")...)},
	{"no method", "reset", head(line("", "http", "a", "/")...)},
	{"CRLF in the scheme", "200", head(line("GET", "http\r\nx: y", "a", "/")...)},
	{"a scheme that is a request", "200", head(line("GET", "http://a/admin?", "a", "/")...)},
	{"a space in the authority", "400|reset", head(line("GET", "http", "a HTTP/1.1", "/")...)},
	{"CRLF in the authority", "400|reset", head(line("GET", "http", "a\r\nTransfer-Encoding: chunked", "/")...)},
	{"a path in the authority", "400", head(line("GET", "http", "a/admin?", "/")...)},
	{"a user in the authority", "400", head(line("GET", "http", "b@a", "/")...)},
	{"the method twice", "reset", head(get("/", ":method", "POST")...)},
	{"the path twice", "reset", head(":method", "GET", ":path", "/", ":scheme", "http", ":path", "/admin", ":authority", "a")},
	{"the authority twice", "reset", head(":method", "GET", ":path", "/", ":scheme", "http", ":authority", "a", ":authority", "b")},
	{"the path behind a field", "reset", head(":method", "GET", ":scheme", "http", ":authority", "a", "x", "y", ":path", "/admin")},
	{"a status", "reset", head(get("/", ":status", "200")...)},
	{"the path in the trailers", "reset", trailed("abc", post(), ":path", "/admin")},
	{"Transfer-Encoding", "reset", body("0\r\n\r\n"+smuggled, post("transfer-encoding", "chunked")...)},
	{"Transfer-Encoding: identity", "reset", body("abc", post("transfer-encoding", "identity")...)},
	{"Connection: x", "reset", head(get("/", "connection", "x-tenant", "x-tenant", "a")...)},
	{"Keep-Alive", "reset", head(get("/", "keep-alive", "timeout=1")...)},
	{"Proxy-Connection", "reset", head(get("/", "proxy-connection", "x-tenant")...)},
	{"Upgrade", "reset", head(get("/", "upgrade", "websocket")...)},
	{"HTTP2-Settings", "200", head(get("/", "http2-settings", "AAMAAABkAAQAAP__")...)},
	{"TE: chunked", "reset", head(get("/", "te", "trailers, chunked")...)},
	{"a length and no body", "reset", head(post("content-length", "40")...)},
	{"a length longer than the body", "reset", body("abc", post("content-length", "40")...)},
	{"a length shorter than the body", "reset", body(smuggled, post("content-length", "3")...)},
	{"a length of nothing, and a body", "200|reset", body(smuggled, post("content-length", "0")...)},
	{"two lengths", "reset", body(smuggled, post("content-length", "0", "content-length", "40")...)},
	{"two lengths in one", "reset", body("abc", post("content-length", "3, 3")...)},
	{"a length with a sign", "reset", body("abc", post("content-length", "+3")...)},
	{"a length beyond 64 bits", "reset", body("abc", post("content-length", "18446744073709551619")...)},
	{"a length shorter than the body, then trailers", "reset", trailed(smuggled, post("content-length", "3"), "x", "y")},
	{"a length longer than the body, then trailers", "reset", trailed("abc", post("content-length", "40"), "x", "y")},
	{"a length in the trailers", "200", trailed("abc", post(), "content-length", "40", "x", "y")},
	{"trailers of the framing", "reset", trailed("abc", post(), "transfer-encoding", "chunked")},
	{"trailers that route and vouch", "200", trailed("abc", post("te", "trailers", "trailer", "x"), "host", "evil", "authorization", "evil",
		"x-forwarded-for", "evil", "x-forwarded-client-cert", "evil", "cookie", "a=evil", "x-envoy-original-path", "evil", "forwarded", "evil",
		"x_forwarded_client_cert", "evil", "x_envoy_original_path", "evil", "x_forwarded_for", "evil", "content_length", "evil", "x_real_ip", "evil")},
	{"trailers with a line end", "reset", trailed("abc", post(), "x", "y\r\n\r\n"+smuggled)},
	{"Host beside another authority", "reset", head(get("/", "host", "evil")...)},
	{"two Hosts without an authority", "400", head(":method", "GET", ":scheme", "http", ":path", "/", "host", "a", "host", "evil")},
	{"no host at all", "400", head(":method", "GET", ":scheme", "http", ":path", "/")},
	{"an empty authority beside Host", "reset|400", head(":method", "GET", ":scheme", "http", ":path", "/", ":authority", "", "host", "evil")},
	{"an absolute path", "400", head(get("http://a/admin")...)},
	{"an absolute path of an extended CONNECT", "400", func(w *handWire) {
		w.headers(1, false, line("CONNECT", "http", "a", "http://a/admin", ":protocol", "websocket")...)
	}},
	{"no slash", "400", head(get("admin")...)},
	{"a path of nothing", "reset", head(get("")...)},
	{"an asterisk", "400", head(get("*")...)},
	{"a fragment", "400", head(get("/#/../admin")...)},
	{"the path itself", "403", head(get("/admin")...)},
	{"a letter encoded", "403", head(get("/%61dmin")...)},
	{"two dots encoded", "403", head(get("/x/%2e%2E/admin")...)},
	{"a backslash", "403", head(get("/x\\..\\admin")...)},
	{"CONNECT", "403", func(w *handWire) {
		w.headers(1, false, ":method", "CONNECT", ":authority", "a:80")
		w.data(1, false, smuggled)
	}},
	{"CONNECT with a path", "reset", func(w *handWire) {
		w.headers(1, false, line("CONNECT", "http", "a:80", "/")...)
		w.data(1, false, smuggled)
	}},
	{"an extended CONNECT to what is denied", "403", func(w *handWire) {
		w.headers(1, false, line("CONNECT", "http", "a", "/x/../admin", ":protocol", "websocket")...)
		w.data(1, false, smuggled)
	}},
	{"an extended CONNECT that the application does not know", "502|501", func(w *handWire) {
		w.headers(1, false, line("CONNECT", "http", "a", "/", ":protocol", "websocket")...)
		w.data(1, false, smuggled)
	}},
	{"an extended CONNECT to HTTP", "501", func(w *handWire) {
		w.headers(1, false, line("CONNECT", "http", "a", "/", ":protocol", "h2c")...)
		w.data(1, false, http2.ClientPreface)
	}},
	{"an extended CONNECT with a line end", "501", func(w *handWire) {
		w.headers(1, false, line("CONNECT", "http", "a", "/", ":protocol", "websocket\r\nTransfer-Encoding: chunked")...)
		w.data(1, false, smuggled)
	}},
	{"a protocol without CONNECT", "reset", head(line("GET", "http", "a", "/", ":protocol", "websocket")...)},
	{"DATA behind the end", "200|reset|403", func(w *handWire) {
		w.headers(1, true, get("/")...)
		w.data(1, true, smuggled)
	}},
	{"a head behind the head", "reset", func(w *handWire) {
		w.headers(1, false, post()...)
		w.headers(1, false, get("/admin")...)
	}},
	{"a head behind the body", "reset", trailed("abc", post(), get("/admin")...)},
	{"Expect, and then another", "200", body("abc", post("expect", "100-continue", "content-length", "3")...)},
	{"an expectation that is none", "417", body("abc", post("expect", "100-continue, x")...)},
	{"TRACE with a body", "400|reset", body("abc", line("TRACE", "http", "a", "/")...)},
	{"a body that is cut", "nothing", func(w *handWire) {
		w.waits = true
		w.headers(1, false, post("content-length", "40")...)
		w.data(1, false, "abc")
	}},
}

// TestNothingIsSmuggledByHTTP2: the same by frames, to applications of both versions.
func TestNothingIsSmuggledByHTTP2(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	var mu sync.Mutex
	var sent bytes.Buffer
	at := recorder(t, &mu, &sent)
	var two []string // what the application of HTTP/2 is asked
	old := l.service("old", "10.9.0.1", mesh.AppHTTP1, at)
	new := l.service("new", "10.9.0.2", mesh.AppHTTP2, app2(t, false, func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body)
		mu.Lock()
		defer mu.Unlock()
		if err == nil {
			two = append(two, fmt.Sprintln(r.Method, r.RequestURI, r.Host, r.Header, r.Trailer))
		}
	}))
	l.known("old", "new")
	l.policy("no-admin", mesh.Deny, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "/admin"}, mesh.StringMatch{Kind: mesh.MatchExact, Value: "*"})
	l.guarded(old, "shop/no-admin")
	l.guarded(new, "shop/no-admin")
	l.becomes("guarded", "http://10.9.0.1/admin", http.StatusForbidden)
	l.becomes("guarded", "http://10.9.0.2/admin", http.StatusForbidden)
	for _, c := range twists {
		for _, to := range []string{"10.9.0.1:80", "10.9.0.2:80"} {
			mu.Lock()
			sent.Reset()
			two = nil
			mu.Unlock()
			got := l.frames(to, c.send)
			if !slices.Contains(strings.Split(c.may, "|"), got) {
				t.Errorf("%s to %s is answered %s, want %s", c.name, to, got, c.may)
			}
			mu.Lock()
			one, whole := sent.String(), len(two)
			seen := one + strings.Join(two, "")
			mu.Unlock()
			for r := bufio.NewReader(strings.NewReader(one)); ; whole++ {
				q, err := http.ReadRequest(r)
				if err == nil {
					_, err = io.Copy(io.Discard, q.Body)
				}
				if err == io.EOF || err == io.ErrUnexpectedEOF { // one that is cut is none
					break
				}
				if err != nil {
					t.Errorf("%s: the application is sent %q: %v", c.name, one, err)
					break
				}
				if strings.HasPrefix(q.URL.Path, "/admin") {
					t.Errorf("%s: the application is asked for %s: %q", c.name, q.RequestURI, one)
				}
			}
			if passed := got == "200"; whole > 1 || passed != (whole == 1) && !strings.Contains(c.may, "|") {
				t.Errorf("%s to %s is answered %s, and the application asked %d times: %q", c.name, to, got, whole, seen)
			}
			if strings.Contains(seen, "evil") || len(two) == 1 && strings.Contains(two[0], "/admin") {
				t.Errorf("%s: the application is told %q", c.name, seen)
			}
		}
	}
}
