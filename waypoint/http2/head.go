package http2

import (
	"bytes"
	"time"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/waypoint/http1"
)

func (c *conn) headersFrame(h frameHeader, p []byte) error {
	p, err := unpad(h, p)
	if err != nil {
		return err
	}
	if h.flags.Has(http2.FlagHeadersPriority) {
		if len(p) < 5 {
			return connErrorf(http2.ErrCodeFrameSize, "HEADERS too short for its priority")
		}
		if on := parseFrameHeader(append(make([]byte, 5, 9), p[:4]...)).stream; on == h.stream {
			return connErrorf(http2.ErrCodeProtocol, "stream %d depends on itself", on)
		}
		p = p[5:]
	}
	if h.flags.Has(http2.FlagHeadersEndHeaders) {
		return c.headerBlock(h, p)
	}
	c.blockHeader = h
	c.continuations = 1
	c.block = append(c.block[:0], p...)
	_ = c.raw.SetReadDeadline(time.Now().Add(c.cfg.HeadTimeout))
	return nil
}

func (c *conn) continuationFrame(h frameHeader, p []byte) error {
	if c.continuations == 0 {
		return connErrorf(http2.ErrCodeProtocol, "CONTINUATION without HEADERS")
	}
	c.continuations++
	if c.continuations > maxContinuations || len(c.block)+len(p) > maxBlockBytes {
		return errCalm // decoding it all only to refuse it would be the peer's gain
	}
	c.block = append(c.block, p...)
	if !h.flags.Has(http2.FlagContinuationEndHeaders) {
		return nil
	}
	block := c.block
	c.block, c.continuations = nil, 0
	_ = c.raw.SetReadDeadline(time.Time{})
	return c.headerBlock(c.blockHeader, block)
}

// headerBlock handles a complete header block.
func (c *conn) headerBlock(h frameHeader, block []byte) error {
	if c.server != nil {
		return c.server.headerBlock(h, block)
	}
	return c.responseBlock(h, block)
}

// discard decodes a block that nobody wants, for the table's sake.
func (c *conn) discard(block []byte) error {
	c.sink.begin(ofNothing, nil, nil, nil)
	return c.dec.decode(block, &c.sink)
}

// trailersOf decodes a block into a stream's trailers and ends the stream.
func (c *conn) trailersOf(s *stream, h frameHeader, block []byte) error {
	why, err := c.decodeTrailers(block)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.streams[h.stream] != s: // it was given up meanwhile, and may be another by now
	case s.tunnel:
		return s.malformedLocked("fields inside of a tunnel") // RFC 9113, 8.5
	case s.gotEnd:
		return s.provokedLocked(http2.ErrCodeStreamClosed)
	case !h.flags.Has(http2.FlagHeadersEndStream):
		return s.malformedLocked("trailers that are not the end")
	case why != "":
		return s.malformedLocked(why)
	case s.in.declared >= 0 && s.in.got != s.in.declared:
		return s.malformedLocked("a body of another length than declared")
	default:
		s.trailers, c.trailers = c.trailers, s.trailers
		s.gotEndLocked()
	}
	return nil
}

// kind is of which head a block is.
type kind uint8

const (
	ofNothing kind = iota
	ofRequest
	ofResponse
	ofTrailers
)

// headSink judges the fields of a block (RFC 9113, 8.2 and 8.3) and makes a head of them.
type headSink struct {
	b    http1.Builder
	kind kind
	q    *http1.Request
	p    *http1.Response

	method, scheme, authority, path, status, protocol []byte // of this block; their memory is kept
	has                                               pseudo
	begun                                             bool // the first regular field came
	size                                              int
	over                                              bool   // too large
	bad                                               string // what is malformed
}

// pseudo is a set of pseudo-header fields.
type pseudo uint8

const (
	hasMethod pseudo = 1 << iota
	hasScheme
	hasAuthority
	hasPath
	hasStatus
	hasProtocol
)

func (s *headSink) begin(k kind, q *http1.Request, p *http1.Response, f *http1.Fields) {
	s.kind, s.q, s.p = k, q, p
	s.has, s.begun, s.size, s.over, s.bad = 0, false, 0, false, ""
	if k == ofTrailers {
		s.begun = true
		s.b.BeginTrailers(f)
	}
}

func (s *headSink) fault(why string) {
	if s.bad == "" {
		s.bad = why
	}
}

func (s *headSink) field(name, value []byte) {
	if s.kind == ofNothing {
		if len(name) > 0 && name[0] == ':' {
			s.has = hasMethod // it is no trailer
		}
		return
	}
	s.size += len(name) + len(value) + entryOverhead
	if s.over = s.over || s.size > maxHeadList; s.over || s.bad != "" {
		return
	}
	if len(name) > 0 && name[0] == ':' {
		s.pseudo(name, value)
		return
	}
	if !fieldName(name) {
		s.fault("a field name that is no token in lower case")
		return
	}
	if n := len(value); n > 0 && (blank(value[0]) || blank(value[n-1])) {
		s.fault("a field value with white space around it")
		return
	}
	if !s.begun {
		s.first()
	}
	switch string(name) {
	case "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade": // RFC 9113, 8.2.2
		s.fault("a connection-specific field")
		return
	case "te":
		if string(value) != "trailers" {
			s.fault("a TE other than trailers")
			return
		}
	case "host":
		if s.kind == ofRequest && s.has&hasAuthority != 0 {
			if !bytes.EqualFold(value, s.authority) { // RFC 9113, 8.3.1
				s.fault("a Host that disagrees with :authority")
			}
			return
		}
	}
	s.b.Field(name, value)
}

func (s *headSink) pseudo(name, value []byte) {
	var to *[]byte
	var bit pseudo
	switch string(name) {
	case ":method":
		to, bit = &s.method, hasMethod
	case ":scheme":
		to, bit = &s.scheme, hasScheme
	case ":authority":
		to, bit = &s.authority, hasAuthority
	case ":path":
		to, bit = &s.path, hasPath
	case ":status":
		to, bit = &s.status, hasStatus
	case ":protocol":
		to, bit = &s.protocol, hasProtocol
	}
	switch {
	case bit == 0 || (bit == hasStatus) != (s.kind == ofResponse) || s.kind == ofTrailers:
		s.fault("a pseudo-header field that does not belong here")
	case s.begun:
		s.fault("a pseudo-header field behind a regular one")
	case s.has&bit != 0:
		s.fault("a pseudo-header field twice")
	default:
		s.has |= bit
		*to = append((*to)[:0], value...)
	}
}

// first begins the head: all pseudo-header fields are there.
func (s *headSink) first() {
	s.begun = true
	switch s.kind {
	case ofRequest:
		if string(s.method) == "CONNECT" {
			s.connect()
			return
		}
		if s.has|hasAuthority != hasMethod|hasScheme|hasPath|hasAuthority || len(s.method) == 0 || len(s.path) == 0 || len(s.scheme) == 0 {
			s.fault("pseudo-header fields are missing")
			s.b.BeginRequest(s.q, nil, nil, nil)
			return
		}
		var authority []byte
		if s.has&hasAuthority != 0 {
			authority = s.authority
			if len(authority) == 0 {
				s.fault("an empty :authority")
			}
		}
		s.b.BeginRequest(s.q, s.method, s.path, authority)
	case ofResponse:
		n := 0
		for _, c := range s.status {
			if c-'0' > 9 {
				n = 0
				break
			}
			n = n*10 + int(c-'0')
		}
		if len(s.status) != 3 || n < 100 {
			s.fault("no status")
			n = 0
		}
		s.b.BeginResponse(s.p, n)
	case ofNothing, ofTrailers:
	}
}

// connect begins the head of a CONNECT: of a plain one (RFC 9113, 8.5), or of an extended one (RFC 8441, 4), which is told as
// HTTP/1.1 would have told it.
func (s *headSink) connect() {
	const plain, extended = hasMethod | hasAuthority, hasMethod | hasScheme | hasPath | hasAuthority | hasProtocol
	switch {
	case s.has == extended && len(s.path) > 0 && len(s.scheme) > 0 && len(s.authority) > 0 && len(s.protocol) > 0:
		s.b.BeginRequest(s.q, methodGET, s.path, s.authority)
	case s.has == plain && len(s.authority) > 0:
		s.b.BeginRequest(s.q, s.method, s.authority, s.authority)
	default:
		s.fault("a CONNECT with pseudo-header fields missing, or too many")
		s.b.BeginRequest(s.q, nil, nil, nil)
	}
}

var methodGET = []byte("GET")

// tunnel reports whether what follows the request is not its body.
func (s *headSink) tunnel() bool { return string(s.method) == "CONNECT" && s.has&hasMethod != 0 }

// request completes a request. A malformed one is reset rather than answered.
func (s *headSink) request(src http1.Source, over bool) error {
	if !s.begun {
		s.first()
	}
	switch {
	case s.over:
		return http1.Fail(http1.HeadTooLarge, connErrorf(http2.ErrCodeEnhanceYourCalm, "a header list of more than %d bytes", maxHeadList))
	case s.bad != "":
		return http1.Fail(http1.BadField, connErrorf(http2.ErrCodeProtocol, "%s", s.bad))
	}
	if s.tunnel() {
		protocol := ""
		if s.has&hasProtocol != 0 {
			protocol = string(s.protocol)
		}
		if err := s.b.EndTunnel(s.q, src, protocol); err != nil {
			return err
		}
	} else if err := s.b.EndRequest(s.q, src, over); err != nil {
		return err
	}
	if string(s.scheme) == "https" {
		s.q.Scheme = "https"
	}
	return nil
}

// response completes a response to a request of that method.
func (s *headSink) response(method string, src http1.Source, over bool) error {
	if !s.begun {
		s.first()
	}
	switch {
	case s.over:
		return http1.Fail(http1.UpstreamBroken, connErrorf(http2.ErrCodeEnhanceYourCalm, "a header list of more than %d bytes", maxHeadList))
	case s.bad != "":
		return http1.Fail(http1.UpstreamBroken, connErrorf(http2.ErrCodeProtocol, "%s", s.bad))
	}
	return s.b.EndResponse(s.p, method, src, over)
}

func blank(c byte) bool { return c == ' ' || c == '\t' }

// fieldName reports whether a name is a token without capital letters (RFC 9113, 8.2.1).
func fieldName(name []byte) bool {
	for _, c := range name {
		if !inName[c] {
			return false
		}
	}
	return len(name) > 0
}

// inName are the bytes that a name may have.
var inName = func() (t [256]bool) {
	for c := range t {
		t[c] = c > ' ' && c < 0x7f && byte(c)-'A' >= 26 && bytes.IndexByte([]byte(`"(),/:;<=>?@[\]{}`), byte(c)) < 0
	}
	return t
}()
