package http2_test

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/mistnet/mistnet/waypoint/http2"
)

// hold answers nothing until its client is gone.
func hold(st *http2.ServerStream) { <-st.Done() }

// TestFloodsEndTheConnection: what costs a peer little and us more, in such numbers as nobody honest sends.
func TestFloodsEndTheConnection(t *testing.T) {
	for name, send := range map[string]func(w *wire, i uint32) error{
		"rapid reset (CVE-2023-44487)": func(w *wire, i uint32) error {
			w.get(2*i + 3)
			return w.WriteRSTStream(2*i+3, xhttp2.ErrCodeCancel)
		},
		"PING":               func(w *wire, _ uint32) error { return w.WritePing(false, [8]byte{}) },
		"PING answers":       func(w *wire, _ uint32) error { return w.WritePing(true, [8]byte{}) },
		"SETTINGS":           func(w *wire, _ uint32) error { return w.WriteSettings() },
		"SETTINGS answers":   func(w *wire, _ uint32) error { return w.WriteSettingsAck() },
		"PRIORITY":           func(w *wire, i uint32) error { return w.WritePriority(2*i+3, xhttp2.PriorityParam{}) },
		"unknown frames":     func(w *wire, _ uint32) error { return w.WriteRawFrame(0x77, 0, 1, nil) },
		"empty DATA":         func(w *wire, _ uint32) error { return w.WriteData(1, false, nil) },
		"padding":            func(w *wire, _ uint32) error { return w.WriteDataPadded(1, false, nil, make([]byte, 1)) },
		"tiny windows":       func(w *wire, _ uint32) error { return w.WriteWindowUpdate(1, 1) },
		"DATA after a reset": func(w *wire, _ uint32) error { return w.WriteData(1, false, []byte("x")) },
	} {
		t.Run(name, func(t *testing.T) {
			serve := hold
			if name == "DATA after a reset" {
				serve = func(st *http2.ServerStream) { _ = st.Reply(200, "", nil) }
			}
			var workers, most atomic.Int64
			toServer(t, http2.Config{MaxStreams: 50}, func(st *http2.ServerStream) {
				most.Store(max(most.Load(), workers.Add(1)))
				defer workers.Add(-1)
				serve(st)
			}, func(t *testing.T, w *wire, _ *http2.ServerConn) {
				w.headers(1, false, request()...)
				w.take()
				for i := range uint32(25_000) {
					if send(w, i) != nil {
						break // it has closed
					}
				}
				got := w.take()
				n := len(got)
				if n == 0 || got[n-1] != "gone" || !slices.ContainsFunc(got, func(s string) bool {
					return strings.HasPrefix(s, "GOAWAY ") && strings.HasSuffix(s, " ENHANCE_YOUR_CALM")
				}) {
					t.Fatalf("%d frames came, the last of them %q, want ENHANCE_YOUR_CALM and the end", n, got[max(n-3, 0):])
				}
				if most.Load() > 50 {
					t.Errorf("%d workers at once, want no more than streams", most.Load())
				}
			})
		})
	}
}

// TestABusyConnectionIsNoFlood: pings that measure the way of data, updates for every message, calls that are cancelled.
func TestABusyConnectionIsNoFlood(t *testing.T) {
	toServer(t, http2.Config{}, echo, func(t *testing.T, w *wire, _ *http2.ServerConn) {
		w.headers(1, false, request()...)
		for i := range 30_000 {
			_ = w.WriteData(1, false, []byte("a message"))
			_ = w.WritePing(false, [8]byte{})
			_ = w.WriteWindowUpdate(0, 9)
			if i%1000 == 0 {
				w.take()
			}
		}
		if got := w.take(); len(got) == 0 || got[len(got)-1] == "gone" {
			t.Fatalf("a conversation ended the connection: %q", got[max(len(got)-3, 0):])
		}
		for i := range uint32(5000) {
			w.get(2*i + 3)
			w.take()
			_ = w.WriteRSTStream(2*i+3, xhttp2.ErrCodeCancel) // it is answered already
		}
		w.get(20001)
		w.expect("HEADERS 20001 200", "DATA 20001 1 bytes end")
	})
}

// TestMoreStreamsThanAllowedAreRefused unseen, so that they can be asked for elsewhere; each counts until its worker is done.
func TestMoreStreamsThanAllowedAreRefused(t *testing.T) {
	var release chan struct{} // of the bubble
	toServer(t, http2.Config{MaxStreams: 2}, func(st *http2.ServerStream) { <-release }, func(t *testing.T, w *wire, _ *http2.ServerConn) {
		release = make(chan struct{})
		w.get(1)
		w.get(3)
		w.get(5)
		w.expect("RST_STREAM 5 REFUSED_STREAM")
		_ = w.WriteRSTStream(1, xhttp2.ErrCodeCancel)
		w.get(7)
		w.expect("RST_STREAM 7 REFUSED_STREAM")
		close(release)
		w.expect("RST_STREAM 3 INTERNAL_ERROR")
		w.get(9)
		w.expect("RST_STREAM 9 INTERNAL_ERROR")
	})
}

// TestWindows: nobody gets more than he has room for, and who has none holds up nobody else.
func TestWindows(t *testing.T) {
	big := strings.Repeat("x", 100_000)
	serve := func(st *http2.ServerStream) {
		q, _ := st.Request()
		if q.Path == "/hold" {
			<-st.Done()
			return
		}
		body := "small"
		if q.Path == "/big" {
			body = big
		}
		_ = st.Reply(200, body, nil)
	}
	toServer(t, http2.Config{}, serve, func(t *testing.T, w *wire, _ *http2.ServerConn) {
		ask := func(stream uint32, path string) {
			w.headers(stream, true, ":method", "GET", ":scheme", "http", ":authority", "cart", ":path", path)
		}
		_ = w.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 10})
		w.expect("SETTINGS ack")
		ask(1, "/big")
		w.expect("HEADERS 1 200", "DATA 1 10 bytes")
		ask(3, "/")
		w.expect("HEADERS 3 200", "DATA 3 5 bytes end")
		_ = w.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 4}) // 1 now has -6
		_ = w.WriteWindowUpdate(1, 6)
		w.expect("SETTINGS ack")
		_ = w.WriteWindowUpdate(1, 1)
		w.expect("DATA 1 1 bytes")
		_ = w.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 20})
		w.expect("SETTINGS ack", "DATA 1 16 bytes")
		_ = w.WriteWindowUpdate(1, 1<<20) // the connection's, too, is bounded: 65535, of which 32 are gone
		got, n := w.take(), 0
		for _, s := range got {
			var k int
			if _, err := fmt.Sscanf(s, "DATA 1 %d bytes", &k); err == nil {
				n += k
			}
		}
		if n != 65535-32 {
			t.Fatalf("%d bytes came of %q, want what the connection's window allows", n, got)
		}
		ask(5, "/")
		w.expect("HEADERS 5 200")
		_ = w.WriteWindowUpdate(0, 1<<20)
		if got := w.take(); !slices.Contains(got, "DATA 5 5 bytes end") || !strings.HasSuffix(got[len(got)-1], "end") {
			t.Errorf("with the window open came %q, want the ends of both", got)
		}
		ask(7, "/hold")
		_ = w.WriteWindowUpdate(7, 1<<31-1)
		w.expect("RST_STREAM 7 FLOW_CONTROL_ERROR")
		ask(9, "/big")
		w.take()
		_ = w.WriteRawFrame(xhttp2.FrameWindowUpdate, 0, 9, make([]byte, 4))
		w.expect("RST_STREAM 9 PROTOCOL_ERROR")
	})
}

// TestABodyBeyondItsWindow ends its stream. What nobody reads is held up to the window, and others go on.
func TestABodyBeyondItsWindow(t *testing.T) {
	serve := func(st *http2.ServerStream) {
		if q, _ := st.Request(); q.Path == "/hold" {
			<-st.Done()
			return
		}
		echo(st)
	}
	toServer(t, http2.Config{}, serve, func(t *testing.T, w *wire, _ *http2.ServerConn) {
		w.headers(1, false, ":method", "POST", ":scheme", "http", ":authority", "cart", ":path", "/hold")
		for range 16 {
			_ = w.WriteData(1, false, make([]byte, 16384))
		}
		w.expect()
		w.headers(3, false, request()...)
		for range 200 { // more than the connection's window, which must come back
			_ = w.WriteData(3, false, make([]byte, 16384))
			w.take()
		}
		_ = w.WriteData(3, true, nil)
		w.expect("HEADERS 3 200", "DATA 3 7 bytes end")
		_ = w.WriteData(1, false, make([]byte, 1))
		w.expect("RST_STREAM 1 FLOW_CONTROL_ERROR")
	})
}

// TestSlowPeers: whoever holds a connection or a stream without using it loses it.
func TestSlowPeers(t *testing.T) {
	for _, tc := range []struct {
		name  string
		cfg   http2.Config
		serve func(*http2.ServerStream)
		send  func(w *wire)
		after time.Duration
		want  []string
	}{
		{"a header block that does not end", http2.Config{}, echo, func(w *wire) { _ = w.WriteRawFrame(xhttp2.FrameHeaders, 0, 1, nil) },
			11 * time.Second, []string{"gone"}},
		{"a declared body that does not come", http2.Config{}, echo, func(w *wire) { w.headers(1, false, request("content-length", "9")...) },
			121 * time.Second, []string{"HEADERS 1 408", "DATA 1 17 bytes end", "RST_STREAM 1 NO_ERROR"}},
		{"a body of any length may pause", http2.Config{}, echo, func(w *wire) { w.headers(1, false, request()...) }, 3 * time.Hour, nil},
		{"a window that does not open", http2.Config{}, func(st *http2.ServerStream) {
			if st.Reply(200, strings.Repeat("x", 100_000), nil) != nil {
				st.Reset()
			}
		}, func(w *wire) { w.get(1); w.take() }, 301 * time.Second, []string{"RST_STREAM 1 INTERNAL_ERROR"}},
		{"nothing is asked", http2.Config{IdleTimeout: time.Minute}, echo, func(w *wire) { w.get(1); w.take() }, 75 * time.Second, []string{"GOAWAY 1 NO_ERROR", "gone"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			toServer(t, tc.cfg, tc.serve, func(t *testing.T, w *wire, _ *http2.ServerConn) {
				tc.send(w)
				time.Sleep(tc.after)
				w.expect(tc.want...)
			})
		})
	}
	t.Run("a preface that does not come", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			near, far := memPipe()
			defer near.Close()
			start := time.Now()
			_, _ = near.Write([]byte("PRI * HT"))
			err := http2.NewServerConn(far, http2.Config{}).Serve(func() func(*http2.ServerStream) { return echo })
			if took := time.Since(start); err == nil || took != 10*time.Second {
				t.Errorf("Serve() = %v after %s, want an error after 10 s", err, took)
			}
		})
	})
	t.Run("a peer that does not read", func(t *testing.T) {
		var done chan struct{} // of the bubble
		toServer(t, http2.Config{}, func(st *http2.ServerStream) {
			defer close(done)
			if err := st.Reply(200, strings.Repeat("x", 60_000), nil); err == nil {
				t.Error("the reply was sent to nobody")
			}
		}, func(t *testing.T, w *wire, _ *http2.ServerConn) {
			done = make(chan struct{})
			w.conn.in.mu.Lock()
			w.conn.in.room, w.conn.in.paused = 1000, true
			w.conn.in.mu.Unlock()
			w.get(1)
			<-done
		})
	})
}

// TestDrain: the client is told twice, what was on its way is served, and the connection ends with its last stream.
func TestDrain(t *testing.T) {
	var release chan struct{} // of the bubble
	serve := func(st *http2.ServerStream) {
		if q, _ := st.Request(); q.Method == "POST" {
			<-release
		}
		_ = st.Reply(200, "", nil)
	}
	toServer(t, http2.Config{}, serve, func(t *testing.T, w *wire, c *http2.ServerConn) {
		release = make(chan struct{})
		w.headers(1, true, request()...)
		w.take()
		c.Wind()
		c.Wind()
		w.expect("GOAWAY 2147483647 NO_ERROR", "PING")
		w.get(3) // was on its way
		w.expect("HEADERS 3 200 end")
		_ = w.WritePing(true, [8]byte{'d', 'r', 'a', 'i', 'n'})
		w.expect("GOAWAY 3 NO_ERROR")
		w.get(5) // too late
		w.expect()
		c.Drain()
		w.expect()
		close(release)
		w.expect("HEADERS 1 200 end", "gone")
	})
}

func TestDrainOfAnIdleConnection(t *testing.T) {
	toServer(t, http2.Config{}, echo, func(t *testing.T, w *wire, c *http2.ServerConn) {
		c.Wind() // nothing was asked yet: the first is served
		w.expect()
		w.get(1)
		w.expect("GOAWAY 2147483647 NO_ERROR", "PING", "HEADERS 1 200", "DATA 1 1 bytes end")
		_ = w.WritePing(true, [8]byte{'d', 'r', 'a', 'i', 'n'})
		w.expect("GOAWAY 1 NO_ERROR", "gone")
	})
	toServer(t, http2.Config{}, echo, func(t *testing.T, w *wire, c *http2.ServerConn) {
		c.Drain()
		w.expect("GOAWAY 0 NO_ERROR", "gone")
	})
}

// TestAClientMayWriteBehindTheLastAnswer, which it may not have read yet: a write that fails would tell it that it is lost. It is not waited
// for without end.
func TestAClientMayWriteBehindTheLastAnswer(t *testing.T) {
	toServer(t, http2.Config{}, echo, func(t *testing.T, w *wire, c *http2.ServerConn) {
		w.get(1)
		w.expect("HEADERS 1 200", "DATA 1 1 bytes end")
		c.Drain()
		w.expect("GOAWAY 1 NO_ERROR", "gone")
		for range 2 {
			if err := w.WritePing(false, [8]byte{}); err != nil {
				t.Errorf("a PING behind the last answer: %v", err)
			}
			synctest.Wait()
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if err := w.WritePing(false, [8]byte{}); err == nil {
			t.Error("the connection is open for longer than CloseTimeout")
		}
	})
}

// workers is how many goroutines serve streams, or wait to.
func workers() int {
	b := make([]byte, 1<<20)
	return strings.Count(string(b[:runtime.Stack(b, true)]), "http2.(*ServerConn).work1(")
}

// TestIdleConnectionsKeepNoWorkers: what served many streams at once ends when there have been none for a while, and the next streams
// are served all the same.
func TestIdleConnectionsKeepNoWorkers(t *testing.T) {
	toServer(t, http2.Config{}, hold, func(t *testing.T, w *wire, _ *http2.ServerConn) {
		id := uint32(1)
		for range 2 {
			for range 30 {
				w.get(id)
				id += 2
			}
			synctest.Wait()
			if n := workers(); n != 30 {
				t.Fatalf("30 streams have %d workers", n)
			}
			for i := range uint32(30) {
				if err := w.WriteRSTStream(id-2-2*i, xhttp2.ErrCodeCancel); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
			if n := workers(); n != 30 {
				t.Errorf("%d workers wait for the next streams, want 30", n)
			}
			time.Sleep(25 * time.Second) // of the bubble's clock
			synctest.Wait()
			if n := workers(); n != 0 {
				t.Errorf("%d workers are left when nothing was asked for 25 s", n)
			}
			w.take()
		}
	})
}

// TestStreamsThatNobodyReadsLeaveTheOthersAlone when they have ended: what they held is allowed to the connection again.
func TestStreamsThatNobodyReadsLeaveTheOthersAlone(t *testing.T) {
	var release chan struct{} // of the bubble
	toServer(t, http2.Config{}, func(st *http2.ServerStream) {
		<-release
		st.Reset()
	}, func(t *testing.T, w *wire, _ *http2.ServerConn) {
		release = make(chan struct{})
		window := 4 << 20 // of the connection, for us to use
		opened := func() {
			for _, f := range w.take() {
				var n int
				if _, err := fmt.Sscanf(f, "WINDOW_UPDATE 0 +%d", &n); err == nil {
					window += n
				}
			}
		}
		const piece = 16 << 10
		last, sent := uint32(1), 0
		for id := uint32(1); window >= piece && id < 2*1024; id += 2 {
			w.headers(id, false, request()...)
			for n := 0; n < 240<<10 && window >= piece; n += piece { // less than the stream's window
				_ = w.WriteData(id, false, make([]byte, piece))
				window -= piece
				sent += piece
			}
			last = id
			opened()
		}
		if window >= piece {
			t.Fatalf("%d bytes are held, and the window is still open", sent)
		}
		for id := uint32(1); id <= last; id += 2 {
			_ = w.WriteRSTStream(id, xhttp2.ErrCodeCancel)
		}
		opened()
		if window < 1<<20 {
			t.Errorf("a window of %d bytes is left once nothing is held", window)
		}
		close(release)
	})
}
