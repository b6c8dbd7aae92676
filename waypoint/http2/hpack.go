package http2

import (
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// tableBytes bounds the dynamic table that a peer's encoder may use (RFC 9113, 6.5.2: the default).
const tableBytes = 4096

// entryOverhead is what an entry costs beyond its strings (RFC 7541, 4.1).
const entryOverhead = 32

// decoder decodes header blocks (RFC 7541). The dynamic table lies in one piece of memory, so that what peers index costs
// no allocation. Fields are handed out as slices that are valid until the next.
type decoder struct {
	data    []byte  // names and values of entries, the oldest first, with what was evicted before them
	entries []entry // likewise
	first   int     // of entries: the oldest that is there
	size    int     // as RFC 7541, 4.1 counts
	max     int     // as the encoder chose
	changes uint64  // how often the table was changed

	name, value scratch
}

// entry is one field of the dynamic table: data[at:at+name] and value bytes behind that.
type entry struct{ at, name, value int }

// scratch takes decoded strings.
type scratch struct{ b []byte }

func (s *scratch) Write(p []byte) (int, error) {
	s.b = append(s.b, p...)
	return len(p), nil
}

// fieldSink takes the fields of a block.
type fieldSink interface{ field(name, value []byte) }

func newDecoder() *decoder { return &decoder{max: tableBytes} }

func compressionError(reason string) error { return &connError{http2.ErrCodeCompression, reason} }

// decode reads one whole header block. Every block must be decoded, wanted or not: the table is shared.
func (d *decoder) decode(p []byte, to fieldSink) error {
	for begun := false; len(p) > 0; {
		c := p[0]
		var err error
		switch {
		case c&0x80 != 0: // 6.1: indexed
			var i int
			if i, p, err = readInt(p, 7); err != nil {
				return err
			}
			name, value, ok := d.at(i)
			if !ok {
				return compressionError("no such index")
			}
			to.field(name, value)
		case c&0xc0 == 0x40: // 6.2.1: literal, to be indexed
			p, err = d.literal(p, 6, true, to)
		case c&0xe0 == 0x20: // 6.3: the table's size
			var n int
			if n, p, err = readInt(p, 5); err != nil {
				return err
			}
			if begun || n > tableBytes {
				return compressionError("a table size that may not be")
			}
			d.max = n
			d.evict(0)
			continue
		default: // 6.2.2, 6.2.3: literal
			p, err = d.literal(p, 4, false, to)
		}
		if err != nil {
			return err
		}
		begun = true
	}
	return nil
}

func (d *decoder) literal(p []byte, bits uint, index bool, to fieldSink) (rest []byte, err error) {
	i, p, err := readInt(p, bits)
	if err != nil {
		return nil, err
	}
	var name, value []byte
	if i == 0 {
		if name, p, err = readString(p, &d.name); err != nil {
			return nil, err
		}
	} else {
		var ok bool
		if name, _, ok = d.at(i); !ok {
			return nil, compressionError("no such index")
		}
	}
	if value, p, err = readString(p, &d.value); err != nil {
		return nil, err
	}
	to.field(name, value)
	if index {
		d.add(name, value)
	}
	return p, nil
}

// at returns an entry of the static or the dynamic table, by index.
func (d *decoder) at(i int) (name, value []byte, ok bool) {
	if i <= 0 {
		return nil, nil, false
	}
	if i < len(staticTable) {
		return staticTable[i].name, staticTable[i].value, true
	}
	if i -= len(staticTable); i >= len(d.entries)-d.first {
		return nil, nil, false
	}
	e := d.entries[len(d.entries)-1-i]
	return d.data[e.at : e.at+e.name], d.data[e.at+e.name : e.at+e.name+e.value], true
}

// evict makes place for so many bytes, if that can be.
func (d *decoder) evict(n int) {
	d.changes++
	for d.size+n > d.max && d.first < len(d.entries) {
		e := d.entries[d.first]
		d.size -= e.name + e.value + entryOverhead
		d.first++
	}
	if d.first == len(d.entries) {
		d.entries, d.data, d.first = d.entries[:0], d.data[:0], 0
	}
}

// add puts a field into the dynamic table (RFC 7541, 4.4). name may lie in the table.
func (d *decoder) add(name, value []byte) {
	n := len(name) + len(value)
	if n+entryOverhead > d.max {
		d.evict(d.max + 1)
		return
	}
	if d.first < len(d.entries) { // what is about to be evicted or moved may be the name
		d.name.b = append(d.name.b[:0], name...)
		name = d.name.b
	}
	d.evict(n + entryOverhead)
	if d.first > 0 && (len(d.data)+n > cap(d.data) || d.first > tableBytes/entryOverhead) {
		d.compact()
	}
	if d.data == nil {
		d.data = make([]byte, 0, 2*tableBytes)
	}
	d.entries = append(d.entries, entry{len(d.data), len(name), len(value)})
	d.data = append(append(d.data, name...), value...)
	d.size += n + entryOverhead
}

// compact drops what was evicted.
func (d *decoder) compact() {
	from := d.entries[d.first].at
	d.data = d.data[:copy(d.data, d.data[from:])]
	d.entries = d.entries[:copy(d.entries, d.entries[d.first:])]
	d.first = 0
	for i := range d.entries {
		d.entries[i].at -= from
	}
}

// readInt is RFC 7541, 5.1.
func readInt(p []byte, bits uint) (int, []byte, error) {
	most := 1<<bits - 1
	n := int(p[0]) & most
	p = p[1:]
	if n < most {
		return n, p, nil
	}
	for shift := uint(0); shift <= 21 && len(p) > 0; shift += 7 {
		c := p[0]
		p = p[1:]
		n += int(c&0x7f) << shift
		if c&0x80 == 0 {
			return n, p, nil
		}
	}
	return 0, nil, compressionError("an integer that is too long, or cut off")
}

// readString is RFC 7541, 5.2. The string lies in p or in to.
func readString(p []byte, to *scratch) (s, rest []byte, err error) {
	if len(p) == 0 {
		return nil, nil, compressionError("a string is missing")
	}
	huffman := p[0]&0x80 != 0
	n, p, err := readInt(p, 7)
	if err != nil {
		return nil, nil, err
	}
	if n > len(p) {
		return nil, nil, compressionError("a string is cut off")
	}
	s, rest = p[:n], p[n:]
	if huffman {
		to.b = to.b[:0]
		if _, err := hpack.HuffmanDecode(to, s); err != nil {
			return nil, nil, compressionError("a string is not in the Huffman code")
		}
		s = to.b
	}
	return s, rest, nil
}

// encoder appends fields as literals that nobody indexes, with names and a few fields of the static table: what differs
// from stream to stream would cost both sides work, and the order of heads on the connection would have to be that of
// their encoding.
type encoder struct{ b []byte }

// Field implements http1.FieldWriter. Names are sent in lower case (RFC 9113, 8.2.1).
func (e *encoder) Field(name, value string) {
	first := byte(0)
	switch name {
	case "authorization", "cookie", "set-cookie":
		first = 0x10 // 6.2.3: not even by the next hop
	}
	if i := staticName(name); i != 0 {
		e.b = appendInt(e.b, first, 4, i)
	} else {
		e.b = append(e.b, first)
		e.b = appendInt(e.b, 0, 7, len(name))
		at := len(e.b)
		e.b = append(e.b, name...)
		for ; at < len(e.b); at++ {
			if c := e.b[at]; c-'A' < 26 {
				e.b[at] = c | 0x20
			}
		}
	}
	e.str(value)
}

// indexed appends a field of the static table.
func (e *encoder) indexed(i int) { e.b = append(e.b, byte(0x80|i)) }

// named appends a field whose name is that of an entry of the static table.
func (e *encoder) named(i int, value string) {
	e.b = appendInt(e.b, 0, 4, i)
	e.str(value)
}

func (e *encoder) str(s string) {
	e.b = appendInt(e.b, 0, 7, len(s))
	e.b = append(e.b, s...)
}

func appendInt(b []byte, first byte, bits uint, n int) []byte {
	most := 1<<bits - 1
	if n < most {
		return append(b, first|byte(n))
	}
	b = append(b, first|byte(most))
	for n -= most; n >= 128; n >>= 7 {
		b = append(b, byte(n)|128)
	}
	return append(b, byte(n))
}
