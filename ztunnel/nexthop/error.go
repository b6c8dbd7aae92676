package nexthop

import "fmt"

// Error is why there is no next hop. The connection fails; it never goes another way.
type Error struct {
	Fault   Fault
	Detail  string // the name or address it is about
	Missing string // the xDS name that would have to be known, as Hop.Missing
	Err     error  // an lb.Error behind the fault, or nil
}

func (e *Error) Error() string {
	s := e.Fault.String()
	if e.Detail != "" {
		s = fmt.Sprintf("%s %s", s, e.Detail)
	}
	if e.Err != nil {
		s = fmt.Sprintf("%s: %v", s, e.Err)
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// Status is the HTTP status that refuses an inbound CONNECT request for this error.
func (e *Error) Status() int {
	switch e.Fault {
	case BadAuthority, ForeignAddress:
		return 400
	case FaultUnknown, UnknownWorkload, SelfCall, NoEndpoint, UnknownWaypoint, UnreachableNetwork, UnknownService, NoPort, NoAddress:
	}
	return 503
}

// Fault is what is wrong, as a closed set for logs and metrics.
type Fault uint8

// The faults.
const (
	FaultUnknown       Fault = iota
	UnknownWorkload          // the local workload is not in the snapshot (yet)
	SelfCall                 // the destination is one of ztunnel's own ports
	NoEndpoint               // the service has no endpoint to take the connection; Err says why
	UnknownWaypoint          // the waypoint that must see the traffic cannot be found
	UnreachableNetwork       // the endpoint is on another network and no gateway leads there
	BadAuthority             // the authority is not an address or hostname and a port
	ForeignAddress           // the authority's address does not belong to the local workload
	UnknownService           // no service has the authority's hostname
	NoPort                   // the service does not have the authority's port
	NoAddress                // a PROXY header must name an address of the service, and there is none
)

func (f Fault) String() string {
	switch f {
	case UnknownWorkload:
		return "unknown local workload"
	case SelfCall:
		return "call to the proxy's own port"
	case NoEndpoint:
		return "no endpoint for"
	case UnknownWaypoint:
		return "cannot resolve waypoint"
	case UnreachableNetwork:
		return "cannot reach network of"
	case BadAuthority:
		return "bad authority"
	case ForeignAddress:
		return "address is not the workload's own:"
	case UnknownService:
		return "unknown service"
	case NoPort:
		return "no target port for"
	case NoAddress:
		return "no address to announce for"
	case FaultUnknown:
	}
	return "unknown fault"
}
