package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/internal/zds"
)

// How long a connection may wait for what it needs.
const (
	workloadWait = 5 * time.Second  // istiod to tell about its workload
	connectWait  = 10 * time.Second // its application or next hop to answer
)

// pod is one enrolled pod: its listeners, opened in its network namespace, and what they share.
type pod struct {
	*proxy
	info  zds.Info
	id    mesh.Identity
	netns *linux.NetNS
	log   *zap.Logger

	tunnels *hbone.Pool   // to other pods
	server  *hbone.Server // from other pods

	listeners     []*net.TCPListener
	stopAccepting context.CancelFunc
	kill          context.Context // ends when the pod's connections must, at once
	killNow       context.CancelCauseFunc
	running       sync.WaitGroup
}

// proxy is what all pods of a node share.
type proxy struct {
	cfg   *Config
	log   *zap.Logger
	state *state
	ids   *identity.Manager
	conns *conns
	rep   *reporter

	absent absentees

	sharing sync.Once // tells once that listeners do not take over
}

// identity is what a pod of this node is to its peers.
func (p *proxy) identity(info zds.Info) mesh.Identity {
	return mesh.Identity{TrustDomain: p.cfg.TrustDomain, Namespace: info.Namespace, ServiceAccount: info.ServiceAccount}
}

var errPodLeft = errors.New("pod left the mesh")

// startPod opens the pod's listeners and serves them. It takes ownership of netns.
func (p *proxy) startPod(info zds.Info, netns *linux.NetNS) (*pod, error) {
	d := &pod{
		proxy: p, info: info, netns: netns,
		id:  p.identity(info),
		log: p.log.With(zap.String("pod", info.Namespace+"/"+info.Name)),
	}
	d.tunnels = hbone.NewPool(hbone.PoolConfig{
		Dial: d.dialTunnel, TLS: d.clientTLS, Log: d.log.Named("tunnel"),
		MaxStreams: p.cfg.MaxStreams, IdleTimeout: p.cfg.UnusedRelease, StdlibRecords: p.cfg.StdlibRecords,
	})
	d.server = &hbone.Server{
		TLS: p.ids.ServerConfig(d.id), Handle: d.inbound, Log: d.log.Named("inbound"), StdlibRecords: p.cfg.StdlibRecords,
	}

	type service struct {
		port   uint16
		handle func(context.Context, *net.TCPConn)
	}
	services := []*service{
		{port: mesh.PortOutbound, handle: d.outbound},
		{port: mesh.PortPassthrough, handle: d.passthrough},
		{port: mesh.PortHBONE, handle: d.serveTunnel},
	}
	for _, s := range services {
		ln, err := netns.Listen(context.Background(), linux.ListenOptions{
			Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), s.port), Mark: mesh.MarkZtunnel, ReusePort: true,
		})
		if err != nil {
			d.closeListeners()
			d.tunnels.Close()
			netns.Close()
			return nil, fmt.Errorf("open port %d in pod %s/%s: %w", s.port, info.Namespace, info.Name, err)
		}
		d.listeners = append(d.listeners, ln)
	}
	for _, ln := range d.listeners { // from the ztunnel that is to be replaced, if there is one
		if err := linux.TakeOver(ln); err != nil {
			p.sharing.Do(func() {
				p.log.Warn("listeners share connections with those of an earlier ztunnel: some may be reset when it ends", zap.Error(err))
			})
		}
	}
	accepting, stop := context.WithCancel(context.Background())
	d.stopAccepting = stop
	d.kill, d.killNow = context.WithCancelCause(context.Background())
	for i, s := range services {
		d.running.Go(func() { d.serve(accepting, d.listeners[i], s.handle) })
	}
	p.ids.Prefetch(d.id)
	return d, nil
}

func (d *pod) serve(accepting context.Context, ln net.Listener, handle func(context.Context, *net.TCPConn)) {
	err := daemon.Serve(accepting, ln, d.cfg.Grace, func(ctx context.Context, c net.Conn) {
		ctx, cancel := context.WithCancelCause(ctx)
		unlink := context.AfterFunc(d.kill, func() { cancel(context.Cause(d.kill)) })
		defer unlink()
		defer cancel(nil)
		handle(ctx, c.(*net.TCPConn))
	})
	if err != nil {
		d.log.Error("listener failed", zap.Error(err))
	}
}

// drain stops accepting, tells peers that the tunnels end, and waits for connections up to the grace period, or until ctx is
// done.
func (d *pod) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.Grace)
	defer cancel()
	unlink := context.AfterFunc(ctx, func() { d.killNow(daemon.ErrDrained) })
	defer unlink()
	d.stopAccepting()
	d.running.Go(func() {
		if err := d.server.Shutdown(ctx); err != nil {
			d.log.Debug("tunnels did not end in time", zap.Error(err))
		}
	})
	d.running.Wait()
	d.close()
}

// leave ends the pod and all its connections now.
func (d *pod) leave() {
	d.killNow(errPodLeft)
	d.stopAccepting()
	d.closeListeners()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = d.server.Shutdown(ctx)
	d.running.Wait()
	d.close()
}

func (d *pod) closeListeners() {
	for _, ln := range d.listeners {
		ln.Close()
	}
}

func (d *pod) close() {
	d.killNow(nil)
	d.tunnels.Close()
	d.netns.Close()
}

func (d *pod) key() podKey { return podKey{d.info.Namespace, d.info.Name} }

// workload returns what istiod says of this pod, waiting for it if need be, and the view that says so.
func (d *pod) workload(ctx context.Context) (*view, *mesh.Workload, error) {
	if v := d.state.load(); d.workloadIn(v) != nil {
		return v, d.workloadIn(v), nil
	}
	ctx, cancel := context.WithTimeout(ctx, workloadWait)
	defer cancel()
	v, ok := d.state.await(ctx, func(v *view) bool { return d.workloadIn(v) != nil })
	if !ok {
		return nil, nil, errUnknownWorkload
	}
	return v, d.workloadIn(v), nil
}

// workloadIn finds the pod by name, and only if it runs as the account the CNI agent vouched for.
func (d *pod) workloadIn(v *view) *mesh.Workload {
	w := v.Pod(d.info.Namespace, d.info.Name)
	if w == nil || w.ServiceAccount != d.info.ServiceAccount {
		return nil
	}
	return w
}

// dial connects from inside the pod's namespace; the mark keeps the connection out of redirection. local is the source
// address to show, or zero for the pod's own.
func (d *pod) dial(ctx context.Context, to netip.AddrPort, local netip.Addr) (*net.TCPConn, error) {
	c, err := d.netns.Dial(ctx, linux.DialOptions{Remote: to, Local: local, Mark: mesh.MarkZtunnel, Timeout: connectWait})
	if err != nil {
		return nil, connectError{err}
	}
	return c, nil
}

// dialApp connects to the pod's own application, showing the caller's address where that can be. One that is told of the caller
// in a header, and believes it, is reached on its loopback, where nobody else gets at it.
func (d *pod) dialApp(ctx context.Context, c *conn) (*net.TCPConn, error) {
	to, caller := c.target, c.src.Addr()
	if c.announce != nil && d.cfg.AppTunnelLocal {
		loopback := netip.IPv6Loopback()
		if to.Addr().Is4() {
			loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		}
		return d.dial(ctx, netip.AddrPortFrom(loopback, to.Port()), netip.Addr{})
	}
	if !d.cfg.KeepSource || caller == to.Addr() || caller.Is4() != to.Addr().Is4() || caller.IsLoopback() {
		caller = netip.Addr{}
	}
	return d.dial(ctx, to, caller)
}

// networkAddr is addr on this node's network.
func (d *pod) networkAddr(a netip.Addr) mesh.NetworkAddr {
	return mesh.NetworkAddr{Network: d.cfg.Network, Addr: a}
}

// pick is the randomness load balancing asks for.
func pick(n uint64) uint64 { return rand.Uint64N(n) }

// pump carries c's bytes between a, the side that asked, and b, the side that answers.
func pump(ctx context.Context, c *conn, a, b relay.Conn) error {
	err := relay.Pump(ctx, a, b, &c.bytes)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		return mesh.Unmap(t.AddrPort())
	}
	return netip.AddrPort{}
}

// abort closes a connection with a reset, so that the peer cannot take it for a complete answer.
func abort(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}
