package mesh_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/mesh"
)

func TestTrafficPolicyFor(t *testing.T) {
	t.Parallel()
	balancer := func(a mesh.BalancerAlgorithm) *mesh.Balancer { return &mesh.Balancer{Algorithm: a} }
	pool := func(n uint32) *mesh.ConnectionPool { return &mesh.ConnectionPool{MaxConnections: n} }
	p := &mesh.TrafficPolicy{
		Settings: mesh.TrafficSettings{Balancer: balancer(mesh.BalancerRandom), Pool: pool(1), ProxyProtocol: mesh.ProxyProtocolV2},
		Ports:    []mesh.PortSettings{{Port: 80, Settings: mesh.TrafficSettings{Pool: pool(80)}}},
		Subsets: []mesh.Subset{
			{Name: "v1"},
			{
				Name: "v2", Settings: mesh.TrafficSettings{Balancer: balancer(mesh.BalancerRoundRobin)},
				Ports: []mesh.PortSettings{{Port: 90, Settings: mesh.TrafficSettings{Pool: pool(90)}}},
			},
		},
	}
	for name, tc := range map[string]struct {
		policy *mesh.TrafficPolicy
		subset string
		port   uint16
		want   mesh.TrafficSettings
		lost   bool
	}{
		"no policy is the default":     {policy: nil, port: 80},
		"without a policy, no subsets": {policy: nil, subset: "v1", lost: true},
		"an unknown subset":            {policy: p, subset: "v3", lost: true},
		"the service":                  {policy: p, port: 81, want: p.Settings},
		"a port replaces, and what it leaves out is the default again": {
			policy: p, port: 80, want: mesh.TrafficSettings{Pool: pool(80), ProxyProtocol: mesh.ProxyProtocolV2},
		},
		"a subset without settings is the service": {policy: p, subset: "v1", port: 81, want: p.Settings},
		"a subset replaces what it has": {
			policy: p, subset: "v2", port: 81,
			want: mesh.TrafficSettings{Balancer: balancer(mesh.BalancerRoundRobin), Pool: pool(1), ProxyProtocol: mesh.ProxyProtocolV2},
		},
		"a subset replaces what the port of the service left": {
			policy: p, subset: "v2", port: 80,
			want: mesh.TrafficSettings{Balancer: balancer(mesh.BalancerRoundRobin), Pool: pool(80), ProxyProtocol: mesh.ProxyProtocolV2},
		},
		"the port of a subset has the last word": {
			policy: p, subset: "v2", port: 90, want: mesh.TrafficSettings{Pool: pool(90), ProxyProtocol: mesh.ProxyProtocolV2},
		},
	} {
		got, ok := tc.policy.For(tc.subset, tc.port)
		if ok == tc.lost {
			t.Errorf("%s: For(%q, %d) found it: %v", name, tc.subset, tc.port, ok)
		}
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("%s: For(%q, %d) (-want +got):\n%s", name, tc.subset, tc.port, diff)
		}
	}
}

func TestIdleTimeoutIsAnHourUnlessSaid(t *testing.T) {
	t.Parallel()
	never, minute := time.Duration(0), time.Minute
	for _, c := range []struct {
		pool *mesh.ConnectionPool
		want time.Duration
	}{
		{nil, time.Hour},
		{&mesh.ConnectionPool{}, time.Hour},
		{&mesh.ConnectionPool{TCPIdleTimeout: &minute}, time.Minute},
		{&mesh.ConnectionPool{TCPIdleTimeout: &never}, 0},
	} {
		if got := c.pool.IdleTimeout(); got != c.want {
			t.Errorf("%+v: %v, want %v", c.pool, got, c.want)
		}
	}
}
