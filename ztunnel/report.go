package ztunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"net/netip"
	"strconv"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/ztunnel/nexthop"
)

// record is what is told of one connection: one access-log line and one update of the metrics, at its end.
type record struct {
	start   time.Time
	inbound bool // which side of the connection this ztunnel is

	src, dst     netip.AddrPort
	tunnel       string // dst.hbone_addr: what the CONNECT asked for
	srcWorkload  *mesh.Workload
	dstWorkload  *mesh.Workload
	service      *mesh.Service
	srcID, dstID mesh.Identity // as proven by mutual TLS, or zero

	bytes  relay.Counters // AToB is the request's direction
	series *series        // nil until the connection counts as opened
}

// flag is Istio's response_flags: why a connection ended. The set is closed.
type flag string

const (
	flagNone          flag = "-"
	flagDeny          flag = "DENY"
	flagConnect       flag = "CONNECT"
	flagTLS           flag = "TLS_FAILURE"
	flagHTTP2         flag = "H2_HANDSHAKE_FAILURE"
	flagNetworkPolicy flag = "NETWORK_POLICY"
	flagIdentity      flag = "IDENTITY_ERROR"
)

// connectError marks a failure to reach the application or the next hop by plain TCP.
type connectError struct{ error }

func (e connectError) Unwrap() error { return e.error }

// identityError marks a failure to get a certificate.
type identityError struct{ error }

func (e identityError) Unwrap() error { return e.error }

// flagOf classes an error; it is the one place that does.
func flagOf(err error) flag {
	var denied *deniedError
	var missing *missingPolicyError
	var stage *hbone.StageError
	var status *hbone.StatusError
	var ident identityError
	var connect connectError
	var hop *nexthop.Error
	switch {
	case err == nil:
		return flagNone
	case errors.As(err, &denied), errors.As(err, &missing):
		return flagDeny
	case errors.As(err, &status):
		if status.Status == 401 {
			return flagDeny
		}
		return flagConnect
	case errors.As(err, &ident):
		return flagIdentity
	case errors.As(err, &stage):
		return flagOfStage(stage)
	case errors.As(err, &connect), errors.As(err, &hop):
		return flagConnect
	}
	return flagNone
}

func flagOfStage(err *hbone.StageError) flag {
	switch err.Stage {
	case hbone.StageTLS:
		return flagTLS
	case hbone.StageHTTP2:
		return flagHTTP2
	case hbone.StageDial:
		if isTimeout(err) {
			return flagNetworkPolicy
		}
	}
	return flagConnect
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &t) && t.Timeout()
}

// explain adds what the operator can do about an error.
func explain(err error) string {
	var stage *hbone.StageError
	if errors.As(err, &stage) && stage.Stage == hbone.StageDial && isTimeout(err) {
		return err.Error() + "; is a NetworkPolicy blocking port 15008?"
	}
	var certErr *tls.CertificateVerificationError
	if errors.As(err, &certErr) {
		return err.Error() + "; do both ends trust the same root certificate?"
	}
	return err.Error()
}

// reporter writes access-log lines and keeps the metrics of connections.
type reporter struct {
	access  *zap.Logger
	enabled bool
	metrics *connMetrics
	conns   *conns
}

// open counts a connection as opened, once all its labels are known.
func (r *reporter) open(c *conn) {
	l := labelsOf(c.record, flagNone)
	r.conns.mu.Lock()
	defer r.conns.mu.Unlock()
	c.series = r.metrics.series(l)
	c.series.opened++
}

// close ends a connection: it is forgotten, counted and told of. err says why it failed; nil is a normal end.
func (r *reporter) close(c *conn, err error) {
	f := flagOf(err)
	r.conns.release(c, func() { r.metrics.closed(c.record, f) })
	if !r.enabled {
		return
	}
	level, message := r.access.Info, "connection complete"
	if err != nil {
		level = r.access.Error
	}
	level(message, c.fields(time.Since(c.start), err)...)
}

// early tells of a connection that failed before it was known what it is.
func (r *reporter) early(direction string, src, dst netip.AddrPort, err error) {
	r.access.Warn("connection failed", zap.Stringer("src.addr", src), zap.Stringer("dst.addr", dst),
		zap.String("direction", direction), zap.String("error", explain(err)))
}

// fields are those of Istio's ztunnel, in its order; what is not known is left out.
func (r *record) fields(took time.Duration, err error) []zap.Field {
	f := make([]zap.Field, 0, 20)
	str := func(key, value string) {
		if value != "" {
			f = append(f, zap.String(key, value))
		}
	}
	str("src.addr", r.src.String())
	if w := r.srcWorkload; w != nil {
		str("src.workload", w.Name)
		str("src.namespace", w.Namespace)
	}
	str("src.identity", r.srcID.String())
	if w := r.srcWorkload; w != nil {
		str("src.cluster", w.ClusterID)
	}
	str("dst.addr", r.dst.String())
	str("dst.hbone_addr", r.tunnel)
	if r.service != nil {
		str("dst.service", r.service.Hostname)
	}
	if w := r.dstWorkload; w != nil {
		str("dst.workload", w.Name)
		str("dst.namespace", w.Namespace)
	}
	str("dst.identity", r.dstID.String())
	if w := r.dstWorkload; w != nil {
		str("dst.cluster", w.ClusterID)
	}
	sent, received, direction := r.bytes.AToB.Load(), r.bytes.BToA.Load(), "outbound"
	if r.inbound {
		sent, received, direction = received, sent, "inbound"
	}
	str("direction", direction)
	f = append(f, zap.Int64("bytes_sent", sent), zap.Int64("bytes_recv", received),
		zap.String("duration", strconv.FormatInt(took.Milliseconds(), 10)+"ms"))
	if err != nil {
		str("error", explain(err))
	}
	return f
}
