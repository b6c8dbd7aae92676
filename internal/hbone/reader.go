package hbone

import (
	"encoding/binary"
	"errors"
	"io"
	"time"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/hbone/record"
)

const (
	maxSettingsFrame = 4 << 10
	maxGoAwayFrame   = 64 << 10
	maxContinuations = 64
)

// reader is the state of a connection's reader goroutine between two pieces of input.
type reader struct {
	preface  string // server: what is still to come of the client's preface
	settings bool   // the peer's first SETTINGS arrived

	// The DATA frame whose payload is being passed on as it comes.
	stream   *Stream // nil: thrown away
	dataLeft int
	padLeft  int
	end      bool // it carries END_STREAM
	inData   bool
	skip     int // bytes of a frame nobody wants

	headers       *headerDecoder
	block         []byte // header block so far, while CONTINUATION frames are due
	blockHeader   frameHeader
	continuations int // 0: no block is open

	// Payload for one stream that lies together in the decrypt buffer, gathered over several frames so that the
	// application's socket gets it by one system call.
	run       []byte
	runStream *Stream

	// To do without locks after the current frame.
	later      func()
	laterReset *Stream
	laterCode  http2.ErrCode
	laterEnd   *Stream
}

// provokedLocked resets a stream because of what its peer sent, once the current frame's locks are released. A client that has us reset
// what was begun for him gets no more of it than one who resets it himself (CVE-2025-8671): an error ends the connection.
func (c *conn) provokedLocked(s *Stream, code http2.ErrCode) error {
	c.in.laterReset, c.in.laterCode = s, code
	if c.server == nil || s.answered {
		return nil
	}
	return c.spendLocked(&c.budget.resets)
}

// settle does what handling a frame left for when no lock is held.
func (in *reader) settle() {
	if s := in.laterReset; s != nil {
		in.laterReset = nil
		s.reset(in.laterCode)
	}
	if s := in.laterEnd; s != nil {
		in.laterEnd = nil
		in.deliver() // what came before
		s.remoteEnd(nil)
	}
	if f := in.later; f != nil {
		in.later = nil
		f()
	}
}

// gather adds p, which lies in the decrypt buffer behind everything gathered before, to the run of s.
func (in *reader) gather(s *Stream, p []byte) {
	if in.runStream != s {
		in.deliver()
		in.runStream, in.run = s, p
		return
	}
	if end := len(in.run); end < cap(in.run) && &in.run[:end+1][end] == &p[0] {
		in.run = in.run[:end+len(p)]
		return
	}
	in.run = append(in.run, p...) // moves it down over the frame header between the two
}

// deliver hands the run to its stream.
func (in *reader) deliver() {
	if s := in.runStream; s != nil {
		p := in.run
		in.runStream, in.run = nil, nil
		s.receive(p)
	}
}

// readLoop reads and handles frames until the connection ends.
func (c *conn) readLoop() error {
	if c.server != nil {
		c.in.preface = http2.ClientPreface
	}
	var buf []byte
	kept := 0 // bytes at the start of buf that are not handled yet
	defer func() {
		if buf != nil {
			c.bc.giveBack(buf)
		}
		c.bc.release()
		c.rec.stopReading()
	}()
	for {
		if err := c.bc.wait(); err != nil {
			return readError(err)
		}
		if buf == nil {
			buf = c.bc.borrow()
		}
		left, err, ferr := c.receive(buf, kept)
		c.in.deliver()
		c.mu.Lock()
		if ferr == nil && len(c.w.staged) > maxOwed {
			ferr = errCalm // it asks and does not read the answers
		}
		if owed := c.rec.owed(); owed > c.w.update {
			c.w.update = owed
		}
		c.send(false)
		if ferr != nil {
			return ferr
		}
		if err != nil {
			return readError(err)
		}
		if kept = copy(buf, left); kept == 0 && !c.bc.buffered() {
			c.bc.giveBack(buf)
			buf = nil
		}
	}
}

// receive decrypts the records that are there, waiting for at least one, and handles their frames. The first kept bytes
// of buf are from before; left is what was not handled. Each record goes directly behind the payload gathered so far, so
// that of a frame of several records only the first has to be moved over the frame's header.
func (c *conn) receive(buf []byte, kept int) (left []byte, rerr, ferr error) {
	at, n := 0, kept // buf[at:n] is not handled yet
	for {
		n, rerr = c.rec.read(buf, n)
		var used int
		used, ferr = c.consume(buf[at:n])
		if at += used; at == n {
			at = c.in.gathered(buf)
			n = at
		}
		if rerr != nil || ferr != nil || len(buf)-n < record.OpenRoom || !c.bc.buffered() {
			return buf[at:n], rerr, ferr
		}
	}
}

// gathered is where in buf the gathered payload ends.
func (in *reader) gathered(buf []byte) int {
	if in.runStream == nil {
		return 0
	}
	return cap(buf) - cap(in.run) + len(in.run)
}

func readError(err error) error {
	if errors.Is(err, io.EOF) {
		return ErrPeerClosed
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return ErrTruncated
	}
	return err
}

// consume handles what it can of b and returns how much that was. It leaves less than one frame, never of DATA.
func (c *conn) consume(b []byte) (int, error) {
	in := &c.in
	total := len(b)
	for {
		switch {
		case in.preface != "":
			n := min(len(b), len(in.preface))
			if string(b[:n]) != in.preface[:n] {
				return 0, connErrorf(http2.ErrCodeProtocol, "client preface expected")
			}
			in.preface = in.preface[n:]
			if b = b[n:]; in.preface != "" {
				return total - len(b), nil
			}
		case in.skip > 0:
			n := min(len(b), in.skip)
			in.skip -= n
			b = b[n:]
		case in.inData:
			b = c.dataPayload(b)
		}
		if in.skip > 0 || in.inData || len(b) < frameHeaderBytes {
			if len(b) == 0 || !in.inData && in.skip == 0 {
				return total - len(b), nil
			}
			continue
		}
		n, err := c.frame(parseFrameHeader(b), b[frameHeaderBytes:])
		if err != nil || n < 0 {
			return total - len(b), err
		}
		b = b[frameHeaderBytes+n:]
		in.settle()
	}
}

// dataPayload passes on the payload of the current DATA frame and returns the rest of b.
func (c *conn) dataPayload(b []byte) []byte {
	in := &c.in
	if n := min(len(b), in.dataLeft); n > 0 {
		if in.stream != nil {
			in.gather(in.stream, b[:n])
		}
		in.dataLeft -= n
		b = b[n:]
	}
	if in.dataLeft == 0 && in.padLeft > 0 {
		n := min(len(b), in.padLeft)
		in.padLeft -= n
		b = b[n:]
	}
	if in.dataLeft == 0 && in.padLeft == 0 {
		if in.end && in.stream != nil {
			in.deliver()
			in.stream.remoteEnd(nil)
		}
		in.inData, in.stream = false, nil
	}
	return b
}

// frame handles a frame of which p and possibly more has arrived; it returns how much of p it used, or -1 when it needs
// more.
func (c *conn) frame(h frameHeader, p []byte) (int, error) {
	in := &c.in
	if h.length > recvMaxFrame {
		return 0, connErrorf(http2.ErrCodeFrameSize, "frame of %d bytes", h.length)
	}
	if in.continuations > 0 && (h.typ != http2.FrameContinuation || h.stream != in.blockHeader.stream) {
		return 0, connErrorf(http2.ErrCodeProtocol, "%s within a header block", h.typ)
	}
	if !in.settings && (h.typ != http2.FrameSettings || h.flags.Has(http2.FlagSettingsAck)) {
		return 0, connErrorf(http2.ErrCodeProtocol, "%s before SETTINGS", h.typ) // RFC 9113, 3.4
	}
	if h.typ == http2.FrameData {
		return c.dataFrame(h, p)
	}
	in.deliver()
	lo, hi := 0, 0
	onStream := true
	switch h.typ {
	case http2.FrameHeaders, http2.FrameContinuation:
		hi = 2*in.headers.limit + 256 + 6
	case http2.FramePriority:
		lo, hi = 5, 5
	case http2.FrameRSTStream:
		lo, hi = 4, 4
	case http2.FrameSettings:
		hi, onStream = maxSettingsFrame, false
	case http2.FramePing:
		lo, hi, onStream = 8, 8, false
	case http2.FrameGoAway:
		lo, hi, onStream = 8, maxGoAwayFrame, false
	case http2.FrameWindowUpdate:
		lo, hi, onStream = 4, 4, h.stream != 0
	case http2.FramePushPromise:
		return 0, connErrorf(http2.ErrCodeProtocol, "push was not enabled")
	default:
		in.skip = h.length // unknown frames are ignored, RFC 9113, 5.5
		return 0, c.spend()
	}
	if h.length < lo || h.length > hi {
		code := http2.ErrCodeFrameSize
		if h.length > hi && (h.typ == http2.FrameHeaders || h.typ == http2.FrameContinuation) {
			code = http2.ErrCodeEnhanceYourCalm
		}
		return 0, connErrorf(code, "%s of %d bytes", h.typ, h.length)
	}
	if onStream != (h.stream != 0) {
		return 0, connErrorf(http2.ErrCodeProtocol, "%s on stream %d", h.typ, h.stream)
	}
	if len(p) < h.length {
		return -1, nil
	}
	return h.length, c.wholeFrame(h, p[:h.length])
}

func (c *conn) wholeFrame(h frameHeader, p []byte) error {
	switch h.typ {
	case http2.FrameHeaders:
		return c.headersFrame(h, p)
	case http2.FrameContinuation:
		return c.continuationFrame(h, p)
	case http2.FramePriority:
		return c.spend() // obsolete, RFC 9113, 5.3.2
	case http2.FrameRSTStream:
		return c.rstFrame(h, http2.ErrCode(binary.BigEndian.Uint32(p)))
	case http2.FrameSettings:
		return c.settingsFrame(h, p)
	case http2.FramePing:
		return c.pingFrame(h, [8]byte(p))
	case http2.FrameGoAway:
		return c.goAwayFrame(binary.BigEndian.Uint32(p)&maxStreamID, http2.ErrCode(binary.BigEndian.Uint32(p[4:])))
	case http2.FrameWindowUpdate:
		return c.windowUpdate(h, int(binary.BigEndian.Uint32(p)&maxWindow))
	}
	return nil
}

// dataFrame handles the start of a DATA frame; its payload follows by dataPayload as it arrives.
func (c *conn) dataFrame(h frameHeader, p []byte) (int, error) {
	in := &c.in
	if h.stream == 0 {
		return 0, connErrorf(http2.ErrCodeProtocol, "DATA on stream 0")
	}
	used, pad := 0, 0
	if h.flags.Has(http2.FlagDataPadded) {
		if h.length == 0 {
			return 0, connErrorf(http2.ErrCodeFrameSize, "padded DATA without a pad length")
		}
		if len(p) == 0 {
			return -1, nil
		}
		used, pad = 1, int(p[0])
		if pad >= h.length {
			return 0, connErrorf(http2.ErrCodeProtocol, "padding exceeds the frame")
		}
	}
	in.end = h.flags.Has(http2.FlagDataEndStream)
	in.dataLeft, in.padLeft = h.length-used-pad, pad

	c.mu.Lock()
	defer c.mu.Unlock()
	if in.dataLeft == 0 && !in.end {
		if err := c.spendLocked(&c.budget.control); err != nil {
			return 0, err
		}
	}
	if err := c.recvConnLocked(h.length); err != nil {
		return 0, err
	}
	s, err := c.streamLocked(h)
	if err != nil {
		return 0, err
	}
	if s != nil && s.gotEnd { // RFC 9113, 5.1: half-closed (remote)
		if err := c.provokedLocked(s, http2.ErrCodeStreamClosed); err != nil {
			return 0, err
		}
		s = nil
	}
	if s != nil && !s.reserve(h.length, used+pad) {
		if err := c.provokedLocked(s, http2.ErrCodeFlowControl); err != nil {
			return 0, err
		}
		s = nil
	}
	in.stream = s
	in.inData = in.dataLeft > 0 || in.padLeft > 0
	if !in.inData && in.end && s != nil {
		in.laterEnd = s
	}
	return used, nil
}

// reserve counts a DATA frame against the stream's window; its padding is taken at once.
func (s *Stream) reserve(n, padding int) bool {
	in := &s.in
	in.mu.Lock()
	defer in.mu.Unlock()
	if n > in.window {
		return false
	}
	in.window -= n
	in.unacked += padding
	return true
}

// streamLocked finds the stream of a frame. It is nil, without error, for a stream that is over: its peer may not know
// yet. A stream that never was is the peer's fault (RFC 9113, 5.1).
func (c *conn) streamLocked(h frameHeader) (*Stream, error) {
	if s := c.streams[h.stream]; s != nil {
		return s, nil
	}
	idle := h.stream >= c.nextID || h.stream%2 == 0
	if c.server != nil {
		idle = h.stream > c.maxPeerID || h.stream%2 == 0
	}
	if idle {
		return nil, connErrorf(http2.ErrCodeProtocol, "%s on idle stream %d", h.typ, h.stream)
	}
	return nil, nil
}

// remoteEnd is END_STREAM from the peer (err nil), or RST_STREAM.
func (s *Stream) remoteEnd(err error) {
	c := s.c
	c.mu.Lock()
	s.gotEnd = true
	if err != nil {
		s.sentEnd = true
		s.dropOutLocked(err)
	}
	if s.sentEnd {
		c.forgetLocked(s)
	}
	c.mu.Unlock()
	s.endReceive(err)
}

func (c *conn) rstFrame(h frameHeader, code http2.ErrCode) error {
	c.mu.Lock()
	s, err := c.streamLocked(h)
	if s == nil {
		c.mu.Unlock()
		if err == nil {
			err = c.spend()
		}
		return err
	}
	answered := s.answered
	if c.server != nil && !answered {
		err = c.spendLocked(&c.budget.resets)
	}
	c.mu.Unlock()
	reset := &ResetError{Code: uint32(code), Remote: true}
	s.peerReset(reset, answered)
	return err
}

// peerReset ends both halves. NO_ERROR and CANCEL read as an end of an established stream, not as an error.
func (s *Stream) peerReset(reset *ResetError, answered bool) {
	mild := answered && (http2.ErrCode(reset.Code) == http2.ErrCodeNo || http2.ErrCode(reset.Code) == http2.ErrCodeCancel)
	if mild {
		s.endReceive(nil)
	}
	s.remoteEnd(reset)
	if s.cancel != nil && !mild {
		s.cancel(reset)
	}
	s.wasReset()
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
	c.in.settings = true
	if err := c.spend(); err != nil {
		return err
	}
	return c.applySettings(p)
}

func (c *conn) pingFrame(h frameHeader, data [8]byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.spendLocked(&c.budget.control); err != nil {
		return err
	}
	if !h.flags.Has(http2.FlagPingAck) {
		c.w.staged = appendPing(c.w.staged, http2.FlagPingAck, data)
		return nil
	}
	if data == drainPingData && c.drainPing {
		c.nameLastLocked()
		if len(c.streams) == 0 {
			c.in.later = func() { c.shut(http2.ErrCodeNo, ErrClosed) }
		}
		return nil
	}
	c.pingSentAt = time.Time{}
	return nil
}

// goAwayFrame is RFC 9113, 6.8: no new streams, and those the peer did not process may be retried elsewhere.
func (c *conn) goAwayFrame(last uint32, code http2.ErrCode) error {
	c.mu.Lock()
	c.draining.Store(true)
	var refused []*Stream
	if c.server == nil {
		for id, s := range c.streams {
			if id > last {
				refused = append(refused, s)
			}
		}
	}
	idle := len(c.streams) == len(refused)
	c.mu.Unlock()
	for _, s := range refused {
		s.remoteEnd(errRefused)
	}
	if code != http2.ErrCodeNo {
		return &goneError{code}
	}
	if idle && c.server == nil {
		return ErrPeerClosed
	}
	return nil
}

// goneError ends a connection whose peer sent GOAWAY with an error.
type goneError struct{ code http2.ErrCode }

func (e *goneError) Error() string { return "http2: peer sent GOAWAY: " + e.code.String() }
