package mesh

// Credential is what a waypoint shows of itself to an application with which it begins TLS, and what it believes of it: a
// Secret that a DestinationRule names (credentialName), in the waypoint's own namespace.
type Credential struct {
	Namespace string
	Name      string

	Certificate []byte     // PEM, the leaf first; none: only what is believed was asked for
	PrivateKey  PrivateKey // of the leaf
	Roots       []byte     // PEM of certificates; none: the application is not verified
	CRL         []byte     // PEM of revocation lists; none: nothing is revoked
}

// Key names the credential in the mesh: namespace/name.
func (c *Credential) Key() string { return c.Namespace + "/" + c.Name }

// PrivateKey is the PEM of a private key. However it is printed, it does not show.
type PrivateKey []byte

const hidden = "(hidden)"

func (PrivateKey) String() string { return hidden }

// GoString implements fmt.GoStringer.
func (PrivateKey) GoString() string { return hidden }

// MarshalText keeps it out of JSON.
func (PrivateKey) MarshalText() ([]byte, error) { return []byte(hidden), nil }
