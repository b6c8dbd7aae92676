package route

import (
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Rule is what is to be done with the requests or connections that match it.
type Rule struct {
	Route *mesh.Route // what it was compiled from; nil: nobody wrote a rule for the service

	// Refuse is the status to answer with, whatever the request: 500 when the rule is not valid; 0: go on. For a
	// connection it means to close it.
	Refuse uint16
	// Why says what is wrong with the rule when Refuse is set.
	Why string

	Redirect *Redirect
	Direct   *mesh.DirectResponse
	CORS     *CORS    // nil: none
	Retry    *Retry   // never nil for HTTP
	Mirrors  []Mirror // of the rule; those of the backend come on top

	Request  HeaderOps // of the request, after those of the backend
	Response HeaderOps // of the response, after those of the backend

	Timeout    time.Duration // of the whole exchange; 0: none
	TryTimeout time.Duration // of each try; 0: none

	Persistence *mesh.SessionPersistence

	rewrite   *rewrite
	authority string // of rewrite, or else of a header edit; "": as it was
	fault     *mesh.Fault
	backends  []Backend
	total     uint64 // of the weights
	noBackend uint16 // the status when there is no weight at all
}

// defaultRule sends a request to the service it was for.
var defaultRule = &Rule{
	Retry:    defaultRetry,
	backends: []Backend{{Weight: 1}},
	total:    1,
}

// Backend is one destination of a rule.
type Backend struct {
	Ref     mesh.BackendRef // Hostname "": the service the client asked for
	Service string          // Ref's key; "": as above
	Weight  uint32

	// Refuse is the status to answer with instead of sending anything: there is no such backend. 0: go on.
	Refuse uint16

	Redirect *Redirect
	Mirrors  []Mirror
	Request  HeaderOps // before those of the rule
	Response HeaderOps // before those of the rule

	rewrite   *rewrite
	authority string // of a header edit
	strong    bool   // authority is of rewrite, and stronger than the rule's
}

// Mirror is where a copy of the request goes.
type Mirror struct {
	Ref     mesh.BackendRef
	Service string // Ref's key, as in Backend
	Percent mesh.Fraction
}

// Hit reports whether this request is copied. random is uniform over all its values.
func (m *Mirror) Hit(random uint32) bool { return m.Ref.Invalid == "" && Hit(m.Percent, random) }

// Hit reports whether random, uniform over all its values, falls into the part f of them.
func Hit(f mesh.Fraction, random uint32) bool {
	return uint64(random)*uint64(f.Denominator) < uint64(f.Numerator)<<32
}

// Backend picks the destination of a request by weight. random is uniform over all its values. It is nil when the rule
// has none, or none with a weight; then the status says what to answer.
func (r *Rule) Backend(random uint32) (b *Backend, status uint16) {
	if r.total == 0 {
		return nil, r.noBackend
	}
	at := uint64(random) * r.total >> 32
	for i := range r.backends {
		if w := uint64(r.backends[i].Weight); at >= w {
			at -= w
			continue
		}
		return &r.backends[i], r.backends[i].Refuse
	}
	return nil, r.noBackend // not reached: at < total
}

// Backends are all destinations, in the order they were written.
func (r *Rule) Backends() []Backend { return r.backends }

// Name is how logs and dumps call the rule: its object and name or index; "default" when nobody wrote it.
func (r *Rule) Name() string {
	if r.Route == nil {
		return "default"
	}
	return r.Route.Key()
}

// Fault is what to do to a request on purpose: wait, then perhaps answer.
type Fault struct {
	Delay time.Duration // 0: none
	Abort bool
	// HTTPStatus and GRPCStatus are the answer of Abort. For a gRPC request that is to fail with a gRPC status,
	// HTTPStatus is 200 and GRPC is true; a plain request gets the HTTP status that stands for it.
	HTTPStatus uint16
	GRPCStatus uint32
	GRPC       bool
}

// Fault decides whether a request fails on purpose. The random numbers are uniform over all their values and
// independent. grpc says that the request is a gRPC request.
func (r *Rule) Fault(delay, abort uint32, grpc bool) Fault {
	var f Fault
	if r.fault == nil {
		return f
	}
	if Hit(r.fault.Delay.Percent, delay) {
		f.Delay = r.fault.Delay.Fixed
	}
	a := &r.fault.Abort
	if !Hit(a.Percent, abort) {
		return f
	}
	f.Abort = true
	switch {
	case a.HTTPStatus != 0:
		f.HTTPStatus = a.HTTPStatus
	case grpc:
		f.HTTPStatus, f.GRPCStatus, f.GRPC = 200, a.GRPCStatus, true
	default:
		f.HTTPStatus = HTTPStatus(a.GRPCStatus)
	}
	return f
}

// GRPCStatus is the gRPC status that an HTTP status of our own making stands for.
func GRPCStatus(http uint16) uint32 {
	switch http {
	case 400:
		return 13 // INTERNAL
	case 401:
		return 16 // UNAUTHENTICATED
	case 403:
		return 7 // PERMISSION_DENIED
	case 404:
		return 12 // UNIMPLEMENTED
	case 429, 502, 503, 504:
		return 14 // UNAVAILABLE
	}
	return 2 // UNKNOWN
}

// HTTPStatus is the HTTP status that stands for a gRPC status to a client that does not speak gRPC.
func HTTPStatus(grpc uint32) uint16 {
	switch grpc {
	case 0:
		return 200
	case 1: // CANCELLED
		return 499
	case 3, 9, 11: // INVALID_ARGUMENT, FAILED_PRECONDITION, OUT_OF_RANGE
		return 400
	case 4: // DEADLINE_EXCEEDED
		return 504
	case 5: // NOT_FOUND
		return 404
	case 6, 10: // ALREADY_EXISTS, ABORTED
		return 409
	case 7: // PERMISSION_DENIED
		return 403
	case 8: // RESOURCE_EXHAUSTED
		return 429
	case 12: // UNIMPLEMENTED
		return 501
	case 14: // UNAVAILABLE
		return 503
	case 16: // UNAUTHENTICATED
		return 401
	}
	return 500
}
