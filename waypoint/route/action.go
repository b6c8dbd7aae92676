package route

import (
	"errors"
	"fmt"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// rule compiles what a route does, once for all its parents.
func (c *compiler) rule(r *mesh.Route) *Rule {
	if rule, ok := c.rules[r]; ok {
		return rule
	}
	rule := &Rule{Route: r, Retry: defaultRetry}
	c.rules[r] = rule
	switch {
	case r.Invalid != "":
		c.refuse(r, errors.New(r.Invalid))
	case r.Kind == mesh.KindRouteUnknown || r.Kind > mesh.KindTCPRoute:
		c.refuse(r, fmt.Errorf("kind: unknown value %d", r.Kind))
	case r.Protocol == mesh.RouteHTTP && r.HTTP != nil && r.Stream == nil:
		if err := rule.http(r.HTTP, r.Kind); err != nil {
			c.refuse(r, err)
		}
	case (r.Protocol == mesh.RouteTLS || r.Protocol == mesh.RouteTCP) && r.Stream != nil && r.HTTP == nil:
		err := validStream(r.Stream, r.Protocol)
		if err = errors.Join(err, rule.destinations(r.Stream.Backends, r.Kind)); err != nil {
			c.refuse(r, err)
		}
	default:
		c.refuse(r, fmt.Errorf("protocol: %v does not fit what the rule says", r.Protocol))
	}
	return rule
}

// refuse makes the rule of r one that refuses.
func (c *compiler) refuse(r *mesh.Route, err error) {
	rule, why := c.rules[r], strings.ReplaceAll(err.Error(), "\n", "; ")
	if !c.invalid[r] {
		c.invalid[r] = true
		rule.Refuse, rule.Why = 500, why
	}
	c.problem(Problem{Kind: Invalid, Route: r.Key(), Match: -1, Reason: why})
}

func (rule *Rule) http(m *mesh.HTTPRule, kind mesh.RouteKind) error {
	var errs []error
	fail := func(at string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s.%w", at, err))
		}
	}
	var err error
	rule.Redirect, err = compileRedirect(m.Redirect, kind)
	fail("redirect", err)
	if rule.Direct = m.Direct; m.Direct != nil && (m.Direct.Status < 200 || m.Direct.Status > 599) {
		errs = append(errs, fmt.Errorf("direct.status: %d is not 200 to 599", m.Direct.Status))
	}
	rule.CORS, err = compileCORS(m.CORS)
	fail("cors", err)
	rule.Request, rule.authority, err = compileHeaders(m.Headers.Request, true)
	fail("headers.request", err)
	rule.Response, _, err = compileHeaders(m.Headers.Response, false)
	fail("headers.response", err)
	if m.Rewrite != nil {
		rule.rewrite, err = compilePathEdit(m.Rewrite.Path, kind)
		fail("rewrite.path", err)
		if m.Rewrite.Authority != "" {
			rule.authority = m.Rewrite.Authority
		}
	}
	rule.Retry = compileRetry(m.Retry)
	rule.Timeout, rule.TryTimeout = m.Timeout, m.TryTimeout
	rule.Persistence = m.Persistence
	rule.Mirrors = compileMirrors(m.Mirrors)
	if m.Fault != nil {
		f := *m.Fault
		rule.fault = &f
		if a := f.Abort; a.Percent.Numerator != 0 && a.HTTPStatus != 0 && (a.HTTPStatus < 200 || a.HTTPStatus > 599) {
			errs = append(errs, fmt.Errorf("fault.abort.http_status: %d is not 200 to 599", a.HTTPStatus))
		}
	}
	return errors.Join(append(errs, rule.destinations(m.Backends, kind))...)
}

// serviceOf makes the key of a service once, for all requests.
func serviceOf(ref *mesh.BackendRef) string {
	if ref.Hostname == "" {
		return ""
	}
	return ref.Service()
}

// destinations compiles the backends. Without any weight, a Gateway API route answers 500 and so does a VirtualService,
// which could not have been written like that.
func (rule *Rule) destinations(backends []mesh.Backend, kind mesh.RouteKind) error {
	var errs []error
	rule.noBackend = 500
	invalid := uint16(500)
	if kind == mesh.KindVirtualService {
		invalid = 503
	}
	for i := range backends {
		m := &backends[i]
		b := Backend{Ref: m.Ref, Service: serviceOf(&m.Ref), Weight: m.Weight, Mirrors: compileMirrors(m.Mirrors)}
		if m.Ref.Invalid != "" {
			b.Refuse = invalid
		}
		if kind == mesh.KindVirtualService && len(backends) == 1 {
			b.Weight = 1 // the weight of a single destination is not looked at
		}
		fail := func(at string, err error) {
			if err != nil {
				errs = append(errs, fmt.Errorf("backends[%d].%s.%w", i, at, err))
			}
		}
		var err error
		b.Redirect, err = compileRedirect(m.Redirect, kind)
		fail("redirect", err)
		b.Request, b.authority, err = compileHeaders(m.Headers.Request, true)
		fail("headers.request", err)
		b.Response, _, err = compileHeaders(m.Headers.Response, false)
		fail("headers.response", err)
		if m.Rewrite != nil {
			b.rewrite, err = compilePathEdit(m.Rewrite.Path, kind)
			fail("rewrite.path", err)
			if m.Rewrite.Authority != "" {
				b.authority, b.strong = m.Rewrite.Authority, true
			}
		}
		rule.backends = append(rule.backends, b)
		rule.total += uint64(b.Weight)
	}
	if rule.total > 1<<32 {
		errs = append(errs, errors.New("backends: the weights add up to more than 4294967296"))
	}
	return errors.Join(errs...)
}

func compileMirrors(list []mesh.Mirror) []Mirror {
	var out []Mirror
	for _, m := range list {
		out = append(out, Mirror{Ref: m.Ref, Service: serviceOf(&m.Ref), Percent: m.Percent})
	}
	return out
}
