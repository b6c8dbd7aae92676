package http2

import (
	"context"
	"errors"
	"net"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// maxUpstreamStreams is how many streams an upstream's connection carries at once unless Config says otherwise.
const maxUpstreamStreams = 100

// ClientConn is a connection to an upstream that carries many exchanges at once. Safe for concurrent use.
type ClientConn struct {
	conn

	settled chan struct{} // closed when the peer's first SETTINGS have come

	// Guarded by mu.
	told  bool // settled is closed
	open  int  // streams that were handed out
	free  []*ClientStream
	asked int // requests over its life

	// Of the reader goroutine: what is decoded, before its stream is known to be there still.
	resp http1.Response
}

// NewClientConn makes a connection of conn, which it owns from now on, to a server that is known to speak HTTP/2.
func NewClientConn(raw net.Conn, cfg Config) *ClientConn {
	if cfg.MaxStreams <= 0 {
		cfg.MaxStreams = maxUpstreamStreams
	}
	c := &ClientConn{settled: make(chan struct{})}
	c.client = c
	c.init(raw, cfg)
	c.greet(http2.Setting{ID: http2.SettingEnablePush, Val: 0})
	return c
}

// Run serves the connection until it ends and returns why; nil when both sides were done with it.
func (c *ClientConn) Run() error {
	c.start()
	return c.run()
}

// Open returns a stream for one exchange, or nil: the connection has no room, or takes no more. The stream is to be ended
// by End, Drop or Cancel, and then given back by Free.
func (c *ClientConn) Open() *ClientStream {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.usableLocked() || c.open >= min(c.cfg.MaxStreams, int(c.peerMaxStreams)) {
		return nil
	}
	c.open++
	c.asked++
	if c.cfg.MaxRequests > 0 && c.asked >= c.cfg.MaxRequests {
		c.spent = true
	}
	var st *ClientStream
	if n := len(c.free); n > 0 {
		st = c.free[n-1]
		c.free[n-1] = nil
		c.free = c.free[:n-1]
	} else {
		st = &ClientStream{}
		st.cli = st
	}
	st.begin(&c.conn, 0)
	st.ready, st.held = false, true
	st.responded.Store(false)
	return st
}

func (c *ClientConn) usableLocked() bool {
	return c.err == nil && !c.draining && !c.spent && c.nextID <= maxStreamID
}

// Usable reports whether the connection takes more streams, now or when others have ended.
func (c *ClientConn) Usable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.usableLocked()
}

// Idle returns since when there has been no stream; not ok when there is one.
func (c *ClientConn) Idle() (since time.Time, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.idleSince, c.open == 0
}

// Retire makes the connection end with the streams it has.
func (c *ClientConn) Retire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spent = true
	c.closeIfSpentLocked()
}

func (c *ClientConn) closeIfSpentLocked() {
	if (c.spent || c.draining) && c.open == 0 && c.err == nil {
		c.work.Go(func() { c.shut(http2.ErrCodeNo, errClosed) })
	}
}

// Close ends the connection at once.
func (c *ClientConn) Close() { c.fail(errClosed) }

// ClientStream carries one exchange. It is an http1.Upstream.
type ClientStream struct {
	stream
	method    string
	resp      http1.Response // as handed out
	responded atomic.Bool    // the final head came

	// Guarded by conn.mu.
	next  http1.Response // came, and was not handed out
	ready bool           // next is one
	held  bool           // by who opened it
	use   uint32         // which one this is of the stream's memory

	waits  *Exchange // that goes on with the response, without a goroutine that waits for it; nil: there is none
	listed bool      // in conn.stirred
}

// Use is a mark of this use of the stream, for Cancel.
func (st *ClientStream) Use() uint32 { return st.use }

// Cancel ends the exchange at once if it is still the one of that mark. Safe to call at any time from any goroutine.
func (st *ClientStream) Cancel(use uint32) {
	st.c.mu.Lock()
	var x *Exchange
	if st.use == use {
		st.closeLocked()
		if st.err != nil { // else it is whole, and about to be passed on
			x = st.claimLocked()
		}
	}
	st.c.mu.Unlock()
	if x != nil {
		claim{x, false}.handOver()
	}
}

// Extended waits until the peer has said whether it takes extended CONNECT (RFC 8441, 3), and reports it; false also when
// ctx or the connection ends before.
func (st *ClientStream) Extended(ctx context.Context) bool {
	c := st.c.client
	select {
	case <-c.settled:
	case <-c.done:
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.peerConnect && c.err == nil
}

// SetDeadline bounds the exchange: every wait of it. The zero time takes the bound away.
func (st *ClientStream) SetDeadline(t time.Time) {
	st.c.mu.Lock()
	st.deadline = t
	st.c.mu.Unlock()
}

// Hasten is SetDeadline while another goroutine waits: that sees it, too. The zero time changes nothing.
func (st *ClientStream) Hasten(t time.Time) {
	if t.IsZero() {
		return
	}
	st.c.mu.Lock()
	st.deadline = t
	st.c.mu.Unlock()
	wake(st.readable)
}

// Begin implements http1.Upstream.
func (st *ClientStream) Begin(q *http1.Request, e *http1.Edits) error {
	if err := e.Failed(); err != nil {
		return err
	}
	st.request(q, e)
	tunnel := q.Upgrade != ""
	end := (q.Body.Absent() || q.Body.Done() && q.Body.Trailers().Len() == 0) && !tunnel
	c := st.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := st.mayBeginLocked(); err != nil {
		return st.blame(err)
	}
	if tunnel && !c.peerConnect {
		return st.blame(connErrorf(http2.ErrCodeProtocol, "the peer takes no extended CONNECT"))
	}
	st.beginLocked(q.Method, tunnel)
	st.stageHeadLocked(end)
	return nil
}

// mayBeginLocked reports why the request cannot be put on the connection. If that is for the connection, whatever it ended
// of, the upstream has seen nothing of the request, which is as good as refused.
func (st *ClientStream) mayBeginLocked() error {
	switch c := st.c; {
	case st.err != nil:
		return st.err
	case c.err != nil, c.draining, c.nextID > maxStreamID:
		return ErrUnseen
	}
	return nil
}

// beginLocked makes it a stream of the connection.
func (st *ClientStream) beginLocked(method string, tunnel bool) {
	c := st.c
	if st.method = method; tunnel {
		st.method = "CONNECT"
	}
	st.tunnel = tunnel
	st.id = c.nextID
	c.nextID += 2
	st.sendWindow = c.peerWindow
	c.streams[st.id] = &st.stream
	c.budget.control = min(c.budget.control+controlPerStream, 2*fullBudget.control)
}

// request encodes a request's head.
func (st *ClientStream) request(q *http1.Request, e *http1.Edits) {
	enc := &st.enc
	enc.b = enc.b[:0]
	switch {
	case q.Upgrade != "":
		enc.named(indexMethodName, "CONNECT")
		enc.Field(":protocol", q.Upgrade)
	case q.Method == "GET":
		enc.indexed(indexGET)
	case q.Method == "POST":
		enc.indexed(indexPOST)
	default:
		enc.named(indexMethodName, q.Method)
	}
	if q.Scheme == "https" {
		enc.indexed(indexHTTPS)
	} else {
		enc.indexed(indexHTTP)
	}
	host := e.Host()
	if host == "" {
		host = q.Authority
	}
	if host != "" {
		enc.named(indexAuthority, host)
	}
	switch target := e.Target(); {
	case target != "":
		enc.named(indexPath, target)
	case q.Query:
		enc.b = appendInt(enc.b, 0, 4, indexPath)
		enc.b = appendInt(enc.b, 0, 7, len(q.Path)+1+len(q.RawQuery))
		enc.b = append(enc.b, q.Path...)
		enc.b = append(enc.b, '?')
		enc.b = append(enc.b, q.RawQuery...)
	default:
		enc.named(indexPath, q.Path)
	}
	e.Each(&q.Fields, enc)
	if n, ok := q.Declared(); ok && q.Upgrade == "" {
		st.length(n)
	}
	if q.TrailersWanted() {
		enc.Field("te", "trailers")
	}
}

// SendBody implements http1.Upstream.
func (st *ClientStream) SendBody(b *http1.Body) error {
	st.c.mu.Lock()
	sent := st.sentEnd || st.tunnel
	st.c.mu.Unlock()
	if sent {
		return st.Flush()
	}
	return st.body(b)
}

// ReadResponse implements http1.Upstream.
func (st *ClientStream) ReadResponse() (*http1.Response, error) {
	c := st.c
	for {
		c.mu.Lock()
		if st.ready {
			st.ready = false
			st.resp, st.next = st.next, st.resp
			c.mu.Unlock()
			return &st.resp, nil
		}
		err, until, over := st.err, st.deadline, st.gotEnd
		c.mu.Unlock()
		switch {
		case err != nil && !until.IsZero() && !time.Now().Before(until): // an upstream that knows the time, too, was quicker to say so
			return nil, st.blame(os.ErrDeadlineExceeded)
		case err != nil:
			return nil, st.blame(err)
		case over:
			return nil, http1.Fail(http1.UpstreamBroken, errors.New("no response"))
		}
		if !wait(st.readable, &st.readTimer, until) {
			return nil, st.blame(os.ErrDeadlineExceeded)
		}
	}
}

// End implements http1.Upstream. The response may still be looked at, and a tunnel goes on.
func (st *ClientStream) End() {
	if !st.resp.Tunnel {
		_ = st.Close()
	}
}

// Drop implements http1.Upstream.
func (st *ClientStream) Drop() { _ = st.Close() }

// Close implements http1.Upstream.
func (st *ClientStream) Close() error {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	st.closeLocked()
	return nil
}

func (st *ClientStream) closeLocked() {
	if st.held && st.err == nil && !(st.sentEnd && st.gotEnd) {
		st.resetLocked(http2.ErrCodeCancel, &resetError{code: http2.ErrCodeCancel})
	}
}

// Free gives the stream back to its connection, after the exchange. Neither it nor the response may be looked at any more.
func (st *ClientStream) Free() {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	if !st.held {
		return
	}
	st.closeLocked()
	st.held = false
	st.use++
	st.in.freeLocked(st.c)
	st.unfeedLocked()
	c := st.c.client
	if c.open--; c.open == 0 {
		c.idleSince = time.Now()
	}
	if len(c.free) < c.cfg.workersToKeep {
		c.free = append(c.free, st)
	}
	c.closeIfSpentLocked()
}

// responseBlock is a response head, or the trailers of one.
func (c *conn) responseBlock(h frameHeader, block []byte) error {
	c.mu.Lock()
	s, err := c.streamLocked(h)
	if s == nil {
		if err == nil {
			err = c.overLocked(h)
		}
		c.mu.Unlock()
		if err != nil {
			return err
		}
		return c.discard(block)
	}
	method := s.cli.method
	trailers := s.cli.responded.Load()
	c.mu.Unlock()
	if trailers {
		return c.trailersOf(s, h, block)
	}
	end := h.flags.Has(http2.FlagHeadersEndStream)
	p := &c.client.resp
	broken, err := c.decodeResponse(s, method, block, end)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.streams[h.stream] != s { // it was given up meanwhile
		return nil
	}
	st := s.cli
	interim := broken == nil && p.Status < 200
	switch {
	case broken != nil:
		s.resetLocked(http2.ErrCodeProtocol, broken)
	case interim && end:
		err = s.malformedLocked("an interim response at the end")
	case interim:
		if err := c.spendLocked(&c.budget.control); err != nil {
			return err
		}
		st.next, c.client.resp, st.ready = c.client.resp, st.next, true // one that nobody took yet is lost: it says little
	default:
		st.next, c.client.resp, st.ready = c.client.resp, st.next, true
		st.tunnel = st.next.Tunnel
		st.responded.Store(true)
		if n, ok := st.next.Declared(); ok && !st.next.Body.Absent() {
			s.in.declared = n
		}
		if end {
			s.gotEndLocked()
		}
	}
	s.stirLocked()
	return err
}

// blame says what a failure of the upstream's side means.
func (st *ClientStream) blame(err error) *http1.Error {
	if e, ok := errors.AsType[*http1.Error](err); ok {
		return e
	}
	reset, isReset := errors.AsType[*resetError](err)
	_, broken := errors.AsType[*connError](err)
	reason := http1.UpstreamClosed
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		reason = http1.UpstreamTimeout
	case broken:
		reason = http1.UpstreamBroken
	case st.responded.Load():
		reason = http1.UpstreamCut
	case err == ErrUnseen, isReset && reset.remote && reset.code == http2.ErrCodeRefusedStream:
		reason = http1.UpstreamRefused
	case isReset && reset.remote:
		reason = http1.UpstreamReset
	}
	return http1.Fail(reason, err)
}
