package http2_test

import (
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/http2"
)

// toUpstream runs test against a client's connection in memory, whose other end is the wire.
func toUpstream(t *testing.T, cfg http2.Config, test func(t *testing.T, w *wire, c *http2.ClientConn)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { upstreamOf(t, cfg, test) })
}

// upstreamOf is toUpstream for who is in a bubble.
func upstreamOf(t *testing.T, cfg http2.Config, test func(t *testing.T, w *wire, c *http2.ClientConn)) {
	t.Helper()
	near, far := memPipe()
	c := http2.NewClientConn(far, cfg)
	var served sync.WaitGroup
	served.Go(func() { _ = c.Run() })
	w := newWire(t, near)
	defer func() {
		near.Close()
		served.Wait()
		w.busy.Wait()
	}()
	preface := make([]byte, len(xhttp2.ClientPreface))
	if _, err := io.ReadFull(near, preface); err != nil || string(preface) != xhttp2.ClientPreface {
		t.Fatalf("the preface is %q, %v", preface, err)
	}
	_ = w.WriteSettings()
	w.listen()
	if got := w.take(); cfg.Memory == nil && !slices.Equal(got, []string{"SETTINGS", "WINDOW_UPDATE 0 +4128769", "SETTINGS ack"}) {
		t.Fatalf("the client began with %q", got)
	}
	test(t, w, c)
}

// asked is a request read by the other engine.
func asked(t *testing.T, text string) *http1.Request {
	t.Helper()
	near, far := memPipe()
	_, _ = io.WriteString(near, text)
	q, err := http1.NewServerConn(far, http1.Config{}).ReadRequest()
	if err != nil {
		t.Fatal(err)
	}
	return q
}

const getText = "GET /a?b HTTP/1.1\r\nHost: cart\r\n\r\n"

// begin sends a request on a new stream.
func begin(t *testing.T, c *http2.ClientConn, q *http1.Request) *http2.ClientStream {
	t.Helper()
	st := c.Open()
	if st == nil {
		t.Fatal("no room for a stream")
	}
	if err := errors.Join(st.Begin(q, nil), st.SendBody(&q.Body)); err != nil {
		t.Fatal(err)
	}
	return st
}

// reasonOf is why reading a response failed.
func reasonOf(st *http2.ClientStream) http1.Reason {
	p, err := st.ReadResponse()
	for err == nil {
		_, err = p.Body.Next()
	}
	e, _ := errors.AsType[*http1.Error](err)
	if e == nil {
		return http1.ReasonUnknown
	}
	return e.Reason
}

func TestClientSeesWhyThereIsNoResponse(t *testing.T) {
	ok := func(w *wire) { w.headers(1, false, ":status", "200") }
	for _, tc := range []struct {
		name string
		send func(*wire)
		want http1.Reason
	}{
		{"REFUSED_STREAM", func(w *wire) { _ = w.WriteRSTStream(1, xhttp2.ErrCodeRefusedStream) }, http1.UpstreamRefused},
		{"GOAWAY below it", func(w *wire) { _ = w.WriteGoAway(0, xhttp2.ErrCodeNo, nil) }, http1.UpstreamRefused},
		{"a reset", func(w *wire) { _ = w.WriteRSTStream(1, xhttp2.ErrCodeInternal) }, http1.UpstreamReset},
		{"a reset within the response", func(w *wire) { ok(w); _ = w.WriteRSTStream(1, xhttp2.ErrCodeRefusedStream) }, http1.UpstreamCut},
		{"the connection's end", func(w *wire) { w.conn.Close() }, http1.UpstreamClosed},
		{"the connection's end within the response", func(w *wire) { ok(w); w.conn.Close() }, http1.UpstreamCut},
		{"DATA before the head", func(w *wire) { _ = w.WriteData(1, false, []byte("x")) }, http1.UpstreamBroken},
		{"no status", func(w *wire) { w.headers(1, true, "x", "y") }, http1.UpstreamBroken},
		{"a status that is none", func(w *wire) { w.headers(1, true, ":status", "2OO") }, http1.UpstreamBroken},
		{"a status of four digits", func(w *wire) { w.headers(1, true, ":status", "0200") }, http1.UpstreamBroken},
		{"a switch of protocols", func(w *wire) { w.headers(1, false, ":status", "101") }, http1.UpstreamBroken},
		{"an interim response at the end", func(w *wire) { w.headers(1, true, ":status", "103") }, http1.UpstreamBroken},
		{"Transfer-Encoding", func(w *wire) { w.headers(1, true, ":status", "200", "transfer-encoding", "chunked") }, http1.UpstreamBroken},
		{"a line end in a value", func(w *wire) { w.headers(1, true, ":status", "200", "x", "a\r\nset-cookie: b") }, http1.UpstreamBroken},
		{"a path in a response", func(w *wire) { w.headers(1, true, ":status", "200", ":path", "/") }, http1.UpstreamBroken},
		{"a length that the body has not", func(w *wire) { w.headers(1, true, ":status", "200", "content-length", "5") }, http1.UpstreamBroken},
		{"a body longer than its length", func(w *wire) {
			w.headers(1, false, ":status", "200", "content-length", "5")
			_ = w.WriteData(1, true, []byte("123456"))
		}, http1.UpstreamBroken},
		{"a body shorter than its length", func(w *wire) {
			w.headers(1, false, ":status", "200", "content-length", "5")
			_ = w.WriteData(1, true, []byte("1234"))
		}, http1.UpstreamBroken},
		{"a head of more than 60 KiB", func(w *wire) { w.headers(1, true, ":status", "200", "x", strings.Repeat("x", 61<<10)) }, http1.UpstreamBroken},
		{"a body beyond its window", func(w *wire) {
			ok(w)
			for range 17 {
				_ = w.WriteData(1, false, make([]byte, 16384))
			}
		}, http1.UpstreamCut},
		{"an error of the protocol", func(w *wire) { _ = w.WriteRawFrame(xhttp2.FramePing, 0, 1, make([]byte, 8)) }, http1.UpstreamBroken},
		{"a promise", func(w *wire) { _ = w.WriteRawFrame(xhttp2.FramePushPromise, 0, 1, make([]byte, 8)) }, http1.UpstreamBroken},
		{"silence", func(*wire) {}, http1.UpstreamTimeout},
		{"silence within the response", func(w *wire) { ok(w) }, http1.UpstreamTimeout},
		{"a body as declared", func(w *wire) {
			w.headers(1, false, ":status", "103", "link", "x")
			w.headers(1, false, ":status", "200", "content-length", "5")
			_ = w.WriteData(1, true, []byte("12345"))
		}, http1.ReasonUnknown},
	} {
		t.Run(tc.name, func(t *testing.T) {
			toUpstream(t, http2.Config{}, func(t *testing.T, w *wire, c *http2.ClientConn) {
				st := begin(t, c, asked(t, getText))
				st.SetDeadline(time.Now().Add(time.Minute))
				w.expect("HEADERS 1 GET/a?b end")
				tc.send(w)
				synctest.Wait()
				got := reasonOf(st)
				if got != tc.want {
					t.Errorf("the reason is %v, want %v", got, tc.want)
				}
				_ = st.Close()
				st.Free()
			})
		})
	}
}

// TestARequestBeforeRun goes out behind the preface.
func TestARequestBeforeRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := memPipe()
		c := http2.NewClientConn(far, http2.Config{})
		begin(t, c, asked(t, getText))
		var served sync.WaitGroup
		served.Go(func() { _ = c.Run() })
		defer served.Wait()
		defer near.Close()
		preface := make([]byte, len(xhttp2.ClientPreface))
		if _, err := io.ReadFull(near, preface); err != nil || string(preface) != xhttp2.ClientPreface {
			t.Errorf("the connection begins with %q, %v", preface, err)
		}
	})
}

// TestGoAway: what the upstream has not looked at may go elsewhere, the rest goes on, and the connection takes no more.
func TestGoAway(t *testing.T) {
	toUpstream(t, http2.Config{}, func(t *testing.T, w *wire, c *http2.ClientConn) {
		a, b := begin(t, c, asked(t, getText)), begin(t, c, asked(t, getText))
		late := c.Open()
		w.expect("HEADERS 1 GET/a?b end", "HEADERS 3 GET/a?b end")
		_ = w.WriteGoAway(1<<31-1, xhttp2.ErrCodeNo, nil)
		synctest.Wait()
		if c.Open() != nil || c.Usable() {
			t.Error("a connection that is to end takes another stream")
		}
		if err := late.Begin(asked(t, getText), nil); err == nil {
			t.Error("a request began on a connection that is to end")
		}
		late.Free()
		_ = w.WriteGoAway(1, xhttp2.ErrCodeNo, nil)
		synctest.Wait()
		if got := reasonOf(b); got != http1.UpstreamRefused {
			t.Errorf("the stream above the last: %v, want %v", got, http1.UpstreamRefused)
		}
		b.Free()
		w.headers(1, true, ":status", "200")
		if p, err := a.ReadResponse(); err != nil || p.Status != 200 {
			t.Errorf("the stream below the last: %v, want 200", err)
		}
		a.End()
		a.Free()
		w.expect("GOAWAY 0 NO_ERROR", "gone")
	})
}

// TestBeginAfterTheEnd: a stream that was opened, and whose connection ended before its request was put on it, may go
// elsewhere whatever the connection ended of: the upstream saw nothing of it.
func TestBeginAfterTheEnd(t *testing.T) {
	for name, end := range map[string]func(*wire){
		"GOAWAY":          func(w *wire) { _ = w.WriteGoAway(0, xhttp2.ErrCodeNo, nil) },
		"closed":          func(w *wire) { w.conn.Close() },
		"against the RFC": func(w *wire) { _ = w.WriteRawFrame(xhttp2.FramePing, 0, 1, make([]byte, 8)) },
	} {
		t.Run(name, func(t *testing.T) {
			toUpstream(t, http2.Config{}, func(t *testing.T, w *wire, c *http2.ClientConn) {
				late := c.Open()
				end(w)
				synctest.Wait()
				err := late.Begin(asked(t, getText), nil)
				if e, ok := errors.AsType[*http1.Error](err); !ok || e.Reason != http1.UpstreamRefused {
					t.Errorf("a request after the end: %v, want %v", err, http1.UpstreamRefused)
				}
				late.Free()
			})
		})
	}
}

// TestRoom: as many streams at once as both sides allow, as many over its life as the pool does.
func TestRoom(t *testing.T) {
	toUpstream(t, http2.Config{MaxRequests: 3}, func(t *testing.T, w *wire, c *http2.ClientConn) {
		_ = w.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingMaxConcurrentStreams, Val: 1})
		w.expect("SETTINGS ack")
		for i := range uint32(3) {
			st := begin(t, c, asked(t, getText))
			if c.Open() != nil {
				t.Error("a second stream was opened where one is allowed")
			}
			w.take()
			w.headers(2*i+1, true, ":status", "204")
			if _, err := st.ReadResponse(); err != nil {
				t.Fatal(err)
			}
			st.End()
			st.Free()
		}
		w.expect("GOAWAY 0 NO_ERROR", "gone")
	})
}

// TestCancel reaches the stream it is meant for, and none that uses its memory afterwards.
func TestCancel(t *testing.T) {
	toUpstream(t, http2.Config{}, func(t *testing.T, w *wire, c *http2.ClientConn) {
		st := begin(t, c, asked(t, getText))
		use := st.Use()
		w.take()
		st.Cancel(use)
		w.expect("RST_STREAM 1 CANCEL")
		st.Free()
		again := begin(t, c, asked(t, getText))
		st.Cancel(use)
		w.expect("HEADERS 3 GET/a?b end")
		again.Cancel(again.Use())
		w.expect("RST_STREAM 3 CANCEL")
		w.headers(1, true, ":status", "200") // crossed our reset
		w.expect()
		again.Free()
	})
}

// TestPing: a silent upstream is asked whether it is there, if that is wanted; who does not answer is not.
func TestPing(t *testing.T) {
	toUpstream(t, http2.Config{PingInterval: 5 * time.Second, PingTimeout: 3 * time.Second}, func(t *testing.T, w *wire, c *http2.ClientConn) {
		time.Sleep(time.Minute)
		w.expect() // nothing is under way
		st := begin(t, c, asked(t, getText))
		w.take()
		time.Sleep(6 * time.Second)
		w.expect("PING")
		_ = w.WritePing(true, [8]byte{})
		time.Sleep(10 * time.Second)
		w.expect("PING")
		time.Sleep(10 * time.Second)
		w.expect("gone")
		if got := reasonOf(st); got != http1.UpstreamClosed {
			t.Errorf("the reason is %v, want %v", got, http1.UpstreamClosed)
		}
		st.Free()
	})
}

// TestRequestsFromHTTP11 go out in HTTP/2's form.
func TestRequestsFromHTTP11(t *testing.T) {
	toUpstream(t, http2.Config{}, func(t *testing.T, w *wire, c *http2.ClientConn) {
		q := asked(t, "POST http://cart:80/a?b HTTP/1.1\r\nHost: other\r\nX-Mixed-Case: Yes\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n"+
			"TE: gzip, trailers\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 6\r\n\r\n")
		st := begin(t, c, q)
		w.expect("HEADERS 1 POST/a?b", "DATA 1 3 bytes", "HEADERS 1  x-sum=6 end")
		_ = st.Close()
		st.Free()
	})
}
