package waypoint

import (
	"fmt"
	"strings"
)

// normalization is how much of the many ways to write a path counts as one (meshConfig.pathNormalization).
type normalization uint8

const (
	normalizeBase   normalization = iota // BASE, DEFAULT: escapes, dots and backslashes
	normalizeNone                        // NONE: nothing
	normalizeMerge                       // MERGE_SLASHES: BASE, and slashes in a row are one
	normalizeDecode                      // DECODE_AND_MERGE_SLASHES: the same, and escaped slashes are slashes
)

func parseNormalization(s string) (normalization, error) {
	switch s {
	case "", "DEFAULT", "BASE":
		return normalizeBase, nil
	case "NONE":
		return normalizeNone, nil
	case "MERGE_SLASHES":
		return normalizeMerge, nil
	case "DECODE_AND_MERGE_SLASHES":
		return normalizeDecode, nil
	}
	return 0, fmt.Errorf("%q: want NONE, BASE, MERGE_SLASHES or DECODE_AND_MERGE_SLASHES", s)
}

// normalize is a path as policies and routes see it, and as it goes on: backslashes are slashes, escaped unreserved
// characters are not escaped (RFC 3986, 6.2.2.2), dot segments are gone (RFC 3986, 5.2.4), and what else was asked for.
// Without it /public/../admin would be another path here than at the application.
func (n normalization) normalize(path string) string {
	if n == normalizeNone || !strings.HasPrefix(path, "/") || isNormal(path) && (n == normalizeBase || !strings.Contains(path, "//")) {
		return path
	}
	path = removeDots(n.plain(path))
	if n == normalizeMerge || n == normalizeDecode {
		for strings.Contains(path, "//") {
			path = strings.ReplaceAll(path, "//", "/")
		}
	}
	return path
}

// refuses reports whether a path has an escaped NUL, as which nothing can be normalised: text ends there, to some.
func (n normalization) refuses(path string) bool {
	return n != normalizeNone && strings.Contains(path, "%00")
}

// plain is a path without needless escapes and backslashes.
func (n normalization) plain(path string) string {
	b := make([]byte, 0, len(path))
	for i := 0; i < len(path); i++ {
		c := path[i]
		if c == '%' && i+2 < len(path) {
			d, ok := unescaped(path[i+1], path[i+2])
			if ok && (unreserved(d) || n == normalizeDecode && (d == '/' || d == '\\')) {
				c, i = d, i+2
			}
		}
		if c == '\\' {
			c = '/'
		}
		b = append(b, c)
	}
	return string(b)
}

// climbs reports whether a path that a rule has rewritten leads elsewhere than it says: /static../x is an innocent path, until the prefix
// /static becomes /files/.
func (n normalization) climbs(path string) bool {
	if n == normalizeNone || !strings.HasPrefix(path, "/") || isNormal(path) {
		return false
	}
	path = n.plain(path)
	return removeDots(path) != path
}

// isNormal reports whether a path certainly is what BASE makes of it.
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
