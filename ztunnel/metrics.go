package ztunnel

import (
	"cmp"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mistnet/mistnet/internal/mesh"
)

// labelNames are Istio's labels of every istio_tcp_* metric, in the order of labels.
var labelNames = []string{
	"reporter", "source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
	"source_principal", "source_app", "source_version", "source_cluster", "destination_service",
	"destination_service_namespace", "destination_service_name", "destination_workload",
	"destination_canonical_service", "destination_canonical_revision", "destination_workload_namespace",
	"destination_principal", "destination_app", "destination_version", "destination_cluster", "request_protocol",
	"response_flags", "connection_security_policy", "source_region", "source_zone", "destination_region",
	"destination_zone",
}

// labels are the values of labelNames: a comparable key.
type labels [27]string

const unknown = "unknown"

func or(s string) string { return cmp.Or(s, unknown) }

func labelsOf(r *record, f flag) labels {
	reporter := "source"
	if r.inbound {
		reporter = "destination"
	}
	security := unknown
	if r.tunnel != "" {
		security = "mutual_tls"
	}
	s, d := workloadLabels(r.srcWorkload), workloadLabels(r.dstWorkload)
	service, serviceNamespace, serviceName := unknown, unknown, unknown
	if v := r.service; v != nil {
		service, serviceNamespace, serviceName = or(v.Hostname), or(v.Namespace), or(v.Name)
	}
	return labels{
		reporter, s.workload, s.service, s.revision, s.namespace, or(r.srcID.String()), s.service, s.revision, s.cluster,
		service, serviceNamespace, serviceName,
		d.workload, d.service, d.revision, d.namespace, or(r.dstID.String()), d.service, d.revision, d.cluster,
		"tcp", string(f), security, s.region, s.zone, d.region, d.zone,
	}
}

type workloadLabelSet struct{ workload, service, revision, namespace, cluster, region, zone string }

func workloadLabels(w *mesh.Workload) workloadLabelSet {
	if w == nil {
		return workloadLabelSet{unknown, unknown, unknown, unknown, unknown, unknown, unknown}
	}
	return workloadLabelSet{
		or(w.OwnerName), or(w.CanonicalName), or(cmp.Or(w.CanonicalRevision, "latest")), or(w.Namespace),
		or(w.ClusterID), or(w.Locality.Region), or(w.Locality.Zone),
	}
}

// series holds the totals of one set of labels. conns.mu guards it.
type series struct {
	opened, closed, failed uint64
	received, sent         uint64
}

// add takes over the bytes of a connection that ended. Istio counts the request's bytes as received and the
// response's as sent, whoever reports (istio/istio issue 32399).
func (s *series) add(r *record) {
	s.received += uint64(r.bytes.AToB.Load())
	s.sent += uint64(r.bytes.BToA.Load())
}

// connMetrics collects the istio_tcp_* metrics. Bytes of live connections are read when somebody asks, so that the
// data path pays one addition to a counter of its own.
type connMetrics struct {
	conns *conns
	all   map[labels]*series

	opened, closedTotal, failed, received, sent, open *prometheus.Desc
}

func newConnMetrics(cs *conns) *connMetrics {
	desc := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("istio_tcp_"+name, help, labelNames, nil)
	}
	return &connMetrics{
		conns: cs, all: make(map[labels]*series),
		opened:      desc("connections_opened_total", "Connections opened."),
		closedTotal: desc("connections_closed_total", "Connections that ended."),
		failed:      desc("connections_failed_total", "Connections that could not be made or were refused."),
		received:    desc("received_bytes_total", "Bytes received during the request."),
		sent:        desc("sent_bytes_total", "Bytes sent during the response."),
		open: prometheus.NewDesc("istio_tcp_sockets_open", "Connections that are open now.",
			[]string{"reporter"}, nil),
	}
}

// series returns the totals of a set of labels. The caller holds conns.mu.
func (m *connMetrics) series(l labels) *series {
	s := m.all[l]
	if s == nil {
		s = new(series)
		m.all[l] = s
	}
	return s
}

// closed counts the end of a connection: closed if it had been opened, failed if it was refused or never came to be.
// The caller holds the lock of conns.
func (m *connMetrics) closed(r *record, f flag) {
	if r.series != nil {
		r.series.closed++
	}
	if f != flagNone {
		m.series(labelsOf(r, f)).failed++
	}
}

// Describe implements prometheus.Collector.
func (m *connMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.opened, m.closedTotal, m.failed, m.received, m.sent, m.open} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *connMetrics) Collect(ch chan<- prometheus.Metric) {
	totals, open := m.totals()
	counter := func(d *prometheus.Desc, v uint64, l *labels) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), l[:]...)
	}
	for l, s := range totals {
		if s.opened > 0 {
			counter(m.opened, s.opened, &l)
			counter(m.closedTotal, s.closed, &l)
			counter(m.received, s.received, &l)
			counter(m.sent, s.sent, &l)
		}
		if s.failed > 0 {
			counter(m.failed, s.failed, &l)
		}
	}
	for reporter, n := range open {
		ch <- prometheus.MustNewConstMetric(m.open, prometheus.GaugeValue, float64(n), reporter)
	}
}

// totals copies every series, with the bytes of live connections added.
func (m *connMetrics) totals() (map[labels]series, map[string]int) {
	m.conns.mu.Lock()
	defer m.conns.mu.Unlock()
	live := make(map[*series]series)
	open := map[string]int{"source": 0, "destination": 0}
	for c := range m.conns.live {
		if c.record.inbound {
			open["destination"]++
		} else {
			open["source"]++
		}
		if c.series == nil {
			continue
		}
		s := live[c.series]
		s.add(c.record)
		live[c.series] = s
	}
	out := make(map[labels]series, len(m.all))
	for l, s := range m.all {
		t := *s
		t.received += live[s].received
		t.sent += live[s].sent
		out[l] = t
	}
	return out, open
}

// buildInfo is the istio_build metric: which program of which version this is.
func buildInfo(component, tag string) prometheus.Collector {
	g := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "istio_build", Help: "The version this program was built from.",
		ConstLabels: prometheus.Labels{"component": component, "tag": tag},
	})
	g.Set(1)
	return g
}

// xdsMetrics are the metrics of the connection to istiod.
type xdsMetrics struct {
	messages, bytes *prometheus.CounterVec
	ended           *prometheus.CounterVec
}

func newXDSMetrics() *xdsMetrics {
	counter := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "istio_xds_" + name, Help: help}, []string{label})
	}
	return &xdsMetrics{
		messages: counter("message_total", "xDS responses received.", "url"),
		bytes:    counter("message_bytes_total", "Bytes of xDS responses received.", "url"),
		ended:    counter("connection_terminations_total", "xDS streams that ended.", "reason"),
	}
}

func (m *xdsMetrics) message(typeURL string, bytes int) {
	m.messages.WithLabelValues(typeURL).Inc()
	m.bytes.WithLabelValues(typeURL).Add(float64(bytes))
}

func (m *xdsMetrics) disconnect(err error) {
	reason := "Error"
	if err == nil {
		reason = "Complete"
	}
	m.ended.WithLabelValues(reason).Inc()
}

// Describe implements prometheus.Collector.
func (m *xdsMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range []prometheus.Collector{m.messages, m.bytes, m.ended} {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (m *xdsMetrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range []prometheus.Collector{m.messages, m.bytes, m.ended} {
		c.Collect(ch)
	}
}

func podCount(ps *pods) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "workload_manager_active_proxy_count", Help: "Pods this ztunnel serves.",
	}, func() float64 { return float64(len(ps.list())) })
}
