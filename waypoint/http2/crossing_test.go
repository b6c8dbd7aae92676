package http2_test

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	xhttp2 "golang.org/x/net/http2"

	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/http2"
)

// crossing serves one stream by an upstream of HTTP/1.1, in memory, that answers so once it was sent all there is; what it was
// sent comes back.
func crossing(t *testing.T, answer string, send, check func(w *wire)) (sent string) {
	t.Helper()
	var app *memConn
	toServer(t, http2.Config{}, func(st *http2.ServerStream) {
		if _, err := st.Request(); err != nil {
			_ = st.ReplyError(err, nil)
			return
		}
		var up *memConn
		app, up = memPipe()
		far := http1.NewClientConn(up, http1.Config{})
		x := st.Exchange(far)
		err := x.Send(nil)
		if err == nil {
			_, err = x.Receive()
		}
		if err == nil {
			err = x.Respond(nil)
		}
		if err != nil && !st.Answered() {
			_ = st.ReplyError(err, nil)
		}
		_ = far.Close()
	}, func(_ *testing.T, w *wire, _ *http2.ServerConn) {
		send(w)
		synctest.Wait()
		if app != nil {
			_, _ = io.WriteString(app, answer)
		}
		check(w)
		synctest.Wait()
		if app != nil {
			app.Close()
			b, err := io.ReadAll(app)
			if err != nil {
				t.Error(err)
			}
			sent = string(b)
		}
	})
	return sent
}

// TestDowngrade: a request that came by HTTP/2 is one request to an HTTP/1.1 upstream, with nothing smuggled in.
func TestDowngrade(t *testing.T) {
	const ok = "HTTP/1.1 204 No Content\r\nDate: x\r\n\r\n"
	for _, tc := range []struct {
		name string
		send func(w *wire)
		want string
	}{
		{"a GET", func(w *wire) {
			w.headers(1, true, ":method", "GET", ":scheme", "http", ":authority", "cart:80", ":path", "/a%20b?c=d", "x-a", "1", "te", "trailers", "cookie", "a=b", "cookie", "c=d")
		}, "GET /a%20b?c=d HTTP/1.1\r\nHost: cart:80\r\nx-a: 1\r\ncookie: a=b; c=d\r\nConnection: TE\r\nTE: trailers\r\n\r\n"},
		{"a body of known length", func(w *wire) {
			w.headers(1, false, request("content-length", "3")...)
			_ = w.WriteData(1, true, []byte("abc"))
		}, "POST / HTTP/1.1\r\nHost: cart\r\nContent-Length: 3\r\n\r\nabc"},
		{"a body of unknown length with trailers", func(w *wire) {
			w.headers(1, false, request()...)
			_ = w.WriteData(1, false, []byte("abc"))
			w.headers(1, true, "x-sum", "6", "content-length", "99", "host", "evil")
		}, "POST / HTTP/1.1\r\nHost: cart\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 6\r\n\r\n"},
		{"a body that looks like chunks and requests", func(w *wire) {
			w.headers(1, false, request()...)
			_ = w.WriteData(1, true, []byte("0\r\n\r\nGET /admin HTTP/1.1\r\nHost: cart\r\n\r\n"))
		}, "POST / HTTP/1.1\r\nHost: cart\r\nTransfer-Encoding: chunked\r\n\r\n28\r\n0\r\n\r\nGET /admin HTTP/1.1\r\nHost: cart\r\n\r\n\r\n0\r\n\r\n"},
		{"an empty body", func(w *wire) { w.headers(1, true, request("content-length", "0")...) },
			"POST / HTTP/1.1\r\nHost: cart\r\nContent-Length: 0\r\n\r\n"},
		{"a method of its own", func(w *wire) {
			w.headers(1, true, ":method", "get", ":scheme", "https", ":authority", "cart", ":path", "/")
		}, "get / HTTP/1.1\r\nHost: cart\r\n\r\n"},
		{"Transfer-Encoding", func(w *wire) { w.headers(1, true, request("transfer-encoding", "chunked")...) }, ""},
		{"Content-Length twice", func(w *wire) { w.headers(1, false, request("content-length", "3", "content-length", "3")...) }, ""},
		{"CRLF in a value", func(w *wire) { w.headers(1, true, request("x", "a\r\n\r\nGET /admin HTTP/1.1")...) }, ""},
		{"CRLF in a name", func(w *wire) { w.headers(1, true, request("x: a\r\n\r\nGET /admin HTTP/1.1\r\nx", "b")...) }, ""},
		{"CRLF in a crumb", func(w *wire) { w.headers(1, true, request("cookie", "a\r\nx: y")...) }, ""},
		{"CRLF in the method", func(w *wire) {
			w.headers(1, true, ":method", "GET / HTTP/1.1\r\nx:", ":scheme", "http", ":authority", "cart", ":path", "/")
		}, ""},
		{"CRLF in the path", func(w *wire) {
			w.headers(1, true, ":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/ HTTP/1.1\r\nx: y\r\n")
		}, ""},
		{"a tab in the path", func(w *wire) {
			w.headers(1, true, ":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/\tHTTP/1.1")
		}, ""},
		{"CRLF in the authority", func(w *wire) {
			w.headers(1, true, ":method", "GET", ":scheme", "http", ":authority", "cart\r\nx: y", ":path", "/")
		}, ""},
		{"a Host beside another authority", func(w *wire) { w.headers(1, true, request("host", "evil")...) }, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sent := crossing(t, ok, tc.send, func(*wire) {})
			if d := cmp.Diff(tc.want, sent); d != "" {
				t.Errorf("the upstream was sent (-want +got):\n%s", d)
			}
			if sent == "" {
				return
			}
			r := bufio.NewReader(strings.NewReader(sent))
			q, err := http.ReadRequest(r)
			if err == nil {
				_, err = io.Copy(io.Discard, q.Body)
			}
			if _, more := r.ReadByte(); err != nil || more != io.EOF {
				t.Errorf("net/http reads %v and then %v, want one request", err, more)
			}
		})
	}
}

// TestResponsesFromHTTP11 arrive in HTTP/2's form, and what broke off does not look complete.
func TestResponsesFromHTTP11(t *testing.T) {
	for _, tc := range []struct {
		name, answer string
		want         []string
	}{
		{"a length", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok", []string{"HEADERS 1 200", "DATA 1 2 bytes end"}},
		{"chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", []string{"HEADERS 1 200", "DATA 1 2 bytes", "DATA 1 0 bytes end"}},
		{"trailers", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 6\r\n\r\n", []string{"HEADERS 1 200", "DATA 1 2 bytes", "HEADERS 1  x-sum=6 end"}},
		{"no body", "HTTP/1.1 204 No Content\r\n\r\n", []string{"HEADERS 1 204 end"}},
		{"an interim response", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", []string{"HEADERS 1 103", "HEADERS 1 200 end"}},
		{"to the end", "HTTP/1.0 200 OK\r\n\r\nok", nil},
		{"a length that is cut", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", nil},
		{"a switch nobody asked for", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", []string{"HEADERS 1 502", "DATA 1 20 bytes end"}},
		{"nonsense", "nonsense\r\n\r\n", []string{"HEADERS 1 502", "DATA 1 20 bytes end"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			crossing(t, tc.answer, func(w *wire) { w.get(1) }, func(w *wire) {
				got := w.take()
				if tc.want == nil { // the upstream's silence is not its end, and no response is complete
					for _, s := range got {
						if strings.HasSuffix(s, "end") {
							t.Errorf("peer sent %q, want no end", got)
						}
					}
					return
				}
				if d := cmp.Diff(tc.want, got); d != "" {
					t.Errorf("peer sent (-want +got):\n%s", d)
				}
			})
		})
	}
}

// TestAnUpstreamThatAnswersEarly ends the exchange although the client is still sending, and is heard although it wants no
// more of the request.
func TestAnUpstreamThatAnswersEarly(t *testing.T) {
	toUpstream(t, http2.Config{}, func(t *testing.T, app *wire, up *http2.ClientConn) {
		near, far := memPipe()
		c := http2.NewServerConn(far, http2.Config{})
		done := make(chan error)
		go func() { done <- c.Serve(proxy(t, up)) }()
		w := newWire(t, near)
		_, _ = io.WriteString(near, xhttp2.ClientPreface)
		_ = w.WriteSettings()
		w.listen()
		w.take()
		w.headers(1, false, request()...)
		_ = w.WriteData(1, false, []byte("abc"))
		app.expect("HEADERS 1 POST/", "DATA 1 3 bytes")
		app.headers(1, false, ":status", "200")
		_ = app.WriteData(1, false, []byte("go on"))
		w.expect("HEADERS 1 200", "DATA 1 5 bytes")
		_ = w.WriteData(1, false, []byte("def"))
		app.expect("DATA 1 3 bytes")
		app.headers(1, true, "grpc-status", "5")
		w.expect("HEADERS 1  grpc-status=5 end", "RST_STREAM 1 NO_ERROR")
		app.expect("RST_STREAM 1 CANCEL")
		_ = w.WriteData(1, false, []byte("too late"))
		w.expect()

		w.headers(3, false, request()...)
		app.expect("HEADERS 3 POST/")
		_ = w.WriteRSTStream(3, xhttp2.ErrCodeCancel)
		app.expect("RST_STREAM 3 CANCEL")

		w.headers(5, false, request("content-length", "5")...)
		app.expect("HEADERS 5 POST/")
		_ = w.WriteData(5, true, []byte("123")) // not what was declared
		w.expect("RST_STREAM 5 PROTOCOL_ERROR")
		app.expect("RST_STREAM 5 CANCEL")

		w.get(7)
		app.expect("HEADERS 7 GET/ end")
		app.headers(7, false, ":status", "200")
		_ = app.WriteRSTStream(7, xhttp2.ErrCodeInternal)
		w.expect("HEADERS 7 200", "RST_STREAM 7 INTERNAL_ERROR")
		near.Close()
		w.busy.Wait()
		if err := <-done; err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Error(err)
		}
	})
}
