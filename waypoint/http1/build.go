package http1

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
)

// Builder puts together heads that did not come as lines of text, for an engine of another version of HTTP: Begin, then
// Field for each field, then End. What it makes is what the same head in HTTP/1.1 would have been read as, and is refused
// where that would have been. The zero value is ready; the memory is reused. Not safe for concurrent use.
type Builder struct {
	text    []byte
	cookie  []byte // crumbs, joined (RFC 9113, 8.2.3)
	f       *Fields
	lim     limits
	trailer bool
	err     error
}

func (b *Builder) begin(f *Fields, lim limits, trailer bool) {
	b.f, b.lim, b.trailer, b.err = f, lim, trailer, nil
	b.text, b.cookie = b.text[:0], b.cookie[:0]
	f.reset()
}

// BeginRequest begins a request's head with what its first line says.
func (b *Builder) BeginRequest(q *Request, method, target, authority []byte) {
	*q = Request{Fields: q.Fields, Body: Body{trailers: q.Body.trailers}}
	b.begin(&q.Fields, limits{maxHeadBytes, maxFields}, false)
	b.text = append(b.text, method...)
	b.text = append(b.text, ' ')
	b.text = append(b.text, target...)
	b.text = append(b.text, " HTTP/1.1"...)
	b.f.start = len(b.text)
	b.text = append(b.text, crlf...)
	if len(authority) > 0 {
		b.Field(hostName, authority)
	}
}

var hostName = []byte("host")

// BeginResponse begins a response's head.
func (b *Builder) BeginResponse(p *Response, status int) {
	*p = Response{Fields: p.Fields, Body: Body{trailers: p.Body.trailers}, Status: status, Phrase: http.StatusText(status)}
	b.begin(&p.Fields, limits{maxHeadBytes, maxFields}, false)
}

// BeginTrailers begins the fields behind a body. Those that do not belong there are left out.
func (b *Builder) BeginTrailers(f *Fields) {
	b.begin(f, limits{maxTrailerBytes, maxTrailerFields}, true)
}

// Field adds a field. What is wrong with it, End tells.
func (b *Builder) Field(name, value []byte) {
	if b.err != nil {
		return
	}
	if string(name) == "cookie" {
		if len(b.cookie)+len(value) > maxHeadBytes {
			b.err = errTooLarge
			return
		}
		if len(b.cookie) > 0 {
			b.cookie = append(b.cookie, "; "...)
		}
		b.cookie = append(b.cookie, value...)
		return
	}
	b.put(name, value)
}

func (b *Builder) put(name, value []byte) {
	if !all(name, inToken) { // else a colon in it would end it
		b.err = errName
		return
	}
	pos := len(b.text)
	if pos+len(name)+len(value)+2*len(crlf)+len(crlf) > b.lim.bytes {
		b.err = errTooLarge
		return
	}
	b.text = append(b.text, name...)
	b.text = append(b.text, ':', ' ')
	b.text = append(b.text, value...)
	if len(name) == 0 {
		b.err = errName
	} else if err := b.f.add(b.text[pos:], len(name), pos, b.lim.fields, b.trailer); err != nil {
		b.err = err
	}
	b.text = append(b.text, crlf...)
}

// end completes the fields.
func (b *Builder) end() error {
	if len(b.cookie) > 0 && b.err == nil {
		b.put([]byte("cookie"), b.cookie)
	}
	if b.err != nil {
		b.f.reset()
		return b.err
	}
	b.text = append(b.text, crlf...)
	if string(b.text) != b.f.text { // compared in place
		b.f.text = string(b.text)
	}
	return nil
}

// EndRequest completes a request. Its body comes from src, unless over says that there is none.
func (b *Builder) EndRequest(q *Request, src Source, over bool) error {
	if err := b.end(); err != nil {
		return blameBuilt(err)
	}
	if err := q.line(q.text[:q.start], false); err != nil {
		return err
	}
	if q.Target[0] != '/' && q.Target != "*" && q.Method != "CONNECT" {
		return fail(BadTarget, errTarget)
	}
	if err := q.host(); err != nil {
		return err
	}
	return q.frameFrom(src, over)
}

func blameBuilt(err error) *Error {
	if errors.Is(err, errTooLarge) || errors.Is(err, errManyFields) {
		return fail(HeadTooLarge, err)
	}
	return fail(BadField, err)
}

// frameFrom is frame for a body of another origin.
func (q *Request) frameFrom(src Source, over bool) error {
	kind, size, err := q.framed(false)
	switch {
	case err != nil:
		return fail(BadFraming, err)
	case kind == bodyChunked, over && size > 0:
		return failf(BadFraming, "a length that the body cannot have")
	case kind == bodyNone && !over:
		kind = bodyChunked
	}
	if !over && q.Method == "TRACE" {
		return fail(BadFraming, errNoContent)
	}
	q.trailers = q.trailersWanted()
	if n := q.count[nameExpect]; n > 0 {
		v, _ := q.known(nameExpect)
		if n > 1 || !fold(v, "100-continue") {
			return fail(BadExpect, nil)
		}
		q.Continue = !over
	}
	q.Body.from(src, ofRequest, kind, size, q.count[nameTrailer] > 0, over)
	return nil
}

// EndTunnel completes a request that asks for a tunnel: of that protocol (RFC 8441), in the form that Upgrade has in HTTP/1.1,
// or with "" a plain CONNECT. What follows it is not a body, and its length cannot be known.
func (b *Builder) EndTunnel(q *Request, src Source, protocol string) error {
	if err := b.EndRequest(q, src, true); err != nil {
		return err
	}
	if _, sized := q.Declared(); sized || q.Continue || q.count[nameExpect] > 0 {
		return fail(BadFraming, errNoContent)
	}
	if protocol != "" && !Upgradable(protocol) {
		return fail(UnknownProtocol, fmt.Errorf("protocol %q", protocol))
	}
	q.Upgrade = protocol
	return nil
}

// EndResponse completes a response to a request of that method. What follows 2xx to CONNECT is a tunnel; else its body comes from src, unless over says that there is none.
func (b *Builder) EndResponse(p *Response, method string, src Source, over bool) error {
	if err := b.end(); err != nil {
		return fail(UpstreamBroken, err)
	}
	kind, size, err := p.framed(false)
	p.Tunnel = method == "CONNECT" && p.Status/100 == 2
	none := p.Status < 200 || p.Status == 204 || p.Status == 304 || method == "HEAD" || p.Tunnel
	switch {
	case p.Tunnel: // a length would mean nothing (RFC 9110, 9.3.6)
		kind, size = bodyNone, 0
	case err != nil:
		return fail(UpstreamBroken, err)
	case p.Status < 100 || p.Status > 999 || p.Status == 101:
		return failf(UpstreamBroken, "status %s", strconv.Itoa(p.Status))
	case kind == bodyChunked, over && size > 0 && !none:
		return failf(UpstreamBroken, "a length that the body cannot have")
	}
	p.kind, p.size = kind, size
	switch {
	case none:
		kind, size = bodyNone, 0
	case kind == bodyNone && over:
		kind = bodyLength
	case kind == bodyNone:
		kind = bodyChunked
	}
	p.Body.from(src, ofResponse, kind, size, p.count[nameTrailer] > 0, over)
	return nil
}

// EndTrailers completes trailers.
func (b *Builder) EndTrailers() error { return b.end() }
