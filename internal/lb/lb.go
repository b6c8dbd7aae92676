// Package lb decides which endpoint of a service takes a connection: health, locality, weights, address family.
//
// It hides how a service's load-balancing settings rank endpoints. It knows nothing of waypoints, tunnels or retries, and
// keeps no state between picks. It is pure: randomness comes in as a Picker. Pick allocates nothing.
//
// Pick is for one connection, by what the service says. A Set is for many requests, by what a traffic policy says too: the
// algorithm, which localities come first, who is out because it failed and who is still warming up.
//
// Where a client is to keep to one endpoint of a service, it is the one whose name makes the highest number together with the
// client's (rendezvous hashing, weighted by capacity): the same from every proxy and after a restart, for as long as that endpoint
// may be used; when one comes or goes, only clients that end up there, or were there, are moved.
//
// Where a traffic policy hashes requests, a Set has a ring or Maglev's table, made once. Both are made of names and weights alone,
// so that every proxy has the same. What belongs to an endpoint that is out goes to the next on the ring or in the table, and back
// when it is well; nobody else is moved. A ring moves only who must be moved when an endpoint comes or goes, and its shares differ
// from the weights by some per cent; Maglev's table has the shares, and moves a few more.
package lb

import (
	"net/netip"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Picker returns a number in [0, n), uniformly at random in production. n is never 0. rand.Uint64N is one.
type Picker func(n uint64) uint64

// Request is one pick.
type Request struct {
	Service   *mesh.Service
	Endpoints []mesh.Endpoint // all of the service's, as Snapshot.Endpoints gives them
	From      *mesh.Workload  // the client
	Dst       netip.AddrPort  // the original destination: its port is the service's, its family the one preferred

	// Labels narrow the endpoints to those that carry all of them: a subset.
	Labels map[string]string

	// Waypoint says that the service is a waypoint: an endpoint with an application tunnel is then reached on Dst's port
	// even if the service does not name that port.
	Waypoint bool
}

// Choice is where the connection goes.
type Choice struct {
	Endpoint mesh.Endpoint // zero for a PASSTHROUGH service
	// Addr is invalid when the endpoint has no address of its own: it is behind the gateway of another network, or its
	// Hostname must be resolved.
	Addr netip.Addr
	Port uint16
}

// Error is why no endpoint could be picked. The values are ordered by how far the best endpoint got.
type Error uint8

// The errors.
const (
	NoEndpoints        Error = iota + 1 // the service has none
	NoHealthyEndpoints                  // none is healthy
	NoAddress                           // none of the healthy ones has an address the client can use
	NoSuchPort                          // none of those listens for the port asked for
	NoCapacity                          // all of those have weight 0
	NoLocalEndpoints                    // the service is STRICT and none of those shares every scope with the client
)

func (e Error) Error() string {
	switch e {
	case NoEndpoints:
		return "service has no endpoints"
	case NoHealthyEndpoints:
		return "service has no healthy endpoints"
	case NoAddress:
		return "service has no endpoint with a usable address"
	case NoSuchPort:
		return "service has no such port"
	case NoCapacity:
		return "service has only endpoints of capacity 0"
	case NoLocalEndpoints:
		return "service has no endpoint as near as its traffic policy demands"
	}
	return "unknown load-balancing error"
}

// Pick chooses the endpoint for a connection at random by capacity, among the eligible ones of highest rank. The error
// is an Error. An endpoint of capacity 0 is drained: it takes no traffic, whatever its rank.
func Pick(r *Request, pick Picker) (Choice, error) {
	if r.Service.LB.Mode == mesh.LBPassthrough {
		return Choice{Addr: r.Dst.Addr(), Port: r.Dst.Port()}, nil
	}
	furthest := NoEndpoints
	best, total := -1, uint64(0)
	for i := range r.Endpoints {
		rank, fault := r.rank(&r.Endpoints[i])
		if fault != 0 {
			furthest = max(furthest, fault)
			continue
		}
		if rank > best {
			best, total = rank, 0
		}
		if rank == best {
			total += uint64(r.Endpoints[i].Workload.Capacity)
		}
	}
	if best < 0 {
		return Choice{}, furthest
	}
	if r.Service.LB.Sticky {
		return r.choose(r.sticky(best)), nil
	}
	n := pick(total)
	for i := range r.Endpoints {
		ep := &r.Endpoints[i]
		rank, fault := r.rank(ep)
		if fault != 0 || rank != best {
			continue
		}
		if n < uint64(ep.Workload.Capacity) {
			return r.choose(ep), nil
		}
		n -= uint64(ep.Workload.Capacity)
	}
	panic("lb: picker returned a number that is not below its bound")
}

func (r *Request) choose(ep *mesh.Endpoint) Choice {
	addr, _ := r.addr(ep.Workload)
	return Choice{Endpoint: *ep, Addr: addr, Port: r.port(ep)}
}

// sticky is the client's own among the endpoints of that rank, of which there is one at least.
func (r *Request) sticky(best int) *mesh.Endpoint {
	var own *mesh.Endpoint
	highest := 0.0
	for i := range r.Endpoints {
		ep := &r.Endpoints[i]
		if rank, fault := r.rank(ep); fault != 0 || rank != best {
			continue
		}
		if s := score(r.From.UID, ep.Workload); own == nil || s > highest {
			own, highest = ep, s
		}
	}
	return own
}

// rank says how near an endpoint is, or why it cannot take the connection.
func (r *Request) rank(ep *mesh.Endpoint) (int, Error) {
	w := ep.Workload
	for k, v := range r.Labels {
		if have, ok := w.Labels[k]; !ok || have != v {
			return 0, NoEndpoints
		}
	}
	if !w.Healthy && !r.Service.LB.AllowUnready {
		return 0, NoHealthyEndpoints
	}
	if _, ok := r.addr(w); !ok {
		return 0, NoAddress
	}
	if r.port(ep) == 0 {
		return 0, NoSuchPort
	}
	if w.Capacity == 0 {
		return 0, NoCapacity
	}
	rank := 0
	switch r.Service.LB.Mode {
	case mesh.LBStrict:
		for _, s := range r.Service.LB.Preference {
			if !shares(s, r.From, w) {
				return 0, NoLocalEndpoints
			}
		}
	case mesh.LBFailover:
		rank = nearness(r.Service.LB.Preference, r.From, w)
	case mesh.LBAny, mesh.LBPassthrough:
	}
	return rank, 0
}

// nearness counts the leading scopes that two workloads share. A network that comes first is special: endpoints of other
// networks are still told apart by the scopes after it, and every endpoint of the own network is above all of them.
func nearness(preference []mesh.LBScope, from, to *mesh.Workload) int {
	rank := 0
	if len(preference) > 0 && preference[0] == mesh.ScopeNetwork {
		if shares(mesh.ScopeNetwork, from, to) {
			rank = len(preference)
		}
		preference = preference[1:]
	}
	for _, s := range preference {
		if !shares(s, from, to) {
			break
		}
		rank++
	}
	return rank
}

// shares compares one scope alone: the same zone name in another region is the same zone here, as in Istio. A scope this
// program does not know is shared by nobody.
func shares(s mesh.LBScope, a, b *mesh.Workload) bool {
	switch s {
	case mesh.ScopeRegion:
		return a.Locality.Region == b.Locality.Region
	case mesh.ScopeZone:
		return a.Locality.Zone == b.Locality.Zone
	case mesh.ScopeSubzone:
		return a.Locality.Subzone == b.Locality.Subzone
	case mesh.ScopeNode:
		return a.Node == b.Node
	case mesh.ScopeCluster:
		return a.ClusterID == b.ClusterID
	case mesh.ScopeNetwork:
		return a.Network == b.Network
	case mesh.ScopeUnknown:
	}
	return false
}

// port is where an endpoint listens for the connection, or 0.
func (r *Request) port(ep *mesh.Endpoint) uint16 {
	if p := ep.TargetPort(r.Service, r.Dst.Port()); p != 0 {
		return p
	}
	if r.Waypoint && ep.Workload.AppTunnel != (mesh.AppTunnel{}) {
		return r.Dst.Port()
	}
	return 0
}

// addr is the address to use for an endpoint. It is invalid, and ok true, for one that is reached in another way.
func (r *Request) addr(w *mesh.Workload) (addr netip.Addr, ok bool) {
	if w.Network != r.From.Network {
		return netip.Addr{}, !w.NetworkGateway.IsZero()
	}
	for _, a := range w.Addrs {
		if !r.Service.Families.Allows(a) {
			continue
		}
		if a.Is4() == r.Dst.Addr().Is4() {
			return a, true
		}
		if !addr.IsValid() {
			addr = a
		}
	}
	return addr, addr.IsValid() || len(w.Addrs) == 0 && w.Hostname != ""
}
