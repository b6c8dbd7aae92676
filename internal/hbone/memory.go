package hbone

import (
	"cmp"
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
	for _, s := range c.streams {
		s.in.mu.Lock()
		s.in.age++
		s.in.mu.Unlock()
	}
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
	for _, s := range c.streams {
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
