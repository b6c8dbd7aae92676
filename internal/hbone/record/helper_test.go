package record_test

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/hbone/record"
)

func unhex(s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		panic(err)
	}
	return b
}

// Of RFC 8448, 3: what the client of the simple handshake writes with.
var (
	rfcSecret = unhex("9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5")
	rfcKey    = unhex("17422dda596ed5d9acd890e3c63f5051")
	rfcIV     = unhex("5b78923dee08579033e523d9")
)

// forge makes records with rfcSecret's key the plain way, of any content.
type forge struct{ seq uint64 }

func (f *forge) record(inner []byte) []byte {
	block, err := aes.NewCipher(rfcKey)
	if err != nil {
		panic(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	nonce := append([]byte(nil), rfcIV...)
	var seq [12]byte
	binary.BigEndian.PutUint64(seq[4:], f.seq)
	for i := range nonce {
		nonce[i] ^= seq[i]
	}
	f.seq++
	n := len(inner) + 16
	header := []byte{23, 3, 3, byte(n >> 8), byte(n)}
	return aead.Seal(header, nonce, inner, header)
}

// of is a record of a content type.
func (f *forge) of(typ byte, content ...byte) []byte {
	return f.record(append(append([]byte(nil), content...), typ))
}

func rfcOpener(t testing.TB, role record.Role) *record.Opener {
	t.Helper()
	o, err := record.NewOpener(tls.TLS_AES_128_GCM_SHA256, rfcSecret, role)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func rfcSealer(t testing.TB) *record.Sealer {
	t.Helper()
	s, err := record.NewSealer(tls.TLS_AES_128_GCM_SHA256, rfcSecret)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// selfSigned is a certificate that is its own authority.
var selfSigned = sync.OnceValues(func() (tls.Certificate, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots
})

// config serves both roles.
func config() *tls.Config {
	cert, roots := selfSigned()
	return &tls.Config{
		Certificates: []tls.Certificate{cert}, RootCAs: roots, ClientCAs: roots, ServerName: "localhost",
		ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
	}
}

// pemFiles writes the certificate and its key for programs that want files.
func pemFiles(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	cert, _ := selfSigned()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: cert.Certificate[0]}, keyFile: {Type: "PRIVATE KEY", Bytes: key}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

// tcpPair is a connection over loopback.
func tcpPair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	a, err = net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err = ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// stingy hands over one record at a time, as Secrets' user must.
type stingy struct {
	net.Conn
	rest []byte
}

func (s *stingy) Read(p []byte) (int, error) {
	if len(s.rest) == 0 {
		rec, err := readRecord(s.Conn)
		if err != nil {
			return 0, err
		}
		s.rest = rec
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

func readRecord(r io.Reader) ([]byte, error) {
	rec := make([]byte, record.HeaderBytes, record.HeaderBytes+1<<16)
	if _, err := io.ReadFull(r, rec); err != nil {
		return nil, err
	}
	rec = rec[:record.Length(rec)]
	_, err := io.ReadFull(r, rec[record.HeaderBytes:])
	return rec, err
}

// end is a connection carried on by this package: an io.ReadWriter that answers key updates.
type end struct {
	raw     net.Conn
	sealer  *record.Sealer
	opener  *record.Opener
	state   tls.ConnectionState
	buf     []byte
	rest    []byte
	updates int
}

// takeOver does the handshake by crypto/tls and then takes the connection from it.
func takeOver(t *testing.T, raw net.Conn, role record.Role, cfg *tls.Config) *end {
	t.Helper()
	var log record.Secrets
	cfg = cfg.Clone()
	cfg.KeyLogWriter = &log
	tc := tls.Client(&stingy{Conn: raw}, cfg)
	if role == record.Server {
		tc = tls.Server(&stingy{Conn: raw}, cfg)
	}
	if err := tc.Handshake(); err != nil {
		t.Fatalf("handshake: %v", err)
	}
	s, o, ok := log.Take(role, tc.ConnectionState())
	if !ok {
		t.Fatal("Take refused the connection")
	}
	return &end{raw: raw, sealer: s, opener: o, state: tc.ConnectionState(), buf: make([]byte, record.OpenRoom)}
}

func (e *end) Read(p []byte) (int, error) {
	for len(e.rest) == 0 {
		if err := e.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, e.rest)
	e.rest = e.rest[n:]
	return n, nil
}

// next opens one record.
func (e *end) next() error {
	rec, err := readRecord(e.raw)
	if err != nil {
		return err
	}
	n, err := e.opener.Open(e.buf, rec)
	if err != nil {
		return err
	}
	e.rest = e.buf[:n]
	if owed := e.opener.Owed(); owed != record.Nothing {
		e.updates++
		return e.update(owed == record.AskUpdate)
	}
	return nil
}

func (e *end) Write(p []byte) (int, error) {
	out, err := e.sealer.Seal(nil, p, nil)
	if err != nil {
		return 0, err
	}
	if _, err := e.raw.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (e *end) update(ask bool) error {
	out, err := e.sealer.Update(nil, ask)
	if err == nil {
		_, err = e.raw.Write(out)
	}
	return err
}

func (e *end) close() error {
	out, err := e.sealer.Alert(nil, record.CloseNotify)
	if err == nil {
		_, err = e.raw.Write(out)
	}
	return err
}
