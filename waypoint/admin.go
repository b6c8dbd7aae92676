package waypoint

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
)

func (w *Waypoint) adminPages() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(rw http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(rw, "waypoint ", w.cfg.Namespace, "/", w.cfg.Gateway, "\n\n"+
			"GET  /config_dump           everything this waypoint knows\n"+
			"POST /logging?level=debug   change the log level; without a query, show it\n"+
			"POST /quitquitquit          drain and stop\n"+
			"GET  /debug/pprof/          Go profiles\n")
	})
	mux.HandleFunc("GET /config_dump", func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(rw)
		enc.SetIndent("", "  ")
		if err := enc.Encode(w.dump()); err != nil {
			w.log.Debug("config dump was not read to its end", zap.Error(err))
		}
	})
	mux.HandleFunc("POST /logging", w.changeLogging)
	mux.HandleFunc("POST /quitquitquit", func(rw http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(rw, "shutdown now")
		w.quit()
	})
	daemon.HandlePprof(mux)
	return mux
}

func (w *Waypoint) changeLogging(rw http.ResponseWriter, r *http.Request) {
	if level := r.URL.Query().Get("level"); level != "" {
		l, err := zap.ParseAtomicLevel(level)
		if err != nil {
			http.Error(rw, fmt.Sprintf("level %q: want debug, info, warn or error", level), http.StatusBadRequest)
			return
		}
		w.env.Level.SetLevel(l.Level())
	}
	fmt.Fprintf(rw, "current log level is %s\n", w.env.Level)
}

// dump is what /config_dump shows.
type dump struct {
	Version         string                     `json:"version"`
	Gateway         string                     `json:"gateway"`
	Identity        string                     `json:"identity"`
	Self            *mesh.Workload             `json:"self"`
	MissingPolicies []string                   `json:"missingPolicies,omitempty"`
	Services        []*mesh.Service            `json:"services"` // bound to this waypoint
	Policies        []*mesh.Policy             `json:"policies"`
	Routes          []*mesh.Route              `json:"routes"`
	Problems        []string                   `json:"problems,omitempty"`
	TrafficPolicies []*mesh.TrafficPolicy      `json:"trafficPolicies"`
	Certificates    []identity.CertificateInfo `json:"certificates"`
}

func (w *Waypoint) dump() dump {
	v := w.state.load()
	d := dump{
		Version: daemon.Version(), Gateway: w.cfg.Namespace + "/" + w.cfg.Gateway, Identity: w.cfg.identity().String(),
		Self: v.self, MissingPolicies: v.missingPolicies(), Certificates: w.ids.Certificates(),
		Services: []*mesh.Service{}, Policies: []*mesh.Policy{}, Routes: sorted(v.routes), TrafficPolicies: sorted(v.traffic),
	}
	services := make(map[string]*mesh.Service)
	for key, svc := range v.Services() {
		if w.state.serves(v, svc) {
			services[key] = svc
		}
	}
	d.Services = sorted(services)
	keys := ownPolicies(v.self)
	for _, svc := range d.Services {
		keys = mergeKeys(keys, svc.Policies)
	}
	for _, key := range keys {
		if p := v.Policy(key); p != nil {
			d.Policies = append(d.Policies, p)
		}
	}
	for _, p := range v.problems {
		d.Problems = append(d.Problems, p.String())
	}
	return d
}

// sorted are the values of a map in the order of their keys.
func sorted[V any](m map[string]V) []V {
	out := make([]V, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, m[k])
	}
	return out
}
