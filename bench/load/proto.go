// Package load is the traffic of the bench: a server that echoes, swallows and answers, HTTP/1.1 and HTTP/2 too, and the clients
// that drive it. Both run as processes of their own inside network namespaces, so that neither shares a runtime with what is measured.
//
// An agent (the client process) takes one Order per line of JSON on its standard input and answers each with one Report. It reads
// the clock and the CPU counters itself, at the very edges of the measured window, with no traffic in flight. It knows nothing of
// proxies: who is in the path is decided by the address it is given.
package load

import "time"

// Kind names what one slice does.
type Kind string

// The kinds of slice an agent can run.
const (
	// Probe opens one connection and exchanges one byte, once.
	Probe Kind = "probe"
	// Bulk uploads on one connection as fast as it goes; the window ends when the server has counted the last byte.
	Bulk Kind = "bulk"
	// Echo sends Size bytes, waits for them to come back, and repeats, on one connection.
	Echo Kind = "echo"
	// Connect opens a connection, exchanges one byte, resets it, and repeats, in Clients loops at once.
	Connect Kind = "connect"
	// HTTP1 makes a request, waits for its answer, and repeats, on Conns connections at once.
	HTTP1 Kind = "http1"
	// Paced makes Rate HTTP/1.1 requests a second over Conns connections, whether the answers keep up or not. An exchange is timed
	// from when it was due.
	Paced Kind = "paced"
	// HTTP2 keeps Streams requests under way on each of Conns connections.
	HTTP2 Kind = "http2"
	// GRPC does the same with unary calls.
	GRPC Kind = "grpc"
	// Idle opens Conns HTTP/1.1 connections, makes one request on each, and lets them be.
	Idle Kind = "idle"
)

// Order asks an agent for one slice of traffic.
type Order struct {
	Kind Kind
	// Addr is where to connect, host:port.
	Addr string
	// Warm is sent before the window opens and is not counted; Slice is the length of the window.
	Warm, Slice time.Duration
	// Size is the bytes of one echo; Clients the loops of a Connect.
	Size, Clients int
	// Conns and Streams are how many of them an HTTP order uses. Body is the bytes of each request's body, and of its answer's; 0:
	// none, and an answer of AnswerBytes. Rate is requests a second.
	Conns, Streams, Body int
	Rate                 float64
	// Host and Path are what HTTP requests ask for.
	Host, Path string
	// Prelude is what a connection begins with; Tunnel how it is reached, if not by itself.
	Prelude []byte
	Tunnel  *Tunnel
	// Once makes one exchange on each connection instead of measuring.
	Once bool
	// PIDs are the processes whose CPU time, with that of their descendants, Report.Procs sums.
	PIDs []int
}

// Tunnel is an HBONE connection to Order.Addr, over which all of an order's connections go.
type Tunnel struct {
	Authority       string // whom to ask for
	Cert, Key, Root string // files
	Local, Expect   string // SPIFFE URIs of both ends
}

// AnswerBytes is how long the answer to a request without a body is.
const AnswerBytes = 1024

// Report is what one slice came to.
type Report struct {
	// Ops are finished exchanges or connections, Bytes what the server counted, Failed the connections that broke.
	Ops, Bytes, Failed int64
	// Elapsed is the real length of the window.
	Elapsed time.Duration
	// P50 and P99 are quantiles of one exchange, Lag the 99th percentile of how late a Paced client itself was.
	P50, P99, Lag time.Duration
	// Memory is by how much the anonymous memory of Order.PIDs grew.
	Memory int64
	// Busy is the CPU time of the whole machine in the window, Steal what the hypervisor took, Procs what Order.PIDs used.
	Busy, Steal, Procs time.Duration
	// CPUs is how many processors Busy and Steal are summed over.
	CPUs int
	// Error is why the slice is void; empty when it is not.
	Error string
}

// The first byte of a connection says what it is for.
const (
	modeBulk    = 'B'
	modeEcho    = 'E'
	modeConnect = 'C'
)

// A bulk stream is a row of blocks; the first byte of each says whether the server is to answer with its count.
const (
	bulkBlockBytes = 256 << 10
	blockPlain     = 0
	blockCount     = 1
)
