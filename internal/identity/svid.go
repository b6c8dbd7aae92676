package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/mistnet/mistnet/internal/mesh"
)

// SVID is a certificate with its private key, and the roots that peers are verified against (SPIFFE X509-SVID). It is
// read-only once made.
type SVID struct {
	ID          mesh.Identity
	Certificate tls.Certificate // leaf and intermediates, never a root
	Roots       *x509.CertPool
	RootCerts   []*x509.Certificate // what Roots holds, for display
	NotBefore   time.Time
	NotAfter    time.Time

	// Trust is what the SVIDs of one program share. nil means no aliases, no post-quantum key exchange, no cache.
	Trust *Trust
}

// Expired reports whether the certificate is of no use any more at now.
func (s *SVID) Expired(now time.Time) bool { return now.After(s.NotAfter) }

// NewSVID makes an SVID of a certificate authority's answer: PEM, leaf first, then intermediates, the roots to trust
// in the last element. It fails unless the leaf is valid now, carries id and belongs to key, and chains to those roots.
func NewSVID(id mesh.Identity, key crypto.Signer, chainPEM []string, trust *Trust) (*SVID, error) {
	if len(chainPEM) < 2 {
		return nil, fmt.Errorf("read certificate chain of %s: %d elements, want at least a leaf and the roots", id, len(chainPEM))
	}
	last := len(chainPEM) - 1
	chain, err := parseCertificates(strings.Join(chainPEM[:last], "\n"))
	if err != nil {
		return nil, fmt.Errorf("read certificate chain of %s: %w", id, err)
	}
	roots, err := parseCertificates(chainPEM[last])
	if err != nil {
		return nil, fmt.Errorf("read root certificates for %s: %w", id, err)
	}
	leaf := chain[0]
	if got, err := certificateIdentity(leaf); err != nil {
		return nil, fmt.Errorf("read certificate of %s: %w", id, err)
	} else if got != id {
		return nil, fmt.Errorf("certificate is of %s, asked for %s", got, id)
	}
	if pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("certificate of %s is not for the key that was sent", id)
	}
	pool := trust.pool(roots)
	now := time.Now()
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if _, err := verifyChain(chain, pool, usage, now); err != nil {
			return nil, err
		}
	}
	s := &SVID{
		ID: id, Roots: pool, RootCerts: roots, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, Trust: trust,
		Certificate: tls.Certificate{PrivateKey: key, Leaf: leaf},
	}
	for _, c := range chain {
		if !isRoot(c, roots) {
			s.Certificate.Certificate = append(s.Certificate.Certificate, c.Raw)
		}
	}
	return s, nil
}

func isRoot(c *x509.Certificate, roots []*x509.Certificate) bool {
	for _, r := range roots {
		if bytes.Equal(c.Raw, r.Raw) {
			return true
		}
	}
	return false
}

// parseCertificates reads every certificate of a PEM text; there must be one at least.
func parseCertificates(text string) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block is %q, want CERTIFICATE", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, errors.New("no PEM certificate in it")
	}
	return certs, nil
}

// certificateIdentity reads the one URI SAN a leaf must have (X509-SVID, section 2).
func certificateIdentity(c *x509.Certificate) (mesh.Identity, error) {
	id, err := x509svid.IDFromCert(c)
	if err != nil {
		return mesh.Identity{}, err
	}
	return mesh.ParseIdentity(id.String())
}

// newKey makes the private key of a workload: ECDSA P-256, the cheapest to sign and verify with.
func newKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// NewCSR makes a PEM certificate request for id: no subject, one critical URI SAN.
func NewCSR(id mesh.Identity, key crypto.Signer) ([]byte, error) {
	uri, err := url.Parse(id.String())
	if err != nil {
		return nil, fmt.Errorf("make certificate request for %s: %w", id, err)
	}
	san, err := uriSAN(uri.String())
	if err != nil {
		return nil, fmt.Errorf("make certificate request for %s: %w", id, err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:         pkix.Name{},
		ExtraExtensions: []pkix.Extension{san},
	}, key)
	if err != nil {
		return nil, fmt.Errorf("make certificate request for %s: %w", id, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}
