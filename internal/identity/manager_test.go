package identity_test

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
)

// authority is a CA that a test can take down, hold up and watch.
type authority struct {
	ca *meshtest.CA

	mu    sync.Mutex
	down  error
	hold  chan struct{} // when set, a request waits for one receive
	calls []call
}

type call struct {
	id mesh.Identity
	at time.Time
}

func (a *authority) Sign(ctx context.Context, id mesh.Identity, csr []byte, ttl time.Duration) ([]string, error) {
	a.mu.Lock()
	a.calls = append(a.calls, call{id, time.Now()})
	down, hold := a.down, a.hold
	a.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if down != nil {
		return nil, down
	}
	return a.ca.Sign(ctx, id, csr, ttl)
}

func (a *authority) set(down error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.down = down
}

func (a *authority) asked() []call {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.calls)
}

// run starts a Manager whose jitter is always in the middle, and stops it with the test.
func run(t *testing.T, a identity.CA, ttl time.Duration) *identity.Manager {
	t.Helper()
	m := identity.NewManager(identity.ManagerConfig{CA: a, TTL: ttl, Rand: func() float64 { return 0.5 }})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
	return m
}

func mustSVID(t *testing.T, m *identity.Manager, id mesh.Identity) *identity.SVID {
	t.Helper()
	s, err := m.SVID(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func account(n int) mesh.Identity {
	return mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: fmt.Sprintf("sa-%02d", n)}
}

func TestManyCallersOneRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t), hold: make(chan struct{})}
		m := run(t, a, time.Hour)
		got := make([]*identity.SVID, 20)
		var wg sync.WaitGroup
		for i := range got {
			wg.Go(func() {
				var err error
				if got[i], err = m.SVID(t.Context(), web); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		a.hold <- struct{}{}
		wg.Wait()
		for _, s := range got {
			if s != got[0] {
				t.Error("two callers got two certificates")
			}
		}
		if n := len(a.asked()); n != 1 {
			t.Errorf("%d requests, want 1", n)
		}
		if got[0].ID != web || got[0].Expired(time.Now()) {
			t.Errorf("certificate of %s until %s", got[0].ID, got[0].NotAfter)
		}
		if _, err := m.SVID(t.Context(), mesh.Identity{}); err == nil {
			t.Error("nobody got a certificate")
		}
	})
}

func TestRenewalAtHalfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t)}
		m := run(t, a, 24*time.Hour)
		first := mustSVID(t, m, web)
		start := time.Now()
		time.Sleep(72 * time.Hour)
		synctest.Wait()
		var at []string
		for _, c := range a.asked()[1:] {
			at = append(at, c.at.Sub(start).String())
		}
		// Half of 24 h, less half of the spread of 5 %: 11 h 24 min.
		want := []string{"11h24m0s", "22h48m0s", "34h12m0s", "45h36m0s", "57h0m0s", "68h24m0s"}
		if d := cmp.Diff(want, at); d != "" {
			t.Errorf("renewals after (-want +got):\n%s", d)
		}
		last := mustSVID(t, m, web)
		if last == first || last.Expired(time.Now()) {
			t.Error("the certificate in use is not the renewed one")
		}
		if last.Roots != first.Roots {
			t.Error("the same roots are in two pools, so verified peers are forgotten with each renewal")
		}
		if last.Certificate.PrivateKey == first.Certificate.PrivateKey {
			t.Error("the private key was used twice")
		}
	})
}

func TestRenewalKeepsRetryingAndOldCertificateServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t)}
		m := run(t, a, 20*time.Minute)
		first := mustSVID(t, m, web)
		a.set(errors.New("istiod is away"))
		time.Sleep(19 * time.Minute)
		if mustSVID(t, m, web) != first {
			t.Error("the old certificate is still valid and was not given")
		}
		calls := a.asked()[1:]
		var pauses []string
		for i := 1; i < len(calls); i++ {
			pauses = append(pauses, calls[i].at.Sub(calls[i-1].at).String())
		}
		want := []string{"1s", "2s", "4s", "8s", "16s", "32s", "1m4s", "2m8s", "2m30s", "2m30s"}
		if d := cmp.Diff(want, pauses); d != "" {
			t.Errorf("pauses (-want +got):\n%s", d)
		}
		time.Sleep(2 * time.Minute) // now it has expired
		_, err := m.SVID(t.Context(), web)
		if err == nil || !strings.Contains(err.Error(), "istiod is away") || !strings.Contains(err.Error(), "next attempt in") || !strings.Contains(err.Error(), "expired 1m") {
			t.Errorf("SVID after expiry: %v, want when it expired, the cause and the time of the next attempt", err)
		}
		if state := m.Certificates()[0].State; state != "Unavailable: istiod is away" {
			t.Errorf("state %q", state)
		}
		a.set(nil)
		time.Sleep(150 * time.Second)
		if s := mustSVID(t, m, web); s == first {
			t.Error("the expired certificate was given")
		}
		if state := m.Certificates()[0].State; state != "Available" {
			t.Errorf("state %q, want Available", state)
		}
	})
}

func TestBackoffJitter(t *testing.T) {
	for _, c := range []struct {
		random float64
		want   []string
	}{
		{0, []string{"800ms", "1.6s", "3.2s"}},
		{0.999999, []string{"1.2s", "2.4s", "4.8s"}},
	} {
		synctest.Test(t, func(t *testing.T) {
			a := &authority{ca: meshtest.NewCA(t), down: errors.New("down")}
			m := identity.NewManager(identity.ManagerConfig{CA: a, Rand: func() float64 { return c.random }})
			ctx, cancel := context.WithTimeout(t.Context(), 9*time.Second)
			defer cancel()
			m.Prefetch(web)
			if err := m.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Run: %v", err)
			}
			var pauses []string
			calls := a.asked()
			for i := 1; i < len(calls); i++ {
				pauses = append(pauses, calls[i].at.Sub(calls[i-1].at).Round(time.Millisecond).String())
			}
			if d := cmp.Diff(c.want, pauses); d != "" {
				t.Errorf("pauses at random %v (-want +got):\n%s", c.random, d)
			}
		})
	}
}

// A failure reaches those who waited for it. One who comes later starts no request of its own: when the next attempt is near
// it waits for that one, otherwise it is told at once.
func TestFailureIsToldNotHammered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t), down: errors.New("permission denied")}
		m := run(t, a, time.Hour)
		start := time.Now()
		for range 10 {
			if _, err := m.SVID(t.Context(), web); err == nil || !strings.Contains(err.Error(), "permission denied") {
				t.Errorf("SVID: %v, want the cause", err)
			}
		}
		if n, took := len(a.asked()), time.Since(start); n != 3 || took != 3*time.Second {
			t.Errorf("%d requests in %s, want those after 0, 1 and 3 s", n, took)
		}
	})
}

func TestFirstCallerOutlastsARestartOfTheAuthority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t), down: errors.New("istiod is away")}
		m := run(t, a, time.Hour)
		m.Prefetch(web)
		synctest.Wait() // it has failed
		a.set(nil)
		mustSVID(t, m, web)
	})
}

func TestRetryDoesNotWaitForThePause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t), down: errors.New("istiod is away")}
		m := run(t, a, time.Hour)
		m.Prefetch(web)
		time.Sleep(10 * time.Minute) // the next attempt is minutes away
		if _, err := m.SVID(t.Context(), web); err == nil {
			t.Fatal("there is a certificate, from nowhere")
		}
		a.set(nil)
		m.Retry()
		start := time.Now()
		mustSVID(t, m, web)
		if took := time.Since(start); took != 0 {
			t.Errorf("it took %s after Retry", took)
		}
	})
}

func TestAuthorityThatHangsIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t), hold: make(chan struct{})}
		m := run(t, a, time.Hour)
		start := time.Now()
		if _, err := m.SVID(t.Context(), web); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("SVID: %v, want deadline exceeded", err)
		}
		if d := time.Since(start); d != 10*time.Second {
			t.Errorf("gave up after %s, want 10s", d)
		}
		impatient, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		time.Sleep(time.Second)
		if _, err := m.SVID(impatient, web); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("SVID of a caller whose time is up: %v", err)
		}
	})
}

// Eight requests at once, and those somebody waits for before prefetches before renewals.
func TestConcurrencyAndPriority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t)}
		m := run(t, a, time.Hour)
		renewed := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "aa-renewed"}
		mustSVID(t, m, renewed)
		time.Sleep(28 * time.Minute) // its renewal is due in 30 s
		a.mu.Lock()
		a.hold, a.calls = make(chan struct{}), nil
		a.mu.Unlock()
		time.Sleep(25 * time.Second)
		for i := range 8 { // these take every place
			m.Prefetch(account(i))
		}
		time.Sleep(8 * time.Second) // the renewal is due by now, and waits
		for i := 8; i < 10; i++ {
			m.Prefetch(account(i))
			time.Sleep(time.Millisecond)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := m.SVID(t.Context(), cart); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		if n := len(a.asked()); n != 8 {
			t.Fatalf("%d requests in flight, want 8", n)
		}
		for range 4 {
			a.hold <- struct{}{}
			synctest.Wait()
		}
		var order []string
		for _, c := range a.asked()[8:] {
			order = append(order, c.id.ServiceAccount)
		}
		if d := cmp.Diff([]string{"cart", "sa-08", "sa-09", "aa-renewed"}, order); d != "" {
			t.Errorf("order (-want +got):\n%s", d)
		}
		for range 8 {
			a.hold <- struct{}{}
		}
		wg.Wait()
	})
}

func TestForget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t)}
		m := run(t, a, time.Hour)
		mustSVID(t, m, web)
		m.Forget(web)
		m.Forget(cart) // never wanted
		time.Sleep(24 * time.Hour)
		if n := len(a.asked()); n != 1 {
			t.Errorf("%d requests, want 1: a forgotten certificate was renewed", n)
		}
		if infos := m.Certificates(); len(infos) != 0 {
			t.Errorf("certificates %v, want none", infos)
		}
		a.mu.Lock()
		a.hold = make(chan struct{})
		a.mu.Unlock()
		got := make(chan error, 1)
		go func() {
			_, err := m.SVID(t.Context(), web)
			got <- err
		}()
		synctest.Wait()
		m.Forget(web)
		if err := <-got; err == nil || !strings.Contains(err.Error(), "no longer wanted") {
			t.Errorf("SVID of a caller that waited: %v", err)
		}
	})
}

func TestStopReleasesCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t), hold: make(chan struct{})}
		m := identity.NewManager(identity.ManagerConfig{CA: a})
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan error, 1)
		go func() { done <- m.Run(ctx) }()
		got := make(chan error, 1)
		go func() {
			_, err := m.SVID(t.Context(), web)
			got <- err
		}()
		synctest.Wait()
		why := errors.New("shutting down")
		cancel(why)
		for _, err := range []error{<-done, <-got} {
			if !errors.Is(err, why) {
				t.Errorf("%v, want %v", err, why)
			}
		}
		if _, err := m.SVID(t.Context(), cart); !errors.Is(err, why) {
			t.Errorf("SVID after the end: %v, want %v", err, why)
		}
	})
}

// badCA answers with what it likes.
type badCA func(id mesh.Identity, csr []byte) ([]string, error)

func (f badCA) Sign(_ context.Context, id mesh.Identity, csr []byte, _ time.Duration) ([]string, error) {
	return f(id, csr)
}

func TestAnswersOfTheAuthorityAreChecked(t *testing.T) {
	t.Parallel()
	ca, other := meshtest.NewCA(t), meshtest.NewCA(t)
	sign := func(id mesh.Identity, csr []byte) []string {
		chain, err := ca.Sign(t.Context(), id, csr, time.Hour)
		if err != nil {
			t.Error(err)
			return nil
		}
		return chain
	}
	foreignCSR, err := identity.NewCSR(web, mustKey(t))
	if err != nil {
		t.Fatal(err)
	}
	cases := []struct {
		name, want string
		answer     badCA
	}{
		{"another identity", "certificate is of spiffe://cluster.local/ns/shop/sa/cart", func(_ mesh.Identity, csr []byte) ([]string, error) { return sign(cart, csr), nil }},
		{"another key", "not for the key that was sent", func(id mesh.Identity, _ []byte) ([]string, error) { return sign(id, foreignCSR), nil }},
		{"another root", "not signed by a root", func(id mesh.Identity, csr []byte) ([]string, error) {
			return append(sign(id, csr)[:2], string(other.RootPEM())), nil
		}},
		{"no intermediate", "not signed by a root", func(id mesh.Identity, csr []byte) ([]string, error) {
			chain := sign(id, csr)
			return []string{chain[0], chain[2]}, nil
		}},
		{"no root", "0 elements", func(mesh.Identity, []byte) ([]string, error) { return nil, nil }},
		{"one element", "1 elements", func(id mesh.Identity, csr []byte) ([]string, error) { return sign(id, csr)[:1], nil }},
		{"garbage", "no PEM certificate", func(mesh.Identity, []byte) ([]string, error) { return []string{"a", "b"}, nil }},
		{"a certificate already expired", "expired", func(id mesh.Identity, csr []byte) ([]string, error) {
			return ca.Sign(context.Background(), id, csr, -time.Minute)
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := run(t, c.answer, time.Hour)
			if _, err := m.SVID(t.Context(), web); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("SVID: %v, want an error with %q", err, c.want)
			}
		})
	}
}

// The server shows the new certificate to the next caller after a renewal, without being told.
func TestServerConfigFollowsRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t)}
		m := run(t, a, time.Hour)
		server := m.ServerConfig(cart)
		serial := func() string {
			t.Helper()
			client := identity.ClientConfig(mustSVID(t, m, web), []mesh.Identity{cart})
			o := handshake(t, client, server)
			if err := errors.Join(o.client, o.server); err != nil {
				t.Fatal(err)
			}
			return o.clientState.PeerCertificates[0].SerialNumber.String()
		}
		first := serial()
		if serial() != first {
			t.Error("the certificate changed without a renewal")
		}
		time.Sleep(45 * time.Minute)
		if serial() == first {
			t.Error("the certificate did not change with the renewal")
		}
		a.set(errors.New("istiod is away"))
		client := identity.ClientConfig(mustSVID(t, m, web), []mesh.Identity{cart})
		time.Sleep(2 * time.Hour)
		checkRefused(t, "server", handshake(t, client, server).server, "istiod is away")
	})
}

func TestCertificatesForTheDump(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{ca: meshtest.NewCA(t)}
		m := run(t, a, 24*time.Hour)
		svid := mustSVID(t, m, web)
		a.mu.Lock()
		a.hold = make(chan struct{})
		a.mu.Unlock()
		m.Prefetch(cart)
		synctest.Wait()
		infos := m.Certificates()
		if len(infos) != 2 || infos[0].Identity != cart.String() || infos[1].Identity != web.String() {
			t.Fatalf("identities %+v, want cart and web", infos)
		}
		if infos[0].State != "Initializing" || infos[1].State != "Available" {
			t.Errorf("states %q and %q", infos[0].State, infos[1].State)
		}
		if n, r := len(infos[1].CertChain), len(infos[1].RootCerts); n != 2 || r != 1 {
			t.Errorf("%d certificates and %d roots, want 2 and 1", n, r)
		}
		leaf := infos[1].CertChain[0]
		if leaf.SerialNumber != svid.Certificate.Leaf.SerialNumber.String() || !leaf.ExpirationTime.Equal(svid.NotAfter) || !leaf.ValidFrom.Equal(svid.NotBefore) {
			t.Errorf("leaf %+v is not the one of the SVID", leaf)
		}
		text, err := json.Marshal(infos)
		if err != nil || strings.Contains(string(text), "PRIVATE") {
			t.Errorf("dump holds a private key, or failed: %v", err)
		}
	})
}

func TestCSRLayout(t *testing.T) {
	t.Parallel()
	text, err := identity.NewCSR(web, mustKey(t))
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(decode(t, text))
	if err != nil {
		t.Fatal(err)
	}
	if err := csr.CheckSignature(); err != nil {
		t.Error(err)
	}
	if csr.Subject.String() != "" || len(csr.URIs) != 1 || csr.URIs[0].String() != web.String() {
		t.Errorf("subject %q, URIs %v, want none and %s", csr.Subject, csr.URIs, web)
	}
	if len(csr.Extensions) != 1 || !csr.Extensions[0].Critical {
		t.Errorf("extensions %v, want one critical SAN", csr.Extensions)
	}
}
