package waypoint

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

// known reports whether all that t asks for can be done here: Secrets and revocation lists cannot.
func known(t *mesh.UpstreamTLS) bool { return t == nil || t.Credential == "" && t.CRL == "" }

// originate shakes hands on conn, which it owns: it is closed when that fails.
func originate(ctx context.Context, conn relay.Conn, t *mesh.UpstreamTLS, hostname, protocol string) (relay.Conn, error) {
	cfg, err := originConfig(t, hostname)
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

// originConfig is made anew for each connection, so that files that were replaced are read again.
func originConfig(t *mesh.UpstreamTLS, hostname string) (*tls.Config, error) {
	cfg := &tls.Config{ServerName: hostname, MinVersion: tls.VersionTLS12, InsecureSkipVerify: t.InsecureSkipVerify}
	if t.ServerName != "" {
		cfg.ServerName = t.ServerName
	}
	pem := t.CAPEM
	if t.CACertificates != "" {
		var err error
		if pem, err = os.ReadFile(t.CACertificates); err != nil {
			return nil, fmt.Errorf("read the roots of the application: %w", err)
		}
	}
	if len(pem) > 0 { // else the system's
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, errors.New("read the roots of the application: no certificate in them")
		}
	}
	if t.Mode == mesh.TLSMutual {
		cert, err := tls.LoadX509KeyPair(t.ClientCertificate, t.PrivateKey)
		if err != nil {
			return nil, fmt.Errorf("read the certificate for the application: %w", err)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	if len(t.SANs) > 0 && !t.InsecureSkipVerify {
		cfg.InsecureSkipVerify = true // of the server's name; VerifyConnection checks the chain, and who is expected instead
		cfg.VerifyConnection = func(cs tls.ConnectionState) error { return verifySANs(cs.PeerCertificates, cfg.RootCAs, t.SANs) }
	}
	return cfg, nil
}

func verifySANs(chain []*x509.Certificate, roots *x509.CertPool, sans []string) error {
	if len(chain) == 0 {
		return errors.New("the application shows no certificate")
	}
	leaf, between := chain[0], x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between}); err != nil {
		return err
	}
	for _, san := range sans {
		for _, uri := range leaf.URIs {
			if uri.String() == san {
				return nil
			}
		}
		if slices.ContainsFunc(leaf.DNSNames, func(n string) bool { return strings.EqualFold(n, san) }) ||
			isIP(san) && leaf.VerifyHostname(san) == nil {
			return nil
		}
	}
	return fmt.Errorf("the application's certificate names none of %s", strings.Join(sans, ", "))
}

func isIP(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}
