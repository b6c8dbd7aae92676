package identity

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

const (
	maxVerified = 4096 // peers remembered: some 0.5 MB
	maxPools    = 8    // generations of roots remembered
)

// Trust is what the SVIDs of one program share: how peers are judged, and the memory of those that passed. The zero
// value is ready. Set the fields before first use; it must not be copied.
type Trust struct {
	// Aliases are trust domains whose members are let in as if they were of our own. They too must chain to our roots.
	Aliases []string
	// PostQuantum adds X25519MLKEM768 to the key exchanges, for peers that demand it (Istio's COMPLIANCE_POLICY=pqc). It
	// costs both ends together some 0.2 ms per handshake.
	PostQuantum bool

	mu       sync.Mutex
	verified map[verifiedKey]verifiedChain
	pools    map[[sha256.Size]byte]*x509.CertPool
}

// verifiedKey names a chain that was verified, for one usage, against one generation of roots. The pool's address is
// the generation: equal roots share a pool, and a pool in the map cannot be freed and its address used again.
type verifiedKey struct {
	chain [sha256.Size]byte
	usage x509.ExtKeyUsage
	roots *x509.CertPool
}

// verifiedChain is what is remembered of a chain: who it is, and from when to when all of it is valid.
type verifiedChain struct {
	id                  mesh.Identity
	notBefore, notAfter time.Time
}

// pool returns the pool of those roots, always the same one while they do not change.
func (t *Trust) pool(roots []*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, r := range roots {
		pool.AddCert(r)
	}
	if t == nil {
		return pool
	}
	key := hashChain(roots)
	t.mu.Lock()
	defer t.mu.Unlock()
	if old, ok := t.pools[key]; ok {
		return old
	}
	if t.pools == nil || len(t.pools) >= maxPools {
		t.pools = make(map[[sha256.Size]byte]*x509.CertPool)
	}
	t.pools[key] = pool
	return pool
}

// verify returns whose chain it is, after checking it against roots. The costly part, the signatures, is done once per
// chain; proof that the peer holds the key is part of every handshake and never skipped.
func (t *Trust) verify(chain []*x509.Certificate, roots *x509.CertPool, usage x509.ExtKeyUsage, now time.Time) (mesh.Identity, error) {
	if t == nil {
		v, err := verifyChain(chain, roots, usage, now)
		return v.id, err
	}
	key := verifiedKey{hashChain(chain), usage, roots}
	t.mu.Lock()
	v, ok := t.verified[key]
	t.mu.Unlock()
	if ok && !now.Before(v.notBefore) && !now.After(v.notAfter) {
		return v.id, nil
	}
	v, err := verifyChain(chain, roots, usage, now)
	if err != nil {
		return mesh.Identity{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remember(key, v, now)
	return v.id, nil
}

func (t *Trust) remember(key verifiedKey, v verifiedChain, now time.Time) {
	if t.verified == nil {
		t.verified = make(map[verifiedKey]verifiedChain)
	}
	if len(t.verified) >= maxVerified {
		for k, old := range t.verified {
			if now.After(old.notAfter) {
				delete(t.verified, k)
			}
		}
		// Still nearly full: any will do, at the price of one more verification each. A quarter goes at once, so that this
		// loop is rare.
		for k := range t.verified {
			if len(t.verified) <= maxVerified*3/4 {
				break
			}
			delete(t.verified, k)
		}
	}
	t.verified[key] = v
}

// hashChain hashes certificates with their lengths, so that no two different chains read alike.
func hashChain(chain []*x509.Certificate) [sha256.Size]byte {
	h := sha256.New()
	var n [8]byte
	for _, c := range chain {
		binary.BigEndian.PutUint64(n[:], uint64(len(c.Raw)))
		h.Write(n[:])
		h.Write(c.Raw)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func verifyChain(chain []*x509.Certificate, roots *x509.CertPool, usage x509.ExtKeyUsage, now time.Time) (verifiedChain, error) {
	if len(chain) == 0 {
		return verifiedChain{}, errors.New("peer showed no certificate: is it part of the mesh?")
	}
	if roots == nil { // crypto/x509 would fall back to the system's roots
		return verifiedChain{}, errors.New("no mesh roots to verify the peer against")
	}
	leaf := chain[0]
	id, err := certificateIdentity(leaf)
	if err != nil {
		return verifiedChain{}, fmt.Errorf("certificate is not of a workload: %w", err)
	}
	// X509-SVID, section 5.2: a leaf must not be able to sign.
	if leaf.IsCA || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return verifiedChain{}, fmt.Errorf("certificate of %s is one of an authority, not of a workload", id)
	}
	if now.After(leaf.NotAfter) {
		return verifiedChain{}, fmt.Errorf("certificate of %s expired %s ago; is istiod reachable from where it runs, and are clocks in sync?",
			id, now.Sub(leaf.NotAfter).Round(time.Second))
	}
	if now.Before(leaf.NotBefore) {
		return verifiedChain{}, fmt.Errorf("certificate of %s becomes valid only in %s; are clocks in sync?",
			id, leaf.NotBefore.Sub(now).Round(time.Second))
	}
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		return verifiedChain{}, explain(id, usage, err)
	}
	v := verifiedChain{id: id, notBefore: leaf.NotBefore, notAfter: leaf.NotAfter}
	for _, c := range chains[0] {
		v.notBefore = latest(v.notBefore, c.NotBefore)
		v.notAfter = earliest(v.notAfter, c.NotAfter)
	}
	return v, nil
}

func explain(id mesh.Identity, usage x509.ExtKeyUsage, err error) error {
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return fmt.Errorf("certificate of %s is not signed by a root of this mesh; do both sides trust the same root certificate? (%w)", id, err)
	}
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		return explainInvalid(id, usage, invalid)
	}
	return fmt.Errorf("verify certificate of %s: %w", id, err)
}

func explainInvalid(id mesh.Identity, usage x509.ExtKeyUsage, err x509.CertificateInvalidError) error {
	switch err.Reason {
	case x509.IncompatibleUsage:
		side := "client"
		if usage == x509.ExtKeyUsageServerAuth {
			side = "server"
		}
		return fmt.Errorf("certificate of %s may not be used as a %s certificate; the authority must set that extended key usage (%w)", id, side, err)
	case x509.Expired:
		return fmt.Errorf("an authority above the certificate of %s is not valid now; renew the mesh's intermediate or root certificate (%w)", id, err)
	default:
		return fmt.Errorf("verify certificate of %s: %w", id, err)
	}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earliest(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// PeerIdentity returns who is at the other end of a connection made with ClientConfig or ServerConfig, whose handshake
// has already verified it. It fails before the end of the handshake.
func PeerIdentity(cs tls.ConnectionState) (mesh.Identity, error) {
	if !cs.HandshakeComplete || len(cs.PeerCertificates) == 0 {
		return mesh.Identity{}, errors.New("read peer identity: no handshake with a client certificate took place")
	}
	id, err := certificateIdentity(cs.PeerCertificates[0])
	if err != nil {
		return mesh.Identity{}, fmt.Errorf("read peer identity: %w", err)
	}
	return id, nil
}

// sameMesh reports whether a peer of that trust domain is one of ours.
func (t *Trust) sameMesh(own, peer string) bool {
	return own == peer || t != nil && slices.Contains(t.Aliases, peer)
}
