package http1

import (
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"time"
)

// writer is a connection's outbound half. What is appended leaves with the next flush, in one write.
type writer struct {
	conn     net.Conn
	tcp      *sender // nil: not needed yet
	as       role    // of what is written
	buf      []byte  // what waits to be written, on a borrowed slab; nil while nothing is borrowed
	timeout  time.Duration
	deadline time.Time
	err      error // sticky
	date     Date

	vec     [2][]byte
	buffers net.Buffers
}

// bulk is from where on a piece is not copied behind what waits, and direct from where on it is written from its place
// when nothing waits: below, a copy costs less than a write.
const (
	bulkBytes   = 16 << 10
	directBytes = 2 << 10
)

// need makes place for n more bytes, by a larger slab or by writing what waits. Nothing is written to make place for
// what fits in a large slab beside it.
func (w *writer) need(n int) error {
	if cap(w.buf)-len(w.buf) >= n {
		return nil
	}
	if w.buf != nil && len(w.buf)+n > largeBytes {
		if err := w.flush(); err != nil {
			return err
		}
		if cap(w.buf) >= n {
			return nil
		}
	}
	next := borrow(len(w.buf) + n)[:len(w.buf)]
	copy(next, w.buf)
	giveBack(w.buf)
	w.buf = next
	return nil
}

// raw writes a piece as it is.
func (w *writer) raw(p []byte) error {
	switch {
	case len(w.buf) == 0 && len(p) >= directBytes:
		return w.write(p)
	case len(w.buf)+len(p) > largeBytes || len(p) >= bulkBytes && w.gathers():
		return w.gather(p)
	}
	if err := w.need(len(p)); err != nil {
		return err
	}
	w.buf = append(w.buf, p...)
	return nil
}

// aroundChunk is what surrounds a chunk: the size and two line ends.
const aroundChunk = 8 + 2 + 2

// chunk writes a piece as one chunk or, of a large piece, several.
func (w *writer) chunk(p []byte) error {
	for len(p) > 0 {
		part := p[:min(len(p), largeBytes-aroundChunk)]
		if err := w.need(len(part) + aroundChunk); err != nil {
			return err
		}
		w.buf = strconv.AppendUint(w.buf, uint64(len(part)), 16)
		w.buf = append(w.buf, '\r', '\n')
		w.buf = append(w.buf, part...)
		w.buf = append(w.buf, '\r', '\n')
		p = p[len(part):]
	}
	return nil
}

// lastChunk ends a chunked body.
func (w *writer) lastChunk(trailers *Fields) error {
	if err := w.need(5 + len(trailers.text)); err != nil {
		return err
	}
	w.buf = append(w.buf, '0', '\r', '\n')
	if trailers.Len() > 0 {
		for n, v := range trailers.All() {
			w.buf = appendField(w.buf, n, v)
		}
	}
	w.buf = append(w.buf, '\r', '\n')
	return nil
}

// body copies a body to its end and flushes. Whatever waits here is flushed before the body waits for more.
func (w *writer) body(b *Body, as framing) error {
	b.Ahead(w)
	defer b.Ahead(nil)
	for b.kind != bodyNone {
		p, err := b.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if as == bodyChunked {
			err = w.chunk(p)
		} else {
			err = w.raw(p)
		}
		if err != nil {
			return err
		}
	}
	if as == bodyChunked {
		if err := w.lastChunk(b.Passed()); err != nil {
			return err
		}
	}
	return w.flush()
}

// gathers reports whether the connection writes two buffers with one system call.
func (w *writer) gathers() bool {
	_, ok := w.conn.(*net.TCPConn)
	return ok
}

// gather writes what waits and a piece behind it.
func (w *writer) gather(p []byte) error {
	if !w.gathers() {
		if err := w.flush(); err != nil {
			return err
		}
		return w.write(p)
	}
	if w.err != nil {
		return w.err
	}
	w.vec = [2][]byte{w.buf, p}
	w.buffers = w.vec[:]
	for {
		w.arm()
		n, err := w.buffers.WriteTo(w.conn) // takes what it wrote out of buffers
		if n == 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			w.vec = [2][]byte{}
			w.buf = w.buf[:0]
			return w.check(err)
		}
	}
}

// Flush is flush, for a body that is about to wait.
func (w *writer) Flush() error { return w.flush() }

// flush writes what waits.
func (w *writer) flush() error {
	if len(w.buf) == 0 {
		return w.err
	}
	err := w.write(w.buf)
	w.buf = w.buf[:0]
	return err
}

func (w *writer) write(p []byte) error {
	if w.err != nil {
		return w.err
	}
	for {
		w.arm()
		n, err := w.send(p)
		if p = p[n:]; n == 0 || len(p) == 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return w.check(err)
		}
		// The peer is slow, but reads. A connection that cannot go on after a timeout (TLS) says so next.
	}
}

// arm gives each write at least half the time, and sets the deadline only when less is left.
func (w *writer) arm() {
	if w.timeout <= 0 {
		return
	}
	if now := time.Now(); w.deadline.Sub(now) < w.timeout/2 {
		w.deadline = now.Add(w.timeout)
		_ = w.conn.SetWriteDeadline(w.deadline) // the write tells
	}
}

func (w *writer) check(err error) error {
	if err == nil {
		return nil
	}
	reason := ClientClosed
	if w.as == ofRequest {
		reason = UpstreamClosed
		if errors.Is(err, os.ErrDeadlineExceeded) {
			reason = UpstreamTimeout
		}
	}
	w.err = fail(reason, err)
	return w.err
}

// rest gives the slab back; what was not flushed is forgotten.
func (w *writer) rest() {
	giveBack(w.buf)
	w.buf = nil
}

const crlf = "\r\n"

// appendFraming appends the fields that say how the body ends.
func appendFraming(dst []byte, kind framing, size int64) []byte {
	switch kind {
	case bodyLength:
		dst = append(dst, "Content-Length: "...)
		dst = strconv.AppendInt(dst, size, 10)
		dst = append(dst, crlf...)
	case bodyChunked:
		dst = append(dst, "Transfer-Encoding: chunked\r\n"...)
	case bodyNone, bodyToClose:
	}
	return dst
}

// requestHead appends the head of a request as its next hop is to see it, edited.
func (w *writer) requestHead(q *Request, e *Edits) error {
	if err := e.failed(); err != nil {
		return err
	}
	size, host, target := len(q.text)+len(q.Upgrade)+192, q.Authority, ""
	if e != nil {
		size += e.size
		if e.host != "" {
			host = e.host
		}
		target = e.target
	}
	if err := w.need(size); err != nil {
		return err
	}
	b := append(w.buf, q.Method...)
	b = append(b, ' ')
	switch {
	case q.Method == "CONNECT":
		b = append(b, host...)
	case target != "":
		b = append(b, target...)
	default:
		b = append(b, q.Path...)
		if q.Query {
			b = append(b, '?')
			b = append(b, q.RawQuery...)
		}
	}
	b = append(b, " HTTP/1.1\r\n"...)
	b = appendField(b, "Host", host)
	b = e.fields(b, &q.Fields)
	kind, length := q.Body.framing()
	b = appendFraming(b, kind, length)
	if kind == bodyNone && q.Upgrade == "" && meansBody(q.Method) {
		b = append(b, "Content-Length: 0\r\n"...) // or some applications answer 411 (RFC 9110, 8.6)
	}
	switch {
	case q.Upgrade != "":
		b = append(b, "Connection: Upgrade\r\n"...)
		b = appendField(b, "Upgrade", q.Upgrade)
	case q.trailers:
		b = append(b, "Connection: TE\r\nTE: trailers\r\n"...) // RFC 9110, 10.1.4
	}
	w.buf = append(b, crlf...)
	return nil
}

// meansBody reports whether a body means something in a request of that method.
func meansBody(method string) bool { return method == "POST" || method == "PUT" || method == "PATCH" }

// responseHead appends the head of a response as the client is to see it, edited, and returns how its body ends.
func (w *writer) responseHead(p *Response, q *Request, e *Edits, last bool) (framing, error) {
	if err := e.failed(); err != nil {
		return bodyNone, err
	}
	size := len(p.text) + 192
	if e != nil {
		size += e.size
	}
	if err := w.need(size); err != nil {
		return bodyNone, err
	}
	b := appendStatus(w.buf, p.Status, p.Phrase)
	b = e.fields(b, &p.Fields)
	kind, length := p.Body.framing()
	switch {
	case p.Status < 200:
	case p.Tunnel:
	case p.Status == 204:
	case kind == bodyNone: // to HEAD, and 304: what it would have been
		switch {
		case p.kind == bodyLength, p.kind == bodyChunked && !q.HTTP10:
			b = appendFraming(b, p.kind, p.size)
		}
	case kind == bodyLength:
		b = appendFraming(b, kind, length)
	case q.HTTP10:
		kind = bodyToClose
	default:
		kind = bodyChunked
		b = appendFraming(b, kind, 0)
	}
	switch {
	case p.Status == 101:
		b = append(b, "Connection: Upgrade\r\n"...)
		b = appendField(b, "Upgrade", q.Upgrade)
	case p.Status < 200 || p.Tunnel:
	case last:
		b = append(b, "Connection: close\r\n"...)
	}
	if p.Status >= 200 && !e.has(&p.Fields, nameDate) {
		b = w.appendDate(b) // RFC 9110, 6.6.1
	}
	w.buf = append(b, crlf...)
	return kind, nil
}

func appendStatus(b []byte, status int, phrase string) []byte {
	b = append(b, "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(b, ' ')
	b = append(b, phrase...)
	return append(b, crlf...)
}

func (w *writer) appendDate(b []byte) []byte {
	return append(w.date.Append(append(b, "Date: "...)), crlf...)
}
