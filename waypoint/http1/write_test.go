package http1_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// passOn returns the request as it goes upstream.
func passOn(t testing.TB, sent string, edit func(*http1.Edits)) (string, error) {
	t.Helper()
	var e http1.Edits
	if edit != nil {
		edit(&e)
	}
	up := &wire{}
	err := http1.NewClientConn(up, http1.Config{}).WriteRequest(request(t, sent), &e)
	return up.out.String(), err
}

func TestRequestsArePassedOn(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, sent, want string
		edit             func(*http1.Edits)
	}{
		{
			name: "in order and as spelled, Host first",
			sent: "GET /a?b HTTP/1.1\r\nAccept: */*\r\nhost: cart.shop\r\nX-Y:z \r\nx-y: \t w\r\n\r\n",
			want: "GET /a?b HTTP/1.1\r\nHost: cart.shop\r\nAccept: */*\r\nX-Y:z \r\nx-y: \t w\r\n\r\n",
		},
		{
			name: "absolute-form becomes origin-form, the authority Host",
			sent: "GET http://cart.shop?q HTTP/1.1\r\nHost: other\r\n\r\n",
			want: "GET /?q HTTP/1.1\r\nHost: cart.shop\r\n\r\n",
		},
		{
			name: "absolute-form of OPTIONS becomes asterisk-form",
			sent: "OPTIONS http://cart.shop HTTP/1.1\r\nHost: other\r\n\r\n",
			want: "OPTIONS * HTTP/1.1\r\nHost: cart.shop\r\n\r\n",
		},
		{
			name: "what may have a body and has none says so",
			sent: "POST / HTTP/1.1\r\nHost: a\r\n\r\n",
			want: "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
		},
		{
			name: "others need not",
			sent: "DELETE / HTTP/1.1\r\nHost: a\r\n\r\n",
			want: "DELETE / HTTP/1.1\r\nHost: a\r\n\r\n",
		},
		{
			name: "CONNECT",
			sent: "CONNECT cart.shop:443 HTTP/1.1\r\nHost: x\r\n\r\n",
			want: "CONNECT cart.shop:443 HTTP/1.1\r\nHost: cart.shop:443\r\n\r\n",
		},
		{
			name: "hop-by-hop fields stay, and those that Connection names",
			sent: "GET / HTTP/1.1\r\nHost: a\r\nConnection: x-hop, close\r\nKeep-Alive: 1\r\nX-Hop: 1\r\nx-HOP: 2\r\nProxy-Connection: x\r\nTE: gzip\r\nHTTP2-Settings: x\r\nX: y\r\n\r\n",
			want: "GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n",
		},
		{
			name: "Connection takes nothing that is for all",
			sent: "POST / HTTP/1.1\r\nHost: a\r\nConnection: host, content-length, authorization, x-request-id, x-forwarded-for, x-forwarded-client-cert, cookie, x-envoy-x, traceparent, date\r\n" +
				"Content-Length: 1\r\nAuthorization: a\r\nX-Request-Id: b\r\nX-Forwarded-For: c\r\nX-Forwarded-Client-Cert: d\r\nCookie: e\r\nX-Envoy-X: f\r\ntraceparent: g\r\nDate: h\r\n\r\nx",
			want: "POST / HTTP/1.1\r\nHost: a\r\nAuthorization: a\r\nX-Request-Id: b\r\nX-Forwarded-For: c\r\nX-Forwarded-Client-Cert: d\r\nCookie: e\r\nX-Envoy-X: f\r\ntraceparent: g\r\nDate: h\r\nContent-Length: 1\r\n\r\nx",
		},
		{
			name: "TE keeps trailers",
			sent: "GET / HTTP/1.1\r\nHost: a\r\nConnection: TE\r\nTE: gzip;q=1, Trailers\r\n\r\n",
			want: "GET / HTTP/1.1\r\nHost: a\r\nConnection: TE\r\nTE: trailers\r\n\r\n",
		},
		{
			name: "an upgrade",
			sent: "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n",
			want: "GET /ws HTTP/1.1\r\nHost: a\r\nSec-WebSocket-Key: k\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		},
		{
			name: "no upgrade to h2c",
			sent: "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
			want: "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		},
		{
			name: "no upgrade to h2c in a list",
			sent: "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket, h2c\r\n\r\n",
			want: "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		},
		{
			name: "no upgrade that Connection does not name",
			sent: "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n",
			want: "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		},
		{
			name: "no upgrade of a request with a body",
			sent: "POST / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n\r\nx",
			want: "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
		},
		{
			name: "an empty body stays declared, in plain digits",
			sent: "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 000\r\n\r\n",
			want: "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
		},
		{
			name: "chunks are written anew, without extensions and forbidden trailers",
			sent: "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n005;ext\r\nhello\r\n1\r\n!\r\n000\r\nX-Sum: 1\r\nHost: evil\r\nCookie: evil\r\n\r\n",
			want: "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1\r\n!\r\n0\r\nX-Sum: 1\r\n\r\n",
		},
		{
			name: "edits: set replaces all, add adds, remove removes",
			sent: "GET / HTTP/1.1\r\nHost: a\r\nX-Set: 1\r\nKeep: 2\r\nx-set: 3\r\nX-Add: 4\r\nX-Gone: 5\r\nCookie: 6\r\n\r\n",
			edit: func(e *http1.Edits) {
				e.Set("x-set", "new")
				e.Add("x-add", "more")
				e.Remove("x-gone")
				e.Remove("cookie")
				e.Remove("x-absent")
			},
			want: "GET / HTTP/1.1\r\nHost: a\r\nKeep: 2\r\nX-Add: 4\r\nx-set: new\r\nx-add: more\r\n\r\n",
		},
		{
			name: "edits: later ones see earlier ones",
			sent: "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
			edit: func(e *http1.Edits) {
				e.Add("x", "1")
				e.Add("y", "1")
				e.Remove("X")
				e.Set("y", "2")
				e.Add("y", "3")
				e.Set("user-agent", "m")
				e.Remove("user-agent")
			},
			want: "GET / HTTP/1.1\r\nHost: a\r\ny: 2\r\ny: 3\r\n\r\n",
		},
		{
			name: "edits: authority and target",
			sent: "GET /old?q HTTP/1.1\r\nHost: a\r\n\r\n",
			edit: func(e *http1.Edits) {
				e.Set("Host", "b:8080")
				e.Remove("host")
				e.SetTarget("/new?r")
			},
			want: "GET /new?r HTTP/1.1\r\nHost: b:8080\r\n\r\n",
		},
		{
			name: "edits: what Connection named is not what an edit sets",
			sent: "GET / HTTP/1.1\r\nHost: a\r\nConnection: x-user\r\nX-User: evil\r\n\r\n",
			edit: func(e *http1.Edits) { e.Set("x-user", "alice") },
			want: "GET / HTTP/1.1\r\nHost: a\r\nx-user: alice\r\n\r\n",
		},
		{
			name: "framing cannot be removed",
			sent: "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
			edit: func(e *http1.Edits) { e.Remove("content-length") },
			want: "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
		},
	} {
		got, err := passOn(t, c.sent, c.edit)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if diff := cmp.Diff(strings.Split(c.want, "\r\n"), strings.Split(got, "\r\n")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
}

func TestEditsThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(*http1.Edits){
		"a line break in a value": func(e *http1.Edits) { e.Set("x", "a\r\nHost: evil") },
		"a bare LF in a value":    func(e *http1.Edits) { e.Add("x", "a\nb") },
		"a NUL in a value":        func(e *http1.Edits) { e.Add("x", "\x00") },
		"a colon in a name":       func(e *http1.Edits) { e.Add("x: y", "z") },
		"no name":                 func(e *http1.Edits) { e.Add("", "z") },
		"Content-Length":          func(e *http1.Edits) { e.Set("Content-Length", "3") },
		"Transfer-Encoding":       func(e *http1.Edits) { e.Add("transfer-encoding", "chunked") },
		"Connection":              func(e *http1.Edits) { e.Set("connection", "close") },
		"a host that is none":     func(e *http1.Edits) { e.Set("host", "a/b") },
		"a target with a space":   func(e *http1.Edits) { e.SetTarget("/a b") },
		"a target with a LF":      func(e *http1.Edits) { e.SetTarget("/a\n") },
		"a target without a path": func(e *http1.Edits) { e.SetTarget("a") },
	} {
		got, err := passOn(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\n", edit)
		if err == nil || tell(err) != "500 bad edit" || got != "" {
			t.Errorf("%s: wrote %q, %v, want a bad edit", name, got, err)
		}
	}
	var e http1.Edits
	e.Set("x", "\n")
	e.Reset()
	e.Set("x", "y")
	if got, err := passOn(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\n", func(to *http1.Edits) { *to = e }); err != nil || !strings.Contains(got, "x: y\r\n") {
		t.Errorf("after Reset: %q, %v", got, err)
	}
}

// exchange sends one request through a proxy to an upstream that answers with the given bytes, and returns what the
// client gets, without the date, and whether both connections can be used again.
func exchange(t testing.TB, sent, answer string, edit func(*http1.Edits)) (got string, again, reusable bool) {
	t.Helper()
	var e http1.Edits
	if edit != nil {
		edit(&e)
	}
	down := &wire{in: []byte(sent)}
	s := http1.NewServerConn(down, http1.Config{HTTP10: true})
	if _, err := s.ReadRequest(); err != nil {
		t.Fatal(err)
	}
	up := http1.NewClientConn(&wire{in: []byte(answer)}, http1.Config{})
	x := s.Exchange(up)
	err := x.Send(nil)
	if err == nil {
		_, err = x.Receive()
	}
	if err == nil {
		err = x.Respond(&e)
	}
	if err != nil {
		if err := s.ReplyError(err, nil); err != nil {
			t.Fatal(err)
		}
	}
	lines := strings.Split(down.out.String(), "\r\n")
	for i := 0; i < len(lines); i++ {
		if strings.HasPrefix(lines[i], "Date: ") {
			lines = append(lines[:i], lines[i+1:]...)
		}
	}
	got = strings.Join(lines, "\r\n")
	_, err = s.ReadRequest()
	return got, err == nil, up.Reusable()
}

func TestResponsesArePassedOn(t *testing.T) {
	t.Parallel()
	const (
		get  = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
		next = get
		old  = "GET / HTTP/1.0\r\nHost: a\r\n\r\n"
	)
	for _, c := range []struct {
		name, sent, answer, want string
		edit                     func(*http1.Edits)
		again, reusable          bool
	}{
		{
			name: "a length", sent: get + next, answer: "HTTP/1.1 200 Fine\r\nServer: x\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok",
			want: "HTTP/1.1 200 Fine\r\nServer: x\r\nContent-Length: 2\r\n\r\nok", again: true, reusable: true,
		},
		{
			name: "chunks with trailers", sent: get + next, answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x\r\nok\r\n0\r\nX: y\r\nHost: z\r\n\r\n",
			want: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX: y\r\n\r\n", again: true, reusable: true,
		},
		{
			name: "a body to the connection's end gets chunks", sent: get + next, answer: "HTTP/1.0 200 OK\r\n\r\nok",
			want: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", again: true,
		},
		{
			name: "an upstream that closes", sent: get + next, answer: "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
			want: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", again: true,
		},
		{
			name: "bytes behind the response", sent: get + next, answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
			want: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", again: true,
		},
		{
			name: "bytes behind a response without a body", sent: get + next, answer: "HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok",
			want: "HTTP/1.1 204 No Content\r\n\r\n", again: true,
		},
		{
			name: "a client that closes", sent: "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + next, answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
			want: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok", reusable: true,
		},
		{
			name: "chunks to a client of HTTP/1.0", sent: old + next, answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX: y\r\n\r\n",
			want: "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok", reusable: true,
		},
		{
			name: "HEAD keeps the length", sent: "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n" + next, answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n",
			want: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", again: true, reusable: true,
		},
		{
			name: "HEAD keeps the coding", sent: "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n" + next, answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
			want: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", again: true, reusable: true,
		},
		{
			name: "304", sent: get + next, answer: "HTTP/1.1 304 Not Modified\r\nEtag: x\r\n\r\n",
			want: "HTTP/1.1 304 Not Modified\r\nEtag: x\r\n\r\n", again: true, reusable: true,
		},
		{
			name: "interim responses", sent: get + next, answer: "HTTP/1.1 103 Early Hints\r\nLink: x\r\nConnection: y\r\nY: z\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
			want: "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", again: true, reusable: true,
		},
		{
			name: "interim responses to HTTP/1.0", sent: old + next, answer: "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
			want: "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", reusable: true,
		},
		{
			name: "too many interim responses", sent: get + next, answer: strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 16),
			want: strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 16) + "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/plain\r\nContent-Length: 20\r\n\r\n502 upstream broken\n", again: true,
		},
		{
			name: "edits", sent: get + next, answer: "HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 2\r\n\r\nok",
			edit: func(e *http1.Edits) { e.Set("server", "istio-envoy"); e.Add("x", "y") },
			want: "HTTP/1.1 200 OK\r\nserver: istio-envoy\r\nx: y\r\nContent-Length: 2\r\n\r\nok", again: true, reusable: true,
		},
		{
			name: "edits that cannot be written", sent: get + next, answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
			edit: func(e *http1.Edits) { e.Set("x", "\r") },
			want: "HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n\r\n500 bad edit\n", again: true,
		},
		{
			name: "a broken response", sent: get + next, answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
			want: "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/plain\r\nContent-Length: 20\r\n\r\n502 upstream broken\n", again: true,
		},
		{
			name: "no response", sent: get + next, answer: "",
			want: "HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: 20\r\n\r\n503 upstream closed\n", again: true,
		},
		{
			name: "no response, to HEAD", sent: "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n" + next, answer: "",
			want: "HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: 20\r\n\r\n", again: true,
		},
		{
			name: "a cut response", sent: get + next, answer: "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok",
			want: "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok",
		},
		{
			name: "a cut chunk", sent: get + next, answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nok",
			want: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
		},
		{
			name: "a broken chunk in the request", sent: chunkedHead + "x\r\n" + next, answer: "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
			want: "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 14\r\nConnection: close\r\n\r\n400 bad chunk\n", reusable: true,
		},
	} {
		got, again, reusable := exchange(t, c.sent, c.answer, c.edit)
		if diff := cmp.Diff(strings.Split(c.want, "\r\n"), strings.Split(got, "\r\n")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
		if again != c.again || reusable != c.reusable {
			t.Errorf("%s: client's connection goes on: %v, want %v; upstream's: %v, want %v", c.name, again, c.again, reusable, c.reusable)
		}
	}
}

func TestReplies(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ sent, want string }{
		{"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 403 Forbidden\r\nx: y\r\nContent-Type: text/plain\r\nContent-Length: 19\r\n\r\nRBAC: access denied"},
		{"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 403 Forbidden\r\nx: y\r\nContent-Type: text/plain\r\nContent-Length: 19\r\n\r\n"},
		{"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\n\r\n", "HTTP/1.1 403 Forbidden\r\nx: y\r\nContent-Type: text/plain\r\nContent-Length: 19\r\nConnection: close\r\n\r\nRBAC: access denied"},
		{"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n", "HTTP/1.1 403 Forbidden\r\nx: y\r\nContent-Type: text/plain\r\nContent-Length: 19\r\nConnection: close\r\n\r\nRBAC: access denied"},
		{"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "HTTP/1.1 403 Forbidden\r\nx: y\r\nContent-Type: text/plain\r\nContent-Length: 19\r\nConnection: close\r\n\r\nRBAC: access denied"},
	} {
		conn := &wire{in: []byte(c.sent)}
		s := http1.NewServerConn(conn, http1.Config{})
		if _, err := s.ReadRequest(); err != nil {
			t.Fatal(err)
		}
		var e http1.Edits
		e.Set("x", "y")
		e.Set("date", "now")
		if err := s.Reply(403, "RBAC: access denied", &e); err != nil {
			t.Fatal(err)
		}
		got := strings.Replace(conn.out.String(), "date: now\r\n", "", 1)
		if diff := cmp.Diff(strings.Split(c.want, "\r\n"), strings.Split(got, "\r\n")); diff != "" {
			t.Errorf("Reply to %q (-want +got):\n%s", c.sent, diff)
		}
		if err := s.Reply(200, "", nil); err == nil {
			t.Errorf("a second reply was written: %q", conn.out.String())
		}
	}
}

func TestOldVersionIsToldTheNew(t *testing.T) {
	t.Parallel()
	conn := &wire{in: []byte("GET / HTTP/1.0\r\n\r\n")}
	s := http1.NewServerConn(conn, http1.Config{})
	_, err := s.ReadRequest()
	if err := s.ReplyError(err, nil); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"HTTP/1.1 426 Upgrade Required\r\n", "\r\nUpgrade: HTTP/1.1\r\n", "\r\nConnection: close, Upgrade\r\n"} {
		if !strings.Contains(conn.out.String(), want) {
			t.Errorf("answer %q lacks %q", conn.out.String(), want)
		}
	}
}

func TestValue(t *testing.T) {
	t.Parallel()
	q := request(t, "GET / HTTP/1.1\r\nHost: a\r\nX-A: 1\r\nAccept: b\r\nx-a:  2\t\r\naccept: c\r\nEmpty:\r\nX-AB: 3\r\n\r\n")
	for name, want := range map[string]string{"host": "a", "x-a": "1,2", "X-A": "1,2", "accept": "b,c", "empty": "", "x-ab": "3"} {
		if got, ok := q.Value(name); got != want || !ok {
			t.Errorf("Value(%s) = %q, %v, want %q", name, got, ok, want)
		}
	}
	for _, name := range []string{"x", "cookie", "", "x-abc"} {
		if got, ok := q.Value(name); ok {
			t.Errorf("Value(%s) = %q, want none", name, got)
		}
	}
}

func TestBodiesCanBeSentAgain(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		sent  string
		again bool
	}{
		{"GET / HTTP/1.1\r\nHost: a\r\n\r\n", true},
		{"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", true},
		{chunkedHead + "2\r\nhe\r\n3\r\nllo\r\n0\r\nX: y\r\n\r\n", true},
		{"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("x", 100000), false},
		{chunkedHead + strings.Repeat("5\r\nhello\r\n", 20000) + "0\r\n\r\n", false},
	} {
		q := request(t, c.sent)
		if whole, err := q.Body.Buffered(); whole != c.again || err != nil {
			t.Errorf("%.40q: buffered: %v, %v, want %v", c.sent, whole, err, c.again)
		}
		first := tellRequest(q)
		if got := q.Body.Rewind(); got != c.again {
			t.Errorf("%.40q: rewound: %v, want %v", c.sent, got, c.again)
		}
		if second := tellRequest(q); c.again && second != first {
			t.Errorf("%.40q: second time %s, first %s", c.sent, second, first)
		}
	}
}

func TestBodiesAreBufferedOnDemand(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 40000)
	for _, c := range []struct {
		name, sent string
		most       int
		whole      bool
		again      bool
	}{
		{"no body", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", 1000, true, true},
		{"a length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 40000\r\n\r\n" + long, 60000, true, true},
		{"a length, not all of it", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 40000\r\n\r\n" + long, 1000, false, true},
		{"chunks", chunkedHead + strings.Repeat("5\r\nhello\r\n", 4000) + "0\r\nX: y\r\n\r\n", 60000, true, true},
		{"chunks, not all of them", chunkedHead + strings.Repeat("5\r\nhello\r\n", 8000) + "0\r\n\r\n", 30000, false, false},
		{"more than a buffer holds", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 80000\r\n\r\n" + long + long, 1 << 20, false, false},
	} {
		for _, step := range []int{0, 1, 1000} {
			conn := &wire{in: []byte(c.sent + "GET /next HTTP/1.1\r\nHost: a\r\n\r\n"), step: step}
			s := http1.NewServerConn(conn, http1.Config{})
			q, err := s.ReadRequest()
			if err != nil {
				t.Fatal(err)
			}
			if whole, err := q.Body.Buffer(c.most); whole != c.whole || err != nil {
				t.Errorf("%s, %d bytes at a time: Buffer(%d) = %v, %v, want %v", c.name, step, c.most, whole, err, c.whole)
			}
			first := tellRequest(q)
			if c.again != q.Body.Rewind() {
				t.Errorf("%s, %d bytes at a time: rewound: %v, want %v", c.name, step, !c.again, c.again)
			}
			if c.again && tellRequest(q) != first {
				t.Errorf("%s, %d bytes at a time: another body the second time", c.name, step)
			}
			if want := tellRequest(request(t, c.sent)); first != want {
				t.Errorf("%s, %d bytes at a time: a body of %d bytes told, want %d", c.name, step, len(first), len(want))
			}
			if err := s.Reply(204, "", nil); err != nil {
				t.Fatal(err)
			}
			if q, err := s.ReadRequest(); err != nil || q.Path != "/next" {
				t.Errorf("%s, %d bytes at a time: next request: %v", c.name, step, err)
			}
		}
	}
	for sent, want := range map[string]string{
		chunkedHead + "5\r\nhello!!":       "400 bad chunk",
		chunkedHead + "5\r\nhel":           "0 client closed",
		chunkedHead + "0\r\nX : y\r\n\r\n": "400 bad trailer",
	} {
		if _, err := request(t, sent).Body.Buffer(1000); err == nil || tell(err) != want {
			t.Errorf("Buffer of %q: %v, want %s", sent, err, want)
		}
	}
}

// TestValueIsWhatIsWritten: what Edits say that a field will be is what the head has that is written with them.
func TestValueIsWhatIsWritten(t *testing.T) {
	t.Parallel()
	names := []string{"x-one", "X-Two", "accept", "user-agent", "x-none"}
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		var head strings.Builder
		head.WriteString("GET / HTTP/1.1\r\nHost: a\r\n")
		for i := range r.IntN(6) {
			fmt.Fprintf(&head, "%s: v%d\r\n", names[r.IntN(len(names)-1)], i)
		}
		var e http1.Edits
		for i := range r.IntN(5) {
			name, value := strings.ToUpper(names[r.IntN(len(names)-1)]), fmt.Sprintf("e%d", i)
			[]func(){func() { e.Set(name, value) }, func() { e.Add(name, value) }, func() { e.Remove(name) }}[r.IntN(3)]()
		}
		q := request(t, head.String()+"\r\n")
		written := make(collected)
		e.Each(&q.Fields, written)
		for _, name := range names {
			got, ok := e.Value(&q.Fields, name)
			want, there := written[strings.ToLower(name)]
			if got != want || ok != there {
				t.Errorf("seed %d: %s is %q, %v and is written %q, %v", seed, name, got, ok, want, there)
			}
		}
	}
	var none *http1.Edits
	if v, ok := none.Value(nil, "a"); v != "" || ok {
		t.Errorf("nothing has a field %q, %v", v, ok)
	}
}

// collected are fields as they are written, joined by name.
type collected map[string]string

func (c collected) Field(name, value string) {
	name = strings.ToLower(name)
	if v, ok := c[name]; ok {
		value = v + "," + value
	}
	c[name] = value
}
