package report

import (
	"cmp"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/peer"
)

// labelNames are Istio's labels; those of istio_tcp_* leave out response_code and grpc_response_status, which come last.
var labelNames = []string{
	"reporter", "source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
	"source_principal", "source_app", "source_version", "source_cluster", "destination_workload",
	"destination_workload_namespace", "destination_principal", "destination_app", "destination_version",
	"destination_service", "destination_canonical_service", "destination_canonical_revision", "destination_service_name",
	"destination_service_namespace", "destination_cluster", "request_protocol", "response_flags",
	"connection_security_policy", "response_code", "grpc_response_status",
}

const (
	countLabels        = 25
	countTCPLabels     = countLabels - 2
	countMessageLabels = countTCPLabels - 2 // how the call ends, and who was at the other end of TLS, is not said
)

// labels are the values of labelNames: a comparable key.
type labels [countLabels]string

const unknown = "unknown"

func or(s string) string { return cmp.Or(s, unknown) }

// labelsOf are the labels of a record; told is what its client says of itself, if that is to count.
func labelsOf(r *Record, told *peer.Description) labels {
	s, d := workloadLabels(r.Client.Workload), workloadLabels(r.Workload)
	if told != nil {
		s = workloadLabelSet{or(told.Workload), or(told.Service), cmp.Or(told.Revision, "latest"), or(told.Namespace), or(told.Cluster)}
	}
	service, serviceNamespace, serviceName := or(r.Hostname), unknown, unknown
	if v := r.Service; v != nil {
		service, serviceNamespace, serviceName = or(v.Hostname), or(v.Namespace), or(v.Name)
	}
	principal := unknown
	if r.Workload != nil {
		principal = r.Workload.Identity().String()
	}
	protocol, code := "tcp", ""
	if r.HTTP {
		protocol, code = "http", strconv.Itoa(r.Status)
		if r.GRPC {
			protocol = "grpc"
		}
	}
	return labels{
		"waypoint", s.workload, s.service, s.revision, s.namespace, or(r.Client.ID.String()), s.service, s.revision, s.cluster,
		d.workload, d.namespace, principal, d.service, d.revision, service, d.service, d.revision, serviceName, serviceNamespace,
		d.cluster, protocol, r.Flags, "mutual_tls", code, r.GRPCStatus,
	}
}

type workloadLabelSet struct{ workload, service, revision, namespace, cluster string }

func workloadLabels(w *mesh.Workload) workloadLabelSet {
	if w == nil {
		return workloadLabelSet{unknown, unknown, unknown, unknown, unknown}
	}
	return workloadLabelSet{
		or(w.OwnerName), or(w.CanonicalName), cmp.Or(w.CanonicalRevision, "latest"), or(w.Namespace), or(w.ClusterID),
	}
}

// buckets are Istio's of every histogram.
var buckets = [...]float64{
	0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 600000, 1800000, 3600000,
}

// histogram counts without a lock. Its sum is in thousandths, so that it can be added to.
type histogram struct {
	counts [len(buckets) + 1]atomic.Uint64
	sum    atomic.Int64
}

func (h *histogram) observe(v float64) {
	i := 0
	for i < len(buckets) && v > buckets[i] {
		i++
	}
	h.counts[i].Add(1)
	h.sum.Add(int64(v * 1000))
}

func (h *histogram) collect(d *prometheus.Desc, ch chan<- prometheus.Metric, l []string) {
	upTo, total := make(map[float64]uint64, len(buckets)), uint64(0)
	for i := range h.counts {
		total += h.counts[i].Load()
		if i < len(buckets) {
			upTo[buckets[i]] = total
		}
	}
	ch <- prometheus.MustNewConstHistogram(d, total, float64(h.sum.Load())/1000, upTo, l...)
}

// series is what is counted of one set of labels.
type series struct {
	http                       bool
	requests                   atomic.Uint64
	duration, reqSize, repSize histogram

	// Of connections; mu of metrics guards them.
	opened, closed     uint64
	received, sentData uint64
}

// seriesKey is all that the labels of a request follow from. It is found without making them.
type seriesKey struct {
	from     *mesh.Workload
	id       mesh.Identity
	told     *peer.Description
	hostname string // that was asked for
	service  *mesh.Service
	workload *mesh.Workload
	status   int
	grpc     bool
	code     string
	flags    string
}

func keyOf(r *Record) seriesKey {
	return seriesKey{r.Client.Workload, r.Client.ID, r.Client.Told, r.Hostname, r.Service, r.Workload, r.Status, r.GRPC, r.GRPCStatus, r.Flags}
}

// Cache is the series a session used last: most of its requests end alike.
type Cache struct {
	key    seriesKey
	series *series
}

// Bounds of what is remembered: of keys, which hold on to workloads that may be gone, and of clients that describe themselves.
const (
	maxResolved = 4096
	maxTold     = 512
)

// metrics collects the istio_* metrics of requests and connections.
type metrics struct {
	mu       sync.Mutex
	all      map[labels]*series
	live     map[*Record]struct{}  // connections
	resolved map[seriesKey]*series // begun anew when it is full
	calls    callMetrics
	told     map[peer.Description]struct{} // descriptions that clients gave of themselves: each makes series, so only so many do

	requests, duration, reqSize, repSize   *prometheus.Desc
	opened, closedTotal, received, sentAll *prometheus.Desc
}

func newMetrics() *metrics {
	http := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("istio_"+name, help, labelNames, nil)
	}
	tcp := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("istio_tcp_"+name, help, labelNames[:countTCPLabels], nil)
	}
	return &metrics{
		all: make(map[labels]*series), live: make(map[*Record]struct{}), resolved: make(map[seriesKey]*series), told: make(map[peer.Description]struct{}),
		calls:       newCallMetrics(),
		requests:    http("requests_total", "Requests."),
		duration:    http("request_duration_milliseconds", "From the request's head to the end of its response."),
		reqSize:     http("request_bytes", "Bytes of request bodies."),
		repSize:     http("response_bytes", "Bytes of response bodies."),
		opened:      tcp("connections_opened_total", "Connections opened."),
		closedTotal: tcp("connections_closed_total", "Connections that ended."),
		received:    tcp("received_bytes_total", "Bytes received during the request."),
		sentAll:     tcp("sent_bytes_total", "Bytes sent during the response."),
	}
}

// resolve finds the series of a request.
func (m *metrics) resolve(key seriesKey, r *Record) *series {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.resolved[key]
	if s == nil {
		s = m.seriesLocked(labelsOf(r, m.believed(r.Client.Told)), true)
		if len(m.resolved) >= maxResolved {
			clear(m.resolved)
		}
		m.resolved[key] = s
	}
	return s
}

// believed is what a client says of itself, unless too many others said something else before. The caller holds mu.
func (m *metrics) believed(s *peer.Description) *peer.Description {
	if s == nil {
		return nil
	}
	if _, ok := m.told[*s]; !ok {
		if len(m.told) >= maxTold {
			return nil
		}
		m.told[*s] = struct{}{}
	}
	return s
}

func (m *metrics) seriesLocked(l labels, http bool) *series {
	s := m.all[l]
	if s == nil {
		s = &series{http: http}
		m.all[l] = s
	}
	return s
}

// request counts one that is over.
func (m *metrics) request(r *Record, c *Cache, took time.Duration) {
	if key := keyOf(r); c.series == nil || c.key != key {
		*c = Cache{key, m.resolve(key, r)}
	}
	s := c.series
	s.requests.Add(1)
	s.duration.observe(float64(took.Microseconds()) / 1000)
	s.reqSize.observe(float64(r.Received))
	s.repSize.observe(float64(r.Sent))
}

// Open counts a connection whose labels are known.
func (m *metrics) Open(r *Record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r.series = m.seriesLocked(labelsOf(r, m.believed(r.Client.Told)), false)
	r.series.opened++
	m.live[r] = struct{}{}
}

// close counts the end of one.
func (m *metrics) close(r *Record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.live, r)
	s := r.series
	if s == nil { // it was never opened: count both, with what ended it
		s = m.seriesLocked(labelsOf(r, m.believed(r.Client.Told)), false)
		s.opened++
	}
	s.closed++
	s.received += uint64(r.Bytes.AToB.Load())
	s.sentData += uint64(r.Bytes.BToA.Load())
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.requests, m.duration, m.reqSize, m.repSize, m.opened, m.closedTotal, m.received, m.sentAll} {
		ch <- d
	}
	m.calls.describe(ch)
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	type moved struct{ received, sent uint64 }
	live := make(map[*series]moved)
	for r := range m.live {
		b := live[r.series]
		b.received += uint64(r.Bytes.AToB.Load())
		b.sent += uint64(r.Bytes.BToA.Load())
		live[r.series] = b
	}
	for l, s := range m.all {
		if s.http {
			ch <- prometheus.MustNewConstMetric(m.requests, prometheus.CounterValue, float64(s.requests.Load()), l[:]...)
			s.duration.collect(m.duration, ch, l[:])
			s.reqSize.collect(m.reqSize, ch, l[:])
			s.repSize.collect(m.repSize, ch, l[:])
			continue
		}
		counter := func(d *prometheus.Desc, v uint64) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), l[:countTCPLabels]...)
		}
		counter(m.opened, s.opened)
		counter(m.closedTotal, s.closed)
		counter(m.received, s.received+live[s].received)
		counter(m.sentAll, s.sentData+live[s].sent)
	}
	m.calls.collect(ch)
}
