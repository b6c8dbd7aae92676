package http1

import "fmt"

// Edits change a head while it is written: what is removed or set is left out where it stood, what is set or added comes
// behind the rest. Later edits see earlier ones. The zero value changes nothing; Reset keeps the memory for the next use.
//
// Framing and hop-by-hop fields are the engine's own and cannot be set. An edit that cannot be written (no token, a
// control character, a host that is none) makes the write fail with BadEdit: values may come from a token's claims.
type Edits struct {
	list   []edit
	target string
	host   string
	size   int
	drop   bool // some edit removes
	err    error
}

type edit struct {
	add, del    bool // set is both
	id          name
	name, value string
}

// Reset forgets all edits.
func (e *Edits) Reset() {
	clear(e.list) // their strings are somebody's memory
	*e = Edits{list: e.list[:0]}
}

// Set replaces every field of that name by one. In a request, setting "host" replaces the authority.
func (e *Edits) Set(name, value string) { e.put(edit{add: true, del: true, name: name, value: value}) }

// Add adds a field.
func (e *Edits) Add(name, value string) { e.put(edit{add: true, name: name, value: value}) }

// Remove removes every field of that name. Host and framing stay.
func (e *Edits) Remove(name string) { e.put(edit{del: true, name: name}) }

// SetTarget replaces a request's path and query; target begins with "/".
func (e *Edits) SetTarget(target string) {
	if target == "" || target[0] != '/' || !all(target, inTarget) {
		e.err = fmt.Errorf("target %q is no path", target)
		return
	}
	e.target = target
	e.size += len(target)
}

func (e *Edits) put(x edit) {
	x.id = nameOf(x.name)
	switch {
	case x.name == "" || !all(x.name, inToken):
		e.err = fmt.Errorf("field name %q is no token", x.name)
		return
	case !all(x.value, inValue):
		e.err = fmt.Errorf("value of field %q has a control character", x.name)
		return
	case x.id == nameHost:
		if !x.add {
			return
		}
		if _, _, ok := splitHost(x.value); !ok {
			e.err = fmt.Errorf("%q is no host[:port]", x.value)
			return
		}
		e.host = x.value
		e.size += len(x.value)
		return
	case x.id.hop(), x.id == nameExpect:
		if x.add {
			e.err = fmt.Errorf("field %q belongs to the connection", x.name)
		}
		return
	}
	x.value = trim(x.value)
	e.list = append(e.list, x)
	e.size += len(x.name) + len(x.value) + 4
	e.drop = e.drop || x.del
}

// failed returns what is wrong with the edits.
func (e *Edits) failed() error {
	if e == nil || e.err == nil {
		return nil
	}
	return fail(BadEdit, e.err)
}

// drops reports whether an edit from the i-th on removes the field.
func (e *Edits) drops(i int, id name, s string) bool {
	for ; i < len(e.list); i++ {
		if x := &e.list[i]; x.del && x.id == id && (id != other || same(x.name, s)) {
			return true
		}
	}
	return false
}

// fields appends the fields that go on: what speaks to the next hop, and in a request Host, is left to the caller. What
// stands together is copied together.
func (e *Edits) fields(dst []byte, f *Fields) []byte {
	from, to := 0, 0
	for i := range f.list {
		x := &f.list[i]
		if x.hop || x.name == nameHost || e != nil && e.drop && e.drops(0, x.name, f.text[x.line:x.nameEnd]) {
			continue
		}
		if int(x.line) != to {
			dst = append(dst, f.text[from:to]...)
			from = int(x.line)
		}
		to = int(x.next)
	}
	dst = append(dst, f.text[from:to]...)
	if e == nil {
		return dst
	}
	for i := range e.list {
		if x := &e.list[i]; x.add && !e.drops(i+1, x.id, x.name) {
			dst = appendField(dst, x.name, x.value)
		}
	}
	return dst
}

// Value returns the value that the field of that name, in any case, will have in a head; several are joined with ",". What the
// engine writes itself is not known: Host and framing. Both e and f may be nil: nothing is changed, or only what e adds is there.
func (e *Edits) Value(f *Fields, name string) (v string, ok bool) {
	id := nameOf(name)
	if f != nil && (e == nil || !e.drop || !e.drops(0, id, name)) {
		v, ok = f.Value(name)
	}
	if e == nil {
		return v, ok
	}
	for i := range e.list {
		x := &e.list[i]
		if !x.add || x.id != id || id == other && !same(x.name, name) || e.drops(i+1, id, name) {
			continue
		}
		if ok {
			v += "," + x.value
			continue
		}
		v, ok = x.value, true
	}
	return v, ok
}

// has reports whether the head will have a field of that known name.
func (e *Edits) has(f *Fields, id name) bool {
	have := f.count[id] > 0
	if e == nil {
		return have
	}
	for i := range e.list {
		if x := &e.list[i]; x.id == id {
			have = x.add || have && !x.del
		}
	}
	return have
}

func appendField(dst []byte, name, value string) []byte {
	dst = append(dst, name...)
	dst = append(dst, ':', ' ')
	dst = append(dst, value...)
	return append(dst, '\r', '\n')
}
