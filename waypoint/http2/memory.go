package http2

import (
	"cmp"
	"errors"
	"net"
	"slices"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// What a connection and a request are charged for besides buffers, in bytes: about what they take while nothing happens.
const (
	connBytes   = 8 << 10
	streamBytes = 4 << 10
)

var errNoMemory = errors.New("memory for connections is short, and nobody read")

// holder is a connection as memlimit sees it.
type holder struct{ *conn }

// RemoteAddr implements memlimit.Holder.
func (c holder) RemoteAddr() net.Addr { return c.raw.RemoteAddr() }

// Age implements memlimit.Holder.
func (c holder) Age() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := c.fed; s != nil; s = s.next {
		s.in.age++
	}
}

// Shed implements memlimit.Holder.
func (c holder) Shed(n int64, ages int) (streams int, bytes int64) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return 0, 0
	}
	var all []*stream
	for s := c.fed; s != nil; s = s.next {
		if s.in.slabs > 0 && s.in.age >= ages {
			all = append(all, s)
		}
	}
	slices.SortFunc(all, func(a, b *stream) int { return cmp.Compare(b.in.slabs, a.in.slabs) })
	var waiting []claim
	for _, s := range all {
		if bytes >= n {
			break
		}
		streams++
		bytes += int64(s.in.slabs)
		if x := s.claimLocked(); x != nil {
			waiting = append(waiting, claim{x, false})
		}
		code := http2.ErrCodeEnhanceYourCalm
		if s.cli != nil { // it has done nothing but answer
			code = http2.ErrCodeCancel
		}
		s.resetLocked(code, http1.Fail(http1.Overload, errNoMemory))
		c.tellLater(s)
	}
	c.mu.Unlock()
	for _, x := range waiting {
		x.handOver()
	}
	return streams, bytes
}
