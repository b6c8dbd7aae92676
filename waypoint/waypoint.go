// Package waypoint is the L7 proxy of a namespace or service: clients' ztunnels bring it the connections for the services
// that are bound to it, over HBONE, and it decides request by request where they go and whether they may.
//
// It learns the mesh, routes and traffic policies from istiod (package xds) and its own certificate from istiod's CA
// (package identity). Package waypoint/route decides, waypoint/http1 moves bytes; what is here joins the two. It never
// captures traffic and opens no pod's network namespace: that is ztunnel's.
package waypoint

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/xds"
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
	ids      *identity.Manager
	ca       *identity.CAClient
	roots    []*identity.RootFile
	xds      *xds.Client
	up       *upstreams
	mirrors  *mirrors
	rep      *reporter
	sessions sessions
	server   *hbone.Server
	quit     context.CancelFunc
}

// New wires the program without starting anything.
func New(cfg *Config, env *daemon.Env) (*Waypoint, error) {
	w := &Waypoint{cfg: cfg, env: env, log: env.Log, state: newState(cfg, env.Log.Named("state"))}
	xdsTarget, xdsTLS, err := w.controlPlane(cfg.XDSAddress, cfg.XDSRootCA, cfg.XDSHostname)
	if err != nil {
		return nil, fmt.Errorf("xDS client: %w", err)
	}
	caTarget, caTLS, err := w.controlPlane(cfg.CAAddress, cfg.CARootCA, cfg.CAHostname)
	if err != nil {
		return nil, fmt.Errorf("CA client: %w", err)
	}
	w.ca, err = identity.NewCAClient(identity.CAClientConfig{
		Target: caTarget, TLS: caTLS, Token: w.token, ClusterID: cfg.ClusterID,
	})
	if err != nil {
		return nil, fmt.Errorf("CA client: %w", err)
	}
	w.ids = identity.NewManager(identity.ManagerConfig{CA: w.ca, TTL: cfg.SecretTTL, Log: env.Log.Named("identity")})
	node, err := nodeOf(cfg)
	if err != nil {
		return nil, err
	}
	w.xds = xds.NewClient(xds.ClientConfig{
		Target: xdsTarget, TLS: xdsTLS, Token: w.token, Metadata: map[string]string{"clusterid": cfg.ClusterID}, Node: node,
		Subscriptions: []xds.Subscription{
			// What guards and directs traffic comes before what it can reach.
			{TypeURL: mesh.TypeAuthorization, Wildcard: true}, {TypeURL: mesh.TypeRoute, Wildcard: true},
			{TypeURL: mesh.TypeTrafficPolicy, Wildcard: true}, {TypeURL: mesh.TypeAddress, Wildcard: true},
		},
		Apply: w.state.apply, Log: env.Log.Named("xds"),
	})
	w.up = newUpstreams(cfg, w.ids, env.Log.Named("upstream"))
	w.mirrors = newMirrors(w.up)
	w.rep = newReporter(env.Log.Named("access"), cfg.AccessLog)
	w.server = &hbone.Server{TLS: w.ids.ServerConfig(cfg.identity()), Handle: w.connect, Log: env.Log.Named("hbone")}
	env.Registry.MustRegister(w.rep)
	return w, nil
}

// Run serves until ctx is done, then drains.
func (w *Waypoint) Run(ctx context.Context) error {
	ctx, w.quit = context.WithCancel(ctx)
	defer w.quit()
	for _, task := range []string{taskState, taskProxy} {
		w.env.Ready.Pending(task)
	}
	// What connections live on outlasts ctx, so that they can finish.
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()
	defer w.ca.Close()
	g, gctx := errgroup.WithContext(serving)
	if err := w.servePages(gctx, g); err != nil {
		stopServing()
		_ = g.Wait()
		return err
	}
	g.Go(func() error { return ignoreStop(serving, w.ids.Run(gctx)) })
	g.Go(func() error { return ignoreStop(serving, w.xds.Run(gctx)) })
	g.Go(func() error { w.up.run(gctx); return nil })
	g.Go(func() error { w.mirrors.run(gctx); return nil })
	for _, r := range w.roots {
		g.Go(func() error { r.Watch(gctx, w.ids.Renew); return nil })
	}
	g.Go(func() error {
		defer stopServing()
		return w.serve(ctx, gctx)
	})
	return g.Wait()
}

func ignoreStop(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// token reads the token anew: it is rotated behind our back.
func (w *Waypoint) token(context.Context) (string, error) {
	b, err := os.ReadFile(w.cfg.TokenFile)
	if err != nil {
		return "", fmt.Errorf("read the token for istiod: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func (w *Waypoint) controlPlane(address, rootFile, hostname string) (string, *tls.Config, error) {
	target, host, err := splitAddress(address)
	if err != nil {
		return "", nil, err
	}
	if hostname != "" {
		host = hostname
	}
	roots, err := identity.OpenRootFile(rootFile, w.log.Named("roots"))
	if err != nil {
		return "", nil, err
	}
	w.roots = append(w.roots, roots)
	conf, err := roots.Config(host)
	return target, conf, err
}

// nodeOf describes this waypoint to istiod.
func nodeOf(cfg *Config) (*corev3.Node, error) {
	meta, err := structpb.NewStruct(map[string]any{
		"NAME": cfg.PodName, "NAMESPACE": cfg.Namespace, "INSTANCE_IPS": cfg.InstanceIP, "CLUSTER_ID": cfg.ClusterID,
		"SERVICE_ACCOUNT": cfg.ServiceAccount, "GATEWAY_NAME": cfg.Gateway,
	})
	if err != nil {
		return nil, fmt.Errorf("describe this waypoint to istiod: %w", err)
	}
	return &corev3.Node{
		Id: fmt.Sprintf("waypoint~%s~%s.%s~%s.svc.%s", cfg.InstanceIP, cfg.PodName, cfg.Namespace, cfg.Namespace,
			cfg.ClusterDomain),
		Metadata: meta,
	}, nil
}

// servePages serves administration, metrics and readiness until ctx is done.
func (w *Waypoint) servePages(ctx context.Context, g *errgroup.Group) error {
	metrics := http.NewServeMux()
	metrics.Handle("/metrics", daemon.Metrics(w.env.Registry))
	metrics.Handle("/stats/prometheus", daemon.Metrics(w.env.Registry))
	ready := http.NewServeMux()
	ready.Handle("/healthz/ready", w.env.Ready)
	for _, page := range []struct {
		what, addr string
		handler    http.Handler
	}{
		{"administration pages (-admin-addr)", w.cfg.AdminAddr, w.adminPages()},
		{"metrics page (-metrics-addr)", w.cfg.MetricsAddr, metrics},
		{"readiness page (-ready-addr)", w.cfg.ReadyAddr, ready},
	} {
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", page.addr)
		if err != nil {
			return fmt.Errorf("open %s: %w", page.what, err)
		}
		g.Go(func() error { return daemon.ServeHTTP(ctx, ln, page.handler) })
	}
	return nil
}
