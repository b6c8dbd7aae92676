package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/memlimit"
	"github.com/mistnet/mistnet/internal/mesh"
)

const (
	defaultPoolStreams = 100
	defaultIdleTimeout = 5 * time.Minute
	connectTimeout     = 10 * time.Second // TCP and TLS together
)

// PoolConfig is what a Pool needs.
type PoolConfig struct {
	Dial        func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) // plain TCP
	TLS         func(ctx context.Context, to Target) (*tls.Config, error)        // called once per new connection
	MaxStreams  int                                                              // per connection; zero: 100
	IdleTimeout time.Duration                                                    // zero: 5 min
	Memory      *memlimit.Budget                                                 // what connections hold is charged to; nil: none
	Log         *zap.Logger                                                      // nil: none

	// StdlibRecords leaves TLS records to crypto/tls, instead of only the handshake.
	StdlibRecords bool
}

// Pool keeps the client's connections, per target. All of its methods may be called at any time by any goroutine.
type Pool struct {
	cfg    PoolConfig
	ctx    context.Context // ends dials when the pool is closed
	cancel context.CancelCauseFunc
	work   sync.WaitGroup // dials and connections

	mu      sync.Mutex
	targets map[poolKey]*peer
	closed  bool
}

// poolKey is a Target in comparable form.
type poolKey struct {
	local     mesh.Identity
	localAddr netip.Addr
	addr      netip.AddrPort
	expect    mesh.Identity
	more      string // the further expected identities
}

func keyOf(to *Target) poolKey {
	k := poolKey{local: to.Local, localAddr: to.LocalAddr, addr: to.Addr}
	if len(to.Expect) > 0 {
		k.expect = to.Expect[0]
	}
	if len(to.Expect) > 1 {
		more := make([]string, 0, len(to.Expect)-1)
		for _, id := range to.Expect[1:] {
			more = append(more, id.String())
		}
		k.more = strings.Join(more, " ")
	}
	return k
}

// peer is what the pool knows of one target. Guarded by Pool.mu.
type peer struct {
	to    Target
	conns []*conn
	dial  *dialing // nil: nobody is dialling
}

// dialing is one attempt to connect, which everybody who needs the target waits for.
type dialing struct {
	done chan struct{}
	err  error
}

// NewPool returns an empty pool.
func NewPool(cfg PoolConfig) *Pool {
	if cfg.MaxStreams == 0 {
		cfg.MaxStreams = defaultPoolStreams
	}
	if cfg.IdleTimeout == 0 {
		cfg.IdleTimeout = defaultIdleTimeout
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	p := &Pool{cfg: cfg, targets: make(map[poolKey]*peer)}
	p.ctx, p.cancel = context.WithCancelCause(context.Background())
	return p
}

// Open opens a tunnel to authority through the target, on a connection that exists or a new one. A connection takes no
// more tunnels when a certificate it was made with has expired; those it has go on. It returns when the
// peer has accepted: a *StatusError says that it did not, a *StageError that it could not be asked. A request that was
// refused unprocessed, or whose connection ended before the answer, is tried once more on a new connection.
func (p *Pool) Open(ctx context.Context, to Target, authority string, h Header) (*Stream, error) {
	return p.OpenWithin(ctx, 0, to, authority, h)
}

// OpenWithin is Open for a caller who has another target to try: where a connection has to be made first, it waits no longer than
// that for it, and returns a *StageError that wraps os.ErrDeadlineExceeded. The dial goes on, for the next one to ask. Zero: Open.
func (p *Pool) OpenWithin(ctx context.Context, wait time.Duration, to Target, authority string, h Header) (*Stream, error) {
	if len(to.Expect) == 0 {
		return nil, &StageError{StageTLS, errExpect}
	}
	s, err := p.open(ctx, wait, &to, authority, &h, false)
	if err != nil && retryable(err) && ctx.Err() == nil {
		s, err = p.open(ctx, wait, &to, authority, &h, true)
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// unanswered wraps the end of a stream or connection before the answer.
type unanswered struct{ err error }

func (e *unanswered) Error() string { return e.err.Error() }
func (e *unanswered) Unwrap() error { return e.err }

func retryable(err error) bool {
	var u *unanswered
	if !errors.As(err, &u) {
		return false
	}
	var r *ResetError
	return !errors.As(err, &r) || http2.ErrCode(r.Code) == http2.ErrCodeRefusedStream
}

// open makes one attempt; a fresh one on a connection made for it.
func (p *Pool) open(ctx context.Context, wait time.Duration, to *Target, authority string, h *Header, fresh bool) (*Stream, error) {
	var late <-chan time.Time // none as long as there is a connection
	for first := true; ; first = false {
		s, d, err := p.stream(ctx, to, authority, h, first && fresh)
		if err != nil {
			return nil, err
		}
		if s != nil {
			s.c.flushStaged()
			return s, s.await(ctx)
		}
		if wait > 0 && late == nil {
			late = time.After(wait)
		}
		select {
		case <-d.done:
			if d.err != nil {
				return nil, d.err
			}
		case <-late:
			return nil, &StageError{StageDial, os.ErrDeadlineExceeded}
		case <-ctx.Done():
			return nil, &StageError{StageDial, context.Cause(ctx)}
		}
	}
}

// stream opens a stream on a connection with room, or returns the dial to wait for.
func (p *Pool) stream(ctx context.Context, to *Target, authority string, h *Header, dial bool) (*Stream, *dialing, error) {
	key := keyOf(to)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, nil, &StageError{StageHTTP2, ErrClosed}
	}
	t := p.targets[key]
	if t == nil {
		t = &peer{to: *to}
		p.targets[key] = t
	}
	if !dial {
		// The newest first: after a retry that is the connection made for it.
		for _, c := range slices.Backward(t.conns) {
			if s := c.open(authority, h); s != nil {
				return s, nil, nil
			}
		}
	}
	if t.dial == nil {
		d := &dialing{done: make(chan struct{})}
		t.dial = d
		// The dial outlives a caller who gives up: others may be waiting for it too.
		dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), connectTimeout)
		stop := context.AfterFunc(p.ctx, cancel)
		p.work.Go(func() {
			defer cancel()
			defer stop()
			p.dial(dctx, key, t, d)
		})
	}
	return nil, t.dial, nil
}

// dial connects, and then serves the connection until it ends.
func (p *Pool) dial(ctx context.Context, key poolKey, t *peer, d *dialing) {
	c, err := p.connect(ctx, t.to)
	p.mu.Lock()
	t.dial = nil
	if err == nil && (p.closed || p.targets[key] != t) {
		c.discard()
		err = &StageError{StageHTTP2, ErrClosed}
	}
	d.err = err
	if err == nil {
		t.conns = append(t.conns, c)
		c.onClose = func() { p.remove(key, t, c) }
		c.start()
	} else if len(t.conns) == 0 && p.targets[key] == t {
		delete(p.targets, key)
	}
	p.mu.Unlock()
	close(d.done)
	if err != nil {
		return
	}
	p.cfg.Memory.Charge(connBytes)
	defer p.cfg.Memory.Release(connBytes)
	if err := c.serve(); err != nil {
		p.cfg.Log.Debug("tunnel connection ended", zap.Stringer("peer.addr", t.to.Addr), zap.Error(err))
	}
	c.handlers.Wait()
}

func (p *Pool) connect(ctx context.Context, to Target) (*conn, error) {
	cfg, err := p.cfg.TLS(ctx, to)
	if err != nil {
		return nil, &StageError{StageTLS, err}
	}
	raw, err := p.cfg.Dial(ctx, to.Addr)
	if err != nil {
		return nil, &StageError{StageDial, err}
	}
	if err := tune(raw); err != nil {
		p.cfg.Log.Debug("socket options not set", zap.Error(err))
	}
	own := new(time.Time)
	h, err := clientHandshake(ctx, raw, noting(cfg, own), p.cfg.StdlibRecords, p.cfg.Memory)
	if err != nil {
		raw.Close()
		return nil, &StageError{StageTLS, err}
	}
	c := newConn(context.Background(), h, p.cfg.Log)
	c.maxStreams = p.cfg.MaxStreams
	c.idleTimeout = p.cfg.IdleTimeout
	c.expires = *own
	if peers := c.state.PeerCertificates; len(peers) > 0 && (own.IsZero() || peers[0].NotAfter.Before(*own)) {
		c.expires = peers[0].NotAfter
	}
	return c, nil
}

// noting is cfg, which notes when the certificate that is shown expires: crypto/tls does not tell which it was.
func noting(cfg *tls.Config, expires *time.Time) *tls.Config {
	get := cfg.GetClientCertificate
	if get == nil {
		return cfg
	}
	cfg = cfg.Clone()
	cfg.GetClientCertificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		cert, err := get(r)
		if err == nil && cert.Leaf != nil {
			*expires = cert.Leaf.NotAfter
		}
		return cert, err
	}
	return cfg
}

func (p *Pool) remove(key poolKey, t *peer, c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range t.conns {
		if t.conns[i] == c {
			t.conns = append(t.conns[:i], t.conns[i+1:]...)
			break
		}
	}
	if len(t.conns) == 0 && t.dial == nil && p.targets[key] == t {
		delete(p.targets, key)
	}
}

// CloseTargets closes the connections, idle or busy, of every target for which drop is true; their streams end with an
// error. Dials of such targets under way fail.
func (p *Pool) CloseTargets(drop func(Target) bool) {
	var conns []*conn
	p.mu.Lock()
	for key, t := range p.targets {
		if drop(t.to) {
			conns = append(conns, t.conns...)
			delete(p.targets, key)
		}
	}
	p.mu.Unlock()
	var wg sync.WaitGroup
	for _, c := range conns {
		wg.Go(func() { c.shut(http2.ErrCodeNo, ErrClosed) })
	}
	wg.Wait()
}

// Close closes every connection at once and waits for the pool's goroutines.
func (p *Pool) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.cancel(ErrClosed)
	p.CloseTargets(func(Target) bool { return true })
	p.work.Wait()
	return nil
}

// await waits for the answer to the stream's request.
func (s *Stream) await(ctx context.Context) error {
	for {
		s.in.mu.Lock()
		status, end, err := s.in.status, s.in.end, s.in.err
		s.in.mu.Unlock()
		switch {
		case status == 200:
			return nil
		case status != 0:
			s.reset(http2.ErrCodeCancel)
			return &StatusError{status}
		case end:
			if err == nil {
				err = ErrPeerClosed
			}
			return &StageError{StageHTTP2, &unanswered{err}}
		}
		select {
		case <-s.readable:
		case <-ctx.Done():
			s.reset(http2.ErrCodeCancel)
			return &StageError{StageHTTP2, context.Cause(ctx)}
		}
	}
}
