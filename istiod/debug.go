package istiod

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"strings"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/translate"
)

// pages are metrics and readiness for everybody, and debug pages for who is on this machine: they show the whole mesh.
func (d *Istiod) pages() http.Handler {
	debug := http.NewServeMux()
	debug.HandleFunc("GET /debug", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "istiod ", d.cfg.ClusterID, "\n\n"+
			"/debug/problems   objects that are refused or not served as written, and why\n"+
			"/debug/objects    objects in force: how many, and where each is written\n"+
			"/debug/nouns      what the objects mean: workloads, services, policies, routes and traffic policies; ?name= picks those whose name has it\n"+
			"/debug/xds        connected clients: what each was sent, has accepted and refused\n"+
			"/debug/pprof/     Go profiles\n"+
			"/metrics          Prometheus metrics\n"+
			"/healthz/ready    200 once the configuration was read\n")
	})
	debug.HandleFunc("GET /debug/problems", func(w http.ResponseWriter, _ *http.Request) { d.answer(w, d.problems()) })
	debug.HandleFunc("GET /debug/objects", func(w http.ResponseWriter, _ *http.Request) {
		counts, _ := d.mirror.counts()
		d.answer(w, map[string]any{"counts": counts, "source": d.source.report()})
	})
	debug.HandleFunc("GET /debug/nouns", func(w http.ResponseWriter, r *http.Request) {
		d.answer(w, selected(d.mirror.nouns(), r.URL.Query().Get("name")))
	})
	debug.HandleFunc("GET /debug/xds", func(w http.ResponseWriter, _ *http.Request) { d.answer(w, d.xds.Clients()) })
	daemon.HandlePprof(debug)

	mux := http.NewServeMux()
	mux.Handle("GET /metrics", daemon.Metrics(d.env.Registry))
	mux.Handle("GET /healthz/ready", d.env.Ready)
	mux.Handle("GET /ready", d.env.Ready)
	mux.Handle("/debug/", onlyLocal(debug))
	mux.Handle("/debug", onlyLocal(debug))
	return mux
}

func onlyLocal(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a, err := netip.ParseAddrPort(r.RemoteAddr); err != nil || !a.Addr().Unmap().IsLoopback() {
			http.Error(w, "debug pages answer on loopback only", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (d *Istiod) answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		d.log.Debug("debug page was not read to its end", zap.Error(err))
	}
}

func selected(n translate.Nouns, name string) any {
	drop := func(key string) bool { return !strings.Contains(key, name) }
	maps.DeleteFunc(n.Workloads, func(k string, _ *mesh.Workload) bool { return drop(k) })
	maps.DeleteFunc(n.Services, func(k string, _ *mesh.Service) bool { return drop(k) })
	maps.DeleteFunc(n.Policies, func(k string, _ *mesh.Policy) bool { return drop(k) })
	maps.DeleteFunc(n.Routes, func(k string, _ *mesh.Route) bool { return drop(k) })
	maps.DeleteFunc(n.Traffic, func(k string, _ *mesh.TrafficPolicy) bool { return drop(k) })
	return map[string]any{"workloads": n.Workloads, "services": n.Services, "policies": n.Policies, "routes": n.Routes, "trafficpolicies": n.Traffic}
}
