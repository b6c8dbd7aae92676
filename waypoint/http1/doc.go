// Package http1 is the waypoint's HTTP/1.1 engine (RFC 9110, RFC 9112): one goroutine reads requests from a downstream
// connection, carries each to an upstream connection and brings the response back.
//
// What it gives:
//
//   - [ServerConn] parses requests and writes responses, [ClientConn] writes requests and parses responses, [Exchange]
//     joins one of each for one request: interim responses, uploads in both directions at once, trailers, upgrades.
//   - A head is parsed on the borrowed buffer into offsets, a line at a time as it arrives, and copied once, into one
//     string of which every name and value is a substring. The copy is the only allocation of a request; it is needed,
//     because the head is matched and logged after its buffer went on to carry the body, and it is saved when a
//     connection repeats its last head byte for byte.
//   - Bodies are handed on as slices of the borrowed buffer. What leaves together (a head, the first bytes of its body,
//     several small chunks) leaves in one write, and nothing is held back while the engine waits for more.
//   - Edits change a head while it is written.
//
// What it hides: framing. No caller sees or sets Content-Length, Transfer-Encoding, Connection, TE or Upgrade; they are
// read strictly and written anew. Whatever another parser might read differently is refused:
//
//   - bare LF, bare CR, NUL and other control characters, obs-fold, space before the colon, a name that is no token;
//   - Content-Length beside Transfer-Encoding, a repeated Content-Length even when equal, a list or sign or more than 18
//     digits in it, Transfer-Encoding that is not the one word chunked (another coding before it: 501), repeated, or in
//     HTTP/1.0;
//   - no Host, several, one that is no host[:port]; a target with '#', a malformed '%' in its path, bytes beyond
//     printable ASCII; authority-form for anything but CONNECT; '*' for anything but OPTIONS;
//   - a chunk size that is not 1 to 15 digits directly followed by CRLF or an extension. Extensions are read strictly,
//     bounded, and dropped (RFC 9112, 7.1.1); forbidden trailers are dropped (RFC 9110, 6.5.1).
//
// One empty line before a request line is skipped (RFC 9112, 2.2). HTTP/1.0 requests get 426 unless allowed, and then
// close their connection. The HTTP/2 preface is reported, unread. Requests to switch to h2c are not passed on, nor are
// upgrades of requests with a body: the request goes without its Upgrade.
//
// What it does not do: match, pick, retry, pool, log, know TLS or HBONE. It adds no Via: the mesh is transparent.
package http1
