package plugin

import "net/netip"

// SocketName is the agent's socket inside its run directory.
const SocketName = "pluginevent.sock"

// DefaultRunDir is the agent's run directory on the host.
const DefaultRunDir = "/var/run/istio-cni"

// Paths of the requests the plugin makes of the agent over its socket.
const (
	PathAdd    = "/cmdadd"
	PathDel    = "/cmddel"
	PathCheck  = "/cmdcheck"
	PathGC     = "/gc"
	PathStatus = "/status"
)

// Event is a pod's network coming, going or being checked: the body of /cmdadd, /cmddel and /cmdcheck.
type Event struct {
	Netns        string // path of the network namespace; may be "" in /cmddel
	PodName      string
	PodNamespace string
	PodUID       string // "" when the runtime does not tell
	ContainerID  string // of the sandbox: one pod may have several, one after the other
	IfName       string
	IPs          []IP // of the pod; none in /cmddel
}

// IP is an address of a pod.
type IP struct {
	Interface string // of the pod; "" when the result does not say
	Address   netip.Prefix
	Gateway   netip.Addr
}

// Valid is the body of /gc: the attachments that exist. Everything else the agent remembers is gone.
type Valid struct {
	Attachments []Attachment
}

// Attachment names one interface of one sandbox.
type Attachment struct{ ContainerID, IfName string }
