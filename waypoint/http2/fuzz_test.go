package http2_test

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/http2"
)

// settings is an empty SETTINGS frame.
const settings = "\x00\x00\x00\x04\x00\x00\x00\x00\x00"

// FuzzServer feeds a server connection whatever a client could send: it must end when the client does, and all its workers
// with it.
func FuzzServer(f *testing.F) {
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	for _, m := range []*message{
		frames(enc, &buf, getHead, "", nil), frames(enc, &buf, callHead, smallMessage, nil), frames(enc, &buf, callHead, "x", callEnd),
	} {
		var b bytes.Buffer
		_ = m.to(&b, 1)
		_ = m.to(&b, 3)
		f.Add(b.Bytes())
	}
	f.Add([]byte("\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x08"))
	f.Add([]byte("\x00\x00\x04\x08\x00\x00\x00\x00\x00\x7f\xff\xff\xff"))
	f.Fuzz(func(_ *testing.T, input []byte) {
		near, far := memPipe()
		c := http2.NewServerConn(far, http2.Config{})
		_, _ = io.WriteString(near, xhttp2.ClientPreface+settings)
		_, _ = near.Write(input)
		near.out.mu.Lock()
		near.out.closed = true
		near.out.mu.Unlock()
		_ = c.Serve(func() func(*http2.ServerStream) { return echo })
	})
}

// FuzzClient feeds a client's connection whatever an upstream could answer to two requests.
func FuzzClient(f *testing.F) {
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	for _, m := range []*message{
		frames(enc, &buf, getAnswer, `{"hello":"you"}`, nil), frames(enc, &buf, callAnswer, smallMessage, callEnd), frames(enc, &buf, []string{":status", "103"}, "", nil),
	} {
		var b bytes.Buffer
		_ = m.to(&b, 1)
		_ = m.to(&b, 3)
		f.Add(b.Bytes())
	}
	f.Add([]byte("\x00\x00\x08\x07\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, input []byte) {
		near, far := memPipe()
		c := http2.NewClientConn(far, http2.Config{})
		done := make(chan struct{})
		go func() { _ = c.Run(); close(done) }()
		var streams []*http2.ClientStream
		for range 2 {
			if st := c.Open(); st != nil {
				q := asked(t, getText)
				_ = st.Begin(q, nil)
				_ = st.SendBody(&q.Body)
				streams = append(streams, st)
			}
		}
		_, _ = io.WriteString(near, settings)
		_, _ = near.Write(input)
		near.out.mu.Lock()
		near.out.closed = true
		near.out.cond.Broadcast()
		near.out.mu.Unlock()
		for _, st := range streams {
			for p, err := st.ReadResponse(); err == nil; p, err = st.ReadResponse() {
				for err == nil {
					_, err = p.Body.Next()
				}
				if p.Status >= 200 {
					break
				}
			}
			_ = st.Close()
			st.Free()
		}
		<-done
	})
}

// FuzzDowngrade turns any head that is accepted into HTTP/1.1 and has another parser read it: it must be one request, with
// the same method, target and host, and every field under its name.
func FuzzDowngrade(f *testing.F) {
	f.Add("GET", "/", "cart", "x", "y", "z", "w")
	f.Add("POST", "/a?b=c", "cart:80", "x-a", "1\r\nx: y", "cookie", "a=b")
	f.Add("PUT", "/a b", "[::1]:80", "transfer-encoding", "chunked", "content-length", "0")
	f.Add("OPTIONS", "*", "", "host", "cart", "te", "trailers")
	f.Fuzz(func(t *testing.T, method, path, authority, n1, v1, n2, v2 string) {
		var buf bytes.Buffer
		enc := hpack.NewEncoder(&buf)
		head := []string{":method", method, ":scheme", "http", ":path", path}
		if authority != "" {
			head = append(head, ":authority", authority)
		}
		m := frames(enc, &buf, append(head, n1, v1, n2, v2), "", nil)
		if len(m.bytes) > 16384 {
			return
		}
		near, far := memPipe()
		c := http2.NewServerConn(far, http2.Config{})
		_, _ = io.WriteString(near, xhttp2.ClientPreface+settings)
		_ = m.to(near, 1)
		near.out.mu.Lock()
		near.out.closed = true
		near.out.mu.Unlock()
		_ = c.Serve(func() func(*http2.ServerStream) {
			return func(st *http2.ServerStream) {
				q, err := st.Request()
				if err != nil {
					return
				}
				app, up := memPipe()
				if err := http1.NewClientConn(up, http1.Config{}).WriteRequest(q, nil); err != nil {
					t.Errorf("%q cannot be written: %v", m.bytes, err)
					return
				}
				up.Close()
				oneRequest(t, app, q)
			}
		})
	})
}

func oneRequest(t *testing.T, app io.Reader, q *http1.Request) {
	text, _ := io.ReadAll(app)
	r := bufio.NewReader(bytes.NewReader(text))
	got, err := http.ReadRequest(r)
	if err != nil {
		if strings.Contains(err.Error(), "malformed Host header") || strings.Contains(err.Error(), "invalid URL") {
			return // it is stricter
		}
		t.Errorf("%q is no request: %v", text, err)
		return
	}
	if _, err := r.ReadByte(); err != io.EOF {
		t.Errorf("%q is more than one request", text)
	}
	if got.Method != q.Method || got.RequestURI != q.Target || got.Host != q.Authority {
		t.Errorf("%q is %s %s of %s, want %s %s of %s", text, got.Method, got.RequestURI, got.Host, q.Method, q.Target, q.Authority)
	}
	for name, value := range q.All() {
		switch name {
		case "host", "content-length", "te":
		default:
			if values := got.Header.Values(name); !strings.Contains(strings.Join(values, "\n"), value) {
				t.Errorf("%q: field %s is %q, want %q among them", text, name, values, value)
			}
		}
	}
}
