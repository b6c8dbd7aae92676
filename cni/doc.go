// Package cni is the node agent: it decides which of the node's pods are in the mesh, redirects their traffic to the
// node's ztunnel, tells ztunnel about them, and says in their status what it did.
//
// A pod that starts is captured by redirection rules and handed to ztunnel, at the same time; when both are done it is
// announced as reachable through the mesh (the annotation ambient.istio.io/redirection: enabled), and may start. A pod that
// runs already, whose label was added, is handed to ztunnel first, and captured when ztunnel listens in it. No pod is
// announced before it is captured, and one that was captured stays so when its ztunnel is lost:
//
//	rules fail      the runtime's ADD fails at once; the pod is not started, the runtime tries again
//	ztunnel fails   ADD waits a little for ztunnel, then fails, and the runtime tries again. A pod that already runs is
//	                announced as pending and goes on outside of the mesh, as before; the agent tries again
//	unknown pod     ADD fails, too: without the pod's labels nobody can say that it may run outside of the mesh
//
// Leaving does not touch the application either: the announcement is withdrawn, redirection ends, and ztunnel goes on with
// the connections it has until they have ended; then the remaining rules are removed and ztunnel is told.
//
// Pods and namespaces come from a watched directory of YAML or from the Kubernetes API server, and announcements go to
// status files or to the pods there. Everything between is the same.
//
// # On Kubernetes
//
// The agent runs as a DaemonSet with hostNetwork: true: its own network namespace is the machine's, which is where the
// rules for probes go, and it does not need the plugin it installs in order to start. A pod's start does not wait for
// the API server if the pod is known: only its announcement does. A pod that the watch has not brought is asked for; when
// the answer is slow ADD fails with code 11, and the kubelet tries again. Without the API server the agent goes on with
// what it knows.
//
// Pods that the plugin did not report, because they are older than the agent or its memory was lost, are found through
// their processes: the oldest of the pod's cgroup, if its network namespace is not the machine's and has one of the
// pod's addresses.
//
// When the agent is told to stop, and its DaemonSet is gone or being deleted, it takes away everything it did to the node:
// plugin, configuration, rules in running pods and on the host, announcements. Otherwise another agent follows, and all
// stays. It needs these permissions:
//
//	""     pods                      get, list, watch   its node's (field selector); get, for one that is about to start
//	""     pods/status               patch              the annotation ambient.istio.io/redirection
//	""     namespaces                get, list, watch   labels
//	apps   daemonsets                get, list, watch   in its own namespace, its own name: upgrade or uninstallation?
//	""     nodes                     get, patch         only with -untaint (and -taint)
//
// these capabilities: NET_ADMIN, NET_RAW, SYS_ADMIN (enter namespaces), SYS_PTRACE (open those of other users' processes),
// DAC_OVERRIDE (write to the host's directories); and these of the host's directories: /etc/cni/net.d and /opt/cni/bin (at
// any place: -cni-conf-dir, -cni-bin-dir), /proc at /host/proc, /run/netns at the same path as on the host with mount
// propagation HostToContainer, /var/run/istio-cni and /var/run/ztunnel at the same path. While it cleans up it needs its
// permissions: take the DaemonSet away first, and them when its pods are gone. That takes up to 25 seconds.
//
// # Memory
//
// What the agent knows of running pods it keeps in a file of its run directory, and takes up from there when it starts.
// An agent that stops leaves everything as it is: rules stay, traffic flows, new pods wait for the next agent.
package cni
