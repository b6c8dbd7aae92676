package hbone

import (
	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/memlimit"
)

// The connection's window and the streams' windows do different work. A stream's window reopens when the application
// took the bytes, so it bounds what one slow application can make us hold. The connection's window reopens on receipt,
// so streams nobody reads cannot close it for the others; only when maxConnBuffered bytes wait, or memory is too short for all that
// wait on all connections, does it stay shut or become smaller.

// recvConn counts a DATA frame of n bytes against the connection's window. It is called with c.mu held.
func (c *conn) recvConnLocked(n int) error {
	if n > c.recvWindow {
		return connErrorf(http2.ErrCodeFlowControl, "%d bytes exceed the connection window", n)
	}
	c.recvWindow -= n
	c.reopenLocked()
	return nil
}

// firstWindow is the connection's window at its start. Where memory is counted it is small until it is used: it cannot be taken back.
func (c *conn) firstWindow() int {
	if c.mem == nil {
		return recvConnWindow
	}
	return max(c.mem.Window(memlimit.FirstWindow), defaultWindow)
}

// reopenLocked makes the connection's window as large as memory allows when half of it is used.
func (c *conn) reopenLocked() {
	if c.recvWindow > c.recvSize/2 {
		return
	}
	c.withheld.Store(true) // before it is looked at what waits: who takes of that looks at withheld afterwards
	size := c.mem.Window(recvConnWindow)
	if c.buffered.Load() > maxConnBuffered || size-c.recvWindow < leastUpdate {
		return
	}
	c.withheld.Store(false)
	c.w.staged = appendWindowUpdate(c.w.staged, 0, size-c.recvWindow)
	c.recvWindow, c.recvSize = size, size
}

// credit returns n bytes of the stream's window to the peer, and the connection's if that was withheld: also with n 0, when what
// the stream held is dropped rather than read, or the others would wait for ever.
func (s *Stream) credit(n int) {
	c := s.c
	if n == 0 && !c.withheld.Load() {
		return
	}
	c.mu.Lock()
	if n > 0 && !s.gotEnd {
		c.w.staged = appendWindowUpdate(c.w.staged, s.id, n)
	}
	c.reopenLocked()
	c.send(false)
}

// windowUpdate is RFC 9113, 6.9.
func (c *conn) windowUpdate(h frameHeader, n int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h.stream == 0 {
		if n == 0 {
			return connErrorf(http2.ErrCodeProtocol, "window update of zero")
		}
		if c.w.window += n; c.w.window > maxWindow {
			return connErrorf(http2.ErrCodeFlowControl, "connection window overflows")
		}
		return nil
	}
	s, err := c.streamLocked(h)
	if s == nil {
		return err
	}
	if n == 0 || s.sendWindow+n > maxWindow {
		code := http2.ErrCodeFlowControl
		if n == 0 {
			code = http2.ErrCodeProtocol
		}
		return c.provokedLocked(s, code)
	}
	s.sendWindow += n
	if len(s.out) > 0 && s.sendWindow > 0 {
		c.w.enqueue(s)
	}
	return nil
}

// applySettings is RFC 9113, 6.5.2.
func (c *conn) applySettings(p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	window := c.peerWindow
	for ; len(p) > 0; p = p[6:] {
		id := http2.SettingID(uint16(p[0])<<8 | uint16(p[1]))
		val := uint32(p[2])<<24 | uint32(p[3])<<16 | uint32(p[4])<<8 | uint32(p[5])
		if err := (http2.Setting{ID: id, Val: val}).Valid(); err != nil {
			code := http2.ErrCodeProtocol
			if id == http2.SettingInitialWindowSize {
				code = http2.ErrCodeFlowControl
			}
			return connErrorf(code, "setting %v", http2.Setting{ID: id, Val: val})
		}
		switch id {
		case http2.SettingMaxConcurrentStreams:
			c.peerMaxStreams = val
		case http2.SettingMaxFrameSize:
			c.peerMaxFrame = int(val)
		case http2.SettingInitialWindowSize:
			window = int(val)
		}
	}
	if delta := window - c.peerWindow; delta != 0 { // the last word counts: each would visit every stream
		c.peerWindow = window
		for _, s := range c.streams {
			if s.sendWindow += delta; s.sendWindow > maxWindow {
				return connErrorf(http2.ErrCodeFlowControl, "stream window overflows")
			}
			if len(s.out) > 0 && s.sendWindow > 0 {
				c.w.enqueue(s)
			}
		}
	}
	c.w.staged = appendFrameHeader(c.w.staged, 0, http2.FrameSettings, http2.FlagSettingsAck, 0)
	return nil
}
