package http2

import (
	"os"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/memlimit"
	"github.com/mistnet/mistnet/waypoint/http1"
)

// stream is what ServerStream and ClientStream have in common. Its receiving half is an http1.Source.
type stream struct {
	c   *conn
	id  uint32
	srv *ServerStream // one of the two
	cli *ClientStream

	// Guarded by conn.mu.
	sendWindow int
	sentEnd    bool // END_STREAM or RST_STREAM sent, or reset by the peer
	gotEnd     bool // END_STREAM or RST_STREAM received or RST_STREAM sent
	queued     bool // in writer.waiting
	halted     bool // Next is to return
	tunnel     bool // what follows the head is no body (RFC 8441); of a ClientStream: if the upstream agrees
	err        error
	in         inbox
	deadline   time.Time // of all waiting

	writable, readable chan struct{}
	writeTimer         *time.Timer
	readTimer          *time.Timer
	enc                encoder
	trailers           http1.Fields
	prev, next         *stream // in conn.fed
	fed                bool    // it is there
	ahead              http1.Flusher

	hook sync.Mutex
	gone func() // called once when the stream ends otherwise than in order; guarded by hook
}

// inbox is the receiving half: what arrived and was not taken yet, and, while it is kept, what was.
type inbox struct {
	parts    []part
	at       int   // of parts: the first that was not taken whole
	size     int   // bytes that wait
	window   int   // what the peer may still send
	unacked  int   // taken and not yet returned to the peer
	declared int64 // length of the body; -1: not
	got      int64
	keep     bool // what was taken, too, up to maxKept bytes
	kept     int
	mem      *memlimit.Account
	slabs    int // bytes of the slabs of parts, as charged to mem
	age      int // of what waits, as memlimit counts: since something was taken
}

// part is a slab of which b[r:w] was not taken.
type part struct {
	b    []byte
	r, w int
}

// begin makes the stream ready for another use. It is called with c.mu held.
func (s *stream) begin(c *conn, id uint32) {
	if s.c == nil { // its memory stays with its connection
		s.c = c
	}
	s.id = id
	s.sendWindow = c.peerWindow
	s.sentEnd, s.gotEnd, s.queued, s.err = false, false, false, nil
	s.in = inbox{parts: s.in.parts[:0], window: recvStreamWindow, declared: -1, mem: c.mem}
	s.deadline = time.Time{}
	s.ahead, s.halted, s.tunnel = nil, false, false
	s.trailers.Reset()
	if s.writable == nil {
		s.writable, s.readable = make(chan struct{}, 1), make(chan struct{}, 1)
	}
	for _, ch := range [...]chan struct{}{s.writable, s.readable} {
		select {
		case <-ch:
		default:
		}
	}
}

// endLocked ends both halves because of the peer or the connection.
func (s *stream) endLocked(err error) {
	if s.err == nil {
		s.err = err
	}
	s.sentEnd, s.gotEnd = true, true
	s.in.dropLocked(s.c)
	s.stirLocked()
	wake(s.writable)
	if s.srv != nil {
		s.srv.closeDoneLocked()
	}
}

// tellGone calls the hook, unless the stream's memory serves another request by now, which is well.
func (s *stream) tellGone() {
	s.hook.Lock()
	defer s.hook.Unlock()
	if s.gone == nil {
		return
	}
	s.c.mu.Lock()
	gone := s.err != nil
	s.c.mu.Unlock()
	if gone {
		s.gone()
	}
}

// resetLocked ends both halves, and tells the peer unless it knows.
func (s *stream) resetLocked(code http2.ErrCode, err error) {
	c := s.c
	if !(s.sentEnd && s.gotEnd) && c.err == nil && s.id != 0 {
		c.w.staged = appendRSTStream(c.room(13), s.id, code)
		c.kickLocked()
	}
	s.endLocked(err)
	c.forgetLocked(s)
}

// received takes payload from the reader goroutine. It is called with c.mu held.
func (s *stream) received(p []byte) {
	in := &s.in
	s.feedLocked()
	in.size += len(p)
	s.c.buffered += len(p)
	for len(p) > 0 {
		last := len(in.parts) - 1
		if last < 0 || in.parts[last].w == len(in.parts[last].b) {
			b := largeSlabs.Get
			if len(p) <= smallBytes && last < 3 {
				b = smallSlabs.Get
			}
			in.parts = append(in.parts, part{b: b()})
			last++
			in.slabs += cap(in.parts[last].b)
			in.mem.Charge(cap(in.parts[last].b))
		}
		t := &in.parts[last]
		n := copy(t.b[t.w:], p)
		t.w += n
		p = p[n:]
	}
	s.stirLocked()
}

// feedLocked notes that the stream may hold memory, until its use ends: it may well be over before that.
func (s *stream) feedLocked() {
	if s.fed || s.c.mem == nil {
		return
	}
	s.fed, s.prev, s.next = true, nil, s.c.fed
	if s.next != nil {
		s.next.prev = s
	}
	s.c.fed = s
}

// unfeedLocked takes the stream off that list.
func (s *stream) unfeedLocked() {
	if !s.fed {
		return
	}
	if s.prev == nil {
		s.c.fed = s.next
	} else {
		s.prev.next = s.next
	}
	if s.next != nil {
		s.next.prev = s.prev
	}
	s.fed, s.prev, s.next = false, nil, nil
}

// takeLocked returns the next piece.
func (in *inbox) takeLocked() []byte {
	for in.at < len(in.parts) {
		t := &in.parts[in.at]
		if t.r < t.w {
			p := t.b[t.r:t.w]
			t.r = t.w
			in.size -= len(p)
			if in.keep {
				if in.kept += len(p); in.kept > maxKept {
					in.keep = false
				}
			}
			return p
		}
		switch {
		case t.w < len(t.b):
			return nil // more may come
		case in.keep:
			in.at++
		default:
			in.dropTakenLocked()
		}
	}
	return nil
}

// dropTakenLocked gives the slabs back that were taken whole.
func (in *inbox) dropTakenLocked() {
	n, freed := 0, 0
	for n < len(in.parts) && in.parts[n].r == in.parts[n].w && in.parts[n].w == len(in.parts[n].b) {
		freed += cap(in.parts[n].b)
		giveBack(in.parts[n].b)
		n++
	}
	in.slabs -= freed
	in.mem.Release(freed)
	k := copy(in.parts, in.parts[n:])
	clear(in.parts[k:])
	in.parts, in.at = in.parts[:k], 0
}

// dropLocked gives everything back but what the stream's goroutine may be looking at: that is left to the collector.
func (in *inbox) dropLocked(c *conn) {
	c.buffered -= in.size
	in.mem.Release(in.slabs)
	in.size, in.slabs = 0, 0
	in.keep = false
	clear(in.parts)
	in.parts, in.at = in.parts[:0], 0
	if c.err == nil && c.usedLocked() { // it was withheld, and nobody may be left who reads
		c.reopenLocked()
		c.kickLocked()
	}
}

// freeLocked gives everything back. Nobody looks at it any more.
func (in *inbox) freeLocked(c *conn) {
	for _, t := range in.parts {
		giveBack(t.b)
	}
	in.dropLocked(c)
}

// Next implements http1.Source.
func (s *stream) Next() ([]byte, bool, error) {
	c := s.c
	var until time.Time
	for {
		c.mu.Lock()
		if s.err != nil {
			err := s.err
			c.mu.Unlock()
			return nil, false, s.blame(err)
		}
		if p := s.in.takeLocked(); p != nil {
			last := s.gotEnd && s.in.size == 0
			s.takenLocked(len(p))
			c.mu.Unlock()
			return p, last, nil
		}
		over, halted := s.gotEnd, s.halted
		if until.IsZero() || s.srv == nil { // of a response it may be found out meanwhile
			until = s.readUntilLocked()
		}
		c.mu.Unlock()
		switch {
		case over:
			return nil, true, nil
		case halted:
			return nil, false, http1.Fail(http1.ClientClosed, errStopped)
		}
		if s.ahead != nil {
			if err := s.ahead.Flush(); err != nil {
				return nil, false, err
			}
		}
		if !wait(s.readable, &s.readTimer, until) {
			return nil, false, s.blame(os.ErrDeadlineExceeded)
		}
	}
}

// readUntilLocked is how long a body may be waited for; zero: for ever. Streams of unknown length may be silent: they are
// conversations.
func (s *stream) readUntilLocked() time.Time {
	until := s.deadline
	if s.srv != nil && s.in.declared >= 0 {
		if t := time.Now().Add(s.c.cfg.BodyTimeout); until.IsZero() || t.Before(until) {
			return t
		}
	}
	return until
}

// takenLocked counts n bytes as taken and reopens windows when it is time.
func (s *stream) takenLocked(n int) {
	c, in := s.c, &s.in
	c.buffered -= n
	in.unacked += n
	in.age = 0
	if in.unacked >= recvStreamWindow/2 && !s.gotEnd {
		c.w.staged = appendWindowUpdate(c.room(13), s.id, in.unacked)
		in.window += in.unacked
		in.unacked = 0
		c.reopenLocked()
		c.kickLocked()
		return
	}
	if c.usedLocked() { // it was withheld
		c.reopenLocked()
		c.kickLocked()
	}
}

// firstWindow is the connection's window at its start. Where memory is counted it is small until it is used: it cannot be taken back.
func (c *conn) firstWindow() int {
	if c.mem == nil {
		return recvConnWindow
	}
	return max(c.mem.Window(memlimit.FirstWindow), defaultWindow)
}

// usedLocked reports whether the connection's window is to be reopened.
func (c *conn) usedLocked() bool { return c.recvWindow <= c.recvSize/2 }

// reopenLocked makes the connection's window as large as memory allows when half of it is used.
func (c *conn) reopenLocked() {
	if !c.usedLocked() || c.buffered > maxConnBuffered {
		return
	}
	size := c.mem.Window(recvConnWindow)
	if size-c.recvWindow < leastUpdate {
		return
	}
	c.w.staged = appendWindowUpdate(c.room(13), 0, size-c.recvWindow)
	c.recvWindow, c.recvSize = size, size
}

// Buffer implements http1.Source. It waits for no more than a window, which nobody but the caller opens.
func (s *stream) Buffer(n int) (bool, error) {
	c := s.c
	until := time.Time{}
	for {
		c.mu.Lock()
		size, over, err := s.in.size, s.gotEnd, s.err
		if until.IsZero() {
			until = s.readUntilLocked()
		}
		c.mu.Unlock()
		switch {
		case err != nil:
			return false, s.blame(err)
		case over:
			return true, nil
		case size >= min(n, recvStreamWindow/2):
			return false, nil
		}
		if !wait(s.readable, &s.readTimer, until) {
			return false, s.blame(os.ErrDeadlineExceeded)
		}
	}
}

// Keeps implements http1.Source.
func (s *stream) Keeps() bool {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.err == nil && (s.in.keep && s.in.kept+s.in.size <= maxKept || s.gotEnd && s.in.got == 0)
}

// Rewind implements http1.Source.
func (s *stream) Rewind() bool {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if !s.in.keep || s.err != nil {
		return false
	}
	for i := range s.in.parts {
		s.in.parts[i].r = 0
	}
	s.in.size += s.in.kept
	c.buffered += s.in.kept
	s.in.unacked -= s.in.kept // they were counted
	s.in.at, s.in.kept = 0, 0
	return true
}

// Ahead implements http1.Source.
func (s *stream) Ahead(f http1.Flusher) { s.ahead = f }

// Trailers implements http1.Source.
func (s *stream) Trailers() *http1.Fields { return &s.trailers }

// Flush implements http1.Flusher.
func (s *stream) Flush() error {
	if err := s.c.flush(); err != nil {
		return s.blame(err)
	}
	return nil
}

// write stages p as DATA, waiting for windows and place; end says that nothing follows.
func (s *stream) write(p []byte, end bool) error {
	c := s.c
	var until time.Time
	c.mu.Lock()
	for {
		if err := s.sendErrLocked(); err != nil {
			c.mu.Unlock()
			return s.blame(err)
		}
		if len(p) == 0 && !end {
			c.mu.Unlock()
			return nil
		}
		n := max(min(len(p), s.sendWindow, c.w.window, c.peerMaxFrame, maxStaged-len(c.w.staged)), 0)
		if n > 0 || len(p) == 0 {
			s.stageLocked(p[:n], end && n == len(p))
			if p = p[n:]; len(p) == 0 {
				c.mu.Unlock()
				return nil
			}
			until = time.Time{}
			continue
		}
		if !s.queued {
			s.queued = true
			c.w.waiting = append(c.w.waiting, s)
		}
		if until.IsZero() {
			until = time.Now().Add(c.cfg.StallTimeout)
			if !s.deadline.IsZero() && s.deadline.Before(until) {
				until = s.deadline
			}
		}
		c.mu.Unlock()
		if err := s.Flush(); err != nil {
			return err
		}
		if !wait(s.writable, &s.writeTimer, until) {
			return s.blame(os.ErrDeadlineExceeded)
		}
		c.mu.Lock()
	}
}

// stageLocked stages one DATA frame.
func (s *stream) stageLocked(p []byte, end bool) {
	c := s.c
	flags := http2.Flags(0)
	if end {
		flags = http2.FlagDataEndStream
	}
	b := appendFrameHeader(c.room(len(p)+frameHeaderBytes), len(p), http2.FrameData, flags, s.id)
	c.w.staged = append(b, p...)
	s.sendWindow -= len(p)
	c.w.window -= len(p)
	c.budget.control = min(c.budget.control+controlPerData, 2*fullBudget.control)
	if end {
		s.sentEndLocked()
	}
}

func (s *stream) sentEndLocked() {
	s.sentEnd = true
	if s.gotEnd {
		s.c.endedLocked(s.id)
		s.c.forgetLocked(s)
	}
}

func (s *stream) sendErrLocked() error {
	switch {
	case s.err != nil:
		return s.err
	case s.sentEnd:
		return errClosed
	}
	return s.c.err
}

// writeHead stages the header block in s.enc.
func (s *stream) writeHead(end bool) error {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.sendErrLocked(); err != nil {
		return s.blame(err)
	}
	s.stageHeadLocked(end)
	return nil
}

func (s *stream) stageHeadLocked(end bool) {
	c := s.c
	c.w.staged = appendHeaders(c.room(len(s.enc.b)+(len(s.enc.b)/c.peerMaxFrame+1)*frameHeaderBytes), s.id, s.enc.b, end, c.peerMaxFrame)
	if end {
		s.sentEndLocked()
	}
}

// body sends a body to its end, and the trailers behind it.
func (s *stream) body(b *http1.Body) error {
	b.Ahead(s)
	defer b.Ahead(nil)
	for {
		p, err := b.Next()
		if err != nil && !b.Done() {
			return err
		}
		done := b.Done()
		if done && b.Passed().Len() > 0 {
			if err := s.write(p, false); err != nil {
				return err
			}
			s.enc.b = s.enc.b[:0]
			(*http1.Edits)(nil).Each(b.Passed(), &s.enc)
			if err := s.writeHead(true); err != nil {
				return err
			}
			return s.Flush()
		}
		if err := s.write(p, done); err != nil {
			return err
		}
		if done {
			return s.Flush()
		}
	}
}

// wait waits for a wake-up; false: until came first. Zero is for ever.
func wait(ch chan struct{}, timer **time.Timer, until time.Time) bool {
	if until.IsZero() {
		<-ch
		return true
	}
	select {
	case <-ch:
		return true
	default:
	}
	left := time.Until(until)
	if left <= 0 {
		return false
	}
	if *timer == nil {
		*timer = time.NewTimer(left)
	} else {
		(*timer).Reset(left)
	}
	defer (*timer).Stop()
	select {
	case <-ch:
		return true
	case <-(*timer).C:
		return false
	}
}

// blame says what a failure of the stream means.
func (s *stream) blame(err error) *http1.Error {
	if s.srv != nil {
		return s.srv.blame(err)
	}
	return s.cli.blame(err)
}
