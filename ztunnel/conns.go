package ztunnel

import (
	"context"
	"errors"
	"net/netip"
	"sync"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/proxyproto"
)

// errPolicyChanged ends a connection that a policy no longer allows.
var errPolicyChanged = errors.New("policy changed")

// conns are the live connections of this ztunnel. One is registered before it is first authorized, so that a policy
// change cannot slip between the two.
type conns struct {
	mu   sync.Mutex
	live map[*conn]struct{}
}

// conn is one live connection.
type conn struct {
	*record
	cancel context.CancelCauseFunc

	original netip.AddrPort // where the caller meant to go
	target   netip.AddrPort // what is dialed: the next hop, or the application

	announce *proxyproto.Header // what the application is told before the caller's first byte; nil: nothing

	// For inbound connections, what authorization reads. pod names the destination.
	pod     podKey
	request authz.Request
	ctx     context.Context // the scope of the connection
}

type podKey struct{ namespace, name string }

func newConns() *conns { return &conns{live: make(map[*conn]struct{})} }

// track registers c. The returned context ends when the connection must.
func (cs *conns) track(ctx context.Context, c *conn) context.Context {
	ctx, c.cancel = context.WithCancelCause(ctx)
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.live[c] = struct{}{}
	return ctx
}

// release forgets c and, in the same moment, moves its byte counts to the totals, and has its end counted: a scrape sees all of
// it exactly once.
func (cs *conns) release(c *conn, count func()) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	delete(cs.live, c)
	c.cancel(nil)
	if c.series != nil {
		c.series.add(c.record)
	}
	count()
}

// each calls f for every live connection; totals do not move meanwhile.
func (cs *conns) each(f func(*conn)) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for c := range cs.live {
		f(c)
	}
}

// set changes what each shows of a connection that is already tracked.
func (cs *conns) set(change func()) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	change()
}

// recheck ends the inbound connections that v does not allow. A workload or policy that v does not know yet says
// nothing about them.
func (cs *conns) recheck(v *view) {
	type governed struct {
		set   *authz.Set
		known bool
	}
	sets := make(map[podKey]governed)
	cs.each(func(c *conn) {
		if !c.inbound {
			return
		}
		g, ok := sets[c.pod]
		if !ok {
			if w := v.Pod(c.pod.namespace, c.pod.name); w != nil {
				set, missing := v.policies(w)
				g = governed{set, len(missing) == 0}
			}
			sets[c.pod] = g
		}
		if !g.known {
			return
		}
		if d := g.set.Check(&c.request); !d.Allow {
			c.cancel(&deniedError{d, errPolicyChanged})
		}
	})
}

// deniedError says which policy refused a connection.
type deniedError struct {
	decision authz.Decision
	cause    error // nil for a new connection
}

func (e *deniedError) Error() string {
	s := "denied: " + e.decision.Why.String()
	if e.decision.Policy != "" {
		s += " " + e.decision.Policy
	}
	if e.cause != nil {
		s = e.cause.Error() + ": " + s
	}
	return s
}

func (e *deniedError) Unwrap() error { return e.cause }

// authorize decides about a connection that is already tracked. When the workload names a policy that has not
// arrived, it waits until ctx is done for it, then denies: an absent rule is not an open door.
func (s *state) authorize(ctx context.Context, c *conn) error {
	var d authz.Decision
	var missing []string
	v, known := s.await(ctx, func(v *view) bool {
		w := v.Pod(c.pod.namespace, c.pod.name)
		if w == nil {
			return false
		}
		var set *authz.Set
		if set, missing = v.policies(w); len(missing) > 0 {
			return false
		}
		d = set.Check(&c.request)
		return true
	})
	switch {
	case known && d.Allow:
		return nil
	case known:
		return &deniedError{decision: d}
	case v.Pod(c.pod.namespace, c.pod.name) == nil:
		return errUnknownWorkload
	}
	return &missingPolicyError{missing}
}

// missingPolicyError refuses a connection because a policy it depends on has not arrived from istiod.
type missingPolicyError struct{ keys []string }

func (e *missingPolicyError) Error() string {
	s := "denied: these policies select the workload but have not arrived from istiod:"
	for _, k := range e.keys {
		s += " " + k
	}
	return s
}

// errUnknownWorkload means that istiod has not told about a pod of this node.
var errUnknownWorkload = errors.New("workload is not known: istiod has not sent it; is its pod in the mesh's configuration?")
