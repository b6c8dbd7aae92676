package ca

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"time"

	"go.uber.org/zap"
)

// state is what an Authority signs with and what it has others trust. It is replaced as a whole.
type state struct {
	signer signer
	files  map[string][]byte // the signer was read from; nil when it came from Config.Dir
	// trusted are the roots that are handed out: the signer's, those of an earlier one whose certificates are still in use,
	// and those of the next one.
	trusted []*trusted
	next    *next     // what will sign, once its root is known everywhere; nil for nothing
	signed  time.Time // when the last of the certificates that signer signed expires
}

// trusted is one root that is handed out.
type trusted struct {
	cert  *x509.Certificate
	since time.Time // zero: from the start
	until time.Time // when the last certificate below it expires, once it is out of use; zero: in use
}

type next struct {
	signer signer
	files  map[string][]byte
	at     time.Time
}

// Replace takes other files for those the authority was made of: what people plugged in has changed. The roots of the new
// ones are handed out at once. A signing certificate below a root that was handed out for Config.Overlap already signs at
// once, another one when that time has gone by, so that everybody trusts it by then. Roots that the new files do not have
// stay until the last certificate below them has expired. Faulty files change nothing.
//
// It reports whether there is anything new in the files.
func (a *Authority) Replace(files map[string][]byte) (bool, error) {
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	st := &a.state
	if same(st.files, files) && st.next == nil || st.next != nil && same(st.next.files, files) {
		return false, nil
	}
	s, err := readPlugged(files, a.cfg.TrustDomain, now)
	if err != nil {
		return false, fmt.Errorf("replace certificate authority: %w", err)
	}
	since := now
	for _, c := range s.roots {
		if t := st.find(c); t != nil {
			t.until = time.Time{}
			if c.Equal(s.root) {
				since = t.since
			}
			continue
		}
		st.trusted = append(st.trusted, &trusted{cert: c, since: now})
	}
	st.next = &next{signer: s, files: maps.Clone(files), at: since.Add(a.cfg.Overlap)}
	if since.IsZero() || s.root.Equal(st.signer.root) {
		st.next.at = now
	}
	a.cfg.Log.Info("certificate authority replaced", zap.String("subject", s.cert.Subject.String()),
		zap.Time("expires", s.notAfter), zap.Int("roots", len(s.roots)), zap.Time("signs_from", st.next.at))
	a.settle(now)
	return true, nil
}

func same(a, b map[string][]byte) bool { return maps.EqualFunc(a, b, bytes.Equal) }

// settle does what is due by now; a.mu is held.
func (a *Authority) settle(now time.Time) {
	st := &a.state
	if st.next != nil && !now.Before(st.next.at) {
		old := st.signed
		st.signer, st.files, st.next, st.signed = st.next.signer, st.next.files, nil, time.Time{}
		// Other replicas signed too: what they signed is assumed to be as usual.
		end := latest(old, now.Add(a.cfg.DefaultTTL))
		for _, t := range st.trusted {
			if !contains(st.signer.roots, t.cert) && t.until.IsZero() {
				t.until = end
			}
		}
		a.cfg.Log.Info("certificate authority signs with its new certificate", zap.String("subject", st.signer.cert.Subject.String()))
	}
	var left []*trusted
	for _, t := range st.trusted {
		if t.until.IsZero() || now.Before(t.until) {
			left = append(left, t)
			continue
		}
		a.cfg.Log.Info("root certificate not handed out any more", zap.String("subject", t.cert.Subject.String()))
	}
	st.trusted = left
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (st *state) find(c *x509.Certificate) *trusted {
	for _, t := range st.trusted {
		if t.cert.Equal(c) {
			return t
		}
	}
	return nil
}

// current is what to sign with now, and the roots to hand out.
func (a *Authority) current(now time.Time) (signer, []*x509.Certificate) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.settle(now)
	roots := make([]*x509.Certificate, 0, len(a.state.trusted))
	for _, t := range a.state.trusted {
		roots = append(roots, t.cert)
	}
	return a.state.signer, roots
}

// Expiry returns when the first certificate on the way from what signs to its root expires, and the root itself.
func (a *Authority) Expiry() (chain, root time.Time) {
	s, _ := a.current(time.Now())
	return s.notAfter, s.root.NotAfter
}

// renewPart of its life is what a root of our own has left when it is renewed, as in Istio.
const renewPart = 0.2

// RenewRoot returns the files of an authority that NewRoot made with a certificate that is good for another ten years, when
// less than a fifth of the present one's life is left, and nil otherwise. The new one is of the same name and key, so that
// whoever trusts one of them trusts what either signed; the old one stays among the roots.
func RenewRoot(files map[string][]byte, now time.Time) (map[string][]byte, error) {
	certs, err := parseCertificates(files[certFile])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", certFile, err)
	}
	old := certs[0]
	if left := old.NotAfter.Sub(now); left.Seconds() > renewPart*old.NotAfter.Sub(old.NotBefore).Seconds() {
		return nil, nil //nolint:nilnil // nothing to do
	}
	if !bytes.Equal(old.RawIssuer, old.RawSubject) {
		return nil, errors.New("certificate is not a root, and can be renewed only by who issued it")
	}
	key, err := parseKey(files[keyFile])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keyFile, err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, RawSubject: old.RawSubject, SubjectKeyId: old.SubjectKeyId,
		NotBefore: now.Add(-backdate), NotAfter: now.AddDate(selfSignedYears, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, &x509.Certificate{RawSubject: old.RawSubject, PublicKey: key.Public(), SubjectKeyId: old.SubjectKeyId}, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("renew root certificate: %w", err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	roots := cert
	if now.Before(old.NotAfter) {
		roots = append(bytes.Clone(cert), encode(old)...)
	}
	return map[string][]byte{certFile: cert, keyFile: files[keyFile], rootFile: roots}, nil
}
