package hbone_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
)

// pki is a certificate authority with one client and one server.
type pki struct {
	roots   *x509.CertPool
	rootDER []byte
	client  tls.Certificate
	server  tls.Certificate
}

var (
	clientID = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}
	serverID = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}
)

var sharedPKI = sync.OnceValue(func() *pki {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test root"},
		// Wide enough for the clock of a synctest bubble, which starts in the year 2000.
		NotBefore: time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	ca, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	p := &pki{roots: x509.NewCertPool(), rootDER: der}
	p.roots.AddCert(ca)
	issue := func(id mesh.Identity) tls.Certificate {
		leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			panic(err)
		}
		uri, err := url.Parse(id.String())
		if err != nil {
			panic(err)
		}
		leaf := &x509.Certificate{
			SerialNumber: big.NewInt(2), NotBefore: root.NotBefore, NotAfter: root.NotAfter,
			KeyUsage:    x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
			URIs:        []*url.URL{uri}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{{127, 0, 0, 1}},
		}
		der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &leafKey.PublicKey, key)
		if err != nil {
			panic(err)
		}
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: leafKey}
	}
	p.client, p.server = issue(clientID), issue(serverID)
	return p
})

func serverTLS() *tls.Config {
	p := sharedPKI()
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, SessionTicketsDisabled: true,
		Certificates: []tls.Certificate{p.server}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: p.roots,
	}
}

func clientTLS() *tls.Config {
	p := sharedPKI()
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ServerName: "localhost",
		Certificates: []tls.Certificate{p.client}, RootCAs: p.roots,
	}
}

// serve runs srv on a loopback listener until the test ends and returns its address.
func serve(t testing.TB, srv *hbone.Server) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if srv.TLS == nil {
		srv.TLS = serverTLS()
	}
	ctx, cancel := context.WithCancel(context.Background())
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { srv.ServeConn(ctx, c) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		cancel()
		conns.Wait()
	})
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// newPool returns a pool that is closed when the test ends.
func newPool(t testing.TB, change func(*hbone.PoolConfig)) *hbone.Pool {
	t.Helper()
	cfg := hbone.PoolConfig{
		Dial: func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr.String())
		},
		TLS: func(context.Context, hbone.Target) (*tls.Config, error) { return clientTLS(), nil },
	}
	if change != nil {
		change(&cfg)
	}
	p := hbone.NewPool(cfg)
	t.Cleanup(func() { p.Close() })
	return p
}

func target(addr netip.AddrPort) hbone.Target {
	return hbone.Target{Local: clientID, Addr: addr, Expect: []mesh.Identity{serverID}}
}

// open opens a tunnel or ends the test.
func open(t testing.TB, p *hbone.Pool, addr netip.AddrPort) *hbone.Stream {
	t.Helper()
	s, err := p.Open(context.Background(), target(addr), "10.0.0.1:80", hbone.Header{})
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return s
}

// echo accepts and sends back what it receives, passing on the half-close.
func echo(_ context.Context, r *hbone.Request) {
	s, err := r.Accept("")
	if err != nil {
		return
	}
	if _, err := io.Copy(s, s); err == nil {
		s.CloseWrite()
	}
}

// unusedAddr is an address nobody listens on.
func unusedAddr(t testing.TB) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// plainServer answers every connection with a line of text.
func plainServer(t testing.TB) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "220 mail.example ready\r\n")
			c.Close()
		}
	})
	t.Cleanup(func() { ln.Close(); work.Wait() })
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// foreignTLS shows no certificate.
func foreignTLS(context.Context, hbone.Target) (*tls.Config, error) {
	c := clientTLS()
	c.Certificates = nil
	return c, nil
}

// listen opens a listener on loopback.
func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

func addrOf(ln net.Listener) netip.AddrPort { return ln.Addr().(*net.TCPAddr).AddrPort() }
