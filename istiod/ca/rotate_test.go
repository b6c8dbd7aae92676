package ca_test

import (
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"maps"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistnet/mistnet/istiod/ca"
)

// rotation is an authority under rotation, with everything it has signed so far.
type rotation struct {
	*testing.T
	*ca.Authority
	request []byte
}

func newRotation(t *testing.T, files map[string][]byte) *rotation {
	t.Helper()
	a, err := ca.Open(ca.Config{Files: files, Overlap: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	return &rotation{t, a, request(t, &x509.CertificateRequest{}, ecKey(t, elliptic.P256()))}
}

func newFiles(t *testing.T) map[string][]byte {
	t.Helper()
	files, err := ca.NewRoot("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// sign returns a certificate, the roots that came with it, and which of roots it chains to.
func (r *rotation) sign(roots ...[]byte) (leaf *x509.Certificate, bundle string, below int) {
	r.Helper()
	chain, err := r.Sign(r.Context(), web, r.request, 0)
	if err != nil {
		r.Fatal(err)
	}
	leaf = parse(r.T, chain[0])
	for i, root := range roots {
		if leaf.CheckSignatureFrom(parse(r.T, string(root))) == nil {
			return leaf, chain[len(chain)-1], i
		}
	}
	return leaf, chain[len(chain)-1], -1
}

func (r *rotation) replace(files map[string][]byte, want bool) {
	r.Helper()
	if got, err := r.Replace(files); err != nil || got != want {
		r.Fatalf("Replace = %t, %v; want %t", got, err, want)
	}
}

func TestNewRootIsKnownBeforeItSigns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before, after := newFiles(t), newFiles(t)
		one, two := before["root-cert.pem"], after["root-cert.pem"]
		r := newRotation(t, before)
		serving := r.ServingConfig([]string{"istiod"}, nil)
		shown := func() *x509.Certificate {
			cert, err := serving.GetCertificate(&tls.ClientHelloInfo{})
			if err != nil {
				t.Fatal(err)
			}
			return cert.Leaf
		}
		old, _, below := r.sign(one, two)
		if below != 0 {
			t.Fatal("not signed by the authority it was made of")
		}
		first := shown()
		r.replace(before, false)
		r.replace(after, true)
		r.replace(after, false)
		both := string(one) + string(two)
		if _, bundle, below := r.sign(one, two); below != 0 || bundle != both || string(r.RootPEM()) != both {
			t.Errorf("at once signed by %d with roots %q, want by the old one and both roots", below, bundle)
		}
		time.Sleep(time.Minute)
		if _, bundle, below := r.sign(one, two); below != 1 || bundle != both {
			t.Errorf("after the overlap signed by %d, want the new one and both roots", below)
		}
		if second := shown(); second.Equal(first) || second.CheckSignatureFrom(parse(t, string(two))) != nil {
			t.Error("istiod's own certificate is not below the new root")
		}
		time.Sleep(time.Until(old.NotAfter))
		if got := string(r.RootPEM()); got != both {
			t.Error("the old root went before the last certificate below it expired")
		}
		time.Sleep(2 * time.Minute) // what other replicas may have signed until the end
		if got := string(r.RootPEM()); got != string(two) {
			t.Error("the old root is still handed out")
		}
	})
}

func TestRootThatIsKnownSignsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before, after := newFiles(t), newFiles(t)
		one, two := before["root-cert.pem"], after["root-cert.pem"]
		r := newRotation(t, before)
		// As an operator does it: both roots first, then the other key, then the other root alone.
		known := maps.Clone(before)
		known["root-cert.pem"] = append(append([]byte{}, one...), two...)
		r.replace(known, true)
		if _, bundle, below := r.sign(one, two); below != 0 || strings.Count(bundle, "BEGIN") != 2 {
			t.Errorf("signed by %d with %d roots, want the old one and two", below, strings.Count(bundle, "BEGIN"))
		}
		time.Sleep(time.Hour)
		after["root-cert.pem"] = known["root-cert.pem"]
		r.replace(after, true)
		if _, _, below := r.sign(one, two); below != 1 {
			t.Errorf("signed by %d, want the new one: its root is known for an hour", below)
		}
		alone := maps.Clone(after)
		alone["root-cert.pem"] = two
		r.replace(alone, true)
		if got := strings.Count(string(r.RootPEM()), "BEGIN"); got != 2 {
			t.Errorf("%d roots, want the old one too while certificates below it are good", got)
		}
		time.Sleep(25 * time.Hour)
		if got := string(r.RootPEM()); got != string(two) {
			t.Error("the old root is still handed out")
		}
	})
}

func TestReplaceRefusesWhatIsFaulty(t *testing.T) {
	t.Parallel()
	files := newFiles(t)
	r := newRotation(t, files)
	bad := newFiles(t)
	bad["ca-key.pem"] = files["ca-key.pem"]
	if _, err := r.Replace(bad); err == nil || !strings.Contains(err.Error(), "key does not belong") {
		t.Errorf("Replace = %v, want a refusal", err)
	}
	if _, bundle, below := r.sign(files["root-cert.pem"]); below != 0 || bundle != string(files["root-cert.pem"]) {
		t.Error("a refused authority had an effect")
	}
	_, root := r.Expiry()
	if !root.Equal(parse(t, string(files["root-cert.pem"])).NotAfter) {
		t.Errorf("Expiry says %s", root)
	}
}

func TestRenewRootKeepsNameAndKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := newFiles(t)
		old := parse(t, string(files["root-cert.pem"]))
		if got, err := ca.RenewRoot(files, time.Now().AddDate(7, 11, 0)); got != nil || err != nil {
			t.Errorf("RenewRoot with a fifth left = %v, %v; want nothing", got, err)
		}
		r := newRotation(t, files)
		time.Sleep(8 * 366 * 24 * time.Hour)
		renewed, err := ca.RenewRoot(files, time.Now())
		if err != nil || renewed == nil {
			t.Fatalf("RenewRoot = %v, %v", renewed, err)
		}
		block, rest := pem.Decode(renewed["root-cert.pem"])
		now := parse(t, string(pem.EncodeToMemory(block)))
		if string(rest) != string(files["root-cert.pem"]) || !now.NotAfter.After(old.NotAfter.AddDate(7, 0, 0)) {
			t.Errorf("new root expires %s, beside %d others", now.NotAfter, strings.Count(string(rest), "BEGIN"))
		}
		if again, err := ca.RenewRoot(renewed, time.Now()); again != nil || err != nil {
			t.Errorf("RenewRoot of what was renewed = %v, %v; want nothing", again, err)
		}
		r.replace(renewed, true)
		time.Sleep(time.Hour)
		leaf, _, _ := r.sign()
		for name, root := range map[string]*x509.Certificate{"old": old, "new": now} {
			pool := x509.NewCertPool()
			pool.AddCert(root)
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: time.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
				t.Errorf("who trusts the %s root does not trust what is signed now: %v", name, err)
			}
		}
	})
}
