package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	capb "github.com/mistnet/mistnet/api/ca"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/token"
)

// impersonatedIdentity is the request metadata by which a node proxy names the workload it asks for.
const impersonatedIdentity = "ImpersonatedIdentity"

// TrustedName is the service account of the node proxy, in the namespace where the mesh is installed.
const TrustedName = "ztunnel"

// DefaultTrustedAccount is the same (namespace/name) in the usual namespace.
const DefaultTrustedAccount = mesh.RootNamespace + "/" + TrustedName

// NodeWorkloads tells what runs where.
type NodeWorkloads interface {
	// Runs reports whether a pod of that service account runs, or is about to, on that node.
	Runs(node, namespace, serviceAccount string) bool
}

// ServiceConfig is whom the service believes. Without Verifier it believes nobody; without Nodes nobody may ask for others.
type ServiceConfig struct {
	Verifier        token.Verifier
	Nodes           NodeWorkloads
	TrustedAccounts []string    // namespace/name of those that may ask for others; nil: DefaultTrustedAccount
	Log             *zap.Logger // nil: none; gets an audit line per certificate
}

// Register adds istio.v1.auth.IstioCertificateService to a server.
func (a *Authority) Register(s *grpc.Server, cfg ServiceConfig) {
	if cfg.TrustedAccounts == nil {
		cfg.TrustedAccounts = []string{DefaultTrustedAccount}
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	// Anybody can cause refusals: ten of a kind per second are told.
	refusals := cfg.Log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
		return zapcore.NewSamplerWithOptions(c, time.Second, 10, 0)
	}))
	capb.RegisterIstioCertificateServiceServer(s, &service{authority: a, cfg: cfg, refusals: refusals})
}

type service struct {
	capb.UnimplementedIstioCertificateServiceServer
	authority *Authority
	cfg       ServiceConfig
	refusals  *zap.Logger
}

// CreateCertificate implements istio.v1.auth.IstioCertificateService.
func (s *service) CreateCertificate(ctx context.Context, req *capb.IstioCertificateRequest) (*capb.IstioCertificateResponse, error) {
	audit := []zap.Field{zap.String("peer.addr", peerAddr(ctx))}
	caller, err := s.authenticate(ctx)
	if errors.Is(err, token.ErrUnavailable) {
		return nil, s.refused(codes.Unavailable, err, audit)
	}
	if err != nil {
		return nil, s.refused(codes.Unauthenticated, err, audit)
	}
	audit = append(audit, zap.String("caller", caller.Account()), zap.String("caller.pod", caller.Pod), zap.String("caller.node", caller.Node))
	id, err := s.authorize(caller, req.GetMetadata())
	if err != nil {
		return nil, s.refused(codes.PermissionDenied, err, audit)
	}
	audit = append(audit, zap.Stringer("identity", id))
	leaf, chain, err := s.sign(id, req)
	if _, ok := errors.AsType[*RequestError](err); ok {
		return nil, s.refused(codes.InvalidArgument, err, audit)
	}
	if err != nil {
		s.cfg.Log.Error("certificate not issued", append(audit, zap.Error(err))...)
		return nil, status.Error(codes.Internal, "the authority cannot sign now; its log says why")
	}
	s.cfg.Log.Info("certificate issued", append(audit, zap.String("serial", leaf.SerialNumber.Text(16)), zap.Time("expires", leaf.NotAfter))...)
	return &capb.IstioCertificateResponse{CertChain: chain}, nil
}

func (s *service) refused(code codes.Code, err error, audit []zap.Field) error {
	s.refusals.Warn("certificate refused", append(audit, zap.Stringer("code", code), zap.Error(err))...)
	return status.Error(code, err.Error())
}

func (s *service) sign(id mesh.Identity, req *capb.IstioCertificateRequest) (*x509.Certificate, []string, error) {
	seconds := req.GetValidityDuration()
	if limit := int64(s.authority.cfg.MaxTTL / time.Second); seconds < 0 || seconds > limit { // before it can overflow
		return nil, nil, refuse("lifetime of %d s is not between 0 and %d s", seconds, limit)
	}
	return s.authority.sign(id, []byte(req.GetCsr()), time.Duration(seconds)*time.Second)
}

func (s *service) authenticate(ctx context.Context) (token.Caller, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	raw, err := token.FromAuthorization(md.Get("authorization"))
	if err != nil {
		return token.Caller{}, err
	}
	if s.cfg.Verifier == nil {
		return token.Caller{}, errors.New("this control plane verifies no tokens")
	}
	return s.cfg.Verifier.Verify(ctx, raw)
}

// authorize says which identity the caller gets: its own, or that of a workload of its node when it is a node proxy.
func (s *service) authorize(caller token.Caller, md *structpb.Struct) (mesh.Identity, error) {
	own := mesh.Identity{TrustDomain: s.authority.cfg.TrustDomain, Namespace: caller.Namespace, ServiceAccount: caller.ServiceAccount}
	field, asked := md.GetFields()[impersonatedIdentity]
	if !asked {
		return own, nil
	}
	id, err := mesh.ParseIdentity(field.GetStringValue())
	if err != nil {
		return mesh.Identity{}, err
	}
	if id == own {
		return own, nil
	}
	if !slices.Contains(s.cfg.TrustedAccounts, caller.Account()) {
		return mesh.Identity{}, refuse("%s may not ask for %s: it is not a trusted node account", caller.Account(), id)
	}
	if id.TrustDomain != own.TrustDomain {
		return mesh.Identity{}, refuse("%s is of a foreign trust domain, ours is %s", id, own.TrustDomain)
	}
	if caller.Node == "" || caller.Pod == "" {
		return mesh.Identity{}, refuse("token of %s is not bound to a pod and node, so it may not ask for %s", caller.Account(), id)
	}
	if s.cfg.Nodes == nil || !s.cfg.Nodes.Runs(caller.Node, id.Namespace, id.ServiceAccount) {
		return mesh.Identity{}, refuse("no pod of %s is known to run on node %s", id, caller.Node)
	}
	return id, nil
}

func peerAddr(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		return p.Addr.String()
	}
	return ""
}
