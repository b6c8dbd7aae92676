package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Pages are the addresses of what a proxy tells about itself. It is a part of a proxy's own configuration.
type Pages struct {
	AdminAddr   string
	MetricsAddr string
	ReadyAddr   string
}

// Register declares the flags and their environment variables.
func (p *Pages) Register(fs *FlagSet) {
	fs.StringVar(&p.AdminAddr, "admin-addr", fmt.Sprintf("127.0.0.1:%d", mesh.PortAdmin), "ADMIN_ADDR", "address of the administration pages")
	fs.StringVar(&p.MetricsAddr, "metrics-addr", fmt.Sprintf(":%d", mesh.PortMetrics), "STATS_ADDR", "address of /metrics and /stats/prometheus")
	fs.StringVar(&p.ReadyAddr, "ready-addr", fmt.Sprintf(":%d", mesh.PortReadiness), "READINESS_ADDR", "address of /healthz/ready")
}

// Validate reports every fault of p.
func (p *Pages) Validate() error {
	return errors.Join(HostPort("admin-addr", p.AdminAddr), HostPort("metrics-addr", p.MetricsAddr), HostPort("ready-addr", p.ReadyAddr))
}

// HostPort says what is wrong with an address to listen on, the value of a flag.
func HostPort(flag, addr string) error {
	if _, _, err := net.SplitHostPort(addr); err != nil {
		return fmt.Errorf("-%s: %w: want host:port", flag, err)
	}
	return nil
}

// Serve opens the pages now, so that a port in use is an error at start, and serves them in g until ctx is done.
func (p *Pages) Serve(ctx context.Context, g *errgroup.Group, env *Env, admin http.Handler) error {
	metrics := http.NewServeMux()
	metrics.Handle("/metrics", Metrics(env.Registry))
	metrics.Handle("/stats/prometheus", Metrics(env.Registry))
	ready := http.NewServeMux()
	ready.Handle("/healthz/ready", env.Ready)
	for _, page := range []struct {
		what, addr string
		handler    http.Handler
	}{
		{"administration pages (-admin-addr)", p.AdminAddr, admin},
		{"metrics page (-metrics-addr)", p.MetricsAddr, metrics},
		{"readiness page (-ready-addr)", p.ReadyAddr, ready},
	} {
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", page.addr)
		if err != nil {
			return fmt.Errorf("open %s: %w", page.what, err)
		}
		g.Go(func() error { return ServeHTTP(ctx, ln, page.handler) })
	}
	return nil
}

// Admin is what a proxy's administration pages show and do.
type Admin struct {
	Title string     // what this program is called, and whose it is
	Dump  func() any // everything it knows
	Quit  func()     // begins its end
}

// AdminPages are the pages of a proxy's administration.
func AdminPages(env *Env, a Admin) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, a.Title, "\n\n"+
			"GET  /config_dump           everything this "+env.Name+" knows\n"+
			"POST /logging?level=debug   change the log level; without a query, show it\n"+
			"POST /quitquitquit          drain and stop\n"+
			"GET  /debug/pprof/          Go profiles\n")
	})
	mux.HandleFunc("GET /config_dump", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		if err := enc.Encode(a.Dump()); err != nil {
			env.Log.Debug("config dump was not read to its end", zap.Error(err))
		}
	})
	mux.HandleFunc("POST /logging", env.changeLogging)
	mux.HandleFunc("POST /quitquitquit", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "shutdown now")
		a.Quit()
	})
	HandlePprof(mux)
	return mux
}

func (e *Env) changeLogging(w http.ResponseWriter, r *http.Request) {
	if level := r.URL.Query().Get("level"); level != "" {
		l, err := zap.ParseAtomicLevel(level)
		if err != nil {
			http.Error(w, fmt.Sprintf("level %q: want debug, info, warn or error", level), http.StatusBadRequest)
			return
		}
		e.Level.SetLevel(l.Level())
	}
	fmt.Fprintf(w, "current log level is %s\n", e.Level)
}
