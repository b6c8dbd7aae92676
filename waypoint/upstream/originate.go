package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/relay"
)

// originated is the TLS that a waypoint begins with an application, inside whatever carries the connection. nil: none.
func originated(s *mesh.TrafficSettings) *mesh.UpstreamTLS {
	if s.TLS != nil && (s.TLS.Mode == mesh.TLSSimple || s.TLS.Mode == mesh.TLSMutual) {
		return s.TLS
	}
	return nil
}

// origin is the TLS that is begun with one service's endpoints.
type origin struct {
	*mesh.UpstreamTLS
	secret   *mesh.Credential // instead of files; nil: none
	hostname string           // of the service
}

// originate shakes hands on conn, which it owns: it is closed when that fails.
func originate(ctx context.Context, conn relay.Conn, o origin, protocol string) (relay.Conn, error) {
	cfg, err := o.config()
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	if protocol != "" {
		cfg.NextProtos = []string{protocol}
	}
	c := tls.Client(conn, cfg)
	if err := c.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("shake hands with the application: %w", err)
	}
	if got := c.ConnectionState().NegotiatedProtocol; got != protocol && protocol != "" {
		_ = conn.Close()
		return nil, fmt.Errorf("shake hands with the application: it does not speak %s", protocol)
	}
	return c, nil
}

// config is made anew for each connection, so that files that were replaced are read again.
func (o origin) config() (*tls.Config, error) {
	cfg := &tls.Config{ServerName: o.hostname, MinVersion: tls.VersionTLS12, InsecureSkipVerify: o.InsecureSkipVerify}
	if o.ServerName != "" {
		cfg.ServerName = o.ServerName
	}
	pem, err := orFile(o.CAPEM, o.CACertificates)
	if err != nil {
		return nil, fmt.Errorf("read the roots of the application: %w", err)
	}
	if o.secret != nil {
		pem = o.secret.Roots
	}
	if len(pem) > 0 { // else the system's
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, errors.New("read the roots of the application: no certificate in them")
		}
	}
	if o.Mode == mesh.TLSMutual {
		cert, err := o.certificate()
		if err != nil {
			return nil, fmt.Errorf("read the certificate for the application: %w", err)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	return cfg, o.verify(cfg)
}

// orFile is the text, or that of a file when one is named.
func orFile(text []byte, file string) ([]byte, error) {
	if file == "" {
		return text, nil
	}
	return os.ReadFile(file)
}

func (o origin) certificate() (tls.Certificate, error) {
	if o.secret != nil {
		return tls.X509KeyPair(o.secret.Certificate, o.secret.PrivateKey)
	}
	return tls.LoadX509KeyPair(o.ClientCertificate, o.PrivateKey)
}

// verify has the application's certificate judged by more than its chain and the server's name, where more is asked for.
func (o origin) verify(cfg *tls.Config) error {
	if o.InsecureSkipVerify {
		return nil
	}
	lists, err := o.revocations()
	if err != nil {
		return fmt.Errorf("read the revocation lists of the application: %w", err)
	}
	if len(o.SANs) > 0 {
		cfg.InsecureSkipVerify = true // of the server's name; VerifyConnection checks the chain, and who is expected instead
	}
	if len(o.SANs) == 0 && lists == nil {
		return nil
	}
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		chains := cs.VerifiedChains
		if len(o.SANs) > 0 {
			var err error
			if chains, err = verifySANs(cs.PeerCertificates, cfg.RootCAs, o.SANs); err != nil {
				return err
			}
		}
		return lists.check(chains, time.Now())
	}
	return nil
}

func verifySANs(shown []*x509.Certificate, roots *x509.CertPool, sans []string) (chains [][]*x509.Certificate, err error) {
	if len(shown) == 0 {
		return nil, errors.New("the application shows no certificate")
	}
	leaf, between := shown[0], x509.NewCertPool()
	for _, c := range shown[1:] {
		between.AddCert(c)
	}
	if chains, err = leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between}); err != nil {
		return nil, err
	}
	for _, san := range sans {
		for _, uri := range leaf.URIs {
			if uri.String() == san {
				return chains, nil
			}
		}
		if slices.ContainsFunc(leaf.DNSNames, func(n string) bool { return strings.EqualFold(n, san) }) ||
			isIP(san) && leaf.VerifyHostname(san) == nil {
			return chains, nil
		}
	}
	return nil, fmt.Errorf("the application's certificate names none of %s", strings.Join(sans, ", "))
}

func isIP(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}
