// Package relay joins two connections: what one sends the other receives, until both directions have ended.
//
// It hides how bytes move. Waiting connections hold no buffer: a slab is borrowed when the socket is readable. Between
// two TCP connections bulk is moved by splice(2) without entering the process; between a TCP connection and a tunnel the
// tunnel's reader goroutine writes to the socket itself, so that a tunnelled connection costs one goroutine. It also
// hides how an end is passed on: a half-close as a half-close, an error as a reset, so that no transfer that was cut
// short looks complete.
package relay
