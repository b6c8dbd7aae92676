package http1_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// proxy is the smallest program around the engine: one goroutine per client, one upstream connection for each.
type proxy struct {
	dial    func() (net.Conn, error)
	cfg     http1.Config
	dialed  atomic.Int64
	reasons chan string // of failed exchanges, as they happen; may be nil
}

func (p *proxy) serve(conn net.Conn) {
	s := http1.NewServerConn(conn, p.cfg)
	defer s.Close()
	var up *http1.ClientConn
	defer func() {
		if up != nil {
			up.Close()
		}
	}()
	var edits http1.Edits
	for {
		_, err := s.ReadRequest()
		if err != nil {
			if err != io.EOF {
				p.failed(err)
				_ = s.ReplyError(err, nil)
			}
			return
		}
		if up == nil || !up.Reusable() {
			if up != nil {
				up.Close()
			}
			conn, err := p.dial()
			if err != nil {
				_ = s.Reply(503, "no upstream", nil)
				continue
			}
			p.dialed.Add(1)
			up = http1.NewClientConn(conn, p.cfg)
		}
		edits.Reset()
		edits.Set("x-request-id", "7")
		x := s.Exchange(up)
		var resp *http1.Response
		if err = x.Send(&edits); err == nil {
			resp, err = x.Receive()
		}
		if err == nil {
			edits.Reset()
			edits.Set("x-proxied", "yes")
			err = x.Respond(&edits)
		}
		if err != nil {
			p.failed(err)
			_ = s.ReplyError(err, nil)
			continue
		}
		if resp.Tunnel {
			join(s.Raw(), up.Raw())
			return
		}
	}
}

func (p *proxy) failed(err error) {
	if p.reasons != nil {
		p.reasons <- tell(err)
	}
}

func join(a, b *http1.RawConn) {
	var wg sync.WaitGroup
	for _, ends := range [][2]*http1.RawConn{{a, b}, {b, a}} {
		wg.Go(func() {
			_, _ = io.Copy(ends[0], ends[1])
			_ = ends[0].CloseWrite()
		})
	}
	wg.Wait()
	a.Close()
	b.Close()
}

// listen runs the proxy on loopback and returns its address.
func (p *proxy) listen(t *testing.T) string {
	t.Helper()
	return listen(t, p.serve)
}

func listen(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serve(conn) })
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return ln.Addr().String()
}

// between puts a proxy before a net/http server, and returns its address, itself and a net/http client of it.
func between(t *testing.T, h http.HandlerFunc) (string, *proxy, *http.Client) {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	p := &proxy{dial: func() (net.Conn, error) { return net.Dial("tcp", srv.Listener.Addr().String()) }}
	addr := p.listen(t)
	tr := &http.Transport{DisableCompression: true, ExpectContinueTimeout: time.Minute, MaxConnsPerHost: 1}
	t.Cleanup(tr.CloseIdleConnections) // before the proxy waits for its clients
	return addr, p, &http.Client{Transport: tr}
}

func TestProxyCarriesRequestsOfNetHTTP(t *testing.T) {
	t.Parallel()
	big := bytes.Repeat([]byte("0123456789abcdef"), 20000)
	addr, p, client := between(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("x-request-id") != "7" {
			t.Errorf("%s came without the proxy's edit", r.URL)
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Errorf("%s: read body: %v", r.URL, err)
		}
		switch r.URL.Path {
		case "/echo":
			w.Header().Set("X-Length", fmt.Sprint(r.ContentLength))
			w.Header().Set("X-Trailer", r.Trailer.Get("X-Sum"))
			_, _ = w.Write(body)
		case "/trailers":
			w.Header().Set("Trailer", "X-Sum")
			_, _ = w.Write([]byte("ok"))
			w.Header().Set("X-Sum", "9")
		case "/chunks":
			for range 5 {
				_, _ = w.Write(big[:50000])
				w.(http.Flusher).Flush()
			}
		case "/none":
			w.WriteHeader(http.StatusNoContent)
		}
	})
	url := "http://" + addr
	do := func(method, path string, body io.Reader) (*http.Response, []byte) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, url+path, body)
		if err != nil {
			t.Fatal(err)
		}
		if method == "TRAILERS" {
			req.Method, req.Trailer = "POST", http.Header{"X-Sum": {"3"}}
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
		defer resp.Body.Close()
		got, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatalf("%s %s: read: %v", method, path, err)
		}
		if resp.Header.Get("x-proxied") != "yes" {
			t.Errorf("%s %s: the proxy's edit is missing", method, path)
		}
		return resp, got
	}
	for range 3 {
		if _, got := do("POST", "/echo", strings.NewReader("hello")); string(got) != "hello" {
			t.Errorf("a small body came back as %q", got)
		}
		if resp, got := do("POST", "/echo", bytes.NewReader(big)); !bytes.Equal(got, big) || resp.Header.Get("X-Length") != fmt.Sprint(len(big)) {
			t.Errorf("a large body came back with %d bytes, declared %s", len(got), resp.Header.Get("X-Length"))
		}
		if resp, got := do("POST", "/echo", io.MultiReader(bytes.NewReader(big))); !bytes.Equal(got, big) || resp.Header.Get("X-Length") != "-1" {
			t.Errorf("a chunked upload came back with %d bytes, declared %s", len(got), resp.Header.Get("X-Length"))
		}
		if resp, got := do("TRAILERS", "/echo", io.MultiReader(strings.NewReader("x"))); string(got) != "x" || resp.Header.Get("X-Trailer") != "3" {
			t.Errorf("an upload with trailers came back as %q, trailer %q", got, resp.Header.Get("X-Trailer"))
		}
		if resp, got := do("GET", "/trailers", nil); string(got) != "ok" || resp.Trailer.Get("X-Sum") != "9" {
			t.Errorf("got %q with trailers %v", got, resp.Trailer)
		}
		if _, got := do("GET", "/chunks", nil); len(got) != 250000 {
			t.Errorf("got %d bytes of chunks", len(got))
		}
		if resp, got := do("HEAD", "/echo", nil); len(got) != 0 || resp.StatusCode != 200 {
			t.Errorf("HEAD: %d, %q", resp.StatusCode, got)
		}
		if resp, _ := do("GET", "/none", nil); resp.StatusCode != 204 {
			t.Errorf("got %d, want 204", resp.StatusCode)
		}
	}
	if n := p.dialed.Load(); n != 1 {
		t.Errorf("24 requests took %d upstream connections, want 1", n)
	}
}

func TestProxyAnswersPipelinedRequestsInOrder(t *testing.T) {
	t.Parallel()
	addr, p, _ := between(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s", r.URL.Path, body)
	})
	conn := dial(t, addr)
	var sent strings.Builder
	for i := range 20 {
		fmt.Fprintf(&sent, "POST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", i)
		fmt.Fprintf(&sent, "POST /%d HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", i)
	}
	write(t, conn, sent.String())
	r := bufio.NewReader(conn)
	for i := range 40 {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if want := fmt.Sprintf("/%d abc", i/2); string(body) != want || err != nil {
			t.Fatalf("response %d = %q, %v, want %q", i, body, err, want)
		}
	}
	if n := p.dialed.Load(); n != 1 {
		t.Errorf("took %d upstream connections, want 1", n)
	}
}

func dial(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(time.Minute)) // a test that hangs fails
	return conn.(*net.TCPConn)
}

func write(t *testing.T, conn net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(conn, s); err != nil {
		t.Fatal(err)
	}
}

func TestProxyPassesOn100Continue(t *testing.T) {
	t.Parallel()
	addr, _, client := between(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		_, _ = io.Copy(w, r.Body)
	})
	for _, path := range []string{"/yes", "/no", "/yes"} {
		req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+addr+path, strings.NewReader("hello"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Expect", "100-continue")
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if want := map[string]string{"/yes": "200 hello", "/no": "403 no\n"}[path]; fmt.Sprintf("%d %s", resp.StatusCode, body) != want {
			t.Errorf("%s: %d %q, want %s", path, resp.StatusCode, body, want)
		}
		if path == "/no" && !resp.Close {
			t.Error("the client may or may not send the body it announced, yet the connection stays open")
		}
	}
	// The client that sends nothing before it is told to, byte for byte.
	conn := dial(t, addr)
	write(t, conn, "POST /yes HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-Continue\r\n\r\n")
	r := bufio.NewReader(conn)
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 100 {
		t.Fatalf("first response: %v, %v, want 100", resp, err)
	}
	write(t, conn, "hello")
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 200 || resp.Close {
		t.Fatalf("second response: %v, %v, want 200 and the connection kept", resp, err)
	}
}

func TestProxyUpgrades(t *testing.T) {
	t.Parallel()
	upstream := listen(t, func(conn net.Conn) {
		defer conn.Close()
		r := bufio.NewReader(conn)
		req, err := http.ReadRequest(r)
		if err != nil || req.Header.Get("Upgrade") != "echo/1" || !strings.EqualFold(req.Header.Get("Connection"), "upgrade") {
			t.Errorf("upgrade arrived as %v, %v", req, err)
			return
		}
		if req.URL.Path == "/no" {
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")
			return
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo/1\r\nX: y\r\n\r\nhi ")
		_, _ = io.Copy(conn, r)
	})
	p := &proxy{dial: func() (net.Conn, error) { return net.Dial("tcp", upstream) }}
	addr := p.listen(t)

	conn := dial(t, addr)
	write(t, conn, "GET /yes HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo/1\r\n\r\nearly ")
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "echo/1" || resp.Header.Get("X") != "y" || resp.Header.Get("Connection") != "Upgrade" {
		t.Fatalf("got %v, %v, want 101", resp, err)
	}
	write(t, conn, "\x00late")
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if want := "hi early \x00late"; string(got) != want || err != nil {
		t.Errorf("through the tunnel came %q, %v, want %q", got, err, want)
	}

	conn = dial(t, addr)
	write(t, conn, "GET /no HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo/1\r\n\r\nGET /#/ HTTP/1.1\r\nHost: a\r\n\r\n")
	all, err := io.ReadAll(conn)
	if !strings.Contains(string(all), "HTTP/1.1 200 OK\r\n") || !strings.Contains(string(all), "HTTP/1.1 400 ") || err != nil {
		t.Errorf("a refused upgrade and what hid behind it: %q, %v, want 200 and 400", all, err)
	}
}

func TestProxyPassesOnEarlyResponses(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	addr, _, _ := between(t, func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		switch r.URL.Path {
		case "/talk": // a line out for each that comes in
			w.WriteHeader(200)
			w.(http.Flusher).Flush()
			in := bufio.NewReader(r.Body)
			for {
				line, err := in.ReadString('\n')
				if err != nil {
					return
				}
				_, _ = io.WriteString(w, "got "+line)
				w.(http.Flusher).Flush()
			}
		case "/refuse":
			w.Header().Set("Connection", "close")
			http.Error(w, "enough", http.StatusRequestEntityTooLarge)
		}
	})

	conn := dial(t, addr)
	write(t, conn, "POST /talk HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("a response while the request is on its way: %v, %v", resp, err)
	}
	in := bufio.NewReader(resp.Body)
	for i := range 10 {
		line := fmt.Sprintf("line %d\n", i)
		write(t, conn, fmt.Sprintf("%x\r\n%s\r\n", len(line), line))
		if got, err := in.ReadString('\n'); got != "got "+line || err != nil {
			t.Fatalf("answer %d = %q, %v", i, got, err)
		}
	}
	write(t, conn, "0\r\n\r\n")
	if rest, err := io.ReadAll(in); len(rest) > 0 || err != nil {
		t.Fatalf("the end: %q, %v", rest, err)
	}
	write(t, conn, "GET /next HTTP/1.1\r\nHost: a\r\n\r\n")
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 200 {
		t.Fatalf("the next request on the connection: %v, %v", resp, err)
	}

	conn = dial(t, addr)
	write(t, conn, fmt.Sprintf("POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", size))
	write(t, conn, strings.Repeat("x", 1000))
	resp, err = http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != 413 || !resp.Close {
		t.Fatalf("a refusal with most of the body not sent: %v, %v, want 413 and close", resp, err)
	}
	if body, err := io.ReadAll(resp.Body); string(body) != "enough\n" || err != nil {
		t.Errorf("body of the refusal: %q, %v", body, err)
	}
}

func TestErrorsAreTold(t *testing.T) {
	t.Parallel()
	p := &proxy{dial: func() (net.Conn, error) { return nil, errors.New("nobody there") }}
	addr := p.listen(t)
	for sent, want := range map[string]string{
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n":                     "503 no upstream",
		"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n":                               "400 400 bad host\n",
		"GET / HTTP/1.0\r\n\r\n":                                                     "426 426 old version\n",
		"GET / HTTP/1.1\r\nHost: a\r\nX: \x01\r\n\r\n" + strings.Repeat("x", 100000): "400 400 bad field\n",
	} {
		conn := dial(t, addr)
		write(t, conn, sent)
		if got, complete := response(conn); got != want || !complete {
			t.Errorf("%.60q: %q, complete: %v, want %q", sent, got, complete, want)
		}
	}
}
