package hbone_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/hbone"
)

// peers hands the pool in-memory connections whose other ends are played by hand.
type peers struct {
	t     *testing.T
	pool  *hbone.Pool
	wires chan *wire
	mu    sync.Mutex
	all   []*wire
	ends  []net.Conn
}

// fromClient runs test with a pool whose connections come out as wires.
func fromClient(t *testing.T, change func(*hbone.PoolConfig), test func(t *testing.T, p *peers)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p := &peers{t: t, wires: make(chan *wire, 100)}
		cfg := hbone.PoolConfig{
			TLS: func(context.Context, hbone.Target) (*tls.Config, error) { return clientTLS(), nil },
			Dial: func(context.Context, netip.AddrPort) (net.Conn, error) {
				near, far := memPipe()
				go p.serve(far)
				return near, nil
			},
		}
		if change != nil {
			change(&cfg)
		}
		p.pool = hbone.NewPool(cfg)
		defer func() {
			p.pool.Close()
			p.mu.Lock()
			defer p.mu.Unlock()
			for i, w := range p.all {
				p.ends[i].Close()
				w.busy.Wait()
			}
		}()
		test(t, p)
	})
}

func (p *peers) serve(far net.Conn) {
	tc := tls.Server(far, serverTLS())
	if tc.Handshake() != nil {
		return
	}
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(tc, preface); err != nil || string(preface) != http2.ClientPreface {
		return
	}
	w := newWire(p.t, tc)
	w.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 100})
	w.WriteSettingsAck()
	w.listen()
	p.mu.Lock()
	p.all, p.ends = append(p.all, w), append(p.ends, far)
	p.mu.Unlock()
	p.wires <- w
}

type opened struct {
	s   *hbone.Stream
	err error
}

// open starts opening a tunnel.
func (p *peers) open() <-chan opened {
	result := make(chan opened, 1)
	go func() {
		s, err := p.pool.Open(context.Background(), target(netip.MustParseAddrPort("10.0.0.2:15008")), "10.0.0.1:80", hbone.Header{})
		result <- opened{s, err}
	}()
	return result
}

// next is the next connection, after its opening, on which the client asked for stream 1.
func (p *peers) next() *wire {
	p.t.Helper()
	w := <-p.wires
	got := w.take()
	want := []string{"SETTINGS", "WINDOW_UPDATE 0 +16711681", "HEADERS 1 10.0.0.1:80", "SETTINGS ack"}
	slices.Sort(got) // the request may come before or after the answer to our SETTINGS
	slices.Sort(want)
	if !slices.Equal(got, want) {
		p.t.Fatalf("client sent %q, want %q", got, want)
	}
	return w
}

func (p *peers) must(r <-chan opened) *hbone.Stream {
	p.t.Helper()
	o := <-r
	if o.err != nil {
		p.t.Fatalf("Open: %v", o.err)
	}
	return o.s
}

func TestClientReadsResetsAsEndsOrErrors(t *testing.T) {
	for _, tc := range []struct {
		code http2.ErrCode
		end  bool
	}{{http2.ErrCodeNo, true}, {http2.ErrCodeCancel, true}, {http2.ErrCodeConnect, false}, {http2.ErrCodeInternal, false}} {
		t.Run(tc.code.String(), func(t *testing.T) {
			fromClient(t, nil, func(t *testing.T, p *peers) {
				r := p.open()
				w := p.next()
				w.headers(1, false, ":status", "200")
				s := p.must(r)
				w.WriteData(1, false, []byte("hello"))
				w.WriteRSTStream(1, tc.code)
				synctest.Wait()
				got, err := io.ReadAll(s)
				if tc.end && (err != nil || string(got) != "hello") {
					t.Errorf("ReadAll = %q, %v; want hello and an end", got, err)
				}
				var reset *hbone.ResetError
				if !tc.end && (!errors.As(err, &reset) || !reset.Remote || reset.Code != uint32(tc.code)) {
					t.Errorf("ReadAll = %q, %v; want %v", got, err, tc.code)
				}
				if _, err := s.Write([]byte("x")); !errors.As(err, &reset) {
					t.Errorf("Write = %v, want the reset", err)
				}
			})
		})
	}
}

func TestClientAnswers(t *testing.T) {
	fromClient(t, nil, func(t *testing.T, p *peers) {
		r := p.open()
		w := p.next()
		w.headers(1, false, ":status", "103") // informational: ignored
		w.headers(1, false, ":status", "200", "baggage", "a=b")
		s := p.must(r)
		if s.ResponseBaggage() != "a=b" {
			t.Errorf("ResponseBaggage() = %q", s.ResponseBaggage())
		}
		s.Write([]byte("hi"))
		s.CloseWrite()
		w.expect("DATA 1 2 bytes", "DATA 1 0 bytes end")
		w.WriteData(1, true, []byte("ho"))
		if got, err := io.ReadAll(s); err != nil || string(got) != "ho" {
			t.Errorf("ReadAll = %q, %v", got, err)
		}
		s.Close()
		w.expect()

		r = p.open()
		w.expect("HEADERS 3 10.0.0.1:80")
		w.headers(3, false, ":status", "204") // success, but not 200
		var status *hbone.StatusError
		if o := <-r; !errors.As(o.err, &status) || status.Status != 204 {
			t.Errorf("Open = %v, want status 204", o.err)
		}
		w.expect("RST_STREAM 3 CANCEL")

		r = p.open()
		w.expect("HEADERS 5 10.0.0.1:80")
		w.headers(5, false, ":status", "2oo")
		var stage *hbone.StageError
		if o := <-r; !errors.As(o.err, &stage) || stage.Stage != hbone.StageHTTP2 {
			t.Errorf("Open = %v, want a failure of HTTP/2", o.err)
		}
		w.expect("RST_STREAM 5 PROTOCOL_ERROR")
	})
}

func TestClientRetriesOnceOnANewConnection(t *testing.T) {
	for name, refuse := range map[string]func(w *wire){
		"refused stream":        func(w *wire) { w.WriteRSTStream(1, http2.ErrCodeRefusedStream) },
		"GOAWAY before it":      func(w *wire) { w.WriteGoAway(0, http2.ErrCodeNo, nil) },
		"connection breaks":     func(w *wire) { w.tls.NetConn().Close() },
		"GOAWAY with an error":  func(w *wire) { w.WriteGoAway(0, http2.ErrCodeInternal, nil) },
		"garbage from the peer": func(w *wire) { w.WriteRawFrame(http2.FramePing, 0, 5, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			fromClient(t, nil, func(t *testing.T, p *peers) {
				r := p.open()
				refuse(p.next())
				w := p.next()
				w.headers(1, false, ":status", "200")
				p.must(r)
				// A second refusal in a row is final.
				r = p.open()
				w.expect("HEADERS 3 10.0.0.1:80")
				w.WriteRSTStream(3, http2.ErrCodeRefusedStream)
				p.next().WriteRSTStream(1, http2.ErrCodeRefusedStream)
				var stage *hbone.StageError
				if o := <-r; !errors.As(o.err, &stage) || stage.Stage != hbone.StageHTTP2 {
					t.Errorf("Open = %v, want a failure of HTTP/2", o.err)
				}
			})
		})
	}
}

func TestClientLeavesAConnectionThatGoesAway(t *testing.T) {
	fromClient(t, nil, func(t *testing.T, p *peers) {
		r := p.open()
		w := p.next()
		w.headers(1, false, ":status", "200")
		s := p.must(r)
		w.WriteGoAway(1<<31-1, http2.ErrCodeNo, nil) // graceful: what runs goes on
		synctest.Wait()
		r = p.open()
		p.next().headers(1, false, ":status", "200")
		p.must(r).Close()
		s.Write([]byte("still here"))
		w.expect("DATA 1 10 bytes")
		s.Close()
		w.expect("DATA 1 0 bytes end", "RST_STREAM 1 CANCEL", "GOAWAY 0 NO_ERROR", "gone")
	})
}

func TestClientLeavesAConnectionWhoseCertificateExpired(t *testing.T) {
	expiring := func(cfg *hbone.PoolConfig) {
		cfg.TLS = func(context.Context, hbone.Target) (*tls.Config, error) {
			c := clientTLS()
			cert := c.Certificates[0]
			cert.Leaf = &x509.Certificate{NotAfter: time.Now().Add(5 * time.Second)}
			c.Certificates = nil
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
			return c, nil
		}
	}
	fromClient(t, expiring, func(t *testing.T, p *peers) {
		r := p.open()
		w := p.next()
		w.headers(1, false, ":status", "200")
		s := p.must(r)
		time.Sleep(4 * time.Second)
		r = p.open()
		w.expect("HEADERS 3 10.0.0.1:80")
		w.headers(3, false, ":status", "200")
		p.must(r)
		time.Sleep(time.Second)
		r = p.open()
		p.next().headers(1, false, ":status", "200")
		p.must(r)
		s.Write([]byte("still here"))
		w.expect("DATA 1 10 bytes")
	})
}

func TestClientFailsStreamsWhenPingsStayUnanswered(t *testing.T) {
	fromClient(t, nil, func(t *testing.T, p *peers) {
		r := p.open()
		w := p.next()
		w.headers(1, false, ":status", "200")
		s := p.must(r)
		start := time.Now()
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, hbone.ErrPingTimeout) {
			t.Errorf("Read = %v, want %v", err, hbone.ErrPingTimeout)
		}
		if d := time.Since(start); d != 30*time.Second {
			t.Errorf("the connection was given up after %v, want 10 s to the ping and 20 s for its answer", d)
		}
		w.expect("PING", "gone")
	})
}

func TestClientReleasesIdleConnections(t *testing.T) {
	fromClient(t, nil, func(t *testing.T, p *peers) {
		r := p.open()
		w := p.next()
		w.headers(1, false, ":status", "200")
		s := p.must(r)
		answer := func(d time.Duration) (pings int, gone bool) {
			for until := time.Now().Add(d); time.Now().Before(until); time.Sleep(time.Second) {
				for _, f := range w.take() {
					switch f {
					case "PING":
						pings++
						w.WritePing(true, [8]byte{})
					case "gone":
						return pings, true
					}
				}
			}
			return pings, false
		}
		if pings, gone := answer(10 * time.Minute); gone || pings < 59 {
			t.Fatalf("with an open stream: %d pings in 10 min, gone %v", pings, gone)
		}
		s.Close()
		if _, gone := answer(4*time.Minute + 50*time.Second); gone {
			t.Fatal("released before 5 min")
		}
		if _, gone := answer(30 * time.Second); !gone {
			t.Fatal("not released after 5 min")
		}
	})
}

func TestClientAnswersPings(t *testing.T) {
	fromClient(t, nil, func(t *testing.T, p *peers) {
		p.open()
		w := p.next()
		w.WritePing(false, [8]byte{7})
		w.expect("PING ack")
	})
}

func TestClientNeverExceedsWindowsAndKeepsTurns(t *testing.T) {
	fromClient(t, nil, func(t *testing.T, p *peers) {
		r := p.open()
		w := p.next()
		w.headers(1, false, ":status", "200")
		s := p.must(r)
		var wrote sync.WaitGroup
		wrote.Go(func() { s.Write(make([]byte, 100_000)) })
		if n := sum(w.take()); n != 65535 {
			t.Fatalf("client sent %d bytes, want the initial window of 65535", n)
		}
		w.WriteWindowUpdate(1, 1<<20)
		w.expect() // the connection's window is used up too
		w.WriteWindowUpdate(0, 10)
		w.expect("DATA 1 10 bytes")
		w.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}) // now negative for new data
		w.WriteWindowUpdate(0, 1<<20)
		if n := sum(w.take()); n != 100_000-65535-10 {
			t.Fatalf("client sent %d bytes, want the rest", n)
		}
		wrote.Wait()
	})
}

func TestWriteDeadlineEndsAWriteThatTheWindowStops(t *testing.T) {
	fromClient(t, nil, func(t *testing.T, p *peers) {
		r := p.open()
		w := p.next()
		w.headers(1, false, ":status", "200")
		s := p.must(r)
		s.SetDeadline(time.Now().Add(time.Second))
		n, err := s.Write(make([]byte, 100_000))
		var timeout net.Error
		if n != 65535 || !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("Write = %d, %v; want 65535 and a timeout", n, err)
		}
		if _, err := s.Read(make([]byte, 1)); !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("Read = %v, want a timeout", err)
		}
		s.SetDeadline(time.Time{})
		w.WriteData(1, false, []byte("x"))
		if n, err := s.Read(make([]byte, 1)); n != 1 || err != nil {
			t.Errorf("Read = %d, %v after the deadline was lifted", n, err)
		}
	})
}

// sum adds up the bytes of DATA frames.
func sum(frames []string) (n int) {
	for _, f := range frames {
		var stream, k int
		if _, err := sscan(f, &stream, &k); err == nil {
			n += k
		}
	}
	return n
}

// TestEndedSeesWhatThePeerDid without reading: of a stream that waits, which may be used again.
func TestEndedSeesWhatThePeerDid(t *testing.T) {
	t.Parallel()
	for name, act := range map[string]func(s *hbone.Stream){
		"half-close": func(s *hbone.Stream) { _ = s.CloseWrite() },
		"close":      func(s *hbone.Stream) { _ = s.Close() },
		"reset":      func(s *hbone.Stream) { _ = s.Reset() },
		"bytes":      func(s *hbone.Stream) { _, _ = s.Write([]byte("unasked")) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			now, over := make(chan struct{}), make(chan struct{})
			addr := serve(t, &hbone.Server{Handle: func(_ context.Context, r *hbone.Request) {
				s, err := r.Accept("")
				if err != nil {
					return
				}
				<-now
				act(s)
				<-over
			}})
			s := open(t, newPool(t, nil), addr)
			defer close(over)
			defer s.Close()
			if s.Ended() {
				t.Error("the stream has ended before anything happened")
			}
			close(now)
			for end := time.Now().Add(10 * time.Second); !s.Ended(); runtime.Gosched() {
				if time.Now().After(end) {
					t.Fatal("the end is not seen")
				}
			}
		})
	}
}

// TestOpenWithin: who has another target to try does not wait for a dial that hangs, which the next one to ask makes use of.
func TestOpenWithin(t *testing.T) {
	dials := 0
	slow := func(cfg *hbone.PoolConfig) {
		dial := cfg.Dial
		cfg.Dial = func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
			dials++
			time.Sleep(3 * time.Second) // of the bubble
			return dial(ctx, addr)
		}
	}
	fromClient(t, slow, func(t *testing.T, p *peers) {
		start := time.Now()
		_, err := p.pool.OpenWithin(t.Context(), 2*time.Second, target(netip.MustParseAddrPort("10.0.0.2:15008")), "10.0.0.1:80", hbone.Header{})
		var stage *hbone.StageError
		if !errors.As(err, &stage) || stage.Stage != hbone.StageDial || !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != 2*time.Second {
			t.Errorf("OpenWithin = %v after %v, want the end of its 2 s", err, time.Since(start))
		}
		r := p.open()
		p.next().headers(1, false, ":status", "200")
		p.must(r).Close()
		if took := time.Since(start); took != 3*time.Second || dials != 1 {
			t.Errorf("the next one has a tunnel after %v and %d dials, want the one that was under way, 3 s", took, dials)
		}
	})
}
