package http1

import (
	"errors"
	"fmt"
	"net/http"
)

// Reason says why an exchange ended otherwise than by a complete response; a closed set, for logs and metric labels.
type Reason uint8

// The reasons. Those up to ClientClosed are the client's doing, the others the upstream's or our own.
const (
	ReasonUnknown   Reason = iota
	BadRequestLine         // no method, target, version
	BadTarget              // a request target that is none
	BadHost                // no Host, several, or no host
	BadField               // a malformed field line
	BadFraming             // Content-Length and Transfer-Encoding leave doubt where the body ends
	BadChunk               // a malformed chunk
	BadTrailer             // a malformed trailer
	UnknownCoding          // a transfer coding besides chunked: 501
	HeadTooLarge           // 431
	BadExpect              // an expectation besides 100-continue: 417
	UnknownProtocol        // an extended CONNECT to what cannot be passed on: 501
	OldVersion             // HTTP/1.0 where it is not allowed: 426
	BadVersion             // neither HTTP/1.0 nor 1.1: 505
	Preface                // the client speaks HTTP/2; nothing was consumed
	IdleTimeout            // no next request; nothing to reply to
	HeadTimeout            // a request head took too long: 408
	BodyTimeout            // a request body stands still: 408
	BadContent             // a request body that cannot be translated: 400
	ClientClosed           // the client went away
	UpstreamBroken         // a response that cannot be trusted: 502
	UpstreamClosed         // the connection ended before the first byte of a response: 503
	UpstreamCut            // the connection ended inside a response: 502
	UpstreamTimeout        // no response, or no progress in it, in time: 504
	UpstreamRefused        // the upstream did not look at the request: 503
	UpstreamReset          // the upstream reset the stream before it responded: 503
	BadEdit                // an edit that cannot be written as a header: 500
	Overload               // memory is short, and what came was read by nobody: 503
)

var reasons = [...]string{
	"unknown", "bad request line", "bad target", "bad host", "bad field", "bad framing", "bad chunk", "bad trailer", "unknown coding",
	"head too large", "bad expectation", "unknown protocol", "old version", "bad version", "http2 preface", "idle timeout", "head timeout", "body timeout",
	"bad content", "client closed", "upstream broken", "upstream closed", "upstream cut", "upstream timeout", "upstream refused", "upstream reset",
	"bad edit", "overload",
}

// String returns the reason as logs and metrics spell it.
func (r Reason) String() string {
	if int(r) < len(reasons) {
		return reasons[r]
	}
	return reasons[ReasonUnknown]
}

// Error is how every failure of the engine is told.
type Error struct {
	Status int // what to answer the client if no response head left yet; 0: answer nothing
	Reason Reason
	Err    error // what was seen; may be nil
}

// Error returns the reason and what was seen.
func (e *Error) Error() string {
	if e.Err == nil {
		return e.Reason.String()
	}
	return e.Reason.String() + ": " + e.Err.Error()
}

// Unwrap returns what was seen.
func (e *Error) Unwrap() error { return e.Err }

// Client reports whether the client is at fault, not the upstream.
func (e *Error) Client() bool { return e.Reason <= ClientClosed && e.Reason != ReasonUnknown }

var statusOf = [...]int{
	BadRequestLine: 400, BadTarget: 400, BadHost: 400, BadField: 400, BadFraming: 400, BadChunk: 400, BadTrailer: 400,
	UnknownCoding: 501, HeadTooLarge: 431, BadExpect: 417, UnknownProtocol: 501, OldVersion: 426, BadVersion: 505, HeadTimeout: 408, BodyTimeout: 408, BadContent: 400,
	UpstreamBroken: 502, UpstreamClosed: 503, UpstreamCut: 502, UpstreamTimeout: 504, UpstreamRefused: 503,
	UpstreamReset: 503, BadEdit: 500, Overload: 503,
}

func fail(r Reason, err error) *Error { return &Error{Status: statusOf[r], Reason: r, Err: err} }

// Fail makes the engine's error of a reason, for an engine of another version of HTTP.
func Fail(r Reason, err error) *Error { return fail(r, err) }

func failf(r Reason, format string, args ...any) *Error { return fail(r, fmt.Errorf(format, args...)) }

// asError finds the engine's error in err, or makes one of reason r.
func asError(err error, r Reason) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return fail(r, err)
}

func statusText(status int) string {
	if s := http.StatusText(status); s != "" {
		return s
	}
	return "Unknown"
}
