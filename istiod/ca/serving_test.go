package ca_test

import (
	"crypto/tls"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/istiod/ca"
)

func TestServingCertificateRenewsItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := open(t, ca.Config{})
		cfg := a.ServingConfig([]string{"istiod", serverName}, []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("::1")})
		current := func() *tls.Certificate {
			t.Helper()
			cert, err := cfg.GetCertificate(&tls.ClientHelloInfo{})
			if err != nil {
				t.Fatal(err)
			}
			return cert
		}
		first := current()
		if d := cmp.Diff([]string{"istiod", serverName}, first.Leaf.DNSNames); d != "" {
			t.Errorf("DNS names (-want +got):\n%s", d)
		}
		var ips []string
		for _, ip := range first.Leaf.IPAddresses {
			ips = append(ips, ip.String())
		}
		if d := cmp.Diff([]string{"10.0.0.1", "::1"}, ips); d != "" {
			t.Errorf("addresses (-want +got):\n%s", d)
		}
		if len(first.Leaf.URIs) > 0 {
			t.Errorf("istiod's certificate carries the identities %v", first.Leaf.URIs)
		}
		time.Sleep(11 * time.Hour)
		if current() != first {
			t.Error("certificate was renewed before half of its life")
		}
		time.Sleep(2 * time.Hour)
		second := current()
		if second == first || !second.Leaf.NotAfter.After(first.Leaf.NotAfter) {
			t.Error("certificate was not renewed after half of its life")
		}
		time.Sleep(30 * 24 * time.Hour) // nobody called for long
		if last := current(); time.Until(last.Leaf.NotAfter) < 23*time.Hour {
			t.Errorf("certificate shown expires at %s, now is %s", last.Leaf.NotAfter, time.Now())
		}
	})
}

func TestServingConfigIsVerifiedByClients(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	plug(t, dir, newPlug(t)) // with intermediates, which the server must send
	i := open(t, ca.Config{Dir: dir})
	server := i.ServingConfig([]string{serverName}, nil)
	client, err := identity.ControlPlaneConfig(i.RootPEM(), serverName)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	done := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			err = c.(*tls.Conn).HandshakeContext(t.Context())
			c.Close()
		}
		done <- err
	}()
	c, err := tls.Dial("tcp", ln.Addr().String(), client)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
