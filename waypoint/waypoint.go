// Package waypoint is the L7 proxy of a namespace or service: clients' ztunnels bring it the connections for the services
// that are bound to it, over HBONE, and it decides request by request where they go and whether they may.
//
// It learns the mesh, routes and traffic policies from istiod (package xds) and its own certificate from istiod's CA
// (package identity). Package waypoint/route decides where a request goes, waypoint/upstream who there answers it,
// waypoint/http1 and waypoint/http2 move bytes; what is here joins them. It never captures traffic and opens no pod's network
// namespace: that is ztunnel's.
package waypoint

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/mistnet/mistnet/waypoint/upstream"

	"github.com/mistnet/mistnet/waypoint/report"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/mistnet/mistnet/internal/controlplane"
	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/memlimit"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/parking"
)

// The tasks that must be done before a waypoint is ready.
const (
	taskState = "state manager" // istiod's first answer
	taskProxy = "proxy"         // serving
)

// Waypoint is the program.
type Waypoint struct {
	cfg      *Config
	env      *daemon.Env
	log      *zap.Logger
	state    *state
	istiod   *controlplane.Client
	ids      *identity.Manager
	up       *upstream.Pool
	mirrors  *mirrors
	checks   *upstream.Checker
	rep      *report.Reporter
	sessions sessions
	lot      *parking.Lot // where clients' connections wait for their next request
	spare    spares       // of sessions
	passages passages
	normal   normalization // of paths
	server   *hbone.Server
	memory   *memlimit.Budget // of all connections
	quit     context.CancelFunc
}

// New wires the program without starting anything.
func New(cfg *Config, env *daemon.Env) (*Waypoint, error) {
	w := &Waypoint{cfg: cfg, env: env, log: env.Log, state: newState(cfg, env.Log.Named("state"))}
	w.normal, _ = parseNormalization(cfg.PathNormalization) // Validate has seen it
	w.state.changed = w.passages.recheck
	w.state.published = func() { w.checks.Look() }
	client, err := controlplane.New(&cfg.Config, controlplane.Options{
		Node: nodeOf(cfg), Apply: w.state.apply, Log: env.Log,
		// What guards and directs traffic comes before what it can reach.
		Types: []string{mesh.TypeAuthorization, mesh.TypeRoute, mesh.TypeCredential, mesh.TypeTrafficPolicy, mesh.TypeAddress},
	})
	if err != nil {
		return nil, err
	}
	w.istiod, w.ids = client, client.IDs
	w.memory = memoryOf(cfg)
	w.up = upstream.New(upstream.Config{ID: cfg.identity, Own: cfg.isOwn(), IDs: w.ids, Memory: w.memory}, env.Log.Named("upstream"))
	w.mirrors = newMirrors(w.up)
	if w.lot, err = parking.New(); err != nil {
		return nil, fmt.Errorf("make the lot of idle connections: %w", err)
	}
	from, _ := netip.ParseAddr(cfg.InstanceIP) // "": it is not known
	w.checks = upstream.NewChecker(w.up, from, w.state.concerns, env.Log.Named("health"))
	w.rep = report.New(reportOf(cfg, env), env.Log.Named("access"))
	w.server = &hbone.Server{TLS: w.ids.ServerConfig(cfg.identity()), Handle: w.connect, Memory: w.memory, Log: env.Log.Named("hbone")}
	env.Registry.MustRegister(w.rep, w.checks)
	env.Registry.MustRegister(memoryMetrics(w.memory)...)
	return w, nil
}

// Run serves until ctx is done, then drains.
func (w *Waypoint) Run(ctx context.Context) error {
	ctx, w.quit = context.WithCancel(ctx)
	defer w.quit()
	defer w.lot.Close()
	for _, task := range []string{taskState, taskProxy} {
		w.env.Ready.Pending(task)
	}
	// What connections live on outlasts ctx, so that they can finish.
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()
	g, gctx := errgroup.WithContext(serving)
	admin := daemon.AdminPages(w.env, daemon.Admin{
		Title: "waypoint " + w.cfg.Namespace + "/" + w.cfg.Gateway, Dump: func() any { return w.dump() }, Quit: w.quit,
	})
	if err := w.cfg.Serve(gctx, g, w.env, admin); err != nil {
		stopServing()
		_ = g.Wait()
		return err
	}
	g.Go(func() error { return w.istiod.Run(gctx) })
	g.Go(func() error { w.up.Run(gctx); return nil })
	if w.memory != nil {
		g.Go(func() error { w.memory.Run(gctx, w.log.Named("memory")); return nil })
	}
	g.Go(func() error { w.mirrors.run(gctx); return nil })
	g.Go(func() error { w.checks.Run(ctx); return nil }) // ends when draining begins
	g.Go(func() error {
		defer stopServing()
		return w.serve(ctx, gctx)
	})
	return g.Wait()
}

// reportOf is what is to be told of requests and connections.
func reportOf(cfg *Config, env *daemon.Env) report.Config {
	if !cfg.AccessLog {
		return report.Config{}
	}
	return report.Config{Out: env.Out, JSON: cfg.AccessLogEncoding == encodingJSON, Format: cfg.AccessLogFormat, Host: cfg.PodName}
}

// nodeOf describes this waypoint to istiod.
func nodeOf(cfg *Config) controlplane.Node {
	return controlplane.Node{
		Kind: "waypoint", Pod: cfg.PodName, Namespace: cfg.Namespace, IP: cfg.InstanceIP,
		Metadata: map[string]any{"SERVICE_ACCOUNT": cfg.ServiceAccount, "GATEWAY_NAME": cfg.Gateway},
	}
}
