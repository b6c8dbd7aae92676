package waypoint

import (
	"errors"
	"net/netip"
	"strconv"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/waypoint/route"
)

// record is what is told of one request, or of one connection that is not HTTP: a line of the access log and an update of
// the metrics, at its end.
type record struct {
	start  time.Time
	client *client
	to     *destination
	http   bool

	protocol                  string // of HTTP: its version
	method, target, authority string
	userAgent, requestID      string
	sni                       string // of a TLS hello that was looked at

	route        *route.Rule
	service      *mesh.Service  // it was sent to; nil while that is not known
	workload     *mesh.Workload // that was chosen
	upstream     netip.AddrPort
	backend      string // key of the service it was to be sent to
	subset       string
	port         uint16
	attempts     uint32
	upstreamTime time.Duration

	status         int    // of HTTP; 0: no response
	grpc           bool   // the request is one of gRPC
	grpcStatus     string // "": none was told
	flags, details string // Envoy's response flags and code details
	received, sent int64  // bytes of the bodies
	bytes          relay.Counters

	series *series // of a connection that was opened
}

// fail notes how a request or connection ended that had begun well.
func (r *record) fail(flags, details string) { r.flags, r.details = flags, details }

// ended notes how the joining of two connections ended.
func (r *record) ended(err error) {
	if err == nil {
		return
	}
	if changed, ok := errors.AsType[*policyChangedError](err); ok {
		r.fail("-", changed.details)
		return
	}
	switch err {
	case errTooOld:
		r.fail("DT", err.Error())
	case errIdle:
		r.fail("SI", err.Error())
	default:
		r.fail("UC", err.Error())
	}
}

func (r *record) cluster(key, subset string, port uint16) {
	r.backend, r.subset, r.port = key, subset, port
}

// fields are those of Envoy's access log in JSON.
func (r *record) fields(took time.Duration) []zap.Field {
	f := make([]zap.Field, 0, 24)
	str := func(key, value string) {
		if value != "" {
			f = append(f, zap.String(key, value))
		}
	}
	protocol := "TCP"
	if r.http {
		protocol = r.protocol
		str("method", r.method)
		str("path", r.target)
	}
	str("protocol", protocol)
	if r.http {
		f = append(f, zap.Int("response_code", r.status))
		str("grpc_status", r.grpcStatus)
	}
	str("response_flags", r.flags)
	str("response_code_details", r.details)
	received, sent := r.received, r.sent
	if n := r.bytes.AToB.Load(); n > 0 || !r.http {
		received, sent = received+n, sent+r.bytes.BToA.Load()
	}
	f = append(f, zap.Int64("bytes_received", received), zap.Int64("bytes_sent", sent), zap.Int64("duration", took.Milliseconds()))
	if r.upstreamTime > 0 {
		f = append(f, zap.Int64("upstream_service_time", r.upstreamTime.Milliseconds()))
	}
	str("user_agent", r.userAgent)
	str("request_id", r.requestID)
	str("authority", r.authority)
	if r.upstream.IsValid() {
		str("upstream_host", r.upstream.String())
	}
	str("requested_server_name", r.sni)
	str("upstream_cluster", r.clusterName())
	str("downstream_local_address", r.to.addr.String())
	str("downstream_remote_address", r.client.addr.String())
	str("src.identity", r.client.id.String())
	if r.client.workload != nil {
		str("src.workload", r.client.workload.Name)
	}
	if r.workload != nil {
		str("dst.workload", r.workload.Name)
	}
	if r.route != nil {
		str("route_name", r.route.Name())
	}
	if r.attempts > 1 {
		f = append(f, zap.Uint32("attempts", r.attempts))
	}
	return f
}

// clusterName is how Istio's waypoints call a backend.
func (r *record) clusterName() string {
	if r.service == nil {
		return ""
	}
	kind := "tcp"
	if r.http {
		kind = "http"
		if r.subset != "" {
			kind += "/" + r.subset
		}
	}
	return "inbound-vip|" + strconv.Itoa(int(r.port)) + "|" + kind + "|" + r.service.Hostname
}

// reporter writes access-log lines and keeps the metrics.
type reporter struct {
	access  *zap.Logger
	limited *zap.Logger // for what costs a peer nothing
	enabled bool
	*metrics
}

func newReporter(access *zap.Logger, enabled bool) *reporter {
	return &reporter{access: access, enabled: enabled, metrics: newMetrics(),
		limited: access.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
			return zapcore.NewSamplerWithOptions(c, time.Minute, 10, 0)
		}))}
}

// request tells of a request that is over.
func (p *reporter) request(r *record, cache *seriesCache) {
	took := time.Since(r.start)
	p.metrics.request(r, cache, took)
	if p.enabled {
		p.access.Info("request complete", r.fields(took)...)
	}
}

// close tells of a connection that is over.
func (p *reporter) close(r *record) {
	p.metrics.close(r)
	if p.enabled {
		p.access.Info("connection complete", r.fields(time.Since(r.start))...)
	}
}

// refused tells of a tunnel that was not accepted.
func (p *reporter) refused(r *hbone.Request, err error) {
	p.limited.Warn("tunnel refused", zap.Stringer("src.addr", r.RemoteAddr), zap.String("dst.hbone_addr", r.Authority), zap.Error(err))
}

// unserved tells of a connection that nothing could be done with.
func (p *reporter) unserved(t *tunnel, why string) {
	p.limited.Warn("connection refused", zap.Stringer("src.addr", t.client.addr), zap.Stringer("dst.addr", t.to.addr), zap.String("reason", why))
}
