package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/proxyproto"
	"github.com/mistnet/mistnet/ztunnel/nexthop"
)

// serveTunnel serves one connection to port 15008: mutual TLS, then HTTP/2, then a call of inbound per stream.
func (d *pod) serveTunnel(ctx context.Context, raw *net.TCPConn) {
	src, dst := addrPort(raw.RemoteAddr()), addrPort(raw.LocalAddr())
	var stage *hbone.StageError
	if err := d.server.ServeConn(ctx, raw); errors.As(err, &stage) {
		d.rep.early("inbound", src, dst, err)
	} else if err != nil {
		d.log.Debug("tunnel ended", zap.Stringer("src.addr", src), zap.Error(err))
	}
}

// inbound serves one CONNECT: decide where it goes, who may, connect to the application, then say 200 and pump.
func (d *pod) inbound(ctx context.Context, r *hbone.Request) {
	c, err := d.admit(ctx, r)
	if err == nil {
		ctx = c.ctx
		err = d.deliver(ctx, c, r)
	}
	if c != nil {
		d.rep.close(c, err)
		return
	}
	d.rep.early("inbound", r.RemoteAddr, r.LocalAddr, err)
}

// admit finds out what the request is about. An error has been answered; c is nil while too little is known to report
// more than an early line.
func (d *pod) admit(ctx context.Context, r *hbone.Request) (*conn, error) {
	if r.Method != http.MethodConnect {
		return nil, reject(r, http.StatusBadRequest, errors.New("method "+r.Method+": only CONNECT is served here"))
	}
	peer, err := identity.PeerIdentity(r.TLS)
	if err != nil {
		return nil, reject(r, http.StatusUnauthorized, err)
	}
	v, to, err := d.workload(ctx)
	if err != nil {
		return nil, reject(r, http.StatusServiceUnavailable, err)
	}
	hop, err := nexthop.Inbound(v.Snapshot, to, r.LocalAddr, r.Authority)
	if err != nil {
		return nil, reject(r, statusOf(err), err)
	}
	c := &conn{
		record: &record{
			start: time.Now(), inbound: true, src: r.RemoteAddr, dst: r.LocalAddr, tunnel: r.Authority,
			srcWorkload: v.WorkloadAt(d.networkAddr(r.RemoteAddr.Addr())), dstWorkload: to,
			srcID: peer, dstID: d.id,
		},
		pod: d.key(), original: r.LocalAddr, target: hop.Addr,
		request: authz.Request{Peer: peer, Src: r.RemoteAddr, Dst: hop.Addr},
	}
	if hop.AppTunnel.Proxy {
		c.announce = &proxyproto.Header{From: r.RemoteAddr, To: hop.Target, Identity: peer}
	}
	c.service = calledService(v, to, hop, r.Header.Forwarded)
	c.ctx = d.conns.track(ctx, c)
	waiting, cancel := context.WithTimeout(c.ctx, workloadWait)
	defer cancel()
	if err := d.state.authorize(waiting, c); err != nil {
		return c, reject(r, http.StatusUnauthorized, err)
	}
	return c, nil
}

// deliver connects to the application and pumps.
func (d *pod) deliver(ctx context.Context, c *conn, r *hbone.Request) error {
	app, err := d.dialApp(ctx, c)
	if err != nil {
		return reject(r, http.StatusServiceUnavailable, err)
	}
	var detail string
	if d.cfg.ResponseDetail {
		detail = baggage(c.dstWorkload)
	}
	if c.announce != nil {
		if _, err := app.Write(c.announce.AppendV2(nil)); err != nil {
			abort(app)
			return reject(r, http.StatusServiceUnavailable, fmt.Errorf("announce the client: %w", err))
		}
	}
	s, err := r.Accept(detail)
	if err != nil {
		abort(app)
		return err
	}
	d.rep.open(c)
	return pump(ctx, c, s, app)
}

func statusOf(err error) int {
	var hop *nexthop.Error
	if errors.As(err, &hop) {
		return hop.Status()
	}
	return http.StatusServiceUnavailable
}

func reject(r *hbone.Request, status int, err error) error {
	if e := r.Reject(status); e != nil {
		return errors.Join(err, e)
	}
	return err
}

// calledService is the service a caller says it meant, believed only if the workload is an endpoint of it.
func calledService(v *view, to *mesh.Workload, hop nexthop.Hop, header string) *mesh.Service {
	if hop.Service != nil {
		return hop.Service
	}
	host := forwardedHost(header)
	if host == "" {
		return nil
	}
	for _, sp := range to.Services {
		if _, name, _ := strings.Cut(sp.Service, "/"); name == host {
			return v.Service(sp.Service)
		}
	}
	return nil
}

func forwardedHost(header string) string {
	for part := range strings.SplitSeq(header, ";") {
		if name, value, ok := strings.Cut(strings.TrimSpace(part), "="); ok && strings.EqualFold(name, "host") {
			return strings.Trim(value, `"`)
		}
	}
	return ""
}
