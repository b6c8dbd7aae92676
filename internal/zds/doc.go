// Package zds is how the CNI agent of a node hands the node's pods, each with its network namespace, to ztunnel.
//
// It speaks Istio's ZDS on both sides: SOCK_SEQPACKET, the agent listens and ztunnel dials, one protobuf message a
// packet, at most 1024 bytes, one SCM_RIGHTS descriptor on an add and nowhere else. ztunnel says hello; the agent sends
// every pod it has and then SnapshotSent; after that, changes. Each request is answered before the next is sent.
//
// It hides packets, descriptors and their lifetime, reconnection, timeouts, and that during an upgrade several ztunnels
// are connected at once. It does not know what enrolment means or what is done in a namespace: that is the agent's and
// ztunnel's business.
package zds

import (
	"context"
	"os"
	"time"
)

// Info says which pod it is. UID is the Kubernetes UID, and the only key.
type Info struct{ UID, Name, Namespace, ServiceAccount string }

// Pods is ztunnel's side: what the agent's requests are carried out by. Its methods are called one at a time. An error is
// sent to the agent, which tries again later; the connection goes on.
type Pods interface {
	// Add enrols a pod, and owns netns from the call on, also when it fails. The same UID with another namespace replaces
	// the pod; with the same one it changes nothing.
	Add(ctx context.Context, info Info, netns *os.File) error
	// Keep says that the pod still exists although the agent has no namespace to offer.
	Keep(ctx context.Context, uid string) error
	// Del takes a pod out. A pod that is not known is no error.
	Del(ctx context.Context, uid string) error
	// Synced ends the list sent on connection: every pod that is not among uids is gone.
	Synced(ctx context.Context, uids []string) error
}

// Pod is one pod as the agent offers it. NetNS nil means that its namespace cannot be opened, and Keep is sent.
type Pod struct {
	Info  Info
	NetNS *os.File
}

// defaultTimeout bounds one step: writing a packet, or waiting for its answer.
const defaultTimeout = 5 * time.Second
