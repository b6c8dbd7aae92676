package hbone_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/hbone"
)

func TestTunnelEchoesAndHalfCloses(t *testing.T) {
	addr := serve(t, &hbone.Server{Handle: echo})
	p := newPool(t, nil)
	for _, size := range []int{0, 1, 1000, 8 << 10, 8<<10 + 1, 100_000, 10 << 20} {
		s := open(t, p, addr)
		want := make([]byte, size)
		rand.NewChaCha8([32]byte{byte(size)}).Read(want)
		var sent sync.WaitGroup
		sent.Go(func() {
			if _, err := s.Write(want); err != nil {
				t.Errorf("Write of %d bytes: %v", size, err)
			}
			if err := s.CloseWrite(); err != nil {
				t.Errorf("CloseWrite: %v", err)
			}
		})
		got, err := io.ReadAll(s)
		if err != nil {
			t.Fatalf("read %d bytes back: %v", size, err)
		}
		sent.Wait()
		if !bytes.Equal(got, want) {
			t.Fatalf("echo of %d bytes came back as %d different ones", size, len(got))
		}
		if err := s.Close(); err != nil {
			t.Fatalf("Close: %v", err)
		}
	}
}

func TestRequestAndAnswerCarryTheirHeaders(t *testing.T) {
	type seen struct {
		Method, Authority string
		Header            hbone.Header
		Peer              string
	}
	got := make(chan seen, 1)
	addr := serve(t, &hbone.Server{Handle: func(_ context.Context, r *hbone.Request) {
		got <- seen{r.Method, r.Authority, r.Header, r.TLS.PeerCertificates[0].URIs[0].String()}
		if s, err := r.Accept("k8s.namespace.name=shop"); err == nil {
			s.CloseWrite()
		}
	}})
	p := newPool(t, nil)
	h := hbone.Header{
		Baggage:          "k8s.cluster.name=c1," + strings.Repeat("x", 20_000), // needs CONTINUATION frames
		Forwarded:        `for="10.0.0.9:4711";host=cart.shop.svc.cluster.local`,
		Traceparent:      "00-0123456789abcdef0123456789abcdef-0123456789abcdef-00",
		ForwardedNetwork: "n2",
	}
	s, err := p.Open(t.Context(), target(addr), "[fd00::1]:80", h)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	if b := s.ResponseBaggage(); b != "k8s.namespace.name=shop" {
		t.Errorf("ResponseBaggage() = %q", b)
	}
	want := seen{"CONNECT", "[fd00::1]:80", h, clientID.String()}
	if d := cmp.Diff(want, <-got); d != "" {
		t.Errorf("request (-want +got):\n%s", d)
	}
	s.Close()
}

func TestRejectReachesTheClientAsStatusError(t *testing.T) {
	addr := serve(t, &hbone.Server{Handle: func(_ context.Context, r *hbone.Request) { r.Reject(401) }})
	p := newPool(t, nil)
	for range 3 {
		_, err := p.Open(t.Context(), target(addr), "10.0.0.1:80", hbone.Header{})
		var status *hbone.StatusError
		if !errors.As(err, &status) || status.Status != 401 {
			t.Fatalf("Open = %v, want status 401", err)
		}
	}
}

func TestOpenFailsAtTheStageThatFailed(t *testing.T) {
	addr := serve(t, &hbone.Server{Handle: echo})
	closed := addr
	if ln := unusedAddr(t); ln.IsValid() {
		closed = ln
	}
	noCert := func(c *hbone.PoolConfig) { c.TLS = foreignTLS }
	for _, tc := range []struct {
		name   string
		to     hbone.Target
		change func(*hbone.PoolConfig)
		want   hbone.Stage
	}{
		{"nobody listens", target(closed), nil, hbone.StageDial},
		{"the server does not trust the client", target(addr), noCert, hbone.StageHTTP2}, // TLS 1.3: told after the handshake
		{"nobody is expected", hbone.Target{Addr: addr}, nil, hbone.StageTLS},
		{"the peer speaks no TLS", target(plainServer(t)), nil, hbone.StageTLS},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := newPool(t, tc.change).Open(t.Context(), tc.to, "10.0.0.1:80", hbone.Header{})
			var stage *hbone.StageError
			if !errors.As(err, &stage) || stage.Stage != tc.want {
				t.Fatalf("Open = %v, want stage %v", err, tc.want)
			}
		})
	}
}
