package waypoint

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/mistnet/mistnet/internal/controlplane"
	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/mesh"
)

// Config is what a waypoint is told at its start.
type Config struct {
	// Who this waypoint is.
	Gateway        string // the Gateway's name
	Service        string // of the Gateway, in its namespace; "": Gateway
	Namespace      string // of the Gateway
	PodName        string
	ServiceAccount string // "": Gateway
	InstanceIP     string
	Network        string

	controlplane.Config // the mesh, and who runs it
	daemon.Pages        // what it tells about itself

	// What it serves.
	ListenAddr string
	ProxyAddr  string // "": no connections are taken by PROXY protocol

	// How it carries traffic.
	SniffTimeout time.Duration // how long a connection to a port of unknown protocol may stay silent before it is taken for TCP
	DrainDelay   time.Duration // how long after a stop new connections are served, while the mesh learns of it
	Grace        time.Duration // how long, after that, connections may take to end
	AccessLog    bool

	ConnectionMemory int // MiB that all connections together may hold; 0: half of the memory limit; negative: any

	AccessLogEncoding string // TEXT or JSON
	AccessLogFormat   string // in Envoy's language, of that encoding; "": Istio's default

	PathNormalization string // NONE, BASE (or DEFAULT), MERGE_SLASHES, DECODE_AND_MERGE_SLASHES

	// What it says of clients, and who may.
	TrustedGateways []string // namespace/serviceaccount
	ClientCert      bool     // x-forwarded-client-cert names the client to applications
	HTTP10          bool
}

// How the access log may be written.
const (
	encodingText = "TEXT"
	encodingJSON = "JSON"
)

// Register declares the flags and their environment variables.
func (c *Config) Register(fs *daemon.FlagSet) {
	c.Config.Register(fs)
	c.Pages.Register(fs)
	fs.StringVar(&c.Gateway, "gateway", "", "GATEWAY_NAME", "the Gateway this waypoint is an instance of")
	fs.StringVar(&c.Service, "service", "", "SERVICE_NAME", "the Gateway's Service, if not named as the Gateway")
	fs.StringVar(&c.Namespace, "namespace", "", "POD_NAMESPACE", "the namespace of the Gateway and of this pod")
	fs.StringVar(&c.PodName, "pod-name", "", "POD_NAME", "this waypoint's own pod")
	fs.StringVar(&c.ServiceAccount, "service-account", "", "SERVICE_ACCOUNT", "this waypoint's service account, if not named as the Gateway")
	fs.StringVar(&c.InstanceIP, "instance-ip", "", "INSTANCE_IP", "this pod's address")
	fs.StringVar(&c.Network, "network", "", "NETWORK", "the network this pod is on")
	fs.StringVar(&c.ListenAddr, "listen-addr", fmt.Sprintf(":%d", mesh.PortHBONE), "LISTEN_ADDR", "address of HBONE tunnels; empty: none, where a ztunnel of this pod takes them (-proxy-addr)")
	fs.StringVar(&c.ProxyAddr, "proxy-addr", "", "PROXY_LISTEN_ADDR", "address of connections that a ztunnel has taken out of their tunnels and announces by PROXY protocol "+
		"(ambient.istio.io/waypoint-inbound-binding: PROXY); what connects here is believed whom it names, so let it be loopback; empty: none")
	fs.DurationVar(&c.SniffTimeout, "sniff-timeout", 100*time.Millisecond, "SNIFF_TIMEOUT", "silence after which a connection to a port of unknown protocol is taken for TCP")
	fs.DurationVar(&c.DrainDelay, "drain-delay", 5*time.Second, "DRAIN_DELAY", "how long after a stop new connections are still served")
	fs.DurationVar(&c.Grace, "grace", 20*time.Second, "CONNECTION_TERMINATION_DEADLINE", "how long, after -drain-delay, connections may take to end")
	fs.IntVar(&c.ConnectionMemory, "connection-memory", 0, "CONNECTION_MEMORY", "MiB that all connections together may hold; 0: half of GOMEMLIMIT, "+
		"or 512 where there is none; negative: as much as they like")
	fs.BoolVar(&c.AccessLog, "access-log", true, "ACCESS_LOG", "write one line per request or connection")
	fs.StringVar(&c.AccessLogEncoding, "access-log-encoding", encodingText, "ACCESS_LOG_ENCODING", "TEXT or JSON: how those lines are written (meshConfig.accessLogEncoding)")
	fs.StringVar(&c.AccessLogFormat, "access-log-format", "", "ACCESS_LOG_FORMAT", "what those lines say: text, or a JSON object, with Envoy's command operators "+
		"(meshConfig.accessLogFormat); empty, or what cannot be read: Istio's default")
	fs.StringVar(&c.PathNormalization, "path-normalization", "BASE", "PATH_NORMALIZATION", "NONE, BASE, MERGE_SLASHES or DECODE_AND_MERGE_SLASHES: "+
		"what is done to paths before policies and routes look at them (meshConfig.pathNormalization)")
	fs.ListVar(&c.TrustedGateways, "trusted-gateways", "TRUSTED_GATEWAYS", "namespace/serviceaccount of gateways that are believed for whom they speak, "+
		"besides those of the waypoint's own and the root namespace")
	fs.BoolVar(&c.ClientCert, "xfcc-client-identity", false, "XFCC_INCLUDE_CLIENT_IDENTITY", "name the client to applications in x-forwarded-client-cert "+
		"(ambient.istio.io/xfcc-include-client-identity); what clients send there is always removed")
	fs.BoolVar(&c.HTTP10, "http10", false, "PILOT_HTTP10", "serve HTTP/1.0 requests instead of refusing them")
}

// Validate reports every fault of c and fills in what follows from other fields.
func (c *Config) Validate() error {
	var errs []error
	for _, f := range []struct{ flag, value string }{
		{"gateway (GATEWAY_NAME)", c.Gateway}, {"namespace (POD_NAMESPACE)", c.Namespace}, {"pod-name (POD_NAME)", c.PodName},
	} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("-%s is missing", f.flag))
		}
	}
	c.Service = cmp.Or(c.Service, c.Gateway)
	c.ServiceAccount = cmp.Or(c.ServiceAccount, c.Gateway)
	errs = append(errs, c.Config.Validate(), c.Pages.Validate())
	if c.ListenAddr != "" {
		errs = append(errs, daemon.HostPort("listen-addr", c.ListenAddr))
	}
	switch {
	case c.ProxyAddr != "":
		errs = append(errs, daemon.HostPort("proxy-addr", c.ProxyAddr))
	case c.ListenAddr == "":
		errs = append(errs, errors.New("-listen-addr is empty, and so is -proxy-addr: want one of them"))
	}
	if _, err := netip.ParseAddr(c.InstanceIP); err != nil {
		errs = append(errs, fmt.Errorf("-instance-ip (INSTANCE_IP): %w", err))
	}
	if c.SniffTimeout <= 0 || c.DrainDelay < 0 || c.Grace < 0 {
		errs = append(errs, fmt.Errorf("-sniff-timeout %s, -drain-delay %s, -grace %s: want no negative time, and some to sniff",
			c.SniffTimeout, c.DrainDelay, c.Grace))
	}
	if _, err := parseNormalization(c.PathNormalization); err != nil {
		errs = append(errs, fmt.Errorf("-path-normalization: %w", err))
	}
	if c.AccessLogEncoding != encodingText && c.AccessLogEncoding != encodingJSON {
		errs = append(errs, fmt.Errorf("-access-log-encoding: %q: want %s or %s", c.AccessLogEncoding, encodingText, encodingJSON))
	}
	for _, g := range c.TrustedGateways {
		if namespace, account, ok := strings.Cut(g, "/"); !ok || namespace == "" || account == "" || strings.Contains(account, "/") {
			errs = append(errs, fmt.Errorf("-trusted-gateways: %q: want namespace/serviceaccount", g))
		}
	}
	return errors.Join(errs...)
}

// trusted are the identities of -trusted-gateways.
func (c *Config) trusted() map[mesh.Identity]bool {
	out := make(map[mesh.Identity]bool)
	for _, g := range c.TrustedGateways {
		namespace, account, _ := strings.Cut(g, "/")
		out[mesh.Identity{TrustDomain: c.TrustDomain, Namespace: namespace, ServiceAccount: account}] = true
	}
	return out
}

// isOwn reports of an address whether the waypoint itself would answer there, rather than an application: by whatever
// writes endpoints (a ServiceEntry, a DNS server) clients would come to its administration pages. Loopback is its own altogether,
// unless all of its mesh is there.
func (c *Config) isOwn() func(netip.AddrPort) bool {
	self, _ := netip.ParseAddr(c.InstanceIP) // Validate has seen it
	self = self.Unmap()
	ports := make(map[uint16]bool)
	for _, addr := range []string{c.ListenAddr, c.ProxyAddr, c.AdminAddr, c.MetricsAddr, c.ReadyAddr} {
		if _, text, err := net.SplitHostPort(addr); err == nil {
			if n, err := strconv.ParseUint(text, 10, 16); err == nil {
				ports[uint16(n)] = true
			}
		}
	}
	return func(to netip.AddrPort) bool {
		addr := to.Addr().Unmap()
		switch {
		case addr == self:
			return ports[to.Port()]
		case addr.IsUnspecified(): // to the kernel, loopback
			return true
		}
		return addr.IsLoopback() && (ports[to.Port()] || !self.IsLoopback())
	}
}

// identity is whom this waypoint is to others.
func (c *Config) identity() mesh.Identity {
	return mesh.Identity{TrustDomain: c.TrustDomain, Namespace: c.Namespace, ServiceAccount: c.ServiceAccount}
}

// hostname is that of the Gateway's Service.
func (c *Config) hostname() string { return c.Service + "." + c.Namespace + ".svc." + c.ClusterDomain }
