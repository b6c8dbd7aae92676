//lint:file-ignore SA1019 the implementation of golang.org/x/net is the peer here, deprecated or not

package hbone_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/hbone/record"
)

// echoes sends n bytes through s and wants them back.
func echoes(t *testing.T, s *hbone.Stream, n int) {
	t.Helper()
	want := random(n)
	var sent sync.WaitGroup
	sent.Go(func() {
		s.Write(want)
		s.CloseWrite()
	})
	if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, want) {
		t.Errorf("echo of %d bytes = %d bytes, %v", n, len(got), err)
	}
	sent.Wait()
	s.Close()
}

func TestEitherSideMayLeaveItsRecordsToCryptoTLS(t *testing.T) {
	for _, client := range []bool{false, true} {
		for _, server := range []bool{false, true} {
			for _, chosen := range []bool{false, true} {
				t.Run(fmt.Sprintf("client %v server %v config by hello %v", client, server, chosen), func(t *testing.T) {
					cfg := serverTLS()
					if chosen {
						inner := cfg
						cfg = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return inner, nil }}
					}
					addr := serve(t, &hbone.Server{TLS: cfg, Handle: echo, StdlibRecords: server})
					p := newPool(t, func(c *hbone.PoolConfig) { c.StdlibRecords = client })
					for _, n := range []int{0, 1, 16384, 3 << 20} {
						echoes(t, open(t, p, addr), n)
					}
				})
			}
		}
	}
}

// lockedBuffer is a key log of somebody else's.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func TestAKeyLogOfTheOwnersIsLeftAlone(t *testing.T) {
	var ofServer, ofClient lockedBuffer
	cfg := serverTLS()
	cfg.KeyLogWriter = &ofServer
	addr := serve(t, &hbone.Server{TLS: cfg, Handle: echo})
	p := newPool(t, func(c *hbone.PoolConfig) {
		c.TLS = func(context.Context, hbone.Target) (*tls.Config, error) {
			cfg := clientTLS()
			cfg.KeyLogWriter = &ofClient
			return cfg, nil
		}
	})
	echoes(t, open(t, p, addr), 100_000)
	for _, l := range []*lockedBuffer{&ofServer, &ofClient} {
		if !strings.Contains(l.b.String(), "CLIENT_TRAFFIC_SECRET_0") {
			t.Errorf("the owner's key log holds %q", l.b.String())
		}
	}
}

// xnetEcho tunnels n bytes through our server as golang.org/x/net does it.
func xnetEcho(rt http.RoundTripper, addr string, n int) error {
	want := random(n)
	pr, pw := io.Pipe()
	resp, err := rt.RoundTrip(&http.Request{
		Method: "CONNECT", Host: "10.0.0.1:80", Body: pr, Header: http.Header{}, URL: &url.URL{Scheme: "https", Host: addr},
	})
	if err != nil {
		return err
	}
	var sent sync.WaitGroup
	sent.Go(func() {
		pw.Write(want)
		pw.Close()
	})
	defer sent.Wait()
	got, err := io.ReadAll(resp.Body)
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("echo of %d bytes = %d bytes", n, len(got))
	}
	return err
}

func TestTLS12IsLeftToCryptoTLS(t *testing.T) {
	cfg := serverTLS()
	cfg.MinVersion = tls.VersionTLS12
	addr := serve(t, &hbone.Server{TLS: cfg, Handle: echo})
	client := clientTLS()
	client.MinVersion, client.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	tr := &http2.Transport{TLSClientConfig: client}
	defer tr.CloseIdleConnections()
	if err := xnetEcho(tr, addr.String(), 1<<20); err != nil {
		t.Error(err)
	}
}

func TestChaCha20IsLeftToCryptoTLS(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("optional program curl is not installed")
	}
	var suite atomic.Uint32
	addr := serve(t, &hbone.Server{Handle: func(_ context.Context, r *hbone.Request) {
		suite.Store(uint32(r.TLS.CipherSuite))
		r.Reject(418)
	}})
	cert, key, root := writePEM(t)
	for name, id := range map[string]uint16{
		"TLS_CHACHA20_POLY1305_SHA256": tls.TLS_CHACHA20_POLY1305_SHA256,
		"TLS_AES_256_GCM_SHA384":       tls.TLS_AES_256_GCM_SHA384,
	} {
		out, err := exec.CommandContext(t.Context(), curl, "-sS", "--http2", "--max-time", "10", "-o", "/dev/null", "--tls13-ciphers", name,
			"-w", "%{http_code}", "--cert", cert, "--key", key, "--cacert", root, "https://"+addr.String()+"/").CombinedOutput()
		if err != nil || string(out) != "418" || suite.Load() != uint32(id) {
			t.Errorf("curl = %q, %v with suite %#x, want 418 with %s", out, err, suite.Load(), name)
		}
	}
}

// handConn is a TLS connection whose records are made by hand, so that a test can do what crypto/tls never does.
type handConn struct {
	net.Conn // the raw one
	opener   *record.Opener
	in, rest []byte

	mu      sync.Mutex
	sealer  *record.Sealer
	every   int // writes between two key updates; 0: never
	writes  int
	answers atomic.Int32 // records without data that arrived
}

// oneRecord gives crypto/tls the bytes of one record at a time.
type oneRecord struct {
	net.Conn
	rest []byte
}

func (o *oneRecord) Read(p []byte) (int, error) {
	if len(o.rest) == 0 {
		rec, err := readRecord(o.Conn)
		if err != nil {
			return 0, err
		}
		o.rest = rec
	}
	n := copy(p, o.rest)
	o.rest = o.rest[n:]
	return n, nil
}

func readRecord(r io.Reader) ([]byte, error) {
	rec := make([]byte, record.HeaderBytes, 1<<16+record.HeaderBytes)
	if _, err := io.ReadFull(r, rec); err != nil {
		return nil, io.ErrUnexpectedEOF // io.EOF is for close_notify
	}
	rec = rec[:record.Length(rec)]
	_, err := io.ReadFull(r, rec[record.HeaderBytes:])
	return rec, err
}

// byHand connects to a server of ours.
func byHand(t *testing.T, addr netip.AddrPort) *handConn {
	t.Helper()
	raw, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	raw.SetDeadline(time.Now().Add(20 * time.Second))
	var log record.Secrets
	cfg := clientTLS()
	cfg.KeyLogWriter = &log
	tc := tls.Client(&oneRecord{Conn: raw}, cfg)
	if err := tc.Handshake(); err != nil {
		t.Fatal(err)
	}
	s, o, ok := log.Take(record.Client, tc.ConnectionState())
	if !ok {
		t.Fatal("Take refused the connection")
	}
	return &handConn{Conn: raw, sealer: s, opener: o, in: make([]byte, record.OpenRoom)}
}

func (h *handConn) Read(p []byte) (int, error) {
	for len(h.rest) == 0 {
		rec, err := readRecord(h.Conn)
		if err != nil {
			return 0, err
		}
		n, err := h.opener.Open(h.in, rec)
		if err != nil {
			return 0, err
		}
		if h.rest = h.in[:n]; n == 0 {
			h.answers.Add(1)
		}
	}
	n := copy(p, h.rest)
	h.rest = h.rest[n:]
	return n, nil
}

func (h *handConn) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []byte
	var err error
	if h.writes++; h.every > 0 && h.writes%h.every == 0 {
		if out, err = h.sealer.Update(out, true); err != nil {
			return 0, err
		}
	}
	if out, err = h.sealer.Seal(out, p, nil); err != nil {
		return 0, err
	}
	if _, err := h.Conn.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}

func TestKeyUpdatesOfThePeerAreAnswered(t *testing.T) {
	addr := serve(t, &hbone.Server{Handle: echo})
	h := byHand(t, addr)
	h.every = 3
	cc, err := new(http2.Transport).NewClientConn(h)
	if err != nil {
		t.Fatal(err)
	}
	if err := xnetEcho(cc, addr.String(), 5<<20); err != nil {
		t.Fatal(err)
	}
	if n := h.answers.Load(); n == 0 { // one may answer several
		t.Errorf("%d writes with key updates among them brought no answer", h.writes)
	}
}

// opened starts HTTP/2 by hand and waits for a stream.
func (h *handConn) opened(t *testing.T) {
	t.Helper()
	io.WriteString(h, http2.ClientPreface)
	f := http2.NewFramer(h, h)
	f.WriteSettings()
	w := newWire(t, nil)
	f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: w.block(":method", "CONNECT", ":authority", "10.0.0.1:80")})
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if fr.Header().Type == http2.FrameHeaders {
			return
		}
	}
}

// remains reads until the connection ends and returns how.
func (h *handConn) remains() error {
	_, err := io.Copy(io.Discard, struct{ io.Reader }{h})
	return err
}

func TestWhatEndsAConnectionIsSaidInTLS(t *testing.T) {
	for _, tc := range []struct {
		name   string
		end    func(h *handConn, srv *hbone.Server)
		stream error  // what the stream reads; nil: any error
		peer   string // what the peer reads; "": close_notify
	}{
		{"a broken record", func(h *handConn, _ *hbone.Server) {
			out, _ := h.sealer.Seal(nil, []byte("x"), nil)
			out[len(out)-1] ^= 1
			h.Conn.Write(out)
		}, nil, "remote error: tls: bad record MAC"},
		{"an unprotected record", func(h *handConn, _ *hbone.Server) {
			h.Conn.Write([]byte{20, 3, 3, 0, 1, 1})
		}, nil, "remote error: tls: unexpected message"},
		{"a record too long to wait for", func(h *handConn, _ *hbone.Server) {
			h.Conn.Write([]byte{23, 3, 3, 0xff, 0xff})
		}, nil, "remote error: tls: record overflow"},
		{"a replay", func(h *handConn, _ *hbone.Server) {
			out, _ := h.sealer.Seal(nil, []byte{0, 0, 0, 4, 0, 0, 0, 0, 0}, nil)
			h.Conn.Write(append(out, out...))
		}, nil, "remote error: tls: bad record MAC"},
		{"close_notify", func(h *handConn, _ *hbone.Server) {
			out, _ := h.sealer.Alert(nil, record.CloseNotify)
			h.Conn.Write(out)
		}, hbone.ErrPeerClosed, ""},
		{"a cut", func(h *handConn, _ *hbone.Server) {
			h.Conn.(*net.TCPConn).CloseWrite()
		}, hbone.ErrTruncated, "unexpected EOF"},
		{"a cut within a record", func(h *handConn, _ *hbone.Server) {
			out, _ := h.sealer.Seal(nil, []byte("x"), nil)
			h.Conn.Write(out[:10])
			h.Conn.(*net.TCPConn).CloseWrite()
		}, hbone.ErrTruncated, "unexpected EOF"},
		{"an alert", func(h *handConn, _ *hbone.Server) {
			out, _ := h.sealer.Alert(nil, record.InternalError)
			h.Conn.Write(out)
		}, nil, "unexpected EOF"},
		{"an error of HTTP/2", func(h *handConn, _ *hbone.Server) {
			http2.NewFramer(h, h).WriteRawFrame(http2.FrameData, 0, 0, nil)
		}, nil, ""},
		{"shutdown", func(h *handConn, srv *hbone.Server) {
			go srv.Shutdown(context.Background()) // returns when the connection has ended
			f := http2.NewFramer(h, h)
			for {
				fr, err := f.ReadFrame()
				if err != nil {
					return
				}
				if p, ok := fr.(*http2.PingFrame); ok {
					f.WritePing(true, p.Data)
					f.WriteRSTStream(1, http2.ErrCodeInternal)
					return
				}
			}
		}, nil, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ended := make(chan error, 1)
			srv := &hbone.Server{Handle: func(_ context.Context, r *hbone.Request) {
				if s, err := r.Accept(""); err == nil {
					_, err = io.ReadAll(s)
					ended <- err
				}
			}}
			h := byHand(t, serve(t, srv))
			h.opened(t)
			tc.end(h, srv)
			err := h.remains()
			if tc.peer == "" && err != nil || tc.peer != "" && (err == nil || err.Error() != tc.peer) {
				t.Errorf("the peer read %v, want %q", err, tc.peer)
			}
			if err := <-ended; err == nil || tc.stream != nil && !errors.Is(err, tc.stream) {
				t.Errorf("the stream read %v, want %v", err, tc.stream)
			}
		})
	}
}
