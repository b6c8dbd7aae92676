// Package http2 is the waypoint's HTTP/2 engine (RFC 9113, RFC 7541): a [ServerConn] yields the requests of a client's
// connection, each to a [Handler], a [ClientConn] carries many requests to one upstream at once, and an [Exchange] joins a
// request that came by HTTP/2 with an upstream of either version.
//
// It speaks of requests and responses in the words of package http1: the same Request, Response, Fields and Edits, so that
// who routes, judges and edits does not know which version he sees. A head is decoded into one string, as package http1
// would have read it; that string is the only allocation of a head, saved when it equals the last one of its stream.
//
// Who does the work. An exchange that never has to wait but for a whole response is run by the goroutines that read the two
// connections: one sends the request, the other passes the response on. Whatever else there is to wait for is waited for by a
// worker, a goroutine of the request's own, which goes on where the others stopped.
//
// How bytes move. A connection's only reader goroutine parses frames and copies payload to its stream. Whoever sends appends
// to what waits on the connection, and the first to find nobody writing writes all that waits with one system call: head,
// body and trailers of a small message leave together, and so do messages of many streams under load. Heads are encoded
// without the dynamic table, so that they are encoded outside of any lock; what comes may use it.
//
// How memory is bounded. A stream holds no more than its window, which reopens when its worker took the bytes, and what
// may have to be sent again. The connection's window reopens on receipt, so that a stream nobody reads cannot stop its
// neighbours, unless more than maxConnBuffered bytes wait, or a [memlimit.Budget] of all connections allows less.
//
// What a peer may waste is bounded: streams, those reset before they were answered, control frames, header blocks, the
// time they take. Whatever another parser might read differently is refused, by the rules of both versions.
//
// An extended CONNECT (RFC 8441) is a request with Upgrade, as HTTP/1.1 would have it; once it is answered, a [Tunnel] of
// either side's stream carries what follows.
//
// What it does not do: match, pick, retry, pool, log, push, priorities, plain CONNECT.
package http2
