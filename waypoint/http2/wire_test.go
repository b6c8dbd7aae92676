package http2_test

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/http2"
)

// wire is a peer that speaks frames by hand. It runs inside a synctest bubble: expect waits until everything has come to
// rest and then looks at what arrived.
type wire struct {
	*xhttp2.Framer
	t    *testing.T
	conn *memConn
	enc  *hpack.Encoder
	hbuf bytes.Buffer

	plain bool // it puts nothing into the table

	mu   sync.Mutex
	got  []string
	gone bool
	busy sync.WaitGroup
}

func newWire(t *testing.T, conn *memConn) *wire {
	w := &wire{Framer: xhttp2.NewFramer(conn, conn), t: t, conn: conn}
	w.enc = hpack.NewEncoder(&w.hbuf)
	w.AllowIllegalWrites = true
	w.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	return w
}

// listen collects frames, in words.
func (w *wire) listen() {
	w.busy.Go(func() {
		for {
			f, err := w.ReadFrame()
			if err != nil {
				break
			}
			w.note(f)
		}
		w.mu.Lock()
		w.gone = true
		w.mu.Unlock()
	})
}

func (w *wire) note(f xhttp2.Frame) {
	w.mu.Lock()
	defer w.mu.Unlock()
	h := f.Header()
	s := fmt.Sprintf("%v %d", h.Type, h.StreamID)
	switch f := f.(type) {
	case *xhttp2.SettingsFrame:
		if s = "SETTINGS"; f.IsAck() {
			s += " ack"
		}
	case *xhttp2.MetaHeadersFrame:
		s += " " + f.PseudoValue("status") + f.PseudoValue("method") + f.PseudoValue("path")
		if len(f.PseudoFields()) == 0 {
			for _, x := range f.Fields {
				s += " " + x.Name + "=" + x.Value
			}
		}
	case *xhttp2.DataFrame:
		s += fmt.Sprintf(" %d bytes", len(f.Data()))
	case *xhttp2.RSTStreamFrame:
		s += " " + f.ErrCode.String()
	case *xhttp2.GoAwayFrame:
		s = fmt.Sprintf("GOAWAY %d %v", f.LastStreamID, f.ErrCode)
	case *xhttp2.WindowUpdateFrame:
		s += fmt.Sprintf(" +%d", f.Increment)
	case *xhttp2.PingFrame:
		if s = "PING"; f.IsAck() {
			s += " ack"
		}
	}
	if h.StreamID != 0 && h.Type <= xhttp2.FrameHeaders && h.Flags.Has(xhttp2.FlagDataEndStream) {
		s += " end"
	}
	w.got = append(w.got, s)
}

// take waits for rest and returns what arrived since the last time; "gone" at its end if the connection closed.
func (w *wire) take() []string {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	got := w.got
	w.got = nil
	if w.gone {
		got = append(got, "gone")
	}
	return got
}

// expect compares what arrived.
func (w *wire) expect(want ...string) {
	w.t.Helper()
	if got := w.take(); !slices.Equal(got, want) {
		w.t.Fatalf("peer sent %q, want %q", got, want)
	}
}

// block encodes name, value, name, value ...
func (w *wire) block(fields ...string) []byte {
	w.hbuf.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = w.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1], Sensitive: w.plain})
	}
	return slices.Clone(w.hbuf.Bytes())
}

// headers sends a complete header block, in as many frames as it takes.
func (w *wire) headers(stream uint32, end bool, fields ...string) {
	b := w.block(fields...)
	n := min(len(b), 16384)
	_ = w.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: stream, EndStream: end, EndHeaders: n == len(b), BlockFragment: b[:n]})
	for b = b[n:]; len(b) > 0; b = b[n:] {
		n = min(len(b), 16384)
		_ = w.WriteContinuation(stream, n == len(b), b[:n])
	}
}

// request is the head of a request, with these fields more.
func request(more ...string) []string {
	return append([]string{":method", "POST", ":scheme", "http", ":authority", "cart", ":path", "/"}, more...)
}

func (w *wire) get(stream uint32) {
	w.headers(stream, true, ":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/")
}

// echo reads the body and answers with its length.
func echo(st *http2.ServerStream) {
	q, err := st.Request()
	n := 0
	for err == nil {
		var p []byte
		p, err = q.Body.Next()
		n += len(p)
	}
	if err != io.EOF {
		_ = st.ReplyError(err, nil)
		return
	}
	_ = st.Reply(200, fmt.Sprint(n), nil)
}

// toServer runs test against a connection that is served in memory. The client's side of the opening is done.
func toServer(t *testing.T, cfg http2.Config, serve func(*http2.ServerStream), test func(t *testing.T, w *wire, c *http2.ServerConn)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		near, far := memPipe()
		c := http2.NewServerConn(far, cfg)
		var served sync.WaitGroup
		served.Go(func() { _ = c.Serve(func() func(*http2.ServerStream) { return serve }) })
		w := newWire(t, near)
		defer func() {
			near.Close()
			served.Wait()
			w.busy.Wait()
		}()
		_, _ = io.WriteString(near, xhttp2.ClientPreface)
		_ = w.WriteSettings()
		w.listen()
		w.expect("SETTINGS", "WINDOW_UPDATE 0 +4128769", "SETTINGS ack")
		test(t, w, c)
	})
}

func TestServerEndsTheConnectionOnProtocolErrors(t *testing.T) {
	bad := func(typ xhttp2.FrameType, flags xhttp2.Flags, stream uint32, n int) func(*wire) {
		return func(w *wire) { _ = w.WriteRawFrame(typ, flags, stream, make([]byte, n)) }
	}
	for _, tc := range []struct {
		name string
		send func(*wire)
		want string
	}{
		{"DATA on stream 0", bad(xhttp2.FrameData, 0, 0, 5), "PROTOCOL_ERROR"},
		{"DATA on an idle stream", bad(xhttp2.FrameData, 0, 9, 5), "PROTOCOL_ERROR"},
		{"DATA with more padding than frame", func(w *wire) {
			_ = w.WriteRawFrame(xhttp2.FrameData, xhttp2.FlagDataPadded, 1, []byte{9, 0, 0})
		}, "PROTOCOL_ERROR"},
		{"DATA on a stream that was ended", func(w *wire) { w.get(3); w.take(); _ = w.WriteData(3, false, []byte("x")) }, "STREAM_CLOSED"},
		{"a request on a stream that was ended", func(w *wire) { w.get(3); w.take(); w.get(3) }, "STREAM_CLOSED"},
		{"a request on a stream that was passed over", func(w *wire) { w.get(5); w.take(); w.get(3) }, "PROTOCOL_ERROR"},
		{"WINDOW_UPDATE on an idle stream", func(w *wire) { _ = w.WriteWindowUpdate(9, 1) }, "PROTOCOL_ERROR"},
		{"WINDOW_UPDATE of zero", func(w *wire) { _ = w.WriteWindowUpdate(0, 0) }, "PROTOCOL_ERROR"},
		{"WINDOW_UPDATE beyond 2^31-1", func(w *wire) { _ = w.WriteWindowUpdate(0, 1<<31-1) }, "FLOW_CONTROL_ERROR"},
		{"WINDOW_UPDATE of 3 bytes", bad(xhttp2.FrameWindowUpdate, 0, 0, 3), "FRAME_SIZE_ERROR"},
		{"RST_STREAM on an idle stream", func(w *wire) { _ = w.WriteRSTStream(9, xhttp2.ErrCodeCancel) }, "PROTOCOL_ERROR"},
		{"RST_STREAM on stream 0", bad(xhttp2.FrameRSTStream, 0, 0, 4), "PROTOCOL_ERROR"},
		{"RST_STREAM of 5 bytes", bad(xhttp2.FrameRSTStream, 0, 1, 5), "FRAME_SIZE_ERROR"},
		{"HEADERS on an even stream", func(w *wire) { w.get(2) }, "PROTOCOL_ERROR"},
		{"HEADERS on stream 0", bad(xhttp2.FrameHeaders, xhttp2.FlagHeadersEndHeaders, 0, 1), "PROTOCOL_ERROR"},
		{"HEADERS that depend on themselves", func(w *wire) {
			_ = w.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 3, EndHeaders: true, BlockFragment: w.block(request()...), Priority: xhttp2.PriorityParam{StreamDep: 3}})
		}, "PROTOCOL_ERROR"},
		{"HEADERS that are no HPACK", func(w *wire) {
			_ = w.WriteRawFrame(xhttp2.FrameHeaders, xhttp2.FlagHeadersEndHeaders, 3, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
		}, "COMPRESSION_ERROR"},
		{"CONTINUATION alone", bad(xhttp2.FrameContinuation, 0, 1, 1), "PROTOCOL_ERROR"},
		{"another frame within a header block", func(w *wire) {
			_ = w.WriteRawFrame(xhttp2.FrameHeaders, 0, 3, nil)
			_ = w.WritePing(false, [8]byte{})
		}, "PROTOCOL_ERROR"},
		{"CONTINUATION of another stream", func(w *wire) {
			_ = w.WriteRawFrame(xhttp2.FrameHeaders, 0, 3, nil)
			_ = w.WriteContinuation(5, true, nil)
		}, "PROTOCOL_ERROR"},
		{"SETTINGS on a stream", bad(xhttp2.FrameSettings, 0, 1, 6), "PROTOCOL_ERROR"},
		{"SETTINGS of 5 bytes", bad(xhttp2.FrameSettings, 0, 0, 5), "FRAME_SIZE_ERROR"},
		{"SETTINGS ack with payload", bad(xhttp2.FrameSettings, xhttp2.FlagSettingsAck, 0, 6), "FRAME_SIZE_ERROR"},
		{"a window beyond 2^31-1", func(w *wire) {
			_ = w.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 1 << 31})
		}, "FLOW_CONTROL_ERROR"},
		{"a frame size below 16 KB", func(w *wire) {
			_ = w.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingMaxFrameSize, Val: 100})
		}, "PROTOCOL_ERROR"},
		{"PING of 7 bytes", bad(xhttp2.FramePing, 0, 0, 7), "FRAME_SIZE_ERROR"},
		{"PING on a stream", bad(xhttp2.FramePing, 0, 1, 8), "PROTOCOL_ERROR"},
		{"PRIORITY of 4 bytes", bad(xhttp2.FramePriority, 0, 1, 4), "FRAME_SIZE_ERROR"},
		{"GOAWAY of 7 bytes", bad(xhttp2.FrameGoAway, 0, 0, 7), "FRAME_SIZE_ERROR"},
		{"PUSH_PROMISE", bad(xhttp2.FramePushPromise, 0, 1, 8), "PROTOCOL_ERROR"},
		{"a frame above 16 KiB", bad(xhttp2.FrameData, 0, 1, 16385), "FRAME_SIZE_ERROR"},
		{"a header block above all limits", func(w *wire) {
			_ = w.WriteRawFrame(xhttp2.FrameHeaders, 0, 3, nil)
			for range 9 {
				_ = w.WriteContinuation(3, false, make([]byte, 16384))
			}
		}, "ENHANCE_YOUR_CALM"},
		{"a header block in crumbs (CVE-2024-27316)", func(w *wire) {
			_ = w.WriteRawFrame(xhttp2.FrameHeaders, 0, 3, nil)
			for range 100 {
				_ = w.WriteContinuation(3, false, nil)
			}
		}, "ENHANCE_YOUR_CALM"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			toServer(t, http2.Config{}, echo, func(t *testing.T, w *wire, _ *http2.ServerConn) {
				w.headers(1, false, request()...)
				w.expect()
				tc.send(w)
				got := w.take()
				if n := len(got); n != 2 || !strings.HasPrefix(got[0], "GOAWAY ") || !strings.HasSuffix(got[0], " "+tc.want) || got[1] != "gone" {
					t.Fatalf("peer sent %q, want GOAWAY %s and the end", got, tc.want)
				}
			})
		})
	}
}

// TestServerRefusesMalformedRequests: one stream ends, and its neighbours go on.
func TestServerRefusesMalformedRequests(t *testing.T) {
	const reset = "RST_STREAM 1 PROTOCOL_ERROR"
	get := func(more ...string) []string {
		return append([]string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/"}, more...)
	}
	path := func(p string) []string {
		return []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", p}
	}
	authority := func(a string) []string {
		return []string{":method", "GET", ":scheme", "http", ":authority", a, ":path", "/"}
	}
	many := get()
	for i := range 101 {
		many = append(many, fmt.Sprint("x-", i), "")
	}
	for _, tc := range []struct {
		name   string
		fields []string
		want   string
	}{
		{"a capital letter in a name", get("X-A", "b"), reset},
		{"a space in a name", get("x a", "b"), reset},
		{"a colon in a name", get("x:a", "b"), reset},
		{"CRLF in a name", get("x\r\na", "b"), reset},
		{"an empty name", get("", "b"), reset},
		{"CRLF in a value", get("x", "a\r\nhost: evil"), reset},
		{"LF in a value", get("x", "a\nb"), reset},
		{"CR in a value", get("x", "a\rb"), reset},
		{"NUL in a value", get("x", "a\x00b"), reset},
		{"DEL in a value", get("x", "a\x7fb"), reset},
		{"white space before a value", get("x", " a"), reset},
		{"white space behind a value", get("x", "a\t"), reset},
		{"Connection", get("connection", "close"), reset},
		{"Keep-Alive", get("keep-alive", "timeout=5"), reset},
		{"Proxy-Connection", get("proxy-connection", "close"), reset},
		{"Transfer-Encoding", get("transfer-encoding", "chunked"), reset},
		{"Upgrade", get("upgrade", "h2c"), reset},
		{"TE besides trailers", get("te", "gzip"), reset},
		{"a pseudo-header field at the end", get("x", "y", ":path", "/x"), reset},
		{"a pseudo-header field twice", get(":path", "/x"), reset},
		{"an unknown pseudo-header field", get(":protocol", "websocket"), reset},
		{"one of responses", get(":status", "200"), reset},
		{"no method", []string{":scheme", "http", ":authority", "cart", ":path", "/"}, reset},
		{"no scheme", []string{":method", "GET", ":authority", "cart", ":path", "/"}, reset},
		{"no path", []string{":method", "GET", ":scheme", "http", ":authority", "cart"}, reset},
		{"an empty path", path(""), reset},
		{"a method that is none", []string{":method", "GE T", ":scheme", "http", ":authority", "cart", ":path", "/"}, reset},
		{"a line end in the method", []string{":method", "GET / HTTP/1.1\r\nx: y\r\n", ":scheme", "http", ":authority", "cart", ":path", "/"}, reset},
		{"a space in the path", path("/a HTTP/1.1"), reset},
		{"a line end in the path", path("/a\r\nx:y"), "HEADERS 1 400"},
		{"a fragment", path("/a#b"), "HEADERS 1 400"},
		{"a broken escape", path("/%2"), "HEADERS 1 400"},
		{"a path that is none", path("a"), "HEADERS 1 400"},
		{"an absolute path", path("http://evil/"), "HEADERS 1 400"},
		{"an asterisk for GET", path("*"), "HEADERS 1 400"},
		{"an authority with a user", authority("a@cart"), "HEADERS 1 400"},
		{"an authority with a path", authority("cart/x"), "HEADERS 1 400"},
		{"an authority with a line end", authority("cart\r\nx: y"), reset},
		{"an empty authority", authority(""), reset},
		{"no authority", []string{":method", "GET", ":scheme", "http", ":path", "/"}, "HEADERS 1 400"},
		{"a Host that disagrees", get("host", "evil"), reset},
		{"two Hosts", []string{":method", "GET", ":scheme", "http", ":path", "/", "host", "a", "host", "b"}, "HEADERS 1 400"},
		{"CONNECT without a port", []string{":method", "CONNECT", ":authority", "cart"}, "HEADERS 1 400"},
		{"CONNECT without an authority", []string{":method", "CONNECT"}, reset},
		{"CONNECT with a path", []string{":method", "CONNECT", ":scheme", "http", ":authority", "cart:80", ":path", "/"}, reset},
		{"CONNECT with a length", []string{":method", "CONNECT", ":authority", "cart:80", "content-length", "0"}, reset},
		{"a protocol without CONNECT", []string{":method", "GET", ":protocol", "websocket", ":scheme", "http", ":authority", "cart", ":path", "/"}, reset},
		{"an extended CONNECT without a path", []string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":authority", "cart"}, reset},
		{"an extended CONNECT without a scheme", []string{":method", "CONNECT", ":protocol", "websocket", ":authority", "cart", ":path", "/"}, reset},
		{"an extended CONNECT without an authority", []string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":path", "/"}, reset},
		{"an extended CONNECT to nothing", extended("", "/"), reset},
		{"an extended CONNECT with a length", extended("websocket", "/", "content-length", "3"), reset},
		{"an extended CONNECT that waits to be told", extended("websocket", "/", "expect", "100-continue"), reset},
		{"an extended CONNECT to HTTP/2", extended("h2c", "/"), "HEADERS 1 501"},
		{"an extended CONNECT to no token", extended("web socket", "/"), "HEADERS 1 501"},
		{"an extended CONNECT to a path that is none", extended("websocket", "a"), "HEADERS 1 400"},
		{"a length without a body", get("content-length", "5"), reset},
		{"two lengths", get("content-length", "0", "content-length", "0"), reset},
		{"a length that is none", get("content-length", "+0"), reset},
		{"an expectation that is unknown", get("expect", "miracle"), "HEADERS 1 417"},
		{"more than 60 KiB", get("x", strings.Repeat("x", 60<<10)), "HEADERS 1 431"},
		{"more than 60 KiB of cookies", get(slices.Repeat([]string{"cookie", strings.Repeat("c", 4000)}, 16)...), "HEADERS 1 431"},
		{"more than 100 fields", many, "HEADERS 1 431"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			toServer(t, http2.Config{}, echo, func(t *testing.T, w *wire, _ *http2.ServerConn) {
				w.headers(1, true, tc.fields...)
				if got := w.take(); len(got) == 0 || got[0] != tc.want {
					t.Fatalf("peer sent %q, want %s", got, tc.want)
				}
				w.get(3)
				w.expect("HEADERS 3 200", "DATA 3 1 bytes end")
			})
		})
	}
}

func TestServerTakesWhatIsUnusual(t *testing.T) {
	for _, tc := range []struct {
		name string
		send func(*wire)
		want []string
	}{
		{"OPTIONS *", func(w *wire) {
			w.headers(1, true, ":method", "OPTIONS", ":scheme", "http", ":authority", "cart", ":path", "*")
		}, []string{"HEADERS 1 200", "DATA 1 1 bytes end"}},
		{"Host instead of :authority", func(w *wire) {
			w.headers(1, true, ":method", "GET", ":scheme", "http", ":path", "/", "host", "cart")
		}, []string{"HEADERS 1 200", "DATA 1 1 bytes end"}},
		{"Host beside :authority", func(w *wire) {
			w.headers(1, true, ":method", "GET", ":scheme", "http", ":path", "/", ":authority", "cart", "host", "CART")
		}, []string{"HEADERS 1 200", "DATA 1 1 bytes end"}},
		{"HEAD", func(w *wire) {
			w.headers(1, true, ":method", "HEAD", ":scheme", "http", ":authority", "cart", ":path", "/")
		}, []string{"HEADERS 1 200 end"}},
		{"trailers", func(w *wire) {
			w.headers(1, false, request()...)
			_ = w.WriteData(1, false, []byte("abc"))
			w.headers(1, true, "x-sum", "6")
		}, []string{"HEADERS 1 200", "DATA 1 1 bytes end"}},
		{"a body as declared, padded", func(w *wire) {
			w.headers(1, false, request("content-length", "3")...)
			_ = w.WriteDataPadded(1, true, []byte("abc"), make([]byte, 100))
		}, []string{"HEADERS 1 200", "DATA 1 1 bytes end"}},
		{"a body longer than declared", func(w *wire) {
			w.headers(1, false, request("content-length", "3")...)
			_ = w.WriteData(1, false, []byte("abcd"))
		}, []string{"RST_STREAM 1 PROTOCOL_ERROR"}},
		{"a body shorter than declared", func(w *wire) {
			w.headers(1, false, request("content-length", "3")...)
			_ = w.WriteData(1, true, []byte("ab"))
		}, []string{"RST_STREAM 1 PROTOCOL_ERROR"}},
		{"a body shorter than declared, with trailers", func(w *wire) {
			w.headers(1, false, request("content-length", "3")...)
			_ = w.WriteData(1, false, []byte("ab"))
			w.headers(1, true, "x", "y")
		}, []string{"RST_STREAM 1 PROTOCOL_ERROR"}},
		{"trailers that are not the end", func(w *wire) {
			w.headers(1, false, request()...)
			w.headers(1, false, "x", "y")
		}, []string{"RST_STREAM 1 PROTOCOL_ERROR"}},
		{"trailers with a pseudo-header field", func(w *wire) {
			w.headers(1, false, request()...)
			w.headers(1, true, ":path", "/x")
		}, []string{"RST_STREAM 1 PROTOCOL_ERROR"}},
		{"DATA behind the end", func(w *wire) {
			w.headers(1, false, request("content-length", "9")...)
			_ = w.WriteData(1, false, []byte("abc"))
			_ = w.WriteRSTStream(1, xhttp2.ErrCodeCancel)
		}, nil},
		{"an unknown frame and an unknown setting", func(w *wire) {
			_ = w.WriteRawFrame(0x99, 0, 77, []byte("x"))
			_ = w.WriteSettings(xhttp2.Setting{ID: 0x99, Val: 7})
			w.get(1)
		}, []string{"SETTINGS ack", "HEADERS 1 200", "DATA 1 1 bytes end"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			toServer(t, http2.Config{}, echo, func(t *testing.T, w *wire, _ *http2.ServerConn) {
				tc.send(w)
				w.expect(tc.want...)
				w.get(3)
				w.expect("HEADERS 3 200", "DATA 3 1 bytes end")
			})
		})
	}
}

func TestTrailersReachTheWorker(t *testing.T) {
	toServer(t, http2.Config{}, func(st *http2.ServerStream) {
		q, err := st.Request()
		for err == nil {
			_, err = q.Body.Next()
		}
		v, _ := q.Body.Trailers().Value("x-sum")
		var e http1.Edits
		e.Set("x-sum", v)
		_ = st.Reply(200, v, &e)
	}, func(t *testing.T, w *wire, _ *http2.ServerConn) {
		w.headers(1, false, request()...)
		w.headers(1, true, "x-sum", "forty two")
		w.expect("HEADERS 1 200", "DATA 1 9 bytes end")
	})
}

// TestARequestBehindTheEnd: what is read when the connection has failed already, of a write, is nobody's request, or nobody would
// tell it that its client is gone.
func TestARequestBehindTheEnd(t *testing.T) {
	toServer(t, http2.Config{}, func(st *http2.ServerStream) { <-st.Done() }, func(_ *testing.T, w *wire, c *http2.ServerConn) {
		w.get(1)
		synctest.Wait()
		in, out := w.conn.out, w.conn.in
		in.mu.Lock()
		in.paused = true
		in.mu.Unlock()
		w.get(3)
		out.mu.Lock()
		out.closed = true
		out.cond.Broadcast()
		out.mu.Unlock()
		c.Wind() // has something to say
		w.take()
	})
}
