package mesh

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Identity names who a workload is: a service account of a namespace in a trust domain. It is comparable; the zero
// value means "nobody".
type Identity struct {
	TrustDomain    string
	Namespace      string
	ServiceAccount string
}

// ParseIdentity reads spiffe://<trust domain>/ns/<namespace>/sa/<service account> (SPIFFE ID, section 2).
func ParseIdentity(uri string) (Identity, error) {
	id, err := spiffeid.FromString(uri)
	if err != nil {
		return Identity{}, fmt.Errorf("parse identity %q: %w", uri, err)
	}
	parts := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
	if len(parts) != 4 || parts[0] != "ns" || parts[2] != "sa" {
		return Identity{}, fmt.Errorf("parse identity %q: path is not /ns/<namespace>/sa/<service account>", uri)
	}
	return Identity{TrustDomain: id.TrustDomain().Name(), Namespace: parts[1], ServiceAccount: parts[3]}, nil
}

// IsZero reports whether id names nobody.
func (id Identity) IsZero() bool { return id == Identity{} }

// String is the SPIFFE URI, or "" for nobody.
func (id Identity) String() string {
	if id.IsZero() {
		return ""
	}
	return "spiffe://" + id.Principal()
}

// Principal is the SPIFFE URI without its scheme: how policies spell an identity. It is "" for nobody.
func (id Identity) Principal() string {
	if id.IsZero() {
		return ""
	}
	return id.TrustDomain + "/ns/" + id.Namespace + "/sa/" + id.ServiceAccount
}
