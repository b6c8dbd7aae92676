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

// capricious is an application of HTTP/2 that does with each request what its path's whims say next, and at their end answers.
type capricious struct{ all sync.Map }

// whims are a list, and how many requests were looked at by it. One that was given up on may come late: it has a list of its own.
type whims struct {
	asked atomic.Int64
	next  chan string
}

// of makes the whims of a path.
func (a *capricious) of(path string, next []string) *whims {
	w := &whims{next: make(chan string, len(next))}
	for _, what := range next {
		w.next <- what
	}
	a.all.Store(path, w)
	return w
}

func newCapricious(t *testing.T) (*capricious, netip.AddrPort) {
	a := new(capricious)
	ln := listen(t, loopback()+":0")
	go func() { // ends with ln, and its connections with the waypoint
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go a.serve(conn)
		}
	}()
	return a, addrPort(ln.Addr())
}

func (a *capricious) serve(conn net.Conn) {
	defer conn.Close()
	if _, err := io.ReadFull(conn, make([]byte, len(xhttp2.ClientPreface))); err != nil {
		return
	}
	fr := xhttp2.NewFramer(conn, bufio.NewReader(conn))
	fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_ = fr.WriteSettings()
	bodies := make(map[uint32]*strings.Builder)
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return
		}
		id := f.Header().StreamID
		switch f := f.(type) {
		case *xhttp2.SettingsFrame:
			if !f.IsAck() {
				_ = fr.WriteSettingsAck()
			}
		case *xhttp2.PingFrame:
			_ = fr.WritePing(true, f.Data)
		case *xhttp2.DataFrame:
			if b := bodies[id]; b != nil {
				b.Write(f.Data())
			}
		case *xhttp2.MetaHeadersFrame:
			what := "answer"
			if w, ok := a.all.Load(f.PseudoValue("path")); ok {
				w.(*whims).asked.Add(1)
				select {
				case what = <-w.(*whims).next:
				default:
				}
			}
			switch what {
			case "leave slowly":
				time.Sleep(150 * time.Millisecond)
				_ = fr.WriteGoAway(id-1, xhttp2.ErrCodeNo, nil)
			case "leave":
				_ = fr.WriteGoAway(id-1, xhttp2.ErrCodeNo, nil)
			case "refuse":
				_ = fr.WriteRSTStream(id, xhttp2.ErrCodeRefusedStream)
			case "vanish":
				return
			default:
				bodies[id] = new(strings.Builder)
			}
		}
		b := bodies[id]
		if ends, ok := f.(interface{ StreamEnded() bool }); ok && ends.StreamEnded() && b != nil {
			var head bytes.Buffer
			_ = hpack.NewEncoder(&head).WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
			_ = fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, EndHeaders: true, BlockFragment: head.Bytes()})
			_ = fr.WriteData(id, true, []byte("heard "+b.String()))
			delete(bodies, id)
		}
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
