package load

import (
	"bytes"
	"fmt"
	"io"
	"net"
)

// serveHTTP serves a connection that began with the byte first: HTTP/2 when it began with the preface, else HTTP/1.1.
func serveHTTP(c net.Conn, first byte) error {
	in := h1Reader{conn: c, buf: make([]byte, 2*maxHeadBytes), w: 1}
	in.buf[0] = first
	for in.w < len("PRI") {
		n, err := c.Read(in.buf[in.w:])
		if in.w += n; n == 0 {
			return err
		}
	}
	if bytes.HasPrefix(in.buf[:in.w], []byte("PRI")) {
		return serveH2(c, in.buf[:in.w])
	}
	answer := h1Answer(AnswerBytes)
	echo, size := []byte(nil), 0
	for {
		_, n, err := in.head()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		body := answer
		if n > 0 {
			if n != size {
				echo, size = h1Answer(n), n
			}
			body = echo
			if err := in.skip(n); err != nil {
				return err
			}
		}
		if _, err := c.Write(body); err != nil {
			return err
		}
	}
}

// h1Answer is a response with a body of n bytes. Its date is a constant: what is measured does not look at it.
func h1Answer(n int) []byte {
	head := fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nDate: Sun, 22 Nov 2026 12:00:00 GMT\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n", n)
	return append(head, pattern(n)...)
}
