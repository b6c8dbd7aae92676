package token

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/mistnet/mistnet/istiod/keyfile"
)

const (
	issuerName = "https://istiod.istio-system.svc"
	keyName    = "token-key.pem"
	leeway     = 10 * time.Second // for clocks that differ
)

// Issuer signs tokens with a key of its own and verifies them. They are laid out as Kubernetes' projected service
// account tokens, signed with ES256.
type Issuer struct {
	key    *ecdsa.PrivateKey
	signer jose.Signer
}

// claims are what a token says beside the registered claims. Audience is here because package jwt
// writes a single one as a string, and Kubernetes as a list.
type claims struct {
	Audience   []string   `json:"aud"`
	Kubernetes kubernetes `json:"kubernetes.io"`
}

type kubernetes struct {
	Namespace      string `json:"namespace"`
	Node           *named `json:"node,omitempty"`
	Pod            *named `json:"pod,omitempty"`
	ServiceAccount named  `json:"serviceaccount"`
}

type named struct {
	Name string `json:"name"`
	UID  string `json:"uid,omitempty"`
}

// OpenIssuer reads the signing key in dir, or makes one that later calls find. Whoever can read it can be anyone.
func OpenIssuer(dir string) (*Issuer, error) {
	data, err := keyfile.LoadOrCreate(filepath.Join(dir, keyName), func() ([]byte, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("make token key: %w", err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, fmt.Errorf("make token key: %w", err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
	})
	if err != nil {
		return nil, fmt.Errorf("open token issuer: %w", err)
	}
	key, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("open token issuer: %s: %w", filepath.Join(dir, keyName), err)
	}
	public := jose.JSONWebKey{Key: key.Public()}
	thumbprint, err := public.Thumbprint(crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("open token issuer: %w", err)
	}
	options := new(jose.SignerOptions).WithHeader("kid", base64.RawURLEncoding.EncodeToString(thumbprint))
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, options)
	if err != nil {
		return nil, fmt.Errorf("open token issuer: %w", err)
	}
	return &Issuer{key: key, signer: signer}, nil
}

func parseKey(data []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("not a PEM private key; remove the file to have a new one made, which makes every token out there void")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("not an ECDSA P-256 key, which ES256 needs")
	}
	return key, nil
}

// Issue makes a token by which c is known for ttl. Namespace and ServiceAccount are required.
func (i *Issuer) Issue(c Caller, ttl time.Duration) (string, error) {
	if c.Namespace == "" || c.ServiceAccount == "" {
		return "", errors.New("issue token: namespace and service account are required")
	}
	if ttl <= 0 {
		return "", fmt.Errorf("issue token for %s: lifetime %s is not positive", c.Account(), ttl)
	}
	now := time.Now()
	private := claims{[]string{Audience}, kubernetes{Namespace: c.Namespace, ServiceAccount: named{Name: c.ServiceAccount}}}
	if c.Node != "" {
		private.Kubernetes.Node = &named{Name: c.Node}
	}
	if c.Pod != "" {
		private.Kubernetes.Pod = &named{Name: c.Pod, UID: c.PodUID}
	}
	raw, err := jwt.Signed(i.signer).Claims(jwt.Claims{
		Issuer: issuerName, Subject: subject(c.Namespace, c.ServiceAccount),
		IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(ttl)),
	}).Claims(private).Serialize()
	if err != nil {
		return "", fmt.Errorf("issue token for %s: %w", c.Account(), err)
	}
	return raw, nil
}

func subject(namespace, account string) string {
	return "system:serviceaccount:" + namespace + ":" + account
}

// Verify implements Verifier: signed by our key with ES256, for our audience, not expired.
func (i *Issuer) Verify(_ context.Context, raw string) (Caller, error) {
	if len(raw) > maxBytes {
		return Caller{}, fmt.Errorf("verify token: %d bytes, at most %d are allowed", len(raw), maxBytes)
	}
	parsed, err := jwt.ParseSigned(raw, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return Caller{}, fmt.Errorf("verify token: not a token signed with ES256: %w", err)
	}
	var public jwt.Claims
	var private struct {
		Kubernetes kubernetes `json:"kubernetes.io"`
	}
	if err := parsed.Claims(i.key.Public(), &public, &private); err != nil {
		return Caller{}, fmt.Errorf("verify token: not signed by this control plane's key: %w", err)
	}
	if err := i.validate(public, time.Now()); err != nil {
		return Caller{}, fmt.Errorf("verify token of %q: %w", public.Subject, err)
	}
	k := private.Kubernetes
	c := Caller{Namespace: k.Namespace, ServiceAccount: k.ServiceAccount.Name}
	if c.Namespace == "" || c.ServiceAccount == "" || public.Subject != subject(c.Namespace, c.ServiceAccount) {
		return Caller{}, fmt.Errorf("verify token of %q: subject and service account %s do not agree", public.Subject, c.Account())
	}
	if k.Pod != nil {
		c.Pod, c.PodUID = k.Pod.Name, k.Pod.UID
	}
	if k.Node != nil {
		c.Node = k.Node.Name
	}
	return c, nil
}

func (i *Issuer) validate(c jwt.Claims, now time.Time) error {
	if c.Expiry == nil || c.IssuedAt == nil {
		return errors.New("it does not say when it was issued and expires")
	}
	err := c.ValidateWithLeeway(jwt.Expected{Issuer: issuerName, AnyAudience: jwt.Audience{Audience}, Time: now}, leeway)
	switch {
	case errors.Is(err, jwt.ErrExpired):
		return fmt.Errorf("expired %s ago; is the token file being renewed, and are clocks in sync?", now.Sub(c.Expiry.Time()).Round(time.Second))
	case errors.Is(err, jwt.ErrInvalidAudience):
		return fmt.Errorf("it is for %q, not for %s", c.Audience, Audience)
	}
	return err
}
