package hbone

import (
	"strconv"
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Requests and answers are encoded by hand, as literals without indexing (RFC 7541, 6.2.2): the few fields they have
// differ from stream to stream, so the dynamic table would only cost both sides work. What never differs is encoded
// once, here.
const (
	// :method (static index 2) CONNECT, then the name :authority (static index 1).
	connectPrefix = "\x02\x07CONNECT" + "\x01"
	// :status 200 is static index 8.
	status200 = "\x88"
)

func appendString(b []byte, s string) []byte {
	b = appendInt(b, 7, len(s))
	return append(b, s...)
}

// appendInt is RFC 7541, 5.1 with the high bits of the first byte zero.
func appendInt(b []byte, bits uint, n int) []byte {
	limit := 1<<bits - 1
	if n < limit {
		return append(b, byte(n))
	}
	b = append(b, byte(limit))
	for n -= limit; n >= 128; n >>= 7 {
		b = append(b, byte(n)|128)
	}
	return append(b, byte(n))
}

func appendField(b []byte, name, value string) []byte {
	b = append(b, 0)
	b = appendString(b, name)
	return appendString(b, value)
}

func appendConnect(b []byte, authority string, h *Header) []byte {
	b = append(b, connectPrefix...)
	b = appendString(b, authority)
	for _, f := range [...]struct{ name, value string }{
		{"baggage", h.Baggage},
		{"forwarded", h.Forwarded},
		{"traceparent", h.Traceparent},
		{"x-forwarded-network", h.ForwardedNetwork},
	} {
		if f.value != "" {
			b = appendField(b, f.name, f.value)
		}
	}
	return b
}

func appendStatus(b []byte, status int, baggage string) []byte {
	if status == 200 {
		b = append(b, status200...)
	} else {
		b = append(b, 0x08) // literal without indexing, name :status (static index 8)
		b = appendString(b, strconv.Itoa(status))
	}
	if baggage != "" {
		b = appendField(b, "baggage", baggage)
	}
	return b
}

// message is a decoded header block: a request, an answer, or trailers.
type message struct {
	method, authority, scheme, path, protocol, status string
	header                                            Header

	size      int  // as RFC 9113, 6.5.2 counts
	oversize  bool // size exceeds the limit
	regular   bool // a field that is not a pseudo-header was seen
	malformed string
}

// headerDecoder assembles and decodes header blocks within limits.
type headerDecoder struct {
	hp    *hpack.Decoder
	limit int
	msg   *message
}

func newHeaderDecoder(limit int) *headerDecoder {
	d := &headerDecoder{limit: limit}
	d.hp = hpack.NewDecoder(4096, d.emit)
	d.hp.SetMaxStringLength(2 * limit)
	return d
}

// decode reads one whole header block. Every block must be decoded, wanted or not: the compression state is shared.
func (d *headerDecoder) decode(block []byte) (*message, error) {
	d.msg = &message{}
	if _, err := d.hp.Write(block); err != nil {
		return nil, &connError{http2.ErrCodeCompression, err.Error()}
	}
	if err := d.hp.Close(); err != nil {
		return nil, &connError{http2.ErrCodeCompression, err.Error()}
	}
	return d.msg, nil
}

func (d *headerDecoder) emit(f hpack.HeaderField) {
	m := d.msg
	m.size += int(f.Size())
	if m.size > d.limit {
		m.oversize = true
		return
	}
	if strings.HasPrefix(f.Name, ":") {
		m.pseudo(f)
		return
	}
	m.regular = true
	if f.Name == "" || strings.ContainsFunc(f.Name, badNameRune) || strings.ContainsAny(f.Value, "\r\n\x00") {
		m.fault("bad field name or value")
		return
	}
	switch f.Name {
	case "baggage":
		m.header.Baggage = joinList(m.header.Baggage, f.Value)
	case "forwarded":
		m.header.Forwarded = joinList(m.header.Forwarded, f.Value)
	case "traceparent":
		m.header.Traceparent = f.Value
	case "x-forwarded-network":
		m.header.ForwardedNetwork = f.Value
	case "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade":
		m.fault("connection-specific field") // RFC 9113, 8.2.2
	}
}

func (m *message) pseudo(f hpack.HeaderField) {
	var p *string
	switch f.Name {
	case ":method":
		p = &m.method
	case ":authority":
		p = &m.authority
	case ":scheme":
		p = &m.scheme
	case ":path":
		p = &m.path
	case ":protocol":
		p = &m.protocol
	case ":status":
		p = &m.status
	default:
		m.fault("unknown pseudo-header")
		return
	}
	if m.regular {
		m.fault("pseudo-header after a regular field") // RFC 9113, 8.3
	}
	if *p != "" {
		m.fault("pseudo-header repeated")
	}
	if strings.ContainsFunc(f.Value, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		m.fault("bad character in pseudo-header")
	}
	*p = f.Value
}

func (m *message) fault(reason string) {
	if m.malformed == "" {
		m.malformed = reason
	}
}

// joinList combines repeated list fields (RFC 9110, 5.3).
func joinList(a, b string) string {
	if a == "" {
		return b
	}
	return a + "," + b
}

func badNameRune(r rune) bool {
	return r <= ' ' || r >= 0x7f || r == ':' || 'A' <= r && r <= 'Z' // RFC 9113, 8.2.1
}
