// Package upstream is the other side of a waypoint: the endpoints that requests and connections go to. A [View] says what the mesh knows
// of services, a [Target] is one of their ports, a [Search] finds an endpoint of it by balancing, locality, outlier detection and health
// checks, and a [Pool] has the connections, plain, tunnelled or with TLS of their own, kept and shared as traffic policies bound them.
//
// It hides how endpoints are reached and how they fare. It knows no rules and no requests: what may go where, and what is tried again, is
// decided by who asks.
package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/memlimit"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/http2"
)

// ConnectTimeout is how long it may take to connect when no traffic policy says otherwise.
const ConnectTimeout = 10 * time.Second

const (
	idleTimeout = time.Minute // of a kept connection: most servers keep theirs longer
	maxIdle     = 256         // connections kept per endpoint
)

// Pool has the endpoints this waypoint speaks to, with their connections and how busy they are.
type Pool struct {
	id    func() mesh.Identity
	own   func(netip.AddrPort) bool // the waypoint's own, where no client has any business
	ids   *identity.Manager
	pool  *hbone.Pool
	mem   *memlimit.Budget
	names *names
	log   *zap.Logger

	ctx    context.Context // ends dials of shared connections
	cancel context.CancelFunc
	work   sync.WaitGroup // of shared connections

	mu        sync.Mutex
	endpoints map[endpointKey]*endpoint
	clusters  map[ClusterKey]*Cluster
	vitals    map[vitalsKey]*vitals
	closed    bool

	failing atomic.Int64 // vitals of that kind
}

// endpointKey is one port of one endpoint, and how it is reached. A workload that comes back as another, or at another
// address, is another endpoint.
type endpointKey struct {
	addr   netip.AddrPort
	host   string // instead of the address, to be resolved
	tunnel bool
	id     mesh.Identity

	tls    *mesh.UpstreamTLS // begun with the application; another policy makes another endpoint
	secret *mesh.Credential  // for that, instead of files; so does another of these
	name   string            // it is to have then

	client netip.AddrPort // whose connections these are, where the application is told; else all share them
}

// endpoint is one of them. mu of Pool guards idle and shared.
type endpoint struct {
	key    endpointKey
	active atomic.Int64 // requests and connections under way
	idle   []*Conn      // the one used last at the end
	shared shared
}

// Conn is an HTTP/1.1 connection to an endpoint, or one stream of a connection that others use, too.
type Conn struct {
	*http1.ClientConn
	conn   net.Conn
	to     *endpoint
	Reused bool
	since  time.Time // idle
	until  time.Time // it may be, then
	served uint32    // exchanges
	pool   *mesh.ConnectionPool

	Stream *http2.ClientStream // instead of ClientConn and conn
	use    uint32              // of the stream
}

// Far is what an exchange sends to.
func (up *Conn) Far() http1.Upstream {
	if up.Stream != nil {
		return up.Stream
	}
	return up.ClientConn
}

// SetDeadline bounds the exchange; zero takes the bound away.
func (up *Conn) SetDeadline(t time.Time) {
	if up.Stream != nil {
		up.Stream.SetDeadline(t)
		return
	}
	up.ClientConn.SetDeadline(t)
}

// Hasten is SetDeadline while another goroutine waits for the response. The zero time changes nothing.
func (up *Conn) Hasten(t time.Time) {
	if up.Stream != nil {
		up.Stream.Hasten(t)
		return
	}
	up.ClientConn.Hasten(t)
}

// Close ends what is there. Nothing of it is looked at any more.
func (up *Conn) Close() {
	if up.Stream != nil {
		up.Stream.Free()
		return
	}
	_ = up.ClientConn.Close()
}

// End is the end of what Begin counted where the connection was picked.
func (up *Conn) End() { up.to.active.Add(-1) }

// HangUp makes whoever waits for the upstream return. Safe to call at any time from any goroutine.
func (up *Conn) HangUp() {
	if up.Stream != nil {
		up.Stream.Cancel(up.use)
		return
	}
	_ = up.conn.Close()
}

// Pick is where a try goes.
type Pick struct {
	endpoint *endpoint
	Workload *mesh.Workload // nil: an address outside the mesh's knowledge
	expect   []mesh.Identity
	host     *host          // as a member of its cluster; nil: it is none
	self     *mesh.Workload // the waypoint's own pod, where the endpoint is known by name

	Settings *mesh.TrafficSettings // what is said of its service; nil: nothing
	from     netip.AddrPort        // the client
	dialled  netip.AddrPort        // by the client
}

// Addr is the endpoint's; invalid where that is known by its name only.
func (p *Pick) Addr() netip.AddrPort { return p.endpoint.key.addr }

// Begin counts a request or connection as under way there: balancing goes by that.
func (p *Pick) Begin() { p.endpoint.active.Add(1) }

// End is the end of what Begin counted.
func (p *Pick) End() { p.endpoint.active.Add(-1) }

// Known is the number by which clients know the endpoint; false: they cannot.
func (p *Pick) Known() (id uint64, ok bool) {
	if p.host == nil {
		return 0, false
	}
	return p.host.id, true
}

// Limits is what bounds connections to it; nil: nothing does.
func (p *Pick) Limits() *mesh.ConnectionPool {
	if p.Settings == nil {
		return nil
	}
	return p.Settings.Pool
}

// Config is what a Pool needs.
type Config struct {
	ID     func() mesh.Identity      // by which this waypoint is known to endpoints
	Own    func(netip.AddrPort) bool // the waypoint's own, where no client has any business
	IDs    *identity.Manager
	Memory *memlimit.Budget // of connections; nil: no bound
}

// New returns a pool that is to be run.
func New(cfg Config, log *zap.Logger) *Pool {
	u := &Pool{id: cfg.ID, own: cfg.Own, ids: cfg.IDs, mem: cfg.Memory, log: log, endpoints: make(map[endpointKey]*endpoint),
		clusters: make(map[ClusterKey]*Cluster), vitals: make(map[vitalsKey]*vitals)}
	u.ctx, u.cancel = context.WithCancel(context.Background())
	u.names = newNames()
	u.pool = hbone.NewPool(hbone.PoolConfig{
		Dial: func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
			return (&net.Dialer{Timeout: ConnectTimeout}).DialContext(ctx, "tcp", addr.String())
		},
		TLS: u.tls, Memory: cfg.Memory, Log: log,
	})
	return u
}

// tls is the handshake configuration of a new tunnel.
func (u *Pool) tls(ctx context.Context, to hbone.Target) (*tls.Config, error) {
	svid, err := u.ids.SVID(ctx, to.Local)
	if err != nil {
		return nil, err
	}
	return identity.ClientConfig(svid, to.Expect), nil
}

// Workload is a workload that was asked for by its own address.
func (u *Pool) Workload(self, w *mesh.Workload, addr netip.AddrPort) Pick {
	return u.to(self, endpointKey{addr: addr}, w, nil)
}

func (u *Pool) to(self *mesh.Workload, key endpointKey, w *mesh.Workload, sans []mesh.Identity) Pick {
	p := Pick{Workload: w}
	if w.Protocol == mesh.ProtocolHBONE && !captured(self) {
		key.tunnel, key.id = true, w.Identity()
		p.expect = append([]mesh.Identity{key.id}, sans...)
	}
	p.endpoint = u.endpoint(key)
	return p
}

// captured reports whether a ztunnel takes what this waypoint's own pod dials into tunnels, as the pod's: a tunnel from here would
// go inside of another and end nowhere.
func captured(self *mesh.Workload) bool {
	return self != nil && self.Protocol == mesh.ProtocolHBONE && !self.NativeTunnel
}

func (u *Pool) endpoint(key endpointKey) *endpoint {
	u.mu.Lock()
	defer u.mu.Unlock()
	e := u.endpoints[key]
	if e == nil {
		e = &endpoint{key: key}
		u.endpoints[key] = e
	}
	return e
}

// freshFor is how long a kept connection is trusted whose end cannot be seen, with a request that must not be sent twice:
// servers wait longer before they close one.
const freshFor = time.Second

// unseenFor is how long a kept connection is taken again without a look at it, with a request that may be sent twice: looking
// costs a system call, and no server gives up on a connection that soon, let alone says something on it, unless there was a reason
// to say more than was asked for.
const unseenFor = 100 * time.Millisecond

// Kept returns a connection to an endpoint that waits to be used again, or nil. once says that the request must not be sent
// twice.
func (u *Pool) Kept(p *Pick, once bool) *Conn {
	for {
		up := u.take(p.endpoint)
		if up == nil {
			return nil
		}
		seen := isSeen(up.conn)
		idle := time.Since(up.since)
		switch {
		case !up.Reusable() || idle >= idleFor(up.pool) || draining(up.conn):
		case !once && idle < unseenFor && !up.Doubtful(), !ended(up.conn) && (seen || !once || idle < freshFor):
			return up
		}
		up.Close()
	}
}

// Connect makes a connection for requests.
func (u *Pool) Connect(ctx context.Context, p Pick, h hbone.Header) (*Conn, error) {
	conn, err := u.Dial(ctx, p, h, "")
	if err != nil {
		return nil, err
	}
	return &Conn{ClientConn: http1.NewClientConn(conn, http1.Config{}), conn: conn, to: p.endpoint, pool: p.Limits()}, nil
}

func (u *Pool) take(e *endpoint) *Conn {
	u.mu.Lock()
	defer u.mu.Unlock()
	if there := u.endpoints[e.key]; there != nil {
		e = there
	}
	n := len(e.idle)
	if n == 0 {
		return nil
	}
	up := e.idle[n-1]
	e.idle[n-1] = nil
	e.idle = e.idle[:n-1]
	return up
}

// Put keeps a connection for the next request, if it can carry one.
func (u *Pool) Put(up *Conn) {
	up.served++
	if up.Stream != nil || !up.Reusable() || draining(up.conn) || up.pool != nil && up.pool.MaxPerConnection > 0 && up.served >= up.pool.MaxPerConnection {
		up.Close()
		return
	}
	up.SetDeadline(time.Time{})
	up.Reused = true
	up.since = time.Now()
	up.until = up.since.Add(idleFor(up.pool))
	u.mu.Lock()
	e := u.endpoints[up.to.key]
	if e == nil { // it was forgotten meanwhile
		e = up.to
		u.endpoints[e.key] = e
	}
	if len(e.idle) < maxIdle && !u.closed {
		e.idle = append(e.idle, up)
		up = nil
	}
	u.mu.Unlock()
	if up != nil {
		up.Close()
	}
}

// idleFor is how long a connection may wait for its next request.
func idleFor(p *mesh.ConnectionPool) time.Duration {
	const forever = 100 * 365 * 24 * time.Hour
	switch {
	case p == nil || p.HTTPIdleTimeout == nil:
		return idleTimeout
	case *p.HTTPIdleTimeout == 0:
		return forever
	}
	return *p.HTTPIdleTimeout
}

// Dial connects to an endpoint. protocol is what is to be agreed on in TLS that is begun with the application; "": nothing.
func (u *Pool) Dial(ctx context.Context, p Pick, h hbone.Header, protocol string) (relay.Conn, error) {
	conn, err := u.reach(ctx, p, h)
	if err != nil {
		return nil, err
	}
	if p.Settings != nil && p.Settings.ProxyProtocol != mesh.ProxyProtocolNone {
		if err := announce(conn, p.Settings.ProxyProtocol, p.from, p.dialled); err != nil {
			_ = conn.Close()
			return nil, err
		}
	}
	if key := &p.endpoint.key; key.tls != nil {
		return originate(ctx, conn, origin{key.tls, key.secret, key.name}, protocol)
	}
	return conn, nil
}

// reach makes the connection that carries everything else.
func (u *Pool) reach(ctx context.Context, p Pick, h hbone.Header) (relay.Conn, error) {
	key := &p.endpoint.key
	addr := key.addr
	if key.host != "" {
		found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", key.host)
		if err != nil {
			return nil, fmt.Errorf("resolve %s: %w", key.host, err)
		}
		found = p.self.Reaches(found)
		addr = netip.AddrPortFrom(found[rand.IntN(len(found))], addr.Port())
	}
	if u.own(addr) {
		return nil, fmt.Errorf("%s is the waypoint itself: no client is sent there", addr)
	}
	if key.tunnel {
		authority := addr.String()
		if key.host != "" {
			authority = net.JoinHostPort(key.host, strconv.Itoa(int(addr.Port())))
		}
		s, err := u.pool.Open(ctx, hbone.Target{
			Local: u.id(), Addr: netip.AddrPortFrom(addr.Addr(), mesh.PortHBONE), Expect: p.expect,
		}, authority, h)
		if err != nil {
			return nil, err
		}
		return s, nil
	}
	d := net.Dialer{}
	if pool := p.Limits(); pool != nil && pool.Keepalive != nil {
		k := pool.Keepalive
		d.KeepAliveConfig = net.KeepAliveConfig{Enable: true, Idle: k.Time, Interval: k.Interval, Count: int(k.Probes)}
	}
	conn, err := d.DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// ended looks, without waiting, whether the peer of a kept connection or tunnel has closed it, or sent what nobody asked for.
func ended(conn net.Conn) bool {
	if s, ok := conn.(*hbone.Stream); ok {
		return s.Ended()
	}
	if t, ok := conn.(*tls.Conn); ok {
		return ended(t.NetConn()) // of what came, what was not read yet
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return false
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return true
	}
	over := true
	err = raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		over = !errors.Is(err, syscall.EAGAIN)
		return true
	})
	return over || err != nil
}

// tunnelOf is the tunnel that carries a connection, if one does.
func tunnelOf(conn net.Conn) *hbone.Stream {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	s, _ := conn.(*hbone.Stream)
	return s
}

// draining reports whether a connection is inside of a tunnel that is about to end: nothing new is begun there.
func draining(conn net.Conn) bool {
	s := tunnelOf(conn)
	return s != nil && s.Draining()
}

// isSeen reports whether ended sees the end of a connection: not inside of TLS.
func isSeen(conn net.Conn) bool {
	switch conn.(type) {
	case *net.TCPConn, *hbone.Stream:
		return true
	}
	return false
}

// Run drops connections that were not used for long, until ctx is done, then all.
func (u *Pool) Run(ctx context.Context) {
	tick := time.NewTicker(idleTimeout / 4)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			u.sweep(now)
		case <-ctx.Done():
			u.cancel()
			u.mu.Lock()
			u.closed = true
			u.mu.Unlock()
			u.sweep(time.Now().AddDate(200, 0, 0))
			_ = u.pool.Close()
			u.closeShared()
			u.work.Wait()
			return
		}
	}
}

// sweep closes what has been idle for too long, and forgets endpoints and clusters that nothing is left of.
func (u *Pool) sweep(now time.Time) {
	var old []*Conn
	var unused []sharedConn
	u.mu.Lock()
	for key, e := range u.endpoints {
		var kept []*Conn
		for _, up := range e.idle {
			if up.until.Before(now) || draining(up.conn) {
				old = append(old, up)
				continue
			}
			kept = append(kept, up)
		}
		e.idle = kept
		unused = append(unused, e.shared.unused(now.Add(-idleTimeout))...)
		if len(e.idle)+len(e.shared.conns) == 0 && e.shared.dial == nil && e.active.Load() == 0 {
			delete(u.endpoints, key) // who picked it just now keeps it to himself
		}
	}
	for key, c := range u.clusters {
		if c.forgettable(now) {
			delete(u.clusters, key) // a view that knows it goes on with it
		}
	}
	u.mu.Unlock()
	for _, up := range old {
		up.Close()
	}
	for _, c := range unused {
		c.Retire()
	}
}
