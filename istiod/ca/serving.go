package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// ServingConfig is istiod's own TLS configuration: a certificate for those names and addresses, signed by the
// authority, replaced with the first handshake after half of its life, or after the authority's own was. Clients show no certificate.
func (a *Authority) ServingConfig(dnsNames []string, ips []netip.Addr) *tls.Config {
	s := &serving{authority: a, dnsNames: slices.Clone(dnsNames), ips: slices.Clone(ips)}
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		NextProtos:     []string{"h2"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.current(time.Now()) },
	}
}

type serving struct {
	authority *Authority
	dnsNames  []string
	ips       []netip.Addr

	mu    sync.Mutex
	cert  *tls.Certificate
	by    *x509.Certificate // what signed it
	renew time.Time
}

func (s *serving) current(now time.Time) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	by, _ := s.authority.current(now)
	if s.cert != nil && now.Before(s.renew) && s.by.Equal(by.cert) {
		return s.cert, nil
	}
	cert, err := s.issue(by, now)
	if err != nil {
		return nil, fmt.Errorf("renew istiod's certificate: %w", err)
	}
	s.cert, s.by, s.renew = cert, by.cert, now.Add(cert.Leaf.NotAfter.Sub(now)/2)
	return cert, nil
}

func (s *serving) issue(by signer, now time.Time) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{DNSNames: s.dnsNames, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, ip := range s.ips {
		template.IPAddresses = append(template.IPAddresses, ip.Unmap().AsSlice())
	}
	leaf, err := by.certify(template, key.Public(), s.authority.cfg.DefaultTTL, now)
	if err != nil {
		return nil, err
	}
	cert := &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
	for _, c := range by.chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert, nil
}
