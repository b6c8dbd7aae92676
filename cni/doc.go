// Package cni is the node agent: it decides which of the node's pods are in the mesh, redirects their traffic to the
// node's ztunnel, tells ztunnel about them, and says in their status what it did.
//
// A pod is enrolled in this order: its network namespace is opened, the redirection rules go in, ztunnel is told and has
// its listeners open, and only then the pod is announced as reachable through the mesh (the annotation
// ambient.istio.io/redirection: enabled). Whatever fails, the pod's traffic is captured before it is announced, so it is
// stopped rather than sent in plaintext:
//
//	rules fail      the runtime's ADD fails at once; the pod is not started, the runtime tries again
//	ztunnel fails   ADD waits a little for ztunnel, then fails, and the runtime tries again. A pod that already runs
//	                (its label was added) is announced as pending, its traffic blocked, and the agent tries again
//	unknown pod     ADD fails, too: without the pod's labels nobody can say that it may run outside of the mesh
//
// Leaving goes the other way round and does not touch the application: the announcement is withdrawn, the rules are
// removed, ztunnel is told.
//
// What the agent knows of running pods it keeps in a file of its run directory, and takes up from there when it starts.
// An agent that stops leaves everything as it is: rules stay, traffic flows, new pods wait for the next agent.
package cni
