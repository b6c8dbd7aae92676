// Package peer finds out who a tunnel was opened for: the workload behind a certificate and an address, or the one that a gateway which
// is trusted to speaks for. It decides nothing else: what the client may do is the policies'.
package peer

import (
	"cmp"
	"net/netip"
	"strings"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
)

// Client is who a tunnel was opened for: the one whose certificate was shown, or the workload a gateway speaks for.
type Client struct {
	ID       mesh.Identity
	Addr     netip.AddrPort
	Workload *mesh.Workload // nil: not known
	Gateway  *Gateway       // nil: the client speaks for itself
	Told     *Description   // what it says of itself, where Workload is nil; for telemetry only. nil: nothing
}

// Gateway is one of the mesh that opened a tunnel for somebody else.
type Gateway struct {
	ID   mesh.Identity
	Addr netip.AddrPort
}

// Namespace is the client's own.
func (c *Client) Namespace() string {
	if c.Workload != nil {
		return c.Workload.Namespace
	}
	return c.ID.Namespace
}

// Labels are those of the client's workload; nil when that is not known.
func (c *Client) Labels() map[string]string {
	if c.Workload == nil {
		return nil
	}
	return c.Workload.Labels
}

// Finder finds out who clients are, as a waypoint of that namespace and network sees them.
type Finder struct {
	Network, Namespace, TrustDomain string

	Trusted map[mesh.Identity]bool // gateways that may say for whom they speak, beside those that may anyhow
}

// Identify completes c, of which the certificate's identity and the address are known, by what the CONNECT says. An address says less
// than a certificate, and a header less than either: of those who speak for others only the gateways that are trusted to are heard.
func (f *Finder) Identify(v *mesh.Snapshot, c *Client, h hbone.Header) {
	if w := v.WorkloadAt(mesh.NetworkAddr{Network: f.Network, Addr: c.Addr.Addr()}); w != nil && w.Identity() == c.ID {
		c.Workload = w
	}
	network := cmp.Or(h.ForwardedNetwork, f.Network)
	if c.Workload == nil && !strings.EqualFold(network, f.Network) {
		c.Told = parseBaggage(h.Baggage) // a workload of another network, whose mesh may not be known here
	}
	from, ok := forwardedFor(h.Forwarded)
	if !ok || from.Addr() == c.Addr.Addr() {
		return
	}
	w := v.WorkloadAt(mesh.NetworkAddr{Network: network, Addr: from.Addr()})
	switch {
	case c.Workload == nil && w != nil && w.Identity() == c.ID:
		c.Workload, c.Addr, c.Told = w, from, nil // the tunnel came through a gateway that did not open it
	case f.mayForward(c):
		c.Gateway = &Gateway{c.ID, c.Addr}
		c.Addr = from
		if w != nil {
			c.ID, c.Workload, c.Told = w.Identity(), w, nil
		}
	}
}

// labelGateway is on the pods of a Gateway.
const labelGateway = "gateway.networking.k8s.io/gateway-name"

// mayForward reports whether a client may say for whom it speaks. A gateway may in this waypoint's own namespace, where who
// can start one can start this waypoint as well, and in the root namespace; elsewhere who was named to be trusted may.
func (f *Finder) mayForward(c *Client) bool {
	if f.Trusted[c.ID] {
		return true
	}
	if c.Workload == nil || c.ID.TrustDomain != f.TrustDomain {
		return false
	}
	_, gateway := c.Workload.Labels[labelGateway]
	return gateway && (c.ID.Namespace == f.Namespace || c.ID.Namespace == mesh.RootNamespace)
}

// forwardedFor is the address that a Forwarded header (RFC 7239) begins with: whoever came first.
func forwardedFor(h string) (netip.AddrPort, bool) {
	first, _, _ := strings.Cut(h, ",")
	for pair := range strings.SplitSeq(first, ";") {
		name, value, _ := strings.Cut(strings.TrimSpace(pair), "=")
		if !strings.EqualFold(name, "for") {
			continue
		}
		value = strings.Trim(value, `"`)
		if at, err := netip.ParseAddrPort(value); err == nil {
			return mesh.Unmap(at), true
		}
		addr, err := netip.ParseAddr(strings.Trim(value, "[]"))
		return netip.AddrPortFrom(addr.Unmap(), 0), err == nil
	}
	return netip.AddrPort{}, false
}

// Description is what a workload says of itself in the baggage of a CONNECT.
type Description struct{ Workload, Service, Revision, Namespace, Cluster string }

// parseBaggage reads what ztunnels write (W3C Baggage). Only names that could be names of Kubernetes objects are taken.
func parseBaggage(h string) *Description {
	if len(h) > 4096 {
		return nil
	}
	var d Description
	for member := range strings.SplitSeq(h, ",") {
		member, _, _ = strings.Cut(member, ";") // properties
		key, value, _ := strings.Cut(member, "=")
		if value = strings.TrimSpace(value); !mesh.IsName(value) {
			continue
		}
		switch strings.TrimSpace(key) {
		case "k8s.cluster.name":
			d.Cluster = value
		case "k8s.namespace.name":
			d.Namespace = value
		case "k8s.deployment.name", "k8s.cronjob.name", "k8s.pod.name", "k8s.job.name":
			d.Workload = value
		case "service.name":
			d.Service = value
		case "service.version":
			d.Revision = value
		}
	}
	if d == (Description{}) {
		return nil
	}
	return &d
}
