package http2

import (
	"context"
	"errors"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// maxClientStreams is how many streams a client may have at once unless Config says otherwise.
const maxClientStreams = 1024

// ServerConn is a client's connection.
type ServerConn struct {
	conn
	handler func() Handler
	running int                  // streams that are not done; guarded by mu
	idle    []chan *ServerStream // of workers without a stream; guarded by mu
	free    []*ServerStream      // guarded by mu
	workers sync.WaitGroup       // and streams that are not done
	dates   http1.Date

	// Of the reader goroutine.
	scratch *ServerStream   // the next stream
	fresh   []*ServerStream // came with this read, and were not begun
}

// NewServerConn makes a connection of conn, which it owns from now on and whose peer begins with the client's preface.
func NewServerConn(raw net.Conn, cfg Config) *ServerConn {
	if cfg.MaxStreams <= 0 {
		cfg.MaxStreams = maxClientStreams
	}
	c := &ServerConn{}
	c.server = c
	c.init(raw, cfg)
	c.greet(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: uint32(c.cfg.MaxStreams)},
		http2.Setting{ID: http2.SettingEnableConnectProtocol, Val: 1})
	return c
}

// Serve serves requests until the connection ends and every worker has returned. worker makes what serves one request after
// the other, each of them answered when it returns: as many as there are requests at once. The error says why the
// connection ended; nil when both sides were done with it.
func (c *ServerConn) Serve(worker func() func(*ServerStream)) error {
	return c.ServeWith(func() Handler { return serveOnly(worker()) })
}

// ServeWith is Serve by handlers, which need a worker only to wait.
func (c *ServerConn) ServeWith(handler func() Handler) error {
	c.handler = handler
	c.start()
	err := c.run()
	c.mu.Lock()
	for _, ch := range c.idle {
		close(ch)
	}
	c.idle = nil
	c.mu.Unlock()
	c.workers.Wait()
	return err
}

// Wind tells the client to open no more streams, and ends the connection with the last one. Nothing that is on its way is
// lost: the client is told twice, the second time with the last stream that is served (RFC 9113, 6.8). A connection that
// has had no stream yet gets one before it is told. Safe to call at any time from any goroutine.
func (c *ServerConn) Wind() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.maxPeerID == 0 {
		c.wound = true
		return
	}
	c.windLocked()
}

func (c *conn) windLocked() {
	if c.err != nil || c.draining {
		return
	}
	c.draining, c.drainPing = true, true
	c.w.staged = appendGoAway(c.room(17), maxStreamID, http2.ErrCodeNo)
	c.w.staged = appendPing(c.room(17), 0, drainPingData)
	c.kickLocked()
}

// nameLastLocked is the second half of Wind.
func (c *conn) nameLastLocked() {
	c.drainPing = false
	c.goneAway = true
	c.lastID = c.maxPeerID
	c.w.staged = appendGoAway(c.room(17), c.lastID, http2.ErrCodeNo)
	if len(c.streams) == 0 && c.err == nil {
		c.work.Go(func() { c.shut(http2.ErrCodeNo, errClosed) })
	}
}

// Drain makes the connection end with the streams it has. Safe to call at any time from any goroutine.
func (c *ServerConn) Drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil || c.goneAway {
		return
	}
	c.draining = true
	c.nameLastLocked()
	c.kickLocked()
}

// headerBlock is a request or the trailers of one.
func (c *ServerConn) headerBlock(h frameHeader, block []byte) error {
	c.mu.Lock()
	s := c.streams[h.stream]
	switch {
	case s != nil:
		ended := s.gotEnd
		c.mu.Unlock()
		if ended { // its goroutine may be looking at what there is
			c.mu.Lock()
			err := s.provokedLocked(http2.ErrCodeStreamClosed)
			c.mu.Unlock()
			if err != nil {
				return err
			}
			return c.discard(block)
		}
		return c.trailersOf(s, h, block)
	case h.stream%2 == 0:
		c.mu.Unlock()
		return connErrorf(http2.ErrCodeProtocol, "client opened stream %d", h.stream)
	case h.stream <= c.maxPeerID:
		err := c.overLocked(h)
		c.mu.Unlock()
		if err != nil {
			return err
		}
		if err = c.discard(block); err == nil && c.sink.has != 0 { // no trailers of a stream we gave up
			err = connErrorf(http2.ErrCodeProtocol, "a request on stream %d after %d", h.stream, c.maxPeerID)
		}
		return err
	}
	c.maxPeerID = h.stream
	late := h.stream > c.lastID // the client retries elsewhere
	full := len(c.streams) >= c.cfg.MaxStreams || c.running >= c.cfg.MaxStreams || c.cfg.Memory.Full()
	if full && !late {
		// A stream counts until its worker is done, whatever the client resets.
		c.w.staged = appendRSTStream(c.room(13), h.stream, http2.ErrCodeRefusedStream)
		if err := c.spendLocked(&c.budget.resets); err != nil {
			c.mu.Unlock()
			return err
		}
	}
	c.mu.Unlock()
	if full || late {
		return c.discard(block)
	}
	return c.request(h, block)
}

// request decodes a request and hands it to a worker.
func (c *ServerConn) request(h frameHeader, block []byte) error {
	st := c.scratch
	if st == nil {
		st = c.newStream()
	}
	c.scratch = st
	end := h.flags.Has(http2.FlagHeadersEndStream)
	var err error
	if st.fault, err = c.decodeRequest(st, block, end); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil { // nobody would tell the stream
		return c.err
	}
	c.scratch = nil
	st.begin(&c.conn, h.stream)
	st.answered, st.deaf, st.doneCh, st.continued = false, false, nil, false
	st.gotEnd = end
	if n, ok := st.req.Declared(); ok && st.fault == nil {
		st.in.declared = n
	}
	st.tunnel = c.sink.tunnel()
	st.in.keep = !end && !st.tunnel
	c.streams[h.stream] = &st.stream
	c.running++
	c.cfg.Memory.Charge(streamBytes)
	c.workers.Add(1)
	c.budget.control = min(c.budget.control+controlPerStream, 2*fullBudget.control)
	if c.wound {
		c.wound = false
		c.windLocked()
	}
	c.fresh = append(c.fresh, st)
	return nil
}

func (c *ServerConn) newStream() *ServerStream {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.free); n > 0 {
		st := c.free[n-1]
		c.free[n-1] = nil
		c.free = c.free[:n-1]
		return st
	}
	st := &ServerStream{handler: c.handler()}
	st.srv = st
	return st
}

// work1 is a worker's goroutine: its stack has grown.
func (c *ServerConn) work1(st *ServerStream) {
	next := make(chan *ServerStream, 1) // so that who hands over does not wait
	for {
		st.handler.Serve(st)
		c.finish(st)
		c.mu.Lock()
		if c.err != nil || len(c.idle) >= c.cfg.workersToKeep {
			c.mu.Unlock()
			return
		}
		c.idle = append(c.idle, next)
		c.mu.Unlock()
		var ok bool
		if st, ok = <-next; !ok {
			return
		}
	}
}

// ServerStream is a request of a client and its response. It is the context of what is done for it: that is cancelled when
// the client has gone, and when the worker is done with it.
type ServerStream struct {
	stream
	handler   Handler
	whole     bool // the request; of the reader goroutine
	req       http1.Request
	x         Exchange
	fault     error // what is wrong with the request
	continued bool  // 100 was passed on

	// Guarded by conn.mu.
	answered bool // a final head was sent
	deaf     bool // the worker is done
	doneCh   chan struct{}
}

// Request returns the request, valid until the worker returns, and what is wrong with it: an *http1.Error, which ReplyError
// answers.
func (st *ServerStream) Request() (*http1.Request, error) { return &st.req, st.fault }

// OnGone makes f be called, once, if the stream ends before its worker is done: by the client, or with the connection. f
// must not wait.
func (st *ServerStream) OnGone(f func()) {
	st.hook.Lock()
	st.gone = f
	st.hook.Unlock()
	if st.Err() != nil {
		f()
	}
}

// finishLocked ends a stream whose worker has returned.
func (st *ServerStream) finishLocked() {
	st.deaf = true
	if st.err == nil {
		switch {
		case !st.sentEnd:
			st.resetLocked(http2.ErrCodeInternal, errClosed)
		case !st.gotEnd:
			st.resetLocked(http2.ErrCodeNo, errClosed) // nothing more is wanted of the request, RFC 9113, 8.1
		}
	}
	st.in.freeLocked(st.c)
	st.unfeedLocked()
	st.closeDoneLocked()
}

// Deadline implements context.Context.
func (st *ServerStream) Deadline() (time.Time, bool) { return time.Time{}, false }

// Value implements context.Context.
func (st *ServerStream) Value(any) any { return nil }

// Done implements context.Context.
func (st *ServerStream) Done() <-chan struct{} {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	if st.doneCh == nil {
		st.doneCh = make(chan struct{})
		if st.err != nil || st.deaf {
			close(st.doneCh)
		}
	}
	return st.doneCh
}

// Err implements context.Context.
func (st *ServerStream) Err() error {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	if st.err != nil || st.deaf {
		return context.Canceled
	}
	return nil
}

func (st *ServerStream) closeDoneLocked() {
	if st.doneCh != nil {
		select {
		case <-st.doneCh:
		default:
			close(st.doneCh)
		}
	}
}

// blame says what a failure of the client's side means.
func (st *ServerStream) blame(err error) *http1.Error {
	if e, ok := errors.AsType[*http1.Error](err); ok {
		return e
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return http1.Fail(http1.BodyTimeout, err)
	}
	return http1.Fail(http1.ClientClosed, err)
}

// Answered reports whether a response head left, so that Reply would come too late.
func (st *ServerStream) Answered() bool {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	return st.answered
}

// Reply answers the request itself, with a plain text body (Edits may say otherwise) that a HEAD request does not get.
func (st *ServerStream) Reply(status int, body string, e *http1.Edits) error {
	if err := e.Failed(); err != nil {
		return err
	}
	var none http1.Fields
	st.status(status)
	e.Each(&none, &st.enc)
	bodyless := status == 204 || status == 304 || status < 200
	if !bodyless && (body != "" || !e.Has(&none, "grpc-status")) { // trailers only have no length
		if body != "" && !e.Has(&none, "content-type") {
			st.enc.named(31, "text/plain")
		}
		st.length(int64(len(body)))
	}
	if !e.Has(&none, "date") {
		st.date()
	}
	if bodyless || st.req.Method == "HEAD" {
		body = ""
	}
	if err := st.answer(body == ""); err != nil {
		return err
	}
	if body != "" {
		if err := st.write([]byte(body), true); err != nil {
			return err
		}
	}
	return st.Flush()
}

// ReplyError answers what the request or an Exchange failed with, if that can be answered. What is malformed is reset (RFC
// 9113, 8.1.1).
func (st *ServerStream) ReplyError(err error, e *http1.Edits) error {
	x := st.blame(err)
	switch x.Reason {
	case http1.BadField, http1.BadFraming, http1.BadRequestLine, http1.BadTrailer:
		st.Reset()
		return nil
	}
	if x.Status == 0 || st.Answered() {
		return nil
	}
	return st.Reply(x.Status, strconv.Itoa(x.Status)+" "+x.Reason.String()+"\n", e)
}

// Reset ends the stream so that the client sees an error.
func (st *ServerStream) Reset() {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	code := http2.ErrCodeProtocol
	if st.answered {
		code = http2.ErrCodeInternal
	}
	if st.err == nil {
		st.resetLocked(code, &resetError{code: code})
	}
}

// status begins the encoding of a response head.
func (st *ServerStream) status(status int) {
	e := &st.enc
	e.b = e.b[:0]
	switch status {
	case 200:
		e.indexed(indexStatus)
	case 204:
		e.indexed(indexStatus + 1)
	case 404:
		e.indexed(indexStatus + 5)
	case 500:
		e.indexed(indexStatus + 6)
	default:
		e.b = append(e.b, indexStatus, 3)
		e.b = strconv.AppendInt(e.b, int64(status), 10)
	}
}

func (st *stream) length(n int64) {
	e := &st.enc
	e.b = appendInt(e.b, 0, 4, indexLength)
	at := len(e.b)
	e.b = append(e.b, 0)
	e.b = strconv.AppendInt(e.b, n, 10)
	e.b[at] = byte(len(e.b) - at - 1) // less than 127
}

func (st *ServerStream) date() {
	e := &st.enc
	e.b = appendInt(e.b, 0, 4, indexDate)
	at := len(e.b)
	e.b = append(e.b, 0)
	e.b = st.c.server.dates.Append(e.b)
	e.b[at] = byte(len(e.b) - at - 1)
}

// answer stages the head in enc as the final one.
func (st *ServerStream) answer(end bool) error {
	c := st.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := st.sendErrLocked(); err != nil {
		return st.blame(err)
	}
	st.answeredLocked()
	st.stageHeadLocked(end)
	return nil
}

func (st *ServerStream) answeredLocked() {
	if !st.answered {
		st.answered, st.in.keep = true, false
		st.c.budget.resets = min(st.c.budget.resets+1, fullBudget.resets)
	}
}

// Continue tells a client that waits for it to send the body.
func (st *ServerStream) Continue() error {
	if !st.req.Continue || st.continued || st.Answered() {
		return nil
	}
	st.continued = true
	st.status(100)
	if err := st.writeHead(false); err != nil {
		return err
	}
	return st.Flush()
}

// interim passes an interim response on.
func (st *ServerStream) interim(p *http1.Response) error {
	if p.Status == 100 && st.continued {
		return nil
	}
	st.continued = st.continued || p.Status == 100
	st.status(p.Status)
	(*http1.Edits)(nil).Each(&p.Fields, &st.enc)
	if err := st.writeHead(false); err != nil {
		return err
	}
	return st.Flush()
}

// head encodes the head of a response, edited.
func (st *ServerStream) head(p *http1.Response, e *http1.Edits) {
	st.status(p.Status)
	e.Each(&p.Fields, &st.enc)
	if n, ok := p.Declared(); ok && p.Status != 204 && !p.Tunnel {
		st.length(n)
	}
	if !e.Has(&p.Fields, "date") {
		st.date()
	}
}

// respond writes a response, edited, with its body.
func (st *ServerStream) respond(p *http1.Response, e *http1.Edits) error {
	if err := e.Failed(); err != nil {
		return err
	}
	st.head(p, e)
	none := p.Body.Absent() || p.Body.Done() && p.Body.Trailers().Len() == 0
	if err := st.answer(none && !p.Tunnel); err != nil {
		return err
	}
	if none {
		return st.Flush()
	}
	return st.body(&p.Body)
}
