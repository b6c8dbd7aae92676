// Package ztunnel is the node proxy: it carries the TCP connections of the node's enrolled pods to other pods over
// HBONE, proves who both ends are, and enforces L4 policy.
//
// It learns pods from the CNI agent (package zds), the mesh from istiod (package xds), and certificates from istiod's
// CA (package identity). It decides with ztunnel/nexthop and internal/authz, and does nothing at L7: that is the
// waypoint's.
package ztunnel

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync/atomic"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/mistnet/mistnet/internal/controlplane"
	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/mesh"
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
	istiod *controlplane.Client
	ids    *identity.Manager
	conns  *conns
	pods   *pods
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
	client, err := controlplane.New(&cfg.Config, controlplane.Options{
		Node: nodeOf(cfg), Apply: z.state.apply, Log: env.Log,
		// Policies first: a workload should not be known before what guards it.
		Types:     []string{mesh.TypeAuthorization, mesh.TypeAddress},
		OnMessage: z.heard, OnDisconnect: z.lost,
	})
	if err != nil {
		return nil, err
	}
	z.istiod, z.ids = client, client.IDs
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
	g, gctx := errgroup.WithContext(serving)
	admin := daemon.AdminPages(z.env, daemon.Admin{Title: "ztunnel " + z.cfg.NodeName, Dump: func() any { return z.dump() }, Quit: z.quit})
	if err := z.cfg.Serve(gctx, g, z.env, admin); err != nil {
		stopServing()
		_ = g.Wait()
		return err
	}
	g.Go(func() error { return z.istiod.Run(gctx) })
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
	case <-z.istiod.XDS.Synced():
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

// nodeOf describes this ztunnel to istiod.
func nodeOf(cfg *Config) controlplane.Node {
	fields := map[string]any{"NODE_NAME": cfg.NodeName}
	for _, kv := range os.Environ() {
		name, value, _ := strings.Cut(kv, "=")
		if key, ok := strings.CutPrefix(name, "ISTIO_META_"); ok {
			fields[key] = value
		}
	}
	return controlplane.Node{
		Kind: "ztunnel", Pod: cfg.PodName, Namespace: cfg.PodNamespace, IP: cfg.InstanceIP, Metadata: fields,
	}
}
