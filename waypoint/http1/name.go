package http1

import "strings"

// name is a field name that the engine, or hop-by-hop and forwarding rules, know; other stands for all the rest.
type name uint8

const (
	other name = iota
	nameHost
	nameContentLength
	nameTransferEncoding
	nameConnection
	nameKeepAlive
	nameProxyConnection
	nameTE
	nameTrailer
	nameUpgrade
	nameHTTP2Settings
	nameExpect
	nameDate
	nameAuthorization
	nameCookie
	nameSetCookie
	nameContentType
	nameCacheControl
	nameRequestID
	nameForwardedFor
	nameForwardedProto
	nameTraceparent
	nameUserAgent
	nameAccept
	nameServer
	names
)

var spellings = [names]string{
	nameHost: "host", nameContentLength: "content-length", nameTransferEncoding: "transfer-encoding", nameConnection: "connection",
	nameKeepAlive: "keep-alive", nameProxyConnection: "proxy-connection", nameTE: "te", nameTrailer: "trailer", nameUpgrade: "upgrade",
	nameHTTP2Settings: "http2-settings", nameExpect: "expect", nameDate: "date", nameAuthorization: "authorization", nameCookie: "cookie",
	nameSetCookie: "set-cookie", nameContentType: "content-type", nameCacheControl: "cache-control", nameRequestID: "x-request-id",
	nameForwardedFor: "x-forwarded-for", nameForwardedProto: "x-forwarded-proto", nameTraceparent: "traceparent", nameUserAgent: "user-agent",
	nameAccept: "accept", nameServer: "server",
}

// byLength lists the known names of each length: most unknown names are told by their length alone.
var byLength = func() (t [18][]name) {
	for n := other + 1; n < names; n++ {
		t[len(spellings[n])] = append(t[len(spellings[n])], n)
	}
	return t
}()

func nameOf[T string | []byte](s T) name {
	if len(s) >= len(byLength) {
		return other
	}
	for _, n := range byLength[len(s)] {
		if fold(s, spellings[n]) {
			return n
		}
	}
	return other
}

// fold reports whether s is lower but for the case of ASCII letters.
func fold[T string | []byte](s T, lower string) bool {
	if len(s) != len(lower) {
		return false
	}
	for i := 0; i < len(lower); i++ {
		if toLower(s[i]) != lower[i] {
			return false
		}
	}
	return true
}

// same reports whether two names are equal but for case.
func same(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := 0; i < len(a); i++ {
		if toLower(a[i]) != toLower(b[i]) {
			return false
		}
	}
	return true
}

func foldPrefix(s, lower string) bool { return len(s) >= len(lower) && fold(s[:len(lower)], lower) }

func toLower(c byte) byte {
	if c-'A' < 26 {
		return c | 0x20
	}
	return c
}

// hop reports whether a field of this name speaks to the next hop only and is never passed on (RFC 9110, 7.6.1).
// Content-Length and Transfer-Encoding are, too, written anew.
func (n name) hop() bool {
	switch n {
	case nameConnection, nameKeepAlive, nameProxyConnection, nameTE, nameUpgrade, nameHTTP2Settings, nameContentLength, nameTransferEncoding:
		return true
	default:
		return false
	}
}

// forAll reports whether a field is meant for all recipients, so that naming it in Connection does not remove it: a
// client must not be able to take away what says who it is or where it came from (RFC 9110, 7.6.1: such an option must
// not be sent).
func forAll(n name, s string) bool {
	if n != other {
		return !n.hop()
	}
	for _, p := range [...]string{"x-forwarded-", "x-envoy-", "x-b3-", "x-istio-", "x-ext-authz", "content-", "sec-", "if-", "access-control-", "grpc-"} {
		if foldPrefix(s, p) {
			return true
		}
	}
	for _, p := range [...]string{
		"forwarded", "via", "b3", "baggage", "tracestate", "origin", "referer", "proxy-authorization", "x-real-ip", "range",
		"vary", "etag", "location", "expires", "last-modified", "pragma", "age", "www-authenticate", "strict-transport-security",
	} {
		if fold(s, p) {
			return true
		}
	}
	return false
}

// noTrailer reports whether a field makes no sense, or harm, behind the body: framing, routing, authentication, how to
// read the content, and what proxies vouch for (RFC 9110, 6.5.1). Nor do those that an application reads as such, which takes "_" for
// "-" (RFC 3875, 4.1.18).
func noTrailer(n name, s string) bool {
	if strings.IndexByte(s, '_') >= 0 {
		s = strings.ReplaceAll(s, "_", "-")
		n = nameOf(s)
	}
	switch n {
	case other:
	case nameDate, nameServer, nameRequestID, nameTraceparent:
		return n == nameRequestID
	default:
		return true
	}
	for _, p := range [...]string{"x-forwarded-", "x-envoy-", "x-istio-", "content-encoding", "content-range", "content-location", "proxy-", "if-", "access-control-", "sec-"} {
		if foldPrefix(s, p) {
			return true
		}
	}
	for _, p := range [...]string{
		"forwarded", "via", "max-forwards", "pragma", "range", "age", "expires", "location", "retry-after", "vary", "warning",
		"www-authenticate", "origin", "x-real-ip", "strict-transport-security", "clear-site-data",
	} {
		if fold(s, p) {
			return true
		}
	}
	return false
}

// Classes of bytes.
const (
	inToken  = 1 << iota // RFC 9110, 5.6.2
	inValue              // field-vchar, space and tab: RFC 9110, 5.5
	inTarget             // printable ASCII but '#': what clients send goes further than RFC 3986 and is told apart by nobody
	inHost               // unreserved of RFC 3986
	isHex
)

var class = func() (t [256]uint8) {
	for c := range 256 {
		b := byte(c)
		letter, digit := toLower(b)-'a' < 26, b-'0' < 10
		if letter || digit || within(b, "!#$%&'*+-.^_`|~") {
			t[c] |= inToken
		}
		if b == '\t' || b >= ' ' && b != 0x7f {
			t[c] |= inValue
		}
		if b > ' ' && b < 0x7f && b != '#' {
			t[c] |= inTarget
		}
		if letter || digit || within(b, "-._~") {
			t[c] |= inHost
		}
		if digit || toLower(b)-'a' < 6 {
			t[c] |= isHex
		}
	}
	return t
}()

func within(c byte, set string) bool {
	for i := 0; i < len(set); i++ {
		if set[i] == c {
			return true
		}
	}
	return false
}

// all reports whether every byte of s is of the class.
func all[T string | []byte](s T, is uint8) bool {
	for i := 0; i < len(s); i++ {
		if class[s[i]]&is == 0 {
			return false
		}
	}
	return true
}
