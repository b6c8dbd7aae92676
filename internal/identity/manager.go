package identity

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/mesh"
)

const (
	defaultTTL  = 24 * time.Hour
	maxInFlight = 8                // requests to the authority at any one time
	signTimeout = 10 * time.Second // of one request

	backoffFirst  = time.Second
	backoffMax    = 150 * time.Second
	backoffJitter = 0.2 // either way

	// retryPatience is how far off the next attempt after a failure may be for a caller to wait for it: an authority that
	// restarts should cost its first callers time, not their connections.
	retryPatience = 2 * time.Second

	// renewalSpread is how much earlier than half-life a renewal may come, as a part of what is left of the lifetime, so
	// that certificates fetched together are not renewed together.
	renewalSpread = 0.05
)

// CA signs certificate requests: istiod, through CAClient, or another authority.
type CA interface {
	// Sign returns PEM certificates: the leaf for id, then intermediates, the roots in the last element. A ttl of zero
	// leaves the lifetime to the authority.
	Sign(ctx context.Context, id mesh.Identity, csrPEM []byte, ttl time.Duration) (chainPEM []string, err error)
}

// ManagerConfig is what a Manager is made of. CA is required.
type ManagerConfig struct {
	CA    CA
	TTL   time.Duration  // lifetime to ask for; 0: 24 h
	Trust *Trust         // nil: a new one
	Rand  func() float64 // in [0, 1), for jitter; nil: the runtime's
	Log   *zap.Logger    // nil: none
}

// Manager keeps one SVID per identity that is wanted: fetched when first asked for, renewed at half-life until
// forgotten. It does nothing until Run.
type Manager struct {
	cfg  ManagerConfig
	wake chan struct{} // there may be work; one token is enough, Run looks at everything

	mu       sync.Mutex
	entries  map[mesh.Identity]*entry
	inFlight int
	stopped  error // set when Run has returned
}

// entry is one identity that is wanted.
type entry struct {
	id       mesh.Identity
	svid     *SVID       // the last good one, maybe expired
	server   *tls.Config // made of svid
	err      error       // of the last attempt
	failures int         // in a row

	due     time.Time          // of the next attempt
	again   time.Time          // when Renew wants another one after that in flight; zero: it does not
	waiting int                // callers of SVID with nothing to use
	cancel  context.CancelFunc // of the attempt in flight, else nil
	done    chan struct{}      // closed at the end of the attempt in flight or of the next one
}

// urgency orders entries that are due.
type urgency int

const (
	wanted   urgency = iota // a caller waits
	prefetch                // nothing to use yet, nobody waits
	renewal
)

// NewManager returns a Manager that has no certificates yet.
func NewManager(cfg ManagerConfig) *Manager {
	if cfg.TTL == 0 {
		cfg.TTL = defaultTTL
	}
	if cfg.Trust == nil {
		cfg.Trust = new(Trust)
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Float64
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	return &Manager{cfg: cfg, wake: make(chan struct{}, 1), entries: make(map[mesh.Identity]*entry)}
}

// SVID returns the current SVID of id. If there is none that is valid it waits for the attempt under way, the one it
// starts, or the next one if that is due within seconds, and fails as that one does; while the authority is left alone
// for longer after failures, it fails at once.
func (m *Manager) SVID(ctx context.Context, id mesh.Identity) (*SVID, error) {
	svid, _, err := m.current(ctx, id)
	return svid, err
}

func (m *Manager) current(ctx context.Context, id mesh.Identity) (*SVID, *tls.Config, error) {
	if id.IsZero() {
		return nil, nil, errors.New("get certificate: no identity given")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.want(id)
	now := time.Now()
	if e.usable(now) {
		return e.svid, e.server, nil
	}
	if m.stopped != nil {
		return nil, nil, fmt.Errorf("get certificate of %s: %w", id, m.stopped)
	}
	switch left := e.due.Sub(now); {
	case e.failures > 0 && e.cancel == nil && left > retryPatience:
		return nil, nil, fmt.Errorf("get certificate of %s%s, next attempt in %s: %w", id, e.gone(now), left.Round(time.Millisecond), e.err)
	case e.failures == 0 && left > 0: // expired before its renewal was due: a clock has jumped
		e.due = now
	}
	e.waiting++
	done := e.done
	m.nudge()
	m.mu.Unlock()
	var cause error
	select {
	case <-done:
	case <-ctx.Done():
		cause = context.Cause(ctx)
	}
	m.mu.Lock()
	e.waiting--
	now = time.Now()
	if e.usable(now) {
		return e.svid, e.server, nil
	}
	return nil, nil, fmt.Errorf("get certificate of %s%s: %w", id, e.gone(now), errors.Join(cause, e.err))
}

// gone tells errors of a certificate that there was.
func (e *entry) gone(now time.Time) string {
	if e.svid == nil {
		return ""
	}
	return fmt.Sprintf(", which expired %s ago", now.Sub(e.svid.NotAfter).Round(time.Second))
}

func (e *entry) usable(now time.Time) bool { return e.svid != nil && !e.svid.Expired(now) }

// want returns the entry of id, a new one if need be. The caller holds mu.
func (m *Manager) want(id mesh.Identity) *entry {
	e := m.entries[id]
	if e == nil {
		e = &entry{id: id, due: time.Now(), done: make(chan struct{})}
		m.entries[id] = e
	}
	return e
}

// Prefetch has the certificate of id fetched when nothing more urgent is to be done.
func (m *Manager) Prefetch(id mesh.Identity) {
	if id.IsZero() {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.want(id)
	m.nudge()
}

// Forget drops the certificate of id and stops renewing it. Callers that wait for it get an error.
func (m *Manager) Forget(id mesh.Identity) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[id]
	if e == nil {
		return
	}
	delete(m.entries, id)
	if e.cancel != nil {
		e.cancel()
	}
	e.svid, e.err = nil, errors.New("no longer wanted on this node")
	close(e.done)
}

// renewWithin is how far the renewals of Renew are spread, for the authority's sake: every node does it at about one time.
const renewWithin = 10 * time.Second

// Renew has every certificate fetched anew within seconds, as the roots to trust come with them. Those there are stay in
// use until then, and if that fails.
func (m *Manager) Renew() {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for _, e := range m.entries {
		at := now.Add(time.Duration(m.cfg.Rand() * float64(renewWithin)))
		switch {
		case e.cancel != nil:
			e.again = at // what is under way may have been asked before
		case e.svid != nil && e.due.After(at):
			e.due = at
		}
	}
	m.nudge()
}

// Retry has what failed attempted again at once: the authority is believed to be back.
func (m *Manager) Retry() {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for _, e := range m.entries {
		if e.failures > 0 && e.cancel == nil && e.due.After(now) {
			e.due = now
		}
	}
	m.nudge()
}

func (m *Manager) nudge() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Run fetches and renews certificates until ctx is done, then waits for what is in flight. It is called once.
func (m *Manager) Run(ctx context.Context) error {
	var attempts sync.WaitGroup
	defer m.stop(ctx)
	defer attempts.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if next, ok := m.start(ctx, &attempts); ok {
			timer.Reset(time.Until(next))
		} else {
			timer.Stop()
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-m.wake:
		case <-timer.C:
		}
	}
}

func (m *Manager) stop(ctx context.Context) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stopped = fmt.Errorf("certificates are no longer fetched: %w", context.Cause(ctx))
	for _, e := range m.entries {
		if e.err == nil {
			e.err = m.stopped
		}
		close(e.done)
		e.done = make(chan struct{})
	}
}

// start begins as many attempts as are due and allowed, and returns when the next one will be due; false if that does
// not depend on time.
func (m *Manager) start(ctx context.Context, attempts *sync.WaitGroup) (time.Time, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.inFlight < maxInFlight && ctx.Err() == nil {
		e := m.next()
		if e == nil {
			return time.Time{}, false
		}
		if e.due.After(time.Now()) {
			return e.due, true
		}
		m.inFlight++
		attempt, cancel := context.WithTimeout(ctx, signTimeout)
		e.cancel = cancel
		attempts.Go(func() {
			svid, err := m.fetch(attempt, e.id)
			cancel()
			m.finish(ctx, e, svid, err)
		})
	}
	return time.Time{}, false // the end of an attempt wakes Run
}

// next picks the entry to attempt now, or else the one that is due first; nil when there is none.
func (m *Manager) next() *entry {
	now := time.Now()
	var best *entry
	for _, e := range m.entries {
		if e.cancel == nil && (best == nil || e.before(best, now)) {
			best = e
		}
	}
	return best
}

func (e *entry) before(o *entry, now time.Time) bool {
	if due, oDue := !e.due.After(now), !o.due.After(now); due != oDue {
		return due
	} else if due && e.urgency() != o.urgency() {
		return e.urgency() < o.urgency()
	}
	if !e.due.Equal(o.due) {
		return e.due.Before(o.due)
	}
	return e.id.String() < o.id.String()
}

func (e *entry) urgency() urgency {
	switch {
	case e.waiting > 0:
		return wanted
	case e.svid == nil:
		return prefetch
	}
	return renewal
}

func (m *Manager) fetch(ctx context.Context, id mesh.Identity) (*SVID, error) {
	key, err := newKey()
	if err != nil {
		return nil, fmt.Errorf("make key for %s: %w", id, err)
	}
	csr, err := NewCSR(id, key)
	if err != nil {
		return nil, err
	}
	chain, err := m.cfg.CA.Sign(ctx, id, csr, m.cfg.TTL)
	if err != nil {
		return nil, err
	}
	return NewSVID(id, key, chain, m.cfg.Trust)
}

// finish records the outcome of an attempt. ctx is Run's.
func (m *Manager) finish(ctx context.Context, e *entry, svid *SVID, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.inFlight--
	m.nudge()
	e.cancel = nil
	if m.entries[e.id] != e || ctx.Err() != nil { // forgotten meanwhile, or Run is over
		return
	}
	now := time.Now()
	if err != nil {
		e.err, e.due = err, now.Add(pause(e.failures, m.cfg.Rand()))
		e.failures++
		m.logFailure(e, now)
	} else {
		e.svid, e.server, e.err, e.failures = svid, ServerConfig(svid), nil, 0
		e.due = renewAt(now, svid.NotAfter, m.cfg.Rand())
		if !e.again.IsZero() {
			e.due, e.again = e.again, time.Time{}
		}
		m.cfg.Log.Debug("certificate fetched", zap.Stringer("identity", e.id), zap.Time("expires", svid.NotAfter), zap.Time("renewal", e.due))
	}
	close(e.done)
	e.done = make(chan struct{})
}

func (m *Manager) logFailure(e *entry, now time.Time) {
	fields := []zap.Field{zap.Stringer("identity", e.id), zap.Error(e.err), zap.Duration("retry_in", e.due.Sub(now))}
	switch {
	case e.svid == nil:
		m.cfg.Log.Warn("certificate fetch failed", fields...)
	case e.usable(now):
		m.cfg.Log.Warn("certificate renewal failed", append(fields, zap.Time("expires", e.svid.NotAfter))...)
	default:
		m.cfg.Log.Error("certificate expired and renewal failed", append(fields, zap.Time("expired", e.svid.NotAfter))...)
	}
}

// pause is how long to wait after a failure that followed so many others.
func pause(failures int, random float64) time.Duration {
	d := backoffMax
	if failures < 8 { // 2^8 s is beyond the maximum
		d = min(backoffFirst<<failures, backoffMax)
	}
	return min(time.Duration(float64(d)*(1-backoffJitter+2*backoffJitter*random)), backoffMax)
}

// renewAt is half-way to the end of a certificate received now, or a little before.
func renewAt(now, notAfter time.Time, random float64) time.Time {
	left := notAfter.Sub(now)
	return now.Add(max(time.Duration(float64(left)*(0.5-renewalSpread*random)), backoffFirst))
}
