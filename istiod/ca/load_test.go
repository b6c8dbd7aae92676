package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/istiod/ca"
)

func TestSelfSignedRootIsMadeOnce(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "ca")
	roots := make([][]byte, 8)
	var wg sync.WaitGroup
	for i := range roots {
		wg.Go(func() {
			a, err := ca.Open(ca.Config{Dir: dir, TrustDomain: "mesh.example"})
			if err != nil {
				t.Error(err)
				return
			}
			roots[i] = a.RootPEM()
		})
	}
	wg.Wait()
	for _, r := range roots {
		if !bytes.Equal(r, roots[0]) {
			t.Fatal("two calls of Open have two roots")
		}
	}
	root := parse(t, string(roots[0]))
	if years := time.Until(root.NotAfter).Hours() / 24 / 365; years < 9.9 || years > 10.1 {
		t.Errorf("root is valid for %.1f years, want 10", years)
	}
	if key, ok := root.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		t.Errorf("root key is %T, want ECDSA P-256", root.PublicKey)
	}
	for name, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, "self-signed-ca.pem"): 0o600} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("mode of %s = %04o, want %04o", name, got, want)
		}
	}
	if err := os.Chmod(filepath.Join(dir, "self-signed-ca.pem"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Open(ca.Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a root key all can read: %v, want a refusal", err)
	}
}

// plugFiles are an authority to plug in: root → middle → ca-cert.
type plugFiles struct {
	files   map[string][]byte
	root    *x509.Certificate
	rootKey crypto.Signer
}

func newPlug(t testing.TB) *plugFiles { return newPlugWith(t, ecKey(t, elliptic.P256()), nil, nil) }

func newPlugWith(t testing.TB, key crypto.Signer, middle, signing func(*x509.Certificate)) *plugFiles {
	t.Helper()
	p := &plugFiles{rootKey: ecKey(t, elliptic.P256())}
	p.root = authority(t, "root", nil, p.rootKey, p.rootKey, nil)
	middleKey := ecKey(t, elliptic.P384())
	middleCert := authority(t, "middle", p.root, middleKey, p.rootKey, middle)
	signingCert := authority(t, "signing", middleCert, key, middleKey, signing)
	p.files = map[string][]byte{
		"root-cert.pem": certPEM(p.root), "ca-cert.pem": certPEM(signingCert), "ca-key.pem": pkcs8(t, key),
		"cert-chain.pem": append(certPEM(signingCert), certPEM(middleCert)...),
	}
	return p
}

func authority(t testing.TB, name string, parent *x509.Certificate, key, parentKey crypto.Signer, edit func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if edit != nil {
		edit(template)
	}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func certPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

func pkcs8(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func plug(t testing.TB, dir string, p *plugFiles) {
	t.Helper()
	for name, data := range p.files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPluggedIn(t *testing.T) {
	t.Parallel()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	smallKey, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p256 := ecKey(t, elliptic.P256())
	sec1, err := x509.MarshalECPrivateKey(p256)
	if err != nil {
		t.Fatal(err)
	}
	with := func(p *plugFiles, name string, data []byte) *plugFiles {
		if p.files[name] = data; data == nil {
			delete(p.files, name)
		}
		return p
	}
	plain := func() *plugFiles { return newPlug(t) }
	rootOnly := plain()
	rootOnly.files = map[string][]byte{
		"root-cert.pem": certPEM(rootOnly.root), "ca-cert.pem": certPEM(rootOnly.root), "ca-key.pem": pkcs8(t, rootOnly.rootKey), "cert-chain.pem": {},
	}
	twoRoots := plain()
	twoRoots.files["root-cert.pem"] = append(certPEM(plain().root), twoRoots.files["root-cert.pem"]...)
	expired := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	cases := []struct {
		name  string
		files *plugFiles
		chain int    // elements signed
		want  string // error; "": none
	}{
		{"EC key in PKCS 8", plain(), 4, ""},
		{"EC key in SEC 1", with(newPlugWith(t, p256, nil, nil), "ca-key.pem", pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1})), 4, ""},
		{"EC key as openssl ecparam writes it", with(newPlugWith(t, p256, nil, nil), "ca-key.pem",
			append(pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte{6, 8, 42, 134, 72, 206, 61, 3, 1, 7}}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1})...)), 4, ""},
		{"RSA key in PKCS 8", newPlugWith(t, rsaKey, nil, nil), 4, ""},
		{"RSA key in PKCS 1", with(newPlugWith(t, rsaKey, nil, nil), "ca-key.pem",
			pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(rsaKey)})), 4, ""},
		{"the root signs itself, chain empty", rootOnly, 2, ""},
		{"two roots", twoRoots, 4, ""},
		{"no key", with(plain(), "ca-key.pem", nil), 0, "ca-key.pem is missing"},
		{"no root", with(plain(), "root-cert.pem", nil), 0, "root-cert.pem is missing"},
		{"no certificate", with(plain(), "ca-cert.pem", nil), 0, "ca-cert.pem is missing"},
		{"no chain where one is needed", with(plain(), "cert-chain.pem", nil), 0, "does not lead to a root"},
		{"another root", with(plain(), "root-cert.pem", certPEM(plain().root)), 0, "does not lead to a root"},
		{"key of another", with(plain(), "ca-key.pem", pkcs8(t, p256)), 0, "key does not belong to certificate"},
		{"key that is a certificate", with(plain(), "ca-key.pem", certPEM(plain().root)), 0, "want a private key"},
		{"key encrypted", with(plain(), "ca-key.pem", pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte{1}})), 0, "encrypted"},
		{"RSA key too small", newPlugWith(t, smallKey, nil, nil), 0, "1024 bits"},
		{"garbage certificate", with(plain(), "ca-cert.pem", []byte("garbage")), 0, "ca-cert.pem: no PEM certificate"},
		{"not a CA", newPlugWith(t, p256, nil, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature }), 0, "not one of a certificate authority"},
		{"may not sign", newPlugWith(t, p256, nil, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }), 0, "may not be used to sign"},
		{"expired", newPlugWith(t, p256, nil, expired), 0, "expired on"},
		{"expired above", newPlugWith(t, p256, expired, nil), 0, "does not lead to a root"},
		{"not valid yet", newPlugWith(t, p256, nil, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }), 0, "is the clock right?"},
		{"path too long", newPlugWith(t, p256, func(c *x509.Certificate) { c.MaxPathLenZero = true }, nil), 0, "would not be accepted"},
		{"only for servers", newPlugWith(t, p256, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, nil), 0, "would not be accepted"},
		{"for another trust domain", newPlugWith(t, p256, func(c *x509.Certificate) {
			c.PermittedDNSDomainsCritical, c.PermittedURIDomains = true, []string{"elsewhere.example"}
		}, nil), 0, "would not be accepted"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			plug(t, dir, c.files)
			a, err := ca.Open(ca.Config{Dir: dir})
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("Open: %v, want an error with %q", err, c.want)
				}
				if entries, _ := filepath.Glob(filepath.Join(dir, "self-signed*")); len(entries) > 0 {
					t.Errorf("a root was made in spite of the files: %v", entries)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			chain, err := a.Sign(t.Context(), web, request(t, &x509.CertificateRequest{}, ecKey(t, elliptic.P256())), 0)
			if err != nil {
				t.Fatal(err)
			}
			if len(chain) != c.chain {
				t.Errorf("chain of %d elements, want %d", len(chain), c.chain)
			}
			roots := x509.NewCertPool()
			roots.AppendCertsFromPEM([]byte(chain[len(chain)-1]))
			between := x509.NewCertPool()
			for _, e := range chain[1 : len(chain)-1] {
				between.AppendCertsFromPEM([]byte(e))
			}
			for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
				if _, err := parse(t, chain[0]).Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
					t.Errorf("the issued chain does not verify: %v", err)
				}
			}
		})
	}
}

// Every fault is told at once, not one per restart.
func TestAllFaultsAreReported(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ca-cert.pem"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := ca.Open(ca.Config{Dir: dir})
	for _, want := range []string{"ca-cert.pem: no PEM", "ca-key.pem is missing", "root-cert.pem is missing", dir} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Open: %v, want it to tell %q", err, want)
		}
	}
}
