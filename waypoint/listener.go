package waypoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/waypoint/peer"
)

// serve accepts tunnels until ctx is done, then drains; running ends what is still there.
func (w *Waypoint) serve(ctx, running context.Context) error {
	var ln net.Listener // nil: tunnels are taken by a ztunnel
	var err error
	if w.cfg.ListenAddr != "" {
		if ln, err = (&net.ListenConfig{}).Listen(running, "tcp", w.cfg.ListenAddr); err != nil {
			return fmt.Errorf("open the tunnel listener (-listen-addr): %w", err)
		}
		defer ln.Close()
	}
	select {
	case <-w.istiod.XDS.Synced():
		w.env.Ready.Done(taskState)
	case <-ctx.Done():
		return nil
	case <-running.Done():
		return nil
	}
	w.ids.Prefetch(w.cfg.identity())

	w.sessions.trimmer.begin()
	accepting, stopAccepting := context.WithCancel(running)
	var drained sync.WaitGroup
	defer drained.Wait()
	if err := w.serveAnnounced(accepting, &drained); err != nil {
		stopAccepting()
		return err
	}
	w.env.Ready.Done(taskProxy)
	w.log.Info("serving", zap.String("addr", w.cfg.ListenAddr), zap.String("proxy.addr", w.cfg.ProxyAddr), zap.String("gateway", w.cfg.Gateway))
	drained.Go(func() {
		defer stopAccepting()
		select {
		case <-ctx.Done():
			w.drain(running, stopAccepting)
		case <-accepting.Done():
			w.lot.Drain()
		}
	})
	if ln == nil {
		<-accepting.Done()
		return nil
	}
	err = daemon.Serve(accepting, ln, w.cfg.Grace, func(ctx context.Context, raw net.Conn) {
		if err := w.server.ServeConn(ctx, raw); err != nil {
			w.log.Debug("tunnel connection ended", zap.Stringer("peer.addr", raw.RemoteAddr()), zap.Error(err))
		}
	})
	stopAccepting()
	return err
}

// drain ends what is under way in order. At first everybody is still served, but told that the connection ends: it takes
// the mesh a moment to learn that this waypoint is no longer ready. Then nothing new is taken, and what there is may end
// within the grace period.
func (w *Waypoint) drain(ctx context.Context, stopAccepting func()) {
	w.sessions.wind() // first: who sees that this waypoint is not ready relies on it
	w.env.Ready.Pending(taskProxy)
	w.log.Info("draining", zap.Duration("delay", w.cfg.DrainDelay), zap.Duration("grace", w.cfg.Grace))
	wait(ctx, w.env.Hurry, w.cfg.DrainDelay)
	ctx, cancel := context.WithTimeout(ctx, w.cfg.Grace)
	defer cancel()
	stop := context.AfterFunc(w.env.Hurry, cancel)
	defer stop()
	stopAccepting()
	w.sessions.drain()
	w.lot.Drain()
	if err := w.server.Shutdown(ctx); err != nil {
		w.log.Warn("connections were cut at the end of the grace period", zap.Error(err))
	}
}

// wait returns after d, or when either context is done.
func wait(a, b context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-a.Done():
	case <-b.Done():
	}
}

// tunnel is one CONNECT: a connection of a client to a destination.
type tunnel struct {
	*Waypoint
	client peer.Client
	to     destination
	local  netip.AddrPort

	sni         string // that a TLS hello asks for; "": none was seen
	certificate string // what x-forwarded-client-cert says of the client: who vouches, and for whom; "": nothing
}

// refused tells of a tunnel that was not accepted.
func (w *Waypoint) refused(r *hbone.Request, err error) {
	w.rep.Refused("tunnel refused", zap.Stringer("src.addr", r.RemoteAddr), zap.String("dst.hbone_addr", r.Authority), zap.Error(err))
}

// connect serves one CONNECT.
func (w *Waypoint) connect(ctx context.Context, r *hbone.Request) {
	t, err := w.admit(r)
	if err != nil {
		status := http.StatusServiceUnavailable
		if refused, ok := errors.AsType[*refusedError](err); ok {
			status = refused.status
		}
		w.refused(r, err)
		_ = r.Reject(status) // the client may have gone, which is no news
		return
	}
	if t.isOpaque() {
		t.serveTCP(ctx, func() (relay.Conn, error) { return r.Accept("") }, func() { _ = r.Reject(http.StatusServiceUnavailable) })
		return
	}
	s, err := r.Accept("")
	if err != nil {
		w.refused(r, err)
		return
	}
	t.serveTaken(ctx, s, func() { _ = s.Reset() })
}

// isOpaque reports whether nothing that the client sends is to be looked at.
func (t *tunnel) isOpaque() bool {
	if t.to.app != mesh.AppTLS {
		return t.to.app == mesh.AppTCP
	}
	v := t.state.load()
	svc := v.Service(t.to.service)
	return (svc == nil || !svc.Dynamic) && !v.table.Lookup(t.to.service, t.to.port).NeedsSNI()
}

// serveTaken serves a connection that was accepted. reset ends it with an error that the client sees. If it was parked, it is no longer
// the caller's.
func (t *tunnel) serveTaken(ctx context.Context, conn relay.Conn, reset func()) (parked bool) {
	if !t.isOpaque() {
		if t.to.app != mesh.AppUnknown && t.to.app != mesh.AppTLS {
			return t.serveHTTP(ctx, conn)
		}
		var head []byte
		var err error
		silence := t.cfg.SniffTimeout
		if t.to.app == mesh.AppTLS {
			silence = helloTimeout
		}
		if conn, head, err = peek(conn, silence); err != nil {
			reset()
			return false
		}
		if is, certain := looksHTTP(head); is && certain && t.to.app == mesh.AppUnknown {
			return t.serveHTTP(ctx, conn)
		}
		t.sni = readHello(head).name
	}
	t.serveTCP(ctx, func() (relay.Conn, error) { return conn, nil }, reset)
	return false
}

// admit finds out who calls whom.
func (w *Waypoint) admit(r *hbone.Request) (*tunnel, error) {
	if r.Method != http.MethodConnect {
		return nil, &refusedError{http.StatusBadRequest, "method " + r.Method + ": only CONNECT is served here"}
	}
	id, err := identity.PeerIdentity(r.TLS)
	if err != nil {
		return nil, &refusedError{http.StatusUnauthorized, err.Error()}
	}
	return w.between(peer.Client{ID: id, Addr: mesh.Unmap(r.RemoteAddr)}, r.Header, r.Authority, mesh.Unmap(r.LocalAddr))
}

// between finds out for whom a client speaks, and what it means by authority, which came to the address local.
func (w *Waypoint) between(c peer.Client, h hbone.Header, authority string, local netip.AddrPort) (*tunnel, error) {
	v := w.state.load()
	if v.Self == nil {
		return nil, errUnknownSelf
	}
	w.state.peers.Identify(v.Snapshot, &c, h)
	to, err := w.state.find(v, authority, c.Namespace())
	if err != nil {
		return nil, err
	}
	t := &tunnel{Waypoint: w, client: c, to: to, local: local}
	if w.cfg.ClientCert {
		t.certificate = "By=" + w.cfg.identity().String() + ";URI=" + c.ID.String()
	}
	return t, nil
}

// header describes the client to the next hop.
func (t *tunnel) header() hbone.Header {
	f := `for="` + t.client.Addr.String() + `"`
	if t.to.hostname != "" {
		f += ";host=" + t.to.hostname
	}
	return hbone.Header{Forwarded: f}
}

// methods are how an HTTP connection begins; the last is HTTP/2's.
var methods = [...]string{"GET ", "HEAD ", "POST ", "PUT ", "DELETE ", "OPTIONS ", "PATCH ", "TRACE ", "CONNECT ", "PRI * HTTP/2.0\r\n"}

// helloTimeout is how long a client that speaks first may take for what tells its protocol: the rest of what it has begun,
// and all of it where the port is said to carry TLS.
const helloTimeout = 5 * time.Second

// peek waits for enough of a connection to tell whether it is HTTP, or whom its TLS hello asks for. Who says nothing for so
// long speaks after its server, which is neither.
func peek(conn relay.Conn, silence time.Duration) (relay.Conn, []byte, error) {
	begin := time.Now()
	_ = conn.SetReadDeadline(begin.Add(silence))
	defer func() { _ = conn.SetReadDeadline(time.Time{}) }()
	var head []byte
	for {
		var b [2048]byte
		n, err := conn.Read(b[:])
		head = append(head, b[:n]...)
		switch _, certain := looksHTTP(head); {
		case err != nil && len(head) == 0 && errors.Is(err, os.ErrDeadlineExceeded):
			return conn, nil, nil
		case err != nil && len(head) == 0:
			return nil, nil, err
		case err != nil, certain && readHello(head).certain:
			return &relay.Peeked{Conn: conn, Head: head}, head, nil
		default: // it can only be TLS or HTTP: its client has begun, and the server waits for the rest
			_ = conn.SetReadDeadline(begin.Add(helloTimeout))
		}
	}
}

// looksHTTP reports whether a connection that begins with head is HTTP, and whether more of it would change nothing.
func looksHTTP(head []byte) (is, certain bool) {
	for _, m := range methods {
		n := min(len(m), len(head))
		if bytes.Equal(head[:n], []byte(m[:n])) {
			return true, n == len(m)
		}
	}
	return false, true
}

// sessions are the HTTP connections being served, those that are parked left out.
type sessions struct {
	mu      sync.Mutex
	all     map[endable]bool // whether they can be parked: then they are dozers
	winding bool
	clock   *time.Timer // runs doze
	dozing  bool        // it will

	tidier  *time.Timer // runs tidy, some time after the last of them has gone
	tidying sync.Mutex  // held while memory is given back
	trimmer trimmer
}

// endable is an HTTP connection of either version.
type endable interface {
	Wind()  // ends with the next exchange that ends, or in as orderly a way
	Drain() // takes no more
}

// add registers a connection. dozes says that it can be parked.
func (ss *sessions) add(c endable, dozes bool) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.all == nil {
		ss.all = make(map[endable]bool)
	}
	ss.all[c] = dozes
	if ss.winding {
		c.Wind()
	}
	if !dozes || ss.dozing {
		return
	}
	ss.dozing = true
	if ss.clock == nil {
		ss.clock = time.AfterFunc(dozeInterval, ss.doze)
		return
	}
	ss.clock.Reset(dozeInterval)
}

func (ss *sessions) remove(c endable) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	delete(ss.all, c)
	switch {
	case len(ss.all) > 0:
	case ss.tidier == nil:
		ss.tidier = time.AfterFunc(dozeInterval, ss.tidy)
	default:
		ss.tidier.Reset(dozeInterval)
	}
}

func (ss *sessions) count() int {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return len(ss.all)
}

// wind makes every connection, there and to come, end with its next exchange.
func (ss *sessions) wind() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.winding = true
	for c := range ss.all {
		c.Wind()
	}
}

// drain ends those that wait for a request.
func (ss *sessions) drain() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for c := range ss.all {
		c.Drain()
	}
}
