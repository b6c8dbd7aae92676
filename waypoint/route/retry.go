package route

import (
	"math"
	"slices"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Retry says whether and when a request is tried again.
type Retry struct {
	Attempts        uint32 // tries after the first one
	OtherLocalities bool   // prefer another priority after a failure
	PreviousHosts   mesh.PreviousHosts

	on      mesh.RetryOn
	codes   []uint16
	backoff time.Duration
}

// baseBackoff is the base of the backoff when none is given.
const baseBackoff = 25 * time.Millisecond

// maxBackoffFactor bounds the backoff to that many times its base.
const maxBackoffFactor = 10

// defaultRetry is Istio's when neither the rule nor the mesh says anything. Its list of statuses is empty.
var defaultRetry = &Retry{
	Attempts: 2,
	on: mesh.RetryOnConnectFailure | mesh.RetryOnRefusedStream | mesh.RetryOnUnavailable | mesh.RetryOnCancelled |
		mesh.RetryOnStatusCodes,
	backoff: baseBackoff,
}

func compileRetry(r *mesh.Retry) *Retry {
	if r == nil {
		return defaultRetry
	}
	out := &Retry{
		Attempts: r.Attempts, OtherLocalities: r.OtherLocalities, PreviousHosts: r.PreviousHosts,
		on: r.On, codes: r.Codes, backoff: r.Backoff,
	}
	if out.on == 0 && len(out.codes) == 0 {
		out.on = defaultRetry.on
	}
	if out.backoff == 0 {
		out.backoff = baseBackoff
	}
	return out
}

// Reset is why a try ended without a response.
type Reset uint8

// The resets.
const (
	ResetNone          Reset = iota // there was a response
	ResetConnect                    // no connection, or not in time
	ResetRefusedStream              // HTTP/2 REFUSED_STREAM, or above the last stream of a GOAWAY
	ResetConnection                 // the connection ended
	ResetStream                     // the peer reset the stream
	ResetTimeout                    // the timeout of the try passed
	ResetProtocol                   // what came was not HTTP
	ResetOverflow                   // nothing was tried: a limit is reached
	ResetHTTP3                      // HTTP/3 failed after it connected
)

func (r Reset) String() string {
	switch r {
	case ResetNone:
		return "none"
	case ResetConnect:
		return "connect failure"
	case ResetRefusedStream:
		return "refused stream"
	case ResetConnection:
		return "connection termination"
	case ResetStream:
		return "remote reset"
	case ResetTimeout:
		return "try timeout"
	case ResetProtocol:
		return "protocol error"
	case ResetOverflow:
		return "overflow"
	case ResetHTTP3:
		return "http3 post connect failure"
	}
	return "unknown"
}

// Outcome is how a try ended, before anything of it went to the client.
type Outcome struct {
	Reset       Reset
	Sent        bool   // something of the request was written
	Status      uint16 // of the response, when Reset is ResetNone
	GRPC        bool   // the response's headers carry GRPCStatus
	GRPCStatus  uint32
	Ratelimited bool // the response carries x-envoy-ratelimited
	Header      bool // the response carries a header the request named as a reason to try again
}

// Retriable reports whether the policy wants another try after o. It counts nothing: attempts, budgets and whether the
// request can still be sent again are the caller's.
func (r *Retry) Retriable(o Outcome) bool {
	if r.Attempts == 0 || o.Reset == ResetOverflow {
		return false
	}
	if o.Reset != ResetNone {
		return r.on&resetConditions(o) != 0
	}
	if o.Ratelimited { // whatever the status: it would be asked for more of the same
		return r.on&mesh.RetryOnRatelimited != 0
	}
	var c mesh.RetryOn
	if o.Status >= 500 {
		c |= mesh.RetryOn5xx
	}
	if o.Status >= 502 && o.Status <= 504 {
		c |= mesh.RetryOnGatewayError
	}
	if o.Status == 409 {
		c |= mesh.RetryOnRetriable4xx
	}
	if o.Header {
		c |= mesh.RetryOnHeaders
	}
	if o.GRPC {
		c |= grpcCondition(o.GRPCStatus)
	}
	return r.on&c != 0 || r.on&mesh.RetryOnStatusCodes != 0 && slices.Contains(r.codes, o.Status)
}

func resetConditions(o Outcome) mesh.RetryOn {
	c := mesh.RetryOn5xx | mesh.RetryOnGatewayError | mesh.RetryOnReset // the client would be told 503 or 504
	if !o.Sent {
		c |= mesh.RetryOnResetBefore
	}
	switch o.Reset {
	case ResetConnect:
		c |= mesh.RetryOnConnectFailure
	case ResetRefusedStream:
		c |= mesh.RetryOnRefusedStream
	case ResetHTTP3:
		c |= mesh.RetryOnHTTP3PostConnect
	case ResetNone, ResetConnection, ResetStream, ResetTimeout, ResetProtocol, ResetOverflow:
	}
	return c
}

func grpcCondition(status uint32) mesh.RetryOn {
	switch status {
	case 1:
		return mesh.RetryOnCancelled
	case 4:
		return mesh.RetryOnDeadlineExceeded
	case 8:
		return mesh.RetryOnResourceExhausted
	case 13:
		return mesh.RetryOnInternal
	case 14:
		return mesh.RetryOnUnavailable
	}
	return 0
}

// Backoff is how long to wait before the nth retry (the first is 1): a random part of base×(2ⁿ-1), at most 10×base.
// random is uniform over all its values.
func (r *Retry) Backoff(n uint32, random uint32) time.Duration {
	factor := time.Duration(maxBackoffFactor)
	if n < 4 { // 2⁴-1 is beyond it
		factor = 1<<n - 1
	}
	most := uint64(min(r.backoff, math.MaxInt64/factor) * factor)
	high, low := most>>32, most&(1<<32-1) // most×random may not fit
	return time.Duration(high*uint64(random) + low*uint64(random)>>32)
}
