// Package report tells what became of each request and connection at a waypoint: a line of the access log, in Istio's format or one in
// Envoy's language, and Istio's metrics.
//
// It hides how lines are made and series found without an allocation per request. Who serves fills in a [Record] and hands it over once.
package report

import (
	"io"
	"net/netip"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/waypoint/peer"
	"github.com/mistnet/mistnet/waypoint/route"
)

// Record is what is told of one request, or of one connection that is not HTTP: a line of the access log and an update of
// the metrics, at its end.
type Record struct {
	Start  time.Time
	Client *peer.Client
	HTTP   bool

	Hostname string         // of the service that was asked for; "": a workload was
	Local    netip.AddrPort // the address that was

	Protocol                  string // of HTTP: its version; "": it is not HTTP
	Method, Target, Authority string
	UserAgent, RequestID      string
	ForwardedFor              string // x-forwarded-for
	SNI                       string // of a TLS hello that was looked at

	Route        *route.Rule
	Service      *mesh.Service  // it was sent to; nil while that is not known
	Workload     *mesh.Workload // that was chosen
	Upstream     netip.AddrPort
	subset       string
	port         uint16
	Attempts     uint32
	UpstreamTime time.Duration
	Answered     bool   // by the upstream, after UpstreamTime
	Failure      string // why the upstream could not be connected to; "": it could

	Status         int           // of HTTP; 0: no response
	GRPC           bool          // the request is one of gRPC
	GRPCStatus     string        // "": none was told
	Flags, Details string        // Envoy's response flags and code details
	Received, Sent int64         // bytes of the bodies
	Responded      time.Duration // after Start: the upstream's response began
	Headers        []string      // that the format of the access log asks for; nil: none
	Bytes          relay.Counters

	series *series // of a connection that was opened
}

// Fail notes how a request or connection ended that had begun well.
func (r *Record) Fail(flags, details string) { r.Flags, r.Details = flags, details }

// Cluster notes where a rule sends it: to a port of the service, or of a subset of it.
func (r *Record) Cluster(subset string, port uint16) { r.subset, r.port = subset, port }

// Config says what the access log is to be like.
type Config struct {
	Out    io.Writer // takes a line at a time, from many goroutines; nil: no log is kept
	JSON   bool      // an object a line, instead of text
	Format string    // of Envoy's operators; "": Istio's default
	Host   string    // the name of this pod, for such a format
}

// Reporter writes access-log lines and keeps the metrics.
type Reporter struct {
	access  *accessLog  // nil: none is wanted
	limited *zap.Logger // for what costs a peer nothing
	*metrics
}

// New returns a reporter that is to be registered with Prometheus. log warns of what is amiss.
func New(cfg Config, log *zap.Logger) *Reporter {
	return &Reporter{access: newAccessLog(cfg, log), metrics: newMetrics(),
		limited: log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
			return zapcore.NewSamplerWithOptions(c, time.Minute, 10, 0)
		}))}
}

// Request tells of a request that is over now. cache is its session's.
func (p *Reporter) Request(r *Record, cache *Cache, now time.Time) {
	took := now.Sub(r.Start)
	p.metrics.request(r, cache, took)
	if p.access != nil {
		p.access.write(r, took)
	}
}

// Close tells of a connection that is over.
func (p *Reporter) Close(r *Record) {
	p.metrics.close(r)
	if p.access != nil {
		p.access.write(r, time.Since(r.Start))
	}
}

// Refused warns of a client that was not let in; not of each, since that costs a client nothing.
func (p *Reporter) Refused(message string, fields ...zap.Field) { p.limited.Warn(message, fields...) }
