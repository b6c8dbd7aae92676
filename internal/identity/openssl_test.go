package identity_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
)

// Another implementation of TLS must get along with ours, and be refused where ours would be.
func TestOpenSSLPeer(t *testing.T) {
	t.Parallel()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("the openssl command is not installed")
	}
	ca, other := meshtest.NewCA(t), meshtest.NewCA(t)
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	root := file("root.pem", ca.RootPEM())
	credentials := func(name string, c *tls.Certificate) []string {
		var chain []byte
		for _, der := range c.Certificate {
			chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
		}
		key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		cert := file(name+".pem", chain)
		return []string{
			"-cert", cert, "-cert_chain", cert,
			"-key", file(name+"-key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
		}
	}
	ours, theirs := credentials("ours", ca.Issue(web)), credentials("theirs", other.Issue(web))
	cases := []struct {
		name string
		args []string
		want string // the server's error; "": none
	}{
		{"a member of the mesh", append([]string{"-alpn", "h2"}, ours...), ""},
		{"by X25519", append([]string{"-alpn", "h2", "-groups", "X25519"}, ours...), ""},
		{"nobody", []string{"-alpn", "h2"}, "client didn't provide a certificate"},
		{"a member of another mesh", append([]string{"-alpn", "h2"}, theirs...), "not signed by a root"},
		{"TLS 1.2", append([]string{"-alpn", "h2", "-tls1_2"}, ours...), "unsupported versions"},
		{"no ALPN", ours, "did not agree on protocol"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			type result struct {
				peer mesh.Identity
				got  []byte
				err  error
			}
			results := make(chan result, 1)
			go func() {
				var r result
				defer func() { results <- r }()
				raw, err := ln.Accept()
				if err != nil {
					r.err = err
					return
				}
				defer raw.Close()
				s := tls.Server(raw, identity.ServerConfig(ca.SVID(cart)))
				if r.err = s.HandshakeContext(ctx); r.err != nil {
					return
				}
				if r.peer, r.err = identity.PeerIdentity(s.ConnectionState()); r.err != nil {
					return
				}
				r.got = make([]byte, len("hello\n"))
				_, r.err = s.Read(r.got)
				s.Close()
			}()
			args := append([]string{"s_client", "-connect", ln.Addr().String(), "-noservername", "-CAfile", root, "-verify_return_error"}, c.args...)
			cmd := exec.CommandContext(ctx, openssl, args...)
			cmd.Stdin = strings.NewReader("hello\n")
			out, _ := cmd.CombinedOutput() // its status says little: the server's end is what counts
			ln.Close()
			r := <-results
			if c.want != "" {
				checkRefused(t, "server", r.err, c.want)
				return
			}
			if r.err != nil || r.peer != web || string(r.got) != "hello\n" {
				t.Errorf("server: peer %v, read %q, %v\n%s", r.peer, r.got, r.err, out)
			}
			for _, want := range []string{"ALPN protocol: h2", "Verification: OK", "TLSv1.3"} {
				if !bytes.Contains(out, []byte(want)) {
					t.Errorf("openssl does not say %q:\n%s", want, out)
				}
			}
			if bytes.Contains(out, []byte("New Session Ticket arrived")) {
				t.Error("the server sent a session ticket")
			}
		})
	}
}
