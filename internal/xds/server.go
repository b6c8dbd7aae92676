package xds

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Limits of a server.
const (
	defaultAckTimeout  = time.Minute
	maxTypes           = 64
	maxRequestBytes    = 64 << 20 // a client names all it has when it reconnects
	minClientKeepalive = 15 * time.Second
	// What a peer can trigger is logged so many times in so long.
	logBurst  = 10
	logWindow = time.Minute
)

// ServerConfig is what a Server needs.
type ServerConfig struct {
	// Authenticate names the caller of a stream from its context. Without it, and on an error, the stream is refused
	// as unauthenticated, or as unavailable when the error wraps ErrUnavailable.
	Authenticate func(ctx context.Context) (peer string, err error)
	// CheckNode refuses a caller whose node is not its own to claim; nil: none is.
	CheckNode func(peer string, node *core.Node) error
	// Ready is closed once everything was published for the first time: no client is answered before, since absent
	// would mean removed. nil: at once.
	Ready <-chan struct{}
	// Order are the types whose additions go out before those of the types after them, and whose removals after.
	// Types not in it come last. nil: Authorization, Address.
	Order      []string
	AckTimeout time.Duration // how long a client may leave a response unanswered; 0: one minute
	Log        *zap.Logger   // nil: none
}

// Server holds the resources of every type and keeps clients up to date. Publish may be called at any time.
type Server struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer

	cfg  ServerConfig
	log  *zap.Logger // limited
	stop chan struct{}
	once sync.Once
	work sync.WaitGroup // streams and their goroutines

	mu      sync.RWMutex // guards what follows; taken after a stream's
	stores  map[string]*store
	streams map[uint64]*stream
	lastID  uint64
	stopped bool
}

// NewServer returns a server without resources.
func NewServer(cfg ServerConfig) *Server {
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.Order == nil {
		cfg.Order = []string{mesh.TypeAuthorization, mesh.TypeAddress}
	}
	if cfg.AckTimeout == 0 {
		cfg.AckTimeout = defaultAckTimeout
	}
	return &Server{
		cfg: cfg, stop: make(chan struct{}), stores: make(map[string]*store), streams: make(map[uint64]*stream),
		log: cfg.Log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
			return zapcore.NewSamplerWithOptions(c, logWindow, logBurst, 0)
		})),
	}
}

// ServerOptions are what a gRPC server needs to serve proxies: they send keepalives every 30 s, and big requests.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime: minClientKeepalive, PermitWithoutStream: true,
		}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveInterval, Timeout: keepaliveTimeout}),
		grpc.MaxRecvMsgSize(maxRequestBytes), grpc.MaxSendMsgSize(maxMessageBytes),
	}
}

// Register serves the aggregated discovery service on g. Make g with ServerOptions.
func (s *Server) Register(g *grpc.Server) { discovery.RegisterAggregatedDiscoveryServiceServer(g, s) }

// Publish changes the resources of a type and wakes those who watch it. A resource that is the same as before is no
// change. It never waits for a client.
func (s *Server) Publish(typeURL string, upserts []Resource, removes []string) {
	s.PublishAll([]Change{{TypeURL: typeURL, Upserts: upserts, Removes: removes}})
}

// PublishAll makes several changes at once: clients get none or all of them, in the server's order of types.
func (s *Server) PublishAll(changes []Change) {
	encoded := make([][]*entry, len(changes))
	for i, c := range changes { // outside the lock
		for _, name := range c.Removes {
			encoded[i] = append(encoded[i], &entry{name: name})
		}
		for _, r := range c.Upserts {
			e, err := encodeEntry(c.TypeURL, r)
			if err != nil { // a name that is not UTF-8: no client could receive it
				s.log.Error("resource cannot be encoded", zap.String("type", c.TypeURL), zap.String("name", r.Name),
					zap.Error(err))
				continue
			}
			encoded[i] = append(encoded[i], e)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	wake := make(map[*stream]bool)
	for i, c := range changes {
		st := s.storeOf(c.TypeURL)
		st.declared = true
		before := st.seq
		for _, e := range encoded[i] {
			st.put(e)
		}
		st.compact()
		if st.seq == before {
			continue
		}
		for w := range st.watches {
			wake[w.stream] = true
		}
	}
	for st := range wake {
		st.nudge()
	}
}

// Versions are the names and versions of the resources of a type.
func (s *Server) Versions(typeURL string) map[string]string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := make(map[string]string)
	if st := s.stores[typeURL]; st != nil {
		for name, e := range st.entries {
			if !e.removed() {
				all[name] = e.version
			}
		}
	}
	return all
}

// Stop ends every stream with a status that makes its client reconnect, refuses new ones, and waits until their
// goroutines are gone.
func (s *Server) Stop() {
	s.once.Do(func() {
		s.mu.Lock()
		s.stopped = true
		s.mu.Unlock()
		close(s.stop)
	})
	s.work.Wait()
}

// DeltaAggregatedResources serves one client until it leaves, is too slow, or the server stops.
func (s *Server) DeltaAggregatedResources(rpc discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	from := ""
	if p, ok := peer.FromContext(rpc.Context()); ok {
		from = p.Addr.String()
	}
	if s.cfg.Authenticate == nil {
		return status.Error(codes.Unauthenticated, "nobody can be authenticated here")
	}
	who, err := s.cfg.Authenticate(rpc.Context())
	if err != nil {
		s.log.Warn("client refused", zap.String("peer.addr", from), zap.Error(err))
		if errors.Is(err, ErrUnavailable) {
			return status.Error(codes.Unavailable, "callers cannot be authenticated now")
		}
		return status.Error(codes.Unauthenticated, "authentication failed")
	}
	if s.cfg.Ready != nil {
		select {
		case <-s.cfg.Ready:
		case <-s.stop:
		case <-rpc.Context().Done():
			return status.FromContextError(rpc.Context().Err()).Err()
		}
	}
	st, err := s.join(rpc, who, from)
	if err != nil {
		return err
	}
	defer s.work.Done()
	defer s.leave(st)
	return st.serve()
}

func (s *Server) join(
	rpc discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer, who, from string,
) (*stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return nil, status.Error(codes.Unavailable, ErrStopped.Error())
	}
	s.lastID++
	st := newStream(s, rpc, s.lastID, who, from)
	s.streams[st.id] = st
	s.work.Add(1) // under the lock, so that Stop cannot miss it
	s.cfg.Log.Info("client connected", zap.String("peer", who), zap.String("peer.addr", from))
	return st, nil
}

func (s *Server) leave(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, st.id)
	for _, store := range s.stores {
		for w := range store.watches {
			if w.stream == st {
				delete(store.watches, w)
			}
		}
	}
	s.cfg.Log.Info("client gone", zap.String("peer", st.peer), zap.String("peer.addr", st.address))
}

// storeOf returns the store of a type, made when needed. s.mu is held.
func (s *Server) storeOf(typeURL string) *store {
	st := s.stores[typeURL]
	if st == nil {
		st = newStore(typeURL)
		s.stores[typeURL] = st
	}
	return st
}

// watchedStore returns the store for a client's subscription. Types nobody publishes are answered like empty ones, and
// kept only up to a number, since it is clients that make them up. s.mu is held.
func (s *Server) watchedStore(typeURL string) *store {
	if st := s.stores[typeURL]; st != nil {
		return st
	}
	s.cfg.Log.Warn("client asked for a type that nobody publishes", zap.String("type", typeURL))
	if len(s.stores) >= maxTypes {
		return newStore(typeURL)
	}
	return s.storeOf(typeURL)
}

func (s *Server) rank(typeURL string) int {
	if i := slices.Index(s.cfg.Order, typeURL); i >= 0 {
		return i
	}
	return len(s.cfg.Order)
}

func sortedIDs[V any](m map[uint64]V) []uint64 {
	return slices.SortedFunc(maps.Keys(m), cmp.Compare[uint64])
}
