package xds

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

// Limits of a client's connection.
const (
	maxMessageBytes   = 200 << 20
	connectTimeout    = 5 * time.Second
	keepaliveInterval = 30 * time.Second
	keepaliveTimeout  = 10 * time.Second
)

// Subscription is a type a client wants: all of it, or the names that Resolve asks for.
type Subscription struct {
	TypeURL  string
	Wildcard bool
}

// ClientConfig is what a Client needs. Target, TLS and Apply are required.
type ClientConfig struct {
	Target        string // host:port
	TLS           *tls.Config
	Token         func(ctx context.Context) (string, error) // the bearer token, read for each connection; nil: none
	Metadata      map[string]string                         // further request headers, such as clusterid
	Node          *core.Node                                // who the client is
	Subscriptions []Subscription                            // requested in this order

	// Apply puts an update into effect and returns the resources it could not. It is called from one goroutine, one
	// update at a time, and the server's next update waits for it.
	Apply func(ctx context.Context, u Update) []Rejection

	Log          *zap.Logger                     // nil: none
	OnMessage    func(typeURL string, bytes int) // each response received; may be nil
	OnDisconnect func(err error)                 // each stream or attempt that ended; may be nil
}

// Client keeps a proxy's resources those of its server, over one stream at a time. Losing the server changes nothing of
// what was applied: the client reconnects for as long as Run runs and says what it has.
type Client struct {
	cfg    ClientConfig
	node   *core.Node
	synced chan struct{}
	wake   chan struct{} // one slot: some name is wanted

	mu      sync.Mutex // guards what follows; never held across I/O or Apply
	types   []*subscription
	waiters map[waiter][]chan error
}

type waiter struct{ typeURL, name string }

// NewClient returns a client that does nothing until Run.
func NewClient(cfg ClientConfig) *Client {
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	c := &Client{
		cfg: cfg, synced: make(chan struct{}), wake: make(chan struct{}, 1), waiters: make(map[waiter][]chan error),
	}
	c.node = &core.Node{}
	if cfg.Node != nil {
		c.node = proto.CloneOf(cfg.Node)
	}
	c.node.ClientFeatures = append(c.node.ClientFeatures, featureChunks)
	for _, s := range cfg.Subscriptions {
		c.types = append(c.types, newSubscription(s.TypeURL, s.Wildcard))
	}
	return c
}

// Synced is closed once every wildcard type was answered and applied as a whole.
func (c *Client) Synced() <-chan struct{} { return c.synced }

// Versions are the names and versions of the resources held of a type; "" is the version of a rejected one.
func (c *Client) Versions(typeURL string) map[string]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.subscription(typeURL); s != nil {
		return maps.Clone(s.held)
	}
	return nil
}

// Resolve waits until the server has answered for a name of a type, with the resource or with its absence, and the
// answer was applied. Of a wildcard type it waits for the first whole answer. The error is ctx's cause, or why the
// resource was rejected.
func (c *Client) Resolve(ctx context.Context, typeURL, name string) error {
	c.mu.Lock()
	s := c.subscription(typeURL)
	if s == nil {
		c.mu.Unlock()
		return fmt.Errorf("resolve %q: %s is not subscribed to", name, typeURL)
	}
	if answered, err := s.want(name); answered {
		c.mu.Unlock()
		return err
	}
	if s.wildcard {
		name = ""
	}
	key, done := waiter{typeURL, name}, make(chan error, 1) // one slot: the answer is sent once and may find nobody
	c.waiters[key] = append(c.waiters[key], done)
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		c.mu.Lock()
		defer c.mu.Unlock()
		left := c.waiters[key][:0]
		for _, w := range c.waiters[key] {
			if w != done {
				left = append(left, w)
			}
		}
		c.waiters[key] = left
		if len(left) == 0 {
			delete(c.waiters, key)
		}
		return context.Cause(ctx)
	}
}

// subscription returns that of a type, or nil. c.mu is held.
func (c *Client) subscription(typeURL string) *subscription {
	for _, s := range c.types {
		if s.typeURL == typeURL {
			return s
		}
	}
	return nil
}

// Run connects, and connects again, until ctx is done. It returns an error only when the configuration cannot work.
func (c *Client) Run(ctx context.Context) error {
	if c.cfg.TLS == nil || c.cfg.Apply == nil || c.cfg.Target == "" {
		return errors.New("xds client: target, TLS and apply are required")
	}
	var wait backoff
	r := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	for {
		began := time.Now()
		answered, err := c.connect(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if answered && time.Since(began) >= healthyStream {
			wait.reset()
		}
		pause := wait.next(r)
		c.cfg.Log.Warn("xds stream ended", zap.String("target", c.cfg.Target), zap.Error(err),
			zap.Duration("retry_in", pause))
		if c.cfg.OnDisconnect != nil {
			c.cfg.OnDisconnect(err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// connect runs one stream to its end and reports whether the server answered anything on it.
func (c *Client) connect(ctx context.Context) (answered bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	out := metadata.New(c.cfg.Metadata)
	if c.cfg.Token != nil {
		token, err := c.cfg.Token(ctx)
		if err != nil {
			return false, fmt.Errorf("read token: %w", err)
		}
		out.Set("authorization", "Bearer "+token)
	}
	conn, err := grpc.NewClient(c.cfg.Target,
		grpc.WithTransportCredentials(credentials.NewTLS(c.cfg.TLS)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: keepaliveInterval, Timeout: keepaliveTimeout, PermitWithoutStream: true,
		}),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: connectTimeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes), grpc.MaxCallSendMsgSize(maxMessageBytes)),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(),
		grpc.WithNoProxy(), // a node proxy's control plane is never behind the proxy of its environment
	)
	if err != nil {
		return false, fmt.Errorf("dial %s: %w", c.cfg.Target, err)
	}
	defer conn.Close()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).
		DeltaAggregatedResources(metadata.NewOutgoingContext(ctx, out))
	if err != nil {
		return false, fmt.Errorf("open stream to %s: %w", c.cfg.Target, err)
	}
	responses := make(chan *discovery.DeltaDiscoveryResponse) // no buffer: what is not applied yet stays with the server
	ended := make(chan error, 1)                              // one slot: the reader leaves even if nobody listens
	var reader sync.WaitGroup
	reader.Go(func() {
		for {
			resp, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case responses <- resp:
			case <-ctx.Done():
				ended <- context.Cause(ctx)
				return
			}
		}
	})
	defer reader.Wait()
	defer cancel()
	return c.serve(ctx, stream, responses, ended)
}

// serve is the life of one stream. It alone sends.
func (c *Client) serve(
	ctx context.Context, stream grpc.BidiStreamingClient[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse],
	responses <-chan *discovery.DeltaDiscoveryResponse, ended <-chan error,
) (answered bool, err error) {
	defer c.closed()
	for _, req := range c.open() {
		if err := stream.Send(req); err != nil {
			return false, reason(responses, ended)
		}
	}
	for {
		var requests []*discovery.DeltaDiscoveryRequest
		select {
		case err := <-ended:
			return answered, err
		case <-c.wake:
		case resp := <-responses:
			answered = true
			if ack := c.handle(ctx, resp); ack != nil {
				requests = append(requests, ack)
			}
		}
		for _, req := range append(requests, c.next()...) {
			if err := stream.Send(req); err != nil {
				return answered, reason(responses, ended)
			}
		}
	}
}

// reason is why a stream on which a send failed has ended: only the reader learns that, after what else it still reads.
func reason(responses <-chan *discovery.DeltaDiscoveryResponse, ended <-chan error) error {
	for {
		select {
		case err := <-ended:
			return err
		case <-responses:
		}
	}
}

func (c *Client) open() []*discovery.DeltaDiscoveryRequest {
	c.mu.Lock()
	defer c.mu.Unlock()
	var requests []*discovery.DeltaDiscoveryRequest
	for i, s := range c.types {
		var node *core.Node
		if i == 0 {
			node = c.node // once a stream is enough
		}
		requests = append(requests, s.open(node))
	}
	return requests
}

func (c *Client) closed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.types {
		s.closed()
	}
}

func (c *Client) next() []*discovery.DeltaDiscoveryRequest {
	c.mu.Lock()
	defer c.mu.Unlock()
	var requests []*discovery.DeltaDiscoveryRequest
	for _, s := range c.types {
		if req := s.next(); req != nil {
			requests = append(requests, req)
		}
	}
	return requests
}

// handle applies a response and returns the answer to it, or nil for a type nobody asked for: an answer would subscribe
// to it.
func (c *Client) handle(ctx context.Context, resp *discovery.DeltaDiscoveryResponse) *discovery.DeltaDiscoveryRequest {
	if c.cfg.OnMessage != nil {
		c.cfg.OnMessage(resp.GetTypeUrl(), proto.Size(resp))
	}
	c.mu.Lock()
	s := c.subscription(resp.GetTypeUrl())
	if s == nil {
		c.mu.Unlock()
		c.cfg.Log.Warn("response of a type that was not asked for", zap.String("type", resp.GetTypeUrl()))
		return nil
	}
	u, rejected := s.receive(resp)
	c.mu.Unlock()

	rejected = append(rejected, c.cfg.Apply(ctx, u)...)
	slices.SortStableFunc(rejected, func(a, b Rejection) int { return strings.Compare(a.Name, b.Name) })

	c.mu.Lock()
	defer c.mu.Unlock()
	ack, names := s.applied(resp, u, rejected)
	for _, name := range names {
		c.answer(waiter{s.typeURL, name}, s.wanted[name].err)
	}
	if s.wildcard && s.synced {
		c.answer(waiter{s.typeURL, ""}, nil)
	}
	c.noteSynced()
	if len(rejected) > 0 {
		c.cfg.Log.Warn("resources rejected", zap.String("type", s.typeURL), zap.Int("count", len(rejected)),
			zap.String("first", rejected[0].Name), zap.Error(rejected[0].Err))
	}
	return ack
}

// answer releases those who wait for a name. c.mu is held.
func (c *Client) answer(key waiter, err error) {
	for _, done := range c.waiters[key] {
		done <- err
	}
	delete(c.waiters, key)
}

// noteSynced closes Synced once it is true. c.mu is held.
func (c *Client) noteSynced() {
	select {
	case <-c.synced:
		return
	default:
	}
	for _, s := range c.types {
		if s.wildcard && !s.synced {
			return
		}
	}
	close(c.synced)
}
