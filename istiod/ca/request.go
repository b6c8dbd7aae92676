package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"slices"
)

const (
	maxRequestBytes = 16 << 10 // a request with an RSA 4096 key is under 2 kB
	minRSABits      = 2048
	maxRSABits      = 4096 // a larger one costs us, not the requester
)

// brokenSignatures can be forged, or are of a kind crypto/x509 does not know.
var brokenSignatures = []x509.SignatureAlgorithm{x509.UnknownSignatureAlgorithm, x509.MD5WithRSA, x509.SHA1WithRSA, x509.ECDSAWithSHA1}

// requestKey takes the public key out of a PEM certificate request and checks that the requester holds the private one.
// It is all that is read of the request.
func requestKey(csrPEM []byte) (crypto.PublicKey, error) {
	if len(csrPEM) > maxRequestBytes {
		return nil, refuse("certificate request of %d bytes, at most %d are allowed", len(csrPEM), maxRequestBytes)
	}
	block, rest := pem.Decode(csrPEM)
	if block == nil || block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" {
		return nil, refuse("no PEM certificate request")
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return nil, refuse("something follows the certificate request")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, refuse("certificate request cannot be read: %v", err)
	}
	// The key first: verifying with an outsize one is costly.
	if err := checkRequestKey(csr.PublicKey); err != nil {
		return nil, err
	}
	if slices.Contains(brokenSignatures, csr.SignatureAlgorithm) {
		return nil, refuse("certificate request is signed with %s, which proves nothing", csr.SignatureAlgorithm)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, refuse("certificate request is not signed by its own key: %v", err)
	}
	return csr.PublicKey, nil
}

func checkRequestKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return refuse("key on curve %s, want P-256 or P-384", k.Curve.Params().Name)
		}
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return refuse("RSA key of %d bits, want %d to %d", bits, minRSABits, maxRSABits)
		}
	case ed25519.PublicKey:
	default:
		return refuse("key of type %T, want ECDSA, RSA or Ed25519", pub)
	}
	return nil
}
