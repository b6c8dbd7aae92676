package waypoint

import (
	"sync"
	"time"

	"github.com/mistnet/mistnet/waypoint/upstream"
)

// patience is how long an exchange may take. The timeouts of a rule run from when all of the request has come, as Envoy's do: an upload
// takes the time it takes, and a conversation is not cut because the client has yet to end its part. Those of a gRPC call run from its
// beginning: the application is told of them by grpc-timeout, and counts so.
type patience struct {
	timeout time.Duration // of the rule, for the whole exchange; 0: none
	try     time.Duration // of the rule, for each try; 0: none
	began   time.Time     // of the request, or the end of what its rule delays it by

	mu     sync.Mutex
	whole  time.Time // when all must be over; zero: never, or that is not known yet
	came   bool      // all of the request has
	headed bool      // the response to the try that is under way has begun
}

// timed reports whether it matters when the request has come.
func (p *patience) timed() bool { return p.timeout > 0 || p.try > 0 }

// arrived notes that all of the request has come.
func (p *patience) arrived(now time.Time) {
	if !p.came && p.timeout > 0 {
		p.whole = now.Add(p.timeout)
	}
	p.came = true
}

// ends is when all must be over; zero: never, as far as is known.
func (p *patience) ends() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.whole
}

// waits is until when a request may wait that goes nowhere yet; zero: for ever. It is bounded also if its body is still to come.
func (p *patience) waits() time.Time {
	until := p.ends()
	if until.IsZero() && p.timeout > 0 {
		return p.began.Add(p.timeout)
	}
	return until
}

// hasTime reports whether the exchange may still go on.
func (p *patience) hasTime() bool {
	until := p.ends()
	return until.IsZero() || time.Now().Before(until)
}

// left is the time that a try has which is to end then; 0: any. Of a request that is still coming it has all there is.
func (p *patience) left(until time.Time) time.Duration {
	switch {
	case !until.IsZero():
		return max(time.Until(until), 1)
	case p.try > 0:
		return p.try
	}
	return p.timeout
}

// deadline is when a try that begins now must be over; zero: never, or that is not known yet. whole says that it is the end of the
// exchange.
func (p *patience) deadline(now time.Time) (until time.Time, whole bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.headed = false
	return p.deadlineLocked(now)
}

func (p *patience) deadlineLocked(now time.Time) (until time.Time, whole bool) {
	until, whole = p.whole, true
	if p.came && p.try > 0 && !p.headed {
		if t := now.Add(p.try); until.IsZero() || t.Before(until) {
			return t, false
		}
	}
	return until, whole
}

// deadline is when a try that begins now must be over: patience.deadline of what is known of the request by now.
func (s *session) deadline(p *plan, now time.Time) (until time.Time, whole bool) {
	if p.timed() && !p.came && s.here() {
		p.arrived(now)
	}
	return p.deadline(now)
}

// here reports whether all of the request has come. What is wrong with it, Send will find.
func (s *session) here() bool {
	here, _ := s.q.Body.Buffered()
	return here
}

// watchUpload makes the timeouts run once the request that is about to be sent has come.
func (s *session) watchUpload(p *plan, up *upstream.Conn) {
	if !p.timed() || p.came {
		return
	}
	f := &s.flight
	f.x.OnSent(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		now := time.Now()
		p.arrived(now)
		f.until, f.untilWhole = p.deadlineLocked(now)
		up.Hasten(f.until)
	})
}

// respond gives the rest of an exchange, whose response has begun, the time that there is for all of it.
func (p *patience) respond(up *upstream.Conn, unbounded bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.headed = true
	until := p.whole
	if unbounded {
		p.came, until = true, time.Time{}
	}
	up.SetDeadline(until)
}
