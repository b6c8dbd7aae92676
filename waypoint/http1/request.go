package http1

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"strings"
)

// Request is one parsed request. Its strings stay valid for ever; it, its fields and its body until the connection's
// next request is read.
type Request struct {
	Fields

	Method    string // as sent: methods are case-sensitive
	Target    string // as sent
	Scheme    string // of an absolute-form target, in lower case; else ""
	Authority string // host[:port]: the target's if it has one, else the Host field's
	Path      string // "*" in asterisk-form, "" in authority-form
	RawQuery  string // behind the first "?"
	Query     bool   // there is a "?"
	HTTP10    bool
	Upgrade   string // the one protocol the client wants to switch to, if it can be passed on; of HTTP/2: that of an extended CONNECT
	Continue  bool   // the client waits for 100 Continue before it sends the body
	Body      Body

	close    bool // the client sends no other
	trailers bool // the client reads trailers
}

var (
	errThreeParts = errors.New("not method, target and version, one space between")
	errMethod     = errors.New("the method is no token")
	errVersion    = errors.New("not HTTP/1.1")
	errNoHost     = errors.New("not exactly one Host")
	errHost       = errors.New("no host[:port]")
	errTarget     = errors.New("a target in a form its method has not, or with bytes it may not have")
	errFragment   = errors.New("a target with a fragment")
	errEscape     = errors.New("a malformed percent escape in the path")
	errNoContent  = errors.New("a method that has no content, with content")
	errOptions    = errors.New("a malformed Connection field")
	errPreface    = errors.New("the connection preface of HTTP/2")
)

const prefaceLine = "PRI * HTTP/2.0" // RFC 9113, 3.4

// read parses the head that in has next. The request body is ready to be read afterwards.
func (q *Request) read(in *reader, cfg *Config) error {
	*q = Request{Fields: q.Fields, Body: Body{trailers: q.Body.trailers}}
	if err := in.readHead(&q.Fields, limits{cfg.HeadBytes, cfg.Fields}, requestSection); err != nil {
		return blameHead(err, in)
	}
	if err := q.line(q.text[:q.start], cfg.HTTP10); err != nil {
		if err.Reason == Preface {
			in.r -= len(q.text) // still there: a head is consumed in one piece, at its end
		}
		return err
	}
	if err := q.host(); err != nil {
		return err
	}
	return q.frame(in)
}

// blameHead says what a failure to read a request head means.
func blameHead(err error, in *reader) *Error {
	switch {
	case errors.Is(err, errTooLarge), errors.Is(err, errManyFields):
		return fail(HeadTooLarge, err)
	case errors.Is(err, errBareLF), errors.Is(err, errFold), errors.Is(err, errName), errors.Is(err, errValue):
		return fail(BadField, err)
	case errors.Is(err, errControl):
		return fail(BadRequestLine, err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fail(HeadTimeout, err)
	case err == io.EOF && len(in.buffered()) > 0:
		return fail(ClientClosed, io.ErrUnexpectedEOF)
	}
	return fail(ClientClosed, err)
}

// line reads the request line (RFC 9112, 3).
func (q *Request) line(line string, http10 bool) *Error {
	if line == prefaceLine {
		return fail(Preface, errPreface)
	}
	method, rest, ok := strings.Cut(line, " ")
	target, version, ok2 := strings.Cut(rest, " ")
	if !ok || !ok2 || target == "" {
		return fail(BadRequestLine, errThreeParts)
	}
	if method == "" || !all(method, inToken) {
		return fail(BadRequestLine, errMethod)
	}
	switch version {
	case "HTTP/1.1":
	case "HTTP/1.0":
		if q.HTTP10 = true; !http10 {
			return fail(OldVersion, errVersion)
		}
	default:
		if len(version) == len("HTTP/1.1") && version[:5] == "HTTP/" && version[5]-'0' < 10 && version[6] == '.' && version[7]-'0' < 10 {
			return fail(BadVersion, errVersion)
		}
		return fail(BadRequestLine, errVersion)
	}
	q.Method, q.Target = method, target
	return q.target()
}

// target reads the request target in the form its method allows (RFC 9112, 3.2).
func (q *Request) target() *Error {
	t := q.Target
	if !all(t, inTarget) {
		if strings.IndexByte(t, '#') >= 0 {
			return fail(BadTarget, errFragment)
		}
		return fail(BadTarget, errTarget)
	}
	switch {
	case q.Method == "CONNECT":
		host, port, ok := splitHost(t)
		if !ok || host == "" || port == "" {
			return fail(BadTarget, errTarget)
		}
		q.Authority = t
		return nil
	case t[0] == '/':
		return q.path(t)
	case t == "*":
		if q.Method != "OPTIONS" {
			return fail(BadTarget, errTarget)
		}
		q.Path = t
		return nil
	}
	var rest string
	switch {
	case foldPrefix(t, "http://"):
		q.Scheme, rest = "http", t[len("http://"):]
	case foldPrefix(t, "https://"):
		q.Scheme, rest = "https", t[len("https://"):]
	default:
		return fail(BadTarget, errTarget)
	}
	end := strings.IndexAny(rest, "/?")
	if end < 0 {
		end = len(rest)
	}
	if _, _, ok := splitHost(rest[:end]); !ok {
		return fail(BadTarget, errHost)
	}
	q.Authority = rest[:end]
	switch rest = rest[end:]; {
	case rest == "" && q.Method == "OPTIONS":
		q.Path = "*" // RFC 9112, 3.2.4
		return nil
	case rest == "" || rest[0] == '?':
		q.Path = "/"
		q.RawQuery, q.Query = strings.CutPrefix(rest, "?")
		return nil
	}
	return q.path(rest)
}

func (q *Request) path(s string) *Error {
	q.Path, q.RawQuery, q.Query = strings.Cut(s, "?")
	if !escaped(q.Path) {
		return fail(BadTarget, errEscape)
	}
	return nil
}

// escaped reports whether every "%" is followed by two hexadecimal digits.
func escaped(s string) bool {
	for i := strings.IndexByte(s, '%'); i >= 0 && i < len(s); i++ {
		if s[i] == '%' && (i+2 >= len(s) || class[s[i+1]]&class[s[i+2]]&isHex == 0) {
			return false
		}
	}
	return true
}

// host checks the Host field, which must be there even when the target's authority overrides it (RFC 9112, 3.2).
func (q *Request) host() *Error {
	n := q.count[nameHost]
	if n > 1 || n == 0 && !q.HTTP10 {
		return fail(BadHost, errNoHost)
	}
	if n == 0 {
		return nil
	}
	v, _ := q.known(nameHost)
	if _, _, ok := splitHost(v); !ok {
		return fail(BadHost, errHost)
	}
	if q.Authority == "" {
		q.Authority = v
	}
	return nil
}

// splitHost checks and splits host[:port]. A host is a name of unreserved characters, an IPv4 address or an IPv6
// address in brackets; user information, escapes and zones have no place in it.
func splitHost(s string) (host, port string, ok bool) {
	if s == "" {
		return "", "", false
	}
	if s[0] == '[' {
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return "", "", false
		}
		ip, err := netip.ParseAddr(s[1:end])
		if err != nil || !ip.Is6() || ip.Zone() != "" {
			return "", "", false
		}
		host, s = s[:end+1], s[end+1:]
	} else {
		end := 0
		for end < len(s) && class[s[end]]&inHost != 0 {
			end++
		}
		host, s = s[:end], s[end:]
	}
	if host == "" {
		return "", "", false
	}
	if s == "" {
		return host, "", true
	}
	n, digits := decimal(s[1:])
	if s[0] != ':' || len(s) > 6 || !digits || n > 65535 {
		return "", "", false
	}
	return host, s[1:], true
}

// frame reads what the fields say of the body and the connection.
func (q *Request) frame(in *reader) error {
	kind, size, err := q.framed(q.HTTP10)
	if err != nil {
		if err == errCodings {
			return fail(UnknownCoding, err)
		}
		return fail(BadFraming, err)
	}
	if kind != bodyNone && (q.Method == "CONNECT" || q.Method == "TRACE") {
		return fail(BadFraming, errNoContent) // RFC 9110, 9.3.6 and 9.3.8
	}
	o, err := q.connection()
	if err != nil {
		return fail(BadField, errOptions)
	}
	q.close = o.close || q.HTTP10
	q.trailers = q.trailersWanted()
	if n := q.count[nameExpect]; n > 0 && !q.HTTP10 {
		v, _ := q.known(nameExpect)
		if n > 1 || !fold(v, "100-continue") {
			return fail(BadExpect, nil)
		}
		q.Continue = kind == bodyChunked || size > 0
	}
	if up, ok := q.known(nameUpgrade); ok && o.upgrade && !q.HTTP10 && q.count[nameUpgrade] == 1 && (kind == bodyNone || kind == bodyLength && size == 0) &&
		Upgradable(up) {
		q.Upgrade = up
	}
	q.Body.begin(in, ofRequest, kind, size)
	return nil
}

// Upgradable reports whether a protocol can be switched to by passing bytes on: one name[/version], and not HTTP/2,
// whose requests nobody would look at.
func Upgradable(protocol string) bool {
	name, version, slash := strings.Cut(protocol, "/")
	if name == "" || !all(name, inToken) || slash && (version == "" || !all(version, inToken)) {
		return false
	}
	return !fold(name, "h2c") && !fold(name, "h2") && !foldPrefix(name, "http") && !fold(name, "tls")
}
