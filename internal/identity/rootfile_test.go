package identity_test

import (
	"context"
	"crypto/tls"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
)

// write replaces a file as the kubelet does: readers see the old or the new one.
func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func TestRootFileIsReadForEveryHandshake(t *testing.T) {
	t.Parallel()
	const name = "istiod.istio-system.svc"
	one, two := meshtest.NewCA(t), meshtest.NewCA(t)
	path := filepath.Join(t.TempDir(), "root-cert.pem")
	write(t, path, one.RootPEM())
	f, err := identity.OpenRootFile(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	client, err := f.Config(name)
	if err != nil {
		t.Fatal(err)
	}
	server := func(ca *meshtest.CA, name string) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{*ca.Issue(mesh.Identity{}, meshtest.Server(name))}, NextProtos: []string{"h2"}}
	}
	accepted := func(ca *meshtest.CA, what string) {
		t.Helper()
		if o := handshake(t, client, server(ca, name)); o.client != nil {
			t.Errorf("%s: %v", what, o.client)
		}
	}
	accepted(one, "the root in the file")
	checkRefused(t, "client", handshake(t, client, server(two, name)).client, "unknown authority")
	checkRefused(t, "client", handshake(t, client, server(one, "other")).client, "not "+name)
	write(t, path, append(one.RootPEM(), two.RootPEM()...))
	accepted(two, "a root that was added")
	accepted(one, "the root that stayed")
	write(t, path, two.RootPEM())
	checkRefused(t, "client", handshake(t, client, server(one, name)).client, "unknown authority")
	for _, bad := range [][]byte{[]byte("half a fi"), nil} {
		write(t, path, bad)
		accepted(two, "the last good root")
	}
	if _, err := identity.OpenRootFile(path, nil); err == nil {
		t.Error("a file without certificates was taken")
	}
	if _, err := f.Config(""); err == nil {
		t.Error("an empty server name was accepted")
	}
}

func TestChangedRootsRenewCertificates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root-cert.pem")
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t)}
		write(t, path, a.ca.RootPEM())
		f, err := identity.OpenRootFile(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		m := run(t, a, 24*time.Hour)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); f.Watch(ctx, m.Renew) }()
		defer func() { stop(); <-done }()
		first := mustSVID(t, m, web)
		time.Sleep(time.Hour)
		if n := len(a.asked()); n != 1 {
			t.Fatalf("%d requests while nothing changed", n)
		}
		write(t, path, append(a.ca.RootPEM(), meshtest.NewCA(t).RootPEM()...))
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if n := len(a.asked()); n != 2 || mustSVID(t, m, web) == first {
			t.Errorf("%d requests, want a second one", n)
		}
		a.set(context.DeadlineExceeded)
		second := mustSVID(t, m, web)
		m.Renew()
		time.Sleep(20 * time.Second)
		if mustSVID(t, m, web) != second {
			t.Error("a renewal that failed took the certificate away")
		}
		time.Sleep(time.Hour)
	})
}

func TestRenewAsksAgainAfterWhatIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t), hold: make(chan struct{})}
		m := run(t, a, 24*time.Hour)
		m.Prefetch(web)
		synctest.Wait()
		m.Renew()
		a.hold <- struct{}{}
		synctest.Wait()
		time.Sleep(5 * time.Second)
		a.hold <- struct{}{}
		time.Sleep(time.Minute)
		if n := len(a.asked()); n != 2 {
			t.Errorf("%d requests, want 2", n)
		}
	})
}
