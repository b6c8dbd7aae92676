package controlplane

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/mesh"
)

// Config is which mesh a proxy belongs to, where its control plane is, and how that is known: PEM files of the roots, the
// token to show. It is a part of a proxy's own configuration.
type Config struct {
	ClusterID     string
	ClusterDomain string
	TrustDomain   string

	XDSAddress  string
	XDSRootCA   string
	XDSHostname string
	CAAddress   string
	CARootCA    string
	CAHostname  string
	TokenFile   string
	SecretTTL   time.Duration
}

// Register declares the flags and their environment variables, which have the names of Istio's.
func (c *Config) Register(fs *daemon.FlagSet) {
	fs.StringVar(&c.ClusterID, "cluster-id", mesh.DefaultClusterID, "CLUSTER_ID", "the cluster, as istiod knows it")
	fs.StringVar(&c.ClusterDomain, "cluster-domain", mesh.DefaultClusterDomain, "CLUSTER_DOMAIN", "the DNS domain of services")
	fs.StringVar(&c.TrustDomain, "trust-domain", mesh.DefaultTrustDomain, "TRUST_DOMAIN", "the trust domain of this mesh")
	fs.StringVar(&c.XDSAddress, "xds-address", "https://istiod.istio-system.svc:15012", "XDS_ADDRESS", "istiod's xDS server")
	fs.StringVar(&c.XDSRootCA, "xds-root-ca", "./var/run/secrets/istio/root-cert.pem", "XDS_ROOT_CA", "PEM file of the roots that istiod's certificate chains to")
	fs.StringVar(&c.XDSHostname, "alt-xds-hostname", "", "ALT_XDS_HOSTNAME", "name to expect in istiod's certificate, if not the address's")
	fs.StringVar(&c.CAAddress, "ca-address", "", "CA_ADDRESS", "the certificate authority, if not at the xDS address")
	fs.StringVar(&c.CARootCA, "ca-root-ca", "", "CA_ROOT_CA", "PEM file of the roots of the certificate authority, if not the xDS one")
	fs.StringVar(&c.CAHostname, "alt-ca-hostname", "", "ALT_CA_HOSTNAME", "name to expect in the authority's certificate")
	fs.StringVar(&c.TokenFile, "auth-token", "./var/run/secrets/tokens/istio-token", "AUTH_TOKEN", "file of the token to show istiod; read anew for every call")
	fs.DurationVar(&c.SecretTTL, "secret-ttl", 24*time.Hour, "SECRET_TTL", "certificate lifetime to ask for")
}

// Validate reports every fault of c and fills in what follows from other fields.
func (c *Config) Validate() error {
	if c.CAAddress == "" {
		c.CAAddress = c.XDSAddress
	}
	if c.CARootCA == "" {
		c.CARootCA = c.XDSRootCA
	}
	var errs []error
	for _, f := range []struct{ flag, value string }{{"xds-address", c.XDSAddress}, {"ca-address", c.CAAddress}} {
		if _, _, err := splitAddress(f.value); err != nil {
			errs = append(errs, fmt.Errorf("-%s: %w", f.flag, err))
		}
	}
	return errors.Join(errs...)
}

// splitAddress splits https://host:port into what to dial and the name to expect. Plaintext is refused: tokens travel here.
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
