// Package load is the traffic of the bench: a server that echoes, swallows and answers, and the closed-loop clients that drive
// it. Both run as processes of their own inside network namespaces, so that neither shares a runtime with what is measured.
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
	// PIDs are the processes whose CPU time, with that of their descendants, Report.Procs sums.
	PIDs []int
}

// Report is what one slice came to.
type Report struct {
	// Ops are finished exchanges or connections, Bytes what the server counted, Failed the connections that broke.
	Ops, Bytes, Failed int64
	// Elapsed is the real length of the window.
	Elapsed time.Duration
	// P50 and P99 are quantiles of one exchange.
	P50, P99 time.Duration
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
