package istiod

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/gateway"
)

// Config is what istiod is started with. It implements daemon.Flags.
type Config struct {
	Source string // SourceKubernetes or SourceFiles; "": files

	// Hidden says which rules of routes are never reached, and why, by their keys (waypoint/route.HiddenRules); nil: statuses do not say it.
	Hidden func([]*mesh.Route) map[string][]string

	Kubeconfig string // file that says where the API server is; "": the cluster this program runs in
	Namespace  string // istiod's own; "": RootNamespace
	PodName    string // this replica's name among its like; "": the host's name
	Revision   string // of this control plane, by which its ConfigMap is found, and what it speaks for; "": default
	CADir      string // where an authority may be mounted; "": nowhere

	CAOverlap time.Duration // how long a new root is handed out before it is signed with; 0: 5 min

	Files     string // directory of the mesh's YAML
	StatusDir string // directory in which node agents tell the state of pods; "" for none
	DataDir   string // where the CA and the token key live, for root's eyes only

	TrustDomain   string
	ClusterID     string
	ClusterDomain string
	RootNamespace string

	WaypointUnavailable string // what becomes of traffic whose waypoint is not there: UnavailableAllow or UnavailableDeny

	XDSAddr         string   // xDS and CA, over TLS
	MonitoringAddr  string   // metrics, readiness and debug pages
	DNSNames        []string // in istiod's own certificate
	IPs             []string // the same
	TrustedAccounts []string // namespace/name of accounts that may ask for the certificates of pods on their node

	WaypointImage    string // of the waypoints that Gateways become; "": none are started
	WaypointDefaults string // YAML that is merged into what they become (gateway.ParseDefaults)
	WaypointLogLevel string // "": info
	WaypointLogForm  string // "": plain
	IgnoreIstio      bool   // leaves Gateways of Istio's class to Istio
	Network          string // of this cluster's pods
}

// The sources of a mesh.
const (
	SourceKubernetes = "kubernetes" // an API server
	SourceFiles      = "files"      // a directory
)

// What becomes of traffic that is to go through a waypoint that is not there.
const (
	UnavailableAllow = "allow" // it goes around the waypoint
	UnavailableDeny  = "deny"  // it is refused
)

// Register declares the flags on fs.
func (c *Config) Register(fs *daemon.FlagSet) {
	where := SourceFiles
	if os.Getenv("KUBERNETES_SERVICE_HOST") != "" {
		where = SourceKubernetes
	}
	fs.StringVar(&c.Source, "source", where, "SOURCE", "where the mesh is written: kubernetes (default in a pod) or files")
	fs.StringVar(&c.Kubeconfig, "kubeconfig", "", "KUBECONFIG", "with -source=kubernetes: kubeconfig file (default: that of the pod)")
	fs.StringVar(&c.Namespace, "namespace", "", "POD_NAMESPACE", "with -source=kubernetes: istiod's own namespace (default: -root-namespace)")
	fs.StringVar(&c.PodName, "pod-name", "", "POD_NAME", "with -source=kubernetes: name of this replica (default: the host's name)")
	fs.StringVar(&c.Revision, "revision", "default", "REVISION", "with -source=kubernetes: of this control plane, which runs what istio.io/rev says; another than default reads ConfigMap istio-<revision>")
	fs.StringVar(&c.CADir, "ca-dir", "/etc/cacerts", "CA_DIR", "with -source=kubernetes: where an authority may be mounted (else Secrets cacerts, istio-ca-secret)")
	fs.DurationVar(&c.CAOverlap, "ca-root-overlap", 5*time.Minute, "CA_ROOT_OVERLAP", "with -source=kubernetes: how long a new root is handed out before certificates are signed below it")
	fs.StringVar(&c.Files, "files", "", "FILES", "directory of YAML that is the mesh, watched")
	fs.StringVar(&c.StatusDir, "status-dir", "", "STATUS_DIR", "directory in which node agents tell the state of pods")
	fs.StringVar(&c.DataDir, "data-dir", "/var/lib/mistnet/istiod", "DATA_DIR", "directory of the CA's and the token key, made when missing")
	fs.StringVar(&c.TrustDomain, "trust-domain", mesh.DefaultTrustDomain, "TRUST_DOMAIN", "the trust domain of this mesh")
	fs.StringVar(&c.ClusterID, "cluster-id", mesh.DefaultClusterID, "CLUSTER_ID", "the name of this cluster")
	fs.StringVar(&c.ClusterDomain, "cluster-domain", mesh.DefaultClusterDomain, "CLUSTER_DOMAIN", "the DNS domain of services")
	fs.StringVar(&c.RootNamespace, "root-namespace", mesh.RootNamespace, "ROOT_NAMESPACE", "the namespace whose policies hold in the whole mesh")
	fs.StringVar(&c.WaypointUnavailable, "waypoint-unavailable", UnavailableAllow, "WAYPOINT_UNAVAILABLE",
		"what becomes of traffic whose waypoint is not there, where neither its namespace nor the mesh's ConfigMap says: allow (it goes around) or deny")
	fs.StringVar(&c.XDSAddr, "xds-addr", fmt.Sprintf(":%d", mesh.PortXDS), "XDS_ADDR", "address of xDS and CA")
	fs.StringVar(&c.MonitoringAddr, "monitoring-addr", fmt.Sprintf(":%d", mesh.PortIstiodMon), "MONITORING_ADDR", "address of metrics, readiness and debug pages")
	fs.ListVar(&c.DNSNames, "dns-names", "DNS_NAMES", "names in istiod's certificate, besides its own in the root namespace and localhost")
	fs.ListVar(&c.IPs, "ips", "IPS", "addresses in istiod's certificate, besides loopback")
	fs.ListVar(&c.TrustedAccounts, "ca-trusted-node-accounts", "CA_TRUSTED_NODE_ACCOUNTS", "namespace/name of the accounts of node proxies (default ztunnel in istiod's namespace)")
	fs.StringVar(&c.WaypointImage, "waypoint-image", "", "WAYPOINT_IMAGE", "with -source=kubernetes: image of the waypoints that Gateways become")
	fs.StringVar(&c.WaypointDefaults, "waypoint-defaults", "", "WAYPOINT_DEFAULTS", "with -source=kubernetes: YAML of class (or \"\"), key (deployment, service, …) and object that is merged into what Gateways become")
	fs.StringVar(&c.WaypointLogLevel, "waypoint-log-level", "info", "WAYPOINT_LOG_LEVEL", "with -source=kubernetes: what waypoints log")
	fs.StringVar(&c.WaypointLogForm, "waypoint-log-format", "plain", "WAYPOINT_LOG_FORMAT", "with -source=kubernetes: plain or json")
	fs.BoolVar(&c.IgnoreIstio, "ignore-istio-waypoints", false, "IGNORE_ISTIO_WAYPOINTS", "with -source=kubernetes: leave Gateways of class istio-waypoint to Istio")
	fs.StringVar(&c.Network, "network", "", "NETWORK", "with -source=kubernetes: the network of this cluster's pods")
}

// Validate reports every fault, each naming the flag.
func (c *Config) Validate() error {
	var errs []error
	switch c.Source {
	case SourceKubernetes:
		if c.Files != "" || c.StatusDir != "" {
			errs = append(errs, errors.New("-files and -status-dir go with -source=files, not with -source=kubernetes"))
		}
	case "", SourceFiles:
		if c.Files == "" {
			errs = append(errs, errors.New("-files is required: the directory with the YAML of the mesh; or -source=kubernetes"))
		}
		if c.DataDir == "" {
			errs = append(errs, errors.New("-data-dir is required: the directory for istiod's keys"))
		}
	default:
		errs = append(errs, fmt.Errorf("-source: %q is neither kubernetes nor files", c.Source))
	}
	if _, err := gateway.ParseDefaults(c.WaypointDefaults); err != nil {
		errs = append(errs, fmt.Errorf("-waypoint-defaults: %w", err))
	}
	switch c.WaypointUnavailable {
	case "", UnavailableAllow, UnavailableDeny:
	default:
		errs = append(errs, fmt.Errorf("-waypoint-unavailable: %q is neither allow nor deny", c.WaypointUnavailable))
	}
	if c.CAOverlap < 0 {
		errs = append(errs, fmt.Errorf("-ca-root-overlap: %s is negative", c.CAOverlap))
	}
	for _, ip := range c.IPs {
		if _, err := netip.ParseAddr(ip); err != nil {
			errs = append(errs, fmt.Errorf("-ips: %q is not an address", ip))
		}
	}
	return errors.Join(errs...)
}

// servingNames are the names and addresses clients may reach istiod by.
func (c *Config) servingNames(o origin) (names []string, ips []netip.Addr) {
	services := []string{"istiod"}
	if c.Revision != "" && c.Revision != "default" {
		services = append(services, "istiod-"+c.Revision)
	}
	for _, svc := range services {
		host := svc + "." + o.namespace
		names = append(names, host+".svc", host+".svc."+o.mesh.ClusterDomain, host)
	}
	names = append(append(names, "localhost"), c.DNSNames...)
	ips = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	for _, text := range c.IPs {
		if ip, err := netip.ParseAddr(text); err == nil {
			ips = append(ips, ip.Unmap())
		}
	}
	return names, ips
}
