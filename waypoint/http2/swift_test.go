package http2_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/http2"
)

// carrier is a handler that carries every request to one upstream connection, and keeps a diary.
type carrier struct {
	up     *http2.ClientConn
	within time.Duration // for the response; 0: for ever
	diary  *diary
	frugal bool // no diary, no cancelling

	far      *http2.ClientStream
	x        *http2.Exchange
	launched bool
}

// diary is who did what.
type diary struct {
	mu    sync.Mutex
	lines []string
}

func (d *diary) note(line string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lines = append(d.lines, line)
}

func (d *diary) take() []string {
	synctest.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	lines := d.lines
	d.lines = nil
	return lines
}

func (c *carrier) until() (t time.Time) {
	if c.within > 0 {
		t = time.Now().Add(c.within)
	}
	return t
}

func (c *carrier) open(st *http2.ServerStream) bool {
	if c.far = c.up.Open(); c.far == nil {
		return false
	}
	if c.frugal {
		return true
	}
	far, use := c.far, c.far.Use()
	st.OnGone(func() { far.Cancel(use) })
	return true
}

// Begin implements http2.Handler.
func (c *carrier) Begin(st *http2.ServerStream) bool {
	if !c.open(st) {
		return false
	}
	c.x = st.Exchange(c.far)
	c.launched = true
	if c.x.Launch(nil, c.until()) {
		return true
	}
	c.launched = false
	return false
}

// Respond implements http2.Handler.
func (c *carrier) Respond(*http2.ServerStream) bool {
	if p := c.x.Whole(); p == nil || !c.x.RespondWhole(nil) {
		return false
	}
	c.end("swift")
	return true
}

func (c *carrier) end(how string) {
	c.far.Free()
	c.far, c.launched = nil, false
	if !c.frugal {
		c.diary.note(how)
	}
}

// Serve implements http2.Handler.
func (c *carrier) Serve(st *http2.ServerStream) {
	err := func() error {
		if _, err := st.Request(); err != nil {
			return err
		}
		if !c.launched {
			if c.far == nil && !c.open(st) {
				return http1.Fail(http1.UpstreamClosed, errors.New("no room"))
			}
			c.far.SetDeadline(c.until())
			c.x = st.Exchange(c.far)
			if err := c.x.Send(nil); err != nil {
				return err
			}
		}
		if _, err := c.x.Receive(); err != nil {
			return err
		}
		return c.x.Respond(nil)
	}()
	how := "worker"
	if err != nil {
		e, _ := errors.AsType[*http1.Error](err)
		how = "worker: " + e.Reason.String()
		_ = st.ReplyError(err, nil)
	}
	if c.far == nil {
		c.diary.note(how)
		return
	}
	c.end(how)
}

// between is both ends of two connections joined by carriers.
type between struct {
	down, up *wire
	diary    *diary
	server   *http2.ServerConn
}

func carry(t *testing.T, within time.Duration, test func(t *testing.T, b *between), settings ...xhttp2.Setting) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		near, far := memPipe()
		up, app := memPipe()
		client := http2.NewClientConn(up, http2.Config{})
		server := http2.NewServerConn(far, http2.Config{})
		b := &between{down: newWire(t, near), up: newWire(t, app), diary: &diary{}, server: server}
		var served sync.WaitGroup
		served.Go(func() { _ = client.Run() })
		served.Go(func() {
			_ = server.ServeWith(func() http2.Handler { return &carrier{up: client, within: within, diary: b.diary} })
		})
		defer func() {
			near.Close()
			app.Close()
			served.Wait()
			b.down.busy.Wait()
			b.up.busy.Wait()
		}()
		if _, err := io.ReadFull(app, make([]byte, len(xhttp2.ClientPreface))); err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(near, xhttp2.ClientPreface)
		for _, w := range []*wire{b.down, b.up} {
			_ = w.WriteSettings(settings...)
			w.listen()
			w.expect("SETTINGS", "WINDOW_UPDATE 0 +4128769", "SETTINGS ack")
		}
		test(t, b)
	})
}

func (b *between) did(want ...string) {
	b.down.t.Helper()
	if got := b.diary.take(); !slices.Equal(got, want) {
		b.down.t.Fatalf("done by %q, want %q", got, want)
	}
}

// post sends a request with a body, at once.
func (b *between) post(stream uint32, body string) {
	b.together(b.down, func(w *wire) {
		w.headers(stream, false, request("content-type", "application/grpc")...)
		_ = w.WriteData(stream, true, []byte(body))
	})
}

// answer sends a response with a body and trailers, at once.
func (b *between) answer(stream uint32, body string) {
	b.together(b.up, func(w *wire) { answerOn(w, stream, body) })
}

func answerOn(w *wire, stream uint32, body string) {
	w.headers(stream, false, ":status", "200", "content-type", "application/grpc", "date", "x")
	_ = w.WriteData(stream, false, []byte(body))
	w.headers(stream, true, "grpc-status", "0")
}

// bytesOf is what f sends, by no dynamic table.
func bytesOf(w *wire, f func(w *wire)) []byte {
	var text bytes.Buffer
	side := &wire{Framer: xhttp2.NewFramer(&text, nil), t: w.t, plain: true}
	side.enc = hpack.NewEncoder(&side.hbuf)
	side.AllowIllegalWrites = true
	f(side)
	return text.Bytes()
}

func (b *between) together(w *wire, f func(w *wire)) { _, _ = w.conn.Write(bytesOf(w, f)) }

const aMessage = "\x00\x00\x00\x00\x05hello"

// TestTheCommonExchangeNeedsNoWorker, however many come at once.
func TestTheCommonExchangeNeedsNoWorker(t *testing.T) {
	carry(t, time.Minute, func(t *testing.T, b *between) {
		b.down.get(1)
		b.up.expect("HEADERS 1 GET/ end")
		b.together(b.up, func(w *wire) { w.headers(1, true, ":status", "204", "date", "x") })
		b.down.expect("HEADERS 1 204 end")
		b.did("swift")

		b.post(3, aMessage)
		b.up.expect("HEADERS 3 POST/", "DATA 3 10 bytes end")
		b.answer(3, aMessage)
		b.down.expect("HEADERS 3 200", "DATA 3 10 bytes", "HEADERS 3  grpc-status=0 end")
		b.did("swift")

		_ = b.down.WriteWindowUpdate(0, 1<<20)
		var ids []uint32
		b.together(b.down, func(w *wire) {
			for i := range uint32(80) { // more than may wait for the end of a read
				w.get(5 + 2*i)
				ids = append(ids, 5+2*i)
			}
		})
		if n := len(b.up.take()); n != 80 {
			t.Errorf("%d requests arrived, want 80", n)
		}
		b.together(b.up, func(w *wire) {
			for _, id := range ids {
				answerOn(w, id, strings.Repeat("x", 1000)) // more than is staged at once
			}
		})
		ends := func(frame string) bool { return strings.HasSuffix(frame, " grpc-status=0 end") }
		if got := b.down.take(); len(got) < 3*80 || len(slices.DeleteFunc(got, func(f string) bool { return !ends(f) })) != 80 {
			t.Errorf("the answers that came back: %q", got)
		}
		if n := len(b.diary.take()); n != 80 {
			t.Errorf("%d exchanges ended, want 80", n)
		}
	})
}

// TestAResponseInPieces is the same response, wherever it is cut.
func TestAResponseInPieces(t *testing.T) {
	whole := 0
	for cut := 0; cut == 0 || cut < whole; cut++ {
		carry(t, time.Minute, func(_ *testing.T, b *between) {
			b.post(1, aMessage)
			b.up.expect("HEADERS 1 POST/", "DATA 1 10 bytes end")
			all := bytesOf(b.up, func(w *wire) { answerOn(w, 1, aMessage) })
			whole = len(all)
			_, _ = b.up.conn.Write(all[:cut])
			synctest.Wait()
			_, _ = b.up.conn.Write(all[cut:])
			b.down.expect("HEADERS 1 200", "DATA 1 10 bytes", "HEADERS 1  grpc-status=0 end")
			got := b.diary.take()
			if len(got) != 1 || got[0] != "swift" && got[0] != "worker" {
				b.down.t.Errorf("cut after %d bytes: done by %q", cut, got)
			}
		})
	}
}

// TestARequestInPieces waits for its end, or is a worker's, and arrives the same.
func TestARequestInPieces(t *testing.T) {
	whole := 0
	for cut := 0; cut == 0 || cut < whole; cut++ {
		carry(t, time.Minute, func(_ *testing.T, b *between) {
			all := bytesOf(b.down, func(w *wire) {
				w.headers(1, false, request()...)
				_ = w.WriteData(1, true, []byte(aMessage))
			})
			whole = len(all)
			_, _ = b.down.conn.Write(all[:cut])
			synctest.Wait()
			_, _ = b.down.conn.Write(all[cut:])
			got := b.up.take()
			if len(got) == 3 { // the end came on its own
				got = []string{got[0], strings.TrimSuffix(got[1], " end") + " end"}
			}
			if want := []string{"HEADERS 1 POST/", "DATA 1 10 bytes end"}; !slices.Equal(got, want) {
				b.down.t.Fatalf("cut after %d bytes: the upstream got %q, want %q", cut, got, want)
			}
			b.answer(1, aMessage)
			b.down.expect("HEADERS 1 200", "DATA 1 10 bytes", "HEADERS 1  grpc-status=0 end")
		})
	}
}

// TestTheUpstreamDiesAtEachByte of its response: the client learns of it, and everything comes to an end.
func TestTheUpstreamDiesAtEachByte(t *testing.T) {
	whole, answered := 0, false
	for cut := 0; cut == 0 || cut <= whole; cut++ {
		carry(t, time.Minute, func(_ *testing.T, b *between) {
			b.post(1, aMessage)
			b.up.take()
			all := bytesOf(b.up, func(w *wire) { answerOn(w, 1, aMessage) })
			whole = len(all)
			_, _ = b.up.conn.Write(all[:cut])
			b.up.conn.Close()
			got, by := strings.Join(b.down.take(), ", "), b.diary.take()
			var ok bool
			switch {
			case cut == whole:
				ok = got == "HEADERS 1 200, DATA 1 10 bytes, HEADERS 1  grpc-status=0 end"
				answered = true
			case strings.HasPrefix(got, "HEADERS 1 200"):
				ok = strings.HasSuffix(got, "RST_STREAM 1 INTERNAL_ERROR")
			default:
				ok = strings.HasPrefix(got, "HEADERS 1 50")
			}
			if !ok || len(by) != 1 {
				b.down.t.Errorf("dead after %d of %d bytes: the client got %q, by %q", cut, whole, got, by)
			}
		})
	}
	if !answered {
		t.Error("a whole response was never seen")
	}
}

// TestWhatEndsAWait: whatever happens to an exchange that nobody waits for, a worker goes on with it, or nothing is left to do.
func TestWhatEndsAWait(t *testing.T) {
	for _, tc := range []struct {
		name     string
		do       func(b *between)
		down, up []string
		by       string
	}{
		{"the upstream resets it", func(b *between) { _ = b.up.WriteRSTStream(1, xhttp2.ErrCodeInternal) },
			[]string{"HEADERS 1 503", "DATA 1 19 bytes end"}, nil, "worker: upstream reset"},
		{"the upstream refuses it", func(b *between) { _ = b.up.WriteRSTStream(1, xhttp2.ErrCodeRefusedStream) },
			[]string{"HEADERS 1 503", "DATA 1 21 bytes end"}, nil, "worker: upstream refused"},
		{"the upstream goes away without it", func(b *between) { _ = b.up.WriteGoAway(0, xhttp2.ErrCodeNo, nil) },
			[]string{"HEADERS 1 503", "DATA 1 21 bytes end"}, []string{"GOAWAY 0 NO_ERROR", "gone"}, "worker: upstream refused"},
		{"the upstream goes away with it", func(b *between) {
			_ = b.up.WriteGoAway(1, xhttp2.ErrCodeNo, nil)
			b.answer(1, aMessage)
		}, []string{"HEADERS 1 200", "DATA 1 10 bytes", "HEADERS 1  grpc-status=0 end"}, []string{"GOAWAY 0 NO_ERROR", "gone"}, "swift"},
		{"the upstream errs behind the answer", func(b *between) {
			b.together(b.up, func(w *wire) {
				answerOn(w, 1, aMessage)
				_ = w.WritePing(false, [8]byte{})
				_ = w.WriteRawFrame(xhttp2.FramePing, 0, 1, nil)
			})
		}, []string{"HEADERS 1 200", "DATA 1 10 bytes", "HEADERS 1  grpc-status=0 end"}, nil, "swift"},
		{"the upstream sends DATA first", func(b *between) { _ = b.up.WriteData(1, true, []byte("x")) },
			[]string{"HEADERS 1 502", "DATA 1 20 bytes end"}, []string{"RST_STREAM 1 PROTOCOL_ERROR"}, "worker: upstream broken"},
		{"an interim response", func(b *between) {
			b.up.headers(1, false, ":status", "103", "link", "x")
			synctest.Wait()
			b.answer(1, aMessage)
		}, []string{"HEADERS 1 103", "HEADERS 1 200", "DATA 1 10 bytes", "HEADERS 1  grpc-status=0 end"}, nil, "worker"},
		{"no response in time", func(*between) { time.Sleep(2 * time.Minute) },
			[]string{"HEADERS 1 504", "DATA 1 21 bytes end"}, []string{"RST_STREAM 1 CANCEL"}, "worker: upstream timeout"},
		{"the client resets it", func(b *between) { _ = b.down.WriteRSTStream(1, xhttp2.ErrCodeCancel) },
			nil, []string{"RST_STREAM 1 CANCEL"}, "worker: upstream closed"},
		{"the client is gone", func(b *between) { b.down.conn.Close() },
			[]string{"gone"}, []string{"RST_STREAM 1 CANCEL"}, "worker: upstream closed"},
		{"the client resets it when it is answered", func(b *between) {
			_ = b.down.WriteRSTStream(1, xhttp2.ErrCodeCancel)
			b.answer(1, aMessage)
		}, nil, nil, ""},
		{"the client drains", func(b *between) {
			b.server.Drain()
			b.answer(1, aMessage)
		}, []string{"GOAWAY 1 NO_ERROR", "HEADERS 1 200", "DATA 1 10 bytes", "HEADERS 1  grpc-status=0 end", "gone"}, nil, "swift"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			carry(t, time.Minute, func(t *testing.T, b *between) {
				b.post(1, aMessage)
				b.up.expect("HEADERS 1 POST/", "DATA 1 10 bytes end")
				tc.do(b)
				down, up, by := b.down.take(), b.up.take(), b.diary.take()
				if tc.by == "" { // either may come first
					if len(by) != 1 {
						t.Errorf("done by %q", by)
					}
					return
				}
				if !slices.Equal(by, []string{tc.by}) {
					t.Errorf("done by %q, want %q", by, tc.by)
				}
				if !slices.Equal(down, tc.down) {
					t.Errorf("the client got %q, want %q", down, tc.down)
				}
				if tc.name != "the upstream errs behind the answer" && !slices.Equal(up, tc.up) {
					t.Errorf("the upstream got %q, want %q", up, tc.up)
				}
			})
		})
	}
}

// TestWhatHasNoBodyGetsNone, whatever its upstream sends behind the head, by either way.
func TestWhatHasNoBodyGetsNone(t *testing.T) {
	for _, tc := range []struct {
		method string
		answer []string
	}{
		{"HEAD", []string{":status", "200", "content-length", "10"}},
		{"HEAD", []string{":status", "200"}},
		{"GET", []string{":status", "204"}},
		{"GET", []string{":status", "304", "content-length", "10"}},
	} {
		for _, at := range []string{"once", "a time"} {
			carry(t, time.Minute, func(_ *testing.T, b *between) {
				b.down.headers(1, true, ":method", tc.method, ":scheme", "http", ":authority", "cart", ":path", "/")
				b.up.expect("HEADERS 1 " + tc.method + "/ end")
				head := func(w *wire) { w.headers(1, false, append(tc.answer, "date", "x")...) }
				rest := func(w *wire) {
					_ = w.WriteData(1, false, []byte(aMessage))
					w.headers(1, true, "x-sum", "1")
				}
				if at == "once" {
					b.together(b.up, func(w *wire) { head(w); rest(w) })
				} else {
					b.together(b.up, head)
					synctest.Wait()
					b.together(b.up, rest)
				}
				b.down.expect("HEADERS 1 " + tc.answer[1] + " end")
			})
		}
	}
}

// TestWindowsThatAreTooSmall make a worker wait for them, on either side.
func TestWindowsThatAreTooSmall(t *testing.T) {
	carry(t, 0, func(_ *testing.T, b *between) {
		b.post(1, aMessage)
		b.up.expect("HEADERS 1 POST/", "DATA 1 4 bytes")
		b.did()
		_ = b.up.WriteWindowUpdate(1, 100)
		b.up.expect("DATA 1 6 bytes end")
		b.answer(1, aMessage)
		b.down.expect("HEADERS 1 200", "DATA 1 4 bytes")
		b.did()
		_ = b.down.WriteWindowUpdate(1, 100)
		b.down.expect("DATA 1 6 bytes", "HEADERS 1  grpc-status=0 end")
		b.did("worker")
	}, xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 4})
	carry(t, 0, func(_ *testing.T, b *between) {
		b.down.get(1)
		b.up.expect("HEADERS 1 GET/ end")
		b.answer(1, aMessage)
		b.down.expect("HEADERS 1 200", "DATA 1 4 bytes")
		b.did()
		_ = b.down.WriteRSTStream(1, xhttp2.ErrCodeCancel)
		b.did("worker: client closed")
	}, xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 4})
}

// TestDeadlinesShareATimer: each exchange ends when its own time is over.
func TestDeadlinesShareATimer(t *testing.T) {
	carry(t, time.Minute, func(_ *testing.T, b *between) {
		for i := range uint32(4) {
			b.down.get(1 + 2*i)
			b.up.expect(fmt.Sprintf("HEADERS %d GET/ end", 1+2*i))
			if i == 1 {
				b.answer(3, aMessage)
				b.down.take()
				b.did("swift")
			}
			time.Sleep(10 * time.Second)
		}
		b.did()
		time.Sleep(25 * time.Second) // 65 s after the first, 45 after the third
		b.did("worker: upstream timeout")
		b.up.expect("RST_STREAM 1 CANCEL")
		time.Sleep(20 * time.Second)
		b.did("worker: upstream timeout")
		b.up.expect("RST_STREAM 5 CANCEL")
		b.answer(7, aMessage)
		b.did("swift")
		time.Sleep(time.Hour)
		b.did()
	})
}

// TestASlowClientHoldsUpNobody who shares its upstream's connection: what its socket does not take waits elsewhere.
func TestASlowClientHoldsUpNobody(t *testing.T) {
	up, app := memPipe()
	client := http2.NewClientConn(up, http2.Config{MaxStreams: 1000})
	var served sync.WaitGroup
	served.Go(func() { _ = client.Run() })
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	served.Go(func() { // the application answers all alike
		_, _ = app.Write([]byte("\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
		in := reader{r: app, buf: make([]byte, 1<<17)}
		_, _ = io.ReadFull(app, in.buf[:len(xhttp2.ClientPreface)])
		w := newWire(t, app)
		all := bytesOf(w, func(w *wire) {
			w.headers(1, false, ":status", "200", "date", "x")
			_ = w.WriteData(1, false, make([]byte, 16000))
			_ = w.WriteData(1, true, make([]byte, 16000))
		})
		m := &message{bytes: all}
		for at := 0; at < len(all); at += 9 + int(all[at])<<16 + int(all[at+1])<<8 + int(all[at+2]) {
			m.at = append(m.at, at+5)
		}
		for {
			stream, err := in.untilEnd()
			if err != nil {
				return
			}
			_ = m.to(app, stream)
		}
	})
	dial := func() net.Conn {
		near, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		far, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_ = far.(*net.TCPConn).SetWriteBuffer(64 << 10)
		served.Go(func() {
			_ = http2.NewServerConn(far, http2.Config{WriteTimeout: time.Minute}).
				ServeWith(func() http2.Handler { return &carrier{up: client, diary: &diary{}} })
		})
		_, _ = io.WriteString(near, xhttp2.ClientPreface+"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x04\x7f\xff\xff\xff"+"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x7f\x00\x00\x00")
		return near
	}
	ask := func(near net.Conn, streams int) {
		w := newWire(t, nil)
		_, _ = near.Write(bytesOf(w, func(w *wire) {
			for i := range streams {
				w.get(uint32(1 + 2*i))
			}
		}))
	}
	slow, quick := dial(), dial()
	_ = slow.(*net.TCPConn).SetReadBuffer(16 << 10)
	ask(slow, 400) // 12 MB
	ask(quick, 5)
	_ = quick.SetDeadline(time.Now().Add(20 * time.Second))
	in := reader{r: quick, buf: make([]byte, 1<<17)}
	for range 5 {
		if _, err := in.untilEnd(); err != nil {
			t.Fatal(err)
		}
	}
	_ = slow.SetDeadline(time.Now().Add(20 * time.Second))
	in = reader{r: slow, buf: make([]byte, 1<<17)}
	for range 400 {
		if _, err := in.untilEnd(); err != nil {
			t.Fatal(err)
		}
	}
	slow.Close()
	quick.Close()
	client.Close()
	served.Wait()
}
