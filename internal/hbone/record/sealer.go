package record

import (
	"errors"
	"slices"
)

// Sizes of RFC 8446, 5.
const (
	HeaderBytes  = 5       // of a record
	MaxPlaintext = 1 << 14 // content bytes of a record

	maxCiphertext = MaxPlaintext + 256 // RFC 8446, 5.2
	overhead      = HeaderBytes + 1 + tagBytes
)

// OpenRoom is how much room a destination of Open must have.
const OpenRoom = maxCiphertext - tagBytes

// Content types of RFC 8446, 5.1.
const (
	typeChangeCipherSpec = 20
	typeAlert            = 21
	typeHandshake        = 22
	typeData             = 23
)

// Handshake message types of RFC 8446, 4.
const (
	msgNewSessionTicket = 4
	msgKeyUpdate        = 24
)

// updateAfter is how many records a key protects before the sender takes the next. RFC 8446, 5.5 allows about 2^24.5
// full records for AES-GCM; this is 2^23, 128 GiB.
const updateAfter = 1 << 23

// askAfter is how many records of one key may arrive before the peer is asked for another. It is more than updateAfter,
// for two ends that both keep to that never need to ask.
const askAfter = updateAfter + updateAfter/8

var errSequence = errors.New("tls: sequence number exhausted")

// Sealer is the sending half of a connection.
type Sealer struct {
	d     direction
	limit uint64 // records of one key
	over  bool   // an alert went out that ends the connection
}

// NewSealer returns a Sealer for a cipher suite (TLS_AES_128_GCM_SHA256 or TLS_AES_256_GCM_SHA384) and the sender's
// traffic secret, of which it keeps a copy.
func NewSealer(suite uint16, secret []byte) (*Sealer, error) {
	d, err := newDirection(suite, secret)
	if err != nil {
		return nil, err
	}
	return &Sealer{d: d, limit: updateAfter}, nil
}

var errSealerOver = errors.New("tls: connection was ended by an alert")

// Seal appends to dst the records of application data that carry a and then b, each as full as may be. It takes the next
// key by itself when it is time. Neither a nor b may overlap dst.
func (s *Sealer) Seal(dst, a, b []byte) ([]byte, error) {
	if s.over {
		return dst, errSealerOver
	}
	total := len(a) + len(b)
	dst = slices.Grow(dst, total+(total+MaxPlaintext-1)/MaxPlaintext*overhead)
	for total > 0 {
		if s.d.seq >= s.limit {
			var err error
			if dst, err = s.Update(dst, false); err != nil {
				return dst, err
			}
		}
		n := min(total, MaxPlaintext)
		total -= n
		at := len(dst)
		dst = slices.Grow(dst, n+overhead)[:at+HeaderBytes]
		k := min(n, len(a))
		dst = append(dst, a[:k]...)
		dst = append(dst, b[:n-k]...)
		a, b = a[k:], b[n-k:]
		var err error
		if dst, err = s.finish(dst, at, typeData); err != nil {
			return dst, err
		}
	}
	return dst, nil
}

// finish makes a record of dst[at:], a header's room and the content behind it. It is encrypted where it lies: a record
// is small enough to be in the processor's nearest cache still.
func (s *Sealer) finish(dst []byte, at int, typ byte) ([]byte, error) {
	if !s.d.nextNonce() {
		return dst[:at], errSequence
	}
	dst = append(dst, typ)
	n := len(dst) - at - HeaderBytes + tagBytes
	h := dst[at : at+HeaderBytes]
	h[0], h[1], h[2], h[3], h[4] = typeData, 3, 3, byte(n>>8), byte(n)
	body := dst[at+HeaderBytes:]
	sealed := s.d.aead.Seal(body[:0], s.d.nonce[:], body, h)
	return dst[:at+HeaderBytes+len(sealed)], nil
}

// short appends a record of another type than application data.
func (s *Sealer) short(dst []byte, typ byte, content ...byte) ([]byte, error) {
	at := len(dst)
	dst = slices.Grow(dst, len(content)+overhead)[:at+HeaderBytes]
	return s.finish(append(dst, content...), at, typ)
}

// Update appends a KeyUpdate message (RFC 8446, 4.6.3) and takes the next key. With ask the peer is to take its next one
// too.
func (s *Sealer) Update(dst []byte, ask bool) ([]byte, error) {
	if s.over {
		return dst, errSealerOver
	}
	request := byte(0)
	if ask {
		request = 1
	}
	dst, err := s.short(dst, typeHandshake, msgKeyUpdate, 0, 0, 1, request)
	if err != nil {
		return dst, err
	}
	return dst, s.d.next()
}

// Alert appends an alert (RFC 8446, 6), after which nothing can be sealed.
func (s *Sealer) Alert(dst []byte, a Alert) ([]byte, error) {
	if s.over {
		return dst, nil
	}
	s.over = true
	level := byte(2)
	if a == CloseNotify {
		level = 1
	}
	return s.short(dst, typeAlert, level, byte(a))
}

// Wipe overwrites the secrets; the Sealer is of no more use.
func (s *Sealer) Wipe() {
	s.over = true
	s.d.wipe()
}
