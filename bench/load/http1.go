package load

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"
)

// maxHeadBytes is the longest head of a request or response of ours.
const maxHeadBytes = 8 << 10

var headEnd = []byte("\r\n\r\n")

// h1Client makes the same HTTP/1.1 request again and again.
type h1Client struct {
	conn    net.Conn
	request []byte
	in      h1Reader
}

func newH1Client(c net.Conn, o Order) *h1Client {
	return &h1Client{conn: c, request: h1Request(o), in: h1Reader{conn: c}}
}

// h1Request is what a browser of few words would send.
func h1Request(o Order) []byte {
	method := "GET"
	if o.Body > 0 {
		method = "POST"
	}
	b := fmt.Appendf(nil, "%s %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench/1.0\r\nAccept: */*\r\n", method, o.Path, o.Host)
	if o.Body > 0 {
		b = fmt.Appendf(b, "Content-Type: application/octet-stream\r\nContent-Length: %d\r\n", o.Body)
	}
	b = append(b, "\r\n"...)
	return append(b, pattern(o.Body)...)
}

// pattern is n bytes of a body.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte('a' + i%26)
	}
	return b
}

func (h *h1Client) speak(end time.Time, got *tally) error {
	for start := time.Now(); start.Before(end); {
		n, err := h.exchange()
		if err != nil {
			return err
		}
		now := time.Now()
		got.took, got.bytes = append(got.took, now.Sub(start)), got.bytes+int64(n)
		start = now
	}
	return nil
}

func (h *h1Client) once() error {
	_, err := h.exchange()
	return err
}

// rest lets go of what a client that waits does not need.
func (h *h1Client) rest() { h.in.buf = nil }

// exchange makes one request and returns the bytes of both bodies.
func (h *h1Client) exchange() (int, error) {
	if _, err := h.conn.Write(h.request); err != nil {
		return 0, err
	}
	head, n, err := h.in.head()
	if err != nil {
		return 0, fmt.Errorf("wait for the response: %w", err)
	}
	if !bytes.HasPrefix(head, []byte("HTTP/1.1 200 ")) {
		return 0, fmt.Errorf("response %q, want 200", head)
	}
	if n < 0 {
		return 0, fmt.Errorf("response without a length: %q", head)
	}
	if err := h.in.skip(n); err != nil {
		return 0, fmt.Errorf("read the response's body: %w", err)
	}
	sent := len(h.request) - bytes.Index(h.request, headEnd) - len(headEnd)
	return sent + n, nil
}

// h1Reader reads messages off a connection.
type h1Reader struct {
	conn io.Reader
	buf  []byte
	r, w int
}

// head reads up to the end of a head and returns it with the length of the body that follows; -1: none is told. The head is valid
// until the next call.
func (in *h1Reader) head() ([]byte, int, error) {
	if in.buf == nil {
		in.buf = make([]byte, 2*maxHeadBytes)
	}
	for {
		if i := bytes.Index(in.buf[in.r:in.w], headEnd); i >= 0 {
			head := in.buf[in.r : in.r+i+2]
			in.r += i + len(headEnd)
			n, err := contentLength(head)
			return head, n, err
		}
		if in.r == in.w {
			in.r, in.w = 0, 0
		}
		if in.w-in.r > maxHeadBytes {
			return nil, 0, errors.New("endless head")
		}
		if in.r > 0 && len(in.buf)-in.w < maxHeadBytes {
			in.w = copy(in.buf, in.buf[in.r:in.w])
			in.r = 0
		}
		n, err := in.conn.Read(in.buf[in.w:])
		if in.w += n; n == 0 && err != nil {
			return nil, 0, err
		}
	}
}

// skip reads n bytes of a body.
func (in *h1Reader) skip(n int) error {
	here := min(n, in.w-in.r)
	in.r += here
	if n -= here; n == 0 {
		return nil
	}
	if cap(in.buf) < min(n, bulkBlockBytes) {
		in.buf = make([]byte, min(n, bulkBlockBytes)) // all of it has been read
	}
	in.buf = in.buf[:cap(in.buf)]
	in.r, in.w = 0, 0
	for n > 0 {
		got, err := in.conn.Read(in.buf[:min(n, len(in.buf))])
		if n -= got; got == 0 && err != nil {
			return err
		}
	}
	return nil
}

// contentLength is what a head says of its body; -1: nothing.
func contentLength(head []byte) (int, error) {
	for line := range bytes.SplitSeq(head, []byte("\r\n")) {
		name, value, ok := bytes.Cut(line, []byte(":"))
		if ok && len(name) == len("content-length") && bytes.EqualFold(name, []byte("content-length")) {
			return strconv.Atoi(string(bytes.TrimSpace(value)))
		}
	}
	return -1, nil
}
