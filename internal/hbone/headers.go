package hbone

import (
	"context"
	"strconv"

	"golang.org/x/net/http2"
)

func (c *conn) headersFrame(h frameHeader, p []byte) error {
	in := &c.in
	if h.flags.Has(http2.FlagHeadersPadded) {
		if len(p) == 0 || int(p[0]) >= len(p) {
			return connErrorf(http2.ErrCodeProtocol, "padding exceeds the frame")
		}
		p = p[1 : len(p)-int(p[0])]
	}
	if h.flags.Has(http2.FlagHeadersPriority) {
		if len(p) < 5 {
			return connErrorf(http2.ErrCodeFrameSize, "HEADERS too short for its priority")
		}
		p = p[5:]
	}
	if h.flags.Has(http2.FlagHeadersEndHeaders) {
		return c.headerBlock(h, p)
	}
	in.blockHeader = h
	in.continuations = 1
	in.block = append(in.block[:0], p...)
	return nil
}

func (c *conn) continuationFrame(h frameHeader, p []byte) error {
	in := &c.in
	if in.continuations == 0 {
		return connErrorf(http2.ErrCodeProtocol, "CONTINUATION without HEADERS")
	}
	in.continuations++
	if in.continuations > maxContinuations || len(in.block)+len(p) > 2*in.headers.limit {
		return errCalm // decoding it all only to refuse it would be the peer's gain
	}
	in.block = append(in.block, p...)
	if !h.flags.Has(http2.FlagContinuationEndHeaders) {
		return nil
	}
	block := in.block
	in.block, in.continuations = nil, 0
	return c.headerBlock(in.blockHeader, block)
}

// headerBlock handles a complete header block.
func (c *conn) headerBlock(h frameHeader, block []byte) error {
	m, err := c.in.headers.decode(block)
	if err != nil {
		return err
	}
	end := h.flags.Has(http2.FlagHeadersEndStream)
	c.mu.Lock()
	s := c.streams[h.stream]
	switch {
	case s != nil && c.server == nil && !s.answered:
		c.mu.Unlock()
		c.answer(s, m, end)
		return nil
	case s != nil:
		// A tunnel carries DATA only, no trailers (RFC 9113, 8.5).
		err := c.provokedLocked(s, http2.ErrCodeProtocol)
		c.mu.Unlock()
		return err
	case c.server == nil || h.stream <= c.maxPeerID:
		_, err := c.streamLocked(h)
		if err == nil {
			err = c.spendLocked(&c.budget.control) // of a stream we gave up
		}
		c.mu.Unlock()
		return err
	case h.stream%2 == 0:
		c.mu.Unlock()
		return connErrorf(http2.ErrCodeProtocol, "client opened stream %d", h.stream)
	}
	defer c.mu.Unlock()
	c.maxPeerID = h.stream
	if h.stream > c.lastID {
		return nil // after our last GOAWAY; the client retries elsewhere
	}
	if limit := c.server.maxStreams(); len(c.streams) >= limit || c.running >= limit || c.bc.mem.Full() {
		// A stream counts until its handler has returned, whatever the client resets.
		c.w.staged = appendRSTStream(c.w.staged, h.stream, http2.ErrCodeRefusedStream)
		return c.spendLocked(&c.budget.resets)
	}
	c.requestLocked(h.stream, m, end)
	return nil
}

// requestLocked starts a stream of the server and its handler.
func (c *conn) requestLocked(id uint32, m *message, end bool) {
	s := newStream(c, id)
	s.gotEnd, s.in.end = end, end
	c.streams[id] = s
	c.budget.control += controlPerStream
	r := &Request{
		Method: m.method, Authority: m.authority, Header: m.header,
		RemoteAddr: c.remote, LocalAddr: c.local, TLS: c.state,
		stream: s,
	}
	refuse := 0
	switch {
	case m.oversize:
		refuse = 431
	case m.malformed != "" || m.method == "":
		refuse = 400
	case m.method == "CONNECT" && (m.authority == "" || m.scheme != "" || m.path != "" || m.protocol != ""):
		refuse = 400 // RFC 9113, 8.5; we do not offer RFC 8441
	}
	if refuse != 0 {
		c.in.later = func() { r.Reject(refuse) }
		return
	}
	var ctx context.Context
	ctx, s.cancel = context.WithCancelCause(c.ctx)
	c.running++
	c.bc.mem.Charge(streamBytes)
	c.handlers.Go(func() { c.handle(ctx, r) })
}

// handle runs the server's handler for one stream and leaves nothing of the stream behind.
func (c *conn) handle(ctx context.Context, r *Request) {
	s := r.stream
	defer func() {
		if !s.kept {
			s.over()
		}
	}()
	c.server.Handle(ctx, r)
}

// over ends what a stream's handler was running for.
func (s *Stream) over() {
	c := s.c
	s.finish()
	s.cancel(context.Canceled)
	c.mu.Lock()
	c.running--
	c.mu.Unlock()
	c.bc.mem.Release(streamBytes)
}

// Keep makes an accepted stream outlast its handler, which calls it at most once: the stream, its context and its connection go on
// until Done. Whoever serves it then needs no goroutine while there is nothing to do; Notify tells when there is.
func (s *Stream) Keep() {
	s.kept = true
	s.c.handlers.Add(1)
}

// Done ends a stream that was kept, as the return of its handler does for others.
func (s *Stream) Done() {
	s.over()
	s.c.handlers.Done()
}

// finish ends a stream whose handler has returned.
func (s *Stream) finish() {
	s.c.mu.Lock()
	answered := s.answered
	s.c.mu.Unlock()
	if !answered {
		s.reset(http2.ErrCodeInternal)
		return
	}
	s.Close()
}

// answer handles the header block of an answer on the client side.
func (c *conn) answer(s *Stream, m *message, end bool) {
	status, err := strconv.Atoi(m.status)
	if err != nil || len(m.status) != 3 || m.malformed != "" || m.oversize || status < 200 && end {
		s.reset(http2.ErrCodeProtocol)
		return
	}
	if status < 200 {
		if c.spend() != nil { // informational answers carry nothing for a tunnel
			s.reset(http2.ErrCodeEnhanceYourCalm)
		}
		return
	}
	c.mu.Lock()
	s.answered = true
	c.mu.Unlock()
	s.baggage = m.header.Baggage
	s.in.mu.Lock()
	s.in.status = status
	s.in.mu.Unlock()
	s.wakeReader()
	if end {
		s.remoteEnd(nil)
	}
}
