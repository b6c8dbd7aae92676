package http2

import (
	"errors"
	"time"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// Exchange carries one request upstream and its response back: Send, Receive, Respond, in that order. It keeps to what
// http1.Exchange promises, for a client of HTTP/2.
type Exchange struct {
	down      *ServerStream
	up        http1.Upstream
	upload    chan error // of the goroutine that sends the body
	uploading bool       // there is one
	fault     error      // what ended the upload
	onSent    func()     // nil: nobody asks
	resp      *http1.Response

	// Of one without a goroutine.
	parts [][]byte // the body, where it lies
	size  int      // its bytes
	end1  encoder  // the trailers
}

const (
	maxInterim = 16                    // interim responses of one exchange
	syncBytes  = 32 << 10              // up to where a body that is here is sent without a goroutine of its own
	stopGrace  = 50 * time.Millisecond // for an upload that only has to write when the response has ended

	// uploadGrace is for the rest of a request whose response came early, and which is to be sent once more.
	uploadGrace = 250 * time.Millisecond
)

var errStopped = errors.New("the exchange is over")

// Exchange begins an exchange of the request. It is valid until the worker returns.
func (st *ServerStream) Exchange(up http1.Upstream) *Exchange {
	st.x = Exchange{down: st, up: up, upload: st.x.upload, parts: st.x.parts[:0], end1: st.x.end1}
	return &st.x
}

// Send writes the request, edited: head and first bytes of the body at once, the rest as it comes, from a goroutine that
// Respond ends, so that the upstream may respond before it has read all.
func (x *Exchange) Send(e *http1.Edits) error {
	st := x.down
	if st.tunnel && st.req.Upgrade == "" {
		return http1.Fail(http1.BadTarget, errors.New("a plain CONNECT"))
	}
	b := &st.req.Body
	whole, err := b.Buffered()
	if err != nil {
		return err // before it costs an upstream
	}
	st.resume()
	if err := x.up.Begin(&st.req, e); err != nil {
		return err
	}
	if whole && st.waiting() <= syncBytes {
		if x.fault = x.up.SendBody(b); x.fault != nil && decides(x.fault) {
			return x.end(x.fault)
		}
		x.sent()
		return nil // if it was closed, it may have responded before
	}
	if x.upload == nil {
		x.upload = make(chan error, 1)
	}
	x.uploading = true
	go x.send(b)
	return nil
}

// send is the upload. join waits for it.
func (x *Exchange) send(b *http1.Body) {
	err := x.up.SendBody(b)
	if err != nil && decides(err) {
		_ = x.up.Close() // the upstream must see that the request is cut, and Receive return; its error is known
	} else {
		x.sent()
	}
	x.upload <- err
}

// OnSent has f called, on whichever goroutine, when nothing more of the request is to come: once, unless the exchange fails before. It is to
// be asked for before Send. When Receive has failed, or Respond has returned, f is not running any more.
func (x *Exchange) OnSent(f func()) { x.onSent = f }

func (x *Exchange) sent() {
	if x.onSent != nil {
		x.onSent()
	}
}

// decides reports whether the failure of an upload ends the exchange. It does not if the upstream closed: it may have
// responded before.
func decides(err error) bool {
	e, ok := errors.AsType[*http1.Error](err)
	return ok && (e.Client() || e.Reason == http1.UpstreamTimeout)
}

// Receive waits for the response, passing on interim ones.
func (x *Exchange) Receive() (*http1.Response, error) {
	if x.resp != nil { // it was looked at
		return x.resp, nil
	}
	for range maxInterim {
		p, err := x.up.ReadResponse()
		if err != nil {
			return nil, x.end(err)
		}
		if p.Tunnel && x.down.tunnel {
			p.Status = 200 // HTTP/2 knows no other way to say so
			x.resp = p
			return p, nil
		}
		if p.Status/100 == 2 && x.down.tunnel { // the client would take it for one
			return nil, x.end(http1.Fail(http1.UpstreamBroken, errors.New("the protocol was not switched")))
		}
		if p.Status >= 200 {
			x.resp = p
			return p, nil
		}
		if p.Status == 101 {
			break
		}
		if err := x.down.interim(p); err != nil {
			return nil, x.end(err)
		}
	}
	return nil, x.end(http1.Fail(http1.UpstreamBroken, errors.New("too many interim responses, or a switch of protocols")))
}

// Respond writes the response, edited, with its body, and ends the exchange.
func (x *Exchange) Respond(e *http1.Edits) error {
	st := x.down
	if err := st.respond(x.resp, e); err != nil {
		if st.Answered() {
			st.Reset()
		}
		return x.end(err)
	}
	x.join()
	if b := &st.req.Body; !b.Done() && !b.Absent() || x.fault != nil {
		_ = x.up.Close() // it was not told all of the request
	}
	x.up.End()
	return nil
}

// Repeatable reports whether the request, once this exchange is aborted, can be sent once more: its body is still there. Who
// answers before it has read all is given a moment for the rest.
func (x *Exchange) Repeatable() bool {
	if x.uploading {
		select {
		case x.fault = <-x.upload:
			x.uploading = false
		case <-time.After(uploadGrace):
			return false
		}
	}
	st := x.down
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	return (x.fault == nil || !decides(x.fault)) && st.err == nil && (st.tunnel || st.in.keep || st.in.got == 0 && st.gotEnd)
}

// Abort ends an exchange that was sent and is not to be responded: by a reply of the caller's own, perhaps.
func (x *Exchange) Abort() { _ = x.end(nil) }

// join ends the upload: what waits for the client is stopped at once, what only has to be written soon.
func (x *Exchange) join() {
	if !x.uploading {
		return
	}
	x.uploading = false
	select {
	case x.fault = <-x.upload:
		return
	default:
	}
	x.down.halt()
	t := time.NewTimer(stopGrace)
	defer t.Stop()
	select {
	case x.fault = <-x.upload:
	case <-t.C:
		_ = x.up.Close() // so that the write returns
		x.fault = <-x.upload
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

// waiting is how much of the body is here.
func (st *ServerStream) waiting() int {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	return st.in.size
}

// halt makes Next return although more may come; resume undoes it.
func (st *ServerStream) halt() {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	st.halted = true
	wake(st.readable)
}

func (st *ServerStream) resume() {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	st.halted = false
}
