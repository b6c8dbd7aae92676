// Package istiod is the control plane: it reads what people want of the mesh, says what that means, and tells every
// node proxy. It signs their certificates and believes nobody without a token.
//
// It wires together the chain source → index → wds → xds, where the source is a directory of YAML (package files) or a
// Kubernetes API server (package kube); what is decided, is decided in packages translate and ca.
package istiod

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/istiod/ca"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/token"
)

const (
	taskRead  = "first read of the configuration"
	stopGrace = 5 * time.Second // for calls under way when istiod stops
)

// Istiod is one control plane.
type Istiod struct {
	cfg  Config
	env  *daemon.Env
	log  *zap.Logger
	auth token.Verifier

	authority *ca.Authority
	source    source
	mirror    *mirror
	xds       *xds.Server
	grpc      *grpc.Server
	metrics   *metrics

	xdsListener, monListener net.Listener
}

// New opens istiod's keys and ports; it serves nothing before Run. With Kubernetes it waits for the API server.
func New(ctx context.Context, cfg Config, env *daemon.Env) (*Istiod, error) {
	o, err := open(ctx, cfg, env)
	if err != nil {
		return nil, err
	}
	d := &Istiod{cfg: cfg, env: env, log: env.Log, auth: o.verifier, authority: o.authority, source: o.source}
	d.mirror = newMirror(o.mesh, env.Log.Named("translate"))
	d.xds = xds.NewServer(xds.ServerConfig{
		Order:        []string{mesh.TypeAuthorization, mesh.TypeCredential, mesh.TypeTrafficPolicy, mesh.TypeRoute, mesh.TypeAddress},
		Authenticate: d.authenticate, CheckNode: checkNode, Ready: d.mirror.filled, Log: env.Log.Named("xds"),
	})
	// A mesh without policies is a mesh with an empty list of them.
	d.xds.PublishAll([]xds.Change{
		{TypeURL: mesh.TypeAuthorization}, {TypeURL: mesh.TypeCredential}, {TypeURL: mesh.TypeTrafficPolicy}, {TypeURL: mesh.TypeRoute}, {TypeURL: mesh.TypeAddress},
	})
	d.mirror.publish = d.xds.PublishAll
	d.metrics = newMetrics(env.Registry, d)
	d.mirror.applied = func(changes []index.Change, took time.Duration) {
		d.metrics.applied(changes, took)
		d.source.tell(changes)
	}
	d.grpc = d.newGRPC(o)
	if err := d.listen(); err != nil {
		return nil, err
	}
	return d, nil
}

func openCA(cfg Config, log *zap.Logger) (*ca.Authority, error) {
	a, err := ca.Open(ca.Config{Dir: cfg.DataDir, TrustDomain: cfg.TrustDomain, Log: log.Named("ca")})
	if err != nil {
		return nil, fmt.Errorf("open the certificate authority (-data-dir): %w", err)
	}
	return a, nil
}

func (d *Istiod) newGRPC(o origin) *grpc.Server {
	names, ips := d.cfg.servingNames(o)
	trusted := d.cfg.TrustedAccounts
	if trusted == nil {
		trusted = []string{o.namespace + "/" + ca.TrustedName}
	}
	options := append(xds.ServerOptions(),
		grpc.Creds(credentials.NewTLS(d.authority.ServingConfig(names, ips))),
		grpc.ChainUnaryInterceptor(d.metrics.countCall))
	s := grpc.NewServer(options...)
	d.xds.Register(s)
	d.authority.Register(s, ca.ServiceConfig{
		Verifier: d.auth, Nodes: d.mirror, TrustedAccounts: trusted, Log: d.log.Named("ca"),
	})
	return s
}

func (d *Istiod) listen() (err error) {
	if d.xdsListener, err = net.Listen("tcp", d.cfg.XDSAddr); err != nil {
		return fmt.Errorf("listen for xDS and CA (-xds-addr): %w", err)
	}
	if d.monListener, err = net.Listen("tcp", d.cfg.MonitoringAddr); err != nil {
		return errors.Join(fmt.Errorf("listen for metrics and debug pages (-monitoring-addr): %w", err), d.xdsListener.Close())
	}
	return nil
}

// XDSAddr is where xDS and CA are served.
func (d *Istiod) XDSAddr() net.Addr { return d.xdsListener.Addr() }

// MonitoringAddr is where metrics, readiness and debug pages are served.
func (d *Istiod) MonitoringAddr() net.Addr { return d.monListener.Addr() }

// RootPEM is what clients verify istiod against.
func (d *Istiod) RootPEM() []byte { return d.authority.RootPEM() }

// Run serves until ctx is done.
func (d *Istiod) Run(ctx context.Context) error {
	d.env.Ready.Pending(taskRead)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := d.source.Run(ctx, d.mirror.apply); err != nil {
			return fmt.Errorf("read the mesh: %w", err)
		}
		return nil
	})
	g.Go(func() error { return daemon.ServeHTTP(ctx, d.monListener, d.pages()) })
	g.Go(func() error {
		// Who asks before everything was read would be told that there is nothing, and that no pod may have a certificate.
		select {
		case <-d.mirror.filled:
		case <-ctx.Done():
			return d.xdsListener.Close()
		}
		d.env.Ready.Done(taskRead)
		d.log.Info("serving", zap.Stringer("xds.addr", d.XDSAddr()), zap.Stringer("monitoring.addr", d.MonitoringAddr()))
		return d.serveGRPC(ctx)
	})
	return g.Wait()
}

func (d *Istiod) serveGRPC(ctx context.Context) error {
	stopped := make(chan struct{})
	unlink := context.AfterFunc(ctx, func() {
		defer close(stopped)
		force := time.AfterFunc(stopGrace, d.grpc.Stop)
		defer force.Stop()
		d.xds.Stop()
		d.grpc.GracefulStop()
	})
	err := d.grpc.Serve(d.xdsListener)
	if !unlink() {
		<-stopped
	}
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serve xDS and CA: %w", err)
}

// authenticate names the caller of a stream by its token: namespace/account, and the node the token is bound to.
func (d *Istiod) authenticate(ctx context.Context) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	raw, err := token.FromAuthorization(md.Get("authorization"))
	if err != nil {
		return "", err
	}
	caller, err := d.auth.Verify(ctx, raw)
	if errors.Is(err, token.ErrUnavailable) {
		return "", fmt.Errorf("%w: %w", xds.ErrUnavailable, err)
	}
	if err != nil {
		return "", err
	}
	return caller.Account() + "@" + caller.Node, nil
}

// checkNode refuses a caller that gives itself a node id of another namespace: <type>~<ip>~<name>~<namespace>.svc.<domain>.
func checkNode(peer string, node *core.Node) error {
	parts := strings.Split(node.GetId(), "~")
	if len(parts) != 4 {
		return fmt.Errorf("node id %q is not <type>~<ip>~<name>.<namespace>~<namespace>.svc.<domain>", node.GetId())
	}
	claimed, _, _ := strings.Cut(parts[3], ".")
	if namespace, _, _ := strings.Cut(peer, "/"); claimed != namespace {
		return fmt.Errorf("node id %q is of namespace %q, the token of %q", node.GetId(), claimed, namespace)
	}
	return nil
}
