package istiod

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/ca"
)

// Config is what istiod is started with. It implements daemon.Flags.
type Config struct {
	Files     string // directory of the mesh's YAML
	StatusDir string // directory in which node agents tell the state of pods; "" for none
	DataDir   string // where the CA and the token key live, for root's eyes only

	TrustDomain   string
	ClusterID     string
	ClusterDomain string
	RootNamespace string

	XDSAddr         string   // xDS and CA, over TLS
	MonitoringAddr  string   // metrics, readiness and debug pages
	DNSNames        []string // in istiod's own certificate
	IPs             []string // the same
	TrustedAccounts []string // namespace/name of accounts that may ask for the certificates of pods on their node
}

// Register declares the flags on fs.
func (c *Config) Register(fs *daemon.FlagSet) {
	fs.StringVar(&c.Files, "files", "", "FILES", "directory of YAML that is the mesh, watched")
	fs.StringVar(&c.StatusDir, "status-dir", "", "STATUS_DIR", "directory in which node agents tell the state of pods")
	fs.StringVar(&c.DataDir, "data-dir", "/var/lib/mistnet/istiod", "DATA_DIR", "directory of the CA's and the token key, made when missing")
	fs.StringVar(&c.TrustDomain, "trust-domain", mesh.DefaultTrustDomain, "TRUST_DOMAIN", "the trust domain of this mesh")
	fs.StringVar(&c.ClusterID, "cluster-id", mesh.DefaultClusterID, "CLUSTER_ID", "the name of this cluster")
	fs.StringVar(&c.ClusterDomain, "cluster-domain", mesh.DefaultClusterDomain, "CLUSTER_DOMAIN", "the DNS domain of services")
	fs.StringVar(&c.RootNamespace, "root-namespace", mesh.RootNamespace, "ROOT_NAMESPACE", "the namespace whose policies hold in the whole mesh")
	fs.StringVar(&c.XDSAddr, "xds-addr", fmt.Sprintf(":%d", mesh.PortXDS), "XDS_ADDR", "address of xDS and CA")
	fs.StringVar(&c.MonitoringAddr, "monitoring-addr", fmt.Sprintf(":%d", mesh.PortIstiodMon), "MONITORING_ADDR", "address of metrics, readiness and debug pages")
	fs.ListVar(&c.DNSNames, "dns-names", "DNS_NAMES", "names in istiod's certificate, besides its own in the root namespace and localhost")
	fs.ListVar(&c.IPs, "ips", "IPS", "addresses in istiod's certificate, besides loopback")
	fs.ListVar(&c.TrustedAccounts, "ca-trusted-node-accounts", "CA_TRUSTED_NODE_ACCOUNTS", "namespace/name of the accounts of node proxies (default "+ca.DefaultTrustedAccount+")")
}

// Validate reports every fault, each naming the flag.
func (c *Config) Validate() error {
	var errs []error
	if c.Files == "" {
		errs = append(errs, errors.New("-files is required: the directory with the YAML of the mesh"))
	}
	if c.DataDir == "" {
		errs = append(errs, errors.New("-data-dir is required: the directory for istiod's keys"))
	}
	for _, ip := range c.IPs {
		if _, err := netip.ParseAddr(ip); err != nil {
			errs = append(errs, fmt.Errorf("-ips: %q is not an address", ip))
		}
	}
	return errors.Join(errs...)
}

// servingNames are the names and addresses clients may reach istiod by.
func (c *Config) servingNames() (names []string, ips []netip.Addr) {
	host := "istiod." + c.RootNamespace
	names = append([]string{host + ".svc", host + ".svc." + c.ClusterDomain, host, "localhost"}, c.DNSNames...)
	ips = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	for _, text := range c.IPs {
		if ip, err := netip.ParseAddr(text); err == nil {
			ips = append(ips, ip.Unmap())
		}
	}
	return names, ips
}
