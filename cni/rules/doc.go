// Package rules says which packets of a pod are handed to ztunnel, as data: chains of packet-filter rules and one policy
// route, in the order and with the numbers every ambient ztunnel expects.
//
// It is pure. What puts the rules into a network namespace, and takes them out again, is package apply.
//
// In short: TCP that the pod sends goes to port 15001, TCP that it receives to 15006, except what is HBONE already
// (15008), what ztunnel itself sent (its sockets carry mark 0x539) and what the host's probes send. ztunnel speaks to
// the application under the caller's own address; connections it opens are therefore stamped 0x111, and what the
// application answers on them is routed back to the loopback device, where ztunnel's socket is. Connections older than the
// rules go on untouched: only a SYN is redirected. (Istio's rules redirect any packet of a connection that the kernel does
// not know, and so reset those of pods that join while they run.)
package rules
