package waypoint_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint"
	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/http2"
)

// capitals is what a socket answers: its path, then what it hears, in capitals, to the end.
func capitals(path string, in io.Reader, out io.Writer) {
	_, _ = io.WriteString(out, path+" ")
	var b [4096]byte
	for {
		n, err := in.Read(b[:])
		_, _ = out.Write(bytes.ToUpper(b[:n]))
		if err != nil {
			return
		}
	}
}

// socket1 serves WebSockets as HTTP/1.1 does; a path may ask for something else.
func socket1(t *testing.T) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/no":
			http.Error(w, "no", http.StatusForbidden)
			return
		case "/deaf":
			fmt.Fprint(w, "hello")
			return
		}
		key := r.Header.Get("Sec-WebSocket-Key")
		if nonce, err := base64.StdEncoding.DecodeString(key); err != nil || len(nonce) != 16 || r.Header.Get("Sec-WebSocket-Version") != "13" || r.Method != "GET" {
			http.Error(w, "no handshake", http.StatusBadRequest)
			return
		}
		sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
		if r.URL.Path == "/forged" {
			sum[0]++
		}
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %s\r\nSec-WebSocket-Protocol: %s\r\n\r\n",
			base64.StdEncoding.EncodeToString(sum[:]), r.Header.Get("Sec-WebSocket-Protocol"))
		capitals(r.URL.Path, buf, conn)
	}
}

// socket2 is an application of HTTP/2 only that takes extended CONNECT.
func socket2(t *testing.T) netip.AddrPort {
	t.Helper()
	ln := listen(t, loopback()+":0")
	serve := func(st *http2.ServerStream) {
		q, err := st.Request()
		if _, ok := q.Value("sec-websocket-key"); err != nil || ok || q.Upgrade != "websocket" {
			t.Errorf("the application was asked for %q, with a key: %v, %v", q.Upgrade, ok, err)
		}
		if q.Path == "/no" {
			_ = st.Reply(403, "no", nil)
			return
		}
		// Its side of an exchange is not what the engine is for: it answers by one of its own, with an upstream of few words.
		protocol, _ := q.Value("sec-websocket-protocol")
		near, far := net.Pipe()
		defer far.Close()
		go func() { // ends with near
			defer near.Close()
			_, _ = http.ReadRequest(bufio.NewReader(near))
			_, _ = fmt.Fprintf(near, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: %s\r\n\r\n", protocol)
		}()
		x := st.Exchange(http1.NewClientConn(far, http1.Config{}))
		if err := x.Send(nil); err != nil {
			t.Error(err)
			return
		}
		if p, err := x.Receive(); err != nil || !p.Tunnel {
			t.Errorf("a tunnel: %v", err)
			return
		}
		if err := x.Respond(nil); err != nil {
			return
		}
		tunnel := st.Tunnel()
		capitals(q.Path, tunnel, tunnel)
		_ = tunnel.CloseWrite()
		_ = tunnel.Close()
	}
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				_ = http2.NewServerConn(conn, http2.Config{}).Serve(func() func(*http2.ServerStream) { return serve })
			}()
		}
	}()
	return addrPort(ln.Addr())
}

// socket is an open WebSocket of a client, or the response that was none.
type socket struct {
	resp *http.Response
	in   io.Reader
	out  io.Writer
	end  func() // of what is sent
}

const exampleKey = "dGhlIHNhbXBsZSBub25jZQ=="

// websocket1 asks for one as HTTP/1.1 does.
func (l *lab) websocket1(addr, path string) *socket {
	l.t.Helper()
	s, err := l.open(l.t.Context(), addr)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { s.Close() })
	_ = s.SetDeadline(time.Now().Add(30 * time.Second))
	_, _ = io.WriteString(s, "GET "+path+" HTTP/1.1\r\nHost: cart\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Protocol: chat\r\nSec-WebSocket-Key: "+exampleKey+"\r\n\r\n")
	r := bufio.NewReader(s)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		l.t.Fatalf("%s: %v", path, err)
	}
	if accept := resp.Header.Get("Sec-WebSocket-Accept"); resp.StatusCode == 101 && accept != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" { // RFC 6455, 1.3
		l.t.Errorf("%s: accepted with %q", path, accept)
	}
	return &socket{resp: resp, in: r, out: s, end: func() { _ = s.CloseWrite() }}
}

// transport2 is another implementation of HTTP/2, with CONNECT in both its forms.
func (l *lab) transport2(addr string) http.RoundTripper {
	//lint:ignore SA1019 net/http's own takes no header of the name :protocol
	tr := &xhttp2.Transport{AllowHTTP: true, DialTLSContext: func(ctx context.Context, _, _ string, _ *tls.Config) (net.Conn, error) { return l.open(ctx, addr) }}
	//lint:ignore SA1019 likewise
	l.t.Cleanup(tr.CloseIdleConnections)
	return tr
}

// websocket2 asks for one as HTTP/2 does, by another implementation of it.
func (l *lab) websocket2(addr, path string) *socket {
	l.t.Helper()
	tr := l.transport2(addr)
	body, out := io.Pipe()
	req, _ := http.NewRequestWithContext(l.t.Context(), "CONNECT", "http://"+addr+path, body)
	req.Header[":protocol"] = []string{"websocket"}
	req.Header.Set("Sec-WebSocket-Version", "13")
	req.Header.Set("Sec-WebSocket-Protocol", "chat")
	resp, err := tr.RoundTrip(req)
	if err != nil {
		l.t.Fatalf("%s: %v", path, err)
	}
	l.t.Cleanup(func() { resp.Body.Close() })
	if _, ok := resp.Header["Sec-Websocket-Accept"]; ok {
		l.t.Errorf("%s: the handshake of HTTP/1.1 is passed on", path)
	}
	return &socket{resp: resp, in: resp.Body, out: out, end: func() { out.Close() }}
}

// TestWebSockets: whichever version the two ends speak, they are joined, to the end of either direction.
func TestWebSockets(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(c *waypoint.Config) { c.SniffTimeout = 5 * time.Second })
	one, two := app(t, socket1(t)), socket2(t)
	both, only := app2(t, true, socket1(t)), app2(t, false, socket1(t))
	l.service("one", "10.9.0.1", mesh.AppHTTP1, one)
	l.service("two", "10.9.0.2", mesh.AppHTTP2, two)
	l.service("both", "10.9.0.3", mesh.AppHTTP2, both)
	l.service("only", "10.9.0.4", mesh.AppHTTP2, only)
	l.service("unknown", "10.9.0.5", mesh.AppUnknown, one)
	l.known("one", "two", "both", "only", "unknown")
	for _, c := range []struct {
		app, vip, path string
		status         int // for a client of HTTP/1.1; of HTTP/2 101 is 200
		same           bool
		flags          string
	}{
		{app: "one", vip: "10.9.0.1", path: "/chat", status: 101},
		{app: "two", vip: "10.9.0.2", path: "/chat", status: 101},
		{app: "both", vip: "10.9.0.3", path: "/chat", status: 101}, // by HTTP/1.1: net/http's HTTP/2 has no extended CONNECT
		{app: "unknown", vip: "10.9.0.5", path: "/chat", status: 101},
		{app: "one", vip: "10.9.0.1", path: "/no", status: 403, flags: "-"},
		{app: "two", vip: "10.9.0.2", path: "/no", status: 403, flags: "-"},
		{app: "only", vip: "10.9.0.4", path: "/chat", status: 502, flags: "UPE"},
	} {
		for version, ask := range map[int]func(string, string) *socket{1: l.websocket1, 2: l.websocket2} {
			s := ask(c.vip+":80", c.path)
			want := c.status
			if version == 2 && want == 101 {
				want = 200
			}
			if s.resp.StatusCode != want {
				t.Errorf("%s%s by HTTP/%d: %d, want %d", c.app, c.path, version, s.resp.StatusCode, want)
				continue
			}
			if c.status != 101 {
				l.counted(`destination_workload="`+c.app+`"`, fmt.Sprintf(`response_code="%d"`, want), `response_flags="`+c.flags+`"`)
				continue
			}
			if got := s.resp.Header.Get("Sec-WebSocket-Protocol"); got != "chat" {
				t.Errorf("%s by HTTP/%d: the subprotocol is %q, want chat", c.app, version, got)
			}
			said := strings.Repeat("hello ", 30_000) // more than a window
			heard := make(chan string)
			go func() { b, _ := io.ReadAll(s.in); heard <- string(b) }()
			_, _ = io.WriteString(s.out, said)
			s.end()
			if got := <-heard; got != c.path+" "+strings.ToUpper(said) {
				t.Errorf("%s by HTTP/%d: heard %d bytes, %.40q, want %d", c.app, version, len(got), got, len(c.path)+1+len(said))
			}
			l.counted(`destination_workload="`+c.app+`"`, fmt.Sprintf(`response_code="%d"`, want), `response_flags="-"`)
		}
	}
	// Where HTTP/1.1 has to prove something that HTTP/2 has not, the waypoint looks at it.
	for path, want := range map[string]int{"/forged": 502, "/deaf": 502} {
		if s := l.websocket2("10.9.0.1:80", path); s.resp.StatusCode != want {
			t.Errorf("%s by HTTP/2: %d, want %d", path, s.resp.StatusCode, want)
		}
	}
	l.eventually("logged", func() bool { return strings.Count(l.log.String(), `"response_flags":"UPE"`) == 4 })
}

// TestWebSocketsAreGoverned: rules, policies and a drain hold for those that come by HTTP/2 as for others.
func TestWebSocketsAreGoverned(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	svc := l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, socket1(t)))
	l.known("cart")
	l.routes(mesh.KindVirtualService,
		mesh.HTTPRule{Matches: prefix("/teapot"), Direct: &mesh.DirectResponse{Status: 418}},
		mesh.HTTPRule{Matches: prefix("/old"), Rewrite: &mesh.Rewrite{Path: mesh.PathEdit{Kind: mesh.ReplaceFull, Value: "/new"}},
			Timeout: 50 * time.Millisecond, Backends: []mesh.Backend{to("cart", 1)}})
	if s := l.websocket2("10.9.0.1:80", "/teapot"); s.resp.StatusCode != 418 {
		t.Errorf("/teapot: %d, want 418", s.resp.StatusCode)
	}
	if s := l.websocket2("10.9.0.1:80", "/none"); s.resp.StatusCode != 404 {
		t.Errorf("/none: %d, want 404", s.resp.StatusCode)
	}
	var s *socket
	l.eventually("a socket is open", func() bool { // on a busy machine the rule's timeout may be over before
		s = l.websocket2("10.9.0.1:80", "/old")
		return s.resp.StatusCode == 200
	})
	said := func(text, want string) {
		t.Helper()
		b := make([]byte, len(want))
		_, _ = io.WriteString(s.out, text)
		if _, err := io.ReadFull(s.in, b); err != nil || string(b) != want {
			t.Fatalf("heard %q, %v, want %q", b, err, want)
		}
	}
	said("a", "/new A")
	wait := time.NewTimer(100 * time.Millisecond) // the rule's timeout is for the answer
	defer wait.Stop()
	<-wait.C
	said("b", "B")

	l.policy("get-only", mesh.Allow, mesh.StringMatch{Kind: mesh.MatchExact, Value: "/else"})
	l.guarded(svc, "shop/get-only")
	if rest, err := io.ReadAll(s.in); err == nil {
		t.Errorf("a socket that no policy allows any more ended with %q and no error", rest)
	}
	l.eventually("logged", func() bool {
		return strings.Contains(l.log.String(), "policy changed") || strings.Contains(l.log.String(), "rbac_access_denied")
	})
	if s := l.websocket2("10.9.0.1:80", "/old"); s.resp.StatusCode != 403 {
		t.Errorf("a socket that no policy allows: %d, want 403", s.resp.StatusCode)
	}
}

// TestWebSocketsOutliveTheDrain: they come to their own end.
func TestWebSocketsOutliveTheDrain(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("one", "10.9.0.1", mesh.AppHTTP1, app(t, socket1(t)))
	l.service("two", "10.9.0.2", mesh.AppHTTP2, socket2(t))
	l.known("one", "two")
	all := []*socket{
		l.websocket1("10.9.0.1:80", "/"), l.websocket2("10.9.0.1:80", "/"), l.websocket1("10.9.0.2:80", "/"), l.websocket2("10.9.0.2:80", "/"),
	}
	l.stop()
	l.eventually("draining", func() bool { return strings.Contains(l.log.String(), `"draining"`) })
	for i, s := range all {
		_, _ = io.WriteString(s.out, "still here")
		s.end()
		if got, err := io.ReadAll(s.in); err != nil || string(got) != "/ STILL HERE" {
			t.Errorf("socket %d: heard %q, %v", i, got, err)
		}
	}
	l.end()
	if strings.Contains(l.log.String(), "cut at the end of the grace period") {
		t.Error("the waypoint did not end with its last socket")
	}
}

// TestPlainConnectIsRefused in either version: a waypoint is no proxy of the client's choice.
func TestPlainConnectIsRefused(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(http.ResponseWriter, *http.Request) { t.Error("the application was asked") }))
	l.known("cart")
	s, err := l.open(t.Context(), "10.9.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, _ = io.WriteString(s, "CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(s), nil)
	if err != nil || resp.StatusCode != 403 {
		t.Errorf("CONNECT by HTTP/1.1 = %v, %v, want 403", resp, err)
	}
	tr := l.transport2("10.9.0.1:80")
	req, _ := http.NewRequestWithContext(t.Context(), "CONNECT", "http://evil.example:443", http.NoBody)
	if resp, err = tr.RoundTrip(req); err != nil || resp.StatusCode != 403 {
		t.Errorf("CONNECT by HTTP/2 = %v, %v, want 403", resp, err)
	}
	l.eventually("logged", func() bool { return strings.Count(l.log.String(), `"response_code_details":"upgrade_failed"`) == 2 })
}
