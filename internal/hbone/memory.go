package hbone

import (
	"cmp"
	"iter"
	"net"
	"slices"

	"golang.org/x/net/http2"
)

// What a connection and a stream of a server are charged for besides what they receive, in bytes: about what they take while nothing
// happens. Slabs of a batch are charged while they are in use.
const (
	connBytes   = 32 << 10
	streamBytes = 4 << 10
)

// RemoteAddr implements memlimit.Holder.
func (c *conn) RemoteAddr() net.Addr { return c.raw.RemoteAddr() }

// Age implements memlimit.Holder.
func (c *conn) Age() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.holdingLocked() {
		s.in.mu.Lock()
		s.in.age++
		s.in.mu.Unlock()
	}
}

// lingerLocked keeps a stream that is over in sight while it holds something.
func (c *conn) lingerLocked(s *Stream) {
	if c.mem == nil || s.slabs() == 0 {
		return
	}
	if c.lingering == nil {
		c.lingering = make(map[*Stream]struct{})
	}
	c.lingering[s] = struct{}{}
}

// forgetReadLocked forgets those of which everything was read.
func (c *conn) forgetReadLocked() {
	for s := range c.lingering {
		if s.slabs() == 0 {
			delete(c.lingering, s)
		}
	}
	if len(c.lingering) == 0 {
		c.lingering = nil
	}
}

// holdingLocked are the streams that may hold something.
func (c *conn) holdingLocked() iter.Seq[*Stream] {
	return func(yield func(*Stream) bool) {
		for _, s := range c.streams {
			if !yield(s) {
				return
			}
		}
		for s := range c.lingering {
			if !yield(s) {
				return
			}
		}
	}
}

// slabs is how many bytes the stream is charged for.
func (s *Stream) slabs() int {
	s.in.mu.Lock()
	defer s.in.mu.Unlock()
	return s.in.slabs
}

// Shed implements memlimit.Holder.
func (c *conn) Shed(n int64, ages int) (streams int, bytes int64) {
	type stalled struct {
		s     *Stream
		slabs int
	}
	var all []stalled
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, 0
	}
	for s := range c.holdingLocked() {
		s.in.mu.Lock()
		if s.in.slabs > 0 && s.in.age >= ages {
			all = append(all, stalled{s, s.in.slabs})
		}
		s.in.mu.Unlock()
	}
	slices.SortFunc(all, func(a, b stalled) int { return cmp.Compare(b.slabs, a.slabs) })
	for _, x := range all {
		if bytes >= n {
			break
		}
		c.handlers.Go(x.s.shed) // its owner's end may take time
		streams++
		bytes += int64(x.slabs)
	}
	return streams, bytes
}

// shed ends a stream for the sake of others.
func (s *Stream) shed() {
	s.c.mu.Lock()
	s.resetLocked(http2.ErrCodeEnhanceYourCalm, ErrNoMemory)
	s.c.send(false)
	s.closeReceive(ErrNoMemory)
	if s.cancel != nil {
		s.cancel(ErrNoMemory)
	}
}

// discard ends a connection that was never served.
func (c *conn) discard() {
	c.fail(ErrClosed)
	c.bc.release()
}
