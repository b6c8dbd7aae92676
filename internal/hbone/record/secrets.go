package record

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/fips140"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"hash"
)

// Secrets collects the application traffic secrets of one handshake. It is the Config.KeyLogWriter of that connection's
// own configuration, and of no other.
type Secrets struct {
	client, server []byte
	odd            bool // something was not as it must be
}

// The labels of the key log that matter here; the others are of the handshake or of TLS 1.2.
var (
	clientLabel = []byte("CLIENT_TRAFFIC_SECRET_0 ")
	serverLabel = []byte("SERVER_TRAFFIC_SECRET_0 ")
)

// Write takes one line of the key log: a label, the client's random and the secret. It overwrites the line, which
// crypto/tls made for this call and drops after it.
func (s *Secrets) Write(line []byte) (int, error) {
	defer clear(line)
	switch {
	case bytes.HasPrefix(line, clientLabel):
		s.client = s.parse(s.client, line)
	case bytes.HasPrefix(line, serverLabel):
		s.server = s.parse(s.server, line)
	}
	return len(line), nil
}

func (s *Secrets) parse(had, line []byte) []byte {
	fields := bytes.Fields(line)
	if had != nil || len(fields) != 3 {
		s.odd = true
		return had
	}
	secret := make([]byte, hex.DecodedLen(len(fields[2])))
	if _, err := hex.Decode(secret, fields[2]); err != nil {
		s.odd = true
	}
	return secret
}

// Wipe overwrites the secrets.
func (s *Secrets) Wipe() {
	clear(s.client)
	clear(s.server)
	s.client, s.server = nil, nil
}

// Role is the end of a connection that we are.
type Role uint8

// The roles.
const (
	RoleUnknown Role = iota
	Client
	Server
)

func (r Role) String() string {
	switch r {
	case RoleUnknown:
		return "unknown"
	case Client:
		return "client"
	case Server:
		return "server"
	}
	return "unknown"
}

// Take makes both halves of a connection whose handshake is complete, and wipes the secrets. It reports false when the
// connection is none that this package can carry on: another version than TLS 1.3, another cipher than AES-GCM, a secret
// missing, or a process in FIPS 140 mode, where AES-GCM belongs to crypto/tls alone.
func (s *Secrets) Take(role Role, state tls.ConnectionState) (*Sealer, *Opener, bool) {
	defer s.Wipe()
	su := suiteOf(state.CipherSuite)
	if su == nil || state.Version != tls.VersionTLS13 || !state.HandshakeComplete || fips140.Enabled() || s.odd {
		return nil, nil, false
	}
	if n := su.hash().Size(); len(s.client) != n || len(s.server) != n {
		return nil, nil, false
	}
	ours, theirs := s.client, s.server
	switch role {
	case Client:
	case Server:
		ours, theirs = theirs, ours
	default:
		return nil, nil, false
	}
	sealer, err := NewSealer(state.CipherSuite, ours)
	if err != nil {
		return nil, nil, false
	}
	opener, err := NewOpener(state.CipherSuite, theirs, role)
	if err != nil {
		return nil, nil, false
	}
	return sealer, opener, true
}

// suite is a cipher suite of RFC 8446, B.4.
type suite struct {
	keyBytes int
	hash     func() hash.Hash
}

// suiteOf returns nil for a suite that is not AES-GCM.
func suiteOf(id uint16) *suite {
	switch id {
	case tls.TLS_AES_128_GCM_SHA256:
		return &suite{16, sha256.New}
	case tls.TLS_AES_256_GCM_SHA384:
		return &suite{32, sha512.New384}
	}
	return nil
}

const (
	nonceBytes = 12
	tagBytes   = 16
)

// direction is the key, nonce and sequence number of one direction of a connection.
type direction struct {
	suite  *suite
	secret []byte // the traffic secret, from which the next one is derived
	aead   cipher.AEAD
	iv     [nonceBytes]byte
	nonce  [nonceBytes]byte
	seq    uint64 // of the next record
}

func newDirection(id uint16, secret []byte) (direction, error) {
	su := suiteOf(id)
	if su == nil {
		return direction{}, fmt.Errorf("cipher suite %#04x is not AES-GCM", id)
	}
	if len(secret) != su.hash().Size() {
		return direction{}, fmt.Errorf("traffic secret of %d bytes", len(secret))
	}
	d := direction{suite: su, secret: bytes.Clone(secret)}
	return d, d.derive()
}

// derive is RFC 8446, 7.3: key and nonce from the secret, and the sequence number from its start.
func (d *direction) derive() error {
	key, err := d.expand("key", d.suite.keyBytes)
	if err != nil {
		return err
	}
	defer clear(key)
	iv, err := d.expand("iv", nonceBytes)
	if err != nil {
		return err
	}
	defer clear(iv)
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	if d.aead, err = cipher.NewGCM(block); err != nil {
		return err
	}
	d.iv, d.seq = [nonceBytes]byte(iv), 0
	return nil
}

// next is RFC 8446, 7.2: the secret after a key update.
func (d *direction) next() error {
	secret, err := d.expand("traffic upd", len(d.secret))
	if err != nil {
		return err
	}
	clear(d.secret)
	d.secret = secret
	return d.derive()
}

// expand is HKDF-Expand-Label with an empty context, RFC 8446, 7.1.
func (d *direction) expand(label string, n int) ([]byte, error) {
	info := make([]byte, 0, 32)
	info = append(info, byte(n>>8), byte(n), byte(len("tls13 ")+len(label)))
	info = append(info, "tls13 "...)
	info = append(info, label...)
	info = append(info, 0)
	return hkdf.Expand(d.suite.hash, d.secret, string(info), n)
}

// nextNonce is RFC 8446, 5.3; ok is false when the sequence number would wrap.
func (d *direction) nextNonce() (ok bool) {
	if d.seq == ^uint64(0) {
		return false
	}
	d.nonce = d.iv
	for i := range 8 {
		d.nonce[nonceBytes-1-i] ^= byte(d.seq >> (8 * i))
	}
	d.seq++
	return true
}

func (d *direction) wipe() {
	clear(d.secret)
	clear(d.iv[:])
	clear(d.nonce[:])
	d.aead = nil
}
