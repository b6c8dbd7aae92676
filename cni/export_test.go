package cni

import (
	"net/http"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
)

// PodOf and Oldest are what adoption finds pods by.
var PodOf = podOf

// Oldest returns only the processes' numbers.
func Oldest(proc string, uids map[string]bool) (map[string]int, error) {
	found, err := procDir(proc).oldest(uids)
	out := make(map[string]int, len(found))
	for uid, p := range found {
		out[uid] = p.pid
	}
	return out, err
}

// PluginAPI is the handler of the plugin's requests of an agent that does nothing to the machine. Known lists the pods
// it took.
func PluginAPI(dir string) (h http.Handler, known func() []string, err error) {
	rs, err := openRecords(filepath.Join(dir, memoryFile))
	if err != nil {
		return nil, nil, err
	}
	a := &Agent{log: zap.NewNop(), catalog: newCatalog(Policy{}, true)}
	a.metrics = newMetrics(prometheus.NewRegistry(), func() int { return 0 })
	a.catalog.complete()
	a.rec = &reconciler{
		catalog: a.catalog, records: rs, status: statusDir(""), probes: noProbes{}, log: a.log, proc: "/proc",
		start: make(chan *pod), pods: make(map[podKey]*pod),
	}
	return a.pluginAPI(), func() (out []string) {
		for _, p := range a.rec.all() {
			out = append(out, p.key.String())
		}
		return out
	}, nil
}
