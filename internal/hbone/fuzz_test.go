package hbone_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
)

// frames encodes frames for a seed.
func frames(write func(f *http2.Framer, block func(fields ...string) []byte)) []byte {
	var b, h bytes.Buffer
	f := http2.NewFramer(&b, nil)
	f.AllowIllegalWrites = true
	enc := hpack.NewEncoder(&h)
	write(f, func(fields ...string) []byte {
		h.Reset()
		for i := 0; i < len(fields); i += 2 {
			enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
		}
		return bytes.Clone(h.Bytes())
	})
	return b.Bytes()
}

// feed sends input and whatever it ends with to the far side of a handshaken connection, and reads until that closes.
func feed(tc *tls.Conn, input []byte) {
	var reading sync.WaitGroup
	reading.Go(func() { io.Copy(io.Discard, tc) })
	tc.Write(input)
	tc.CloseWrite()
	tc.NetConn().Close()
	reading.Wait()
}

func FuzzServerInput(f *testing.F) {
	f.Add([]byte{})
	f.Add(frames(func(fr *http2.Framer, block func(...string) []byte) {
		fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true,
			BlockFragment: block(":method", "CONNECT", ":authority", "10.0.0.1:80", "baggage", "a=b")})
		fr.WriteData(1, false, []byte("hello, tunnel"))
		fr.WriteWindowUpdate(1, 100)
		fr.WriteDataPadded(1, true, []byte("bye"), make([]byte, 7))
		fr.WriteRSTStream(1, http2.ErrCodeCancel)
	}))
	f.Add(frames(func(fr *http2.Framer, block func(...string) []byte) {
		fr.WriteSettings()
		b := block(":method", "GET", ":scheme", "https", ":path", "/", ":authority", "x")
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndStream: true, BlockFragment: b[:3], PadLength: 3,
			Priority: http2.PriorityParam{StreamDep: 5, Weight: 9}})
		fr.WriteContinuation(1, true, b[3:])
		fr.WritePing(false, [8]byte{1})
		fr.WriteGoAway(0, http2.ErrCodeNo, []byte("debug"))
		fr.WriteRawFrame(0xfe, 0, 7, []byte("unknown"))
	}))
	f.Fuzz(func(t *testing.T, input []byte) {
		near, far := memPipe()
		srv := &hbone.Server{TLS: serverTLS(), Handle: echo}
		var served sync.WaitGroup
		served.Go(func() { srv.ServeConn(context.Background(), far) })
		tc := tls.Client(near, clientTLS())
		if err := tc.Handshake(); err != nil {
			t.Fatal(err)
		}
		feed(tc, append([]byte(http2.ClientPreface), input...))
		ended := make(chan struct{})
		go func() { served.Wait(); close(ended) }()
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			t.Fatal("the connection is closed and ServeConn has not returned")
		}
	})
}

func FuzzClientInput(f *testing.F) {
	f.Add([]byte{})
	f.Add(frames(func(fr *http2.Framer, block func(...string) []byte) {
		fr.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1})
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: block(":status", "200", "baggage", "a=b")})
		fr.WriteData(1, true, []byte("hello"))
		fr.WriteGoAway(1, http2.ErrCodeNo, nil)
	}))
	f.Add(frames(func(fr *http2.Framer, block func(...string) []byte) {
		fr.WriteSettings()
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: block(":status", "103")})
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndStream: true, EndHeaders: true, BlockFragment: block(":status", "503")})
		fr.WriteRSTStream(1, http2.ErrCodeRefusedStream)
	}))
	f.Fuzz(func(t *testing.T, input []byte) {
		var far sync.WaitGroup
		p := hbone.NewPool(hbone.PoolConfig{
			TLS: func(context.Context, hbone.Target) (*tls.Config, error) { return clientTLS(), nil },
			Dial: func(context.Context, netip.AddrPort) (net.Conn, error) {
				a, b := memPipe()
				far.Go(func() {
					tc := tls.Server(b, serverTLS())
					if tc.Handshake() == nil {
						feed(tc, input)
					}
				})
				return a, nil
			},
		})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		to := hbone.Target{Expect: []mesh.Identity{serverID}, Addr: netip.MustParseAddrPort("10.0.0.2:15008")}
		s, err := p.Open(ctx, to, "10.0.0.1:80", hbone.Header{})
		if err == nil {
			s.Write([]byte("hello"))
			io.Copy(io.Discard, s)
			s.Close()
		}
		if ctx.Err() != nil {
			t.Fatal("the connection is closed and the client still waits")
		}
		p.Close()
		far.Wait()
	})
}
