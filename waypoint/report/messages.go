package report

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// Messages counts the messages of one direction of a gRPC call as they pass, so that those of a call that lasts are seen
// before its end. It is an http1.Tap. A message is a flag, a length of four bytes, and as many bytes; it counts once its
// length is known. What was sent before and is sent again counts once.
type Messages struct {
	to   *atomic.Uint64
	seen int64 // bytes of the body so far
	left uint32
	head [5]byte
	have uint8 // bytes of head
	lost bool  // it is not gRPC's framing
}

// See implements http1.Tap.
func (m *Messages) See(p []byte, at int64) {
	if again := m.seen - at; again > 0 {
		p = p[min(again, int64(len(p))):]
	}
	m.seen += int64(len(p))
	whole := uint64(0)
	for len(p) > 0 && !m.lost {
		if m.left > 0 {
			n := uint32(min(uint64(m.left), uint64(len(p))))
			m.left -= n
			p = p[n:]
			continue
		}
		n := copy(m.head[m.have:], p)
		p = p[n:]
		if m.have += uint8(n); int(m.have) < len(m.head) {
			break
		}
		m.have = 0
		if m.lost = m.head[0] > 1; !m.lost { // compressed or not
			m.left = binary.BigEndian.Uint32(m.head[1:])
			whole++
		}
	}
	if whole > 0 {
		m.to.Add(whole)
	}
}

// callSeries are the messages of gRPC calls between one client and one endpoint of one service.
type callSeries struct{ requests, responses atomic.Uint64 }

// CallCache is the series a session used last.
type CallCache struct {
	key    seriesKey
	series *callSeries
}

// callMetrics are istio_request_messages_total and istio_response_messages_total. mu of metrics guards them.
type callMetrics struct {
	all                 map[labels]*callSeries
	resolved            map[seriesKey]*callSeries // begun anew when it is full
	requests, responses *prometheus.Desc
}

func newCallMetrics() callMetrics {
	desc := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("istio_"+name, help, labelNames[:countMessageLabels], nil)
	}
	return callMetrics{
		all: make(map[labels]*callSeries), resolved: make(map[seriesKey]*callSeries),
		requests:  desc("request_messages_total", "Messages that clients of gRPC sent."),
		responses: desc("response_messages_total", "Messages that servers of gRPC sent."),
	}
}

func (c *callMetrics) describe(ch chan<- *prometheus.Desc) {
	ch <- c.requests
	ch <- c.responses
}

func (c *callMetrics) collect(ch chan<- prometheus.Metric) {
	for l, s := range c.all {
		ch <- prometheus.MustNewConstMetric(c.requests, prometheus.CounterValue, float64(s.requests.Load()), l[:countMessageLabels]...)
		ch <- prometheus.MustNewConstMetric(c.responses, prometheus.CounterValue, float64(s.responses.Load()), l[:countMessageLabels]...)
	}
}

// CountCall makes the messages of a call count whose endpoint is chosen.
func (m *metrics) CountCall(r *Record, c *CallCache, asks, answers *Messages) {
	s := m.callsOf(r, c)
	asks.to, answers.to = &s.requests, &s.responses
}

func (m *metrics) callsOf(r *Record, c *CallCache) *callSeries {
	key := keyOf(r)
	key.status, key.code, key.flags = 0, "", ""
	if c.series != nil && c.key == key {
		return c.series
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.calls.resolved[key]
	if s == nil {
		l := labelsOf(r, m.believed(r.Client.Told))
		clear(l[countMessageLabels:])
		if s = m.calls.all[l]; s == nil {
			s = new(callSeries)
			m.calls.all[l] = s
		}
		if len(m.calls.resolved) >= maxResolved {
			clear(m.calls.resolved)
		}
		m.calls.resolved[key] = s
	}
	*c = CallCache{key, s}
	return s
}
