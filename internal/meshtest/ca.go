package meshtest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
)

// CA is a real certificate authority in memory: a root, and an intermediate that signs. It implements identity.CA and
// signs whatever it is asked to.
type CA struct {
	t        testing.TB
	root     *x509.Certificate
	rootKey  *ecdsa.PrivateKey
	inter    *x509.Certificate
	interKey *ecdsa.PrivateKey
	trust    *identity.Trust

	signed atomic.Int64
}

// NewCA makes an authority whose own certificates are valid for ten years around the present time (that of the
// synctest bubble it is called in, if any).
func NewCA(t testing.TB) *CA {
	t.Helper()
	ca := &CA{t: t, rootKey: newKey(t), interKey: newKey(t), trust: new(identity.Trust)}
	now := time.Now()
	template := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: serial(t), Subject: pkix.Name{CommonName: name},
			NotBefore: now.AddDate(-5, 0, 0), NotAfter: now.AddDate(5, 0, 0),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		}
	}
	ca.root = sign(t, template("test root"), nil, &ca.rootKey.PublicKey, ca.rootKey)
	ca.inter = sign(t, template("test intermediate"), ca.root, &ca.interKey.PublicKey, ca.rootKey)
	return ca
}

// IssueOption changes the certificate about to be signed.
type IssueOption func(*x509.Certificate)

// Valid sets from when to when the certificate is valid. Without it: from two minutes ago, for a day.
func Valid(from, to time.Time) IssueOption {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = from, to }
}

// URIs replaces the URI SANs; none leaves a DNS name in their place.
func URIs(uris ...string) IssueOption {
	return func(c *x509.Certificate) {
		c.URIs, c.DNSNames = nil, nil
		for _, u := range uris {
			parsed, err := url.Parse(u)
			if err != nil {
				panic(err)
			}
			c.URIs = append(c.URIs, parsed)
		}
		if len(uris) == 0 {
			c.DNSNames = []string{"somebody.example"}
		}
	}
}

// Usage replaces the extended key usages, which are otherwise client and server.
func Usage(usages ...x509.ExtKeyUsage) IssueOption {
	return func(c *x509.Certificate) { c.ExtKeyUsage = usages }
}

// Server makes it a server's certificate for these DNS names, and for 127.0.0.1 and ::1, as istiod has.
func Server(names ...string) IssueOption {
	return func(c *x509.Certificate) {
		c.URIs, c.DNSNames = nil, names
		c.IPAddresses = append(c.IPAddresses, net.IPv4(127, 0, 0, 1), net.IPv6loopback)
		c.Subject = pkix.Name{CommonName: "server"}
	}
}

// Issue makes a key and a certificate for id, with the intermediate in its chain.
func (ca *CA) Issue(id mesh.Identity, opts ...IssueOption) *tls.Certificate {
	ca.t.Helper()
	key := newKey(ca.t)
	leaf := ca.leaf(id, &key.PublicKey, 24*time.Hour, opts...)
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw, ca.inter.Raw}, PrivateKey: key, Leaf: leaf}
}

// SVID makes an SVID for id out of Issue, unchecked: it may be expired or otherwise wrong.
func (ca *CA) SVID(id mesh.Identity, opts ...IssueOption) *identity.SVID {
	ca.t.Helper()
	cert := ca.Issue(id, opts...)
	return &identity.SVID{
		ID: id, Certificate: *cert, Roots: ca.Roots(), RootCerts: []*x509.Certificate{ca.root},
		NotBefore: cert.Leaf.NotBefore, NotAfter: cert.Leaf.NotAfter, Trust: ca.trust,
	}
}

// Sign implements identity.CA. The certificate request's signature is checked, nothing else.
func (ca *CA) Sign(ctx context.Context, id mesh.Identity, csrPEM []byte, ttl time.Duration) ([]string, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	block, _ := pem.Decode(csrPEM)
	if block == nil {
		return nil, errors.New("no PEM in the certificate request")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, err
	}
	leaf := ca.leaf(id, csr.PublicKey, ttl)
	ca.signed.Add(1)
	return []string{encode(leaf), encode(ca.inter), encode(ca.root)}, nil
}

// Signed is how many requests Sign has granted.
func (ca *CA) Signed() int { return int(ca.signed.Load()) }

// Roots is the pool of the root certificate.
func (ca *CA) Roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.root)
	return pool
}

// RootPEM is the root certificate.
func (ca *CA) RootPEM() []byte { return []byte(encode(ca.root)) }

// IntermediatePEM is the signing certificate, and its key in PKCS #8.
func (ca *CA) IntermediatePEM() (cert, key []byte) {
	der, err := x509.MarshalPKCS8PrivateKey(ca.interKey)
	if err != nil {
		ca.t.Fatalf("encode intermediate key: %v", err)
	}
	return []byte(encode(ca.inter)), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func (ca *CA) leaf(id mesh.Identity, pub crypto.PublicKey, ttl time.Duration, opts ...IssueOption) *x509.Certificate {
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial(ca.t), NotBefore: now.Add(-2 * time.Minute), NotAfter: now.Add(ttl),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	if !id.IsZero() {
		URIs(id.String())(template)
	}
	for _, o := range opts {
		o(template)
	}
	return sign(ca.t, template, ca.inter, pub, ca.interKey)
}

// sign makes a certificate; a nil parent makes it self-signed.
func sign(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Errorf("sign certificate: %v", err)
		panic(err) // Sign runs on goroutines that are not the test's: Fatal is not theirs to call
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return cert
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Errorf("make key: %v", err)
		panic(err)
	}
	return key
}

func serial(t testing.TB) *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		t.Errorf("make serial number: %v", err)
		panic(err)
	}
	return n.Add(n, big.NewInt(1))
}

func encode(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}
