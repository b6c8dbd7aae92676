package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/mesh"
)

const (
	defaultTTL = 24 * time.Hour
	maxTTL     = 90 * 24 * time.Hour
	backdate   = 2 * time.Minute // clocks of peers may be that much behind

	// defaultOverlap is what a kubelet takes to bring a ConfigMap to every pod, and node proxies to act on it, with room.
	defaultOverlap = 5 * time.Minute
)

// Config is what an Authority is made of. Dir or Files is required.
type Config struct {
	// Dir holds ca-cert.pem, ca-key.pem, root-cert.pem and, where intermediates lead from the one to the other,
	// cert-chain.pem; or else self-signed-ca.pem, which is made when there is neither.
	Dir string
	// Files are the files of an authority that is plugged in, by name, where they do not come from Dir.
	Files       map[string][]byte
	TrustDomain string        // "": cluster.local
	DefaultTTL  time.Duration // of workload certificates; 0: 24 h
	MaxTTL      time.Duration // more is refused; 0: 90 d
	Overlap     time.Duration // how long a new root is handed out before it is signed with; 0: 5 min
	Log         *zap.Logger   // nil: none
}

// Authority signs certificates. Its methods may be called by several goroutines.
type Authority struct {
	cfg Config

	mu    sync.Mutex
	state state
}

// signer is a signing certificate with its key and what leads from it to the roots.
type signer struct {
	cert  *x509.Certificate
	key   crypto.Signer
	chain []*x509.Certificate // cert first unless it is a root itself, no root
	root  *x509.Certificate   // that the chain ends at
	roots []*x509.Certificate

	notAfter time.Time // when the first certificate on the way to the root expires: nothing signed is valid for longer
}

// Open reads the authority's key and certificates, or makes a root of its own if there are none. What it reads is
// checked as a whole.
func Open(cfg Config) (*Authority, error) {
	if cfg.TrustDomain == "" {
		cfg.TrustDomain = mesh.DefaultTrustDomain
	}
	if cfg.DefaultTTL == 0 {
		cfg.DefaultTTL = defaultTTL
	}
	if cfg.MaxTTL == 0 {
		cfg.MaxTTL = maxTTL
	}
	if cfg.DefaultTTL < 0 || cfg.DefaultTTL > cfg.MaxTTL {
		return nil, fmt.Errorf("open certificate authority: default lifetime %s is not between 0 and the maximum, %s", cfg.DefaultTTL, cfg.MaxTTL)
	}
	if cfg.Overlap == 0 {
		cfg.Overlap = defaultOverlap
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	var s signer
	var err error
	if cfg.Files != nil {
		s, err = readPlugged(cfg.Files, cfg.TrustDomain, time.Now())
	} else if s, err = load(cfg.Dir, cfg.TrustDomain, time.Now()); err != nil {
		err = fmt.Errorf("in %s: %w", cfg.Dir, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open certificate authority: %w", err)
	}
	cfg.Log.Info("certificate authority opened", zap.String("subject", s.cert.Subject.String()),
		zap.Time("expires", s.notAfter), zap.Int("roots", len(s.roots)), zap.String("trust_domain", cfg.TrustDomain))
	a := &Authority{cfg: cfg, state: state{signer: s, files: cfg.Files}}
	for _, c := range s.roots {
		a.state.trusted = append(a.state.trusted, &trusted{cert: c})
	}
	return a, nil
}

// TrustDomain is the one whose identities the authority signs.
func (a *Authority) TrustDomain() string { return a.cfg.TrustDomain }

// RootPEM is the root certificates, for clients to verify istiod and each other against. They change with Replace, and
// as time goes by after it.
func (a *Authority) RootPEM() []byte {
	_, roots := a.current(time.Now())
	return encode(roots...)
}

// RequestError says that what was asked for cannot be signed, whoever asks.
type RequestError struct{ Reason string }

func (e *RequestError) Error() string { return e.Reason }

func refuse(format string, args ...any) error { return &RequestError{fmt.Sprintf(format, args...)} }

// Sign makes a certificate for id and the key of the request, valid for ttl, or as the authority's configuration says
// when ttl is 0; sooner when the authority's own expires first. It returns PEM: leaf, intermediates, and the roots as
// the last element. The caller has established that id is the requester's to have. Errors are *RequestError, if the
// request is at fault.
func (a *Authority) Sign(_ context.Context, id mesh.Identity, csrPEM []byte, ttl time.Duration) ([]string, error) {
	_, chain, err := a.sign(id, csrPEM, ttl)
	return chain, err
}

func (a *Authority) sign(id mesh.Identity, csrPEM []byte, ttl time.Duration) (*x509.Certificate, []string, error) {
	uri, err := url.Parse(id.String())
	if err != nil || id.IsZero() {
		return nil, nil, refuse("%q is no identity", id)
	}
	if id.TrustDomain != a.cfg.TrustDomain {
		return nil, nil, refuse("%s is of a foreign trust domain, ours is %s", id, a.cfg.TrustDomain)
	}
	if ttl == 0 {
		ttl = a.cfg.DefaultTTL
	}
	if ttl < 0 || ttl > a.cfg.MaxTTL {
		return nil, nil, refuse("lifetime %s is not between 0 and %s", ttl, a.cfg.MaxTTL)
	}
	pub, err := requestKey(csrPEM)
	if err != nil {
		return nil, nil, err
	}
	now := time.Now()
	by, roots := a.current(now)
	leaf, err := by.certify(workloadTemplate(uri), pub, ttl, now)
	if err != nil {
		return nil, nil, fmt.Errorf("sign certificate of %s: %w", id, err)
	}
	a.note(by, leaf)
	chain := []string{string(encode(leaf))}
	for _, c := range by.chain {
		chain = append(chain, string(encode(c)))
	}
	return leaf, append(chain, string(encode(roots...))), nil
}

// note keeps in mind how long what was signed is good for.
func (a *Authority) note(by signer, leaf *x509.Certificate) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if by.cert.Equal(a.state.signer.cert) {
		a.state.signed = latest(a.state.signed, leaf.NotAfter)
	}
}

// workloadTemplate says what is in a workload's certificate. Its subject is empty, which makes the SAN critical.
func workloadTemplate(uri *url.URL) *x509.Certificate {
	return &x509.Certificate{URIs: []*url.URL{uri}, ExtKeyUsage: workloadUsage()}
}

func workloadUsage() []x509.ExtKeyUsage {
	return []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
}

// certify completes the template of a leaf, and signs it.
func (s *signer) certify(template *x509.Certificate, pub crypto.PublicKey, ttl time.Duration, now time.Time) (*x509.Certificate, error) {
	if now.After(s.notAfter) {
		return nil, fmt.Errorf("the authority's own certificates expired on %s; give it new ones", s.notAfter.Format(time.RFC3339))
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	template.NotBefore, template.NotAfter = now.Add(-backdate), now.Add(ttl)
	if template.NotAfter.After(s.notAfter) {
		template.NotAfter = s.notAfter
	}
	template.BasicConstraintsValid = true // and not a CA
	template.KeyUsage = x509.KeyUsageDigitalSignature
	if _, ok := pub.(*rsa.PublicKey); ok {
		template.KeyUsage |= x509.KeyUsageKeyEncipherment
	}
	der, err := x509.CreateCertificate(rand.Reader, template, s.cert, pub, s.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// newSerial is 127 random bits, never zero (RFC 5280, 4.1.2.2).
func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

func encode(certs ...*x509.Certificate) []byte {
	var text []byte
	for _, c := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return text
}
