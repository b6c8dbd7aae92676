package route

import (
	"fmt"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// HeaderOps are changes to headers, ready to be carried out: first Remove, then Set, then Add, each in its order. Names
// are in lower case. No operation is on a host header or pseudo-header.
type HeaderOps struct {
	Remove []string
	Set    []mesh.Header
	Add    []mesh.Header
}

// EditableHeader is headers that can be changed.
type EditableHeader interface {
	Del(name string)        // every value
	Set(name, value string) // instead of every value
	Add(name, value string) // after every value
}

// IsZero reports whether there is nothing to do.
func (o *HeaderOps) IsZero() bool { return len(o.Remove) == 0 && len(o.Set) == 0 && len(o.Add) == 0 }

// Apply carries the operations out.
func (o *HeaderOps) Apply(h EditableHeader) {
	for _, name := range o.Remove {
		h.Del(name)
	}
	for i := range o.Set {
		h.Set(o.Set[i].Name, o.Set[i].Value)
	}
	for i := range o.Add {
		h.Add(o.Add[i].Name, o.Add[i].Value)
	}
}

// compileHeaders also returns the authority that setting the host header of a request asks for.
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
			authority = h.Value
			continue
		}
		if err := settable(h); err != nil {
			return o, "", fmt.Errorf("set: %w", err)
		}
		o.Set = append(o.Set, h)
	}
	for _, h := range ops.Add {
		h.Name = strings.ToLower(h.Name)
		if err := settable(h); err != nil {
			return o, "", fmt.Errorf("add: %w", err)
		}
		o.Add = append(o.Add, h)
	}
	return o, authority, nil
}

func settable(h mesh.Header) error {
	if h.Name == "host" || !mesh.IsHeaderName(h.Name) {
		return fmt.Errorf("%q cannot be set", h.Name)
	}
	if !mesh.IsHeaderValue(h.Value) {
		return fmt.Errorf("value of %q holds a control character", h.Name)
	}
	return nil
}
