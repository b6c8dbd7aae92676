// Package accesslog reads the formats that people write in Envoy's language: those of access logs (meshConfig.accessLogFormat), text
// with command operators, or a JSON object whose strings have them; and those of headers that a rule sets. It finds every fault when
// a format is read, so that nothing can fail when a line is written.
//
// It hides the language. It does not know what an operator's value is, nor how it is escaped: who writes lines does.
package accesslog

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Format is a format that was read: what to write, part by part.
type Format struct {
	Parts   []Part
	Headers []Header // that parts refer to
	Never   []string // operators that have no value here, and are always written as not set
}

// Part is a piece of a line.
type Part struct {
	Op    Operator
	Place Place
	Text  string // of Literal
	Most  int    // bytes of the value; 0: all
	time  []verb // of StartTime and EmitTime
	At    int    // of FromHeader: the index in Headers
	Style string // how a value is written: of GRPCStatus one of the Styles, of ResponseCodeDetails "" or not without blanks
}

// Place is where the value of a part stands.
type Place uint8

// The places.
const (
	InText   Place = iota // of a text format; "-" when it is not set
	InString              // within a string of JSON; "-" when it is not set
	AsJSON                // alone as a value of JSON: null when it is not set
	InHeader              // in the value of a header; nothing when it is not set
)

// Header is a field of a head: of X, or else of Or, if that is not "". Names are in lower case; in a request, those of HTTP/2's
// pseudo-headers are :method, :path, :authority and :scheme.
type Header struct {
	Of           Section
	Name, Or     string
	WithoutQuery bool // what follows "?" is left out
}

// Pick is what h asks for, out of what value says of a header by its name: "" when there is none.
func (h *Header) Pick(value func(name string) string) string {
	v := value(h.Name)
	if v == "" && h.Or != "" {
		v = value(h.Or)
	}
	if h.WithoutQuery {
		v, _, _ = strings.Cut(v, "?")
	}
	return v
}

// Section is what has headers.
type Section uint8

// The sections.
const (
	Request Section = iota
	Response
	Trailer // of the response
)

// Bounds of a format: a line must have an end.
const (
	maxFormat = 16 << 10 // bytes
	maxParts  = 100      // operators
	maxDepth  = 16       // of a JSON object
	maxHeader = 4 << 10  // bytes of the value of a header
)

// ParseText reads a format of text. A line end is added where there is none at its end.
func ParseText(format string) (*Format, error) {
	p := parser{f: new(Format)}
	if len(format) > maxFormat {
		return nil, fmt.Errorf("%d bytes, want no more than %d", len(format), maxFormat)
	}
	p.template(strings.TrimSuffix(format, "\n"), InText)
	p.literal("\n")
	return p.end()
}

// ParseHeader reads the value of a header that a rule sets or adds.
func ParseHeader(format string) (*Format, error) {
	p := parser{f: new(Format)}
	if len(format) > maxHeader {
		return nil, fmt.Errorf("%d bytes, want no more than %d", len(format), maxHeader)
	}
	p.template(format, InHeader)
	return p.end()
}

type parser struct {
	f      *Format
	faults []error
	count  int // operators
}

func (p *parser) end() (*Format, error) {
	if p.count > maxParts {
		p.fault("%d operators, want no more than %d", p.count, maxParts)
	}
	if err := errors.Join(p.faults...); err != nil {
		return nil, err
	}
	slices.Sort(p.f.Never)
	p.f.Never = slices.Compact(p.f.Never)
	return p.f, nil
}

func (p *parser) fault(format string, args ...any) {
	if len(p.faults) < 10 {
		p.faults = append(p.faults, fmt.Errorf(format, args...))
	}
}

func (p *parser) literal(s string) {
	if n := len(p.f.Parts); n > 0 && p.f.Parts[n-1].Op == Literal {
		p.f.Parts[n-1].Text += s
	} else if s != "" {
		p.f.Parts = append(p.f.Parts, Part{Op: Literal, Text: s})
	}
}

// template reads text with operators.
func (p *parser) template(s string, place Place) {
	for s != "" {
		plain, rest, found := strings.Cut(s, "%")
		if place == InText || place == InHeader {
			p.literal(plain)
		} else {
			p.literal(escape(plain))
		}
		if !found {
			return
		}
		if after, ok := strings.CutPrefix(rest, "%"); ok { // "%%"
			p.literal("%")
			s = after
			continue
		}
		op, after, ok := cutOperator(rest)
		if !ok {
			p.fault("%.40q begins no operator; a percent sign is written %%%%", "%"+rest)
			return
		}
		p.operator(op, place)
		s = after
	}
}

// command is an operator as it is written: %name(args):most%.
type command struct {
	name, args string
	hasArgs    bool
	most       int
}

// cutOperator reads an operator behind its first percent sign. Its arguments end at the first parenthesis that an end of an
// operator follows: those of START_TIME have percent signs themselves.
func cutOperator(s string) (c command, rest string, ok bool) {
	n := 0
	for n < len(s) && (s[n] >= 'A' && s[n] <= 'Z' || s[n] >= '0' && s[n] <= '9' || s[n] == '_') {
		n++
	}
	if c.name, rest = s[:n], s[n:]; n == 0 {
		return c, "", false
	}
	if rest == "" || rest[0] != '(' {
		rest, ok = c.close(rest)
		return c, rest, ok
	}
	c.hasArgs = true
	for i := 1; i < len(rest); i++ {
		if rest[i] != ')' {
			continue
		}
		if after, ok := c.close(rest[i+1:]); ok {
			c.args = rest[1:i]
			return c, after, true
		}
	}
	return c, "", false
}

// close reads the end of an operator: a length, if there is one, and a percent sign.
func (c *command) close(s string) (rest string, ok bool) {
	if s == "" {
		return "", false
	}
	if s[0] == ':' {
		digits, rest, found := strings.Cut(s[1:], "%")
		n, err := strconv.ParseUint(digits, 10, 16)
		if !found || err != nil || n == 0 {
			return "", false
		}
		c.most = int(n)
		return rest, true
	}
	return strings.CutPrefix(s, "%")
}

// operator adds an operator.
func (p *parser) operator(c command, place Place) {
	p.count++
	o, ok := operators[c.name]
	if !ok {
		p.fault("%%%s%% is no operator that is known", c.name)
		return
	}
	part := Part{Op: o.op, Place: place, Most: c.most}
	if c.most > 0 && !o.cut {
		p.fault("%%%s%% takes no length", c.name)
		return
	}
	switch {
	case o.op == Never:
		p.f.Never = append(p.f.Never, c.name)
	case o.op == FromHeader:
		p.header(&part, c, o.of)
		return
	case o.op == StartTime, o.op == EmitTime:
		var err error
		if part.time, err = parseTime(c.args); err != nil {
			p.fault("%%%s(%s)%%: %w", c.name, c.args, err)
			return
		}
	case c.hasArgs && !slices.Contains(o.args, c.args):
		p.fault("%%%s(%s)%%: want %s", c.name, c.args, strings.Join(append([]string{"nothing in parentheses"}, o.args...), " or "))
		return
	}
	if part.Style = c.args; o.op == GRPCStatus && c.args == "" {
		part.Style = o.args[0]
	}
	p.f.Parts = append(p.f.Parts, part)
}

// header adds the value of a header: NAME, or NAME?OR.
func (p *parser) header(part *Part, c command, of Section) {
	h := Header{Of: of, WithoutQuery: c.name == withoutQuery}
	h.Name, h.Or, _ = strings.Cut(strings.ToLower(c.args), "?")
	for _, name := range []string{h.Name, h.Or} {
		if name == "" && name == h.Or && h.Name != "" {
			continue
		}
		if !isHeader(name, of) {
			p.fault("%%%s(%s)%%: %q is no name of a header there", c.name, c.args, name)
			return
		}
	}
	if h.Name == ":status" {
		part.Op, part.Most = ResponseCode, 0
		p.f.Parts = append(p.f.Parts, *part)
		return
	}
	if part.At = slices.Index(p.f.Headers, h); part.At < 0 {
		part.At = len(p.f.Headers)
		p.f.Headers = append(p.f.Headers, h)
	}
	p.f.Parts = append(p.f.Parts, *part)
}

// isHeader reports whether a name is one of a field (RFC 9110, 5.1), or of a pseudo-header (RFC 9113, 8.3) of that section.
func isHeader(name string, of Section) bool {
	switch name {
	case "":
		return false
	case ":method", ":path", ":authority", ":scheme":
		return of == Request
	case ":status":
		return of == Response
	}
	return !strings.ContainsFunc(name, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || strings.ContainsRune("!#$%&'*+-.^_`|~", r))
	})
}

// Printable is a text as a header can hold it: what is not printable ASCII is a blank.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return ' '
		}
		return r
	}, s)
}
