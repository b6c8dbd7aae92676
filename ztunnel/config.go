package ztunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/mistnet/mistnet/internal/controlplane"
	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/mesh"
)

// Config is what a ztunnel is told at its start. Environment variables have the names of Istio's ztunnel.
type Config struct {
	// Who this ztunnel is.
	NodeName       string
	PodName        string
	PodNamespace   string
	ServiceAccount string
	InstanceIP     string
	Network        string

	controlplane.Config // the mesh, and who runs it
	daemon.Pages        // what it tells about itself

	// Where the CNI agent listens.
	ZDSPath string

	// How it carries traffic.
	Grace          time.Duration // how long connections may outlive a stop; 0: what KillAfter leaves
	KillAfter      int           // seconds after a stop when whoever runs this program kills it; 0: not known
	KeepSource     bool          // applications see the caller's own address
	AppTunnelLocal bool          // applications that take the PROXY protocol do so on loopback
	AccessLog      bool
	MaxStreams     int
	UnusedRelease  time.Duration
	ResponseDetail bool // describe the destination workload in the answer to a CONNECT
	StdlibRecords  bool // leave TLS records to crypto/tls
}

// Register declares the flags and their environment variables.
func (c *Config) Register(fs *daemon.FlagSet) {
	c.Config.Register(fs)
	c.Pages.Register(fs)
	fs.StringVar(&c.NodeName, "node-name", "", "NODE_NAME", "the node this ztunnel serves")
	fs.StringVar(&c.PodName, "pod-name", "ztunnel", "POD_NAME", "this ztunnel's own pod")
	fs.StringVar(&c.PodNamespace, "pod-namespace", mesh.RootNamespace, "POD_NAMESPACE", "the namespace of this ztunnel's pod")
	fs.StringVar(&c.ServiceAccount, "service-account", "ztunnel", "SERVICE_ACCOUNT", "this ztunnel's service account")
	fs.StringVar(&c.InstanceIP, "instance-ip", "1.1.1.1", "INSTANCE_IP", "this ztunnel's address, for its xDS node id")
	fs.StringVar(&c.Network, "network", "", "NETWORK", "the network this node is on")
	fs.StringVar(&c.ZDSPath, "inpod-uds", "/var/run/ztunnel/ztunnel.sock", "INPOD_UDS", "unix socket of the CNI agent")
	fs.DurationVar(&c.Grace, "grace", 0, "CONNECTION_TERMINATION_DEADLINE", "how long connections may outlive a stop; if not set, 5s less than -kill-after")
	fs.IntVar(&c.KillAfter, "kill-after", 0, "TERMINATION_GRACE_PERIOD_SECONDS", "seconds after a stop when this program is killed: the pod's terminationGracePeriodSeconds")
	fs.BoolVar(&c.KeepSource, "keep-source", true, "ENABLE_ORIG_SRC", "applications see the caller's own address")
	fs.BoolVar(&c.AppTunnelLocal, "localhost-app-tunnel", true, "LOCALHOST_APP_TUNNEL", "reach applications that take the PROXY protocol on loopback, so that nobody else can speak it to them")
	fs.BoolVar(&c.AccessLog, "access-log", true, "ACCESS_LOG", "write one line per connection")
	fs.IntVar(&c.MaxStreams, "max-streams", 100, "POOL_MAX_STREAMS_PER_CONNECTION", "connections carried by one tunnel at most")
	fs.DurationVar(&c.UnusedRelease, "unused-release", 5*time.Minute, "POOL_UNUSED_RELEASE_TIMEOUT", "how long an unused tunnel is kept")
	fs.BoolVar(&c.ResponseDetail, "response-baggage", true, "ENABLE_RESPONSE_BAGGAGE", "tell callers which workload answered")
	fs.BoolVar(&c.StdlibRecords, "stdlib-records", false, "STDLIB_RECORDS", "leave TLS records to Go's crypto/tls: slower, for who must audit one implementation")
}

// Validate reports every fault of c and fills in what follows from other fields.
func (c *Config) Validate() error {
	var errs []error
	if c.NodeName == "" {
		errs = append(errs, errors.New("-node-name (NODE_NAME) is missing: istiod needs it to authorize certificates"))
	}
	errs = append(errs, c.Config.Validate(), c.Pages.Validate())
	if _, err := netip.ParseAddr(c.InstanceIP); err != nil {
		errs = append(errs, fmt.Errorf("-instance-ip: %w", err))
	}
	if c.KillAfter < 0 || c.Grace < 0 {
		errs = append(errs, fmt.Errorf("-kill-after is %d and -grace is %s: want no negative time", c.KillAfter, c.Grace))
	}
	if c.Grace == 0 {
		c.Grace = graceWithin(c.KillAfter)
	}
	if c.MaxStreams < 1 {
		errs = append(errs, fmt.Errorf("-max-streams is %d: want at least 1", c.MaxStreams))
	}
	return errors.Join(errs...)
}

// graceWithin is what connections get of the seconds a pod has to end: the rest is for ending what is left in order. The
// numbers are those of Istio's ztunnel.
func graceWithin(killAfter int) time.Duration {
	switch {
	case killAfter == 0:
		return 5 * time.Second
	case killAfter > 10:
		return time.Duration(killAfter-5) * time.Second
	}
	return time.Duration(max(killAfter-1, 1)) * time.Second
}
