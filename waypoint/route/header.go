package route

import (
	"fmt"
	"strings"

	"github.com/mistnet/mistnet/internal/accesslog"
	"github.com/mistnet/mistnet/internal/mesh"
)

// HeaderOps are changes to headers, ready to be carried out: first Remove, then Set, then Add, each in its order. Names
// are in lower case. No operation is on a host header or pseudo-header.
type HeaderOps struct {
	Remove []string
	Set    []HeaderLine
	Add    []HeaderLine
}

// HeaderLine is one line of a header.
type HeaderLine struct {
	Name, Value string
	Format      *accesslog.Format // that Value has; nil: it stands for itself
}

// EditableHeader is headers that can be changed.
type EditableHeader interface {
	Del(name string)        // every value
	Set(name, value string) // instead of every value
	Add(name, value string) // after every value

	// Fill puts what operators ask for in their place. When that is nothing at all, the header stays as it is.
	Fill(f *accesslog.Format) string
}

// IsZero reports whether there is nothing to do.
func (o *HeaderOps) IsZero() bool { return len(o.Remove) == 0 && len(o.Set) == 0 && len(o.Add) == 0 }

// Apply carries the operations out. What is to be set to nothing stays as it is, as with Envoy.
func (o *HeaderOps) Apply(h EditableHeader) {
	for _, name := range o.Remove {
		h.Del(name)
	}
	for i := range o.Set {
		if v := o.Set[i].value(h); v != "" {
			h.Set(o.Set[i].Name, v)
		}
	}
	for i := range o.Add {
		if v := o.Add[i].value(h); v != "" {
			h.Add(o.Add[i].Name, v)
		}
	}
}

func (l *HeaderLine) value(h EditableHeader) string {
	if l.Format == nil {
		return l.Value
	}
	return h.Fill(l.Format)
}

// compileHeaders leaves out what is the connection's. It also returns the authority that setting the host header of a request asks for.
func compileHeaders(ops mesh.HeaderOps, request bool) (o HeaderOps, authority string, err error) {
	for _, name := range ops.Remove {
		name = strings.ToLower(name)
		if name == "host" || strings.HasPrefix(name, ":") || name == "" {
			return o, "", fmt.Errorf("remove: %q cannot be removed", name)
		}
		o.Remove = append(o.Remove, name)
	}
	for _, h := range ops.Set {
		h.Name = strings.ToLower(h.Name)
		if request && (h.Name == "host" || h.Name == ":authority") {
			if h.Format {
				return o, "", fmt.Errorf("set: %q cannot have operators", h.Name)
			}
			authority = h.Value
			continue
		}
		if mesh.IsConnectionHeader(h.Name) {
			continue
		}
		line, err := compileHeader(h)
		if err != nil {
			return o, "", fmt.Errorf("set: %w", err)
		}
		o.Set = append(o.Set, line)
	}
	for _, h := range ops.Add {
		h.Name = strings.ToLower(h.Name)
		if mesh.IsConnectionHeader(h.Name) {
			continue
		}
		line, err := compileHeader(h)
		if err != nil {
			return o, "", fmt.Errorf("add: %w", err)
		}
		o.Add = append(o.Add, line)
	}
	return o, authority, nil
}

func compileHeader(h mesh.Header) (line HeaderLine, err error) {
	line = HeaderLine{Name: h.Name, Value: h.Value}
	switch {
	case h.Name == "host" || !mesh.IsHeaderName(h.Name):
		return line, fmt.Errorf("%q cannot be set", h.Name)
	case !mesh.IsHeaderValue(h.Value):
		return line, fmt.Errorf("value of %q holds a control character", h.Name)
	case h.Format:
		if line.Format, err = accesslog.ParseHeader(h.Value); err != nil {
			return line, fmt.Errorf("value of %q: %w", h.Name, err)
		}
	}
	return line, nil
}
