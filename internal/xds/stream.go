package xds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// settleTime is how long after a stream's begin a type waits for its neighbours in the order of types to be asked for:
// a client asks for them in messages of their own.
const settleTime = 100 * time.Millisecond

var errSlow = errors.New("client left a response unanswered for too long")

// stream is one connected client. Its writer owns it: the reader only hands over requests, and the rpc's own goroutine
// only waits for a reason to end.
type stream struct {
	server    *Server
	rpc       discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	id        uint64
	peer      string
	address   string
	connected time.Time
	wake      chan struct{} // one slot: something was published

	mu        sync.Mutex // held by the writer while it thinks, never while it sends
	node      *core.Node
	watches   []*watch // in the order of sending
	lastNonce uint64
}

func newStream(
	s *Server, rpc discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer, id uint64, who, from string,
) *stream {
	return &stream{
		server: s, rpc: rpc, id: id, peer: who, address: from, connected: time.Now(), wake: make(chan struct{}, 1),
	}
}

func (st *stream) nudge() {
	select {
	case st.wake <- struct{}{}:
	default:
	}
}

// serve returns when the client has to go. That ends the rpc's context, and with it the reader and the writer, even in
// the middle of a send to a client that does not read.
func (st *stream) serve() error {
	ctx, cancel := context.WithCancelCause(st.rpc.Context())
	defer cancel(nil)
	requests := make(chan *discovery.DeltaDiscoveryRequest) // no buffer: what is not handled waits in the connection
	ended := make(chan error, 2)                            // a slot for each of the two
	// Both end with the rpc's context, and Server.Stop waits for them: this function cannot, since they end by its return.
	st.server.work.Go(func() { ended <- st.read(ctx, requests) })
	slow := time.AfterFunc(st.server.cfg.AckTimeout, func() { cancel(errSlow) })
	slow.Stop()
	defer slow.Stop()
	st.server.work.Go(func() { ended <- st.write(ctx, requests, slow) })
	select {
	case err := <-ended:
		return err
	case <-st.server.stop:
		return status.Error(codes.Unavailable, ErrStopped.Error())
	case <-ctx.Done():
		if errors.Is(context.Cause(ctx), errSlow) {
			st.server.log.Warn("slow client disconnected", zap.String("peer", st.peer))
			return status.Error(codes.DeadlineExceeded, errSlow.Error())
		}
		return status.FromContextError(ctx.Err()).Err()
	}
}

// read hands over requests until the client says no more, which is a good end.
func (st *stream) read(ctx context.Context, requests chan<- *discovery.DeltaDiscoveryRequest) error {
	for {
		req, err := st.rpc.Recv()
		if err != nil {
			return endOf(err)
		}
		select {
		case requests <- req:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// endOf turns the client's farewell into no error.
func endOf(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (st *stream) write(
	ctx context.Context, requests <-chan *discovery.DeltaDiscoveryRequest, slow *time.Timer,
) error {
	settled := time.NewTimer(settleTime)
	defer settled.Stop()
	for {
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-settled.C:
		case req := <-requests:
			if err := st.handle(req); err != nil {
				return err
			}
		case <-st.wake:
		}
		for {
			resp := st.next(time.Now())
			if resp == nil {
				break
			}
			slow.Reset(st.server.cfg.AckTimeout)
			if err := st.rpc.Send(resp); err != nil {
				return err
			}
		}
		if !st.waiting() {
			slow.Stop()
		}
	}
}

func (st *stream) waiting() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return slices.ContainsFunc(st.watches, func(w *watch) bool { return w.nonce != "" })
}

// handle takes in one request: a subscription, a change of one, an answer, or several of these at once.
func (st *stream) handle(req *discovery.DeltaDiscoveryRequest) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.node == nil && req.GetNode() != nil {
		st.node = req.GetNode()
		if check := st.server.cfg.CheckNode; check != nil {
			if err := check(st.peer, st.node); err != nil {
				st.server.log.Warn("client refused", zap.String("peer", st.peer), zap.Error(err))
				return status.Error(codes.PermissionDenied, "node is not the caller's")
			}
		}
	}
	if req.GetTypeUrl() == "" {
		return status.Error(codes.InvalidArgument, "request without a type")
	}
	st.server.mu.Lock()
	defer st.server.mu.Unlock()
	i := slices.IndexFunc(st.watches, func(w *watch) bool { return w.store.typeURL == req.GetTypeUrl() })
	if i < 0 {
		return st.watch(req)
	}
	w := st.watches[i]
	if w.acknowledged(req, time.Now()) && req.GetErrorDetail() != nil {
		st.server.log.Warn("client rejected resources", zap.String("peer", st.peer),
			zap.String("type", req.GetTypeUrl()), zap.String("reason", truncate(req.GetErrorDetail().GetMessage())))
	}
	w.subscribe(req.GetResourceNamesSubscribe(), req.GetResourceNamesUnsubscribe())
	return nil
}

// watch begins a type on this stream. Both mutexes are held.
func (st *stream) watch(req *discovery.DeltaDiscoveryRequest) error {
	if len(st.watches) >= maxTypes {
		return status.Error(codes.ResourceExhausted, fmt.Sprintf("more than %d types on a stream", maxTypes))
	}
	s := st.server.watchedStore(req.GetTypeUrl())
	reader, _, _ := strings.Cut(st.peer, "@")
	w := newWatch(s, req, reader, slices.Contains(st.node.GetClientFeatures(), featureChunks))
	w.stream = st
	w.subscribe(req.GetResourceNamesSubscribe(), req.GetResourceNamesUnsubscribe())
	w.claimed()
	s.watches[w] = struct{}{}
	st.watches = append(st.watches, w)
	slices.SortStableFunc(st.watches, func(a, b *watch) int {
		return st.server.rank(a.store.typeURL) - st.server.rank(b.store.typeURL)
	})
	return nil
}

// next returns the next response that may go out, or nil. One response per type is in flight; what changes meanwhile
// gathers behind the cursor. Additions of a type wait for those of the types before it, and removals for everything of
// the types after it: a policy is there before a workload names it, and until none does.
func (st *stream) next(now time.Time) *discovery.DeltaDiscoveryResponse {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.server.mu.RLock()
	defer st.server.mu.RUnlock()
	for i, w := range st.watches {
		if w.nonce != "" {
			if w.news() {
				return nil
			}
			continue
		}
		rank, settling := st.server.rank(w.store.typeURL), now.Sub(st.connected) < settleTime
		if settling && !st.watched(0, rank) {
			return nil
		}
		later := slices.ContainsFunc(st.watches[i+1:], (*watch).news) ||
			settling && !st.watched(rank+1, len(st.server.cfg.Order))
		if !w.news() && (later || len(w.removes) == 0) {
			continue
		}
		b := w.collect(!later)
		if b.empty() && !w.owed {
			continue
		}
		return st.respond(w, &b, now)
	}
	return nil
}

// watched reports whether the client has asked for all types of a part of the order.
func (st *stream) watched(from, to int) bool {
	order := st.server.cfg.Order
	for rank := from; rank < min(to, len(order)); rank++ {
		if !slices.ContainsFunc(st.watches, func(w *watch) bool { return w.store.typeURL == order[rank] }) {
			return false
		}
	}
	return true
}

func (st *stream) respond(w *watch, b *batch, now time.Time) *discovery.DeltaDiscoveryResponse {
	st.lastNonce++
	nonce := strconv.FormatUint(st.lastNonce, 10)
	w.sent(b, nonce, now)
	return b.response(w.store.typeURL, nonce, strconv.FormatUint(w.store.seq, 10))
}

func truncate(s string) string {
	const most = 512
	if len(s) > most {
		return s[:most]
	}
	return s
}
