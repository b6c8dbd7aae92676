package peers

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

// serverName is the DNS name in the inner proxies' certificate.
const serverName = "server.bench.test"

// suite is the one cipher suite the peers may use: what two ends in Go agree on, so that all encrypt with a key of equal length.
const suite = "TLS_AES_128_GCM_SHA256"

// Certs are paths of PEM files: a CA and one leaf for each side, ECDSA on P-256 as the mesh's own.
type Certs struct {
	CA                     string
	ClientCert, ClientKey  string
	ServerCert, ServerKey  string
	ClientBoth, ServerBoth string // certificate and key in one file, as HAProxy wants them
}

// NewCerts writes certificates good for a day to dir.
func NewCerts(dir string) (Certs, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Certs{}, err
	}
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench CA"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return Certs{}, err
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	c := Certs{
		CA: at("ca.pem"), ClientCert: at("client.pem"), ClientKey: at("client.key"), ServerCert: at("server.pem"), ServerKey: at("server.key"),
		ClientBoth: at("client-both.pem"), ServerBoth: at("server-both.pem"),
	}
	if err := os.WriteFile(c.CA, pemBlock("CERTIFICATE", caDER), 0o600); err != nil {
		return Certs{}, err
	}
	for i, leaf := range []struct{ account, cert, key, both string }{
		{"client", c.ClientCert, c.ClientKey, c.ClientBoth},
		{"server", c.ServerCert, c.ServerKey, c.ServerBoth},
	} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return Certs{}, err
		}
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 2)), Subject: pkix.Name{CommonName: leaf.account},
			NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
			KeyUsage:    x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
			DNSNames:    []string{leaf.account + ".bench.test"},
			URIs:        []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/bench/sa/" + leaf.account}},
		}, ca, &key.PublicKey, caKey)
		if err != nil {
			return Certs{}, err
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return Certs{}, err
		}
		certPEM, keyPEM := pemBlock("CERTIFICATE", der), pemBlock("PRIVATE KEY", keyDER)
		for path, text := range map[string][]byte{leaf.cert: certPEM, leaf.key: keyPEM, leaf.both: bytes.Join([][]byte{certPEM, keyPEM}, nil)} {
			if err := os.WriteFile(path, text, 0o600); err != nil {
				return Certs{}, fmt.Errorf("write certificates: %w", err)
			}
		}
	}
	return c, nil
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
