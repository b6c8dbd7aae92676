package http2

import (
	"os"
	"time"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// Most exchanges never have to wait but for the response: the request is whole when it is read, its upstream has a
// connection with room, the response comes whole, and the client's windows take it. They are run to completion by those who
// read: who reads the client's connection sends the request, and who reads the upstream's passes the response on. What one
// read brought goes out by one write for each connection, and no goroutine is woken for a request.
//
// As soon as anything would have to wait, or has failed, a worker goes on with the exchange where it is. Between Launch and
// what follows, the exchange belongs to nobody; who takes it (claimLocked) goes on with it, and nobody else does.

// Handler serves one request after the other; it stays with a stream's memory.
type Handler interface {
	// Begin serves a request that is whole as far as that goes without waiting. It runs on the goroutine that reads the
	// client's connection. True: it was launched, which must have been the last that Begin did; false: Serve goes on.
	Begin(st *ServerStream) bool
	// Respond passes on a response that is whole, if it can without waiting. It runs on the goroutine that reads the
	// upstream's connection. False: Serve goes on.
	Respond(st *ServerStream) bool
	// Serve goes on with a request, wherever it is, until it is answered. It runs on a worker, and may wait.
	Serve(st *ServerStream)
}

// serveOnly is a Handler that always wants a worker.
type serveOnly func(*ServerStream)

func (serveOnly) Begin(*ServerStream) bool     { return false }
func (serveOnly) Respond(*ServerStream) bool   { return false }
func (serve serveOnly) Serve(st *ServerStream) { serve(st) }

// maxFresh is how many requests may wait for the end of what a read brought.
const maxFresh = 64

// fewFrames is how many requests or responses of one read are no batch: it is worth asking whether others have something to
// send, too.
const fewFrames = 4

// goOn goes on with what a read brought: requests to begin, and responses to pass on. Of the reader goroutine.
func (c *conn) goOn() {
	var n int
	if c.server != nil {
		n = c.server.dispatch()
	} else {
		n = c.settle()
	}
	for i, o := range c.owed {
		c.owed[i] = nil
		if n < fewFrames {
			o.gather()
		}
		o.push()
	}
	c.owed = c.owed[:0]
}

// owe makes sure that what was staged on another connection is written once this read is worked off.
func (c *conn) owe(to *conn) {
	for _, o := range c.owed {
		if o == to {
			return
		}
	}
	c.owed = append(c.owed, to)
}

// dispatch begins requests, and returns how many.
func (c *ServerConn) dispatch() int {
	n := len(c.fresh)
	if n == 0 {
		return 0
	}
	c.mu.Lock()
	for _, st := range c.fresh {
		st.whole = st.gotEnd && st.err == nil
	}
	c.mu.Unlock()
	for i, st := range c.fresh {
		c.fresh[i] = nil
		if !st.whole || st.tunnel || st.fault != nil || !st.handler.Begin(st) {
			c.toWorker(st)
		}
	}
	c.fresh = c.fresh[:0]
	return n
}

// toWorker hands a stream to a worker. It does not wait.
func (c *ServerConn) toWorker(st *ServerStream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.idle); n > 0 {
		ch := c.idle[n-1]
		c.idle[n-1] = nil
		c.idle = c.idle[:n-1]
		ch <- st // it waits, or is about to
		return
	}
	c.workers.Go(func() { c.work1(st) }) // the stream is counted: nobody is done waiting
}

// finish ends a stream that its handler is done with.
func (c *ServerConn) finish(st *ServerStream) {
	st.hook.Lock() // not under mu: what is called may take its time
	st.gone = nil
	st.hook.Unlock()
	c.mu.Lock()
	st.finishLocked()
	c.running--
	c.cfg.Memory.Release(streamBytes)
	if st.doneCh == nil && len(c.free) < c.cfg.workersToKeep { // else somebody may still hold it as a context
		c.free = append(c.free, st)
	}
	c.mu.Unlock()
	c.workers.Done()
}

// claim is an exchange that was taken, to go on with it.
type claim struct {
	x     *Exchange
	whole bool // its response
}

func (x claim) handOver() { x.x.down.c.server.toWorker(x.x.down) }

// stirLocked is called when something came for a stream, or happened to it.
func (s *stream) stirLocked() {
	wake(s.readable)
	if st := s.cli; st != nil && st.waits != nil && !st.listed {
		st.listed = true
		s.c.stirred = append(s.c.stirred, s)
	}
}

// claimLocked takes the exchange that waits for the stream, if there is one.
func (s *stream) claimLocked() *Exchange {
	if s.cli == nil {
		return nil
	}
	x := s.cli.waits
	s.cli.waits = nil
	return x
}

// settle goes on with exchanges for which something came, and returns how many there were.
func (c *conn) settle() int {
	c.mu.Lock()
	for i, s := range c.stirred {
		c.stirred[i] = nil
		st := s.cli
		st.listed = false
		if x := s.claimLocked(); x != nil {
			c.claims = append(c.claims, claim{x, st.ready && s.gotEnd && s.err == nil && st.responded.Load()})
		}
	}
	c.stirred = c.stirred[:0]
	c.mu.Unlock()
	for i, x := range c.claims {
		c.claims[i] = claim{}
		if st := x.x.down; x.whole && st.handler.Respond(st) {
			st.c.server.finish(st)
		} else {
			x.handOver()
		}
	}
	n := len(c.claims)
	c.claims = c.claims[:0]
	return n
}

// Launch sends the request, edited, if all of it is here and nothing has to be waited for. The stream's Handler then goes on
// with it: by Respond, or by Serve when the response is not whole, or has not come until then, or anything went wrong. Zero
// is for ever. After true, the exchange is not the caller's any more. After false, nothing was sent.
func (x *Exchange) Launch(e *http1.Edits, until time.Time) bool {
	up, ok := x.up.(*ClientStream)
	st := x.down
	q := &st.req
	if !ok || st.tunnel || q.Upgrade != "" || e.Failed() != nil || q.Body.Trailers().Len() > 0 {
		return false
	}
	size := 0
	if !q.Body.Absent() && !q.Body.Done() {
		size = st.wholeBody()
		if size < 0 || size > syncBytes {
			return false
		}
	}
	up.request(q, e)
	c := up.c
	c.mu.Lock()
	defer c.mu.Unlock()
	defer x.dropParts() // while x is ours
	c.makePlaceLocked(size)
	if up.mayBeginLocked() != nil || size > min(c.peerWindow, c.placeLocked()) {
		return false
	}
	up.beginLocked(q.Method, false)
	up.stageHeadLocked(size == 0)
	up.stagePartsLocked(x.parts, size)
	if !q.Body.Absent() && !q.Body.Done() {
		q.Body.Took(x.parts)
	}
	st.c.owe(c)
	up.deadline = until
	up.waits = x
	c.alarmLocked(until)
	return true
}

// wholeBody finds the body that is here, without taking it: it may have to be sent again. Negative: it is gone, or the
// stream is.
func (st *ServerStream) wholeBody() int {
	c := st.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if !st.gotEnd || st.err != nil || !st.in.keep || st.in.kept > 0 {
		return -1
	}
	st.x.parts = st.in.appendParts(st.x.parts[:0])
	return st.in.size
}

// appendParts appends what was not taken.
func (in *inbox) appendParts(to [][]byte) [][]byte {
	for i := in.at; i < len(in.parts); i++ {
		if t := &in.parts[i]; t.r < t.w {
			to = append(to, t.b[t.r:t.w])
		}
	}
	return to
}

func (x *Exchange) dropParts() {
	clear(x.parts)
	x.parts = x.parts[:0]
}

// stagePartsLocked stages a body, for which there is room.
func (s *stream) stagePartsLocked(parts [][]byte, size int) {
	for _, p := range parts {
		for len(p) > 0 {
			n := min(len(p), s.c.peerMaxFrame)
			size -= n
			s.stageLocked(p[:n], size == 0)
			p = p[n:]
		}
	}
}

// placeLocked is how much payload can be staged at once.
func (c *conn) placeLocked() int { return min(c.w.window, maxStaged-len(c.w.staged)) }

// makePlaceLocked writes what is staged if there is no place behind it. It may release c.mu meanwhile.
func (c *conn) makePlaceLocked(n int) {
	if n > maxStaged-len(c.w.staged) && !c.w.busy {
		c.mu.Unlock()
		c.push()
		c.mu.Lock()
	}
}

// alarmLocked makes sure that the deadline of an exchange without a goroutine is noticed. There is one timer for all: it is
// set to the earliest deadline there has been, and looks then which the next is.
func (c *conn) alarmLocked(until time.Time) {
	if until.IsZero() || !c.alarmAt.IsZero() && !until.Before(c.alarmAt) {
		return
	}
	c.alarmAt = until
	if c.alarm == nil {
		c.alarm = time.AfterFunc(time.Until(until), c.ring)
		return
	}
	c.alarm.Reset(time.Until(until))
}

// ring ends what has waited for too long, and hands it over. It ends here and now: an upstream that knows the time, too, may
// be about to reset the stream.
func (c *conn) ring() {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	now := time.Now()
	var late []claim
	var next time.Time
	for _, s := range c.streams {
		switch until := s.deadline; {
		case s.cli.waits == nil || until.IsZero():
		case !until.After(now):
			late = append(late, claim{s.claimLocked(), false})
			s.resetLocked(http2.ErrCodeCancel, os.ErrDeadlineExceeded)
		case next.IsZero() || until.Before(next):
			next = until
		}
	}
	c.alarmAt = time.Time{}
	c.alarmLocked(next)
	c.mu.Unlock()
	for _, x := range late {
		x.handOver()
	}
}

// Whole returns the response, for Respond; nil: it is not one that can be passed on without waiting.
func (x *Exchange) Whole() *http1.Response {
	up := x.up.(*ClientStream) // Launch has looked
	c := up.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if up.err != nil || !up.ready || !up.gotEnd || up.in.size > maxStaged {
		return nil
	}
	up.ready = false
	up.resp, up.next = up.next, up.resp
	x.resp = &up.resp
	x.size = 0
	if !x.resp.Body.Absent() { // else nothing is to follow, whatever did
		x.parts = up.in.appendParts(x.parts[:0])
		x.size = up.in.size
	}
	return x.resp
}

// RespondWhole writes the response that Whole returned, edited, and ends the exchange, if the client's windows take all of it
// and nothing is wrong. Else it does nothing.
func (x *Exchange) RespondWhole(e *http1.Edits) bool {
	st, p := x.down, x.resp
	if e.Failed() != nil {
		x.dropParts()
		return false
	}
	st.head(p, e)
	more := !p.Body.Absent() && p.Body.Trailers().Len() > 0
	if more {
		st.x.end1.b = st.x.end1.b[:0]
		(*http1.Edits)(nil).Each(p.Body.Trailers(), &st.x.end1)
	}
	if !x.stageWhole(more) {
		return false
	}
	x.up.End()
	return true
}

func (x *Exchange) stageWhole(trailers bool) bool {
	st, up := x.down, x.up.(*ClientStream)
	c := st.c
	c.mu.Lock()
	defer c.mu.Unlock()
	defer x.dropParts()
	c.makePlaceLocked(x.size)
	if st.sendErrLocked() != nil || st.answered || x.size > min(st.sendWindow, c.placeLocked()) {
		return false
	}
	st.answeredLocked()
	st.stageHeadLocked(x.size == 0 && !trailers)
	left := x.size
	if trailers {
		left = -1 // the end is not in the body
	}
	st.stagePartsLocked(x.parts, left)
	if trailers {
		st.enc, x.end1 = x.end1, st.enc
		st.stageHeadLocked(true)
	}
	x.resp.Body.Took(x.parts)
	up.c.owe(c)
	return true
}
