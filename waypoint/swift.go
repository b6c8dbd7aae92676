package waypoint

import (
	"math/rand/v2"
	"time"

	"github.com/mistnet/mistnet/waypoint/upstream"

	"github.com/mistnet/mistnet/waypoint/http2"
	"github.com/mistnet/mistnet/waypoint/route"
)

// progress is how far a request has come. Who goes on with it does what comes after that. A request that came by HTTP/2 is
// carried by Begin and Respond, on the goroutines that read the two connections, for as long as nothing has to be waited for;
// Serve goes on from there, and is all there is for one that came by HTTP/1.1.
type progress uint8

const (
	unbegun   progress = iota
	begun              // it has a record
	judged             // flight.refusal says whether it is refused
	drawn              // flight.fault says what is done to it on purpose
	chosen             // flight.backend and flight.status are known
	planned            // flight.plan or flight.unplanned is
	picked             // flight.to is, and counted there
	connected          // flight.up and its deadline are
	launched           // the request was sent
)

// flight is what is known of a request that is not forgotten when another goroutine goes on with it.
type flight struct {
	refusal    *reply
	fault      route.Fault
	backend    *route.Backend
	status     uint16
	plan       plan
	unplanned  *reply
	to         upstream.Pick
	up         *upstream.Conn
	until      time.Time // when the try must be over; zero: never
	untilWhole bool      // that is the end of the whole exchange
	sent       time.Time
	x          exchange
	claimed    bool          // another try is reserved
	pause      time.Duration // before it
}

// Begin implements http2.Handler: all of Serve that comes before the response, if it does not wait. What it decided by chance
// stays decided.
func (s *session) Begin(st *http2.ServerStream) bool {
	q, err := st.Request()
	if err != nil || q.Upgrade != "" {
		return false
	}
	s.down, s.stream = st, st
	s.begin(q)
	st.OnGone(s.onGone)
	f := &s.flight
	f.refusal = s.judge()
	if s.progress = judged; f.refusal != nil || s.web != nil {
		return false
	}
	f.fault = s.drawFault()
	if s.progress = drawn; f.fault.Delay > 0 || f.fault.Abort {
		return false
	}
	if s.cors = s.rule.CORS.Decide(&s.req); s.cors.Answer || s.rule.Redirect != nil || s.rule.Direct != nil {
		return false
	}
	f.backend, f.status = s.rule.Backend(rand.Uint32())
	if s.progress = chosen; f.status != 0 || f.backend.Redirect != nil {
		return false
	}
	p := &f.plan
	f.unplanned = s.plan(p, f.backend)
	if s.progress = planned; f.unplanned != nil || !p.http2 || p.target != nil && (p.target.Bounded() || p.target.Service.Dynamic) ||
		len(s.rule.Mirrors)+len(f.backend.Mirrors) > 0 {
		return false
	}
	now := s.log.Start      // it was just then
	if !s.pick(p, 1, now) { // who tries again finds out for himself
		return false
	}
	if f.up = s.up.StreamNow(&f.to); f.up == nil {
		return false
	}
	f.until, f.untilWhole = s.deadline(p, now)
	s.progress = connected
	if st.Err() != nil || p.timed() && !p.came {
		return false
	}
	s.address(st, p, now)
	x, ok := f.x.(*http2.Exchange)
	if !ok {
		return false
	}
	s.progress = launched
	if x.Launch(&s.edits, f.until) {
		return true // it is not ours any more
	}
	s.progress = connected
	return false
}

// Respond implements http2.Handler: all of Serve that comes after a response which is whole, if it does not wait.
func (s *session) Respond(st *http2.ServerStream) bool {
	f := &s.flight
	p := &f.plan
	x := f.x.(*http2.Exchange) // Begin has looked
	resp := x.Whole()
	if resp == nil || resp.Tunnel {
		return false
	}
	outcome := outcomeOf(resp)
	if s.rule.Retry.Retriable(outcome) {
		return false
	}
	now := time.Now()
	s.answered(p, resp, now.Sub(f.sent))
	if !x.RespondWhole(&s.edits) {
		return false
	}
	s.busy.Store(nil)
	s.log.Sent = resp.Body.Bytes()
	s.noteGRPC(resp)
	s.up.Put(f.up)
	s.tried(p, nil, route.Outcome{Status: outcome.Status}, st.Err() != nil)
	s.finish(now)
	return true
}
