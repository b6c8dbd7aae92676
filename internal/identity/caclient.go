package identity

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/structpb"

	capb "github.com/mistnet/mistnet/api/ca"
	"github.com/mistnet/mistnet/internal/mesh"
)

// impersonatedIdentity is the request metadata that names the workload a node proxy asks for.
const impersonatedIdentity = "ImpersonatedIdentity"

// CAClientConfig is what a CAClient is made of. Target and TLS are required.
type CAClientConfig struct {
	Target    string                                    // host:port of istiod
	TLS       *tls.Config                               // see ControlPlaneConfig
	Token     func(ctx context.Context) (string, error) // asked for every request, so that a rotated token is picked up; nil: none is sent
	ClusterID string                                    // "": not sent
}

// CAClient asks istiod's istio.v1.auth.IstioCertificateService for certificates. It is a CA.
type CAClient struct {
	cfg  CAClientConfig
	conn *grpc.ClientConn
	rpc  capb.IstioCertificateServiceClient
}

// NewCAClient returns a client that connects when first used, and again whenever the connection is lost.
func NewCAClient(cfg CAClientConfig) (*CAClient, error) {
	if cfg.TLS == nil {
		return nil, errors.New("make certificate client: no TLS configuration")
	}
	pace := backoff.DefaultConfig
	pace.MaxDelay = 15 * time.Second
	conn, err := grpc.NewClient(cfg.Target,
		grpc.WithTransportCredentials(credentials.NewTLS(cfg.TLS)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: pace, MinConnectTimeout: 5 * time.Second}),
		grpc.WithNoProxy()) // the control plane is never behind the node's HTTP proxy
	if err != nil {
		return nil, fmt.Errorf("make certificate client of %s: %w", cfg.Target, err)
	}
	return &CAClient{cfg: cfg, conn: conn, rpc: capb.NewIstioCertificateServiceClient(conn)}, nil
}

// Sign implements CA.
func (c *CAClient) Sign(ctx context.Context, id mesh.Identity, csrPEM []byte, ttl time.Duration) ([]string, error) {
	var headers []string
	if c.cfg.Token != nil {
		token, err := c.cfg.Token(ctx)
		if err != nil {
			return nil, fmt.Errorf("sign certificate of %s: read token: %w", id, err)
		}
		headers = append(headers, "authorization", "Bearer "+token)
	}
	if c.cfg.ClusterID != "" {
		headers = append(headers, "clusterid", c.cfg.ClusterID)
	}
	c.wake(ctx)
	resp, err := c.rpc.CreateCertificate(metadata.AppendToOutgoingContext(ctx, headers...), &capb.IstioCertificateRequest{
		Csr:              string(csrPEM),
		ValidityDuration: int64(ttl / time.Second),
		Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			impersonatedIdentity: structpb.NewStringValue(id.String()),
		}},
	})
	if err != nil {
		return nil, fmt.Errorf("sign certificate of %s at %s: %w", id, c.cfg.Target, err)
	}
	return resp.GetCertChain(), nil
}

// wakeWithin is how long a connection that failed before may take to come up when it is asked for.
const wakeWithin = time.Second

// wake connects at once when the last attempt failed: who asks has waited long enough, and would otherwise be told about
// that attempt until gRPC makes another.
func (c *CAClient) wake(ctx context.Context) {
	if c.conn.GetState() != connectivity.TransientFailure {
		return
	}
	c.conn.ResetConnectBackoff()
	ctx, cancel := context.WithTimeout(ctx, wakeWithin)
	defer cancel()
	c.conn.WaitForStateChange(ctx, connectivity.TransientFailure)
}

// Close ends the connection and every request under way.
func (c *CAClient) Close() error { return c.conn.Close() }
