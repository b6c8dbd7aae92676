package http1

import (
	"errors"
	"io"
	"net"
	"time"
)

// Exchange carries one request upstream and its response back: Send, Receive, Respond, in that order. After an error of
// any of them nothing of the exchange runs any more and the upstream connection is closed (unless nothing was written to
// it: see Reusable), so that the caller can reply itself or, if nothing was answered and the body can be rewound, try
// another upstream. Who stops in between calls Abort.
type Exchange struct {
	down   *ServerConn
	up     Upstream
	upload chan error // of the goroutine that sends the body; nil: none runs
	fault  error      // what ended the upload
	onSent func()     // nil: nobody asks
	resp   *Response
}

// maxInterim bounds the interim responses of one exchange.
const maxInterim = 16

// syncBytes is up to where a body that is here is written without a goroutine of its own: socket buffers take it even if
// the upstream responds before it reads.
const syncBytes = 32 << 10

// stopGrace is how long an upload that has read all and only has to write may go on when the response has ended.
const stopGrace = 50 * time.Millisecond

// uploadGrace is for the rest of a request whose response came early, and which is to be sent once more.
const uploadGrace = 250 * time.Millisecond

// Exchange begins an exchange of the request that was read last. It is valid until the next request is read.
func (s *ServerConn) Exchange(up Upstream) *Exchange {
	s.x = Exchange{down: s, up: up}
	return &s.x
}

// Send writes the request, edited: head and first bytes of the body at once, the rest as it comes, from a goroutine that
// Respond ends, so that the upstream may respond before it has read all.
func (x *Exchange) Send(e *Edits) error {
	q := &x.down.req
	whole, err := q.Body.Buffered()
	if err != nil {
		return err // before it costs an upstream connection
	}
	if err := x.up.Begin(q, e); err != nil {
		return err
	}
	if whole && len(x.down.in.buffered()) <= syncBytes {
		if x.fault = x.up.SendBody(&q.Body); x.fault != nil && decides(x.fault) {
			return x.end(x.fault)
		}
		x.sent()
		return nil // if it was closed, it may have responded before
	}
	x.upload = make(chan error, 1)
	go x.send(&q.Body, x.upload)
	return nil
}

// send is the upload. It owns the downstream's reader and the upstream's writer while it runs: once it has said that it is done, both
// may be another exchange's.
func (x *Exchange) send(b *Body, done chan<- error) {
	err := x.up.SendBody(b)
	if err != nil && decides(err) {
		_ = x.up.Close() // the upstream must see that the request is cut, and Receive return
	} else {
		x.sent()
	}
	done <- err
}

// OnSent has f called, on whichever goroutine, when nothing more of the request is to come: once, unless the exchange fails before. It is to
// be asked for before Send. When Receive has failed, or Respond has returned, f is not running any more.
func (x *Exchange) OnSent(f func()) { x.onSent = f }

func (x *Exchange) sent() {
	if x.onSent != nil {
		x.onSent()
	}
}

// decides reports whether the failure of an upload ends the exchange. It does not if the upstream closed the connection:
// it may have responded before.
func decides(err error) bool {
	e := asError(err, ReasonUnknown)
	return e.Client() || e.Reason == UpstreamTimeout
}

// Receive waits for the response, passing on interim ones. See ClientConn.SetDeadline for how long.
func (x *Exchange) Receive() (*Response, error) {
	for range maxInterim {
		p, err := x.up.ReadResponse()
		if err != nil {
			return nil, x.end(err)
		}
		if p.Status >= 200 || p.Tunnel {
			if p.Tunnel && p.Status != 101 && x.down.req.Upgrade != "" { // of an upstream that has no 101
				p.Status, p.Phrase = 101, statusText(101)
			}
			x.resp = p
			return p, nil
		}
		if x.down.req.HTTP10 || p.Status == 100 && x.down.continued {
			continue
		}
		out := &x.down.out
		if _, err := out.responseHead(p, &x.down.req, nil, false); err != nil {
			return nil, x.end(err)
		}
		x.down.continued = x.down.continued || p.Status == 100
		if err := out.flush(); err != nil {
			return nil, x.end(err)
		}
	}
	return nil, x.end(failf(UpstreamBroken, "%d interim responses", maxInterim))
}

// Respond writes the response, edited, with its body, and ends the exchange. After a response with Tunnel set both
// connections' Raw carry bytes.
func (x *Exchange) Respond(e *Edits) error {
	s, p := x.down, x.resp
	s.last = s.last || s.ends() || x.heldBack()
	kind, err := s.out.responseHead(p, &s.req, e, s.last)
	if err != nil {
		return x.end(err)
	}
	s.last = s.last || kind == bodyToClose || p.Tunnel
	s.answered = true
	if x.upload != nil {
		s.in.kept.given.Store(true)
	} else {
		s.in.forget()
	}
	if err := s.out.body(&p.Body, kind); err != nil {
		s.last = true
		if kind == bodyToClose { // an orderly end would make it look complete
			switch conn := s.conn.(type) {
			case *net.TCPConn:
				_ = conn.SetLinger(0) // Close tells
			case interface{ Reset() error }:
				_ = conn.Reset()
			}
		}
		return x.end(err)
	}
	x.join()
	if !s.req.Body.Done() && s.req.Body.kind != bodyNone || x.fault != nil {
		_ = x.up.Close() // it was not told all of the request
	}
	s.linger = s.linger || s.last && !s.req.Body.Done() && s.req.Body.kind != bodyNone
	x.up.End()
	return nil
}

// Repeatable reports whether the request, once this exchange is aborted, can be sent once more: its body is still in the
// buffer. Who answers before it has read all is given a moment for the rest.
func (x *Exchange) Repeatable() bool {
	if x.upload != nil {
		select {
		case x.fault = <-x.upload:
			x.upload = nil
		case <-time.After(uploadGrace):
			return false
		}
	}
	b := &x.down.req.Body
	return (x.fault == nil || !decides(x.fault)) && b.err == nil && (b.kind == bodyNone || b.in.keeps())
}

// Abort ends an exchange that was sent and is not to be responded: by a reply of the caller's own, perhaps.
func (x *Exchange) Abort() { _ = x.end(nil) }

// Discard is Abort for a response that was received and is not wanted. It reports whether the upstream connection can carry
// another exchange: the request was sent whole, and the whole response is here already.
func (x *Exchange) Discard() bool {
	b := &x.resp.Body
	whole, err := false, error(nil)
	if x.upload == nil && x.fault == nil && b.src == nil {
		whole, err = b.Buffered()
	}
	for whole && err == nil {
		_, err = b.Next()
	}
	if err != io.EOF {
		x.Abort()
		return false
	}
	x.up.End()
	return true
}

// heldBack is ServerConn.held, where that may be asked: not while the upload reads.
func (x *Exchange) heldBack() bool {
	if x.upload == nil {
		return x.down.held()
	}
	select {
	case x.fault = <-x.upload:
		x.upload = nil
		return x.down.held()
	default:
	}
	return x.down.req.Continue && !x.down.continued || x.down.req.Body.kind == bodyLength && x.down.in.left.Load() > int64(x.down.cfg.DrainBytes)
}

// join ends the upload: what waits for the client is stopped at once, what only has to be written soon.
func (x *Exchange) join() {
	if x.upload == nil {
		return
	}
	select {
	case x.fault = <-x.upload:
		x.upload = nil
		return
	default:
	}
	in := &x.down.in
	in.stop.Store(true)
	_ = in.conn.SetReadDeadline(past) // a closed connection waits for nothing
	t := time.NewTimer(stopGrace)
	select {
	case x.fault = <-x.upload:
	case <-t.C:
		_ = x.up.Close() // so that the write returns
		x.fault = <-x.upload
	}
	t.Stop()
	x.upload = nil
	in.stop.Store(false)
	in.deadline, in.armed = past, false
	if b := &x.down.req.Body; b.err != nil && errors.Is(b.err, errStopped) {
		b.err = nil // it can be read on
	}
}

// end ends a failed exchange and returns the error that says why: the client's, if it was at fault.
func (x *Exchange) end(err error) error {
	_ = x.up.Close() // nothing more is asked of it
	x.join()
	if x.fault != nil && decides(x.fault) && !errors.Is(x.fault, errStopped) {
		err = x.fault
	}
	x.up.Drop()
	return err
}
