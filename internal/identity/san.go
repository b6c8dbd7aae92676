package identity

import (
	"crypto/x509/pkix"
	"encoding/asn1"
)

// uriSAN builds a critical subjectAltName of one URI: it must be critical when the subject is empty (RFC 5280,
// 4.2.1.6), which x509.CreateCertificateRequest does not see to.
func uriSAN(uri string) (pkix.Extension, error) {
	const tagURI = 6 // GeneralName, uniformResourceIdentifier
	value, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: tagURI, Bytes: []byte(uri)}})
	if err != nil {
		return pkix.Extension{}, err
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: value}, nil
}
