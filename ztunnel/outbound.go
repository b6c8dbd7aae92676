package ztunnel

import (
	"context"
	crand "crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/ztunnel/nexthop"
)

// outbound serves one captured connection: find where it was going, decide the next hop, carry it there.
func (d *pod) outbound(ctx context.Context, app *net.TCPConn) {
	src := addrPort(app.RemoteAddr())
	dst, err := linux.OriginalDst(app)
	if err != nil {
		d.rep.early("outbound", src, addrPort(app.LocalAddr()), err)
		abort(app)
		return
	}
	v, from, err := d.workload(ctx)
	if err != nil {
		d.rep.early("outbound", src, dst, err)
		abort(app)
		return
	}
	c := &conn{
		record: &record{start: time.Now(), src: src, dst: dst, srcWorkload: from, srcID: d.id}, original: dst,
	}
	ctx = d.conns.track(ctx, c)
	err = d.carry(ctx, c, v, app)
	if err != nil {
		abort(app)
	}
	d.rep.close(c, err)
}

// carry decides c's next hop, connects to it and pumps.
func (d *pod) carry(ctx context.Context, c *conn, v *view, app *net.TCPConn) error {
	next, err := d.absent.reach(func() (hop nexthop.Hop, err error) {
		hop, err = nexthop.Outbound(v.Snapshot, c.srcWorkload, c.original, pick)
		c.dstWorkload, c.service = hop.Workload, hop.Service
		if err == nil && hop.Resolve != "" {
			hop, err = resolve(ctx, c.srcWorkload, hop)
		}
		return hop, err
	}, func(hop nexthop.Hop, wait time.Duration) (relay.Conn, error) {
		c.dstWorkload, c.service = hop.Workload, hop.Service
		d.conns.set(func() {
			c.dst, c.target, c.tunnel = hop.Addr, hop.Addr, hop.Authority
		})
		return d.open(ctx, c, hop, wait)
	})
	if err != nil {
		return err
	}
	d.rep.open(c)
	return pump(ctx, c, app, next)
}

// resolve finds the address of a workload that is known by hostname only, through ztunnel's own resolver.
func resolve(ctx context.Context, from *mesh.Workload, hop nexthop.Hop) (nexthop.Hop, error) {
	ctx, cancel := context.WithTimeout(ctx, connectWait)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", hop.Resolve)
	if err != nil {
		return hop, connectError{fmt.Errorf("resolve %s: %w", hop.Resolve, err)}
	}
	addrs = from.Reaches(addrs)
	return hop.Resolved(addrs[rand.IntN(len(addrs))]), nil
}

// open connects to the next hop; wait bounds the making of a tunnel's connection, for a caller who can go elsewhere.
func (d *pod) open(ctx context.Context, c *conn, hop nexthop.Hop, wait time.Duration) (relay.Conn, error) {
	switch hop.Protocol {
	case nexthop.TCP:
		c.srcID = mesh.Identity{}
		return d.dial(ctx, hop.Addr, netip.Addr{})
	case nexthop.HBONE:
		target := hbone.Target{Local: d.id, LocalAddr: c.src.Addr(), Addr: hop.Addr, Expect: hop.Expect}
		s, err := d.tunnels.OpenWithin(ctx, wait, target, hop.Authority, hbone.Header{
			Baggage: baggage(c.srcWorkload), Forwarded: forwarded(c.src, hop.ForwardedHost), Traceparent: newTraceparent(),
		})
		if err != nil {
			return nil, err
		}
		c.dstID = peerIdentity(s, hop.Expect)
		return s, nil
	}
	return nil, connectError{fmt.Errorf("reach %s by %s: other networks are not supported yet", c.original, hop.Protocol)}
}

// peerIdentity is who answered: the handshake made sure it is one of the expected ones.
func peerIdentity(s *hbone.Stream, expect []mesh.Identity) mesh.Identity {
	if id, err := identity.PeerIdentity(s.TLS()); err == nil {
		return id
	}
	return expect[0]
}

// dialTunnel makes the TCP connection of a tunnel. The pod's own address is its source.
func (d *pod) dialTunnel(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	return d.netns.Dial(ctx, linux.DialOptions{Remote: addr, Mark: mesh.MarkZtunnel, Timeout: connectWait})
}

// clientTLS is the handshake configuration of a new tunnel: our current certificate, and whom we expect.
func (d *pod) clientTLS(ctx context.Context, to hbone.Target) (*tls.Config, error) {
	svid, err := d.ids.SVID(ctx, to.Local)
	if err != nil {
		return nil, identityError{err}
	}
	return identity.ClientConfig(svid, to.Expect), nil
}

// baggage describes the source workload in W3C form; it is telemetry only.
func baggage(w *mesh.Workload) string {
	if w == nil {
		return ""
	}
	var b strings.Builder
	add := func(key, value string) {
		if value == "" {
			return
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(key)
		b.WriteByte('=')
		b.WriteString(value)
	}
	add("k8s.cluster.name", w.ClusterID)
	add("k8s.namespace.name", w.Namespace)
	add("k8s."+w.Kind.String()+".name", w.OwnerName)
	add("service.name", w.CanonicalName)
	add("service.version", w.CanonicalRevision)
	add("cloud.region", w.Locality.Region)
	add("cloud.availability_zone", w.Locality.Zone)
	return b.String()
}

// forwarded is the RFC 7239 header: the caller, and the service it asked for.
func forwarded(src netip.AddrPort, host string) string {
	h := `for="` + src.String() + `"`
	if host != "" {
		h += ";host=" + host
	}
	return h
}

// newTraceparent makes a W3C trace context of its own for a connection; no sampling is asked for.
func newTraceparent() string {
	var id [24]byte
	_, _ = crand.Read(id[:])
	b := make([]byte, 0, 55)
	b = append(b, "00-"...)
	b = hex.AppendEncode(b, id[:16])
	b = append(b, '-')
	b = hex.AppendEncode(b, id[16:])
	b = append(b, "-00"...)
	return string(b)
}
