package waypoint

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/proxyproto"
	"github.com/mistnet/mistnet/waypoint/peer"
)

// serveAnnounced serves the connections that a ztunnel has taken out of their tunnels already: a waypoint in a pod that is
// itself enrolled (ambient.istio.io/waypoint-inbound-binding: PROXY). Each begins with a PROXY protocol header that says who
// calls whom. It stops accepting when ctx is done; served is done with the last connection.
func (w *Waypoint) serveAnnounced(ctx context.Context, served *sync.WaitGroup) error {
	if w.cfg.ProxyAddr == "" {
		return nil
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", w.cfg.ProxyAddr)
	if err != nil {
		return fmt.Errorf("open the listener of announced connections (-proxy-addr): %w", err)
	}
	if at, ok := ln.Addr().(*net.TCPAddr); ok && !at.IP.IsLoopback() {
		w.log.Warn("whoever reaches this address can say who it is", zap.Stringer("addr", at))
	}
	served.Go(func() {
		err := daemon.Serve(ctx, ln, w.cfg.Grace, func(ctx context.Context, raw net.Conn) {
			parked := false
			defer func() {
				if !parked {
					_ = raw.Close()
				}
			}()
			var err error
			if parked, err = w.announced(ctx, raw.(*net.TCPConn)); err != nil {
				w.rep.Refused("announced connection refused", zap.Stringer("src.addr", raw.RemoteAddr()), zap.Error(err))
			}
		})
		if err != nil && ctx.Err() == nil {
			w.log.Error("no longer accepting announced connections", zap.Error(err))
		}
	})
	return nil
}

// announcedWithin is how long a connection has to say whose it is.
const announcedWithin = 5 * time.Second

// announced serves a connection. If it was parked, it is no longer the caller's.
func (w *Waypoint) announced(ctx context.Context, raw *net.TCPConn) (parked bool, err error) {
	// What is under way may go on; when its time is over, all of it ends at once.
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()
	_ = raw.SetReadDeadline(time.Now().Add(announcedWithin))
	h, err := proxyproto.Read(raw)
	if err != nil {
		return false, err
	}
	if h.Identity.IsZero() {
		return false, errors.New("PROXY header without the client's identity") // it did not come through a tunnel
	}
	_ = raw.SetReadDeadline(time.Time{})
	t, err := w.between(peer.Client{ID: h.Identity, Addr: h.From}, hbone.Header{}, h.To.String(), h.To)
	if err != nil {
		return false, err
	}
	reset := func() { _ = errors.Join(raw.SetLinger(0), raw.Close()) }
	return t.serveTaken(ctx, raw, reset), nil
}
