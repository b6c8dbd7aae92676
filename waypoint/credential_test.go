package waypoint_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

// authority signs certificates of applications, and of those who call them.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{t: t, key: newKey(t)}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
	a.cert = a.sign(template, template, a.key)
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a *authority) sign(template, parent *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	a.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

// issue makes a certificate for a name.
func (a *authority) issue(serial int64, name string) (cert, key []byte) {
	private := newKey(a.t)
	leaf := a.sign(&x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}, a.cert, private)
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		a.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func (a *authority) root() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// list is a revocation list that is in force until then.
func (a *authority) list(until time.Time, serials ...int64) []byte {
	a.t.Helper()
	l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: until}
	for _, s := range serials {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: big.NewInt(s), RevocationTime: l.ThisUpdate})
	}
	der, err := x509.CreateRevocationList(rand.Reader, l, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

// serve starts an application of a name, with a certificate of that serial number, which says who calls.
func (a *authority) serve(serial int64, name string, auth tls.ClientAuthType) netip.AddrPort {
	a.t.Helper()
	cert, key := a.issue(serial, name)
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		a.t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who := "nobody"
		if len(r.TLS.PeerCertificates) > 0 {
			who = r.TLS.PeerCertificates[0].Subject.CommonName
		}
		fmt.Fprint(w, who)
	}))
	srv.Listener.Close()
	srv.Listener = listen(a.t, loopback()+":0")
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: auth, ClientCAs: x509.NewCertPool()}
	srv.TLS.ClientCAs.AddCert(a.cert)
	srv.StartTLS()
	a.t.Cleanup(srv.Close)
	return addrPort(srv.Listener.Addr())
}

func (l *lab) credential(c *mesh.Credential) {
	l.t.Helper()
	c.Namespace = "shop"
	body, err := wds.EncodeCredential(c)
	if err != nil {
		l.t.Fatal(err)
	}
	l.publish(mesh.TypeCredential, xds.Resource{Name: c.Key(), Body: body, Private: true, Readers: []string{"waypoint"}})
}

// TestCredentials: what a Secret has is shown to the application and believed of it; a new one holds for new connections; without
// it nothing is sent; and the key is in no dump and no log.
func TestCredentials(t *testing.T) {
	t.Parallel()
	l, ca := newLab(t, nil), newAuthority(t, "ca")
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, ca.serve(2, "app.test", tls.RequireAndVerifyClientCert))
	l.known("cart")
	l.traffic("cart", mesh.TrafficSettings{TLS: &mesh.UpstreamTLS{Mode: mesh.TLSMutual, ServerName: "app.test", Credential: "shop/cert"}})
	answer := func() string { resp, body := l.get(cart + "/"); return fmt.Sprint(resp.StatusCode, " ", body) }
	if got := answer(); got != "503 " {
		t.Errorf("without the credential: %s, want 503", got)
	}
	var keys [][]byte
	give := func(roots []byte, serial int64, name string) {
		c := &mesh.Credential{Name: "cert", Roots: roots}
		cert, key := ca.issue(serial, name)
		c.Certificate, c.PrivateKey = cert, key
		keys = append(keys, key)
		l.credential(c)
	}
	give(ca.root(), 3, "gate-1")
	l.eventually("with the credential", func() bool { return answer() == "200 gate-1" })
	give(ca.root(), 4, "gate-2")
	l.eventually("with another", func() bool { return answer() == "200 gate-2" })
	give(newAuthority(t, "ca").root(), 5, "gate-3")
	l.eventually("with another's roots", func() bool { return strings.HasPrefix(answer(), "503 ") })
	l.credential(&mesh.Credential{Name: "cert", Roots: ca.root()})
	l.eventually("with nothing to show", func() bool { return answer() == "503 " })
	give(ca.root(), 6, "gate-4")
	l.eventually("with all there is", func() bool { return answer() == "200 gate-4" })
	l.istiod.Publish(mesh.TypeCredential, nil, []string{"shop/cert"})
	l.eventually("when it is gone", func() bool { return answer() == "503 " })

	give(ca.root(), 7, "gate-5")
	l.eventually("again", func() bool { return answer() == "200 gate-5" })
	seen := l.page(":15000/config_dump") + l.log.String()
	for _, key := range keys {
		block, _ := pem.Decode(key)
		if body := strings.Split(string(key), "\n")[1]; block == nil || strings.Contains(seen, body) {
			t.Error("a private key is in the dump or the log")
		}
	}
}

// TestRevocation: a list of the application's authority must be in force, and must not have its certificate.
func TestRevocation(t *testing.T) {
	t.Parallel()
	l, ca, other := newLab(t, nil), newAuthority(t, "ca"), newAuthority(t, "other")
	file := filepath.Join(t.TempDir(), "crl.pem")
	later := time.Now().Add(time.Hour)
	server := ca.serve(2, "app.test", tls.NoClientCert)
	for i, c := range []struct {
		name   string
		list   []byte
		sans   []string
		status int
	}{
		{"nothing is revoked", ca.list(later), nil, 200},
		{"another is", ca.list(later, 3), nil, 200},
		{"it is", ca.list(later, 2), nil, 503},
		{"it is, with names to expect", ca.list(later, 2), []string{"app.test"}, 503},
		{"nothing is, with names to expect", ca.list(later), []string{"app.test"}, 200},
		{"a second list has it", append(ca.list(later), ca.list(later, 2)...), nil, 503},
		{"the list is of another", other.list(later), nil, 503},
		{"the list is old", ca.list(time.Now().Add(-time.Minute)), nil, 503},
		{"there is none", []byte("none"), nil, 503},
		{"its authority is", ca.list(later, 1), nil, 503},
	} {
		from := map[string]*mesh.UpstreamTLS{
			"credential": {Credential: fmt.Sprintf("shop/cert-%d", i)},
			"policy":     {CAPEM: ca.root(), CRLPEM: c.list},
			"file":       {CAPEM: ca.root(), CRL: fmt.Sprintf("%s%d", file, i)},
		}
		if err := os.WriteFile(fmt.Sprintf("%s%d", file, i), c.list, 0o600); err != nil {
			t.Fatal(err)
		}
		l.credential(&mesh.Credential{Name: fmt.Sprintf("cert-%d", i), Roots: ca.root(), CRL: c.list})
		for j, where := range []string{"credential", "policy", "file"} {
			tls := from[where]
			tls.Mode, tls.ServerName, tls.SANs = mesh.TLSSimple, "app.test", c.sans
			name, vip := fmt.Sprintf("%s%d", where, i), fmt.Sprintf("10.9.%d.%d", 1+j, i+1)
			l.service(name, vip, mesh.AppHTTP1, server)
			l.known(name)
			l.traffic(name, mesh.TrafficSettings{TLS: tls})
			resp, body := l.get("http://" + vip + "/")
			for resp.StatusCode == 503 && body == "" { // a credential comes by itself
				resp, body = l.get("http://" + vip + "/")
			}
			if resp.StatusCode != c.status || c.status == 503 && !strings.Contains(body, "of the application") && !strings.Contains(body, "with the application") {
				t.Errorf("%s, from a %s: %d %q, want %d", c.name, where, resp.StatusCode, body, c.status)
			}
		}
	}
}
