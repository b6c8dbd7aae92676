package waypoint

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

// record is what is told of one request, or of one connection that is not HTTP: a line of the access log and an update of
// the metrics, at its end.
type record struct {
	start  time.Time
	client *peer.Client
	http   bool

	hostname string         // of the service that was asked for; "": a workload was
	local    netip.AddrPort // the address that was

	protocol                  string // of HTTP: its version; "": it is not HTTP
	method, target, authority string
	userAgent, requestID      string
	forwardedFor              string // x-forwarded-for
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
	answered     bool   // by the upstream, after upstreamTime
	failure      string // why the upstream could not be connected to; "": it could

	status         int           // of HTTP; 0: no response
	grpc           bool          // the request is one of gRPC
	grpcStatus     string        // "": none was told
	flags, details string        // Envoy's response flags and code details
	received, sent int64         // bytes of the bodies
	responded      time.Duration // after start: the upstream's response began
	headers        []string      // that the format of the access log asks for; nil: none
	bytes          relay.Counters

	series *series // of a connection that was opened
}

// fail notes how a request or connection ended that had begun well.
func (r *record) fail(flags, details string) { r.flags, r.details = flags, details }

// cluster notes where the rule sends it.
func (r *record) cluster(key, subset string, port uint16) {
	r.backend, r.subset, r.port = key, subset, port
}

// reportConfig says what the access log is to be like.
type reportConfig struct {
	out    io.Writer // takes a line at a time, from many goroutines; nil: no log is kept
	json   bool      // an object a line, instead of text
	format string    // of Envoy's operators; "": Istio's default
	host   string    // the name of this pod, for such a format
}

// reporter writes access-log lines and keeps the metrics.
type reporter struct {
	access  *accessLog  // nil: none is wanted
	limited *zap.Logger // for what costs a peer nothing
	*metrics
}

// newReporter returns one whose access log is of that kind.
func newReporter(cfg reportConfig, log *zap.Logger) *reporter {
	return &reporter{access: newAccessLog(cfg, log), metrics: newMetrics(),
		limited: log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
			return zapcore.NewSamplerWithOptions(c, time.Minute, 10, 0)
		}))}
}

// request tells of a request that is over now.
func (p *reporter) request(r *record, cache *seriesCache, now time.Time) {
	took := now.Sub(r.start)
	p.metrics.request(r, cache, took)
	if p.access != nil {
		p.access.write(r, took)
	}
}

// close tells of a connection that is over.
func (p *reporter) close(r *record) {
	p.metrics.close(r)
	if p.access != nil {
		p.access.write(r, time.Since(r.start))
	}
}

// refused warns of a client that was not let in; not of each, since that costs a client nothing.
func (p *reporter) refused(message string, fields ...zap.Field) { p.limited.Warn(message, fields...) }
