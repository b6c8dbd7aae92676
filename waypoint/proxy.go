package waypoint

import (
	"context"
	crand "crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/route"
)

// session is one HTTP/1.1 connection of a client: a request after the other.
type session struct {
	*tunnel
	conn *http1.ServerConn

	// Of the request being served.
	view   *view
	q      *http1.Request
	req    route.Request
	asked  authz.HTTP // the same, as policies see it
	rule   *route.Rule
	at     route.Matched
	log    record
	edits  http1.Edits
	cors   route.CORSDecision
	tried  []*endpoint
	held   *cluster // that counts the request; nil: none does
	cookie string   // to set; "": none

	busy  atomic.Pointer[net.Conn] // of the upstream that is waited for
	cache seriesCache
}

// serveHTTP serves requests until the connection ends.
func (t *tunnel) serveHTTP(ctx context.Context, conn relay.Conn) {
	s := &session{tunnel: t, conn: http1.NewServerConn(conn, http1.Config{HTTP10: t.cfg.HTTP10})}
	defer s.conn.Close()
	t.sessions.add(s)
	defer t.sessions.remove(s)
	// A client that is gone ends the wait for its response.
	stop := context.AfterFunc(ctx, func() {
		if up := s.busy.Load(); up != nil {
			_ = (*up).Close()
		}
	})
	defer stop()
	for {
		q, err := s.conn.ReadRequest()
		if err == io.EOF {
			return
		}
		s.begin(q)
		if err != nil {
			s.unread(err)
			return
		}
		up := s.serve(ctx)
		if up == nil {
			s.finish()
			continue
		}
		if err := relay.Pump(ctx, s.conn.Raw(), up.Raw(), &s.log.bytes); err != nil {
			s.log.fail("UC", err.Error())
		}
		up.to.active.Add(-1)
		s.finish()
		return
	}
}

// begin starts the record of a request; q is nil when it could not be read.
func (s *session) begin(q *http1.Request) {
	s.q, s.rule, s.at, s.cors, s.tried = q, nil, route.Matched{}, route.CORSDecision{}, s.tried[:0]
	s.cookie = ""
	s.view = s.state.load()
	s.log = record{start: time.Now(), client: &s.client, to: &s.to, http: true, flags: "-"}
}

// unread answers what is no request.
func (s *session) unread(err error) {
	e, ok := errors.AsType[*http1.Error](err)
	if !ok || e.Status == 0 {
		if ok && e.Reason == http1.Preface {
			s.rep.unserved(s.tunnel, "HTTP/2 is not spoken on this port")
		}
		return
	}
	s.log.status, s.log.flags, s.log.details = e.Status, "DPE", e.Error()
	s.edits.Reset()
	s.edits.Set("server", serverName)
	_ = s.conn.ReplyError(err, &s.edits)
	s.finish()
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
	replyDenied     = reply{403, "RBAC: access denied", "-", ""}
	replyNoRoute    = reply{404, "", "NR", "route_not_found"}
	replyNoCluster  = reply{503, "", "NC", "cluster_not_found"}
	replyNoUpstream = reply{503, "no healthy upstream", "UH", "no_healthy_upstream"}
	replyTimeout    = reply{504, "upstream request timeout", "UT", "response_timeout"}
	replyTryTimeout = reply{504, "upstream request timeout", "UT", "upstream_per_try_timeout"}
	replyClosed     = reply{503, resetPrefix + "connection termination", "UC",
		"upstream_reset_before_response_started{connection_termination}"}
	replyOverflow = reply{503, resetPrefix + "overflow", "UO", "upstream_reset_before_response_started{overflow}"}
	replyProtocol = reply{502, resetPrefix + "protocol error", "UPE",
		"upstream_reset_before_response_started{protocol_error}"}
)

const resetPrefix = "upstream connect error or disconnect/reset before headers. reset reason: "

func replyConnect(err error) reply {
	return reply{503, resetPrefix + "remote connection failure, transport failure reason: " + printable(err.Error()), "UF",
		"upstream_reset_before_response_started{remote_connection_failure}"}
}

func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return ' '
		}
		return r
	}, s)
}

// serve answers one request. It returns the upstream when the two connections are to be joined.
func (s *session) serve(ctx context.Context) *upstream {
	s.describe()
	r := s.request()
	s.asked = authz.HTTP{Method: s.req.Method, Host: s.req.Authority, Path: s.req.Path, Header: s.q}
	r.HTTP = &s.asked
	if ok, details := s.view.authorize(s.to.service, &r); !ok {
		denied := replyDenied
		denied.details = details
		return s.answer(denied)
	}
	s.rule, s.at = s.view.table.Match(s.to.service, s.to.port, &s.req)
	if s.rule == nil {
		return s.answer(replyNoRoute)
	}
	s.log.route = s.rule
	if s.rule.Refuse != 0 {
		s.Waypoint.log.Debug("request refused by an invalid rule", zap.String("rule", s.rule.Name()), zap.String("reason", s.rule.Why))
		return s.answer(reply{int(s.rule.Refuse), "", "-", "direct_response"})
	}
	if done := s.fault(ctx); done {
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
	b, status := s.rule.Backend(rand.Uint32())
	if status != 0 {
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

// describe makes the request ready to be matched.
func (s *session) describe() {
	q := s.q
	scheme, ok := q.Value("x-forwarded-proto")
	if !ok {
		scheme = "http"
	}
	contentType, _ := q.Value("content-type")
	s.req = route.Request{
		Method: q.Method, Scheme: scheme, Authority: q.Authority, Path: normalize(q.Path), RawQuery: q.RawQuery, Header: q,
		Port: s.to.port, SourceNamespace: s.client.namespace(), GRPC: strings.HasPrefix(contentType, "application/grpc"),
	}
	s.log.method, s.log.target, s.log.authority = q.Method, q.Target, q.Authority
	s.log.userAgent, _ = q.Value("user-agent")
	if s.log.requestID, ok = q.Value("x-request-id"); !ok {
		s.log.requestID = newRequestID()
	}
}

// fault does to the request what its rule asks for, and reports whether that ends it.
func (s *session) fault(ctx context.Context) bool {
	f := s.rule.Fault(rand.Uint32(), rand.Uint32(), s.req.GRPC)
	if f.Delay > 0 {
		s.log.flags = "DI"
		if !sleep(ctx, f.Delay) {
			s.log.fail("DC", "downstream_remote_disconnect")
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
	if f.GRPC {
		s.edits.Reset()
		s.edits.Set("content-type", "application/grpc")
		s.edits.Set("grpc-status", strconv.Itoa(int(f.GRPCStatus)))
		s.edits.Set("grpc-message", "fault filter abort")
		s.send(reply{int(f.HTTPStatus), "", flags, "fault_filter_abort"})
		return true
	}
	s.answer(reply{int(f.HTTPStatus), "fault filter abort", flags, "fault_filter_abort"})
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

func (s *session) redirect(d *route.Redirect) *upstream {
	s.edits.Reset()
	s.edits.Set("location", d.Location(s.at, &s.req))
	s.send(reply{int(d.Status), "", "-", "direct_response"})
	return nil
}

// answer replies; it returns nil for serve to return.
func (s *session) answer(r reply) *upstream {
	s.edits.Reset()
	s.send(r)
	return nil
}

// send replies with the edits made so far.
func (s *session) send(r reply) {
	s.log.status, s.log.details = r.status, r.details
	if r.flags != "-" {
		s.log.flags = r.flags
	}
	s.log.sent = int64(len(r.body))
	if r.status == 0 { // nobody to tell
		return
	}
	s.edits.Set("server", serverName)
	if r.flags == replyOverflow.flags {
		s.edits.Set("x-envoy-overloaded", "true")
	}
	s.corsHeaders()
	if err := s.conn.Reply(r.status, r.body, &s.edits); err != nil {
		s.log.fail("DC", "downstream_remote_disconnect")
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
func (s *session) finish() {
	if s.held != nil {
		s.held.leave()
		s.held = nil
	}
	if s.q != nil && s.log.received == 0 {
		s.log.received = s.q.Body.Bytes()
	}
	s.rep.request(&s.log, &s.cache)
	s.view, s.rule = nil, nil // a session that waits keeps no old view alive
	s.log = record{}
}

// editor lets rules change headers.
type editor struct{ *http1.Edits }

// Del implements route.EditableHeader.
func (e editor) Del(name string) { e.Remove(name) }

// newRequestID makes a random UUID (RFC 9562, 5.4).
func newRequestID() string {
	var id [16]byte
	_, _ = crand.Read(id[:])
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	b := make([]byte, 0, 36)
	for i, part := range [...][]byte{id[:4], id[4:6], id[6:8], id[8:10], id[10:]} {
		if i > 0 {
			b = append(b, '-')
		}
		b = hex.AppendEncode(b, part)
	}
	return string(b)
}
