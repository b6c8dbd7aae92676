// Package lab runs a real Kubernetes cluster with several nodes on one Linux machine, without a container engine, a virtual
// machine or an image registry.
//
//	machine ── veth (optional) ── me2e-NAME-cp: bridge lab0, 10.89.0.1, fd00:89::1
//	                              etcd, kube-apiserver, kube-controller-manager, kube-scheduler
//	                                 |                          |
//	                              me2e-NAME-node1 10.89.0.11  me2e-NAME-node2 10.89.0.12
//	                              containerd, kubelet, kube-proxy; pods on cni0, 10.244.1.0/24
//
// A node has network, mount, pid, uts, ipc and cgroup namespaces of its own, a copy-on-write root over the machine's, and a
// disk (etcd's, kubelet's and containerd's state, CNI configuration and plugins) that outlives a power cut. Its first
// process is node.sh; killing that ends everything on the node at once, as pulling the plug does.
//
// The programs are the upstream projects' own, built from the modules in e2e/bins at the versions pinned there and kept by
// content in the user's cache; container images are packed from them. Debian provides runc and the plain CNI plugins.
//
// A lab leaves nothing behind: Close removes it, Sweep removes those whose process died, Leftovers says what is left.
// Everything a lab writes is on a tmpfs of its own. It needs root, on a machine one may experiment on. It knows nothing of
// the mesh.
package lab
