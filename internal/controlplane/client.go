// Package controlplane is a proxy's side of istiod: one configuration, one client that learns the mesh and has certificates
// issued, by the same roots and the same token.
//
// It hides how that is put together of packages xds and identity. What is learned means nothing to it: the proxy applies it.
package controlplane

import (
	"context"
	"crypto/tls"
	"fmt"
	"os"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

// Node is how a proxy describes itself to istiod.
type Node struct {
	Kind      string // "ztunnel" or "waypoint"
	Pod       string
	Namespace string
	IP        string
	Metadata  map[string]any // more than what follows from the above
}

func (n Node) message(cfg *Config) (*corev3.Node, error) {
	fields := map[string]any{"NAME": n.Pod, "NAMESPACE": n.Namespace, "INSTANCE_IPS": n.IP, "CLUSTER_ID": cfg.ClusterID}
	for k, v := range n.Metadata {
		fields[k] = v
	}
	meta, err := structpb.NewStruct(fields)
	if err != nil {
		return nil, fmt.Errorf("describe this %s to istiod: %w", n.Kind, err)
	}
	return &corev3.Node{
		Id:       fmt.Sprintf("%s~%s~%s.%s~%s.svc.%s", n.Kind, n.IP, n.Pod, n.Namespace, n.Namespace, cfg.ClusterDomain),
		Metadata: meta,
	}, nil
}

// Options are what a Client is told by its program. Node, Types, Apply and Log are required.
type Options struct {
	Node  Node
	Types []string // of resources to learn, all of each, in this order
	Apply func(context.Context, xds.Update) []xds.Rejection
	Log   *zap.Logger

	OnMessage    func(typeURL string, bytes int) // as in xds.ClientConfig
	OnDisconnect func(error)
}

// Client speaks with istiod.
type Client struct {
	XDS *xds.Client
	IDs *identity.Manager

	cfg   *Config
	log   *zap.Logger
	ca    *identity.CAClient
	roots *identity.RootFile // of the authority; those of the xDS server are read again with each handshake
}

// New makes a client that has not connected yet. The files of the roots must be there.
func New(cfg *Config, o Options) (*Client, error) {
	c := &Client{cfg: cfg, log: o.Log}
	target, conf, _, err := c.server(cfg.XDSAddress, cfg.XDSRootCA, cfg.XDSHostname)
	if err != nil {
		return nil, fmt.Errorf("xDS client: %w", err)
	}
	node, err := o.Node.message(cfg)
	if err != nil {
		return nil, err
	}
	wanted := make([]xds.Subscription, len(o.Types))
	for i, t := range o.Types {
		wanted[i] = xds.Subscription{TypeURL: t, Wildcard: true}
	}
	c.XDS = xds.NewClient(xds.ClientConfig{
		Target: target, TLS: conf, Token: c.token, Metadata: map[string]string{"clusterid": cfg.ClusterID}, Node: node,
		Subscriptions: wanted, Apply: o.Apply, Log: o.Log.Named("xds"), OnMessage: o.OnMessage, OnDisconnect: o.OnDisconnect,
	})
	target, conf, c.roots, err = c.server(cfg.CAAddress, cfg.CARootCA, cfg.CAHostname)
	if err != nil {
		return nil, fmt.Errorf("CA client: %w", err)
	}
	c.ca, err = identity.NewCAClient(identity.CAClientConfig{Target: target, TLS: conf, Token: c.token, ClusterID: cfg.ClusterID})
	if err != nil {
		return nil, fmt.Errorf("CA client: %w", err)
	}
	c.IDs = identity.NewManager(identity.ManagerConfig{CA: c.ca, TTL: cfg.SecretTTL, Log: o.Log.Named("identity")})
	return c, nil
}

// Run speaks with istiod until ctx is done.
func (c *Client) Run(ctx context.Context) error {
	defer c.ca.Close()
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.IDs.Run(gctx) })
	g.Go(func() error { return c.XDS.Run(gctx) })
	g.Go(func() error { c.roots.Watch(gctx, c.IDs.Renew); return nil })
	err := g.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// server is how to reach one of istiod's servers: what to dial, the TLS to do it with, and the roots that come from a file.
func (c *Client) server(address, rootFile, hostname string) (string, *tls.Config, *identity.RootFile, error) {
	target, host, err := splitAddress(address)
	if err != nil {
		return "", nil, nil, err
	}
	if hostname != "" {
		host = hostname
	}
	roots, err := identity.OpenRootFile(rootFile, c.log.Named("roots"))
	if err != nil {
		return "", nil, nil, err
	}
	conf, err := roots.Config(host)
	return target, conf, roots, err
}

// token reads the token anew: it is rotated behind our back.
func (c *Client) token(context.Context) (string, error) {
	b, err := os.ReadFile(c.cfg.TokenFile)
	if err != nil {
		return "", fmt.Errorf("read the token for istiod: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// Decoder is wds.Delta or wds.DeltaL4.
type Decoder func(current *mesh.Snapshot, typeURL string, upserts []wds.Named, removes []string) (mesh.Delta, map[string]error)

// Delta decodes an update of the nouns that a snapshot holds, and says of each resource that is rejected why.
func Delta(decode Decoder, current *mesh.Snapshot, u xds.Update) (mesh.Delta, []xds.Rejection) {
	named := make([]wds.Named, len(u.Upserts))
	for i, r := range u.Upserts {
		named[i] = wds.Named{Name: r.Name, Body: r.Body}
	}
	delta, faults := decode(current, u.TypeURL, named, u.Removes)
	var rejected []xds.Rejection
	for name, err := range faults {
		rejected = append(rejected, xds.Rejection{Name: name, Err: err})
	}
	return delta, rejected
}
