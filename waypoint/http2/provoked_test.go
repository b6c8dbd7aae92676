package http2_test

import (
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/mistnet/mistnet/waypoint/http2"
)

// TestResetsThatAreProvokedEndTheConnection (CVE-2025-8671): who makes us reset the streams that were begun for him does what who resets
// them himself does.
func TestResetsThatAreProvokedEndTheConnection(t *testing.T) {
	open := func(w *wire, id uint32) { w.headers(id, false, request()...) }
	for name, send := range map[string]func(w *wire, id uint32) error{
		"a window beyond its bound": func(w *wire, id uint32) error {
			open(w, id)
			return w.WriteWindowUpdate(id, 1<<31-1)
		},
		"a window update of zero": func(w *wire, id uint32) error {
			open(w, id)
			return w.WriteRawFrame(xhttp2.FrameWindowUpdate, 0, id, make([]byte, 4))
		},
		"DATA behind the end": func(w *wire, id uint32) error {
			w.get(id)
			return w.WriteData(id, false, []byte("x"))
		},
		"HEADERS behind the end": func(w *wire, id uint32) error {
			w.get(id)
			w.headers(id, true, "x", "y")
			return nil
		},
		"a body of another length": func(w *wire, id uint32) error {
			w.headers(id, false, request("content-length", "1")...)
			return w.WriteData(id, true, []byte("xy"))
		},
		"trailers that are not the end": func(w *wire, id uint32) error {
			open(w, id)
			w.headers(id, false, "x", "y")
			return nil
		},
		"trailers that are none": func(w *wire, id uint32) error {
			open(w, id)
			w.headers(id, true, "X", "y")
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			var begun atomic.Int64
			toServer(t, http2.Config{}, func(st *http2.ServerStream) {
				begun.Add(1)
				<-st.Done()
			}, func(t *testing.T, w *wire, _ *http2.ServerConn) {
				var got []string
				for i := range uint32(3000) {
					if send(w, 2*i+1) != nil {
						break // it has closed
					}
					if i%100 == 99 {
						got = append(got, w.take()...)
					}
				}
				got = append(got, w.take()...)
				if !slices.Contains(got, "gone") || !slices.ContainsFunc(got, func(s string) bool {
					return strings.HasPrefix(s, "GOAWAY ") && strings.HasSuffix(s, " ENHANCE_YOUR_CALM")
				}) {
					t.Fatalf("3000 streams were begun for nothing (%d by a worker), and the connection goes on", begun.Load())
				}
				if n := begun.Load(); n > 1100 {
					t.Errorf("%d streams were begun, want no more than a thousand", n)
				}
			})
		})
	}
}

// TestAHonestClientProvokesAFewResets without losing its connection.
func TestAHonestClientProvokesAFewResets(t *testing.T) {
	toServer(t, http2.Config{}, hold, func(t *testing.T, w *wire, _ *http2.ServerConn) {
		for i := range uint32(5000) {
			w.headers(2*i+1, false, request()...)
			_ = w.WriteWindowUpdate(2*i+1, 1<<31-1)
			if i%400 == 399 {
				if got := w.take(); got[len(got)-1] == "gone" {
					t.Fatalf("the connection ended after %d streams", i)
				}
				time.Sleep(11 * time.Second)
			}
		}
	})
}

// TestSettingsCostWhatTheyBring: a frame that sets the window again and again does not visit every stream as often.
func TestSettingsCostWhatTheyBring(t *testing.T) {
	toServer(t, http2.Config{}, hold, func(t *testing.T, w *wire, _ *http2.ServerConn) {
		const streams = 1000
		for i := range uint32(streams) {
			w.headers(2*i+1, false, request()...)
		}
		w.take()
		var all []xhttp2.Setting
		for i := range 682 {
			all = append(all, xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: uint32(100 + i%2)})
		}
		const frames = 100
		took := cpuTime(t, func() {
			for range frames {
				_ = w.WriteSettings(all...)
			}
			w.take()
		})
		if each := took / frames; each > 2*time.Millisecond {
			t.Errorf("a frame of 4 KiB takes %s with %d streams open", each, streams)
		}
	})
}

// cpuTime is how long f kept the processor busy, whatever else the machine does.
func cpuTime(t *testing.T, f func()) time.Duration {
	t.Helper()
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			t.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	f()
	return used() - before
}
