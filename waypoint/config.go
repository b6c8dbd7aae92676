package waypoint

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

// Config is what a waypoint is told at its start.
type Config struct {
	// Who this waypoint is.
	Gateway        string // the Gateway's name, which is its Service's, too
	Namespace      string // of the Gateway
	PodName        string
	ServiceAccount string // "": Gateway
	InstanceIP     string
	ClusterID      string
	ClusterDomain  string
	TrustDomain    string
	Network        string

	// Where the control plane is and how to know it.
	XDSAddress  string
	XDSRootCA   string
	XDSHostname string
	CAAddress   string
	CARootCA    string
	CAHostname  string
	TokenFile   string
	SecretTTL   time.Duration

	// What it serves.
	ListenAddr  string
	ProxyAddr   string // "": no connections are taken by PROXY protocol
	AdminAddr   string
	MetricsAddr string
	ReadyAddr   string

	// How it carries traffic.
	SniffTimeout time.Duration // how long a connection to a port of unknown protocol may stay silent before it is taken for TCP
	DrainDelay   time.Duration // how long after a stop new connections are served, while the mesh learns of it
	Grace        time.Duration // how long, after that, connections may take to end
	AccessLog    bool
	HTTP10       bool
}

// Register declares the flags and their environment variables.
func (c *Config) Register(fs *daemon.FlagSet) {
	fs.StringVar(&c.Gateway, "gateway", "", "GATEWAY_NAME", "the Gateway this waypoint is an instance of")
	fs.StringVar(&c.Namespace, "namespace", "", "POD_NAMESPACE", "the namespace of the Gateway and of this pod")
	fs.StringVar(&c.PodName, "pod-name", "", "POD_NAME", "this waypoint's own pod")
	fs.StringVar(&c.ServiceAccount, "service-account", "", "SERVICE_ACCOUNT", "this waypoint's service account, if not named as the Gateway")
	fs.StringVar(&c.InstanceIP, "instance-ip", "", "INSTANCE_IP", "this pod's address")
	fs.StringVar(&c.ClusterID, "cluster-id", mesh.DefaultClusterID, "CLUSTER_ID", "the cluster, as istiod knows it")
	fs.StringVar(&c.ClusterDomain, "cluster-domain", mesh.DefaultClusterDomain, "CLUSTER_DOMAIN", "the DNS domain of services")
	fs.StringVar(&c.TrustDomain, "trust-domain", mesh.DefaultTrustDomain, "TRUST_DOMAIN", "the trust domain of this mesh")
	fs.StringVar(&c.Network, "network", "", "NETWORK", "the network this pod is on")
	fs.StringVar(&c.XDSAddress, "xds-address", "https://istiod.istio-system.svc:15012", "XDS_ADDRESS", "istiod's xDS server")
	fs.StringVar(&c.XDSRootCA, "xds-root-ca", "./var/run/secrets/istio/root-cert.pem", "XDS_ROOT_CA", "PEM file of the roots that istiod's certificate chains to")
	fs.StringVar(&c.XDSHostname, "alt-xds-hostname", "", "ALT_XDS_HOSTNAME", "name to expect in istiod's certificate, if not the address's")
	fs.StringVar(&c.CAAddress, "ca-address", "", "CA_ADDRESS", "the certificate authority, if not at the xDS address")
	fs.StringVar(&c.CARootCA, "ca-root-ca", "", "CA_ROOT_CA", "PEM file of the roots of the certificate authority, if not the xDS one")
	fs.StringVar(&c.CAHostname, "alt-ca-hostname", "", "ALT_CA_HOSTNAME", "name to expect in the authority's certificate")
	fs.StringVar(&c.TokenFile, "auth-token", "./var/run/secrets/tokens/istio-token", "AUTH_TOKEN", "file of the token to show istiod; read anew for every call")
	fs.DurationVar(&c.SecretTTL, "secret-ttl", 24*time.Hour, "SECRET_TTL", "certificate lifetime to ask for")
	fs.StringVar(&c.ListenAddr, "listen-addr", fmt.Sprintf(":%d", mesh.PortHBONE), "LISTEN_ADDR", "address of HBONE tunnels")
	fs.StringVar(&c.ProxyAddr, "proxy-addr", "", "PROXY_LISTEN_ADDR", "address of connections that a ztunnel has taken out of their tunnels and announces by PROXY protocol "+
		"(ambient.istio.io/waypoint-inbound-binding: PROXY); what connects here is believed whom it names, so let it be loopback; empty: none")
	fs.StringVar(&c.AdminAddr, "admin-addr", fmt.Sprintf("127.0.0.1:%d", mesh.PortAdmin), "ADMIN_ADDR", "address of the administration pages")
	fs.StringVar(&c.MetricsAddr, "metrics-addr", fmt.Sprintf(":%d", mesh.PortMetrics), "STATS_ADDR", "address of /stats/prometheus")
	fs.StringVar(&c.ReadyAddr, "ready-addr", fmt.Sprintf(":%d", mesh.PortReadiness), "READINESS_ADDR", "address of /healthz/ready")
	fs.DurationVar(&c.SniffTimeout, "sniff-timeout", 100*time.Millisecond, "SNIFF_TIMEOUT", "silence after which a connection to a port of unknown protocol is taken for TCP")
	fs.DurationVar(&c.DrainDelay, "drain-delay", 5*time.Second, "DRAIN_DELAY", "how long after a stop new connections are still served")
	fs.DurationVar(&c.Grace, "grace", 20*time.Second, "CONNECTION_TERMINATION_DEADLINE", "how long, after -drain-delay, connections may take to end")
	fs.BoolVar(&c.AccessLog, "access-log", true, "ACCESS_LOG", "write one line per request or connection")
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
	if c.ServiceAccount == "" {
		c.ServiceAccount = c.Gateway
	}
	if c.CAAddress == "" {
		c.CAAddress = c.XDSAddress
	}
	if c.CARootCA == "" {
		c.CARootCA = c.XDSRootCA
	}
	for _, f := range []struct{ flag, value string }{{"xds-address", c.XDSAddress}, {"ca-address", c.CAAddress}} {
		if _, _, err := splitAddress(f.value); err != nil {
			errs = append(errs, fmt.Errorf("-%s: %w", f.flag, err))
		}
	}
	if c.ProxyAddr != "" {
		if _, _, err := net.SplitHostPort(c.ProxyAddr); err != nil {
			errs = append(errs, fmt.Errorf("-proxy-addr: %w: want host:port", err))
		}
	}
	for _, f := range []struct{ flag, value string }{
		{"listen-addr", c.ListenAddr}, {"admin-addr", c.AdminAddr}, {"metrics-addr", c.MetricsAddr}, {"ready-addr", c.ReadyAddr},
	} {
		if _, _, err := net.SplitHostPort(f.value); err != nil {
			errs = append(errs, fmt.Errorf("-%s: %w: want host:port", f.flag, err))
		}
	}
	if _, err := netip.ParseAddr(c.InstanceIP); err != nil {
		errs = append(errs, fmt.Errorf("-instance-ip (INSTANCE_IP): %w", err))
	}
	if c.SniffTimeout <= 0 || c.DrainDelay < 0 || c.Grace < 0 {
		errs = append(errs, fmt.Errorf("-sniff-timeout %s, -drain-delay %s, -grace %s: want no negative time, and some to sniff",
			c.SniffTimeout, c.DrainDelay, c.Grace))
	}
	return errors.Join(errs...)
}

// identity is whom this waypoint is to others.
func (c *Config) identity() mesh.Identity {
	return mesh.Identity{TrustDomain: c.TrustDomain, Namespace: c.Namespace, ServiceAccount: c.ServiceAccount}
}

// hostname is that of the Gateway's Service.
func (c *Config) hostname() string { return c.Gateway + "." + c.Namespace + ".svc." + c.ClusterDomain }

// splitAddress splits https://host:port into what to dial and the name to expect: tokens travel here, never in plaintext.
func splitAddress(address string) (target, host string, err error) {
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
