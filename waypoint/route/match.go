package route

import (
	"regexp"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// conditions are a compiled mesh.HTTPMatch: all that are set must hold.
type conditions struct {
	path      path
	scheme    *text
	method    *text
	authority *text
	headers   []field
	without   []field
	query     []field
	labels    []label
	namespace string // of the client; "": any
	clients   string // of the parent; "": any
	port      uint16 // 0: any
	grpc      bool
}

type label struct{ key, value string }

// field is a test on a header or query parameter.
type field struct {
	name   string
	text   text
	joined bool // of a header: see oneValue
}

func (c *conditions) match(r *Request) bool {
	if !c.path.match(r.Path) ||
		c.method != nil && !c.method.match(r.Method) ||
		c.scheme != nil && !c.scheme.match(r.Scheme) ||
		c.authority != nil && !c.authority.match(r.Authority) ||
		c.port != 0 && c.port != r.Port ||
		c.grpc && !r.GRPC ||
		c.namespace != "" && c.namespace != r.SourceNamespace ||
		c.clients != "" && c.clients != r.SourceNamespace {
		return false
	}
	for i := range c.labels {
		if v, ok := r.SourceLabels[c.labels[i].key]; !ok || v != c.labels[i].value {
			return false
		}
	}
	for i := range c.headers {
		if there, matched := r.lines(&c.headers[i]); !there || !matched {
			return false
		}
	}
	for i := range c.without {
		f := &c.without[i]
		// A missing header reads as "" unless presence is asked for: .* excludes even requests without it.
		there, matched := r.lines(f)
		if matched || !there && f.text.kind != mesh.MatchPresence && f.text.match("") {
			return false
		}
	}
	for i := range c.query {
		f := &c.query[i]
		if v, ok := queryParam(r.RawQuery, f.name); !ok || !f.text.match(unescape(v)) && !f.text.match(v) {
			return false
		}
	}
	return true
}

// header is a header or pseudo-header of r.
func (r *Request) header(name string) (string, bool) {
	if name == "host" { // as it goes on, whichever way it came
		return r.Authority, r.Authority != ""
	}
	if name[0] == ':' {
		switch name {
		case ":authority":
			return r.Authority, true
		case ":method":
			return r.Method, true
		case ":path":
			if r.RawQuery != "" {
				return r.Path + "?" + r.RawQuery, true
			}
			return r.Path, true
		case ":scheme":
			return r.Scheme, true
		}
		return "", false
	}
	if r.Header == nil {
		return "", false
	}
	return r.Header.Value(name)
}

// queryParam returns the first value of a parameter, still escaped.
func queryParam(query, name string) (string, bool) {
	for query != "" {
		var pair string
		pair, query, _ = strings.Cut(query, "&")
		key, value, _ := strings.Cut(pair, "=")
		if key == name || unescape(key) == name {
			return value, true
		}
	}
	return "", false
}

// unescape undoes the escaping of a query. What is not a valid escape stays as it is. Only what is escaped is copied.
func unescape(s string) string {
	if strings.IndexByte(s, '%') < 0 && strings.IndexByte(s, '+') < 0 {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '+':
			b = append(b, ' ')
		case s[i] == '%' && i+2 < len(s) && hex(s[i+1]) >= 0 && hex(s[i+2]) >= 0:
			b = append(b, byte(hex(s[i+1])<<4|hex(s[i+2])))
			i += 2
		default:
			b = append(b, s[i])
		}
	}
	return string(b)
}

func hex(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c && c <= 'f':
		return int(c-'a') + 10
	case 'A' <= c && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// path is a compiled mesh.PathMatch.
type path struct {
	kind    mesh.PathKind
	value   string // folded when fold is set; of PathSegment without the last slash
	fold    bool
	re      *regexp.Regexp
	literal string // what every match of re begins with
}

func (p *path) match(s string) bool {
	switch p.kind {
	case mesh.PathAny:
		return true
	case mesh.PathExact:
		return len(s) == len(p.value) && p.begins(s)
	case mesh.PathPrefix:
		return p.begins(s)
	case mesh.PathSegment:
		if !p.begins(s) {
			return false
		}
		if len(s) == len(p.value) {
			return s != ""
		}
		return s[len(p.value)] == '/'
	case mesh.PathRegex:
		return strings.HasPrefix(s, p.literal) && p.re.MatchString(s)
	}
	return false
}

func (p *path) begins(s string) bool {
	if p.fold {
		return hasFoldedPrefix(s, p.value)
	}
	return strings.HasPrefix(s, p.value)
}

// text is a compiled mesh.StringMatch.
type text struct {
	kind  mesh.MatchKind
	value string // folded when fold is set
	fold  bool
	re    *regexp.Regexp
}

func (t *text) match(s string) bool {
	switch t.kind {
	case mesh.MatchExact:
		return len(s) == len(t.value) && t.begins(s)
	case mesh.MatchPrefix:
		return t.begins(s)
	case mesh.MatchSuffix:
		return len(s) >= len(t.value) && t.begins(s[len(s)-len(t.value):])
	case mesh.MatchPresence:
		return true
	case mesh.MatchRegex:
		return t.re.MatchString(s)
	case mesh.MatchNever:
	}
	return false
}

func (t *text) begins(s string) bool {
	if t.fold {
		return hasFoldedPrefix(s, t.value)
	}
	return strings.HasPrefix(s, t.value)
}

// fullMatch compiles a RE2 expression that must match the whole string.
func fullMatch(expr string) (*regexp.Regexp, error) {
	if err := mesh.CheckRegex(expr); err != nil { // so that the fault is the user's own, and a stray ) is one
		return nil, err
	}
	return regexp.Compile(`\A(?:` + expr + `)\z`)
}
