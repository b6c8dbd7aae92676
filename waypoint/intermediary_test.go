package waypoint_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/mesh"
)

// scripted is an application that gives one answer to each connection's requests and tells what it was sent: whatever comes before an
// empty line and, if it is chunked or has a length, its body. Of each connection that it has closed then it tells closed.
func scripted(t *testing.T, answer func() string, asked chan<- string, closed chan<- struct{}) netip.AddrPort {
	t.Helper()
	ln := listen(t, loopback()+":0")
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() {
					_ = conn.Close()
					closed <- struct{}{}
				}()
				var seen bytes.Buffer
				r := bufio.NewReader(io.TeeReader(conn, &seen))
				q, err := http.ReadRequest(r)
				if err != nil {
					asked <- "unreadable: " + seen.String()
					return
				}
				if q.Header.Get("Expect") == "" {
					_, _ = io.Copy(io.Discard, q.Body)
				}
				asked <- seen.String()
				_, _ = io.WriteString(conn, answer())
			}()
		}
	}()
	return addrPort(ln.Addr())
}

// without drops the header lines of a message whose names begin so, and the empty lines of what is then left.
func without(message string, names ...string) string {
	var kept []string
	for line := range strings.SplitSeq(message, "\r\n") {
		drop := false
		for _, n := range names {
			drop = drop || strings.HasPrefix(strings.ToLower(line), n)
		}
		if !drop {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "|")
}

// TestWhatAnIntermediaryDoes goes through what RFC 9110 and RFC 9112 ask of one, in HTTP/1.1 on both sides. Lines are parted by "|".
// Each request is the last of its connection, so that what is heard ends. Deviations from the letter, which are Envoy's as well:
// no Via is added (RFC 9110, 7.6.3).
func TestWhatAnIntermediaryDoes(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	asked, closed := make(chan string, 1), make(chan struct{}, 1)
	var answer string
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, scripted(t, func() string { return answer }, asked, closed))
	l.known("cart")
	const ok = "HTTP/1.1 200 OK|Date: x|Content-Length: 2||ok"
	const closes = "HTTP/1.1 200 OK|Date: x|Content-Length: 2|Connection: close||ok"
	for _, c := range []struct {
		rfc, name, sent string // Connection: close is added
		asked           string // at the application; "": it is not asked
		answer, heard   string
	}{
		{"9112 3.2.1", "origin-form, query and all", "GET /a%2Fb?c=d&e|Host: cart", "GET /a%2Fb?c=d&e|Host: cart||", ok, closes},
		{"9112 3.2.2", "absolute-form: its authority is the Host", "GET http://other:81/a?b|Host: cart", "GET /a?b|Host: other:81||", ok, closes},
		{"9112 3.2.2", "absolute-form without a path", "GET http://other|Host: cart", "GET /|Host: other||", ok, closes},
		{"9112 3.2.4", "OPTIONS *", "OPTIONS *|Host: cart", "OPTIONS *|Host: cart||", ok, closes},
		{"9112 3.2.4", "OPTIONS of a whole server by absolute-form", "OPTIONS http://cart|Host: cart", "OPTIONS *|Host: cart||", ok, closes},
		{"9112 3.2", "no Host", "GET /", "", "", "HTTP/1.1 400 Bad Request|Content-Type: text/plain|Content-Length: 13|Connection: close||400 bad host\n"},
		{"9112 2.5", "HTTP/1.0 is told the version", "GET / HTTP/1.0|Host: cart", "", "",
			"HTTP/1.1 426 Upgrade Required|Content-Type: text/plain|Content-Length: 16|Connection: close, Upgrade|Upgrade: HTTP/1.1||426 old version\n"},
		{"9110 7.6.1", "Connection and what it names", "GET /|Host: cart|Connection: X-Mine, Keep-Alive|X-Mine: 1|Keep-Alive: timeout=5|Proxy-Connection: close|Accept: a",
			"GET /|Host: cart|Accept: a||", "HTTP/1.1 200 OK|Date: x|Connection: Y-Theirs|Y-Theirs: 1|Keep-Alive: timeout=5|Content-Length: 2||ok", closes},
		{"9110 10.1.4", "TE is for one hop; trailers the next may send, too", "GET /|Host: cart|TE: trailers, deflate;q=0.5|Connection: TE",
			"GET /|Host: cart|Connection: TE|TE: trailers||", ok, closes},
		{"9110 7.8", "an Upgrade that cannot be passed on", "GET /|Host: cart|Connection: Upgrade, HTTP2-Settings|Upgrade: h2c|HTTP2-Settings: AAMAAABkAAQAAP__", "GET /|Host: cart||", ok, closes},
		{"9110 7.8", "an Upgrade that the application passes over", "GET /|Host: cart|Connection: Upgrade|Upgrade: echo",
			"GET /|Host: cart|Connection: Upgrade|Upgrade: echo||", ok, closes},
		{"9110 7.6.2", "Max-Forwards counts down", "OPTIONS /a|Host: cart|Max-Forwards: 2", "OPTIONS /a|Host: cart|max-forwards: 1||", ok, closes},
		{"9110 7.6.2", "Max-Forwards at its end: we are the last", "OPTIONS /a|Host: cart|Max-Forwards: 0", "", "", "HTTP/1.1 200 OK|Content-Length: 0|Connection: close||"},
		{"9110 7.6.2", "TRACE at its end", "TRACE /a|Host: cart|Max-Forwards: 0", "", "",
			"HTTP/1.1 501 Not Implemented|Content-Length: 0|Connection: close||"},
		{"9110 7.6.2", "Max-Forwards means nothing to GET", "GET /a|Host: cart|Max-Forwards: 0", "GET /a|Host: cart|Max-Forwards: 0||", ok, closes},
		{"9110 7.6.2", "Max-Forwards that is no number", "OPTIONS /a|Host: cart|Max-Forwards: many", "OPTIONS /a|Host: cart|Max-Forwards: many||", ok, closes},
		{"9110 7.6.3", "Via is passed on, and none added", "GET /|Host: cart|Via: 1.1 a", "GET /|Host: cart|Via: 1.1 a||",
			"HTTP/1.1 200 OK|Date: x|Via: 1.1 b|Content-Length: 2||ok", "HTTP/1.1 200 OK|Date: x|Via: 1.1 b|Content-Length: 2|Connection: close||ok"},
		{"9110 9.3.1", "content of a GET", "GET /|Host: cart|Content-Length: 3||abc", "GET /|Host: cart|Content-Length: 3||abc", ok, closes},
		{"9110 9.3.2", "HEAD: the length is that of the GET", "HEAD /|Host: cart", "HEAD /|Host: cart||", "HTTP/1.1 200 OK|Date: x|Content-Length: 99||",
			"HTTP/1.1 200 OK|Date: x|Content-Length: 99|Connection: close||"},
		{"9110 9.3.8", "TRACE has no content", "TRACE /|Host: cart|Content-Length: 1||a", "", "",
			"HTTP/1.1 400 Bad Request|Content-Type: text/plain|Content-Length: 16|Connection: close||400 bad framing\n"},
		{"9110 15.3.5", "204 has no content, nor a length", "GET /|Host: cart", "GET /|Host: cart||", "HTTP/1.1 204 No Content|Date: x|Content-Length: 0||",
			"HTTP/1.1 204 No Content|Date: x|Connection: close||"},
		{"9110 15.4.5", "304: the length is that of the 200", "GET /|Host: cart|If-None-Match: e", "GET /|Host: cart|If-None-Match: e||",
			"HTTP/1.1 304 Not Modified|Date: x|ETag: e|Content-Length: 99||", "HTTP/1.1 304 Not Modified|Date: x|ETag: e|Content-Length: 99|Connection: close||"},
		{"9110 6.5", "trailers both ways, but for what they must not say", "POST /|Host: cart|Transfer-Encoding: chunked|Trailer: X-Sum|TE: trailers|Connection: TE||3|abc|0|X-Sum: 6|Host: evil||",
			"POST /|Host: cart|Trailer: X-Sum|Transfer-Encoding: chunked|Connection: TE|TE: trailers||3|abc|0|X-Sum: 6||",
			"HTTP/1.1 200 OK|Date: x|Trailer: X-End|Transfer-Encoding: chunked||2|ok|0|X-End: 7||",
			"HTTP/1.1 200 OK|Date: x|Trailer: X-End|Transfer-Encoding: chunked|Connection: close||2|ok|0|X-End: 7||"},
		{"9110 15.2", "interim responses", "GET /|Host: cart", "GET /|Host: cart||", "HTTP/1.1 103 Early Hints|Link: a||" + ok, "HTTP/1.1 103 Early Hints|Link: a||" + closes},
		{"9110 15.2", "statuses nobody knows", "GET /|Host: cart", "GET /|Host: cart||", "HTTP/1.1 299 Whatever|Date: x|Content-Length: 2||ok",
			"HTTP/1.1 299 Whatever|Date: x|Content-Length: 2|Connection: close||ok"},
		{"9110 10.1.1", "an expectation besides 100-continue", "GET /|Host: cart|Expect: miracles", "", "",
			"HTTP/1.1 417 Expectation Failed|Content-Type: text/plain|Content-Length: 20|Connection: close||417 bad expectation\n"},
		{"9110 11.7", "what proxies ask and are told passes by", "GET /|Host: cart|Proxy-Authorization: a", "GET /|Host: cart|Proxy-Authorization: a||",
			"HTTP/1.1 407 Proxy Authentication Required|Date: x|Proxy-Authenticate: b|Content-Length: 0||",
			"HTTP/1.1 407 Proxy Authentication Required|Date: x|Proxy-Authenticate: b|Content-Length: 0|Connection: close||"},
		{"9110 14", "ranges", "GET /|Host: cart|Range: bytes=0-1", "GET /|Host: cart|Range: bytes=0-1||", "HTTP/1.1 206 Partial Content|Date: x|Content-Range: bytes 0-1/9|Content-Length: 2||ok",
			"HTTP/1.1 206 Partial Content|Date: x|Content-Range: bytes 0-1/9|Content-Length: 2|Connection: close||ok"},
		{"9112 6.1", "both lengths", "POST /|Host: cart|Content-Length: 3|Transfer-Encoding: chunked||0||", "", "",
			"HTTP/1.1 400 Bad Request|Content-Type: text/plain|Content-Length: 16|Connection: close||400 bad framing\n"},
		{"9112 6.1", "a coding nobody knows", "POST /|Host: cart|Transfer-Encoding: gzip, chunked||0||", "", "",
			"HTTP/1.1 501 Not Implemented|Content-Type: text/plain|Content-Length: 19|Connection: close||501 unknown coding\n"},
		{"9112 6.3", "a response to the end of its connection", "GET /|Host: cart", "GET /|Host: cart||", "HTTP/1.0 200 OK|Date: x||ok",
			"HTTP/1.1 200 OK|Date: x|Transfer-Encoding: chunked|Connection: close||2|ok|0||"},
		{"9112 5.2", "a folded line", "GET /|Host: cart|X: a| b", "", "", "HTTP/1.1 400 Bad Request|Content-Type: text/plain|Content-Length: 14|Connection: close||400 bad field\n"},
	} {
		answer = strings.ReplaceAll(c.answer, "|", "\r\n")
		first, rest, _ := strings.Cut(c.sent, "|")
		if !strings.Contains(first, " HTTP/1.") {
			first += " HTTP/1.1"
		}
		head, body, hasBody := strings.Cut(rest, "||")
		sent := first + "|" + head + "|Connection: close||"
		if head == "" {
			sent = first + "|Connection: close||"
		}
		if hasBody {
			sent += body
		}
		s, err := l.open(t.Context(), "10.9.0.1:80")
		if err != nil {
			t.Fatal(err)
		}
		_ = s.SetDeadline(time.Now().Add(20 * time.Second))
		_, _ = io.WriteString(s, strings.ReplaceAll(sent, "|", "\r\n"))
		heard, err := io.ReadAll(s)
		if err != nil {
			t.Errorf("RFC %s, %s: %v", c.rfc, c.name, err)
		}
		s.Close()
		got := ""
		select {
		case got = <-asked:
			<-closed // what comes next, and must not be sent twice, must not be sent on a connection that is just being closed
			got = strings.Replace(without(got, "x-request-id:", "x-envoy-", "x-forwarded-proto:"), " HTTP/1.1|", "|", 1)
		default:
		}
		if d := cmp.Diff(c.asked, got); d != "" {
			t.Errorf("RFC %s, %s: the application was asked (-want +got):\n%s", c.rfc, c.name, d)
		}
		dropped := []string{"server:", "x-envoy-"}
		if !strings.Contains(c.heard, "Date: x") {
			if !bytes.Contains(heard, []byte("\r\nDate: ")) { // RFC 9110, 6.6.1
				t.Errorf("RFC %s, %s: heard no date", c.rfc, c.name)
			}
			dropped = append(dropped, "date:")
		}
		if d := cmp.Diff(c.heard, without(string(heard), dropped...)); d != "" {
			t.Errorf("RFC %s, %s: heard (-want +got):\n%s", c.rfc, c.name, d)
		}
	}
}

// TestWhatCrossesVersions: what HTTP means is the same whichever version each side speaks.
func TestWhatCrossesVersions(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	next := make(chan struct{})
	serve := func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/no": // without a look at the body
			w.Header().Set("Connection", "close")
			w.WriteHeader(http.StatusRequestEntityTooLarge)
		case "/yes":
			b, _ := io.ReadAll(r.Body)
			_, _ = w.Write(bytes.ToUpper(b))
		case "/head":
			w.Header().Set("Content-Length", "99")
		case "/204", "/304":
			w.Header().Set("Etag", `"e"`)
			var n int
			_, _ = fmt.Sscanf(r.URL.Path, "/%d", &n)
			w.WriteHeader(n)
		case "/hints":
			w.Header().Set("Link", "a")
			w.WriteHeader(http.StatusEarlyHints)
			fmt.Fprint(w, "ok")
		case "/hop":
			fmt.Fprint(w, r.Header.Get("Te"), r.Header.Get("X-Mine"), r.Header.Get("Keep-Alive"))
		case "/events":
			w.Header().Set("Content-Type", "text/event-stream")
			for i := range 3 {
				fmt.Fprintf(w, "data: %d\n\n", i)
				w.(http.Flusher).Flush()
				<-next
			}
		}
	}
	l.service("one", "10.9.0.1", mesh.AppHTTP1, app2(t, true, serve))
	l.service("two", "10.9.0.2", mesh.AppHTTP2, app2(t, false, serve))
	l.known("one", "two")
	one := &http.Client{Transport: &http.Transport{DialContext: l.client.Transport.(*http.Transport).DialContext, ExpectContinueTimeout: time.Minute}}
	two := l.client2()
	two.Transport.(*http.Transport).ExpectContinueTimeout = time.Minute
	t.Cleanup(one.CloseIdleConnections)
	for _, c := range []struct {
		name   string
		client *http.Client
		vip    string
	}{{"1 to 1", one, "10.9.0.1"}, {"1 to 2", one, "10.9.0.2"}, {"2 to 1", two, "10.9.0.1"}, {"2 to 2", two, "10.9.0.2"}} {
		l.client = c.client
		ask := func(method, path string, body io.Reader, header ...string) (*http.Response, string) {
			req, _ := http.NewRequestWithContext(t.Context(), method, "http://"+c.vip+path, body)
			for i := 0; i < len(header); i += 2 {
				req.Header.Set(header[i], header[i+1])
			}
			return l.do(req)
		}
		if resp, got := ask("POST", "/yes", strings.NewReader("hello"), "Expect", "100-continue"); resp.StatusCode != 200 || got != "HELLO" {
			t.Errorf("%s: what waits for 100 Continue = %d %q, want 200 HELLO", c.name, resp.StatusCode, got)
		}
		read := false
		if resp, _ := ask("POST", "/no", readerFunc(func(p []byte) (int, error) { read = true; return len(p), nil }), "Expect", "100-continue"); resp.StatusCode != 413 || read {
			t.Errorf("%s: what waits for 100 Continue and is refused = %d, its body was sent: %v; want 413 before that", c.name, resp.StatusCode, read)
		}
		for _, x := range []struct {
			method, path string
			status       int
			length       int64
		}{{"HEAD", "/head", 200, 99}, {"GET", "/204", 204, 0}, {"GET", "/304", 304, 0}} {
			resp, got := ask(x.method, x.path, nil)
			if resp.StatusCode != x.status || got != "" || resp.ContentLength != x.length {
				t.Errorf("%s: %s %s = %d %q of length %d, want %d without a body, of length %d", c.name, x.method, x.path, resp.StatusCode, got, resp.ContentLength, x.status, x.length)
			}
		}
		if resp, got := ask("GET", "/hints", nil); resp.StatusCode != 200 || got != "ok" {
			t.Errorf("%s: an interim response and then %d %q", c.name, resp.StatusCode, got)
		}
		if _, got := ask("GET", "/yes", strings.NewReader("of a get")); got != "OF A GET" {
			t.Errorf("%s: content of a GET came as %q", c.name, got)
		}
		if _, got := ask("GET", "/hop", nil, "Te", "trailers"); got != "trailers" {
			t.Errorf("%s: fields of one hop came as %q, want trailers alone", c.name, got)
		}

		req, _ := http.NewRequestWithContext(t.Context(), "GET", "http://"+c.vip+"/events", nil)
		resp, err := c.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		events := bufio.NewReader(resp.Body)
		for i := range 3 {
			line, err := events.ReadString('\n')
			if _, blank := events.ReadString('\n'); err != nil || blank != nil || line != fmt.Sprintf("data: %d\n", i) {
				t.Fatalf("%s: event %d is %q, %v", c.name, i, line, err)
			}
			next <- struct{}{} // only now comes the next
		}
		if _, err := events.ReadByte(); err != io.EOF {
			t.Errorf("%s: events end with %v, want EOF", c.name, err)
		}
		resp.Body.Close()
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
