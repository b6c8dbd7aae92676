// Package ztunnel is the node proxy: it carries the TCP connections of the node's enrolled pods to other pods over
// HBONE, proves who both ends are, and enforces L4 policy.
//
// It learns pods from the CNI agent (package zds), the mesh from istiod (package xds), and certificates from istiod's
// CA (package identity). It decides with ztunnel/nexthop and internal/authz, and does nothing at L7: that is the
// waypoint's.
package ztunnel

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/internal/zds"
)

// The tasks that must be done before ztunnel is ready, named as Istio's.
const (
	taskState = "state manager"          // istiod's first answer
	taskPods  = "workload proxy manager" // every pod of the CNI agent's list is served
	taskProxy = "proxy"                  // serving
)

// Ztunnel is the program.
type Ztunnel struct {
	cfg    *Config
	env    *daemon.Env
	log    *zap.Logger
	state  *state
	ids    *identity.Manager
	ca     *identity.CAClient
	roots  *identity.RootFile // of the authority: the one read last
	conns  *conns
	pods   *pods
	xds    *xds.Client
	zds    *zds.Client
	quit   context.CancelFunc
	xdsMet *xdsMetrics
	away   atomic.Bool // istiod has not been heard since the last connection to it ended
}

// New wires the program without starting anything.
func New(cfg *Config, env *daemon.Env) (*Ztunnel, error) {
	if !linux.HasCapNetAdmin() {
		return nil, fmt.Errorf("CAP_NET_ADMIN is missing: run as root, or grant NET_ADMIN, SYS_ADMIN and NET_RAW")
	}
	z := &Ztunnel{cfg: cfg, env: env, log: env.Log, conns: newConns(), xdsMet: newXDSMetrics()}
	z.state = newState(env.Log.Named("state"))
	z.state.changed = z.conns.recheck
	xdsTarget, xdsTLS, err := z.controlPlane(cfg.XDSAddress, cfg.XDSRootCA, cfg.XDSHostname)
	if err != nil {
		return nil, fmt.Errorf("xDS client: %w", err)
	}
	caTarget, caTLS, err := z.controlPlane(cfg.CAAddress, cfg.CARootCA, cfg.CAHostname)
	if err != nil {
		return nil, fmt.Errorf("CA client: %w", err)
	}
	z.ca, err = identity.NewCAClient(identity.CAClientConfig{
		Target: caTarget, TLS: caTLS, Token: z.token, ClusterID: cfg.ClusterID,
	})
	if err != nil {
		return nil, fmt.Errorf("CA client: %w", err)
	}
	z.ids = identity.NewManager(identity.ManagerConfig{CA: z.ca, TTL: cfg.SecretTTL, Log: env.Log.Named("identity")})
	node, err := nodeOf(cfg)
	if err != nil {
		return nil, err
	}
	z.xds = xds.NewClient(xds.ClientConfig{
		Target: xdsTarget, TLS: xdsTLS, Token: z.token, Metadata: map[string]string{"clusterid": cfg.ClusterID}, Node: node,
		Subscriptions: []xds.Subscription{
			// Policies first: a workload should not be known before what guards it.
			{TypeURL: mesh.TypeAuthorization, Wildcard: true}, {TypeURL: mesh.TypeAddress, Wildcard: true},
		},
		Apply: z.state.apply, Log: env.Log.Named("xds"),
		OnMessage: z.heard, OnDisconnect: z.lost,
	})
	metrics := newConnMetrics(z.conns)
	rep := &reporter{access: env.Log.Named("access"), enabled: cfg.AccessLog, metrics: metrics, conns: z.conns}
	p := &proxy{cfg: cfg, log: env.Log.Named("proxy"), state: z.state, ids: z.ids, conns: z.conns, rep: rep}
	z.pods = &pods{
		proxy: p, pods: make(map[string]*pod), refused: make(map[string]bool), complete: func() { env.Ready.Done(taskPods) },
	}
	z.zds = &zds.Client{Path: cfg.ZDSPath, Pods: z.pods, Log: env.Log.Named("zds"), OnConnected: z.agentConnected}
	env.Registry.MustRegister(metrics, z.xdsMet, buildInfo("ztunnel", daemon.Version()), podCount(z.pods))
	return z, nil
}

// Run serves until ctx is done, then drains.
func (z *Ztunnel) Run(ctx context.Context) error {
	ctx, z.quit = context.WithCancel(ctx)
	defer z.quit()
	for _, task := range []string{taskState, taskPods, taskProxy} {
		z.env.Ready.Pending(task)
	}
	// The control plane clients and pages outlive ctx, so that connections can finish while the pods drain.
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()
	defer z.ca.Close()
	g, gctx := errgroup.WithContext(serving)
	if err := z.servePages(gctx, g); err != nil {
		stopServing()
		_ = g.Wait()
		return err
	}
	g.Go(func() error { return ignoreStop(serving, z.ids.Run(gctx)) })
	g.Go(func() error { return ignoreStop(serving, z.xds.Run(gctx)) })
	g.Go(func() error { z.roots.Watch(gctx, z.ids.Renew); return nil })
	g.Go(func() error {
		defer stopServing()
		agent, stopAgent := context.WithCancel(gctx)
		defer stopAgent()
		return z.run(ctx, agent, stopAgent)
	})
	return g.Wait()
}

// run speaks with the CNI agent until ctx is done, then drains every pod. It starts when istiod has answered: a pod
// that is enrolled before its policies are known could be let in by their absence.
func (z *Ztunnel) run(ctx, agent context.Context, stopAgent context.CancelFunc) error {
	select {
	case <-z.xds.Synced():
		z.env.Ready.Done(taskState)
	case <-ctx.Done():
		return nil
	case <-agent.Done():
		return nil
	}
	unlink := context.AfterFunc(ctx, stopAgent)
	defer unlink()
	z.env.Ready.Done(taskProxy)
	z.log.Info("serving", zap.String("node", z.cfg.NodeName))
	err := z.zds.Run(agent)
	if agent.Err() != nil {
		err = nil
	}
	z.env.Ready.Pending(taskProxy)
	z.log.Info("draining", zap.Duration("grace", z.cfg.Grace))
	z.pods.drain(z.env.Hurry)
	return err
}

func ignoreStop(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// heard counts a message of istiod's. The first after it was away says that certificates can be had again, too.
func (z *Ztunnel) heard(typeURL string, bytes int) {
	z.xdsMet.message(typeURL, bytes)
	if z.away.CompareAndSwap(true, false) {
		z.ids.Retry()
	}
}

func (z *Ztunnel) lost(err error) {
	z.xdsMet.disconnect(err)
	z.away.Store(true)
}

// agentConnected does not touch readiness when the agent goes away: the pods are served as before, and a DaemonSet that is
// being upgraded ends an old ztunnel that is not ready as soon as its successor exists, whether that serves or not. That
// no pod can be enrolled meanwhile is for the agent's own readiness to say.
func (z *Ztunnel) agentConnected(connected bool) {
	if connected {
		z.pods.connected()
	}
}

// token reads the token anew: it is rotated behind our back.
func (z *Ztunnel) token(context.Context) (string, error) {
	b, err := os.ReadFile(z.cfg.TokenFile)
	if err != nil {
		return "", fmt.Errorf("read the token for istiod: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func (z *Ztunnel) controlPlane(address, rootFile, hostname string) (string, *tls.Config, error) {
	target, host, err := endpoint(address)
	if err != nil {
		return "", nil, err
	}
	if hostname != "" {
		host = hostname
	}
	roots, err := identity.OpenRootFile(rootFile, z.log.Named("roots"))
	if err != nil {
		return "", nil, err
	}
	z.roots = roots
	conf, err := roots.Config(host)
	return target, conf, err
}

// nodeOf describes this ztunnel to istiod.
func nodeOf(cfg *Config) (*corev3.Node, error) {
	fields := map[string]any{
		"NAME": cfg.PodName, "NAMESPACE": cfg.PodNamespace, "INSTANCE_IPS": cfg.InstanceIP, "NODE_NAME": cfg.NodeName,
		"CLUSTER_ID": cfg.ClusterID,
	}
	for _, kv := range os.Environ() {
		name, value, _ := strings.Cut(kv, "=")
		if key, ok := strings.CutPrefix(name, "ISTIO_META_"); ok {
			fields[key] = value
		}
	}
	meta, err := structpb.NewStruct(fields)
	if err != nil {
		return nil, fmt.Errorf("describe this node to istiod: %w", err)
	}
	return &corev3.Node{
		Id: fmt.Sprintf("ztunnel~%s~%s.%s~%s.svc.%s", cfg.InstanceIP, cfg.PodName, cfg.PodNamespace, cfg.PodNamespace,
			cfg.ClusterDomain),
		Metadata: meta,
	}, nil
}

// listen opens a page's address now, so that a port in use is an error at start.
func listen(ctx context.Context, what, addr string) (net.Listener, error) {
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", what, err)
	}
	return ln, nil
}
