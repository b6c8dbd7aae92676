package http2_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"syscall"
	"testing"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/mistnet/mistnet/waypoint/http2"
)

// message is one message of one stream, as frames whose stream is to be filled in.
type message struct {
	bytes []byte
	at    []int // of the stream ids
}

// frames encodes heads, bodies and trailers: each head a list of name, value. A head of nil is left out.
func frames(enc *hpack.Encoder, buf *bytes.Buffer, head []string, body string, trailers []string) *message {
	m := &message{}
	add := func(typ xhttp2.FrameType, flags xhttp2.Flags, p []byte) {
		m.at = append(m.at, len(m.bytes)+5)
		m.bytes = append(m.bytes, byte(len(p)>>16), byte(len(p)>>8), byte(len(p)), byte(typ), byte(flags), 0, 0, 0, 0)
		m.bytes = append(m.bytes, p...)
	}
	block := func(fields []string) []byte {
		buf.Reset()
		for i := 0; i < len(fields); i += 2 {
			_ = enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
		}
		return buf.Bytes()
	}
	end := func(last bool) xhttp2.Flags {
		if last {
			return xhttp2.FlagDataEndStream
		}
		return 0
	}
	if head != nil {
		add(xhttp2.FrameHeaders, xhttp2.FlagHeadersEndHeaders|end(body == "" && trailers == nil), block(head))
	}
	if body != "" {
		add(xhttp2.FrameData, end(trailers == nil), []byte(body))
	}
	if trailers != nil {
		add(xhttp2.FrameHeaders, xhttp2.FlagHeadersEndHeaders|xhttp2.FlagHeadersEndStream, block(trailers))
	}
	return m
}

func (m *message) to(w io.Writer, stream uint32) error {
	for _, i := range m.at {
		binary.BigEndian.PutUint32(m.bytes[i:], stream)
	}
	_, err := w.Write(m.bytes)
	return err
}

// reader reads frames without allocating.
type reader struct {
	r   io.Reader
	buf []byte
	r0  int
	w   int
}

// untilEnd reads to the next end of a stream and returns which.
func (r *reader) untilEnd() (uint32, error) {
	for {
		for r.w-r.r0 >= 9 {
			h := r.buf[r.r0:]
			n := 9 + (int(h[0])<<16 | int(h[1])<<8 | int(h[2]))
			if r.w-r.r0 < n {
				break
			}
			typ, flags, stream := xhttp2.FrameType(h[3]), xhttp2.Flags(h[4]), binary.BigEndian.Uint32(h[5:])
			r.r0 += n
			if typ <= xhttp2.FrameHeaders && flags.Has(xhttp2.FlagDataEndStream) {
				return stream, nil
			}
		}
		r.w = copy(r.buf, r.buf[r.r0:r.w])
		r.r0 = 0
		n, err := r.r.Read(r.buf[r.w:])
		if err != nil {
			return 0, err
		}
		r.w += n
	}
}

// bench is a client and an upstream of few words, with the engine between them.
type bench struct {
	down   *memConn
	in     reader
	next   uint32
	asks   []*message
	answer *message
}

var (
	getHead = []string{":method", "GET", ":scheme", "http", ":authority", "cart.shop.svc.cluster.local", ":path", "/api/v1/carts/42?fields=items,total",
		"user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36", "accept", "application/json, text/plain, */*", "accept-encoding", "gzip, deflate, br",
		"cookie", "session=0123456789abcdef0123456789abcdef", "cookie", "theme=dark", "x-request-id", "00000000-0000-4000-8000-000000000000",
		"traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "x-custom", "value"}
	getAnswer = []string{":status", "200", "date", "Sun, 22 Nov 2026 17:00:00 GMT", "content-type", "application/json", "content-length", "15", "vary", "Accept"}
	callHead  = []string{":method", "POST", ":scheme", "http", ":path", "/shop.Cart/Get", ":authority", "cart.shop.svc.cluster.local:80", "content-type", "application/grpc",
		"user-agent", "grpc-go/1.85.0", "te", "trailers", "grpc-timeout", "1S", "x-request-id", "00000000-0000-4000-8000-000000000000"}
	callAnswer = []string{":status", "200", "content-type", "application/grpc"}
	callEnd    = []string{"grpc-status", "0", "grpc-message", ""}
)

const smallMessage = "\x00\x00\x00\x00\x05hello"

func newBench(tb testing.TB, asks func(enc *hpack.Encoder, buf *bytes.Buffer) []*message, answer func(enc *hpack.Encoder, buf *bytes.Buffer) *message, swift bool) *bench {
	near, far := memPipe()
	up, app := memPipe()
	client := http2.NewClientConn(up, http2.Config{})
	server := http2.NewServerConn(far, http2.Config{})
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	enc.SetMaxDynamicTableSize(4096)
	b := &bench{down: near, next: 1, asks: asks(enc, &buf)}
	still := hpack.NewEncoder(&buf)
	still.SetMaxDynamicTableSize(0)
	b.answer = answer(still, &buf)
	b.in = reader{r: near, buf: make([]byte, 1<<17)}
	done := make(chan struct{}, 3)
	go func() { _ = client.Run(); done <- struct{}{} }()
	go func() {
		if swift {
			_ = server.ServeWith(func() http2.Handler { return &carrier{up: client, frugal: true} })
		} else {
			_ = server.Serve(proxy(tb, client))
		}
		done <- struct{}{}
	}()
	go func() { // the application
		defer func() { done <- struct{}{} }()
		_, _ = app.Write([]byte("\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
		in := reader{r: app, buf: make([]byte, 1<<17)}
		_, _ = io.ReadFull(app, in.buf[:len(xhttp2.ClientPreface)])
		credit := []byte{0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0x40, 0}
		for {
			stream, err := in.untilEnd()
			if err != nil {
				return
			}
			_, _ = app.Write(credit)
			_ = b.answer.to(app, stream)
		}
	}()
	_, _ = near.Write([]byte(xhttp2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
	tb.Cleanup(func() {
		near.Close()
		client.Close()
		for range 3 {
			<-done
		}
	})
	return b
}

// once makes n requests at once and waits for their answers.
func (b *bench) once(tb testing.TB, n int) {
	for range n {
		_ = b.asks[int(b.next/2)%len(b.asks)].to(b.down, b.next)
		b.next += 2
	}
	for range n {
		if _, err := b.in.untilEnd(); err != nil {
			tb.Fatal(err)
		}
	}
	_, _ = b.down.Write([]byte{0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0x40, 0})
}

func gets(n int) func(enc *hpack.Encoder, buf *bytes.Buffer) []*message {
	return func(enc *hpack.Encoder, buf *bytes.Buffer) (all []*message) {
		enc.SetMaxDynamicTableSize(0)
		for i := range n {
			head := append([]string(nil), getHead...)
			head[19] = head[19][:len(head[19])-1] + string(rune('0'+i))
			all = append(all, frames(enc, buf, head, "", nil))
		}
		return all
	}
}

func calls(enc *hpack.Encoder, buf *bytes.Buffer) []*message {
	enc.SetMaxDynamicTableSize(0)
	return []*message{frames(enc, buf, callHead, smallMessage, nil)}
}

func getsAnswer(enc *hpack.Encoder, buf *bytes.Buffer) *message {
	return frames(enc, buf, getAnswer, `{"hello":"you"}`, nil)
}

func callsAnswer(enc *hpack.Encoder, buf *bytes.Buffer) *message {
	return frames(enc, buf, callAnswer, smallMessage, callEnd)
}

func TestAllocations(t *testing.T) {
	for _, c := range []struct {
		name   string
		asks   func(*hpack.Encoder, *bytes.Buffer) []*message
		answer func(*hpack.Encoder, *bytes.Buffer) *message
		most   float64
	}{
		{"the same request again", gets(1), getsAnswer, 0},
		{"another request each time", gets(7), getsAnswer, 1},
		{"the same call again", calls, callsAnswer, 0},
	} {
		for _, swift := range []bool{false, true} {
			b := newBench(t, c.asks, c.answer, swift)
			b.once(t, 1)
			if n := testing.AllocsPerRun(200, func() { b.once(t, 1) }); n > c.most && !raced {
				t.Errorf("%s, without a worker: %v: %v allocations for request and response, want at most %v", c.name, swift, n, c.most)
			}
		}
	}
}

// cpu reports the processor time of an operation: the wall's means nothing on a machine that others use.
func cpu(b *testing.B) func() {
	used := func() int64 {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return u.Utime.Nano() + u.Stime.Nano()
	}
	start := used()
	return func() { b.ReportMetric(float64(used()-start)/float64(b.N), "cpu-ns/op") }
}

func BenchmarkExchange(b *testing.B) {
	for _, c := range []struct {
		name   string
		asks   func(*hpack.Encoder, *bytes.Buffer) []*message
		answer func(*hpack.Encoder, *bytes.Buffer) *message
		at     int
	}{
		{"get", gets(7), getsAnswer, 1}, {"get16", gets(7), getsAnswer, 16}, {"call", calls, callsAnswer, 1}, {"call16", calls, callsAnswer, 16},
	} {
		for _, swift := range []bool{false, true} {
			b.Run(fmt.Sprintf("%s/swift=%v", c.name, swift), func(b *testing.B) {
				x := newBench(b, c.asks, c.answer, swift)
				x.once(b, c.at)
				b.ReportAllocs()
				stop := cpu(b)
				for i := 0; i < b.N; i += c.at {
					x.once(b, c.at)
				}
				stop()
			})
		}
	}
}
