package identity_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
)

var (
	web     = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}
	cart    = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}
	foreign = mesh.Identity{TrustDomain: "elsewhere.example", Namespace: "shop", ServiceAccount: "web"}
)

// outcome is how a handshake ended at each side.
type outcome struct {
	client, server           error
	clientState, serverState tls.ConnectionState
}

// handshake runs one over an in-memory connection. Since a TLS 1.3 client is done before the server has judged it, the
// client then reads one byte the server writes.
func handshake(t *testing.T, client, server *tls.Config) outcome {
	t.Helper()
	a, b := net.Pipe()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var o outcome
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer b.Close()
		s := tls.Server(b, server)
		if o.server = s.HandshakeContext(ctx); o.server == nil {
			o.serverState = s.ConnectionState()
			_, o.server = s.Write([]byte{1})
		}
	}()
	c := tls.Client(a, client)
	if o.client = c.HandshakeContext(ctx); o.client == nil {
		o.clientState = c.ConnectionState()
		_, o.client = io.ReadFull(c, make([]byte, 1))
	}
	a.Close()
	<-done
	return o
}

func TestMutualHandshake(t *testing.T) {
	t.Parallel()
	ca := meshtest.NewCA(t)
	o := handshake(t, identity.ClientConfig(ca.SVID(web), []mesh.Identity{foreign, cart}), identity.ServerConfig(ca.SVID(cart)))
	if err := errors.Join(o.client, o.server); err != nil {
		t.Fatalf("handshake: %v", err)
	}
	for _, side := range []struct {
		name  string
		state tls.ConnectionState
		peer  mesh.Identity
	}{{"client", o.clientState, cart}, {"server", o.serverState, web}} {
		if got, err := identity.PeerIdentity(side.state); err != nil || got != side.peer {
			t.Errorf("%s: PeerIdentity = %v, %v, want %v", side.name, got, err, side.peer)
		}
		if side.state.Version != tls.VersionTLS13 || side.state.NegotiatedProtocol != "h2" {
			t.Errorf("%s: version %x, protocol %q, want TLS 1.3 and h2", side.name, side.state.Version, side.state.NegotiatedProtocol)
		}
		if side.state.ServerName != "" && side.name == "server" {
			t.Errorf("client sent SNI %q, want none", side.state.ServerName)
		}
		if side.state.CurveID != tls.CurveP256 {
			t.Errorf("%s: key exchange %v, want P-256", side.name, side.state.CurveID)
		}
	}
	if _, err := identity.PeerIdentity(tls.ConnectionState{}); err == nil {
		t.Error("PeerIdentity before a handshake succeeded")
	}
}

// A bad client certificate must be refused by the server, a bad server certificate by the client, each saying why.
func TestBadPeerCertificate(t *testing.T) {
	t.Parallel()
	ca, other := meshtest.NewCA(t), meshtest.NewCA(t)
	now := time.Now()
	foreignRoot := ca.SVID(web)
	foreignRoot.Certificate = *other.Issue(web)
	cases := []struct {
		name string
		svid *identity.SVID
		want string
	}{
		{"expired", ca.SVID(web, meshtest.Valid(now.Add(-time.Hour), now.Add(-5*time.Minute))), "certificate of spiffe://cluster.local/ns/shop/sa/web expired 5m"},
		{"not yet valid", ca.SVID(web, meshtest.Valid(now.Add(time.Hour), now.Add(2*time.Hour))), "becomes valid only in"},
		{"signed by a foreign root", foreignRoot, "is not signed by a root of this mesh"},
		{"without a URI SAN", ca.SVID(web, meshtest.URIs()), "no URI SAN"},
		{"with two URI SANs", ca.SVID(web, meshtest.URIs(web.String(), cart.String())), "more than one URI SAN"},
		{"with a URI that is no workload's", ca.SVID(web, meshtest.URIs("spiffe://cluster.local/somebody")), "path is not /ns/"},
		{"with a URI that is no SPIFFE id", ca.SVID(web, meshtest.URIs("https://cluster.local/ns/shop/sa/web")), "scheme"},
		{"for code signing", ca.SVID(web, meshtest.Usage(x509.ExtKeyUsageCodeSigning)), "may not be used as a"},
		{"that can sign others", ca.SVID(web, func(c *x509.Certificate) { c.IsCA = true }), "one of an authority"},
	}
	for _, c := range cases {
		t.Run("client "+c.name, func(t *testing.T) {
			t.Parallel()
			o := handshake(t, identity.ClientConfig(c.svid, []mesh.Identity{cart}), identity.ServerConfig(ca.SVID(cart)))
			checkRefused(t, "server", o.server, c.want)
			if o.client == nil {
				t.Error("client read data of a server that refused it")
			}
		})
		t.Run("server "+c.name, func(t *testing.T) {
			t.Parallel()
			o := handshake(t, identity.ClientConfig(ca.SVID(cart), []mesh.Identity{web}), identity.ServerConfig(c.svid))
			checkRefused(t, "client", o.client, c.want)
		})
	}
	t.Run("server certificate used by a client", func(t *testing.T) {
		t.Parallel()
		onlyServer := ca.SVID(web, meshtest.Usage(x509.ExtKeyUsageServerAuth))
		o := handshake(t, identity.ClientConfig(onlyServer, []mesh.Identity{cart}), identity.ServerConfig(ca.SVID(cart)))
		checkRefused(t, "server", o.server, "may not be used as a client certificate")
	})
}

func checkRefused(t *testing.T, side string, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%s: %v, want an error with %q", side, err, want)
	}
}

func TestWhoIsAccepted(t *testing.T) {
	t.Parallel()
	ca := meshtest.NewCA(t)
	withAlias := ca.SVID(cart)
	withAlias.Trust = &identity.Trust{Aliases: []string{foreign.TrustDomain}}
	noRoots := ca.SVID(cart)
	noRoots.Roots = nil
	noCert := identity.ClientConfig(ca.SVID(web), []mesh.Identity{cart})
	noCert.GetClientCertificate = nil
	tls12 := identity.ClientConfig(ca.SVID(web), []mesh.Identity{cart})
	tls12.MinVersion, tls12.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	noALPN := identity.ClientConfig(ca.SVID(web), []mesh.Identity{cart})
	noALPN.NextProtos, noALPN.VerifyConnection = nil, nil
	http11 := identity.ClientConfig(ca.SVID(web), []mesh.Identity{cart})
	http11.NextProtos, http11.VerifyConnection = []string{"http/1.1"}, nil // crypto/tls lets this pair through without a protocol
	serverNoALPN := identity.ServerConfig(ca.SVID(cart))
	serverNoALPN.NextProtos, serverNoALPN.VerifyConnection = nil, nil
	client := func(id mesh.Identity, expect ...mesh.Identity) *tls.Config {
		return identity.ClientConfig(ca.SVID(id), expect)
	}
	server := identity.ServerConfig(ca.SVID(cart))
	cases := []struct {
		name               string
		client, server     *tls.Config
		atClient, atServer string
	}{
		{"a peer that is not the one expected", client(web, web), server, "peer is spiffe://cluster.local/ns/shop/sa/cart, expected spiffe://cluster.local/ns/shop/sa/web", ""},
		{"no peer expected", client(web), server, "no identity is expected", ""},
		{"a foreign trust domain", client(foreign, cart), server, "", "foreign trust domain"},
		{"an alias of the trust domain", client(foreign, cart), identity.ServerConfig(withAlias), "", ""},
		{"no client certificate", noCert, server, "", "client didn't provide a certificate"},
		{"a TLS 1.2 client", tls12, server, "", "unsupported versions"},
		{"a client without ALPN", noALPN, server, "", "did not agree on protocol"},
		{"a client of another protocol", http11, server, "", "did not agree on protocol"},
		{"a server without ALPN", client(web, cart), serverNoALPN, "did not agree on protocol", ""},
		{"no roots at the server", client(web, cart), identity.ServerConfig(noRoots), "", "no mesh roots"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			o := handshake(t, c.client, c.server)
			if c.atClient == "" && c.atServer == "" {
				if err := errors.Join(o.client, o.server); err != nil {
					t.Fatalf("handshake: %v", err)
				}
				return
			}
			if c.atClient != "" {
				checkRefused(t, "client", o.client, c.atClient)
			}
			if c.atServer != "" {
				checkRefused(t, "server", o.server, c.atServer)
			}
		})
	}
}

func TestNoResumption(t *testing.T) {
	t.Parallel()
	ca := meshtest.NewCA(t)
	client := identity.ClientConfig(ca.SVID(web), []mesh.Identity{cart})
	client.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	client.ServerName = "one-name-so-that-sessions-have-a-key"
	server := identity.ServerConfig(ca.SVID(cart))
	for i := range 3 {
		o := handshake(t, client, server)
		if err := errors.Join(o.client, o.server); err != nil {
			t.Fatalf("handshake %d: %v", i, err)
		}
		if o.clientState.DidResume || o.serverState.DidResume {
			t.Errorf("handshake %d was resumed", i)
		}
	}
}

func TestPostQuantumIsAnOption(t *testing.T) {
	t.Parallel()
	ca := meshtest.NewCA(t)
	pq := func(id mesh.Identity) *identity.SVID {
		s := ca.SVID(id)
		s.Trust = &identity.Trust{PostQuantum: true}
		return s
	}
	only := func(c *tls.Config, curve tls.CurveID) *tls.Config {
		c.CurvePreferences = []tls.CurveID{curve}
		return c
	}
	expect := []mesh.Identity{cart}
	cases := []struct {
		name           string
		client, server *tls.Config
		want           tls.CurveID // 0: the handshake fails
	}{
		{"both offer it", identity.ClientConfig(pq(web), expect), identity.ServerConfig(pq(cart)), tls.X25519MLKEM768},
		{"only the client offers it", identity.ClientConfig(pq(web), expect), identity.ServerConfig(ca.SVID(cart)), tls.X25519},
		{"only the server offers it", identity.ClientConfig(ca.SVID(web), expect), identity.ServerConfig(pq(cart)), tls.CurveP256},
		{"the client insists, the server offers", only(identity.ClientConfig(ca.SVID(web), expect), tls.X25519MLKEM768), identity.ServerConfig(pq(cart)), tls.X25519MLKEM768},
		{"the client insists, the server does not offer", only(identity.ClientConfig(ca.SVID(web), expect), tls.X25519MLKEM768), identity.ServerConfig(ca.SVID(cart)), 0},
		{"a client of X25519 only", only(identity.ClientConfig(ca.SVID(web), expect), tls.X25519), identity.ServerConfig(ca.SVID(cart)), tls.X25519},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			o := handshake(t, c.client, c.server)
			if err := errors.Join(o.client, o.server); (err == nil) != (c.want != 0) {
				t.Fatalf("handshake: %v", err)
			}
			if o.serverState.CurveID != c.want {
				t.Errorf("key exchange %v, want %v", o.serverState.CurveID, c.want)
			}
		})
	}
}

// A certificate that was verified once must not outlive its validity in the cache.
func TestVerifiedPeerExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := meshtest.NewCA(t)
		now := time.Now()
		client := identity.ClientConfig(ca.SVID(web, meshtest.Valid(now, now.Add(time.Hour))), []mesh.Identity{cart})
		server := identity.ServerConfig(ca.SVID(cart))
		for range 2 {
			if o := handshake(t, client, server); o.client != nil || o.server != nil {
				t.Fatalf("handshake: %v, %v", o.client, o.server)
			}
		}
		time.Sleep(time.Hour + time.Minute)
		checkRefused(t, "server", handshake(t, client, server).server, "expired 1m0s ago")
	})
}

// A peer verified against one set of roots is nothing to another.
func TestVerifiedPeerBelongsToItsRoots(t *testing.T) {
	t.Parallel()
	ca, other := meshtest.NewCA(t), meshtest.NewCA(t)
	client := identity.ClientConfig(ca.SVID(web), []mesh.Identity{cart})
	svid := ca.SVID(cart)
	if o := handshake(t, client, identity.ServerConfig(svid)); o.server != nil {
		t.Fatalf("handshake: %v", o.server)
	}
	svid.Roots = other.Roots()
	checkRefused(t, "server", handshake(t, client, identity.ServerConfig(svid)).server, "not signed by a root")
}

func TestControlPlaneConfig(t *testing.T) {
	t.Parallel()
	ca, other := meshtest.NewCA(t), meshtest.NewCA(t)
	server := &tls.Config{
		Certificates: []tls.Certificate{*ca.Issue(mesh.Identity{}, meshtest.Server("istiod.istio-system.svc"))},
		NextProtos:   []string{"h2"},
	}
	for _, c := range []struct {
		name, serverName string
		root             []byte
		want             string
	}{
		{"the right server", "istiod.istio-system.svc", ca.RootPEM(), ""},
		{"another name", "istiod.elsewhere.svc", ca.RootPEM(), "not istiod.elsewhere.svc"},
		{"another root", "istiod.istio-system.svc", other.RootPEM(), "unknown authority"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			client, err := identity.ControlPlaneConfig(c.root, c.serverName)
			if err != nil {
				t.Fatal(err)
			}
			o := handshake(t, client, server)
			if c.want == "" {
				if o.client != nil {
					t.Errorf("handshake: %v", o.client)
				}
				return
			}
			checkRefused(t, "client", o.client, c.want)
		})
	}
	if _, err := identity.ControlPlaneConfig([]byte("no certificate"), "istiod"); err == nil {
		t.Error("garbage was taken for a root certificate")
	}
	if _, err := identity.ControlPlaneConfig(ca.RootPEM(), ""); err == nil {
		t.Error("an empty server name was accepted")
	}
}
