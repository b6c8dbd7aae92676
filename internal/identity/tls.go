package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// alpnH2 is the only protocol spoken inside the mesh's TLS.
const alpnH2 = "h2"

// handshakeWait is how long a handshake waits for a certificate that is not there yet.
const handshakeWait = 10 * time.Second

// baseConfig is what both sides have in common: TLS 1.3, h2, no tickets. The peer is judged in VerifyConnection, which runs
// on every handshake, while VerifyPeerCertificate is not called on resumed ones.
func baseConfig() *tls.Config {
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		MaxVersion:                  tls.VersionTLS13,
		NextProtos:                  []string{alpnH2},
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
	}
}

func (s *SVID) postQuantum() bool { return s.Trust != nil && s.Trust.PostQuantum }

// ClientConfig is how to call a peer as svid: the peer must chain to our roots and be one of expect. An empty list
// fails every handshake.
//
// The key share is for P-256, which every TLS 1.3 peer must take (RFC 8446, 9.1) and which costs less than X25519 in
// crypto/tls.
func ClientConfig(svid *SVID, expect []mesh.Identity) *tls.Config {
	c := baseConfig()
	c.CurvePreferences = []tls.CurveID{tls.CurveP256}
	if svid.postQuantum() {
		c.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256}
	}
	// Not Certificates: crypto/tls would show none at all when the server's list of authorities does not name ours.
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &svid.Certificate, nil }
	c.InsecureSkipVerify = true // there is no DNS name to check; VerifyConnection does all of it
	expect = slices.Clone(expect)
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := checkALPN(cs); err != nil {
			return err
		}
		if len(expect) == 0 {
			return errors.New("no identity is expected of the peer, so none is accepted")
		}
		id, err := svid.Trust.verify(cs.PeerCertificates, svid.Roots, x509.ExtKeyUsageServerAuth, time.Now())
		if err != nil {
			return err
		}
		if !slices.Contains(expect, id) {
			return fmt.Errorf("peer is %s, expected %s; has its address been taken over by another workload?", id, join(expect))
		}
		return nil
	}
	return c
}

// ServerConfig is how to be called as svid: by any member of the mesh, which authorization then judges.
func ServerConfig(svid *SVID) *tls.Config {
	c := baseConfig()
	c.CurvePreferences = []tls.CurveID{tls.CurveP256, tls.X25519}
	if svid.postQuantum() {
		c.CurvePreferences = append(c.CurvePreferences, tls.X25519MLKEM768)
	}
	c.Certificates = []tls.Certificate{svid.Certificate}
	c.ClientAuth = tls.RequireAnyClientCert // verified below; no list of authorities is sent
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := checkALPN(cs); err != nil {
			return err
		}
		id, err := svid.Trust.verify(cs.PeerCertificates, svid.Roots, x509.ExtKeyUsageClientAuth, time.Now())
		if err != nil {
			return err
		}
		if !svid.Trust.sameMesh(svid.ID.TrustDomain, id.TrustDomain) {
			return fmt.Errorf("peer %s is of a foreign trust domain, ours is %s; should it be an alias of ours?", id, svid.ID.TrustDomain)
		}
		return nil
	}
	return c
}

// ServerConfig is how to be called as id, always with the current certificate. A handshake that comes before the first
// certificate waits for it, for ten seconds at most.
//
// The configuration in force is chosen per handshake: what a caller sets on the returned value does not reach it.
func (m *Manager) ServerConfig(id mesh.Identity) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{alpnH2},
		SessionTicketsDisabled: true,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			ctx, cancel := context.WithTimeout(hello.Context(), handshakeWait)
			defer cancel()
			_, server, err := m.current(ctx, id)
			return server, err
		},
	}
}

// ControlPlaneConfig is how to call istiod, for xDS and certificates: TLS 1.3, the server must be serverName by one of
// the roots in rootPEM. The client shows no certificate; its token says who it is.
func ControlPlaneConfig(rootPEM []byte, serverName string) (*tls.Config, error) {
	if serverName == "" {
		return nil, errors.New("configure TLS to istiod: no server name given")
	}
	roots, err := parseCertificates(string(rootPEM))
	if err != nil {
		return nil, fmt.Errorf("configure TLS to istiod: read root certificates: %w", err)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: serverName,
		RootCAs:    (*Trust)(nil).pool(roots),
		NextProtos: []string{alpnH2},
	}, nil
}

func checkALPN(cs tls.ConnectionState) error {
	if cs.NegotiatedProtocol != alpnH2 {
		return fmt.Errorf("peer did not agree on protocol %q by ALPN", alpnH2)
	}
	return nil
}

func join(ids []mesh.Identity) string {
	texts := make([]string, len(ids))
	for i, id := range ids {
		texts[i] = id.String()
	}
	return strings.Join(texts, " or ")
}
