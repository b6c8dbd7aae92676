// Package nexthop decides where a connection goes next, and why.
//
// Outbound is for a connection that leaves a captured workload, Inbound for a tunnel that arrives for one, Passthrough
// for plaintext that does. Each reads one mesh.Snapshot and returns a Hop: everything the caller must know to dial, and
// nothing that must be looked up again. The package hides services, waypoints, gateways and port mappings from the code
// that moves bytes. It is pure: it never blocks, resolves or dials, and it does not authorize (package authz does).
package nexthop

import (
	"net/netip"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Protocol is how the next hop is spoken to.
type Protocol uint8

// The protocols. A caller that does not speak one must fail the connection, never fall back to another.
const (
	ProtocolUnknown Protocol = iota
	TCP                      // plain TCP
	HBONE                    // CONNECT over mutual TLS
	DoubleHBONE              // HBONE to a network gateway and, inside that stream, HBONE once more to the endpoint
)

func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case HBONE:
		return "HBONE"
	case DoubleHBONE:
		return "DoubleHBONE"
	case ProtocolUnknown:
	}
	return "unknown"
}

// Hop is the decision about one connection.
type Hop struct {
	Protocol Protocol
	Why      Reason

	// Addr is what to dial. When Resolve is set it has a port and no address yet.
	Addr netip.AddrPort
	// Resolve is the hostname whose address must be found through DNS before dialling; see Resolved. "" nearly always.
	Resolve string

	// Authority of the CONNECT request, of both when the protocol is DoubleHBONE; "" for TCP.
	Authority string
	// Expect is the identities of which the next hop must show one; empty for TCP.
	Expect []mesh.Identity
	// InnerExpect is the same for the tunnel inside a DoubleHBONE one.
	InnerExpect []mesh.Identity

	// Workload is the one that was chosen: the waypoint or gateway when there is one on the way, the local workload of an
	// inbound connection, nil when the destination is not in the mesh.
	Workload *mesh.Workload
	// Service is the one the connection was addressed to, also when it goes through a waypoint; nil for none.
	Service *mesh.Service
	// ForwardedHost is the hostname of Service, for the forwarded header; "" for none.
	ForwardedHost string

	// AppTunnel is how an inbound connection must be wrapped for the application; zero for not at all. Its port is in
	// Addr already. When AppTunnel.Proxy is set the connection begins with a PROXY header.
	AppTunnel mesh.AppTunnel
	// Target is the address the client asked for: of the PROXY header. Where that needs one, an address of the service stands
	// for the hostname a client asked for; otherwise it is then invalid.
	Target netip.AddrPort

	// Missing is the xDS name (network/address) of a destination that the snapshot does not hold. A caller that holds the
	// whole mesh takes the Hop as it stands; one that subscribes on demand resolves the name first and asks again.
	Missing string
}

// Resolved is h with the address found for h.Resolve.
func (h Hop) Resolved(a netip.Addr) Hop {
	a = a.Unmap()
	if h.Protocol == HBONE && (h.Why == DirectToWorkload || h.Why == DirectToEndpoint) {
		_, port, _ := strings.Cut(h.Authority, ":")
		h.Authority = a.String() + ":" + port
		if a.Is6() {
			h.Authority = "[" + a.String() + "]:" + port
		}
	}
	h.Addr = netip.AddrPortFrom(a, h.Addr.Port())
	h.Resolve = ""
	return h
}

// Reason is why a Hop is what it is.
type Reason uint8

// The reasons.
const (
	ReasonUnknown           Reason = iota
	UnknownDestination             // not in the mesh: plain TCP to where it was going
	PassthroughService             // a service that wants its traffic left alone: plain TCP to where it was going
	DirectToWorkload               // the address is a workload's
	DirectToEndpoint               // an endpoint of the service was picked
	ThroughServiceWaypoint         // the service has a waypoint
	ThroughWorkloadWaypoint        // the workload has a waypoint
	ThroughNetworkGateway          // the endpoint that was picked is on another network
	ToApplication                  // inbound: the application of the local workload
)

func (r Reason) String() string {
	switch r {
	case UnknownDestination:
		return "unknown destination"
	case PassthroughService:
		return "passthrough service"
	case DirectToWorkload:
		return "direct to workload"
	case DirectToEndpoint:
		return "direct to endpoint"
	case ThroughServiceWaypoint:
		return "through service waypoint"
	case ThroughWorkloadWaypoint:
		return "through workload waypoint"
	case ThroughNetworkGateway:
		return "through network gateway"
	case ToApplication:
		return "to application"
	case ReasonUnknown:
	}
	return "unknown"
}

// reserved reports whether a port is one that ztunnel itself listens on in every pod. A connection relayed to it would
// come back for ever.
func reserved(port uint16) bool {
	return port == mesh.PortOutbound || port == mesh.PortPassthrough || port == mesh.PortHBONE
}
