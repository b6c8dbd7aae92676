package http1

import "sync/atomic"

// kept is what a reader keeps of what was read, to read it once more: all since a mark, as long as a buffer holds it. Nothing is copied
// for that. What was read stays where it lies, and what comes is read behind it instead of over it.
type kept struct {
	marked bool
	given  atomic.Bool // set by another goroutine: nobody will want it
	at     int         // where in the buffer the mark is
	full   []byte      // a slab that was read before the buffer; nil: none was
	from   int         // where in full the mark is
}

// before is what was read before the buffer.
func (k *kept) before() []byte { return k.full[k.from:] }

// mark begins to keep what is read.
func (r *reader) mark() {
	r.forget()
	r.kept.marked, r.kept.at = true, r.r
	if r.kept.given.Load() {
		r.kept.given.Store(false)
	}
}

// keeps reports whether recall will succeed: all since the mark is here.
func (r *reader) keeps() bool {
	k := &r.kept
	return k.marked && !k.given.Load() && len(k.before())+r.w <= len(r.buf)
}

// recall goes back to the mark, and forgets it. False: not all is here any more.
func (r *reader) recall() bool {
	if !r.keeps() {
		return false
	}
	k := &r.kept
	if n := len(k.before()); n > 0 {
		copy(r.buf[n:], r.buf[:r.w])
		r.w += copy(r.buf, k.before())
	}
	r.r = k.at
	r.forget()
	return true
}

// forget takes the mark away.
func (r *reader) forget() {
	k := &r.kept
	if k.full != nil {
		giveBack(k.full)
		k.full, k.from = nil, 0
	}
	k.marked = false
}

// roomBehind makes place for at least one byte behind what is kept. False: a buffer does not hold that much.
func (r *reader) roomBehind() bool {
	k := &r.kept
	switch {
	case !r.keeps():
		return false
	case r.w < len(r.buf):
	case cap(r.buf) < largeBytes:
		unread := r.buffered()
		k.full, k.from = r.buf[:r.r], k.at
		r.buf = forReading(largeBytes)
		r.w = copy(r.buf, unread)
		r.r, k.at = 0, 0
	case k.at >= smallBytes: // where others were read before, which is rare
		r.w = copy(r.buf, r.buf[k.at:r.w])
		r.r, k.at = r.r-k.at, 0
	default:
		return false
	}
	return true
}
