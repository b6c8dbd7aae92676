package ca_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/ca"
)

var web = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}

var _ identity.CA = (*ca.Authority)(nil)

func open(t testing.TB, cfg ca.Config) *ca.Authority {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	a, err := ca.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func ecKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func request(t testing.TB, template *x509.CertificateRequest, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func parse(t testing.TB, text string) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Fatalf("no PEM in %q", text)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestSign(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := open(t, ca.Config{})
		key := ecKey(t, elliptic.P256())
		// A greedy request: none of it but the key may reach the certificate.
		uri, _ := url.Parse("spiffe://cluster.local/ns/istio-system/sa/ztunnel")
		csr := request(t, &x509.CertificateRequest{
			Subject: pkix.Name{CommonName: "root"}, DNSNames: []string{"istiod.istio-system.svc"}, URIs: []*url.URL{uri},
			ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}},
		}, key)
		chain, err := a.Sign(t.Context(), web, csr, 0)
		if err != nil {
			t.Fatal(err)
		}
		if len(chain) != 2 || chain[1] != string(a.RootPEM()) {
			t.Fatalf("chain of %d elements, want the leaf and the root", len(chain))
		}
		leaf := parse(t, chain[0])
		now := time.Now().UTC()
		type facts struct {
			URIs, DNS           []string
			Subject             string
			NotBefore, NotAfter time.Time
			CA                  bool
			Usage               x509.KeyUsage
			ExtUsage            []x509.ExtKeyUsage
			CriticalSAN         bool
		}
		got := facts{
			Subject: leaf.Subject.String(), DNS: leaf.DNSNames, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter,
			CA: leaf.IsCA, Usage: leaf.KeyUsage, ExtUsage: leaf.ExtKeyUsage,
		}
		for _, u := range leaf.URIs {
			got.URIs = append(got.URIs, u.String())
		}
		for _, e := range leaf.Extensions {
			got.CriticalSAN = got.CriticalSAN || e.Critical && e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17})
		}
		want := facts{
			URIs: []string{web.String()}, NotBefore: now.Add(-2 * time.Minute), NotAfter: now.Add(24 * time.Hour),
			Usage:    x509.KeyUsageDigitalSignature,
			ExtUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, CriticalSAN: true,
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("certificate (-want +got):\n%s", d)
		}
		if !key.PublicKey.Equal(leaf.PublicKey) {
			t.Error("certificate is for another key")
		}
		again, err := a.Sign(t.Context(), web, csr, 0)
		if err != nil {
			t.Fatal(err)
		}
		if parse(t, again[0]).SerialNumber.Cmp(leaf.SerialNumber) == 0 {
			t.Error("two certificates have the same serial number")
		}
	})
}

func TestLifetimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := open(t, ca.Config{})
		csr := request(t, &x509.CertificateRequest{}, ecKey(t, elliptic.P256()))
		day := 24 * time.Hour
		rootEnd := parse(t, string(a.RootPEM())).NotAfter
		sign := func(ttl time.Duration) (time.Duration, error) {
			chain, err := a.Sign(t.Context(), web, csr, ttl)
			if err != nil {
				return 0, err
			}
			return time.Until(parse(t, chain[0]).NotAfter), nil
		}
		for _, c := range []struct{ ask, want time.Duration }{
			{0, day}, {time.Hour, time.Hour}, {90 * day, 90 * day}, {90*day + time.Second, -1}, {-time.Second, -1},
		} {
			got, err := sign(c.ask)
			if c.want < 0 {
				if _, ok := errors.AsType[*ca.RequestError](err); !ok {
					t.Errorf("lifetime %s: %v, %v, want a request error", c.ask, got, err)
				}
				continue
			}
			if err != nil || got != c.want {
				t.Errorf("lifetime %s: %s, %v, want %s", c.ask, got, err, c.want)
			}
		}
		time.Sleep(time.Until(rootEnd) - time.Hour)
		if got, err := sign(day); err != nil || got != time.Hour {
			t.Errorf("an hour before the root's end: %s, %v, want an hour", got, err)
		}
		time.Sleep(time.Hour + time.Second)
		if _, err := sign(day); err == nil || !strings.Contains(err.Error(), "expired") {
			t.Errorf("after the root's end: %v, want expired", err)
		}
	})
}

func TestRequestsRefused(t *testing.T) {
	t.Parallel()
	a := open(t, ca.Config{})
	p256 := ecKey(t, elliptic.P256())
	rsaKey := func(bits int) *rsa.PrivateKey {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	rsa2048 := rsaKey(2048)
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := request(t, &x509.CertificateRequest{}, p256)
	block, _ := pem.Decode(good)
	tampered := append([]byte(nil), block.Bytes...)
	tampered[len(tampered)-1] ^= 1
	asPEM := func(typ string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}) }
	sha1 := []byte(nil)
	if der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{SignatureAlgorithm: x509.SHA1WithRSA}, rsa2048); err == nil {
		sha1 = asPEM("CERTIFICATE REQUEST", der)
	}
	cases := []struct {
		name string
		id   mesh.Identity
		csr  []byte
		want string // "": accepted
	}{
		{"P-256", web, good, ""},
		{"P-384", web, request(t, &x509.CertificateRequest{}, ecKey(t, elliptic.P384())), ""},
		{"RSA 2048", web, request(t, &x509.CertificateRequest{}, rsa2048), ""},
		{"Ed25519", web, request(t, &x509.CertificateRequest{}, ed), ""},
		{"P-224", web, request(t, &x509.CertificateRequest{}, ecKey(t, elliptic.P224())), "P-224"},
		{"RSA of 1024 bits", web, request(t, &x509.CertificateRequest{}, rsaKey(1024)), "1024 bits"},
		{"empty", web, nil, "no PEM"},
		{"not PEM", web, []byte("hello"), "no PEM"},
		{"a certificate", web, a.RootPEM(), "no PEM certificate request"},
		{"garbage in PEM", web, asPEM("CERTIFICATE REQUEST", []byte{1, 2, 3}), "cannot be read"},
		{"signed by another key", web, asPEM("CERTIFICATE REQUEST", tampered), "request"},
		{"two requests", web, append(append([]byte(nil), good...), good...), "something follows"},
		{"far too long", web, make([]byte, 1<<20), "bytes"},
		{"for nobody", mesh.Identity{}, good, "no identity"},
		{"for a foreign trust domain", mesh.Identity{TrustDomain: "elsewhere", Namespace: "a", ServiceAccount: "b"}, good, "foreign trust domain"},
	}
	if sha1 != nil { // crypto/x509 may refuse to make one at all
		cases = append(cases, struct {
			name string
			id   mesh.Identity
			csr  []byte
			want string
		}{"signed with SHA-1", web, sha1, "proves nothing"})
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, err := a.Sign(t.Context(), c.id, c.csr, 0)
			if c.want == "" {
				if err != nil {
					t.Errorf("Sign: %v", err)
				}
				return
			}
			if _, ok := errors.AsType[*ca.RequestError](err); !ok || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Sign: %v, want a request error with %q", err, c.want)
			}
		})
	}
}

// A stranger's eyes: OpenSSL must accept what we sign, and find in it what we mean.
func TestOpenSSLAcceptsCertificates(t *testing.T) {
	t.Parallel()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("the openssl command is not installed")
	}
	for _, kind := range []string{"self-signed", "plugged in"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if kind == "plugged in" {
				plug(t, dir, newPlug(t))
			}
			a := open(t, ca.Config{Dir: dir})
			chain, err := a.Sign(t.Context(), web, request(t, &x509.CertificateRequest{}, ecKey(t, elliptic.P256())), 0)
			if err != nil {
				t.Fatal(err)
			}
			file := func(name, content string) string {
				path := filepath.Join(dir, name)
				if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
				return path
			}
			leaf, root := file("leaf.pem", chain[0]), file("root.pem", chain[len(chain)-1])
			middle := file("middle.pem", strings.Join(chain[1:], ""))
			for _, purpose := range []string{"sslclient", "sslserver"} {
				out, err := exec.CommandContext(t.Context(), openssl, "verify", "-x509_strict", "-purpose", purpose,
					"-CAfile", root, "-untrusted", middle, leaf).CombinedOutput()
				if err != nil {
					t.Errorf("openssl verify -purpose %s: %v\n%s", purpose, err, out)
				}
			}
			out, err := exec.CommandContext(t.Context(), openssl, "x509", "-in", leaf, "-noout", "-text").CombinedOutput()
			if err != nil {
				t.Fatalf("openssl x509: %v\n%s", err, out)
			}
			for _, want := range []string{"Subject Alternative Name: critical", "URI:" + web.String(), "CA:FALSE"} {
				if !strings.Contains(string(out), want) {
					t.Errorf("openssl shows no %q in\n%s", want, out)
				}
			}
		})
	}
}

// Whatever is sent, Sign refuses it or signs exactly what it was told to.
func FuzzSign(f *testing.F) {
	a := open(f, ca.Config{})
	good := request(f, &x509.CertificateRequest{DNSNames: []string{"x"}}, ecKey(f, elliptic.P256()))
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, csr []byte) {
		chain, err := a.Sign(t.Context(), web, csr, 0)
		if err != nil {
			if _, ok := errors.AsType[*ca.RequestError](err); !ok {
				t.Errorf("Sign: %v, want a request error", err)
			}
			return
		}
		leaf := parse(t, chain[0])
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != web.String() || len(leaf.DNSNames) > 0 || leaf.IsCA {
			t.Errorf("signed URIs %v, DNS names %v, CA %v", leaf.URIs, leaf.DNSNames, leaf.IsCA)
		}
	})
}
