package waypoint_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/mistnet/mistnet/internal/mesh"
)

// capricious is an application that does with each request what its path's whims say next, and at their end answers.
type capricious struct{ all sync.Map }

// whims are a list, and how many requests were looked at by it. One that was given up on may come late: it has a list of its own.
type whims struct {
	asked atomic.Int64
	next  chan string
	part  int           // bytes of the body that are read before
	did   chan struct{} // told of each time
}

// does is what is done with a request of a path.
func (a *capricious) does(path string) (*whims, string) {
	if w, ok := a.all.Load(path); ok {
		w := w.(*whims)
		w.asked.Add(1)
		select {
		case what := <-w.next:
			return w, what
		default:
		}
	}
	return nil, "answer"
}

// of makes the whims of a path.
func (a *capricious) of(path string, next []string) *whims {
	w := &whims{next: make(chan string, len(next)), did: make(chan struct{}, len(next))}
	for _, what := range next {
		w.next <- what
	}
	a.all.Store(path, w)
	return w
}

// newCapricious starts one of HTTP/2.
func newCapricious(t *testing.T) (*capricious, netip.AddrPort) {
	a := new(capricious)
	return a, a.listen(t, a.serve)
}

func (a *capricious) listen(t *testing.T, serve func(net.Conn)) netip.AddrPort {
	ln := listen(t, loopback()+":0")
	go func() { // ends with ln, and its connections with the waypoint
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go serve(conn)
		}
	}()
	return addrPort(ln.Addr())
}

func (a *capricious) serve(conn net.Conn) {
	defer conn.Close()
	if _, err := io.ReadFull(conn, make([]byte, len(xhttp2.ClientPreface))); err != nil {
		return
	}
	fr := xhttp2.NewFramer(conn, bufio.NewReader(conn))
	fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_ = fr.WriteSettings()
	type request struct {
		body strings.Builder
		*whims
		what string
	}
	requests := make(map[uint32]*request)
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return
		}
		id := f.Header().StreamID
		q := requests[id]
		switch f := f.(type) {
		case *xhttp2.SettingsFrame:
			if !f.IsAck() {
				_ = fr.WriteSettingsAck()
			}
		case *xhttp2.PingFrame:
			_ = fr.WritePing(true, f.Data)
		case *xhttp2.DataFrame:
			if n := uint32(len(f.Data())); q != nil && n > 0 {
				q.body.Write(f.Data())
				_, _ = fr.WriteWindowUpdate(0, n), fr.WriteWindowUpdate(id, n)
			}
		case *xhttp2.MetaHeadersFrame:
			q = new(request)
			q.whims, q.what = a.does(f.PseudoValue("path"))
			requests[id] = q
		}
		if q == nil {
			continue
		}
		if q.what != "answer" && q.body.Len() >= q.part {
			switch q.what {
			case "leave slowly":
				time.Sleep(150 * time.Millisecond)
				_ = fr.WriteGoAway(id-1, xhttp2.ErrCodeNo, nil)
			case "leave":
				_ = fr.WriteGoAway(id-1, xhttp2.ErrCodeNo, nil)
			case "refuse":
				_ = fr.WriteRSTStream(id, xhttp2.ErrCodeRefusedStream)
			case "reset":
				_ = fr.WriteRSTStream(id, xhttp2.ErrCodeInternal)
			}
			delete(requests, id)
			q.did <- struct{}{}
			if q.what == "vanish" {
				return
			}
			continue
		}
		if ends, ok := f.(interface{ StreamEnded() bool }); ok && ends.StreamEnded() {
			var head bytes.Buffer
			_ = hpack.NewEncoder(&head).WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
			_ = fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, EndHeaders: true, BlockFragment: head.Bytes()})
			for text := []byte("heard " + q.body.String()); len(text) > 0; {
				n := min(len(text), 16<<10)
				_ = fr.WriteData(id, n == len(text), text[:n])
				text = text[n:]
			}
			delete(requests, id)
		}
	}
}

// serve1 is serve in HTTP/1.1, where all that can be done with a request is to end its connection.
func (a *capricious) serve1(conn net.Conn) {
	defer conn.Close()
	r := bufio.NewReader(conn)
	for {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		w, what := a.does(req.RequestURI)
		if what != "answer" {
			_, _ = io.CopyN(io.Discard, req.Body, int64(w.part))
			w.did <- struct{}{}
			return
		}
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return
		}
		fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nheard %s", len("heard ")+len(body), body)
	}
}

// TestARequestThatNobodyLookedAt is sent again without a retry policy, some times and to its end, in the time that its try has. One that
// may have been looked at is not, and an application that refuses requests is not pressed.
func TestARequestThatNobodyLookedAt(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	a, at := newCapricious(t)
	l.service("cart", "10.9.0.1", mesh.AppHTTP2, at)
	l.known("cart")
	l.routes(mesh.KindVirtualService,
		mesh.HTTPRule{Matches: []mesh.HTTPMatch{{Path: mesh.PathMatch{Kind: mesh.PathPrefix, Value: "/short"}}}, TryTimeout: 200 * time.Millisecond,
			Retry: &mesh.Retry{}, Backends: []mesh.Backend{to("cart", 1)}},
		mesh.HTTPRule{Retry: &mesh.Retry{}, Backends: []mesh.Backend{to("cart", 1)}})
	times := func(n int, what string) []string { return strings.Split(strings.Repeat(what+",", n)+"answer", ",") }
	cases := 0
	for name, c := range map[string]struct {
		method, path string
		next         []string
		status, asks int // at most, if below 0
	}{
		"its connections drain, one after the other":   {"POST", "/", times(4, "leave"), 200, 5},
		"all connections drain":                        {"GET", "/", times(50, "leave"), 503, 5},
		"they drain while the time of its try goes by": {"GET", "/short", times(4, "leave slowly"), 504, -2},
		"it is refused once":                           {"POST", "/", times(1, "refuse"), 200, 2},
		"it is refused":                                {"POST", "/", times(2, "refuse"), 503, 2},
		"it is refused where a connection drained":     {"POST", "/", []string{"leave", "refuse"}, 503, 2},
		"a kept connection ends":                       {"GET", "/", times(1, "vanish"), 200, 2},
		"a connection made for it ends, too":           {"GET", "/", times(2, "vanish"), 503, 2},
		"it may not be sent twice":                     {"POST", "/", times(1, "vanish"), 503, 1},
		"one drains, and a new one ends":               {"GET", "/", []string{"leave", "vanish"}, 503, 2},
	} {
		if resp, body := l.get("http://10.9.0.1/"); resp.StatusCode != 200 { // a connection is kept
			t.Fatalf("%s: before it: %d %q", name, resp.StatusCode, body)
		}
		cases++
		path := fmt.Sprint(c.path, "?", cases)
		w, text := a.of(path, c.next), ""
		if c.method == "POST" {
			text = strings.Repeat("all of it ", 100)
		}
		req, err := http.NewRequestWithContext(t.Context(), c.method, "http://10.9.0.1"+path, strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		resp, body := l.do(req)
		asks := int(w.asked.Load())
		if resp.StatusCode != c.status || asks != c.asks && (c.asks > 0 || asks > -c.asks) || c.status == 200 && body != "heard "+text {
			t.Errorf("%s: %d %.80q of %d asks, want %d of %s", name, resp.StatusCode, body, asks, c.status, fmt.Sprint(c.asks))
		}
	}
}

// TestARequestThatWasSentInPart is sent again, too, and by the same rules, whatever it came as and goes as, as long as what has gone of it
// is still there. Its client sends the rest when its application has done what it does.
func TestARequestThatWasSentInPart(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	a, two := newCapricious(t)
	l.service("cart", "10.9.0.1", mesh.AppHTTP2, two)
	l.service("one", "10.9.0.2", mesh.AppHTTP1, a.listen(t, a.serve1))
	l.known("cart", "one")
	for _, name := range []string{"cart", "one"} {
		l.routesOf(name, mesh.KindVirtualService,
			mesh.HTTPRule{Matches: []mesh.HTTPMatch{{Path: mesh.PathMatch{Kind: mesh.PathPrefix, Value: "/retried"}}},
				Retry: &mesh.Retry{Attempts: 1, On: mesh.RetryOnReset, Backoff: time.Millisecond}, Backends: []mesh.Backend{to(name, 1)}},
			mesh.HTTPRule{Retry: &mesh.Retry{}, Backends: []mesh.Backend{to(name, 1)}})
	}
	times := func(n int, what string) []string { return strings.Split(strings.Repeat(what+",", n)+"answer", ",") }
	const (
		small = 3000
		most  = 50_000
		much  = 100_000 // more than is kept
	)
	h2 := l.client2()
	clients := []struct {
		name   string
		client *http.Client
		length bool
		header http.Header
	}{
		{"HTTP/1.1, in chunks", l.client, false, nil},
		{"HTTP/1.1, by its length", l.client, true, nil},
		{"HTTP/2", h2, false, nil},
		{"HTTP/2, with a length", h2, true, nil},
		{"gRPC", h2, false, http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}}},
	}
	cases := 0
	for _, c := range []struct {
		name         string
		method, path string
		sent         int // bytes, before
		next         []string
		status, asks int
	}{
		{"its connection ends", "PUT", "/", small, times(1, "vanish"), 200, 2},
		{"its connection ends, and it is not idempotent", "POST", "/", small, times(1, "vanish"), 503, 1},
		{"its connection ends, and much has gone of it", "PUT", "/", most, times(1, "vanish"), 200, 2},
		{"its connection ends, and more has gone of it than is kept", "PUT", "/", much, times(1, "vanish"), 503, 1},
		{"its connection ends, and it is to be retried", "POST", "/retried", small, times(1, "vanish"), 200, 2},
		{"its connections end, and it is to be retried once", "POST", "/retried", small, times(2, "vanish"), 503, 2},
		{"its connection ends, and it is to be retried, and more has gone of it than is kept", "POST", "/retried", much, times(1, "vanish"), 503, 1},
		{"its connection drains", "POST", "/", small, times(1, "leave"), 200, 2},
		{"its connections drain", "POST", "/", most, times(4, "leave"), 200, 5},
		{"its connection drains, and more has gone of it than is kept", "POST", "/", much, times(1, "leave"), 503, 1},
		{"it is refused", "POST", "/", small, times(1, "refuse"), 200, 2},
		{"it is refused, and more has gone of it than is kept", "POST", "/", much, times(1, "refuse"), 503, 1},
		{"it is reset", "PUT", "/", small, times(1, "reset"), 503, 1},
		{"it is reset, and is to be retried", "POST", "/retried", most, times(1, "reset"), 200, 2},
	} {
		for _, as := range clients {
			for _, host := range []string{"10.9.0.1", "10.9.0.2"} {
				grpc, plain := as.header != nil, host == "10.9.0.2"
				if grpc && (c.method != "POST" || plain) || plain && c.next[0] != "vanish" {
					continue
				}
				name := fmt.Sprintf("%s to %s: %s", as.name, host, c.name)
				if resp, body := l.get("http://" + host + "/"); resp.StatusCode != 200 { // a connection is kept
					t.Fatalf("%s: before it: %d %q", name, resp.StatusCode, body)
				}
				l.eventually("a connection is kept", l.unused)
				cases++
				path := fmt.Sprint(c.path, "?", cases)
				w := a.of(path, c.next)
				w.part = c.sent
				text := strings.Repeat("all of it ", c.sent/10+1000)
				body, out := io.Pipe()
				req, err := http.NewRequestWithContext(t.Context(), c.method, "http://"+host+path, body)
				if err != nil {
					t.Fatal(err)
				}
				if as.length {
					req.ContentLength = int64(len(text))
				}
				for name, v := range as.header {
					req.Header[name] = v
				}
				answered, wrote := make(chan struct{}), make(chan struct{})
				go func() { // ends with the request
					defer close(wrote)
					_, _ = io.WriteString(out, text[:c.sent])
					for range len(c.next) - 1 {
						select {
						case <-w.did:
						case <-answered: // by whom nobody asked
						}
					}
					_, _ = io.WriteString(out, text[c.sent:])
					_ = out.Close()
				}()
				resp, err := as.client.Do(req)
				close(answered)
				if err != nil {
					t.Errorf("%s: %v", name, err)
					_ = body.Close()
					continue
				}
				got, err := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				_ = body.Close()
				<-wrote
				asks, status := int(w.asked.Load()), resp.StatusCode
				if grpc && resp.Header.Get("grpc-status") == "14" { // unavailable
					status = 503
				}
				if status != c.status || asks != c.asks || c.status == 200 && (err != nil || string(got) != "heard "+text) {
					t.Errorf("%s: %d %.80q of %d asks, %v, want %d of %d", name, status, got, asks, err, c.status, c.asks)
				}
			}
		}
	}
}
