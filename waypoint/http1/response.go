package http1

import (
	"errors"
	"io"
	"os"
)

// Response is one parsed response head with its body. Its strings stay valid for ever; it, its fields and its body until
// the connection's next response is read.
type Response struct {
	Fields

	Status int
	Phrase string // as sent; means nothing
	HTTP10 bool
	Tunnel bool // the connection carries another protocol from here: 101, or 2xx to CONNECT
	Body   Body

	close bool // the connection carries no other
	size  int64
	kind  framing // as the fields say; a response to HEAD says what it does not have
}

var (
	errStatusLine = errors.New("a malformed status line")
	errSwitch     = errors.New("a protocol switch nobody asked for")
)

// read parses the head that in has next: of a response to a request of that method that asked for that upgrade.
func (p *Response) read(in *reader, cfg *Config, method, upgrade string) error {
	*p = Response{Fields: p.Fields, Body: Body{trailers: p.Body.trailers}}
	if err := in.readHead(&p.Fields, limits{cfg.HeadBytes, cfg.Fields}, responseSection); err != nil {
		return blameResponse(err, in)
	}
	if !p.line(p.text[:p.start]) {
		return fail(UpstreamBroken, errStatusLine)
	}
	kind, size, err := p.framed(p.HTTP10)
	if err != nil {
		return fail(UpstreamBroken, err)
	}
	o, err := p.connection()
	if err != nil {
		return fail(UpstreamBroken, errOptions)
	}
	p.close = o.close || p.HTTP10
	if kind == bodyNone {
		kind = bodyToClose
	}
	p.kind, p.size = kind, size
	switch {
	case p.Status == 101:
		v, _ := p.Value("upgrade")
		if upgrade == "" || !o.upgrade || !same(v, upgrade) {
			return fail(UpstreamBroken, errSwitch)
		}
		p.Tunnel, kind = true, bodyNone
	case method == "CONNECT" && p.Status/100 == 2:
		p.Tunnel, kind = true, bodyNone
	case p.Status < 200, p.Status == 204, p.Status == 304, method == "HEAD": // RFC 9112, 6.3
		kind = bodyNone
	}
	p.close = p.close || kind == bodyToClose
	p.Body.begin(in, ofResponse, kind, size)
	return nil
}

// line reads the status line (RFC 9112, 4); the space before an absent phrase may be absent, too.
func (p *Response) line(s string) bool {
	const status = len("HTTP/1.1 ")
	if len(s) < status+3 || s[:7] != "HTTP/1." || s[7] != '0' && s[7] != '1' || s[8] != ' ' {
		return false
	}
	n, ok := decimal(s[status : status+3])
	if !ok || n < 100 || len(s) > status+3 && s[status+3] != ' ' {
		return false
	}
	p.Status, p.HTTP10 = int(n), s[7] == '0'
	if len(s) > status+4 {
		p.Phrase = s[status+4:]
	}
	return true
}

// blameResponse says what a failure to read a response head means.
func blameResponse(err error, in *reader) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	switch {
	case malformed(err):
		return fail(UpstreamBroken, err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fail(UpstreamTimeout, err)
	case len(in.buffered()) > 0:
		return fail(UpstreamCut, unexpected(err))
	case err == io.EOF:
		return fail(UpstreamClosed, io.ErrUnexpectedEOF)
	}
	return fail(UpstreamClosed, err)
}
