package accesslog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// ParseJSON reads a format that is a JSON object: its strings are texts with operators, at any depth, and what else it has is
// written as it stands. A string that is one operator and nothing else becomes what the operator's value is: a number, a string, or
// null when it is not set.
func ParseJSON(format string) (*Format, error) {
	if len(format) > maxFormat {
		return nil, fmt.Errorf("%d bytes, want no more than %d", len(format), maxFormat)
	}
	p := parser{f: new(Format)}
	d := json.NewDecoder(strings.NewReader(format))
	d.UseNumber()
	first, err := d.Token()
	if err != nil {
		return nil, fmt.Errorf("no JSON object: %w", err)
	}
	if first != json.Delim('{') {
		return nil, fmt.Errorf("no JSON object: it begins with %v", first)
	}
	if err := p.value(d, first, 0); err != nil {
		return nil, err
	}
	if rest := strings.TrimSpace(format[d.InputOffset():]); rest != "" {
		return nil, fmt.Errorf("something follows the JSON object: %.20s", rest)
	}
	p.literal("\n")
	return p.end()
}

// value reads the value that begins with t.
func (p *parser) value(d *json.Decoder, t json.Token, depth int) error {
	open, ok := t.(json.Delim)
	if !ok {
		if s, ok := t.(string); ok {
			p.text(s)
			return nil
		}
		b, err := json.Marshal(t)
		p.literal(string(b))
		return err
	}
	if depth == maxDepth {
		return fmt.Errorf("JSON is nested more than %d times", maxDepth)
	}
	p.literal(open.String())
	for first := true; ; first = false {
		t, err := d.Token()
		if err != nil {
			return fmt.Errorf("malformed JSON: %w", err)
		}
		if end, ok := t.(json.Delim); ok && (end == '}' || end == ']') {
			p.literal(end.String())
			return nil
		}
		if !first {
			p.literal(",")
		}
		if open == '{' {
			name, _ := t.(string) // Token has looked
			p.literal(`"` + escape(name) + `":`)
			if t, err = d.Token(); err != nil {
				return fmt.Errorf("malformed JSON: %w", err)
			}
		}
		if err := p.value(d, t, depth+1); err != nil {
			return err
		}
	}
}

// text reads a string of JSON.
func (p *parser) text(s string) {
	if len(s) > 1 && s[0] == '%' {
		if c, rest, ok := cutOperator(s[1:]); ok && rest == "" {
			p.operator(c, AsJSON)
			return
		}
	}
	p.literal(`"`)
	p.template(s, InString)
	p.literal(`"`)
}

// escape is a text as it stands in a string of JSON.
func escape(s string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	_ = e.Encode(s) // a string can be
	return string(bytes.TrimSuffix(bytes.TrimSuffix(b.Bytes()[1:], []byte("\n")), []byte(`"`)))
}
