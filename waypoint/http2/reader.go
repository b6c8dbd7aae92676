package http2

import (
	"encoding/binary"
	"time"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// readLoop reads and handles frames until the connection ends.
func (c *conn) readLoop() error {
	if c.server != nil {
		c.preface = http2.ClientPreface
	}
	_ = c.raw.SetReadDeadline(time.Now().Add(c.cfg.HeadTimeout)) // until the first SETTINGS
	buf, r, w, full := c.borrow(smallBytes), 0, 0, false
	defer func() { c.giveBack(buf) }()
	for {
		if r == w {
			r, w = 0, 0
		}
		if r > 0 && w == len(buf) {
			w = copy(buf, buf[r:w])
			r = 0
		}
		if w == len(buf) || full && len(buf) == smallBytes { // a frame that does not fit, or more waits
			next := c.borrow(largeBytes)
			copy(next, buf[r:w])
			c.giveBack(buf)
			buf, r, w = next, 0, w-r
		}
		n, err := c.raw.Read(buf[w:])
		w += n
		full = w == len(buf)
		used, ferr := c.consume(buf[r:w])
		r += used
		c.goOn()
		if ferr == nil {
			ferr = c.answer(n)
		}
		if ferr != nil {
			return ferr
		}
		if err != nil {
			return err
		}
		if r == w && cap(buf) > smallBytes && n < smallBytes/2 { // an idle connection holds little
			c.giveBack(buf)
			buf, r, w = c.borrow(smallBytes), 0, 0
		}
	}
}

// answer sends what handling frames has staged.
func (c *conn) answer(n int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.heard = c.heard || n > 0
	if len(c.w.staged) > maxOwed {
		return errCalm // it asks and does not read the answers
	}
	c.kickLocked()
	return nil
}

// consume handles the whole frames that b begins with and returns how long they are.
func (c *conn) consume(b []byte) (int, error) {
	total := len(b)
	if c.preface != "" {
		n := min(len(b), len(c.preface))
		if string(b[:n]) != c.preface[:n] {
			return 0, connErrorf(http2.ErrCodeProtocol, "client preface expected")
		}
		c.preface, b = c.preface[n:], b[n:]
	}
	for len(b) >= frameHeaderBytes {
		h := parseFrameHeader(b)
		if h.length > recvMaxFrame {
			return 0, connErrorf(http2.ErrCodeFrameSize, "frame of %d bytes", h.length)
		}
		if len(b) < frameHeaderBytes+h.length {
			break
		}
		if err := c.frame(h, b[frameHeaderBytes:frameHeaderBytes+h.length]); err != nil {
			return 0, err
		}
		b = b[frameHeaderBytes+h.length:]
		if c.server != nil && len(c.server.fresh) >= maxFresh {
			c.goOn()
		}
	}
	return total - len(b), nil
}

// frame handles one frame.
func (c *conn) frame(h frameHeader, p []byte) error {
	if c.continuations > 0 && (h.typ != http2.FrameContinuation || h.stream != c.blockHeader.stream) {
		return connErrorf(http2.ErrCodeProtocol, "%s within a header block", h.typ)
	}
	if !c.settled && (h.typ != http2.FrameSettings || h.flags.Has(http2.FlagSettingsAck)) {
		return connErrorf(http2.ErrCodeProtocol, "%s before SETTINGS", h.typ) // RFC 9113, 3.4
	}
	lo, hi, onStream := 0, recvMaxFrame, true
	switch h.typ {
	case http2.FrameData, http2.FrameHeaders, http2.FrameContinuation:
	case http2.FramePriority:
		lo, hi = 5, 5
	case http2.FrameRSTStream:
		lo, hi = 4, 4
	case http2.FrameSettings:
		hi, onStream = maxSettingsFrame, false
	case http2.FramePing:
		lo, hi, onStream = 8, 8, false
	case http2.FrameGoAway:
		lo, onStream = 8, false
	case http2.FrameWindowUpdate:
		lo, hi, onStream = 4, 4, h.stream != 0
	case http2.FramePushPromise:
		return connErrorf(http2.ErrCodeProtocol, "push was not enabled")
	default:
		return c.spend() // unknown frames are ignored, RFC 9113, 5.5
	}
	if h.length < lo || h.length > hi {
		return connErrorf(http2.ErrCodeFrameSize, "%s of %d bytes", h.typ, h.length)
	}
	if onStream != (h.stream != 0) {
		return connErrorf(http2.ErrCodeProtocol, "%s on stream %d", h.typ, h.stream)
	}
	return c.handle(h, p)
}

func (c *conn) handle(h frameHeader, p []byte) error {
	switch h.typ {
	case http2.FrameData:
		return c.dataFrame(h, p)
	case http2.FrameHeaders:
		return c.headersFrame(h, p)
	case http2.FrameContinuation:
		return c.continuationFrame(h, p)
	case http2.FramePriority:
		if binary.BigEndian.Uint32(p)&maxStreamID == h.stream {
			return connErrorf(http2.ErrCodeProtocol, "stream %d depends on itself", h.stream)
		}
		return c.spend() // obsolete, RFC 9113, 5.3.2
	case http2.FrameRSTStream:
		return c.rstFrame(h, http2.ErrCode(binary.BigEndian.Uint32(p)))
	case http2.FrameSettings:
		return c.settingsFrame(h, p)
	case http2.FramePing:
		return c.pingFrame(h, [8]byte(p))
	case http2.FrameGoAway:
		c.goAwayFrame(binary.BigEndian.Uint32(p) & maxStreamID)
		return nil
	default: // WINDOW_UPDATE
		return c.windowUpdate(h, int(binary.BigEndian.Uint32(p)&maxWindow))
	}
}

// unpad removes padding (RFC 9113, 6.1).
func unpad(h frameHeader, p []byte) ([]byte, error) {
	if !h.flags.Has(http2.FlagDataPadded) { // HEADERS' is the same
		return p, nil
	}
	if len(p) == 0 || int(p[0]) >= len(p) {
		return nil, connErrorf(http2.ErrCodeProtocol, "padding exceeds the frame")
	}
	return p[1 : len(p)-int(p[0])], nil
}

func (c *conn) dataFrame(h frameHeader, p []byte) error {
	p, err := unpad(h, p)
	if err != nil {
		return err
	}
	end := h.flags.Has(http2.FlagDataEndStream)
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(p) == 0 && !end {
		if err := c.spendLocked(&c.budget.control); err != nil {
			return err
		}
	}
	if h.length > c.recvWindow {
		return connErrorf(http2.ErrCodeFlowControl, "%d bytes exceed the connection window", h.length)
	}
	c.recvWindow -= h.length
	c.reopenLocked()
	s, err := c.streamLocked(h)
	if err != nil {
		return err
	}
	if s == nil {
		return c.overLocked(h)
	}
	switch in := &s.in; {
	case s.gotEnd: // RFC 9113, 5.1: half-closed (remote)
		return s.provokedLocked(http2.ErrCodeStreamClosed)
	case s.cli != nil && !s.cli.responded.Load():
		return s.malformedLocked("DATA before the head")
	case h.length > in.window:
		return s.provokedLocked(http2.ErrCodeFlowControl)
	default:
		in.window -= h.length
		in.unacked += h.length - len(p) // padding is taken at once
		in.got += int64(len(p))
		if in.declared >= 0 && (in.got > in.declared || end && in.got != in.declared) {
			return s.malformedLocked("a body of another length than declared") // RFC 9113, 8.1.1
		}
		if len(p) > 0 && s.wantsLocked() {
			c.budget.control = min(c.budget.control+controlPerData, 2*fullBudget.control)
			s.received(p)
		}
		if end {
			s.gotEndLocked()
		}
	}
	return nil
}

// wantsLocked reports whether anybody will read what arrives.
func (s *stream) wantsLocked() bool { return s.srv == nil || !s.srv.deaf }

// gotEndLocked is END_STREAM from the peer.
func (s *stream) gotEndLocked() {
	s.gotEnd = true
	s.stirLocked()
	if s.sentEnd {
		s.c.endedLocked(s.id)
		s.c.forgetLocked(s)
	}
}

// malformedLocked resets a stream whose peer does not keep to HTTP (RFC 9113, 8.1.1).
func (s *stream) malformedLocked(why string) error {
	err := http1.Fail(http1.UpstreamBroken, connErrorf(http2.ErrCodeProtocol, "%s", why))
	if s.srv != nil {
		err = http1.Fail(http1.BadFraming, err.Err)
	}
	return s.resetForLocked(http2.ErrCodeProtocol, err)
}

// provokedLocked resets a stream whose peer does not keep to HTTP/2.
func (s *stream) provokedLocked(code http2.ErrCode) error {
	return s.resetForLocked(code, &resetError{code: code})
}

// resetForLocked resets a stream because of what its peer sent. What it cost us was for nothing, as if the client had reset it himself,
// and he gets no more of it (CVE-2025-8671): an error ends the connection.
func (s *stream) resetForLocked(code http2.ErrCode, err error) error {
	inVain := s.srv != nil && !s.srv.answered
	s.resetLocked(code, err)
	s.c.tellLater(s)
	if inVain {
		return s.c.spendLocked(&s.c.budget.resets)
	}
	return nil
}

// tellLater calls a stream's hook when no lock is held, and not on the reader's time: the end of an upstream may take some.
func (c *conn) tellLater(s *stream) {
	if c.err == nil {
		c.work.Go(s.tellGone)
	}
}

func (c *conn) rstFrame(h frameHeader, code http2.ErrCode) error {
	c.mu.Lock()
	s, err := c.streamLocked(h)
	if s == nil {
		if err == nil {
			err = c.spendLocked(&c.budget.control)
		}
		c.mu.Unlock()
		return err
	}
	if s.srv != nil && !s.srv.answered {
		err = c.spendLocked(&c.budget.resets)
	}
	if s.cli != nil && code == http2.ErrCodeNo && s.gotEnd { // it has answered, and wants no more of the request
		s.sentEnd = true
		wake(s.writable)
		c.forgetLocked(s)
		c.mu.Unlock()
		return err
	}
	s.endLocked(&resetError{code: code, remote: true})
	c.endedLocked(s.id)
	c.forgetLocked(s)
	c.tellLater(s)
	c.mu.Unlock()
	return err
}

func (c *conn) settingsFrame(h frameHeader, p []byte) error {
	if h.flags.Has(http2.FlagSettingsAck) {
		if len(p) > 0 {
			return connErrorf(http2.ErrCodeFrameSize, "SETTINGS ack with a payload")
		}
		return c.spend()
	}
	if len(p)%6 != 0 {
		return connErrorf(http2.ErrCodeFrameSize, "SETTINGS of %d bytes", len(p))
	}
	if !c.settled {
		c.settled = true
		_ = c.raw.SetReadDeadline(time.Time{})
	}
	if err := c.spend(); err != nil {
		return err
	}
	return c.applySettings(p)
}

// applySettings is RFC 9113, 6.5.2.
func (c *conn) applySettings(p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	window := c.peerWindow
	for ; len(p) > 0; p = p[6:] {
		set := http2.Setting{ID: http2.SettingID(binary.BigEndian.Uint16(p)), Val: binary.BigEndian.Uint32(p[2:])}
		if err := set.Valid(); err != nil || set.ID == http2.SettingEnablePush && set.Val != 0 && c.server == nil {
			code := http2.ErrCodeProtocol
			if set.ID == http2.SettingInitialWindowSize {
				code = http2.ErrCodeFlowControl
			}
			return connErrorf(code, "setting %v", set)
		}
		switch set.ID {
		case http2.SettingEnableConnectProtocol:
			if c.peerConnect && set.Val == 0 { // RFC 8441, 3
				return connErrorf(http2.ErrCodeProtocol, "extended CONNECT is taken back")
			}
			c.peerConnect = set.Val == 1
		case http2.SettingMaxConcurrentStreams:
			c.peerMaxStreams = set.Val
		case http2.SettingMaxFrameSize:
			c.peerMaxFrame = min(int(set.Val), 16384) // larger ones gain nothing here
		case http2.SettingInitialWindowSize:
			window = int(set.Val)
		}
	}
	if delta := window - c.peerWindow; delta != 0 { // the last word counts: each would visit every stream
		c.peerWindow = window
		for _, s := range c.streams {
			if s.sendWindow += delta; s.sendWindow > maxWindow {
				return connErrorf(http2.ErrCodeFlowControl, "stream window overflows")
			}
			wake(s.writable)
		}
	}
	if c.client != nil && !c.client.told {
		c.client.told = true
		close(c.client.settled)
	}
	c.w.staged = appendFrameHeader(c.room(frameHeaderBytes), 0, http2.FrameSettings, http2.FlagSettingsAck, 0)
	return nil
}

// drainPingData tells our ping of a drain from others.
var drainPingData = [8]byte{'d', 'r', 'a', 'i', 'n'}

func (c *conn) pingFrame(h frameHeader, data [8]byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.spendLocked(&c.budget.control); err != nil {
		return err
	}
	switch {
	case !h.flags.Has(http2.FlagPingAck):
		c.w.staged = appendPing(c.room(17), http2.FlagPingAck, data)
	case data == drainPingData && c.drainPing:
		c.nameLastLocked()
	default:
		c.pingSent = time.Time{}
	}
	return nil
}

// goAwayFrame is RFC 9113, 6.8: no new streams, and those the peer did not look at may be retried elsewhere. The others go
// on, whatever the code: if the peer wants more than that it closes the connection.
func (c *conn) goAwayFrame(last uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.server != nil {
		return // it opens no more, and nothing else changes
	}
	c.draining = true
	c.lastID = min(c.lastID, last)
	for id, s := range c.streams {
		if id > last {
			s.endLocked(ErrUnseen)
			c.forgetLocked(s)
		}
	}
	if len(c.streams) == 0 && c.err == nil {
		c.work.Go(func() { c.shut(http2.ErrCodeNo, errPeerClosed) })
	}
}

// tinyUpdate is what a window must be reopened by, if it is not to count as wasting our time.
const tinyUpdate = 64

// windowUpdate is RFC 9113, 6.9.
func (c *conn) windowUpdate(h frameHeader, n int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n < tinyUpdate {
		if err := c.spendLocked(&c.budget.control); err != nil {
			return err
		}
	}
	if h.stream == 0 {
		if n == 0 {
			return connErrorf(http2.ErrCodeProtocol, "window update of zero")
		}
		if c.w.window += n; c.w.window > maxWindow {
			return connErrorf(http2.ErrCodeFlowControl, "connection window overflows")
		}
		c.w.wakeLocked()
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
		return s.provokedLocked(code)
	}
	s.sendWindow += n
	wake(s.writable)
	return nil
}
