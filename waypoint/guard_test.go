package waypoint_test

import (
	"net/http"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

// policy publishes a policy for waypoints that matches requests for these paths.
func (l *lab) policy(name string, action mesh.PolicyAction, paths ...mesh.StringMatch) {
	l.t.Helper()
	body, err := wds.EncodePolicy(&mesh.Policy{
		Namespace: "shop", Name: name, Scope: mesh.ScopeWorkload, Action: action,
		Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{Operation: &mesh.Operation{Paths: paths}}}}}}},
	})
	if err != nil {
		l.t.Fatal(err)
	}
	l.publish(mesh.TypeAuthorization, xds.Resource{Name: "shop/" + name, Body: body})
}

// guarded publishes a service again, as the target of these policies.
func (l *lab) guarded(svc *mesh.Service, policies ...string) {
	l.t.Helper()
	svc.Policies = policies
	body, err := wds.EncodeService(svc)
	if err != nil {
		l.t.Fatal(err)
	}
	l.publish(mesh.TypeAddress, xds.Resource{Name: svc.Key(), Body: body})
}

// gate publishes the waypoint's own pod again, as the target of these policies.
func (l *lab) gate(policies ...string) {
	l.t.Helper()
	l.workloads(&mesh.Workload{UID: "Kubernetes//Pod/shop/gate-1", Name: "gate-1", Namespace: "shop", Addrs: addrs(l.ip),
		ServiceAccount: "gate", TargetPolicies: policies})
}

// becomes waits for a path of a service to be answered with a status.
func (l *lab) becomes(why, url string, status int) {
	l.t.Helper()
	l.eventually(why, func() bool {
		resp, _ := l.get(url)
		return resp.StatusCode == status
	})
}

// TestPoliciesOfTheServiceGovern it and no other, together with the waypoint's own: all are one set.
func TestPoliciesOfTheServiceGovern(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	cart := l.service("cart", "10.96.0.1", mesh.AppHTTP1, named(t, "cart"))
	l.service("other", "10.96.0.2", mesh.AppHTTP1, named(t, "other"))
	l.known("cart", "other")
	prefix := func(v string) mesh.StringMatch { return mesh.StringMatch{Kind: mesh.MatchPrefix, Value: v} }

	l.becomes("open without policies", "http://10.96.0.1/admin/x", http.StatusOK)
	l.guarded(cart, "shop/no-admin")
	l.becomes("closed while its policy is not known", "http://10.96.0.1/x", http.StatusForbidden)
	l.becomes("another service stays open", "http://10.96.0.2/x", http.StatusOK)
	l.policy("no-admin", mesh.Deny, prefix("/admin/"), mesh.StringMatch{Kind: mesh.MatchTemplate, Value: "/users/{*}/secret"})
	l.becomes("open once it is known", "http://10.96.0.1/x", http.StatusOK)
	l.becomes("denied by prefix", "http://10.96.0.1/admin/x", http.StatusForbidden)
	l.becomes("denied by template", "http://10.96.0.1/users/7/secret", http.StatusForbidden)
	l.becomes("not denied by template", "http://10.96.0.1/users/7/name", http.StatusOK)
	l.becomes("another service has no such policy", "http://10.96.0.2/admin/x", http.StatusOK)

	l.policy("all-read", mesh.Allow, prefix("/read"))
	l.gate("shop/all-read")
	l.becomes("the waypoint's ALLOW holds for all", "http://10.96.0.2/x", http.StatusForbidden)
	l.becomes("and lets in what it matches", "http://10.96.0.2/read/x", http.StatusOK)
	l.policy("cart-write", mesh.Allow, prefix("/write"))
	l.guarded(cart, "shop/no-admin", "shop/cart-write")
	l.becomes("either ALLOW lets in: the service's", "http://10.96.0.1/write", http.StatusOK)
	l.becomes("either ALLOW lets in: the waypoint's", "http://10.96.0.1/read", http.StatusOK)
	l.becomes("what neither matches is denied", "http://10.96.0.1/x", http.StatusForbidden)
	l.becomes("one service's ALLOW is none of another's", "http://10.96.0.2/write", http.StatusForbidden)

	// A policy is gone before the service ceases to name it: what it said holds so long.
	l.istiod.Publish(mesh.TypeAuthorization, nil, []string{"shop/no-admin"})
	l.policy("cart-write", mesh.Allow, prefix("/write"), prefix("/x"), prefix("/admin"))
	l.becomes("the other policy of the service changed", "http://10.96.0.1/x", http.StatusOK)
	if resp, _ := l.get("http://10.96.0.1/admin/x"); resp.StatusCode != http.StatusForbidden {
		t.Errorf("GET /admin/x while its policy is gone and still named = %d, want 403", resp.StatusCode)
	}
	l.guarded(cart, "shop/cart-write")
	l.becomes("open once nothing names it", "http://10.96.0.1/admin/x", http.StatusOK)
	l.gate()
	l.guarded(cart)
	l.becomes("all open again", "http://10.96.0.1/y", http.StatusOK)
}
