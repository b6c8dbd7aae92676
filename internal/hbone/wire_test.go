package hbone_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/mistnet/mistnet/internal/hbone"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// memConn is one end of an in-memory connection with a buffer, so that neither side needs the other to write.
type memConn struct {
	net.Conn // of net.Pipe: addresses and deadlines
	in, out  *memBuffer
}

type memBuffer struct {
	mu     sync.Mutex
	cond   *sync.Cond
	b      []byte
	closed bool
}

func newMemBuffer() *memBuffer {
	b := &memBuffer{}
	b.cond = sync.NewCond(&b.mu)
	return b
}

func memPipe() (a, b *memConn) {
	p, q := net.Pipe()
	x, y := newMemBuffer(), newMemBuffer()
	return &memConn{p, x, y}, &memConn{q, y, x}
}

func (c *memConn) Read(p []byte) (int, error) {
	b := c.in
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.b) == 0 && !b.closed {
		b.cond.Wait()
	}
	n := copy(p, b.b)
	b.b = b.b[n:]
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

func (c *memConn) Write(p []byte) (int, error) {
	b := c.out
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, io.ErrClosedPipe
	}
	b.b = append(b.b, p...)
	b.cond.Broadcast()
	return len(p), nil
}

func (c *memConn) Close() error {
	for _, b := range []*memBuffer{c.in, c.out} {
		b.mu.Lock()
		b.closed = true
		b.cond.Broadcast()
		b.mu.Unlock()
	}
	return c.Conn.Close()
}

// wire is a peer that speaks frames by hand. It runs inside a synctest bubble: expect waits until everything has come
// to rest and then looks at what arrived.
type wire struct {
	*http2.Framer
	t    *testing.T
	tls  *tls.Conn
	enc  *hpack.Encoder
	hbuf bytes.Buffer

	mu   sync.Mutex
	got  []string
	gone bool
	busy sync.WaitGroup
}

func newWire(t *testing.T, tc *tls.Conn) *wire {
	w := &wire{Framer: http2.NewFramer(tc, tc), t: t, tls: tc}
	w.enc = hpack.NewEncoder(&w.hbuf)
	w.SetMaxReadFrameSize(1 << 20)
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

func (w *wire) note(f http2.Frame) {
	w.mu.Lock()
	defer w.mu.Unlock()
	h := f.Header()
	s := fmt.Sprintf("%v %d", h.Type, h.StreamID)
	switch f := f.(type) {
	case *http2.SettingsFrame:
		if s = "SETTINGS"; f.IsAck() {
			s += " ack"
		}
	case *http2.MetaHeadersFrame:
		s += " " + f.PseudoValue("status") + f.PseudoValue("authority")
	case *http2.DataFrame:
		s += fmt.Sprintf(" %d bytes", len(f.Data()))
	case *http2.RSTStreamFrame:
		s += " " + f.ErrCode.String()
	case *http2.GoAwayFrame:
		s = fmt.Sprintf("GOAWAY %d %v", f.LastStreamID, f.ErrCode)
	case *http2.WindowUpdateFrame:
		s += fmt.Sprintf(" +%d", f.Increment)
	case *http2.PingFrame:
		if s = "PING"; f.IsAck() {
			s += " ack"
		}
	}
	if h.Type != http2.FramePing && h.Flags.Has(http2.FlagDataEndStream) && h.StreamID != 0 && h.Type <= http2.FrameHeaders {
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
		w.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return slices.Clone(w.hbuf.Bytes())
}

// headers sends a complete header block.
func (w *wire) headers(stream uint32, end bool, fields ...string) {
	w.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, EndStream: end, EndHeaders: true, BlockFragment: w.block(fields...)})
}

func (w *wire) connect(stream uint32) {
	w.headers(stream, false, ":method", "CONNECT", ":authority", "10.0.0.1:80")
}

// accepted opens a stream and waits for its 200.
func (w *wire) accepted(stream uint32) {
	w.t.Helper()
	w.connect(stream)
	w.expect(fmt.Sprintf("HEADERS %d 200", stream))
}

// toServer runs test against a server that serves one connection in memory. The client's side of the opening is done.
func toServer(t *testing.T, srv *hbone.Server, test func(t *testing.T, w *wire)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		if srv.TLS == nil {
			srv.TLS = serverTLS()
		}
		near, far := memPipe()
		ctx, cancel := context.WithCancel(context.Background())
		var served sync.WaitGroup
		served.Go(func() { srv.ServeConn(ctx, far) })
		tc := tls.Client(near, clientTLS())
		if err := tc.Handshake(); err != nil {
			t.Fatal(err)
		}
		w := newWire(t, tc)
		defer func() {
			near.Close()
			cancel()
			served.Wait()
			w.busy.Wait()
		}()
		io.WriteString(tc, http2.ClientPreface)
		w.WriteSettings()
		w.listen()
		w.expect("SETTINGS", "WINDOW_UPDATE 0 +16711681", "SETTINGS ack")
		test(t, w)
	})
}

// accept holds every stream open until its context ends.
func accept(ctx context.Context, r *hbone.Request) {
	if s, err := r.Accept(""); err == nil {
		<-ctx.Done()
		s.Reset()
	}
}

func TestServerEndsTheConnectionOnProtocolErrors(t *testing.T) {
	bad := func(typ http2.FrameType, flags http2.Flags, stream uint32, n int) func(*wire) {
		return func(w *wire) { w.WriteRawFrame(typ, flags, stream, make([]byte, n)) }
	}
	for _, tc := range []struct {
		name string
		send func(*wire)
		want string
	}{
		{"DATA on stream 0", bad(http2.FrameData, 0, 0, 5), "PROTOCOL_ERROR"},
		{"DATA on an idle stream", bad(http2.FrameData, 0, 9, 5), "PROTOCOL_ERROR"},
		{"DATA with more padding than frame", func(w *wire) {
			w.WriteRawFrame(http2.FrameData, http2.FlagDataPadded, 1, []byte{9, 0, 0})
		}, "PROTOCOL_ERROR"},
		{"padded DATA without pad length", bad(http2.FrameData, http2.FlagDataPadded, 1, 0), "FRAME_SIZE_ERROR"},
		{"WINDOW_UPDATE on an idle stream", func(w *wire) { w.WriteWindowUpdate(9, 1) }, "PROTOCOL_ERROR"},
		{"WINDOW_UPDATE of zero", func(w *wire) { w.WriteWindowUpdate(0, 0) }, "PROTOCOL_ERROR"},
		{"WINDOW_UPDATE beyond 2^31-1", func(w *wire) { w.WriteWindowUpdate(0, 1<<31-1) }, "FLOW_CONTROL_ERROR"},
		{"WINDOW_UPDATE of 3 bytes", bad(http2.FrameWindowUpdate, 0, 0, 3), "FRAME_SIZE_ERROR"},
		{"RST_STREAM on an idle stream", func(w *wire) { w.WriteRSTStream(9, http2.ErrCodeCancel) }, "PROTOCOL_ERROR"},
		{"RST_STREAM on stream 0", bad(http2.FrameRSTStream, 0, 0, 4), "PROTOCOL_ERROR"},
		{"RST_STREAM of 5 bytes", bad(http2.FrameRSTStream, 0, 1, 5), "FRAME_SIZE_ERROR"},
		{"HEADERS on an even stream", func(w *wire) { w.connect(2) }, "PROTOCOL_ERROR"},
		{"HEADERS on stream 0", bad(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 0, 1), "PROTOCOL_ERROR"},
		{"HEADERS with more padding than frame", func(w *wire) {
			w.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersPadded, 3, []byte{7, 1})
		}, "PROTOCOL_ERROR"},
		{"HEADERS that are no HPACK", func(w *wire) {
			w.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 3, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
		}, "COMPRESSION_ERROR"},
		{"CONTINUATION alone", bad(http2.FrameContinuation, 0, 1, 1), "PROTOCOL_ERROR"},
		{"another frame within a header block", func(w *wire) {
			w.WriteRawFrame(http2.FrameHeaders, 0, 3, nil)
			w.WritePing(false, [8]byte{})
		}, "PROTOCOL_ERROR"},
		{"CONTINUATION of another stream", func(w *wire) {
			w.WriteRawFrame(http2.FrameHeaders, 0, 3, nil)
			w.WriteContinuation(5, true, nil)
		}, "PROTOCOL_ERROR"},
		{"SETTINGS on a stream", bad(http2.FrameSettings, 0, 1, 6), "PROTOCOL_ERROR"},
		{"SETTINGS of 5 bytes", bad(http2.FrameSettings, 0, 0, 5), "FRAME_SIZE_ERROR"},
		{"SETTINGS ack with payload", bad(http2.FrameSettings, http2.FlagSettingsAck, 0, 6), "FRAME_SIZE_ERROR"},
		{"a window beyond 2^31-1", func(w *wire) {
			w.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31})
		}, "FLOW_CONTROL_ERROR"},
		{"a frame size below 16 KB", func(w *wire) {
			w.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 100})
		}, "PROTOCOL_ERROR"},
		{"PING of 7 bytes", bad(http2.FramePing, 0, 0, 7), "FRAME_SIZE_ERROR"},
		{"PING on a stream", bad(http2.FramePing, 0, 1, 8), "PROTOCOL_ERROR"},
		{"PRIORITY of 4 bytes", bad(http2.FramePriority, 0, 1, 4), "FRAME_SIZE_ERROR"},
		{"GOAWAY of 7 bytes", bad(http2.FrameGoAway, 0, 0, 7), "FRAME_SIZE_ERROR"},
		{"PUSH_PROMISE", bad(http2.FramePushPromise, 0, 1, 8), "PROTOCOL_ERROR"},
		{"a frame above 1 MiB", bad(http2.FrameData, 0, 1, 1<<20+1), "FRAME_SIZE_ERROR"},
		{"a header block above all limits", bad(http2.FrameHeaders, 0, 3, 200<<10), "ENHANCE_YOUR_CALM"},
		{"DATA beyond the connection window", func(w *wire) {
			for range 17 { // of a stream that refuses them, so nobody returns that window
				w.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, 1<<20))
			}
		}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			toServer(t, &hbone.Server{Handle: accept}, func(t *testing.T, w *wire) {
				w.accepted(1)
				tc.send(w)
				got := w.take()
				if tc.want == "" {
					if !slices.Contains(got, "RST_STREAM 1 FLOW_CONTROL_ERROR") || slices.Contains(got, "gone") {
						t.Fatalf("peer sent %q, want only the stream reset", got)
					}
					return
				}
				if want := []string{"GOAWAY 1 " + tc.want, "gone"}; !slices.Equal(got, want) {
					t.Fatalf("peer sent %q, want %q", got, want)
				}
			})
		})
	}
}

func TestServerRefusesWhatIsNotHTTP2(t *testing.T) {
	for name, first := range map[string]string{
		"HTTP/1.1":                   "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"a preface that goes wrong":  "PRI * HTTP/2.0\r\n\r\nSN\r\n\r\n",
		"no SETTINGS after preface":  http2.ClientPreface + "\x00\x00\x08\x06\x00\x00\x00\x00\x00" + "12345678",
		"SETTINGS ack as SETTINGS":   http2.ClientPreface + "\x00\x00\x00\x04\x01\x00\x00\x00\x00",
		"nothing but a closed input": "",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := memPipe()
				srv := &hbone.Server{TLS: serverTLS(), Handle: accept}
				result := make(chan error, 1)
				go func() { result <- srv.ServeConn(context.Background(), far) }()
				tc := tls.Client(near, clientTLS())
				if err := tc.Handshake(); err != nil {
					t.Fatal(err)
				}
				io.WriteString(tc, first)
				if first == "" {
					synctest.Wait() // else the server's own SETTINGS may be what fails
					near.Close()
				}
				err := <-result
				if (first == "") != (err == nil) {
					t.Fatalf("ServeConn = %v", err)
				}
			})
		})
	}
}

func TestServerResetsOneStreamOnStreamErrors(t *testing.T) {
	for _, tc := range []struct {
		name string
		send func(*wire)
		want []string
	}{
		{"window update of zero", func(w *wire) { w.WriteWindowUpdate(1, 0) }, []string{"RST_STREAM 1 PROTOCOL_ERROR"}},
		{"window update beyond 2^31-1", func(w *wire) { w.WriteWindowUpdate(1, 1<<31-1) }, []string{"RST_STREAM 1 FLOW_CONTROL_ERROR"}},
		{"trailers", func(w *wire) { w.headers(1, true, "x", "y") }, []string{"RST_STREAM 1 PROTOCOL_ERROR"}},
		{"DATA after the end", func(w *wire) {
			w.WriteData(1, true, nil)
			w.WriteData(1, false, []byte("more"))
		}, []string{"RST_STREAM 1 STREAM_CLOSED"}},
		{"DATA beyond the stream's window", func(w *wire) {
			for range 5 {
				w.WriteData(1, false, make([]byte, 1<<20))
			}
		}, []string{"RST_STREAM 1 FLOW_CONTROL_ERROR"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			toServer(t, &hbone.Server{Handle: accept}, func(t *testing.T, w *wire) {
				w.accepted(1)
				w.accepted(3)
				tc.send(w)
				w.expect(tc.want...)
				w.WritePing(false, [8]byte{1})
				w.expect("PING ack") // and the rest of the connection lives
			})
		})
	}
}

func TestServerAnswersBadRequests(t *testing.T) {
	handle := func(ctx context.Context, r *hbone.Request) {
		if r.Method != "CONNECT" {
			r.Reject(405)
			return
		}
		accept(ctx, r)
	}
	for _, tc := range []struct {
		name   string
		fields []string
		status string
	}{
		{"another method reaches the handler", []string{":method", "GET", ":scheme", "https", ":path", "/", ":authority", "a"}, "405"},
		{"no authority", []string{":method", "CONNECT"}, "400"},
		{"CONNECT with a path", []string{":method", "CONNECT", ":authority", "a:1", ":path", "/"}, "400"},
		{"CONNECT with a scheme", []string{":method", "CONNECT", ":authority", "a:1", ":scheme", "https"}, "400"},
		{"extended CONNECT, which is not offered", []string{":method", "CONNECT", ":authority", "a:1", ":protocol", "websocket"}, "400"},
		{"no method", []string{":authority", "a:1"}, "400"},
		{"authority twice", []string{":method", "CONNECT", ":authority", "a:1", ":authority", "b:1"}, "400"},
		{"a pseudo-header after a field", []string{":method", "CONNECT", "x", "y", ":authority", "a:1"}, "400"},
		{"an unknown pseudo-header", []string{":method", "CONNECT", ":authority", "a:1", ":x", "y"}, "400"},
		{"an upper-case name", []string{":method", "CONNECT", ":authority", "a:1", "Baggage", "y"}, "400"},
		{"a connection field", []string{":method", "CONNECT", ":authority", "a:1", "connection", "close"}, "400"},
		{"a line break in a value", []string{":method", "CONNECT", ":authority", "a:1", "baggage", "a\r\nb"}, "400"},
		{"a space in the authority", []string{":method", "CONNECT", ":authority", "a:1 b"}, "400"},
		{"headers above the limit", []string{":method", "CONNECT", ":authority", "a:1", "x", strings.Repeat("z", 70<<10)}, "431"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			toServer(t, &hbone.Server{Handle: handle}, func(t *testing.T, w *wire) {
				w.headers(1, false, tc.fields...)
				w.expect("HEADERS 1 "+tc.status+" end", "RST_STREAM 1 NO_ERROR")
				w.accepted(3) // header compression is still in step
			})
		})
	}
}

func TestServerStopsFloods(t *testing.T) {
	for _, tc := range []struct {
		name string
		send func(w *wire, i int) error
	}{
		{"pings", func(w *wire, i int) error { return w.WritePing(false, [8]byte{}) }},
		{"settings", func(w *wire, i int) error { return w.WriteSettings() }},
		{"settings acks", func(w *wire, i int) error { return w.WriteSettingsAck() }},
		{"priorities", func(w *wire, i int) error { return w.WritePriority(1, http2.PriorityParam{}) }},
		{"unknown frames", func(w *wire, i int) error { return w.WriteRawFrame(0xee, 0, 1, []byte("x")) }},
		{"empty data", func(w *wire, i int) error { return w.WriteData(1, false, nil) }},
		{"frames on a stream that is over", func(w *wire, i int) error { return w.WriteRSTStream(1, http2.ErrCodeNo) }},
		{"continuations", func(w *wire, i int) error {
			if i == 0 {
				return w.WriteRawFrame(http2.FrameHeaders, 0, 3, nil)
			}
			return w.WriteContinuation(3, false, nil)
		}},
		{"rapid reset", func(w *wire, i int) error {
			w.connect(uint32(2*i + 3))
			return w.WriteRSTStream(uint32(2*i+3), http2.ErrCodeCancel)
		}},
		{"resets that are provoked by windows", func(w *wire, i int) error {
			w.connect(uint32(2*i + 3))
			return w.WriteWindowUpdate(uint32(2*i+3), 1<<31-1)
		}},
		{"resets that are provoked by fields", func(w *wire, i int) error {
			w.connect(uint32(2*i + 3))
			w.connect(uint32(2*i + 3))
			return nil
		}},
		{"resets that are provoked by data", func(w *wire, i int) error {
			w.connect(uint32(2*i + 3))
			_ = w.WriteData(uint32(2*i+3), true, nil)
			return w.WriteData(uint32(2*i+3), true, nil)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			hold := func(ctx context.Context, r *hbone.Request) { <-ctx.Done() }
			toServer(t, &hbone.Server{Handle: hold}, func(t *testing.T, w *wire) {
				w.connect(1)
				synctest.Wait()
				for i := range 12_000 {
					if err := tc.send(w, i); err != nil {
						break
					}
				}
				got := w.take()
				last := got[max(0, len(got)-2):]
				if len(last) != 2 || !strings.HasPrefix(last[0], "GOAWAY") || !strings.HasSuffix(last[0], "ENHANCE_YOUR_CALM") {
					t.Fatalf("at the end the peer sent %q, want GOAWAY ENHANCE_YOUR_CALM", last)
				}
			})
		})
	}
}

func TestServerRefusesStreamsBeyondItsLimit(t *testing.T) {
	toServer(t, &hbone.Server{Handle: accept, MaxStreams: 2}, func(t *testing.T, w *wire) {
		w.accepted(1)
		w.accepted(3)
		w.connect(5)
		w.expect("RST_STREAM 5 REFUSED_STREAM")
		w.WriteRSTStream(1, http2.ErrCodeConnect)
		synctest.Wait()
		w.accepted(7)
	})
}

func TestServerEndsHandlersWhenTheConnectionBreaksInAFrame(t *testing.T) {
	ended := make(chan error, 1)
	handle := func(ctx context.Context, r *hbone.Request) {
		s, err := r.Accept("")
		if err != nil {
			return
		}
		_, err = io.ReadAll(s)
		<-ctx.Done()
		ended <- err
	}
	toServer(t, &hbone.Server{Handle: handle}, func(t *testing.T, w *wire) {
		w.connect(1)
		w.expect("HEADERS 1 200")
		w.tls.Write([]byte{0, 1, 0, 0, 0, 0, 0, 0, 1, 'h', 'a', 'l', 'f'}) // 4 of 256 bytes
		w.tls.NetConn().Close()
		if err := <-ended; !errors.Is(err, hbone.ErrTruncated) {
			t.Errorf("read = %v, want an error, since the stream did not end", err)
		}
	})
}
