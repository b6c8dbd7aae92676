package identity_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	capb "github.com/mistnet/mistnet/api/ca"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
)

// certificateServer notes what it is asked, and has its CA sign.
type certificateServer struct {
	capb.UnimplementedIstioCertificateServiceServer
	ca *meshtest.CA

	mu   sync.Mutex
	asks []ask
}

type ask struct{ Authorization, ClusterID, Identity, Seconds string }

func (s *certificateServer) CreateCertificate(ctx context.Context, req *capb.IstioCertificateRequest) (*capb.IstioCertificateResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	uri := req.GetMetadata().GetFields()["ImpersonatedIdentity"].GetStringValue()
	s.mu.Lock()
	s.asks = append(s.asks, ask{
		strings.Join(md.Get("authorization"), ","), strings.Join(md.Get("clusterid"), ","), uri, fmt.Sprint(req.GetValidityDuration()),
	})
	s.mu.Unlock()
	id, err := mesh.ParseIdentity(uri)
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, "who is that?")
	}
	chain, err := s.ca.Sign(ctx, id, []byte(req.GetCsr()), time.Hour)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &capb.IstioCertificateResponse{CertChain: chain}, nil
}

func serve(t *testing.T, ca *meshtest.CA) (*certificateServer, string) {
	t.Helper()
	return serveAt(t, ca, "127.0.0.1:0")
}

func serveAt(t *testing.T, ca *meshtest.CA, addr string) (*certificateServer, string) {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s := &certificateServer{ca: ca}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{*ca.Issue(mesh.Identity{}, meshtest.Server("istiod.istio-system.svc"))},
	})))
	capb.RegisterIstioCertificateServiceServer(server, s)
	done := make(chan error, 1)
	go func() { done <- server.Serve(ln) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return s, ln.Addr().String()
}

func newClient(t *testing.T, ca *meshtest.CA, target string, token func(context.Context) (string, error)) *identity.CAClient {
	t.Helper()
	tlsConfig, err := identity.ControlPlaneConfig(ca.RootPEM(), "istiod.istio-system.svc")
	if err != nil {
		t.Fatal(err)
	}
	c, err := identity.NewCAClient(identity.CAClientConfig{Target: target, TLS: tlsConfig, ClusterID: "east", Token: token})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestCAClient(t *testing.T) {
	t.Parallel()
	ca := meshtest.NewCA(t)
	server, addr := serve(t, ca)
	n := 0
	c := newClient(t, ca, addr, func(context.Context) (string, error) { n++; return fmt.Sprintf("token-%d", n), nil })
	key := mustKey(t)
	csr, err := identity.NewCSR(web, key)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		chain, err := c.Sign(t.Context(), web, csr, 90*time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if svid, err := identity.NewSVID(web, key, chain, nil); err != nil || svid.ID != web {
			t.Errorf("NewSVID of the answer: %v", err)
		}
	}
	want := []ask{
		{"Bearer token-1", "east", web.String(), "5400"},
		{"Bearer token-2", "east", web.String(), "5400"}, // the token is read anew
	}
	if d := cmp.Diff(want, server.asks); d != "" {
		t.Errorf("requests (-want +got):\n%s", d)
	}
	if _, err := c.Sign(t.Context(), mesh.Identity{}, csr, 0); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), addr) {
		t.Errorf("refusal: %v, want the server's code and address", err)
	}
}

// Whoever asks when the authority is back gets an answer, however long the client would have waited to connect again.
func TestCAClientConnectsWhenAsked(t *testing.T) {
	t.Parallel()
	ca := meshtest.NewCA(t)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	free.Close()
	c := newClient(t, ca, addr, nil)
	csr, err := identity.NewCSR(web, mustKey(t))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 { // the pause grows each time
		if _, err := c.Sign(t.Context(), web, csr, time.Hour); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "refused") {
			t.Fatalf("Sign without a server: %v, want that the connection is refused", err)
		}
	}
	serveAt(t, ca, addr)
	if _, err := c.Sign(t.Context(), web, csr, time.Hour); err != nil {
		t.Errorf("Sign with the server back: %v", err)
	}
}

func TestCAClientFaults(t *testing.T) {
	t.Parallel()
	ca, other := meshtest.NewCA(t), meshtest.NewCA(t)
	server, addr := serve(t, ca)
	ok := func(context.Context) (string, error) { return "token", nil }
	noFile := errors.New("no such file")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := ln.Addr().String()
	ln.Close()
	csr, err := identity.NewCSR(web, mustKey(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		client *identity.CAClient
		want   string
	}{
		{"nobody listens", newClient(t, ca, closed, ok), "connection refused"},
		{"the server is not ours", newClient(t, other, addr, ok), "unknown authority"},
		{"the token cannot be read", newClient(t, ca, addr, func(context.Context) (string, error) { return "", noFile }), "no such file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := c.client.Sign(t.Context(), web, csr, 0); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Sign: %v, want an error with %q", err, c.want)
			}
		})
	}
	if len(server.asks) > 0 {
		t.Errorf("requests %v reached a server that should not have been asked", server.asks)
	}
	if _, err := identity.NewCAClient(identity.CAClientConfig{Target: addr}); err == nil {
		t.Error("a client without TLS was made: it would send tokens in the clear")
	}
}
