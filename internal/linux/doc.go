// Package linux holds every raw system call of the data plane: sockets opened inside another network namespace, socket
// marks, spoofed source addresses, listeners that replace one another, and the destination a redirected connection was
// really meant for.
//
// It hides setns(2) and the thread discipline that goes with it, and the differences between IPv4 and IPv6 socket
// options. A socket belongs for good to the namespace it was created in, so only socket(2) runs inside a pod's
// namespace; bind, listen, connect and all later I/O happen on ordinary goroutines through the Go network poller.
//
// It decides nothing: who may use which address is the caller's business. It does not touch routes, links or packet
// filter rules.
//
// The process keeps one descriptor, opened on first use and never closed, on the namespace it was started in.
package linux
