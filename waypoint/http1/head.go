package http1

import (
	"bytes"
	"errors"
	"iter"
	"strings"
)

// What is wrong with a line.
var (
	errBareLF     = errors.New("a line ends in LF without CR")
	errFold       = errors.New("a field line begins with space")
	errName       = errors.New("a field name is no token, or not directly followed by a colon")
	errValue      = errors.New("a field value has a control character")
	errControl    = errors.New("a start line has a control character")
	errManyFields = errors.New("too many fields")
)

// field is one field line, as offsets into the head.
type field struct {
	line, nameEnd, value, valueEnd, next uint16
	name                                 name
	hop                                  bool // goes no further
}

// withheld is the name of a field that goes no further and that nobody here looks at either: what decides on a request by a
// field must see what the next hop sees.
const withheld = names

// Fields are the fields of a head or a trailer section, in the order and spelling received. The strings it hands out
// stay valid for ever. Not safe for concurrent use while a head is being read.
type Fields struct {
	text  string // the whole head
	start int    // length of the start line, without CRLF
	list  []field
	count [names]uint8 // of each known name; never more than maxFields
	first [names]uint8 // where in list
}

// maxFields and maxHeadBytes bound a head (and what Config may ask for): offsets fit 16 bits.
const (
	maxFields    = 100
	maxHeadBytes = 60 << 10
)

// Len is the number of fields.
func (f *Fields) Len() int { return len(f.list) }

// Size is the length of the head in bytes, as received.
func (f *Fields) Size() int { return len(f.text) }

// At returns the i-th field as received: the name's case is the sender's.
func (f *Fields) At(i int) (name, value string) {
	x := &f.list[i]
	return f.text[x.line:x.nameEnd], f.text[x.value:x.valueEnd]
}

// All iterates over the fields.
func (f *Fields) All() iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		for i := range f.list {
			if n, v := f.At(i); !yield(n, v) {
				return
			}
		}
	}
}

// Value returns the value of the field of that name, in any case; several are joined with "," (RFC 9110, 5.3).
func (f *Fields) Value(name string) (string, bool) {
	id := nameOf(name)
	if id != other {
		switch f.count[id] {
		case 0:
			return "", false
		case 1:
			_, v := f.At(int(f.first[id]))
			return v, true
		}
	}
	found := -1
	for i := range f.list {
		if !f.is(i, id, name) {
			continue
		}
		if found >= 0 {
			return f.join(id, name), true
		}
		found = i
	}
	if found < 0 {
		return "", false
	}
	_, v := f.At(found)
	return v, true
}

// Line returns the value of the i-th field of that name, in any case.
func (f *Fields) Line(name string, i int) (string, bool) {
	id := nameOf(name)
	if id != other && i >= int(f.count[id]) {
		return "", false
	}
	for at := range f.list {
		if !f.is(at, id, name) {
			continue
		}
		if i == 0 {
			_, v := f.At(at)
			return v, true
		}
		i--
	}
	return "", false
}

// Next returns the value of the first field of that name, in any case, from the i-th field on, and the index behind it; -1 when there
// is none.
func (f *Fields) Next(name string, i int) (value string, next int) {
	id := nameOf(name)
	if id != other {
		if f.count[id] == 0 {
			return "", -1
		}
		i = max(i, int(f.first[id]))
	}
	for ; i < len(f.list); i++ {
		if f.is(i, id, name) {
			_, value = f.At(i)
			return value, i + 1
		}
	}
	return "", -1
}

func (f *Fields) is(i int, id name, s string) bool {
	x := &f.list[i]
	return x.name == id && (id != other || same(f.text[x.line:x.nameEnd], s))
}

func (f *Fields) join(id name, s string) string {
	var b strings.Builder
	for i := range f.list {
		if f.is(i, id, s) {
			if b.Len() > 0 {
				b.WriteByte(',')
			}
			_, v := f.At(i)
			b.WriteString(v)
		}
	}
	return b.String()
}

// known returns the value of the first field of a known name.
func (f *Fields) known(n name) (string, bool) {
	if f.count[n] == 0 {
		return "", false
	}
	_, v := f.At(int(f.first[n]))
	return v, true
}

// Reset forgets all fields; their memory is used again.
func (f *Fields) Reset() { f.reset() }

func (f *Fields) reset() {
	f.list = f.list[:0]
	f.start = 0
	clear(f.count[:])
}

// forget is reset, and lets go of the text.
func (f *Fields) forget() {
	f.reset()
	f.text = ""
}

// limits bound a section of fields.
type limits struct{ bytes, fields int }

// section is what kind of section of fields is read.
type section uint8

const (
	requestSection section = iota // one empty line before it is skipped
	responseSection
	trailerSection // has no start line; fields that do not belong there are left out
)

// readHead reads a start line, field lines and an empty line. Lines are judged as they come, so that nonsense is refused
// before its end.
//
// The error is one of the variables above, errTooLarge, or what fill said.
func (r *reader) readHead(f *Fields, lim limits, of section) error {
	f.reset()
	trailer := of == trailerSection
	started, skipped := trailer, of != requestSection
	var pos, scan int // offsets from r.r: of the line, and of what was not searched for its end
	for {
		b := r.buffered()
		if !started && len(b) > 0 && b[0] != '\r' && b[0] != '\n' && class[b[0]]&inToken == 0 {
			return errControl // TLS, for one, which waits for an answer
		}
		i := bytes.IndexByte(b[scan:], '\n')
		if i < 0 {
			if len(b) >= lim.bytes {
				return errTooLarge
			}
			scan = len(b)
			if err := r.fill(); err != nil {
				return err
			}
			continue
		}
		next := scan + i + 1
		if next > lim.bytes {
			return errTooLarge
		}
		if next-pos < 2 || b[next-2] != '\r' {
			return errBareLF
		}
		line := b[pos : next-2]
		scan = next
		switch {
		case len(line) == 0 && started:
			if head := b[:next]; string(head) != f.text { // compared in place
				f.text = string(head)
			}
			r.r += next
			return nil
		case len(line) == 0 && !skipped:
			skipped = true
			r.r += next
			scan = 0
			continue
		case !started:
			if len(line) == 0 || !all(line, inValue) {
				return errControl
			}
			started, f.start = true, len(line)
		default:
			if err := f.parse(line, pos, lim.fields, trailer); err != nil {
				return err
			}
		}
		pos = next
	}
}

// parse judges one field line, which begins at offset pos of its head, and notes it.
func (f *Fields) parse(line []byte, pos, most int, trailer bool) error {
	if len(line) == 0 || line[0] == ' ' || line[0] == '\t' {
		return errFold
	}
	colon := 0
	for colon < len(line) && class[line[colon]]&inToken != 0 {
		colon++
	}
	if colon == 0 || colon == len(line) || line[colon] != ':' {
		return errName
	}
	return f.add(line, colon, pos, most, trailer)
}

// add judges the value of a field line whose name is one and ends at colon, and notes the line.
func (f *Fields) add(line []byte, colon, pos, most int, trailer bool) error {
	value, end := colon+1, len(line)
	for value < end && (line[value] == ' ' || line[value] == '\t') {
		value++
	}
	for end > value && (line[end-1] == ' ' || line[end-1] == '\t') {
		end--
	}
	if !all(line[value:end], inValue) {
		return errValue
	}
	if len(f.list) >= most {
		return errManyFields
	}
	n := nameOf(line[:colon])
	if trailer && (n.hop() || noTrailer(n, string(line[:colon]))) {
		return nil
	}
	f.note(n)
	f.list = append(f.list, field{
		line: uint16(pos), nameEnd: uint16(pos + colon), value: uint16(pos + value), valueEnd: uint16(pos + end),
		next: uint16(pos + len(line) + 2), name: n, hop: n.hop(),
	})
	return nil
}

func (f *Fields) note(n name) {
	if f.count[n] == 0 {
		f.first[n] = uint8(len(f.list))
	}
	f.count[n]++
}

// options are what the Connection fields say.
type options struct{ close, keepAlive, upgrade bool }

// maxOptions bounds the names in Connection: each is looked for in all fields.
const maxOptions = 32

// connection reads the Connection fields and marks the fields they name, unless those are for all recipients.
func (f *Fields) connection() (o options, err error) {
	if f.count[nameConnection] == 0 {
		return o, nil
	}
	n := 0
	for i := range f.list {
		if f.list[i].name != nameConnection {
			continue
		}
		_, v := f.At(i)
		for v != "" {
			var option string
			option, v, _ = strings.Cut(v, ",")
			if option = trim(option); option == "" {
				continue
			}
			if n++; n > maxOptions || !all(option, inToken) {
				return o, errors.New("a Connection field lists too much, or what is no token")
			}
			switch {
			case fold(option, "close"):
				o.close = true
			case fold(option, "keep-alive"):
				o.keepAlive = true
			case fold(option, "upgrade"):
				o.upgrade = true
			default:
				f.mark(option)
			}
		}
	}
	return o, nil
}

func (f *Fields) mark(option string) {
	id := nameOf(option)
	if forAll(id, option) {
		return
	}
	for i := range f.list {
		if f.is(i, id, option) {
			f.withhold(i)
		}
	}
}

// Withhold makes the fields whose names are go no further, nor be found by Value. Fields that the engine knows stay.
func (f *Fields) Withhold(are func(name string) bool) {
	for i := range f.list {
		if x := &f.list[i]; x.name == other && are(f.text[x.line:x.nameEnd]) {
			f.withhold(i)
		}
	}
}

func (f *Fields) withhold(i int) {
	x := &f.list[i]
	if x.hop = true; x.name == other {
		x.name = withheld
	}
}

// trailersWanted reports whether TE asks for trailers, its only member that is passed on.
func (f *Fields) trailersWanted() bool {
	if f.count[nameTE] == 0 {
		return false
	}
	for i := range f.list {
		if f.list[i].name != nameTE {
			continue
		}
		_, v := f.At(i)
		for v != "" {
			var member string
			member, v, _ = strings.Cut(v, ",")
			if fold(trim(member), "trailers") {
				return true
			}
		}
	}
	return false
}

// trim removes optional white space (RFC 9110, 5.6.3).
func trim(s string) string {
	for s != "" && (s[0] == ' ' || s[0] == '\t') {
		s = s[1:]
	}
	for s != "" && (s[len(s)-1] == ' ' || s[len(s)-1] == '\t') {
		s = s[:len(s)-1]
	}
	return s
}
