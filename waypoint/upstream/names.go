package upstream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Bounds of what clients can have looked up, by asking for hosts of services that are resolved dynamically.
const (
	maxNames    = 1024             // remembered; as Envoy has it
	maxLookups  = 64               // under way
	lookupTime  = 5 * time.Second  // for each; as Envoy has it
	knownFor    = 10 * time.Second // what a name stands for; Go's resolver does not tell the records' own time
	unknownFor  = 2 * time.Second  // that it stands for nothing
	maxHostname = 253              // RFC 1035, 3.1, as text
)

// ErrNames refuses a lookup that would be one too many.
var ErrNames = errors.New("too many names are being asked for")

// names remembers what names stand for, for a short while, and never more of them than it may.
type names struct {
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)
	now    func() time.Time

	mu    sync.Mutex
	known map[string]*lookedUp
	under int // way
}

// lookedUp is what came of looking up a name; done is closed once the rest is there.
type lookedUp struct {
	done  chan struct{}
	addrs []netip.Addr
	err   error
	until time.Time // zero: it is under way
}

func newNames() *names {
	return &names{lookup: net.DefaultResolver.LookupNetIP, now: time.Now, known: make(map[string]*lookedUp)}
}

// resolve returns the addresses of a name, asking at most once at a time. work runs what outlasts the caller, if it still does.
func (n *names) resolve(ctx context.Context, work func(func(context.Context)) bool, name string) ([]netip.Addr, error) {
	l, err := n.begin(work, name)
	if err != nil {
		return nil, err
	}
	select {
	case <-l.done:
		return l.addrs, l.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (n *names) begin(work func(func(context.Context)) bool, name string) (*lookedUp, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := n.now()
	l := n.known[name]
	if l != nil && (l.until.IsZero() || now.Before(l.until)) {
		return l, nil
	}
	if n.under >= maxLookups || l == nil && len(n.known) >= maxNames && !n.forget(now) {
		return nil, ErrNames
	}
	l = &lookedUp{done: make(chan struct{})}
	if !work(func(ctx context.Context) { n.ask(ctx, name, l) }) {
		return nil, net.ErrClosed
	}
	n.known[name] = l
	n.under++
	return l, nil
}

// forget drops what is no longer true, and names that stand for nothing, and reports whether there is room now. n.mu is held.
func (n *names) forget(now time.Time) bool {
	for name, l := range n.known {
		if !l.until.IsZero() && (l.err != nil || !now.Before(l.until)) {
			delete(n.known, name)
		}
	}
	return len(n.known) < maxNames
}

func (n *names) ask(ctx context.Context, name string, l *lookedUp) {
	ctx, cancel := context.WithTimeout(ctx, lookupTime)
	defer cancel()
	addrs, err := n.lookup(ctx, "ip", name+".") // it is whole: no search domain of this pod's is to be tried
	if err == nil && len(addrs) == 0 {
		err = errors.New("it has no address")
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.under--
	l.addrs, l.until = addrs, n.now().Add(knownFor)
	if err != nil {
		l.addrs, l.err, l.until = nil, fmt.Errorf("resolve %s: %w", name, err), n.now().Add(unknownFor)
	}
	close(l.done)
}

// HostOf is the host that an authority or a server name means, as names compare: in lower case, without port and without the dot at
// its end. "" when it is no name of a host, as no address is.
func HostOf(authority string) string {
	host := authority
	if h, port, err := net.SplitHostPort(authority); err == nil {
		for _, c := range port {
			if c < '0' || c > '9' {
				return ""
			}
		}
		host = h
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if len(host) > maxHostname || !mesh.IsName(host) {
		return ""
	}
	for label := range strings.SplitSeq(host, ".") {
		if label == "" || len(label) > 63 {
			return ""
		}
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return ""
	}
	return host
}

// located is where a host is that a client asked for.
type located struct {
	name  string
	addrs []netip.Addr
	tried int // of them
}

// hiddenError is why none of a name's addresses is used.
type hiddenError struct{ name string }

func (e *hiddenError) Error() string {
	return "resolve " + e.name + ": it has no address but of the mesh itself, of this machine or its link"
}

// Locate finds out where a host is that a client asked for, where the target is whatever clients ask for. It waits for DNS.
func (s *Search) Locate(ctx context.Context, u *Pool, name string) (err error) {
	s.at, err = s.target.locate(ctx, u, name)
	return err
}

// locate finds out where a host is, in the order in which its addresses are to be tried.
func (t *Target) locate(ctx context.Context, u *Pool, name string) (located, error) {
	all, err := u.names.resolve(ctx, u.goOn, name)
	if err != nil {
		return located{}, err
	}
	l := located{name: name}
	for _, addr := range t.self.Reaches(all) {
		if t.mayReach(u, addr) {
			l.addrs = append(l.addrs, addr)
		}
	}
	if len(l.addrs) == 0 {
		return l, &hiddenError{name}
	}
	rand.Shuffle(len(l.addrs), func(i, j int) { l.addrs[i], l.addrs[j] = l.addrs[j], l.addrs[i] })
	return l, nil
}

// translated is the prefix by which a NAT64 reaches addresses of IPv4 (RFC 6052, 2.1): it is those that are meant.
var translated = netip.MustParsePrefix("64:ff9b::/96")

// metadata are the addresses at which clouds tell a machine its secrets, beside the link-local ones: of AWS and Google by IPv6, of
// Alibaba, and of Azure.
var metadata = []netip.Addr{
	netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("fd20:ce::254"), netip.MustParseAddr("100.100.100.200"), netip.MustParseAddr("168.63.129.16"),
}

// mayReach reports whether clients may be sent to an address that a name they chose stands for: none of the mesh's own, which would be
// reached past the rules there are for it, of this machine's or its link's, and none that means many.
func (t *Target) mayReach(u *Pool, addr netip.Addr) bool {
	if translated.Contains(addr) {
		b := addr.As16()
		addr = netip.AddrFrom4([4]byte(b[12:]))
	}
	if slices.Contains(metadata, addr) {
		return false
	}
	if u.own(netip.AddrPortFrom(addr, t.endPort())) || t.self.HasAddr(addr) {
		return false
	}
	if !addr.IsLoopback() && (!addr.IsGlobalUnicast() || addr.IsLinkLocalUnicast()) {
		return false
	}
	at := mesh.NetworkAddr{Network: t.self.Network, Addr: addr}
	if t.mesh.WorkloadAt(at) != nil {
		return false
	}
	svc := t.mesh.ServiceAt(at, t.self.Namespace)
	return svc == nil || !slices.ContainsFunc(svc.VIPs, func(v mesh.VIP) bool { return v.Prefix.IsSingleIP() && v.Prefix.Addr() == addr })
}

// endPort is where the hosts of a service that is resolved dynamically listen.
func (t *Target) endPort() uint16 {
	p, _ := t.Service.Port(t.port)
	return cmp.Or(p.TargetPort, t.port)
}

// next is the endpoint to try now. They come round.
func (l *located) next(u *Pool, t *Target) Pick {
	key := endpointKey{addr: netip.AddrPortFrom(l.addrs[l.tried%len(l.addrs)], t.endPort())}
	l.tried++
	if t.origin(&key); key.tls != nil {
		key.name = l.name
	}
	return Pick{endpoint: u.endpoint(key), self: t.self}
}

// goOn runs what no client waits for alone, until this waypoint ends. False: it does.
func (u *Pool) goOn(work func(context.Context)) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return false
	}
	u.work.Go(func() { work(u.ctx) })
	return true
}
