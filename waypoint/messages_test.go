package waypoint_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
	"github.com/mistnet/mistnet/waypoint"
)

// messages waits until so many messages of gRPC were counted, each way, towards an application.
func (l *lab) messages(app string, requests, responses int) {
	l.t.Helper()
	got := ""
	l.eventually("messages counted", func() bool {
		got = ""
		for line := range strings.Lines(l.page(":15020/stats/prometheus")) {
			if strings.Contains(line, "_messages_total{") && strings.Contains(line, `destination_workload="`+app+`"`) {
				got += line
			}
		}
		has := func(name string, n int) bool {
			for line := range strings.Lines(got) {
				if strings.HasPrefix(line, "istio_"+name+"_messages_total{") && strings.HasSuffix(line, fmt.Sprintf("} %d\n", n)) {
					return true
				}
			}
			return false
		}
		return has("request", requests) && has("response", responses)
	})
	for _, label := range []string{"response_code", "response_flags", "grpc_response_status", "connection_security_policy"} {
		if strings.Contains(got, label+"=") {
			l.t.Errorf("messages have the label %s:\n%s", label, got)
		}
	}
	if !strings.Contains(got, `request_protocol="grpc"`) || !strings.Contains(got, `reporter="waypoint"`) {
		l.t.Errorf("messages are not told to be gRPC's, or by whom:\n%s", got)
	}
}

// TestMessagesOfGRPC are counted one by one, while the call is under way, and once however often they are sent.
func TestMessagesOfGRPC(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	at, _ := grpcApp(t, echo(""))
	l.service("cart", "10.9.0.1", mesh.AppGRPC, at)
	var tries atomic.Int64
	again, _ := grpcApp(t, func(m string, s grpc.ServerStream) error {
		if tries.Add(1) == 1 {
			return status.Error(codes.Unavailable, "not now")
		}
		return echo("")(m, s)
	})
	l.service("again", "10.9.0.2", mesh.AppGRPC, again)
	web := app2(t, true, func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Type", "application/grpc-web") })
	l.service("web", "10.9.0.3", mesh.AppHTTP2, web)
	l.known("cart", "again", "web")

	s, err := l.grpc("10.9.0.1:80").NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/a.B/Echo")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if err := s.SendMsg(wrapperspb.String(strings.Repeat("x", 40_000*i))); err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(new(wrapperspb.StringValue)); err != nil {
			t.Fatal(err)
		}
		l.messages("cart", i+1, i+1)
	}
	_ = s.CloseSend()
	if err := s.RecvMsg(new(wrapperspb.StringValue)); err != io.EOF {
		t.Fatalf("the call ended with %v, want EOF", err)
	}
	l.messages("cart", 3, 3)

	if _, err := call(t.Context(), l.grpc("10.9.0.2:80"), "/a.B/C", strings.Repeat("x", 20_000)); err != nil || tries.Load() != 2 {
		t.Fatalf("a call that is tried again: %v in %d tries", err, tries.Load())
	}
	l.messages("again", 1, 1)

	req, _ := http.NewRequestWithContext(t.Context(), "POST", "http://10.9.0.3/a.B/C", strings.NewReader("\x00\x00\x00\x00\x00"))
	req.Header.Set("Content-Type", "application/grpc-web+proto")
	l.client = l.client2()
	l.do(req)
	l.counted(`destination_workload="web"`, `request_protocol="http"`)
}

// TestMessagesInPieces: it does not matter where frames of HTTP end, and what is no message is none.
func TestMessagesInPieces(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	echoes := app2(t, false, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
		b, _ := io.ReadAll(r.Body)
		for i := range b {
			_, _ = w.Write(b[i : i+1])
			w.(http.Flusher).Flush()
		}
	})
	message := func(n int) string { return string([]byte{1, 0, 0, byte(n >> 8), byte(n)}) + strings.Repeat("x", n) }
	for i, c := range []struct {
		name, body string
		want       int
	}{
		{"one", message(3), 1},
		{"empty ones", message(0) + message(0) + message(0), 3},
		{"several", message(1) + message(300) + message(0) + message(7), 4},
		{"cut inside of the length", message(2) + "\x00\x00\x00", 1},
		{"cut inside of the message", message(2) + "\x00\x00\x00\x00\x05ab", 2},
		{"something else", message(2) + "\x02\x00\x00\x00\x00" + message(2), 1},
	} {
		name, vip := fmt.Sprintf("app%d", i), fmt.Sprintf("10.9.0.%d", i+1)
		l.service(name, vip, mesh.AppGRPC, echoes)
		l.known(name)
		in, out := io.Pipe()
		req, _ := http.NewRequestWithContext(t.Context(), "POST", "http://"+vip+"/a.B/C", in)
		req.Header.Set("Content-Type", "application/grpc+proto")
		go func() {
			for i := range len(c.body) {
				_, _ = io.WriteString(out, c.body[i:i+1])
			}
			out.Close()
		}()
		l.client = l.client2()
		if _, body := l.do(req); body != c.body {
			t.Errorf("%s: %d bytes came back, want %d", c.name, len(body), len(c.body))
		}
		l.messages(name, c.want, c.want)
	}
}

// frugal2 is an application that answers every call alike, in few words and without allocating much.
func frugal2(t testing.TB) netip.AddrPort {
	t.Helper()
	ln := listen(t.(*testing.T), loopback()+":0")
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = conn.Write([]byte("\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
				answer := append(frame(xhttp2.FrameHeaders, xhttp2.FlagHeadersEndHeaders, fields(":status", "200", "content-type", "application/grpc", "date", "x")),
					frame(xhttp2.FrameData, 0, []byte("\x00\x00\x00\x00\x05hello"))...)
				answer = append(answer, frame(xhttp2.FrameHeaders, xhttp2.FlagHeadersEndHeaders|xhttp2.FlagHeadersEndStream, fields("grpc-status", "0"))...)
				r := newFrames(conn, len(xhttp2.ClientPreface))
				for {
					stream, err := r.untilEnd()
					if err != nil {
						return
					}
					_, _ = conn.Write(numbered(answer, stream))
				}
			}()
		}
	}()
	return addrPort(ln.Addr())
}

func fields(kv ...string) []byte {
	var b bytes.Buffer
	enc := hpack.NewEncoder(&b)
	enc.SetMaxDynamicTableSize(0)
	for i := 0; i < len(kv); i += 2 {
		_ = enc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1], Sensitive: true})
	}
	return b.Bytes()
}

func frame(typ xhttp2.FrameType, flags xhttp2.Flags, p []byte) []byte {
	return append([]byte{0, byte(len(p) >> 8), byte(len(p)), byte(typ), byte(flags), 0, 0, 0, 0}, p...)
}

// numbered makes the frames in b those of a stream.
func numbered(b []byte, stream uint32) []byte {
	for at := 0; at < len(b); at += 9 + int(b[at+1])<<8 + int(b[at+2]) {
		b[at+5], b[at+6], b[at+7], b[at+8] = byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream)
	}
	return b
}

// framesReader reads frames without allocating.
type framesReader struct {
	r    io.Reader
	skip int
	buf  [64 << 10]byte
	at   int
	w    int
}

func newFrames(r io.Reader, skip int) *framesReader { return &framesReader{r: r, skip: skip} }

// untilEnd reads to the next end of a stream and returns which.
func (r *framesReader) untilEnd() (uint32, error) {
	for {
		for n := min(r.skip, r.w-r.at); n > 0; n = 0 {
			r.at += n
			r.skip -= n
		}
		for r.skip == 0 && r.w-r.at >= 9 {
			h := r.buf[r.at:]
			n := 9 + (int(h[0])<<16 | int(h[1])<<8 | int(h[2]))
			if r.w-r.at < n {
				break
			}
			r.at += n
			if typ := xhttp2.FrameType(h[3]); typ <= xhttp2.FrameHeaders && xhttp2.Flags(h[4]).Has(xhttp2.FlagDataEndStream) {
				return uint32(h[5])<<24 | uint32(h[6])<<16 | uint32(h[7])<<8 | uint32(h[8]), nil
			}
		}
		r.w = copy(r.buf[:], r.buf[r.at:r.w])
		r.at = 0
		n, err := r.r.Read(r.buf[r.w:])
		if err != nil {
			return 0, err
		}
		r.w += n
	}
}

// TestTheCommonCallAllocatesLittle: a gRPC call whose messages are counted costs no more than a request.
func TestTheCommonCallAllocatesLittle(t *testing.T) {
	if meshtest.Race {
		t.Skip("the race detector makes pools forget")
	}
	l := newLab(t, func(c *waypoint.Config) { c.AccessLog = false })
	l.service("cart", "10.9.0.1", mesh.AppGRPC, frugal2(t))
	l.known("cart")
	s, err := l.open(t.Context(), "10.9.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_ = s.SetDeadline(time.Now().Add(time.Minute))
	_, _ = io.WriteString(s, xhttp2.ClientPreface+"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
	// Its windows are opened once for all.
	_, _ = s.Write(append(frame(xhttp2.FrameWindowUpdate, 0, []byte{0x3f, 0xff, 0, 0}), frame(xhttp2.FrameSettings, xhttp2.FlagSettingsAck, nil)...))
	ask := append(frame(xhttp2.FrameHeaders, xhttp2.FlagHeadersEndHeaders, fields(":method", "POST", ":scheme", "http", ":path", "/shop.Cart/Get",
		":authority", "cart.shop", "content-type", "application/grpc", "te", "trailers", "x-request-id", "00000000-0000-4000-8000-000000000000")),
		frame(xhttp2.FrameData, xhttp2.FlagDataEndStream, []byte("\x00\x00\x00\x00\x05hello"))...)
	r, stream := newFrames(s, 0), uint32(1)
	exchange := func() {
		if _, err := s.Write(numbered(ask, stream)); err != nil {
			t.Fatal(err)
		}
		if got, err := r.untilEnd(); err != nil || got != stream {
			t.Fatalf("stream %d ended, %v, want %d", got, err, stream)
		}
		stream += 2
	}
	for range 200 {
		exchange()
	}
	const most = 1 // the upstream
	if n := testing.AllocsPerRun(2000, exchange); n > most {
		t.Errorf("a call allocates %v times, want at most %d", n, most)
	} else {
		t.Logf("a call allocates %v times", n)
	}
	l.messages("cart", int(stream-1)/2, int(stream-1)/2)
}
