package ztunnel

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

func workload(name string, policies ...string) *mesh.Workload {
	return &mesh.Workload{
		UID: "c//Pod/shop/" + name, Name: name, Namespace: "shop", TrustDomain: "cluster.local", ServiceAccount: name,
		ClusterID: "Kubernetes", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Protocol: mesh.ProtocolHBONE,
		Healthy: true, Capacity: 1, Policies: policies,
	}
}

func denyAll(name string, scope mesh.PolicyScope) *mesh.Policy {
	return &mesh.Policy{Namespace: "shop", Name: name, Scope: scope, Action: mesh.Deny, Groups: []mesh.Group{{
		Clauses: []mesh.Clause{{Matches: []mesh.Match{{NotPrincipals: []mesh.StringMatch{{Kind: mesh.MatchExact, Value: "x"}}}}}},
	}}}
}

func push(t *testing.T, s *state, ws []*mesh.Workload, ps []*mesh.Policy, removed ...string) {
	t.Helper()
	var addresses, policies []xds.Resource
	for _, w := range ws {
		b, err := wds.EncodeWorkload(w)
		if err != nil {
			t.Fatal(err)
		}
		addresses = append(addresses, xds.Resource{Name: w.UID, Body: b})
	}
	for _, p := range ps {
		b, err := wds.EncodePolicy(p)
		if err != nil {
			t.Fatal(err)
		}
		policies = append(policies, xds.Resource{Name: p.Key(), Body: b})
	}
	for _, u := range []xds.Update{
		{TypeURL: mesh.TypeAddress, Upserts: addresses}, {TypeURL: mesh.TypeAuthorization, Upserts: policies, Removes: removed},
	} {
		if rejected := s.apply(t.Context(), u); len(rejected) > 0 {
			t.Fatalf("apply rejected %v", rejected)
		}
	}
}

// inboundConn registers a connection to pod shop/name as the data path does.
func inboundConn(cs *conns, name string) (*conn, context.Context) {
	c := &conn{
		record: &record{start: time.Now(), inbound: true}, pod: podKey{"shop", name},
		request: authz.Request{
			Peer: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"},
			Src:  netip.MustParseAddrPort("10.0.0.2:4000"), Dst: netip.MustParseAddrPort("10.0.0.1:80"),
		},
	}
	return c, cs.track(context.Background(), c)
}

func TestAPolicyChangeEndsTheConnectionsItForbids(t *testing.T) {
	cs, s := newConns(), newState(zap.NewNop())
	s.changed = cs.recheck
	push(t, s, []*mesh.Workload{workload("cart"), workload("stock")}, nil)
	_, cart := inboundConn(cs, "cart")
	push(t, s, nil, []*mesh.Policy{denyAll("stop", mesh.ScopeWorkload)})
	if cart.Err() != nil {
		t.Fatal("a policy that selects no workload ended a connection")
	}
	push(t, s, []*mesh.Workload{workload("cart", "shop/stop")}, nil)
	if !errors.Is(context.Cause(cart), errPolicyChanged) {
		t.Fatalf("cause = %v, want policy changed", context.Cause(cart))
	}
	if cause := context.Cause(cart).Error(); !strings.Contains(cause, "shop/stop") {
		t.Errorf("cause %q does not name the policy", cause)
	}
	_, stock := inboundConn(cs, "stock")
	push(t, s, nil, []*mesh.Policy{denyAll("all", mesh.ScopeNamespace)})
	if stock.Err() == nil {
		t.Error("a namespace's DENY left a connection alive")
	}
}

func TestAMissingPolicyIsWaitedForThenDenies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cs, s := newConns(), newState(zap.NewNop())
		s.changed = cs.recheck
		push(t, s, []*mesh.Workload{workload("cart")}, nil)
		established, established1 := inboundConn(cs, "cart")
		push(t, s, []*mesh.Workload{workload("cart", "shop/later")}, nil)
		if established1.Err() != nil {
			t.Error("a policy that has not arrived ended a live connection")
		}
		ctx, cancel := context.WithTimeout(t.Context(), workloadWait)
		defer cancel()
		err := s.authorize(ctx, established)
		var missing *missingPolicyError
		if !errors.As(err, &missing) || !strings.Contains(err.Error(), "shop/later") {
			t.Errorf("authorize = %v, want the missing policy named", err)
		}
		c, _ := inboundConn(cs, "cart")
		result := make(chan error, 1)
		go func() { result <- s.authorize(context.WithoutCancel(t.Context()), c) }()
		synctest.Wait()
		push(t, s, nil, []*mesh.Policy{{Namespace: "shop", Name: "later", Scope: mesh.ScopeWorkload, Action: mesh.Deny}})
		if err := <-result; err != nil {
			t.Errorf("authorize after the policy came = %v, want nil: it denies nobody", err)
		}
	})
}

func TestAnUndecodablePolicyDenies(t *testing.T) {
	cs, s := newConns(), newState(zap.NewNop())
	s.changed = cs.recheck
	push(t, s, []*mesh.Workload{workload("cart")}, nil)
	_, ctx := inboundConn(cs, "cart")
	rejected := s.apply(t.Context(), xds.Update{
		TypeURL: mesh.TypeAuthorization, Upserts: []xds.Resource{{Name: "shop/broken", Body: []byte{0xff}}},
	})
	if len(rejected) != 1 || rejected[0].Name != "shop/broken" {
		t.Fatalf("rejected = %v, want shop/broken", rejected)
	}
	if ctx.Err() == nil {
		t.Error("a policy that cannot be read let a connection live")
	}
	c, _ := inboundConn(cs, "cart")
	var denied *deniedError
	if err := s.authorize(t.Context(), c); !errors.As(err, &denied) {
		t.Errorf("authorize = %v, want denied", err)
	}
}

func TestCompiledPoliciesAreSharedUntilPoliciesChange(t *testing.T) {
	s := newState(zap.NewNop())
	push(t, s, []*mesh.Workload{workload("cart")}, []*mesh.Policy{denyAll("all", mesh.ScopeNamespace)})
	w := s.load().Pod("shop", "cart")
	before, _ := s.load().policies(w)
	push(t, s, []*mesh.Workload{workload("other")}, nil)
	if after, _ := s.load().policies(w); after != before {
		t.Error("a workload update compiled the policies again")
	}
	push(t, s, nil, nil, "shop/all")
	if after, _ := s.load().policies(w); after == before {
		t.Error("a removed policy is still compiled in")
	}
}

// TestANodeProxyKeepsNoLabels: they are for waypoints, and would cost every node memory.
func TestANodeProxyKeepsNoLabels(t *testing.T) {
	s := newState(zap.NewNop())
	w := workload("cart")
	w.Labels = map[string]string{"app": "cart", "pod-template-hash": "7d4b9c"}
	push(t, s, []*mesh.Workload{w}, nil)
	if got := s.load().Workload(w.UID); got == nil || got.Labels != nil {
		t.Errorf("the workload is %+v, want it without labels", got)
	}
}
