package istiod

import (
	"context"
	"path"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/index"
)

// metrics are istiod's own, beside those of the process.
type metrics struct {
	published *prometheus.CounterVec   // nouns, by kind
	apply     prometheus.Histogram     // how long a change takes from its event to the wire
	requests  prometheus.Counter       // for certificates, under Istio's name
	calls     *prometheus.CounterVec   // the same, by outcome
	callTime  *prometheus.HistogramVec // and how long they take
}

func newMetrics(reg *prometheus.Registry, d *Istiod) *metrics {
	m := &metrics{
		published: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "istiod_nouns_published_total", Help: "Nouns made different and published, by kind."}, []string{"kind"}),
		apply: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "istiod_change_duration_seconds", Help: "From a change of objects to its publication.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9)}),
		requests: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "citadel_server_csr_count", Help: "Certificate requests."}),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "istiod_certificate_requests_total", Help: "Certificate requests, by gRPC status code."}, []string{"code"}),
		callTime: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "istiod_call_duration_seconds", Help: "How long unary calls take, by method.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9)}, []string{"method"}),
	}
	reg.MustRegister(m.published, m.apply, m.requests, m.calls, m.callTime, &state{d})
	return m
}

func (m *metrics) applied(changes []index.Change, took time.Duration) {
	for _, c := range changes {
		m.published.WithLabelValues(c.Key.Kind.String()).Inc()
	}
	m.apply.Observe(took.Seconds())
}

// countCall counts certificate requests: the only unary calls there are.
func (m *metrics) countCall(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	start := time.Now()
	resp, err := handle(ctx, req)
	m.requests.Inc()
	m.calls.WithLabelValues(status.Code(err).String()).Inc()
	m.callTime.WithLabelValues(path.Base(info.FullMethod)).Observe(time.Since(start).Seconds())
	return resp, err
}

// state collects what is true at the moment somebody asks.
type state struct{ d *Istiod }

var (
	descClients = prometheus.NewDesc("istiod_xds_clients", "Connected clients.", nil, nil)
	// These have Istio's names: its dashboards draw them.
	descConnected = prometheus.NewDesc("pilot_xds", "Connected clients.", nil, nil)
	descPushes    = prometheus.NewDesc("pilot_xds_pushes", "Responses sent to clients, by type.", []string{"type"}, nil)
	descRejects   = prometheus.NewDesc("pilot_total_xds_rejects", "Responses that clients refused, by type.", []string{"type"}, nil)
	descRootEnd   = prometheus.NewDesc("citadel_server_root_cert_expiry_timestamp", "When the root certificate expires that the signing one is below, in seconds since 1970.", nil, nil)
	descChainEnd  = prometheus.NewDesc("citadel_server_cert_chain_expiry_timestamp", "When the first certificate expires on the way from the signing one to its root, in seconds since 1970.", nil, nil)

	descRejected = prometheus.NewDesc("istiod_xds_rejected_resources", "Resources that a connected client refuses, by type.", []string{"type"}, nil)
	descObjects  = prometheus.NewDesc("istiod_objects", "Objects in force, by kind.", []string{"kind"}, nil)
	descNouns    = prometheus.NewDesc("istiod_nouns", "Nouns, by kind.", []string{"kind"}, nil)
	descLeader   = prometheus.NewDesc("istiod_leader", "1 when this replica is the one that writes to the API server.", nil, nil)
	descFailing  = prometheus.NewDesc("istiod_source_failing", "1 while a resource cannot be read from the API server: what was read stays in force.", []string{"resource"}, nil)
	descUnread   = prometheus.NewDesc("istiod_objects_not_honoured", "Objects of kinds that are not honoured, by resource.", []string{"resource"}, nil)
	descProblems = prometheus.NewDesc("istiod_problems", "Objects that are refused and stay in their last good form.", nil, nil)
)

// Describe implements prometheus.Collector.
func (s *state) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descClients, descConnected, descPushes, descRejects, descRootEnd, descChainEnd, descRejected, descObjects, descNouns, descProblems, descUnread, descLeader, descFailing} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (s *state) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, n uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	clients := s.d.xds.Clients()
	gauge(descClients, float64(len(clients)))
	gauge(descConnected, float64(len(clients)))
	rejected := make(map[string]int)
	for _, c := range clients {
		for _, t := range c.Types {
			rejected[t.TypeURL] += len(t.Rejected)
		}
	}
	for typeURL, n := range rejected {
		gauge(descRejected, float64(n), path.Base(typeURL))
	}
	for typeURL, n := range s.d.xds.Totals() {
		counter(descPushes, n.Sent, metricType(typeURL))
		counter(descRejects, n.Nacked, metricType(typeURL))
	}
	chain, root := s.d.authority.Expiry()
	gauge(descRootEnd, float64(root.Unix()))
	gauge(descChainEnd, float64(chain.Unix()))
	objects, nouns := s.d.mirror.counts()
	for kind, n := range objects {
		gauge(descObjects, float64(n), kind)
	}
	for kind, n := range nouns {
		gauge(descNouns, float64(n), kind)
	}
	refused, unread := 0, make(map[string]int)
	for _, p := range s.d.source.problems() {
		if resource, _, _ := strings.Cut(p.Object, " "); p.Refused {
			refused++
		} else {
			unread[resource]++
		}
	}
	gauge(descProblems, float64(refused))
	for resource, n := range unread {
		gauge(descUnread, float64(n), resource)
	}
	if k, ok := s.d.source.(*kubeSource); ok {
		gauge(descLeader, number(k.Leads()))
		for _, f := range k.Feeds() {
			gauge(descFailing, number(f.Error != ""), f.Resource)
		}
	}
}

// metricType is Istio's word for a type in its metrics.
func metricType(typeURL string) string {
	switch typeURL {
	case mesh.TypeAddress:
		return "wds"
	case mesh.TypeAuthorization:
		return "wads"
	}
	return path.Base(typeURL)
}

func number(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}
