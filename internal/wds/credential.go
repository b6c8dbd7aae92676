package wds

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	pb "github.com/mistnet/mistnet/api/route"
	"github.com/mistnet/mistnet/internal/mesh"
)

// EncodeCredential returns c as the bytes of a mistnet.route.v1.Credential, the private key among them. Equal credentials give
// equal bytes.
func EncodeCredential(c *mesh.Credential) ([]byte, error) {
	if err := checkCredential(c); err != nil {
		return nil, fmt.Errorf("encode credential %q: %w", c.Key(), err)
	}
	return deterministic.Marshal(&pb.Credential{
		Namespace: c.Namespace, Name: c.Name, Certificate: c.Certificate, Key: c.PrivateKey, Roots: c.Roots, Crl: c.CRL,
	})
}

// DecodeCredential reads what EncodeCredential wrote. What is in it stays as it is; errors do not quote it.
func DecodeCredential(body []byte) (*mesh.Credential, error) {
	var m pb.Credential
	if proto.Unmarshal(body, &m) != nil {
		return nil, errors.New("decode credential: it is no message of that type")
	}
	c := &mesh.Credential{
		Namespace: m.GetNamespace(), Name: m.GetName(), Certificate: filledBytes(m.GetCertificate()),
		PrivateKey: filledBytes(m.GetKey()), Roots: filledBytes(m.GetRoots()), CRL: filledBytes(m.GetCrl()),
	}
	if err := checkCredential(c); err != nil {
		return nil, fmt.Errorf("decode credential %q: %w", c.Key(), err)
	}
	return c, nil
}

func checkCredential(c *mesh.Credential) error {
	switch {
	case c.Namespace == "" || c.Name == "":
		return errors.New("it has no name")
	case (len(c.Certificate) == 0) != (len(c.PrivateKey) == 0):
		return errors.New("certificate and private key go together")
	}
	return nil
}
