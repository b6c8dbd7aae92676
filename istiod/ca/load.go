package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path/filepath"
	"slices"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/keyfile"
)

// The files of an authority that is plugged in, with Istio's names.
const (
	certFile  = "ca-cert.pem"
	keyFile   = "ca-key.pem"
	rootFile  = "root-cert.pem"
	chainFile = "cert-chain.pem"
)

var fileNames = []string{certFile, keyFile, rootFile, chainFile}

// tlsNames are what the same files are called in a Secret of type kubernetes.io/tls, as cert-manager makes them.
var tlsNames = map[string]string{certFile: "tls.crt", keyFile: "tls.key", rootFile: "ca.crt"}

// selfSignedFile holds the root we made: certificate and key in one file, so that there cannot be one without the other.
const selfSignedFile = "self-signed-ca.pem"

const selfSignedYears = 10

func load(dir, trustDomain string, now time.Time) (signer, error) {
	plugged, err := Files(dir)
	if err != nil {
		return signer{}, err
	}
	if len(plugged) > 0 {
		return readPlugged(plugged, trustDomain, now)
	}
	data, err := keyfile.LoadOrCreate(filepath.Join(dir, selfSignedFile), func() ([]byte, error) { return makeRoot(trustDomain, now) })
	if err != nil {
		return signer{}, err
	}
	s, err := readSelfSigned(data, trustDomain, now)
	if err != nil {
		return signer{}, fmt.Errorf("%s: %w", selfSignedFile, err)
	}
	return s, nil
}

// Files returns the files in dir of an authority that is plugged in there, by name; nothing when there is none.
func Files(dir string) (map[string][]byte, error) {
	plugged := make(map[string][]byte, len(fileNames))
	for _, name := range fileNames {
		data, err := keyfile.LoadMounted(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		plugged[name] = data
	}
	return plugged, nil
}

// SecretFiles returns the files of an authority out of the data of a Secret: under Istio's names, or else those of the
// type kubernetes.io/tls. A root that is missing is the certificate itself, as in Secrets of old versions of Istio.
// Empty files do not count. It returns nothing when there is no key.
func SecretFiles(data map[string][]byte) map[string][]byte {
	files := make(map[string][]byte, len(fileNames))
	for _, name := range fileNames {
		if len(data[name]) > 0 {
			files[name] = data[name]
		}
	}
	if files[keyFile] == nil {
		for name, other := range tlsNames {
			if len(data[other]) > 0 {
				files[name] = data[other]
			}
		}
	}
	switch {
	case files[keyFile] == nil:
		return nil
	case files[rootFile] == nil && files[certFile] != nil:
		files[rootFile] = files[certFile]
	}
	return files
}

// NewRoot makes the files of an authority with a root of its own, to be kept where all replicas find them.
func NewRoot(trustDomain string) (map[string][]byte, error) {
	text, err := makeRoot(trustDomain, time.Now())
	if err != nil {
		return nil, err
	}
	block, key := pem.Decode(text)
	cert := pem.EncodeToMemory(block)
	return map[string][]byte{certFile: cert, keyFile: key, rootFile: cert}, nil
}

// readPlugged checks the files as a whole and reports every fault it can find.
func readPlugged(files map[string][]byte, trustDomain string, now time.Time) (signer, error) {
	var faults []error
	for _, name := range []string{certFile, keyFile, rootFile} {
		if files[name] == nil {
			faults = append(faults, fmt.Errorf("%s is missing: an authority is plugged in with %s, %s and %s, and %s if there are intermediates",
				name, certFile, keyFile, rootFile, chainFile))
		}
	}
	read := func(name string, into func([]byte) error) {
		if data := files[name]; data != nil {
			if err := into(data); err != nil {
				faults = append(faults, fmt.Errorf("%s: %w", name, err))
			}
		}
	}
	var s signer
	var certs, chain []*x509.Certificate
	read(certFile, func(data []byte) (err error) { certs, err = parseCertificates(data); return err })
	read(keyFile, func(data []byte) (err error) { s.key, err = parseKey(data); return err })
	read(rootFile, func(data []byte) (err error) { s.roots, err = parseCertificates(data); return err })
	read(chainFile, func(data []byte) (err error) {
		if len(data) > 0 { // Istio's tools leave it empty when there are no intermediates
			chain, err = parseCertificates(data)
		}
		return err
	})
	if len(faults) > 0 {
		return signer{}, errors.Join(faults...)
	}
	s.cert = certs[0]
	for _, c := range slices.Concat(certs, chain) { // ca-cert.pem may hold the chain too
		if !contains(s.roots, c) && !contains(s.chain, c) {
			s.chain = append(s.chain, c)
		}
	}
	return s, s.check(trustDomain, now)
}

func contains(certs []*x509.Certificate, c *x509.Certificate) bool {
	return slices.ContainsFunc(certs, c.Equal)
}

func readSelfSigned(data []byte, trustDomain string, now time.Time) (signer, error) {
	var s signer
	block, rest := pem.Decode(data)
	if block == nil {
		return signer{}, errors.New("no PEM in it")
	}
	roots, err := parseCertificates(pem.EncodeToMemory(block))
	if err != nil {
		return signer{}, err
	}
	s.cert, s.roots = roots[0], roots
	if s.key, err = parseKey(rest); err != nil {
		return signer{}, err
	}
	return s, s.check(trustDomain, now)
}

// check finds what would make certificates that nobody accepts.
func (s *signer) check(trustDomain string, now time.Time) error {
	var faults []error
	name := fmt.Sprintf("certificate %q", s.cert.Subject)
	if !s.cert.IsCA || !s.cert.BasicConstraintsValid {
		faults = append(faults, fmt.Errorf("%s is not one of a certificate authority", name))
	} else if s.cert.KeyUsage != 0 && s.cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		faults = append(faults, fmt.Errorf("%s may not be used to sign certificates", name))
	}
	if pub, ok := s.key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(s.cert.PublicKey) {
		faults = append(faults, fmt.Errorf("the key does not belong to %s", name))
	}
	switch {
	case now.After(s.cert.NotAfter):
		return errors.Join(append(faults, fmt.Errorf("%s expired on %s", name, s.cert.NotAfter.Format(time.RFC3339)))...)
	case now.Before(s.cert.NotBefore):
		return errors.Join(append(faults, fmt.Errorf("%s is not valid before %s; is the clock right?", name, s.cert.NotBefore.Format(time.RFC3339)))...)
	}
	if len(faults) > 0 {
		return errors.Join(faults...)
	}
	if err := s.findChain(now); err != nil {
		return fmt.Errorf("%s does not lead to a root certificate; are %s and %s of this authority? (%w)", name, chainFile, rootFile, err)
	}
	if err := s.tryOut(trustDomain, now); err != nil {
		return fmt.Errorf("certificates signed with %s would not be accepted: %w", name, err)
	}
	return nil
}

// findChain settles the way from cert to a root; what is not part of it is dropped.
func (s *signer) findChain(now time.Time) error {
	chains, err := s.verify(s.cert, x509.ExtKeyUsageAny, now)
	if err != nil {
		return err
	}
	way := chains[0]
	s.chain, s.root = way[:len(way)-1], way[len(way)-1]
	s.notAfter = s.cert.NotAfter
	for _, c := range way {
		if c.NotAfter.Before(s.notAfter) {
			s.notAfter = c.NotAfter
		}
	}
	return nil
}

// tryOut signs a workload's certificate and verifies it as a peer would: path lengths, name constraints and key usages
// of the certificates above show only then.
func (s *signer) tryOut(trustDomain string, now time.Time) error {
	id := mesh.Identity{TrustDomain: trustDomain, Namespace: mesh.RootNamespace, ServiceAccount: mesh.DefaultServiceAccount}
	uri, err := url.Parse(id.String())
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	leaf, err := s.certify(workloadTemplate(uri), key.Public(), time.Minute, now)
	if err != nil {
		return err
	}
	for _, usage := range workloadUsage() {
		if _, err := s.verify(leaf, usage, now); err != nil {
			return err
		}
	}
	return nil
}

func (s *signer) verify(c *x509.Certificate, usage x509.ExtKeyUsage, now time.Time) ([][]*x509.Certificate, error) {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range s.roots {
		roots.AddCert(c)
	}
	for _, c := range s.chain {
		intermediates.AddCert(c)
	}
	return c.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
	})
}

// makeRoot makes a key and a self-signed root certificate.
func makeRoot(trustDomain string, now time.Time) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make root key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{trustDomain}, CommonName: "Mistnet root " + serial.Text(16)[:8]},
		NotBefore:    now.Add(-backdate), NotAfter: now.AddDate(selfSignedYears, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make root certificate: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode root key: %w", err)
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...), nil
}

// parseCertificates reads every certificate of a PEM text; there must be one at least.
func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
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

// parseKey reads a PEM private key: PKCS #8, PKCS #1 (RSA) or SEC 1 (EC), not encrypted.
func parseKey(data []byte) (crypto.Signer, error) {
	block, data := pem.Decode(data)
	if block != nil && block.Type == "EC PARAMETERS" { // openssl ecparam -genkey writes them before the key
		block, _ = pem.Decode(data)
	}
	if block == nil {
		return nil, errors.New("no PEM private key in it")
	}
	var key any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		if block.Headers["DEK-Info"] != "" {
			return nil, errors.New("the private key is encrypted; store it decrypted, readable by istiod only")
		}
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		if block.Headers["DEK-Info"] != "" {
			return nil, errors.New("the private key is encrypted; store it decrypted, readable by istiod only")
		}
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "ENCRYPTED PRIVATE KEY":
		return nil, errors.New("the private key is encrypted; store it decrypted, readable by istiod only")
	default:
		return nil, fmt.Errorf("PEM block is %q, want a private key", block.Type)
	}
	if err != nil {
		return nil, fmt.Errorf("read private key: %w", err)
	}
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		return k, nil
	case *rsa.PrivateKey:
		if bits := k.N.BitLen(); bits < minRSABits {
			return nil, fmt.Errorf("RSA key of %d bits, want %d at least", bits, minRSABits)
		}
		return k, nil
	}
	return nil, fmt.Errorf("private key of type %T, want ECDSA or RSA", key)
}
