package http1

import "io"

// What joins this engine with those of other versions of HTTP: they share its Request, Response, Fields and Edits.

// Source is where a body comes from that is not on an HTTP/1.1 connection.
type Source interface {
	// Next returns the next piece, valid until the next call, and whether it is the last; a last one may be empty. The
	// error is an *Error.
	Next() (p []byte, last bool, err error)
	// Buffer waits until the whole body is here, or n bytes of it, and reports whether it is the whole.
	Buffer(n int) (bool, error)
	// Keeps reports whether what is here can be read to its end, and Rewind can still go back.
	Keeps() bool
	// Rewind goes back to the beginning; false once that is gone.
	Rewind() bool
	// Ahead says what to flush before Next waits; nil: nothing.
	Ahead(f Flusher)
	// Trailers are the fields behind the body once its last piece was returned.
	Trailers() *Fields
}

// Flusher holds what is not sent yet.
type Flusher interface{ Flush() error }

// Upstream is where an Exchange sends its request: a ClientConn, or what carries requests otherwise. Begin, SendBody and
// Close may be called while ReadResponse runs.
type Upstream interface {
	// Begin takes the request's head, edited. It may leave with the first bytes of the body.
	Begin(q *Request, e *Edits) error
	// SendBody sends the body to its end, flushing whenever it has to wait.
	SendBody(b *Body) error
	// ReadResponse waits for the next response head, be it an interim one.
	ReadResponse() (*Response, error)
	// End says that the exchange ended in order.
	End()
	// Drop says that it ended otherwise, after Close.
	Drop()
	// Close ends the exchange at once, at any time from any goroutine.
	Close() error
}

// from begins a body that comes from src. With trailers to come, the next hop must not be told its length if that speaks
// HTTP/1.1: nothing follows such a body there.
func (b *Body) from(src Source, as role, kind framing, size int64, trailers, over bool) {
	b.sized = kind == bodyLength
	if b.sized && trailers && !over {
		kind = bodyChunked
	}
	b.in, b.src, b.role, b.kind, b.size, b.count, b.err, b.via = nil, src, as, kind, size, 0, nil, nil
	b.phase = inData
	if over {
		b.phase = done
	}
}

// nextFrom is Next of a body that comes from elsewhere.
func (b *Body) nextFrom() ([]byte, error) {
	for b.phase != done {
		p, last, err := b.src.Next()
		if err != nil {
			return nil, err // the source remembers what lasts
		}
		if last {
			b.phase = done
		}
		if len(p) > 0 {
			if b.tap != nil {
				b.tap.See(p, b.count)
			}
			b.count += int64(len(p))
			return p, nil
		}
	}
	return nil, io.EOF
}

// rewindFrom is Rewind of a body that comes from elsewhere.
func (b *Body) rewindFrom() bool {
	if b.err != nil || b.count > 0 && !b.src.Rewind() {
		return false
	}
	if b.count > 0 || b.phase != done {
		b.count, b.phase = 0, inData
	}
	b.restart(b.via)
	return true
}

// Ahead makes f be flushed before the body waits for more: whatever waits here may be the answer to what waits there.
func (b *Body) Ahead(f Flusher) {
	switch {
	case b.src != nil:
		b.src.Ahead(f)
	case b.in != nil:
		b.in.ahead = f
	}
}

// Took says that the whole body was taken from its source otherwise than by Next, in these pieces.
func (b *Body) Took(all [][]byte) {
	for _, p := range all {
		if b.tap != nil {
			b.tap.See(p, b.count)
		}
		b.count += int64(len(p))
	}
	b.phase = done
}

// Repeat makes q the request that m is, with the body from src: it must have been built, and nothing been done with it since.
func (q *Request) Repeat(m *Request, src Source) {
	list, trailers := q.list, q.Body.trailers
	*q = *m
	q.list = append(list[:0], m.list...)
	q.Body.src, q.Body.trailers = src, trailers
}

// Repeat makes p the response that m is, as Request.Repeat does.
func (p *Response) Repeat(m *Response, src Source) {
	list, trailers := p.list, p.Body.trailers
	*p = *m
	p.list = append(list[:0], m.list...)
	p.Body.src, p.Body.trailers = src, trailers
}

// Repeat makes f what m is.
func (f *Fields) Repeat(m *Fields) {
	list := append(f.list[:0], m.list...)
	*f = *m
	f.list = list
}

// Absent reports whether there can be no body, as in a response to HEAD.
func (b *Body) Absent() bool { return b.kind == bodyNone }

// Declared is the length in bytes that the head says the body has, or to HEAD would have.
func (q *Request) Declared() (int64, bool) {
	if q.Body.via != nil {
		return 0, false
	}
	return q.Body.size, q.Body.kind == bodyLength || q.Body.src != nil && q.Body.sized
}

// TrailersWanted reports whether the client says that it reads trailers.
func (q *Request) TrailersWanted() bool { return q.trailers }

// WantTrailers makes the request say that its client reads trailers, which somebody will who does not say so.
func (q *Request) WantTrailers() { q.trailers = true }

// Declared is the length in bytes that the head says the body has, or to HEAD would have.
func (p *Response) Declared() (int64, bool) { return p.size, p.kind == bodyLength && p.Body.via == nil }

// FieldWriter takes the fields of a head one by one.
type FieldWriter interface{ Field(name, value string) }

// Each gives every field that goes on, edited, to w: not those that speak to the next hop, and not Host.
func (e *Edits) Each(f *Fields, w FieldWriter) {
	for i := range f.list {
		x := &f.list[i]
		if x.hop || x.name == nameHost || e != nil && e.drop && e.drops(0, x.name, f.text[x.line:x.nameEnd]) {
			continue
		}
		w.Field(f.text[x.line:x.nameEnd], f.text[x.value:x.valueEnd])
	}
	if e == nil {
		return
	}
	for i := range e.list {
		if x := &e.list[i]; x.add && !e.drops(i+1, x.id, x.name) {
			w.Field(x.name, x.value)
		}
	}
}

// Failed returns what is wrong with the edits.
func (e *Edits) Failed() error { return e.failed() }

// Target is the path and query that replace those of the request; "" keeps them.
func (e *Edits) Target() string {
	if e == nil {
		return ""
	}
	return e.target
}

// Host is the authority that replaces that of the request; "" keeps it.
func (e *Edits) Host() string {
	if e == nil {
		return ""
	}
	return e.host
}

// Has reports whether the head will have a field of that name.
func (e *Edits) Has(f *Fields, name string) bool {
	id := nameOf(name)
	_, have := f.Value(name)
	if e == nil {
		return have
	}
	for i := range e.list {
		if x := &e.list[i]; x.id == id && (id != other || same(x.name, name)) {
			have = x.add || have && !x.del
		}
	}
	return have
}
