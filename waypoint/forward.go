package waypoint

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/mistnet/mistnet/waypoint/upstream"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/accesslog"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/http2"
	"github.com/mistnet/mistnet/waypoint/route"
)

// plan is how the request being served is forwarded.
type plan struct {
	backend *route.Backend
	target  *upstream.Target // nil when a workload was asked for
	direct  *mesh.Workload   // the workload
	self    *mesh.Workload   // this waypoint's own pod
	path    string
	host    string
	name    string // of the host that the client asked for, where that is to be found
	http2   bool   // to the endpoint
	either  bool   // HTTP/1.1 is tried, for HTTP/2 has no way to ask for what the client wants

	patience
}

// forward sends the request to a backend, again if need be, and its response to the client.
func (s *session) forward(ctx context.Context, b *route.Backend) *upstream.Conn {
	p := &s.flight.plan
	if s.progress < planned {
		if s.flight.unplanned = s.plan(p, b); s.flight.unplanned == nil {
			s.progress = planned
		}
	}
	if r := s.flight.unplanned; r != nil {
		return s.answer(*r)
	}
	if p.http2 && s.keyless() {
		return s.answer(replyKeyless)
	}
	if s.progress < picked {
		if r := s.locate(ctx, p); r != nil {
			return s.answer(*r)
		}
		if r := s.admitted(ctx, p); r != nil {
			return s.answer(*r)
		}
		s.mirror(p)
	}
	for attempt := uint32(1); ; attempt++ {
		up, outcome, r := s.try(ctx, p, attempt)
		if r == nil {
			return up
		}
		if ctx.Err() != nil {
			s.log.Fail("DC", "downstream_remote_disconnect")
			return nil
		}
		last := *r
		if !s.flight.claimed && !s.claims(p, outcome, &last.flags) || !s.again(ctx) {
			return s.answer(last)
		}
	}
}

// locate finds the host that the client asked for, where that is what the backend is. It waits for DNS.
func (s *session) locate(ctx context.Context, p *plan) *reply {
	if p.target == nil || !p.target.Service.Dynamic {
		return nil
	}
	if until := p.waits(); !until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, until)
		defer cancel()
	}
	switch err := s.search.Locate(ctx, s.up, p.name); {
	case err == nil:
		return nil
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() != nil:
		return &replyTimeout
	case errors.Is(err, upstream.ErrNames):
		return &replyNames
	default:
		s.Waypoint.log.Debug("host not found", zap.Error(err))
		return &replyUnresolved
	}
}

// admitted waits for the request's turn where a policy bounds how many there may be. A reply says that there is no room.
func (s *session) admitted(ctx context.Context, p *plan) *reply {
	if p.target == nil {
		return nil
	}
	p.target.Cluster.Begun(p.target.Settings.RetryBudget, s.log.Start)
	if !p.target.Bounded() {
		return nil
	}
	if until := p.waits(); !until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, until)
		defer cancel()
	}
	pool := p.target.Settings.Pool
	if p.http2 { // one connection carries all
		pool = &p.target.Shared
	}
	switch err := p.target.Cluster.Enter(ctx, pool); {
	case err == nil:
		s.held = p.target.Cluster
		return nil
	case errors.Is(err, context.DeadlineExceeded):
		return &replyTimeout
	case errors.Is(err, upstream.ErrOverflow):
		return &replyOverflow
	}
	return &reply{flags: "DC", details: "downstream_remote_disconnect"}
}

// claims reserves another try after one that ended so. False: the rule wants none, and flags get what the log says of that; or there is no
// time left for one.
func (s *session) claims(p *plan, o route.Outcome, flags *string) bool {
	attempt := s.log.Attempts
	switch {
	case !s.rule.Retry.Retriable(o):
		return false
	case attempt > s.rule.Retry.Attempts:
		if attempt > 1 {
			*flags = withFlag(*flags, "URX")
		}
		return false
	}
	s.retried()
	pause := s.rule.Retry.Backoff(attempt, rand.Uint32())
	if whole := p.ends(); !p.hasTime() || !whole.IsZero() && time.Until(whole) <= pause {
		return false
	}
	if p.target != nil {
		if !p.target.Cluster.Retry(&p.target.Settings, time.Now()) {
			*flags = withFlag(*flags, "UO")
			return false
		}
		s.retrying = p.target.Cluster
	}
	s.flight.claimed, s.flight.pause = true, pause
	return true
}

// withFlag is the log's flags with another one.
func withFlag(flags, flag string) string {
	if flags == "" || flags == "-" {
		return flag
	}
	return flags + "," + flag
}

// again waits before the try that was claimed. False: the client or the body is gone.
func (s *session) again(ctx context.Context) bool {
	s.flight.claimed = false
	return s.q.Body.Rewind() && sleep(ctx, s.flight.pause)
}

// retried ends a retry, if it was one.
func (s *session) retried() {
	if s.retrying != nil {
		s.retrying.RetryOver()
		s.retrying = nil
	}
}

// plan finds out where a request goes; a reply says why it cannot.
func (s *session) plan(p *plan, b *route.Backend) *reply {
	if r := s.lastHop(); r != nil {
		return r
	}
	v := s.view
	p.backend = b
	if p.began = s.log.Start; s.flight.fault.Delay > 0 {
		p.began = time.Now() // it is no part of what the rule gives the application
	}
	whole, try := s.rule.Timeouts(s.grpcTimeout())
	p.timeout, p.try = whole, try
	if p.timed() && (s.req.GRPC || s.here()) {
		p.arrived(p.began)
	}
	if p.path, p.host = s.rule.Rewrite(b, s.at, &s.req); p.path != s.req.Path && s.normal.climbs(p.path) {
		return &replyClimbs
	}
	key := s.to.cluster(b.Service, &b.Ref)
	s.log.Cluster(key.Subset, key.Port)
	if r := s.trespasses(p, key); r != nil {
		return r
	}
	if key.Service == "" {
		if p.direct, p.self = v.Workload(s.to.uid), v.Self; p.direct == nil {
			return &replyNoUpstream
		}
		p.http2 = s.http2(s.to.app, nil)
		return nil
	}
	s.log.Service = v.Service(key.Service)
	if p.target = v.Target(s.up, key); p.target == nil {
		return s.noCluster()
	}
	if p.target.Service.Dynamic {
		p.name = upstream.HostOf(cmp.Or(p.host, s.q.Authority))
		if !p.target.Service.Covers(p.name) {
			return &replyNoRoute
		}
	}
	p.http2 = s.http2(p.target.App, p.target.Settings.Pool)
	hash := ""
	if p.target.Hash != nil {
		hash = s.hashKey(p.target.Hash)
	}
	s.search.Begin(s.up, p.target, &s.client, s.to.addr, hash)
	s.search.OtherTiers(s.rule.Retry.OtherLocalities)
	s.persist(cmp.Or(s.rule.Persistence, p.target.Settings.Persistence), s.log.Start)
	return nil
}

// noCluster is the answer when there is no such backend: it differs by who wrote the rule.
func (s *session) noCluster() *reply {
	r := replyNoCluster
	if s.rule.Route != nil && s.rule.Route.Kind != mesh.KindVirtualService {
		r.status = 500
	}
	return &r
}

func (s *session) grpcTimeout() string {
	if !s.req.GRPC {
		return ""
	}
	v, _ := s.q.Value("grpc-timeout")
	return v
}

// try makes one attempt. A reply says what to answer if it is the last; with none, the request was answered.
func (s *session) try(ctx context.Context, p *plan, attempt uint32) (*upstream.Conn, route.Outcome, *reply) {
	if s.progress < picked && !s.pick(p, attempt, time.Now()) {
		return nil, route.Outcome{Reset: route.ResetOverflow}, &replyNoUpstream
	}
	up, outcome, r := s.exchange(ctx, p, s.flight.to)
	s.tried(p, up, outcome, ctx.Err() != nil)
	return up, outcome, r
}

// pick chooses where a try goes, and counts it there; tried ends that. False: there is nobody.
func (s *session) pick(p *plan, attempt uint32, now time.Time) bool {
	to := &s.flight.to
	if p.direct != nil {
		*to = s.up.Workload(p.self, p.direct, s.to.addr)
	} else {
		if !s.avoids() {
			s.search.Again()
		}
		var ok bool
		if *to, ok = s.search.Next(s.up, now); !ok {
			return false
		}
	}
	s.progress = picked
	s.log.Upstream, s.log.Workload, s.log.Attempts = to.Addr(), to.Workload, attempt
	s.settle(to, s.log.Start)
	to.Begin()
	return true
}

// tried ends a try. up is what is still in use.
func (s *session) tried(p *plan, up *upstream.Conn, outcome route.Outcome, clientGone bool) {
	to := &s.flight.to
	if up == nil {
		to.End()
	}
	if !clientGone && outcome.Reset != route.ResetOverflow {
		s.search.Observe(to, upstream.ResultOf(outcome))
	}
	s.progress = planned
}

// avoids reports whether a request is not to go where it has been. By default, what is hashed may.
func (s *session) avoids() bool {
	switch s.rule.Retry.PreviousHosts {
	case mesh.PreviousHostsAllow:
		return false
	case mesh.PreviousHostsAvoid:
		return true
	case mesh.PreviousHostsDefault:
	}
	return !s.search.Keyed()
}

// maxResends bounds how often a request is sent once more within a try, which no retry policy is asked about: each is on another
// connection, the last on one of its own.
const maxResends = 4

// resends reports whether a failed exchange is made once more within the same try, n times having been made before. It is where nobody
// has looked at the request, and where a connection that was there ended before it said anything, if the request may be sent twice. An
// application that refuses a stream has said how it fares: it is asked once more, as by gRPC (proposal A6), and then as retries are.
func (s *session) resends(up *upstream.Conn, e *http1.Error, n int) bool {
	switch {
	case n >= maxResends:
		return false
	case e.Reason == http1.UpstreamClosed:
		return up.Reused && idempotent(s.q.Method)
	case e.Reason == http1.UpstreamRefused && errors.Is(e, http2.ErrUnseen):
		return true
	}
	return e.Reason == http1.UpstreamRefused && up.Reused && n == 0
}

// exchange carries the request to an endpoint, and the response back unless it is one to try again.
func (s *session) exchange(ctx context.Context, p *plan, to upstream.Pick) (*upstream.Conn, route.Outcome, *reply) {
	f := &s.flight
	for n := 0; ; n++ {
		var err error
		if s.progress < launched {
			if n == 0 { // else the time of the try goes on
				f.until, f.untilWhole = s.deadline(p, time.Now())
			}
			if s.progress < connected {
				if f.up, err = s.connect(ctx, p, to, n, f.until); err != nil {
					return s.unconnected(err, f.until, f.untilWhole)
				}
			}
			s.address(ctx, p, time.Now())
			err = f.x.Send(&s.edits)
		}
		s.progress = picked // what comes next is done anew
		up, x := f.up, f.x
		var resp *http1.Response
		if err == nil {
			resp, err = x.Receive()
		}
		if err != nil {
			s.busy.Store(nil)
			up.Close()
			e := asError(err)
			if s.resends(up, e, n) && ctx.Err() == nil && s.q.Body.Rewind() {
				continue
			}
			if e.Reason == http1.UpstreamReset && !f.until.IsZero() && !time.Now().Before(f.until) {
				e = http1.Fail(http1.UpstreamTimeout, e) // it was told when to give up, and was heard before our own clock
			}
			if p.either && (e.Reason == http1.UpstreamBroken || e.Reason == http1.UpstreamClosed || e.Reason == http1.UpstreamCut) {
				return nil, route.Outcome{Reset: route.ResetProtocol, Sent: true}, &replyNoExtended
			}
			return s.failed(e, f.untilWhole)
		}
		if !s.shaken.answered(resp) {
			s.busy.Store(nil)
			x.Abort()
			up.Close()
			return nil, route.Outcome{Reset: route.ResetProtocol, Sent: true}, &replyProtocol
		}
		return s.respond(p, x, up, resp, f.sent)
	}
}

// address makes the exchange with the upstream there is, and the request ready for it.
func (s *session) address(ctx context.Context, p *plan, now time.Time) {
	f := &s.flight
	s.busy.Store(f.up)
	if ctx.Err() != nil {
		f.up.HangUp()
	}
	f.up.SetDeadline(f.until)
	f.sent = now
	f.x = s.exchangeWith(f.up)
	s.watchUpload(p, f.up)
	s.countRequests()
	s.requestEdits(p, f.until)
	s.note(accesslog.Request, &s.q.Fields, &s.edits)
	s.shake(f.up)
}

// connect returns what the request is sent on, n times having been sent before.
func (s *session) connect(ctx context.Context, p *plan, to upstream.Pick, n int, until time.Time) (*upstream.Conn, error) {
	last := n == maxResends && s.q.Upgrade == ""
	switch {
	case p.http2 && s.q.Upgrade == "" && !last:
		if up := s.up.StreamNow(&to); up != nil {
			return up, nil
		}
	case !p.http2 && n == 0:
		if up := s.up.Kept(&to, !idempotent(s.q.Method)); up != nil {
			return up, nil
		}
	}
	within, pool := upstream.ConnectTimeout, (*mesh.ConnectionPool)(nil)
	if p.target != nil {
		within, pool = p.target.Connect, p.target.Settings.Pool
	}
	limit := time.Now().Add(within)
	if !until.IsZero() && until.Before(limit) {
		limit = until
	}
	ctx, cancel := context.WithDeadline(ctx, limit)
	defer cancel()
	if p.http2 && last {
		return s.up.Alone(ctx, to, s.header(), pool)
	}
	if p.http2 {
		up, err := s.up.Stream(ctx, to, s.header(), pool, within)
		if s.q.Upgrade == "" || err == nil && extended(ctx, up) {
			return up, err
		}
		if err == nil {
			up.Close()
		}
		p.http2, p.either = false, true
	}
	return s.up.Connect(ctx, to, s.header())
}

func (s *session) unconnected(err error, until time.Time, whole bool) (*upstream.Conn, route.Outcome, *reply) {
	if !until.IsZero() && !time.Now().Before(until) {
		return nil, route.Outcome{Reset: route.ResetTimeout}, timeoutReply(whole)
	}
	r := replyConnect(err)
	s.log.Failure = err.Error()
	return nil, route.Outcome{Reset: route.ResetConnect}, &r
}

func timeoutReply(whole bool) *reply {
	if whole {
		return &replyTimeout
	}
	return &replyTryTimeout
}

// failed says what the end of an exchange without a response means.
func (s *session) failed(e *http1.Error, whole bool) (*upstream.Conn, route.Outcome, *reply) {
	if e.Client() || e.Reason == http1.BadEdit || e.Reason == http1.Overload {
		flags, text := "DPE", ""
		switch e.Reason {
		case http1.BadContent:
			text = "Bad gRPC-web request, invalid base64 data."
		case http1.ClientClosed:
			flags = "DC"
		case http1.Overload:
			flags = "OM"
		}
		return nil, route.Outcome{Reset: route.ResetOverflow}, &reply{e.Status, text, flags, e.Error()}
	}
	outcome := route.Outcome{Sent: true}
	switch e.Reason {
	case http1.UpstreamTimeout:
		return nil, route.Outcome{Reset: route.ResetTimeout, Sent: true}, timeoutReply(whole)
	case http1.UpstreamBroken:
		outcome.Reset = route.ResetProtocol
		return nil, outcome, &replyProtocol
	case http1.UpstreamRefused:
		outcome.Reset = route.ResetRefusedStream
		return nil, outcome, &replyRefused
	case http1.UpstreamReset:
		outcome.Reset = route.ResetStream
		return nil, outcome, &replyReset
	}
	outcome.Reset = route.ResetConnection
	return nil, outcome, &replyClosed
}

// respond passes the response on, unless another try is to be made instead.
func (s *session) respond(p *plan, x exchange, up *upstream.Conn, resp *http1.Response, sent time.Time) (*upstream.Conn, route.Outcome, *reply) {
	flags := "-"
	if o := outcomeOf(resp); x.Repeatable() && s.claims(p, o, &flags) {
		status := resp.Status
		kept := abandon(x)
		s.busy.Store(nil)
		if kept {
			s.up.Put(up)
		} else {
			up.Close()
		}
		return nil, o, &reply{status, "", "URX", "via_upstream"}
	}
	p.respond(up, resp.Tunnel) // what follows a switch of protocols has no end of its own
	s.log.Flags = flags
	s.answered(p, resp, time.Since(sent))
	tunnel, outcome := resp.Tunnel, route.Outcome{Status: uint16(resp.Status)}
	err := s.pass(x, resp)
	s.busy.Store(nil)
	s.log.Sent = resp.Body.Bytes()
	s.noteGRPC(resp)
	switch {
	case err != nil:
		up.Close()
		s.cut(asError(err))
	case tunnel:
		return up, outcome, nil
	default:
		s.up.Put(up)
	}
	return nil, outcome, nil
}

// answered notes the upstream's response, and makes it ready for the client.
func (s *session) answered(p *plan, resp *http1.Response, took time.Duration) {
	s.log.Status, s.log.Details, s.log.UpstreamTime, s.log.Answered = resp.Status, "via_upstream", took, true
	s.log.Responded = s.flight.sent.Sub(s.log.Start) + took
	s.responseEdits(p, &resp.Fields, took)
	s.note(accesslog.Response, &resp.Fields, &s.edits)
	s.conclude(resp)
	s.countResponses(resp)
}

// abandon ends an exchange whose response is not wanted, and reports whether its connection can carry another.
func abandon(x exchange) bool {
	if x, ok := x.(*http1.Exchange); ok {
		return x.Discard()
	}
	x.Abort()
	return false
}

// asError is what the engine says of a failure.
func asError(err error) *http1.Error {
	if e, ok := errors.AsType[*http1.Error](err); ok {
		return e
	}
	return &http1.Error{Status: 502, Reason: http1.UpstreamBroken, Err: err}
}

// cut records that a response broke off. What can still be answered, is.
func (s *session) cut(e *http1.Error) {
	switch {
	case !s.down.Answered():
		s.answer(reply{e.Status, "", "UPE", e.Error()})
	case e.Client():
		s.log.Fail("DC", "downstream_remote_disconnect")
	case e.Reason == http1.UpstreamTimeout:
		s.log.Fail("UT", "response_timeout")
	case e.Reason == http1.Overload:
		s.log.Fail("OM", e.Error())
	default:
		s.log.Fail("UC", e.Error())
	}
}

func outcomeOf(resp *http1.Response) route.Outcome {
	o := route.Outcome{Sent: true, Status: uint16(resp.Status)}
	_, o.Ratelimited = resp.Value("x-envoy-ratelimited")
	if v, ok := resp.Value("grpc-status"); ok {
		if n, err := strconv.ParseUint(v, 10, 32); err == nil {
			o.GRPC, o.GRPCStatus = true, uint32(n)
		}
	}
	return o
}

// idempotent methods may be sent twice (RFC 9110, 9.2.2).
func idempotent(method string) bool {
	switch method {
	case "GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE":
		return true
	}
	return false
}

// http2 reports whether the request goes out by HTTP/2: as the port's protocol says, as the client came where that is not
// known, or as the traffic policy wants. Where a client asks for another protocol it is what is tried first.
func (s *session) http2(app mesh.AppProtocol, pool *mesh.ConnectionPool) bool {
	switch {
	case pool != nil && pool.UseClientProtocol, app == mesh.AppUnknown && (pool == nil || pool.Upgrade != mesh.H2UpgradeAlways):
		return s.stream != nil
	case app.HTTP2():
		return true
	}
	return pool != nil && pool.Upgrade == mesh.H2UpgradeAlways
}
