package waypoint

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"github.com/mistnet/mistnet/waypoint/upstream"

	"github.com/mistnet/mistnet/waypoint/report"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/accesslog"
	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/http2"
	"github.com/mistnet/mistnet/waypoint/route"
)

// session serves a request after the other: those of an HTTP/1.1 connection, or of a worker of an HTTP/2 one.
type session struct {
	*tunnel
	down   downstream
	conn   *http1.ServerConn   // is down; nil: stream is
	stream *http2.ServerStream // of the request being served
	onGone func()              // hangUp

	// Of the request being served.
	view  *view
	q     *http1.Request
	req   route.Request
	web   *webCall   // nil: it is none of gRPC-Web
	asked authz.HTTP // the same, as policies see it
	rule  *route.Rule
	at    route.Matched
	log   report.Record
	edits http1.Edits

	response *http1.Fields // while they are changed
	cors     route.CORSDecision
	search   upstream.Search
	held     *upstream.Cluster // that counts the request; nil: none does
	cookie   string            // to set; "": none

	stays    persistence
	retrying *upstream.Cluster // that counts a retry; nil: none does

	progress progress
	flight   flight

	busy  atomic.Pointer[upstream.Conn] // that is waited for
	cache report.Cache
	calls report.CallCache

	shaken handshake

	asks, answers report.Messages // of a gRPC call

	notes []string // headers that the access log wants; nil: none
}

// downstream is the client's side of a request.
type downstream interface {
	Answered() bool
	Reply(status int, body string, e *http1.Edits) error
	ReplyError(err error, e *http1.Edits) error
}

// exchange carries the request to an upstream and its response back; http1.Exchange says how.
type exchange interface {
	Send(e *http1.Edits) error
	Receive() (*http1.Response, error)
	Respond(e *http1.Edits) error
	Repeatable() bool
	Abort()
	OnSent(f func())
}

func (s *session) exchangeWith(up *upstream.Conn) exchange {
	if s.stream != nil {
		return s.stream.Exchange(up.Far())
	}
	return s.conn.Exchange(up.Far())
}

// serveNext serves what ReadRequest has returned on a connection of HTTP/1.1, or on one that turns out to be of HTTP/2, and reports
// whether that was the last.
func (s *session) serveNext(ctx context.Context, r *resting, q *http1.Request, err error) (last bool) {
	if err == io.EOF {
		return true
	}
	if !r.used && err != nil && asError(err).Reason == http1.Preface {
		s.serveHTTP2(s.conn.Raw())
		return true
	}
	s.begin(q)
	if err != nil {
		s.unread(err)
		return true
	}
	up := s.serve(ctx)
	if up != nil {
		s.join(r.ctx, up)
	}
	s.finish(time.Now())
	return up != nil
}

// serveHTTP2 serves requests that come by HTTP/2 until the connection ends: each by a worker, whose session is used again.
func (t *tunnel) serveHTTP2(conn net.Conn) {
	c := http2.NewServerConn(conn, http2.Config{Memory: t.memory})
	t.sessions.add(c, false)
	defer t.sessions.remove(c)
	err := c.ServeWith(func() http2.Handler {
		s := &session{tunnel: t}
		s.onGone = s.hangUp
		return s
	})
	if err != nil {
		t.Waypoint.log.Debug("connection ended", zap.Stringer("src.addr", t.client.Addr), zap.Stringer("dst.addr", t.to.addr), zap.Error(err))
	}
}

// Serve implements http2.Handler.
func (s *session) Serve(st *http2.ServerStream) {
	if s.progress == unbegun {
		q, err := st.Request()
		s.down, s.stream = st, st
		s.begin(q)
		if err != nil {
			s.unread(err)
			return
		}
		st.OnGone(s.onGone)
	}
	if up := s.serve(st); up != nil {
		s.join(st, up)
	}
	s.finish(time.Now())
}

// hangUp ends the wait for an upstream: the client is gone.
func (s *session) hangUp() {
	if up := s.busy.Load(); up != nil {
		up.HangUp()
	}
}

// begin starts the record of a request; q is nil when it could not be read.
func (s *session) begin(q *http1.Request) {
	s.q, s.rule, s.at, s.cors = q, nil, route.Matched{}, route.CORSDecision{}
	s.req, s.web, s.cookie, s.stays = route.Request{}, nil, "", persistence{}
	s.asks, s.answers = report.Messages{}, report.Messages{}
	s.view = s.state.load()
	s.progress = begun
	s.log = report.Record{Start: time.Now(), Client: &s.client, Hostname: s.to.hostname, Local: s.to.addr, HTTP: true, Protocol: "HTTP/1.1", Flags: "-"}
	if s.stream != nil {
		s.log.Protocol = "HTTP/2"
	}
	s.noteNothing()
}

// unread answers what is no request.
func (s *session) unread(err error) {
	e, ok := errors.AsType[*http1.Error](err)
	if !ok || e.Status == 0 {
		return
	}
	s.log.Status, s.log.Flags, s.log.Details = e.Status, "DPE", e.Error()
	s.edits.Reset()
	s.edits.Set("server", serverName)
	_ = s.down.ReplyError(err, &s.edits)
	s.finish(time.Now())
}

// serverName is what a waypoint calls itself to clients, as Istio's does.
const serverName = "istio-envoy"

// reply is a response of the waypoint's own.
type reply struct {
	status  int
	body    string
	flags   string // Envoy's response flags
	details string // Envoy's response code details
}

// The replies that carry nothing of the request.
var (
	replyNoConnect  = reply{403, "", "-", "upgrade_failed"}
	replyNoRoute    = reply{404, "", "NR", "route_not_found"}
	replyNoCluster  = reply{503, "", "NC", "cluster_not_found"}
	replyNUL        = reply{400, "", "-", "path_normalization_failed"}
	replyClimbs     = reply{400, "", "-", "rewritten_path_has_dot_segments"}
	replyUnresolved = reply{503, "DNS resolution failure", "DF", "dns_resolution_failure"}
	replyNames      = reply{503, "DNS cache overflow", "UO", "dns_cache_overflow"}
	replyNoUpstream = reply{503, "no healthy upstream", "UH", "no_healthy_upstream"}
	replyTimeout    = reply{504, "upstream request timeout", "UT", "response_timeout"}
	replyTryTimeout = reply{504, "upstream request timeout", "UT", "upstream_per_try_timeout"}
	replyClosed     = reply{503, resetPrefix + "connection termination", "UC",
		"upstream_reset_before_response_started{connection_termination}"}
	replyOverflow = reply{503, resetPrefix + "overflow", "UO", "upstream_reset_before_response_started{overflow}"}
	replyReset    = reply{503, resetPrefix + "remote reset", "UR", "upstream_reset_before_response_started{remote_reset}"}
	replyRefused  = reply{503, resetPrefix + "remote refused stream reset", "UR",
		"upstream_reset_before_response_started{remote_refused_stream_reset}"}
	replyProtocol = reply{502, resetPrefix + "protocol error", "UPE",
		"upstream_reset_before_response_started{protocol_error}"}
)

const resetPrefix = "upstream connect error or disconnect/reset before headers. reset reason: "

func replyDenied(d verdict) *reply { return &reply{403, "RBAC: access denied", "-", d.details} }

func replyConnect(err error) reply {
	return reply{503, resetPrefix + "remote connection failure, transport failure reason: " + accesslog.Printable(err.Error()), "UF",
		"upstream_reset_before_response_started{remote_connection_failure}"}
}

// serve answers one request, from where Begin has left it. It returns the upstream when the two connections are to be joined.
func (s *session) serve(ctx context.Context) *upstream.Conn {
	if s.progress < judged {
		s.flight.refusal = s.judge()
	}
	if s.flight.refusal != nil {
		return s.answer(*s.flight.refusal)
	}
	if s.progress < drawn {
		s.flight.fault = s.drawFault()
	}
	if done := s.fault(ctx, s.flight.fault); done {
		return nil
	}
	if s.cors = s.rule.CORS.Decide(&s.req); s.cors.Answer {
		return s.answer(reply{200, "", "-", "cors"})
	}
	if d := s.rule.Redirect; d != nil {
		return s.redirect(d)
	}
	if d := s.rule.Direct; d != nil {
		return s.answer(reply{int(d.Status), string(d.Body), "-", "direct_response"})
	}
	if s.progress < chosen {
		s.flight.backend, s.flight.status = s.rule.Backend(rand.Uint32())
	}
	b := s.flight.backend
	if status := s.flight.status; status != 0 {
		flags := "-"
		if b != nil {
			flags = "NC"
		}
		return s.answer(reply{int(status), "", flags, "cluster_not_found"})
	}
	if b.Redirect != nil {
		return s.redirect(b.Redirect)
	}
	return s.forward(ctx, b)
}

// judge finds the rule of a request; a reply refuses it.
func (s *session) judge() *reply {
	s.describe()
	if s.q.Method == "CONNECT" {
		return s.refuseConnect()
	}
	if s.normal.refuses(s.q.Path) {
		return &replyNUL
	}
	s.asked = authz.HTTP{Method: s.req.Method, Host: s.req.Authority, Path: s.req.Path, Header: s.q}
	if d := s.authorize(s.view, &s.asked); !d.ok {
		return replyDenied(d)
	}
	if svc := s.view.Service(s.to.service); svc != nil && svc.Dynamic && !svc.Covers(upstream.HostOf(s.req.Authority)) {
		return &replyNoRoute
	}
	s.rule, s.at = s.view.table.Match(s.to.service, s.to.port, &s.req)
	if s.rule == nil {
		return &replyNoRoute
	}
	s.log.Route = s.rule
	if s.rule.Refuse != 0 {
		s.Waypoint.log.Debug("request refused by an invalid rule", zap.String("rule", s.rule.Name()), zap.String("reason", s.rule.Why))
		return &reply{int(s.rule.Refuse), "", "-", "direct_response"}
	}
	return nil
}

// trespasses refuses what a rule leads to another service whose policies do not let it in, as it would arrive there.
func (s *session) trespasses(p *plan, to upstream.ClusterKey) *reply {
	if s.rule.Route == nil || to.Service == s.to.service {
		return nil
	}
	if d := s.authorizeLead(s.view, s.rule, to, s.led(p)); !d.ok {
		return replyDenied(d)
	}
	return nil
}

// led is the request as policies see it where a rule leads it.
func (s *session) led(p *plan) *authz.HTTP {
	asked := s.asked
	asked.Path, asked.Host = p.path, p.host
	return &asked
}

// refuseConnect refuses a tunnel through the application, as Envoy does that was not told otherwise. Nobody would look at the
// requests in it, and many an application answers CONNECT with 200 like any other request, and then reads the next.
func (s *session) refuseConnect() *reply {
	if s.conn != nil {
		s.conn.Wind() // who believes that a tunnel begins may be sending through it
	}
	return &replyNoConnect
}

// describe makes the request ready to be matched.
func (s *session) describe() {
	q := s.q
	q.Withhold(vouched)
	scheme := "http" // a redirect begins with it
	if v, _ := q.Value("x-forwarded-proto"); strings.EqualFold(v, "https") {
		scheme = "https"
	}
	contentType, _ := q.Value("content-type")
	s.req = route.Request{
		Method: q.Method, Scheme: scheme, Authority: q.Authority, Path: s.normal.normalize(q.Path), RawQuery: q.RawQuery, Header: q,
		Port: s.to.port, SourceNamespace: s.client.Namespace(), SourceLabels: s.client.Labels(), GRPC: isGRPC(contentType),
	}
	if s.to.app == mesh.AppGRPCWeb {
		s.callWeb(contentType)
	}
	s.log.Method, s.log.Target, s.log.Authority = q.Method, q.Target, q.Authority
	s.log.UserAgent, _ = q.Value("user-agent")
	s.log.ForwardedFor, _ = q.Value("x-forwarded-for")
	s.log.GRPC = s.req.GRPC
	var ok bool
	if s.log.RequestID, ok = q.Value("x-request-id"); !ok || s.log.RequestID == "" {
		s.log.RequestID = newRequestID()
	}
	s.note(accesslog.Request, &q.Fields, nil)
}

// drawFault decides whether the request fails on purpose.
func (s *session) drawFault() route.Fault {
	return s.rule.Fault(rand.Uint32(), rand.Uint32(), s.req.GRPC)
}

// fault does to the request what its rule asks for, and reports whether that ends it.
func (s *session) fault(ctx context.Context, f route.Fault) bool {
	if f.Delay > 0 {
		s.log.Flags = "DI"
		if !sleep(ctx, f.Delay) {
			s.log.Fail("DC", "downstream_remote_disconnect")
			return true
		}
	}
	if !f.Abort {
		return false
	}
	flags := "FI"
	if f.Delay > 0 {
		flags = "DI,FI"
	}
	r := reply{int(f.HTTPStatus), "fault filter abort", flags, "fault_filter_abort"}
	if f.GRPC {
		s.edits.Reset()
		s.replyEdits(&r)
		if s.web != nil {
			s.sendWeb(r, f.GRPCStatus)
			return true
		}
		s.sendGRPC(r, f.GRPCStatus)
		return true
	}
	s.answer(r)
	return true
}

// sleep waits for d; false: ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (s *session) redirect(d *route.Redirect) *upstream.Conn {
	s.edits.Reset()
	s.edits.Set("location", d.Location(s.at, &s.req))
	s.send(reply{int(d.Status), "", "-", "direct_response"})
	return nil
}

// answer replies; it returns nil for serve to return.
func (s *session) answer(r reply) *upstream.Conn {
	s.edits.Reset()
	s.send(r)
	return nil
}

// send replies with the edits made so far.
func (s *session) send(r reply) {
	s.replyEdits(&r)
	if s.web != nil && r.status != 0 {
		s.sendWeb(r, grpcStatus(r.status))
		return
	}
	if s.req.GRPC && r.status != 0 {
		s.sendGRPC(r, grpcStatus(r.status))
		return
	}
	s.reply(r)
}

// reply replies as to any client.
func (s *session) reply(r reply) {
	s.log.Status, s.log.Details = r.status, r.details
	if r.flags != "-" {
		s.log.Flags = r.flags
	}
	s.log.Sent = int64(len(r.body))
	if r.status == 0 { // nobody to tell
		return
	}
	s.edits.Set("server", serverName)
	if r.flags == replyOverflow.flags {
		s.edits.Set("x-envoy-overloaded", "true")
	}
	s.corsHeaders()
	s.note(accesslog.Response, nil, &s.edits)
	if err := s.down.Reply(r.status, r.body, &s.edits); err != nil {
		s.log.Fail("DC", "downstream_remote_disconnect")
	}
}

// corsHeaders are those of the response that the rule's CORS policy decides.
func (s *session) corsHeaders() {
	d := &s.cors
	for _, h := range [...]struct{ name, value string }{
		{"access-control-allow-origin", d.AllowOrigin}, {"access-control-allow-methods", d.AllowMethods},
		{"access-control-allow-headers", d.AllowHeaders}, {"access-control-expose-headers", d.ExposeHeaders},
		{"access-control-max-age", d.MaxAge},
	} {
		if h.value != "" {
			s.edits.Set(h.name, h.value)
		}
	}
	if d.AllowCredentials {
		s.edits.Set("access-control-allow-credentials", "true")
	}
}

// finish ends the record of a request.
func (s *session) finish(now time.Time) {
	if s.held != nil {
		s.held.Leave()
		s.held = nil
	}
	s.retried()
	if s.web != nil {
		s.q.Body.Through(nil)
		s.web = nil
	}
	if s.q != nil && s.log.Received == 0 {
		s.log.Received = s.q.Body.Bytes()
	}
	s.rep.Request(&s.log, &s.cache, now)
	s.view, s.rule, s.search = nil, nil, upstream.Search{} // a session that waits keeps no old view alive
	clear(s.log.Headers)                                   // their strings are somebody's memory
	s.log = report.Record{}
	s.progress, s.flight = unbegun, flight{}
}

// newRequestID makes a random UUID (RFC 9562, 5.4). It names a request and keeps no secret: math/rand's generator cannot be guessed
// either, and costs a tenth of crypto/rand's.
func newRequestID() string {
	const hex = "0123456789abcdef"
	var id [16]byte
	binary.LittleEndian.PutUint64(id[:8], rand.Uint64())
	binary.LittleEndian.PutUint64(id[8:], rand.Uint64())
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	var b [36]byte
	at := 0
	for i, c := range id {
		if i == 4 || i == 6 || i == 8 || i == 10 {
			b[at] = '-'
			at++
		}
		b[at], b[at+1] = hex[c>>4], hex[c&15]
		at += 2
	}
	return string(b[:])
}
