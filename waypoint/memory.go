package waypoint

import (
	"math"
	"runtime/debug"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mistnet/mistnet/internal/memlimit"
)

// What connections may hold, in bytes: where nobody has said how much memory there is, and at least.
const (
	defaultMemory = 512 << 20
	leastMemory   = 16 << 20 // with less nobody gets anything done
)

// memoryOf is the budget of all connections; nil: they have no bound. Half of the program's memory is theirs: the rest is for what
// the mesh looks like, for what is done with a request, and for the collector.
func memoryOf(cfg *Config) *memlimit.Budget {
	switch limit := debug.SetMemoryLimit(-1); {
	case cfg.ConnectionMemory < 0:
		return nil
	case cfg.ConnectionMemory > 0:
		return memlimit.New(int64(cfg.ConnectionMemory) << 20)
	case limit == math.MaxInt64:
		return memlimit.New(defaultMemory)
	default:
		return memlimit.New(max(limit/2, leastMemory))
	}
}

// memoryMetrics tell of the budget.
func memoryMetrics(b *memlimit.Budget) []prometheus.Collector {
	return []prometheus.Collector{
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "mistnet_connection_memory_bytes", Help: "Memory that connections hold.",
		}, func() float64 { return float64(b.Held()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "mistnet_connection_memory_limit_bytes", Help: "Memory that connections may hold; 0: any.",
		}, func() float64 { return float64(b.Limit()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "mistnet_connection_memory_streams_ended_total", Help: "Streams that were ended because memory for connections was short.",
		}, func() float64 { return float64(b.Ended()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "mistnet_connection_memory_connections_refused_total", Help: "Connections that were refused because memory for them was short.",
		}, func() float64 { return float64(b.Refused()) }),
	}
}
