package hbone

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Target says which peer a tunnel must reach, and as whom.
type Target struct {
	Local     mesh.Identity   // whose certificate is shown
	LocalAddr netip.Addr      // part of the pool key only: connections are never shared between pods
	Addr      netip.AddrPort  // where the peer listens, podIP:15008
	Expect    []mesh.Identity // one of which the peer must show; empty always fails
}

// Header holds the fields of a CONNECT request that HBONE gives a meaning to. Empty ones are not sent.
type Header struct {
	Baggage          string // W3C baggage describing the source workload
	Forwarded        string // RFC 7239: the source address and the service that was called
	Traceparent      string // W3C trace context
	ForwardedNetwork string // x-forwarded-network: the network of the source, on inner connections only
}

// StatusError reports that the peer answered the request with a status other than 200.
type StatusError struct{ Status int }

func (e *StatusError) Error() string {
	return fmt.Sprintf("open tunnel: peer answered status %d", e.Status)
}

// Stage names a step of opening a tunnel.
type Stage uint8

// The stages, in the order they happen.
const (
	StageUnknown Stage = iota
	StageDial          // TCP connect
	StageTLS           // configuration and handshake, including the check of the peer's identity
	StageHTTP2         // HTTP/2 connection or stream
)

func (s Stage) String() string {
	switch s {
	case StageUnknown:
		return "unknown"
	case StageDial:
		return "dial"
	case StageTLS:
		return "tls"
	case StageHTTP2:
		return "http2"
	}
	return "unknown"
}

// StageError says at which stage opening a tunnel failed.
type StageError struct {
	Stage Stage
	Err   error
}

func (e *StageError) Error() string { return fmt.Sprintf("open tunnel: %s: %v", e.Stage, e.Err) }

// Unwrap returns the cause.
func (e *StageError) Unwrap() error { return e.Err }

var (
	// ErrClosed is returned by a Pool, Server or connection that was closed by its owner.
	ErrClosed = errors.New("hbone: closed")
	// ErrPeerClosed ends the streams of a connection that the peer closed.
	ErrPeerClosed = errors.New("hbone: connection closed by peer")
	// ErrTruncated ends a connection whose peer, or whoever is between, closed it without saying so in TLS while
	// streams were open.
	ErrTruncated = errors.New("hbone: connection cut off without close_notify")
	// ErrPingTimeout ends a connection whose peer did not answer a PING in time.
	ErrPingTimeout = errors.New("hbone: peer did not answer a ping in time")

	// ErrNoMemory refuses a connection, or ends a stream that nobody reads, because what all connections hold is too much.
	ErrNoMemory = errors.New("hbone: memory for connections is short")

	errRefused = errors.New("hbone: peer refused the stream")
	errExpect  = errors.New("no identity is expected of the peer")
)
