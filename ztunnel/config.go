package ztunnel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"time"

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
	ClusterID      string
	ClusterDomain  string
	TrustDomain    string
	Network        string

	// Where the control plane is and how to know it: PEM files of the roots, the token to show.
	XDSAddress  string
	XDSRootCA   string
	XDSHostname string
	CAAddress   string
	CARootCA    string
	CAHostname  string
	TokenFile   string
	SecretTTL   time.Duration

	// Where the CNI agent listens.
	ZDSPath string

	// What it serves.
	AdminAddr   string
	MetricsAddr string
	ReadyAddr   string

	// How it carries traffic.
	Grace          time.Duration // how long connections may outlive a stop; 0: what KillAfter leaves
	KillAfter      int           // seconds after a stop when whoever runs this program kills it; 0: not known
	KeepSource     bool          // applications see the caller's own address
	AccessLog      bool
	MaxStreams     int
	UnusedRelease  time.Duration
	ResponseDetail bool // describe the destination workload in the answer to a CONNECT
	StdlibRecords  bool // leave TLS records to crypto/tls
}

// Register declares the flags and their environment variables.
func (c *Config) Register(fs *daemon.FlagSet) {
	fs.StringVar(&c.NodeName, "node-name", "", "NODE_NAME", "the node this ztunnel serves")
	fs.StringVar(&c.PodName, "pod-name", "ztunnel", "POD_NAME", "this ztunnel's own pod")
	fs.StringVar(&c.PodNamespace, "pod-namespace", mesh.RootNamespace, "POD_NAMESPACE", "the namespace of this ztunnel's pod")
	fs.StringVar(&c.ServiceAccount, "service-account", "ztunnel", "SERVICE_ACCOUNT", "this ztunnel's service account")
	fs.StringVar(&c.InstanceIP, "instance-ip", "1.1.1.1", "INSTANCE_IP", "this ztunnel's address, for its xDS node id")
	fs.StringVar(&c.ClusterID, "cluster-id", mesh.DefaultClusterID, "CLUSTER_ID", "the cluster, as istiod knows it")
	fs.StringVar(&c.ClusterDomain, "cluster-domain", mesh.DefaultClusterDomain, "CLUSTER_DOMAIN", "the DNS domain of services")
	fs.StringVar(&c.TrustDomain, "trust-domain", mesh.DefaultTrustDomain, "TRUST_DOMAIN", "the trust domain of this mesh")
	fs.StringVar(&c.Network, "network", "", "NETWORK", "the network this node is on")
	fs.StringVar(&c.XDSAddress, "xds-address", "https://istiod.istio-system.svc:15012", "XDS_ADDRESS", "istiod's xDS server")
	fs.StringVar(&c.XDSRootCA, "xds-root-ca", "./var/run/secrets/istio/root-cert.pem", "XDS_ROOT_CA", "PEM file of the roots that istiod's certificate chains to")
	fs.StringVar(&c.XDSHostname, "alt-xds-hostname", "", "ALT_XDS_HOSTNAME", "name to expect in istiod's certificate, if not the address's")
	fs.StringVar(&c.CAAddress, "ca-address", "", "CA_ADDRESS", "the certificate authority, if not at the xDS address")
	fs.StringVar(&c.CARootCA, "ca-root-ca", "", "CA_ROOT_CA", "PEM file of the roots of the certificate authority, if not the xDS one")
	fs.StringVar(&c.CAHostname, "alt-ca-hostname", "", "ALT_CA_HOSTNAME", "name to expect in the authority's certificate")
	fs.StringVar(&c.TokenFile, "auth-token", "./var/run/secrets/tokens/istio-token", "AUTH_TOKEN", "file of the token to show istiod; read anew for every call")
	fs.DurationVar(&c.SecretTTL, "secret-ttl", 24*time.Hour, "SECRET_TTL", "certificate lifetime to ask for")
	fs.StringVar(&c.ZDSPath, "inpod-uds", "/var/run/ztunnel/ztunnel.sock", "INPOD_UDS", "unix socket of the CNI agent")
	fs.StringVar(&c.AdminAddr, "admin-addr", fmt.Sprintf("127.0.0.1:%d", mesh.PortAdmin), "ADMIN_ADDR", "address of the administration pages")
	fs.StringVar(&c.MetricsAddr, "metrics-addr", fmt.Sprintf(":%d", mesh.PortMetrics), "STATS_ADDR", "address of /metrics")
	fs.StringVar(&c.ReadyAddr, "ready-addr", fmt.Sprintf(":%d", mesh.PortReadiness), "READINESS_ADDR", "address of /healthz/ready")
	fs.DurationVar(&c.Grace, "grace", 0, "CONNECTION_TERMINATION_DEADLINE", "how long connections may outlive a stop; if not set, 5s less than -kill-after")
	fs.IntVar(&c.KillAfter, "kill-after", 0, "TERMINATION_GRACE_PERIOD_SECONDS", "seconds after a stop when this program is killed: the pod's terminationGracePeriodSeconds")
	fs.BoolVar(&c.KeepSource, "keep-source", true, "ENABLE_ORIG_SRC", "applications see the caller's own address")
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
	if c.CAAddress == "" {
		c.CAAddress = c.XDSAddress
	}
	if c.CARootCA == "" {
		c.CARootCA = c.XDSRootCA
	}
	for _, f := range []struct{ flag, value string }{{"xds-address", c.XDSAddress}, {"ca-address", c.CAAddress}} {
		if _, _, err := endpoint(f.value); err != nil {
			errs = append(errs, fmt.Errorf("-%s: %w", f.flag, err))
		}
	}
	for _, f := range []struct{ flag, value string }{
		{"admin-addr", c.AdminAddr}, {"metrics-addr", c.MetricsAddr}, {"ready-addr", c.ReadyAddr},
	} {
		if _, _, err := net.SplitHostPort(f.value); err != nil {
			errs = append(errs, fmt.Errorf("-%s: %w: want host:port", f.flag, err))
		}
	}
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

// endpoint splits https://host:port into what to dial and the name to expect. Plaintext is refused: tokens travel here.
func endpoint(address string) (target, host string, err error) {
	u, err := url.Parse(address)
	if err != nil {
		return "", "", err
	}
	if u.Scheme != "https" || u.Hostname() == "" {
		return "", "", fmt.Errorf("%q: want https://host:port", address)
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	return net.JoinHostPort(u.Hostname(), port), u.Hostname(), nil
}
