// Package netlab builds a small cluster out of network namespaces, for tests, the demo and the benchmark: nodes, a
// control plane, a routed fabric between them, and pods that are attached by real CNI plugins as a container runtime
// does it.
//
//	 fabric namespace: a bridge, 10.99.0.0/24 and fd99::/64; a capture here sees all traffic between nodes
//	   |            |                |
//	 node1        node2        control plane (istiod)
//	   |  cni0      |  cni0          10.99.0.2
//	 pods         pods
//	10.244.1.0/24 10.244.2.0/24
//
// Namespaces are bind mounts in /run/netns, so that "ip netns exec" works, and carry the lab's id as a prefix. Every link
// is made inside the lab's own namespaces: the initial namespace is left as it is, but for the allowed congestion control
// algorithms, which are put back.
//
// It hides namespaces, links, routes, sysctls, CNI calls and the cleaning up. A lab leaves nothing behind: Close removes
// everything, and when its process was killed the next Start does, or Sweep. It knows nothing of the mesh: our own CNI
// plugin is a piece of configuration passed in.
//
// It needs root and Debian's containernetworking-plugins and nftables. It is for machines one may experiment on.
package netlab
