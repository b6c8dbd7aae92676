package nexthop

import (
	"net/netip"
	"strconv"
	"strings"
)

// authority is what a CONNECT request asks for: an address, or a host when addr is invalid, and a port that is not 0.
type authority struct {
	addr netip.Addr
	host string // lower case, without the root's dot; "" when addr is set
	port uint16
}

// parseAuthority reads IPv4:port, [IPv6]:port or hostname:port (RFC 9110, 7.2 and 9.3.6: CONNECT has no default port).
// It is stricter than a URI: no user, no zone, no IPv4 inside IPv6, no leading zeros, nothing to guess.
func parseAuthority(s string) (authority, bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return authority{}, false
	}
	port, ok := parsePort(s[i+1:])
	if !ok {
		return authority{}, false
	}
	host := s[:i]
	if strings.HasPrefix(host, "[") {
		if !strings.HasSuffix(host, "]") {
			return authority{}, false
		}
		a, err := netip.ParseAddr(host[1 : len(host)-1])
		if err != nil || !a.Is6() || a.Is4In6() || a.Zone() != "" {
			return authority{}, false
		}
		return authority{addr: a, port: port}, true
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return authority{addr: a, port: port}, a.Is4()
	}
	host, ok = parseHostname(host)
	return authority{host: host, port: port}, ok
}

func parsePort(s string) (uint16, bool) {
	if s == "" || s[0] < '1' || s[0] > '9' {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil
}

// parseHostname accepts what names a service: labels of letters, digits, - and _, at most 253 octets (RFC 1123, 2.1).
// The last label is not a number: that would be an address written badly.
func parseHostname(s string) (string, bool) {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > 253 {
		return "", false
	}
	last := ""
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 {
			return "", false
		}
		for _, c := range []byte(label) {
			if !isHostnameByte(c) {
				return "", false
			}
		}
		last = label
	}
	return strings.ToLower(s), strings.Trim(last, "0123456789") != ""
}

func isHostnameByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_'
}

// quote shortens and escapes what a peer sent, for an error message.
func quote(s string) string {
	const most = 128
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strconv.Quote(s)
}
