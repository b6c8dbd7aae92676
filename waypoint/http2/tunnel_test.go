package http2_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	xhttp2 "golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/http2"
)

// extended is an extended CONNECT.
func extended(protocol, path string, more ...string) []string {
	return append([]string{":method", "CONNECT", ":protocol", protocol, ":scheme", "https", ":authority", "cart", ":path", path}, more...)
}

// exchange is what a worker does for a request, of either version.
type exchange interface {
	Send(e *http1.Edits) error
	Receive() (*http1.Response, error)
	Respond(e *http1.Edits) error
}

// tunnelled carries a request and its response, and reports whether what follows is to be joined.
func tunnelled(x exchange) (bool, error) {
	if err := x.Send(nil); err != nil {
		return false, err
	}
	p, err := x.Receive()
	if err != nil {
		return false, err
	}
	return p.Tunnel, x.Respond(nil)
}

// fromHTTP2 serves a stream by an upstream, joining the two when they have left HTTP.
func fromHTTP2(st *http2.ServerStream, up http1.Upstream, rest func() relay.Conn) {
	if _, err := st.Request(); err != nil {
		_ = st.ReplyError(err, nil)
		return
	}
	joined, err := tunnelled(st.Exchange(up))
	if err != nil {
		_ = st.ReplyError(err, nil)
	}
	if joined {
		_ = relay.Pump(context.Background(), st.Tunnel(), rest(), new(relay.Counters))
	}
}

// toServer11 serves extended CONNECTs by an upstream of HTTP/1.1, whose application's side is test's.
func toServer11(t *testing.T, test func(w *wire, app *memConn, c *http2.ServerConn)) {
	t.Helper()
	app, near := memPipe()
	far := http1.NewClientConn(near, http1.Config{})
	toServer(t, http2.Config{}, func(st *http2.ServerStream) {
		fromHTTP2(st, far, func() relay.Conn { return far.Raw() })
	}, func(_ *testing.T, w *wire, c *http2.ServerConn) {
		test(w, app, c)
		app.Close()
	})
}

// heard is what has come to a connection and was not read.
func heard(t *testing.T, c *memConn) string {
	t.Helper()
	synctest.Wait()
	c.in.mu.Lock()
	n := len(c.in.b) - c.in.r
	c.in.mu.Unlock()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestExtendedConnectToHTTP11: it is an upgrade there, and then bytes both ways, each way to its own end.
func TestExtendedConnectToHTTP11(t *testing.T) {
	toServer11(t, func(w *wire, app *memConn, _ *http2.ServerConn) {
		w.headers(1, false, extended("websocket", "/chat?a=b", "sec-websocket-version", "13", "x-a", "1")...)
		_ = w.WriteData(1, false, []byte("early"))
		want := "GET /chat?a=b HTTP/1.1\r\nHost: cart\r\nsec-websocket-version: 13\r\nx-a: 1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
		if d := cmp.Diff(want, heard(t, app)); d != "" {
			t.Errorf("the upstream was sent (-want +got):\n%s", d)
		}
		w.expect()
		_, _ = io.WriteString(app, "HTTP/1.1 101 Switching Protocols\r\nDate: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nfirst")
		w.expect("HEADERS 1 200", "DATA 1 5 bytes")
		if got := heard(t, app); got != "early" {
			t.Errorf("the application heard %q, want what came before its answer", got)
		}
		_ = w.WriteData(1, false, []byte("hello"))
		if got := heard(t, app); got != "hello" {
			t.Errorf("the application heard %q, want hello", got)
		}
		_, _ = io.WriteString(app, strings.Repeat("x", 1000))
		w.expect("DATA 1 1000 bytes")
		app.Close() // it has no halves
		w.expect("DATA 1 0 bytes end")
		_ = w.WriteData(1, true, nil)
		w.expect()
	})
}

// TestExtendedConnectIsRefused: an answer that is none of a tunnel is passed on as it is, unless it would look like one.
func TestExtendedConnectIsRefused(t *testing.T) {
	for _, tc := range []struct {
		name, answer string
		want         []string
	}{
		{"no", "HTTP/1.1 403 Forbidden\r\nDate: x\r\nContent-Length: 2\r\n\r\nno", []string{"HEADERS 1 403", "DATA 1 2 bytes end", "RST_STREAM 1 NO_ERROR"}},
		{"another version", "HTTP/1.1 426 Upgrade Required\r\nDate: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 0\r\n\r\n",
			[]string{"HEADERS 1 426 end", "RST_STREAM 1 NO_ERROR"}},
		{"it did not understand", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", []string{"HEADERS 1 502", "DATA 1 20 bytes end", "RST_STREAM 1 NO_ERROR"}},
		{"another protocol", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: smtp\r\n\r\n", []string{"HEADERS 1 502", "DATA 1 20 bytes end", "RST_STREAM 1 NO_ERROR"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			toServer11(t, func(w *wire, app *memConn, _ *http2.ServerConn) {
				w.headers(1, false, extended("websocket", "/")...)
				synctest.Wait()
				_, _ = io.WriteString(app, tc.answer)
				w.expect(tc.want...)
			})
		})
	}
}

// TestATunnelKeepsToItsStream: what is no DATA ends it alone, a drain lets it go on, windows hold, a reset is passed on.
func TestATunnelKeepsToItsStream(t *testing.T) {
	const agreed = "HTTP/1.1 101 Switching Protocols\r\nDate: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
	open := func(w *wire, app *memConn) {
		w.headers(1, false, extended("websocket", "/")...)
		synctest.Wait()
		_, _ = io.WriteString(app, agreed)
		w.expect("HEADERS 1 200")
	}
	t.Run("trailers", func(t *testing.T) {
		toServer11(t, func(w *wire, app *memConn, _ *http2.ServerConn) {
			open(w, app)
			w.headers(1, true, "x-sum", "6")
			w.expect("RST_STREAM 1 PROTOCOL_ERROR")
			if _, err := app.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
				t.Errorf("the application's connection: %v, want it closed", err)
			}
		})
	})
	t.Run("a reset", func(t *testing.T) {
		toServer11(t, func(w *wire, app *memConn, _ *http2.ServerConn) {
			open(w, app)
			_ = w.WriteRSTStream(1, xhttp2.ErrCodeCancel)
			synctest.Wait()
			if _, err := app.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
				t.Errorf("the application's connection: %v, want it closed", err)
			}
			w.expect()
		})
	})
	t.Run("a drain", func(t *testing.T) {
		toServer11(t, func(w *wire, app *memConn, c *http2.ServerConn) {
			open(w, app)
			c.Drain()
			w.expect("GOAWAY 1 NO_ERROR")
			_, _ = io.WriteString(app, "still")
			w.expect("DATA 1 5 bytes")
			_ = w.WriteData(1, true, []byte("here"))
			synctest.Wait()
			app.Close()
			if got := w.take(); len(got) == 0 || got[len(got)-1] != "gone" {
				t.Errorf("after the tunnel's end: %q, want the connection's", got)
			}
		})
	})
	t.Run("windows", func(t *testing.T) {
		toServer11(t, func(w *wire, app *memConn, _ *http2.ServerConn) {
			open(w, app)
			app.out.mu.Lock()
			app.out.room = 4096 // what the engine does not take waits with the application
			app.out.mu.Unlock()
			go func() { _, _ = app.Write(make([]byte, 200_000)) }()
			sum := func() (n int) {
				for _, s := range w.take() {
					var k int
					if strings.HasPrefix(s, "DATA 1 ") {
						k, _ = parseBytes(s)
					}
					n += k
				}
				return n
			}
			if n := sum(); n != 65535 {
				t.Errorf("%d bytes came, want the window's 65535", n)
			}
			_ = w.WriteWindowUpdate(1, 1000)
			_ = w.WriteWindowUpdate(0, 1000)
			if n := sum(); n != 1000 {
				t.Errorf("%d bytes more came, want 1000", n)
			}
			app.Close()
			synctest.Wait()
		})
	})
}

func parseBytes(s string) (n int, err error) {
	for _, c := range strings.Fields(s)[2] {
		n = n*10 + int(c-'0')
	}
	return n, nil
}

// TestExtendedConnectToHTTP2 goes there as it is, from either version, once the upstream has said that it takes it.
func TestExtendedConnectToHTTP2(t *testing.T) {
	serve := func(t *testing.T, talk func(t *testing.T, app *wire, near *memConn), client func(far *memConn, up *http2.ClientStream)) {
		toUpstream(t, http2.Config{}, func(t *testing.T, app *wire, up *http2.ClientConn) {
			st := up.Open()
			asked := make(chan bool, 1)
			go func() { asked <- st.Extended(t.Context()) }()
			if !<-asked {
				_ = app.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingEnableConnectProtocol, Val: 1})
			}
			app.take()
			if !st.Extended(t.Context()) {
				t.Fatal("the upstream takes no extended CONNECT, although it said so")
			}
			near, far := memPipe()
			done := make(chan struct{})
			go func() {
				defer close(done)
				client(far, st)
			}()
			talk(t, app, near)
			near.Close()
			<-done
			st.Free()
		})
	}
	agreed := func(t *testing.T, app *wire) {
		app.expect("HEADERS 1 CONNECT/chat")
		app.headers(1, false, ":status", "200", "date", "x", "content-length", "77")
	}
	t.Run("from HTTP/1.1", func(t *testing.T) {
		serve(t, func(t *testing.T, app *wire, near *memConn) {
			_, _ = io.WriteString(near, "GET /chat HTTP/1.1\r\nHost: cart\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly")
			agreed(t, app)
			app.expect("DATA 1 5 bytes")
			want := "HTTP/1.1 101 Switching Protocols\r\ndate: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
			if d := cmp.Diff(want, heard(t, near)); d != "" {
				t.Errorf("the client heard (-want +got):\n%s", d)
			}
			_ = app.WriteData(1, false, []byte("hi"))
			if got := heard(t, near); got != "hi" {
				t.Errorf("the client heard %q, want hi", got)
			}
			_ = app.WriteRSTStream(1, xhttp2.ErrCodeCancel)
			synctest.Wait()
			if _, err := near.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
				t.Errorf("the client's connection: %v, want it closed", err)
			}
		}, func(far *memConn, up *http2.ClientStream) {
			s := http1.NewServerConn(far, http1.Config{})
			if _, err := s.ReadRequest(); err != nil {
				t.Error(err)
			}
			if joined, err := tunnelled(s.Exchange(up)); err != nil || !joined {
				t.Errorf("joined: %v, %v", joined, err)
			}
			_ = relay.Pump(context.Background(), s.Raw(), up.Tunnel(), new(relay.Counters))
		})
	})
	t.Run("from HTTP/2", func(t *testing.T) {
		serve(t, func(t *testing.T, app *wire, near *memConn) {
			w := newWire(t, near)
			_, _ = io.WriteString(near, xhttp2.ClientPreface)
			_ = w.WriteSettings()
			w.listen()
			w.take()
			w.headers(1, false, extended("websocket", "/chat")...)
			_ = w.WriteData(1, true, []byte("all"))
			agreed(t, app)
			app.expect("DATA 1 3 bytes", "DATA 1 0 bytes end")
			w.expect("HEADERS 1 200")
			_ = app.WriteData(1, true, []byte("hi"))
			w.expect("DATA 1 2 bytes", "DATA 1 0 bytes end")
			near.Close()
			w.busy.Wait()
		}, func(far *memConn, up *http2.ClientStream) {
			c := http2.NewServerConn(far, http2.Config{})
			_ = c.Serve(func() func(*http2.ServerStream) {
				return func(st *http2.ServerStream) { fromHTTP2(st, up, func() relay.Conn { return up.Tunnel() }) }
			})
		})
	})
}

// TestWhoTakesExtendedConnect: nothing is sent to an upstream that does not, and one that takes its word back is not to be
// trusted.
func TestWhoTakesExtendedConnect(t *testing.T) {
	upgrade := "GET / HTTP/1.1\r\nHost: cart\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
	toUpstream(t, http2.Config{}, func(t *testing.T, app *wire, up *http2.ClientConn) {
		st := up.Open()
		if err := st.Begin(asked(t, upgrade), nil); !isReason(err, http1.UpstreamBroken) {
			t.Errorf("Begin(upgrade) = %v, want %v", err, http1.UpstreamBroken)
		}
		st.Free()
		app.expect()
		_ = app.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingEnableConnectProtocol, Val: 1})
		app.expect("SETTINGS ack")
		_ = app.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingEnableConnectProtocol, Val: 0})
		app.expect("GOAWAY 0 PROTOCOL_ERROR", "gone")
	})
}

func isReason(err error, r http1.Reason) bool {
	e, ok := errors.AsType[*http1.Error](err)
	return ok && e.Reason == r
}
