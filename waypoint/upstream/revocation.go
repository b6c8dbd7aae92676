package upstream

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

// revocations are lists of certificates that are no longer good; nil: nobody asks. As with Envoy, every issuer in a chain must
// then have one that is in force.
type revocations []*x509.RevocationList

// revocations are those that o asks for: of its credential, its policy or a file.
func (o origin) revocations() (revocations, error) {
	text, err := orFile(o.CRLPEM, o.CRL)
	if err != nil {
		return nil, err
	}
	if o.secret != nil {
		text = o.secret.CRL
	}
	if len(text) == 0 && o.CRL == "" {
		return nil, nil
	}
	var lists revocations
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "X509 CRL" {
			continue
		}
		l, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			return nil, err
		}
		lists = append(lists, l)
	}
	if len(lists) == 0 {
		return nil, errors.New("there is none in them")
	}
	return lists, nil
}

// check reports why none of the chains is good; nil: one is.
func (r revocations) check(chains [][]*x509.Certificate, now time.Time) (err error) {
	if r == nil {
		return nil
	}
	err = errors.New("the application's certificate has no chain")
	for _, chain := range chains {
		if err = r.checkChain(chain, now); err == nil {
			return nil
		}
	}
	return err
}

// checkChain looks at a chain, the leaf first and the root last, whom its own list may revoke as well.
func (r revocations) checkChain(chain []*x509.Certificate, now time.Time) error {
	for i, c := range chain {
		issuer := chain[min(i+1, len(chain)-1)]
		if err := r.checkOne(c, issuer, now); err != nil {
			return err
		}
	}
	return nil
}

func (r revocations) checkOne(c, issuer *x509.Certificate, now time.Time) error {
	found, err := false, fmt.Errorf("there is no revocation list of %s", c.Issuer)
	for _, l := range r {
		if !bytes.Equal(l.RawIssuer, issuer.RawSubject) {
			continue
		}
		if l.CheckSignatureFrom(issuer) != nil {
			err = fmt.Errorf("the revocation list of %s is not signed by it", c.Issuer)
			continue
		}
		for _, e := range l.RevokedCertificateEntries {
			if e.SerialNumber.Cmp(c.SerialNumber) == 0 {
				return fmt.Errorf("certificate %s of %s is revoked", c.SerialNumber, c.Issuer)
			}
		}
		if now.Before(l.ThisUpdate) || !l.NextUpdate.IsZero() && now.After(l.NextUpdate) {
			err = fmt.Errorf("the revocation list of %s is not in force", c.Issuer)
			continue
		}
		found = true
	}
	if found {
		return nil
	}
	return err
}
