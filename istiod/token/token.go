// Package token says who calls the control plane: it reads the token a proxy sends with every request.
//
// Issuer signs and verifies such tokens with a key of its own, for machines without Kubernetes; a Verifier that asks
// Kubernetes (TokenReview) takes the same place. What a caller may do is not decided here.
package token

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Audience is whom a token must be for: a proxy's token for the control plane is of no use elsewhere, and a token of
// another purpose of no use here.
const Audience = "istio-ca"

// ErrUnavailable says that nobody could be asked about a token: the same one may be accepted later.
var ErrUnavailable = errors.New("tokens cannot be verified now")

// maxBytes bounds a token: a Kubernetes one is some 1 kB.
const maxBytes = 16 << 10

// Caller is who calls: a service account, and the pod and node the token is bound to, "" when it is not.
type Caller struct {
	Namespace, ServiceAccount string
	Pod, PodUID               string
	Node                      string
}

// Account is namespace/name of the service account.
func (c Caller) Account() string { return c.Namespace + "/" + c.ServiceAccount }

// Verifier tells who sent a token. A token that does not prove it is an error, whose text may be shown to the sender.
type Verifier interface {
	Verify(ctx context.Context, raw string) (Caller, error)
}

// FromAuthorization takes the token out of an authorization header: "Bearer <token>" (RFC 6750, 2.1).
func FromAuthorization(header []string) (string, error) {
	if len(header) != 1 {
		return "", fmt.Errorf("%d authorization headers, want one", len(header))
	}
	scheme, raw, ok := strings.Cut(header[0], " ")
	if !ok || !strings.EqualFold(scheme, "bearer") || raw == "" {
		return "", errors.New("authorization header holds no bearer token")
	}
	return raw, nil
}
