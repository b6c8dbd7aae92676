package identity

import (
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"slices"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// CertificateInfo is one identity of a Manager as config_dump shows it, in the layout istioctl reads.
type CertificateInfo struct {
	Identity    string     `json:"identity"`
	State       string     `json:"state"` // Available, Initializing, or Unavailable: with the reason
	CertChain   []CertInfo `json:"certChain"`
	RootCerts   []CertInfo `json:"rootCerts"`
	NextAttempt time.Time  `json:"nextAttempt"`
}

// CertInfo is one certificate of a chain.
type CertInfo struct {
	PEM            string    `json:"pem"`
	SerialNumber   string    `json:"serialNumber"` // decimal
	ValidFrom      time.Time `json:"validFrom"`
	ExpirationTime time.Time `json:"expirationTime"`
}

// Certificates lists every identity that is wanted, sorted by identity. It holds no private key.
func (m *Manager) Certificates() []CertificateInfo {
	type view struct {
		id    mesh.Identity
		svid  *SVID
		err   error
		due   time.Time
		valid bool
	}
	now := time.Now()
	m.mu.Lock()
	views := make([]view, 0, len(m.entries))
	for _, e := range m.entries {
		views = append(views, view{e.id, e.svid, e.err, e.due, e.usable(now)})
	}
	m.mu.Unlock()
	infos := make([]CertificateInfo, 0, len(views))
	for _, v := range views {
		info := CertificateInfo{Identity: v.id.String(), State: "Initializing", NextAttempt: v.due}
		if v.svid != nil {
			info.RootCerts = certInfos(v.svid.RootCerts)
			info.CertChain = certInfos(v.svid.chain())
		}
		switch {
		case v.valid:
			info.State = "Available"
		case v.err != nil:
			info.State = "Unavailable: " + v.err.Error()
		case v.svid != nil:
			info.State = "Unavailable: expired"
		}
		infos = append(infos, info)
	}
	slices.SortFunc(infos, func(a, b CertificateInfo) int { return cmp.Compare(a.Identity, b.Identity) })
	return infos
}

func (s *SVID) chain() []*x509.Certificate {
	chain := []*x509.Certificate{s.Certificate.Leaf}
	for _, der := range s.Certificate.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil { // it was parsed before, from the same bytes
			chain = append(chain, c)
		}
	}
	return chain
}

func certInfos(certs []*x509.Certificate) []CertInfo {
	infos := make([]CertInfo, len(certs))
	for i, c := range certs {
		infos[i] = CertInfo{
			PEM:          string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})),
			SerialNumber: c.SerialNumber.String(), ValidFrom: c.NotBefore, ExpirationTime: c.NotAfter,
		}
	}
	return infos
}
