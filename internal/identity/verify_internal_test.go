package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// The memory of verified peers is inside; from outside it only shows as time saved.
func TestVerifiedPeersAreRememberedAndForgotten(t *testing.T) {
	now := time.Now()
	id := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}
	root := selfSigned(t, id)
	roots := new(Trust).pool([]*x509.Certificate{root})
	// A root may stand for a leaf here: only how often it is verified matters, so it is put in by hand.
	trust := new(Trust)
	chain := []*x509.Certificate{root}
	if _, err := trust.verify(chain, roots, x509.ExtKeyUsageClientAuth, now); err == nil {
		t.Fatal("an authority's certificate passed for a workload's: the cache below could not be told from verification")
	}
	key := verifiedKey{hashChain(chain), x509.ExtKeyUsageClientAuth, roots}
	v := verifiedChain{id, now.Add(-time.Minute), now.Add(time.Minute)}
	trust.remember(key, v, now)
	verify := func(roots *x509.CertPool, usage x509.ExtKeyUsage, at time.Time) bool {
		got, err := trust.verify(chain, roots, usage, at)
		return err == nil && got == id
	}
	if !verify(roots, x509.ExtKeyUsageClientAuth, now) {
		t.Error("a verified chain was verified again")
	}
	for name, ok := range map[string]bool{
		"for another usage":    verify(roots, x509.ExtKeyUsageServerAuth, now),
		"against other roots":  verify(x509.NewCertPool(), x509.ExtKeyUsageClientAuth, now),
		"after its end":        verify(roots, x509.ExtKeyUsageClientAuth, now.Add(2*time.Minute)),
		"before its beginning": verify(roots, x509.ExtKeyUsageClientAuth, now.Add(-2*time.Minute)),
		"with another certificate": func() bool {
			c := append(chain, root)
			_, err := trust.verify(c, roots, x509.ExtKeyUsageClientAuth, now)
			return err == nil
		}(),
	} {
		if ok {
			t.Errorf("a chain verified once was believed %s", name)
		}
	}
	// Filling up drops expired ones first, and never grows beyond the bound.
	for i := range 3 * maxVerified {
		k := key
		binary.BigEndian.PutUint64(k.chain[:], uint64(i))
		w := v
		if i%2 == 0 {
			w.notAfter = now.Add(-time.Second)
		}
		trust.remember(k, w, now)
		if len(trust.verified) > maxVerified {
			t.Fatalf("%d chains remembered, want at most %d", len(trust.verified), maxVerified)
		}
	}
}

func TestRootPoolsAreSharedAndBounded(t *testing.T) {
	trust := new(Trust)
	id := mesh.Identity{TrustDomain: "cluster.local", Namespace: "a", ServiceAccount: "b"}
	root := selfSigned(t, id)
	first := trust.pool([]*x509.Certificate{root})
	if trust.pool([]*x509.Certificate{root}) != first {
		t.Error("equal roots have two pools")
	}
	if trust.pool([]*x509.Certificate{root, selfSigned(t, id)}) == first {
		t.Error("different roots share a pool")
	}
	for i := range 3 * maxPools {
		trust.pool([]*x509.Certificate{{Raw: binary.BigEndian.AppendUint64(nil, uint64(i))}})
		if len(trust.pools) > maxPools {
			t.Fatalf("%d pools, want at most %d", len(trust.pools), maxPools)
		}
	}
	if (*Trust)(nil).pool([]*x509.Certificate{root}) == nil {
		t.Error("no pool without a Trust")
	}
	if hashChain([]*x509.Certificate{{Raw: []byte("ab")}, {Raw: []byte("c")}}) == hashChain([]*x509.Certificate{{Raw: []byte("a")}, {Raw: []byte("bc")}}) {
		t.Error("two chains with the same bytes, cut differently, hash alike")
	}
	if hashChain(nil) == [sha256.Size]byte{} {
		t.Error("no chain hashes to zero")
	}
}

func selfSigned(t *testing.T, id mesh.Identity) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := url.Parse(id.String())
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{uri}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
