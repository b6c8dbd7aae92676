package ztunnel

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/mistnet/mistnet/internal/daemon"
)

// servePages serves administration, metrics and readiness until ctx is done.
func (z *Ztunnel) servePages(ctx context.Context, g *errgroup.Group) error {
	metrics := http.NewServeMux()
	metrics.Handle("/metrics", daemon.Metrics(z.env.Registry))
	metrics.Handle("/stats/prometheus", daemon.Metrics(z.env.Registry))
	ready := http.NewServeMux()
	ready.Handle("/healthz/ready", z.env.Ready)
	for _, page := range []struct {
		what, addr string
		handler    http.Handler
	}{
		{"administration pages (-admin-addr)", z.cfg.AdminAddr, z.adminPages()},
		{"metrics page (-metrics-addr)", z.cfg.MetricsAddr, metrics},
		{"readiness page (-ready-addr)", z.cfg.ReadyAddr, ready},
	} {
		ln, err := listen(ctx, page.what, page.addr)
		if err != nil {
			return err
		}
		g.Go(func() error { return daemon.ServeHTTP(ctx, ln, page.handler) })
	}
	return nil
}

func (z *Ztunnel) adminPages() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "ztunnel ", z.cfg.NodeName, "\n\n"+
			"GET  /config_dump           everything this ztunnel knows\n"+
			"POST /logging?level=debug   change the log level; without a query, show it\n"+
			"POST /quitquitquit          drain and stop\n"+
			"GET  /debug/pprof/          Go profiles\n")
	})
	mux.HandleFunc("GET /config_dump", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		if err := enc.Encode(z.dump()); err != nil {
			z.log.Debug("config dump was not read to its end", zap.Error(err))
		}
	})
	mux.HandleFunc("POST /logging", z.changeLogging)
	mux.HandleFunc("POST /quitquitquit", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "shutdown now")
		z.quit()
	})
	daemon.HandlePprof(mux)
	return mux
}

func (z *Ztunnel) changeLogging(w http.ResponseWriter, r *http.Request) {
	if level := r.URL.Query().Get("level"); level != "" {
		l, err := zap.ParseAtomicLevel(level)
		if err != nil {
			http.Error(w, fmt.Sprintf("level %q: want debug, info, warn or error", level), http.StatusBadRequest)
			return
		}
		z.env.Level.SetLevel(l.Level())
	}
	fmt.Fprintf(w, "current log level is %s\n", z.env.Level)
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
