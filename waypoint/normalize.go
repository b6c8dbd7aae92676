package waypoint

import "strings"

// normalize is a path as policies and routes see it, and as it goes on: backslashes are slashes, escaped unreserved
// characters are not escaped (RFC 3986, 6.2.2.2), and dot segments are gone (RFC 3986, 5.2.4). Without it /public/../admin
// would be another path here than at the application.
func normalize(path string) string {
	if !strings.HasPrefix(path, "/") || isNormal(path) {
		return path
	}
	b := make([]byte, 0, len(path))
	for i := 0; i < len(path); i++ {
		c := path[i]
		switch {
		case c == '\\':
			c = '/'
		case c == '%' && i+2 < len(path):
			if d, ok := unescaped(path[i+1], path[i+2]); ok && unreserved(d) {
				c, i = d, i+2
			}
		}
		b = append(b, c)
	}
	return removeDots(string(b))
}

// isNormal reports whether a path certainly is what normalize makes of it.
func isNormal(path string) bool {
	for i := range len(path) {
		switch path[i] {
		case '\\', '%':
			return false
		case '.':
			if path[i-1] == '/' { // path begins with a slash
				return false
			}
		}
	}
	return true
}

// removeDots resolves "." and ".." segments; what would climb above the root stays there.
func removeDots(path string) string {
	out := make([]byte, 0, len(path))
	for rest := path; rest != ""; {
		end := strings.IndexByte(rest[1:], '/') + 1 // rest begins with a slash
		if end == 0 {
			end = len(rest)
		}
		segment, last := rest[:end], end == len(rest)
		rest = rest[end:]
		switch segment {
		case "/.":
		case "/..":
			out = out[:max(strings.LastIndexByte(string(out), '/'), 0)]
		default:
			out = append(out, segment...)
			continue
		}
		if last {
			out = append(out, '/')
		}
	}
	return string(out)
}

func unescaped(hi, lo byte) (byte, bool) {
	h, ok1 := hexDigit(hi)
	l, ok2 := hexDigit(lo)
	return h<<4 | l, ok1 && ok2
}

func hexDigit(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// unreserved characters mean the same escaped or not (RFC 3986, 2.3).
func unreserved(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~", c) >= 0
}
