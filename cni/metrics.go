package cni

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
)

// Types of event in nodeagent_reconcile_events_total.
const (
	eventAdd    = "add"    // a pod was attached
	eventUpdate = "update" // labels changed
	eventDelete = "delete" // a pod is gone
)

// metrics have Istio's names, so that its dashboards work.
type metrics struct {
	events   *prometheus.CounterVec
	requests *prometheus.CounterVec
	installs *prometheus.CounterVec
	inPlace  prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer, connected func() int) *metrics {
	m := &metrics{
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nodeagent_reconcile_events_total", Help: "Events the agent acted on, by type.",
		}, []string{"type"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "istio_cni_plugin_requests_total", Help: "Requests of the CNI plugin, by the agent's answer.",
		}, []string{"response_code"}),
		installs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "istio_cni_installs_total", Help: "Times the plugin was put on the host, by result.",
		}, []string{"result"}),
		inPlace: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "istio_cni_install_ready", Help: "Whether the plugin is on the host and in the chain.",
		}),
	}
	for _, e := range []string{eventAdd, eventUpdate, eventDelete} {
		m.events.WithLabelValues(e)
	}
	reg.MustRegister(m.events, m.requests, m.installs, m.inPlace, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "ztunnel_connected", Help: "Connections from ztunnels.",
	}, func() float64 { return float64(connected()) }))
	return m
}

// install counts an attempt to put the plugin on the host.
func (m *metrics) install(err error) {
	if err != nil {
		m.installs.WithLabelValues("failure").Inc()
		m.inPlace.Set(0)
		return
	}
	m.installs.WithLabelValues("success").Inc()
	m.inPlace.Set(1)
}

func (m *metrics) request(code int) { m.requests.WithLabelValues(strconv.Itoa(code)).Inc() }
