package ca_test

import (
	"context"
	"crypto/elliptic"
	"crypto/x509"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	capb "github.com/mistnet/mistnet/api/ca"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/ca"
	"github.com/mistnet/mistnet/istiod/token"
)

const serverName = "istiod.istio-system.svc"

var ztunnel = token.Caller{Namespace: "istio-system", ServiceAccount: "ztunnel", Pod: "ztunnel-1", PodUID: "uid-1", Node: "node-1"}

// running lists node/namespace/account of the pods there are.
type running []string

func (r running) Runs(node, namespace, account string) bool {
	return slices.Contains(r, node+"/"+namespace+"/"+account)
}

// istiod is the service on a loopback port, as the program runs it.
type istiod struct {
	authority *ca.Authority
	issuer    *token.Issuer
	addr      string
	logs      *observer.ObservedLogs
}

func start(t *testing.T, cfg ca.ServiceConfig) *istiod {
	t.Helper()
	issuer, err := token.OpenIssuer(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zapcore.InfoLevel)
	cfg.Verifier, cfg.Log = issuer, zap.New(core)
	i := &istiod{authority: open(t, ca.Config{}), issuer: issuer, logs: logs}
	serving := i.authority.ServingConfig([]string{serverName}, []netip.Addr{netip.MustParseAddr("127.0.0.1")})
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(serving)))
	i.authority.Register(server, cfg)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	i.addr = ln.Addr().String()
	done := make(chan error, 1)
	go func() { done <- server.Serve(ln) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return i
}

func (i *istiod) token(t *testing.T, c token.Caller) string {
	t.Helper()
	raw, err := i.issuer.Issue(c, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func (i *istiod) client(t *testing.T, caller token.Caller) *identity.CAClient {
	t.Helper()
	tlsConfig, err := identity.ControlPlaneConfig(i.authority.RootPEM(), serverName)
	if err != nil {
		t.Fatal(err)
	}
	client, err := identity.NewCAClient(identity.CAClientConfig{
		Target: i.addr, TLS: tlsConfig, ClusterID: "Kubernetes",
		Token: func(context.Context) (string, error) { return i.token(t, caller), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// The whole way: a node proxy's manager gets the certificate of a pod of its node, and the pods can talk.
func TestManagerGetsCertificates(t *testing.T) {
	t.Parallel()
	i := start(t, ca.ServiceConfig{Nodes: running{"node-1/shop/web"}})
	m := identity.NewManager(identity.ManagerConfig{CA: i.client(t, ztunnel)})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	defer func() { cancel(); <-done }()

	svid, err := m.SVID(ctx, web)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := svid.Certificate.Leaf.Verify(x509.VerifyOptions{Roots: svid.Roots}); err != nil || svid.ID != web {
		t.Errorf("certificate of %s: %v", svid.ID, err)
	}
	elsewhere := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "elsewhere"}
	if _, err := m.SVID(ctx, elsewhere); err == nil || !strings.Contains(err.Error(), "no pod of spiffe://cluster.local/ns/shop/sa/elsewhere is known to run on node node-1") {
		t.Errorf("certificate of a pod of another node: %v", err)
	}
	issued := i.logs.FilterMessage("certificate issued").All()
	if len(issued) != 1 {
		t.Fatalf("%d audit lines, want 1", len(issued))
	}
	fields := issued[0].ContextMap()
	for k, want := range map[string]any{
		"identity": web.String(), "caller": "istio-system/ztunnel", "caller.node": "node-1", "caller.pod": "ztunnel-1",
		"serial": svid.Certificate.Leaf.SerialNumber.Text(16),
	} {
		if fields[k] != want {
			t.Errorf("audit field %s = %v, want %v", k, fields[k], want)
		}
	}
	if n := i.logs.FilterMessage("certificate refused").Len(); n != 1 {
		t.Errorf("%d refusals logged, want 1", n)
	}
}

func TestWhoGetsWhat(t *testing.T) {
	t.Parallel()
	i := start(t, ca.ServiceConfig{Nodes: running{"node-1/shop/web", "node-2/shop/cart", "/shop/web"}})
	webCaller := token.Caller{Namespace: "shop", ServiceAccount: "web", Pod: "web-1", PodUID: "u", Node: "node-1"}
	unbound := token.Caller{Namespace: "istio-system", ServiceAccount: "ztunnel"}
	bearer := func(c token.Caller) []string { return []string{"authorization", "Bearer " + i.token(t, c)} }
	asking := func(v *structpb.Value) *structpb.Struct {
		return &structpb.Struct{Fields: map[string]*structpb.Value{"ImpersonatedIdentity": v}}
	}
	ask := func(uri string) *structpb.Struct { return asking(structpb.NewStringValue(uri)) }
	csr := string(request(t, &x509.CertificateRequest{}, ecKey(t, elliptic.P256())))
	const sa = "spiffe://cluster.local/ns/"
	cases := []struct {
		name     string
		header   []string
		metadata *structpb.Struct
		csr      string
		seconds  int64
		code     codes.Code
		want     string // identity, or part of the message
	}{
		{"own identity", bearer(webCaller), nil, csr, 3600, codes.OK, sa + "shop/sa/web"},
		{"own identity, by name", bearer(webCaller), ask(sa + "shop/sa/web"), csr, 3600, codes.OK, sa + "shop/sa/web"},
		{"own identity of a node proxy", bearer(ztunnel), nil, csr, 3600, codes.OK, sa + "istio-system/sa/ztunnel"},
		{"a pod of the node", bearer(ztunnel), ask(sa + "shop/sa/web"), csr, 3600, codes.OK, sa + "shop/sa/web"},
		{"a pod of another node", bearer(ztunnel), ask(sa + "shop/sa/cart"), csr, 3600, codes.PermissionDenied, "known to run on node node-1"},
		{"another, by an ordinary account", bearer(webCaller), ask(sa + "shop/sa/cart"), csr, 3600, codes.PermissionDenied, "not a trusted node account"},
		{"a pod, with an unbound token", bearer(unbound), ask(sa + "shop/sa/web"), csr, 3600, codes.PermissionDenied, "not bound to a pod"},
		{"a foreign trust domain", bearer(ztunnel), ask("spiffe://elsewhere/ns/shop/sa/web"), csr, 3600, codes.PermissionDenied, "foreign trust domain"},
		{"no SPIFFE id", bearer(ztunnel), ask("shop/web"), csr, 3600, codes.PermissionDenied, "parse identity"},
		{"an empty identity", bearer(ztunnel), ask(""), csr, 3600, codes.PermissionDenied, "parse identity"},
		{"an identity that is a number", bearer(ztunnel), asking(structpb.NewNumberValue(7)), csr, 3600, codes.PermissionDenied, "parse identity"},
		{"no token", nil, nil, csr, 3600, codes.Unauthenticated, "authorization headers"},
		{"no bearer token", []string{"authorization", "Basic eA=="}, nil, csr, 3600, codes.Unauthenticated, "no bearer token"},
		{"a bad token", []string{"authorization", "Bearer x.y.z"}, nil, csr, 3600, codes.Unauthenticated, "verify token"},
		{"two tokens", append(bearer(ztunnel), bearer(webCaller)...), nil, csr, 3600, codes.Unauthenticated, "2 authorization headers"},
		{"a bad request", bearer(webCaller), nil, "garbage", 3600, codes.InvalidArgument, "no PEM"},
		{"too long a lifetime", bearer(webCaller), nil, csr, 91 * 86400, codes.InvalidArgument, "lifetime"},
		{"a lifetime that overflows", bearer(webCaller), nil, csr, 1 << 62, codes.InvalidArgument, "lifetime"},
		{"a negative lifetime", bearer(webCaller), nil, csr, -1, codes.InvalidArgument, "lifetime"},
		{"the default lifetime", bearer(webCaller), nil, csr, 0, codes.OK, sa + "shop/sa/web"},
	}
	tlsConfig, err := identity.ControlPlaneConfig(i.authority.RootPEM(), serverName)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(i.addr, grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			ctx := metadata.AppendToOutgoingContext(t.Context(), c.header...)
			resp, err := capb.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx,
				&capb.IstioCertificateRequest{Csr: c.csr, ValidityDuration: c.seconds, Metadata: c.metadata})
			if got := status.Code(err); got != c.code {
				t.Fatalf("code %s (%v), want %s", got, err, c.code)
			}
			if c.code != codes.OK {
				if !strings.Contains(err.Error(), c.want) {
					t.Errorf("message %q, want it to say %q", err, c.want)
				}
				return
			}
			if leaf := parse(t, resp.GetCertChain()[0]); len(leaf.URIs) != 1 || leaf.URIs[0].String() != c.want {
				t.Errorf("certificate of %v, want %s", leaf.URIs, c.want)
			}
		})
	}
}

func TestNobodyIsTrustedUnlessConfigured(t *testing.T) {
	t.Parallel()
	csr := request(t, &x509.CertificateRequest{}, ecKey(t, elliptic.P256()))
	for name, cfg := range map[string]ca.ServiceConfig{
		"no knowledge of nodes": {},
		"other accounts":        {TrustedAccounts: []string{"istio-system/other"}, Nodes: running{"node-1/shop/web"}},
		"no accounts":           {TrustedAccounts: []string{}, Nodes: running{"node-1/shop/web"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			i := start(t, cfg)
			_, err := i.client(t, ztunnel).Sign(t.Context(), web, csr, time.Hour)
			if status.Code(err) != codes.PermissionDenied {
				t.Errorf("Sign: %v, want PermissionDenied", err)
			}
		})
	}
}
