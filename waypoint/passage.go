package waypoint

import (
	"context"
	"sync"

	"github.com/mistnet/mistnet/waypoint/upstream"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/waypoint/route"
)

// passage is what was let through once and lasts: a connection that is not HTTP, or one that no longer is.
type passage struct {
	tunnel *tunnel
	http   *authz.HTTP // the request it began with; nil: none
	end    context.CancelCauseFunc

	// Where a rule led it.
	rule *route.Rule
	to   upstream.ClusterKey
	led  *authz.HTTP // the request as it arrived there; nil: none
}

// passages are those under way. One is registered before it is authorized, so that a change of policies cannot slip between
// the two.
type passages struct {
	mu  sync.Mutex
	all map[*passage]struct{}
}

// enter registers a passage of t that begins with a request, or with none. The returned context ends when it must.
func (ps *passages) enter(ctx context.Context, t *tunnel, http *authz.HTTP) (context.Context, *passage) {
	p := &passage{tunnel: t, http: http}
	ctx, p.end = context.WithCancelCause(ctx)
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.all == nil {
		ps.all = make(map[*passage]struct{})
	}
	ps.all[p] = struct{}{}
	return ctx, p
}

// lead notes where a rule led p. The caller looks whether it may still go there.
func (ps *passages) lead(p *passage, rule *route.Rule, to upstream.ClusterKey, led *authz.HTTP) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p.rule, p.to, p.led = rule, to, led
}

// leave forgets p. It returns when nobody looks at the passage's request any more.
func (ps *passages) leave(p *passage) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	delete(ps.all, p)
	p.end(nil)
}

// recheck ends those that v does not allow. What v does not know yet says nothing about them.
func (ps *passages) recheck(v *view) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for p := range ps.all {
		p.recheck(v)
	}
}

func (p *passage) recheck(v *view) {
	d := p.tunnel.authorize(v, p.http)
	if d.ok && p.rule != nil {
		d = p.tunnel.authorizeLead(v, p.rule, p.to, p.led)
	}
	if !d.ok && !d.unknown {
		p.end(&policyChangedError{d.details})
	}
}

// policyChangedError ends a passage that a policy no longer allows.
type policyChangedError struct{ details string }

func (e *policyChangedError) Error() string { return "policy changed: " + e.details }

// governedAlike reports whether the same policies hold in both views.
func governedAlike(a, b *view) bool {
	same := func(g, h *guard) bool {
		return g == h || g != nil && h != nil && g.set == h.set && len(g.missing) == 0 && len(h.missing) == 0
	}
	if (a.Self == nil) != (b.Self == nil) || !same(a.own, b.own) || len(a.guards) != len(b.guards) {
		return false
	}
	for key, g := range a.guards {
		if !same(g, b.guards[key]) {
			return false
		}
	}
	return true
}
