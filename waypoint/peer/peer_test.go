package peer_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/peer"
)

var netips = cmpopts.EquateComparable(netip.AddrPort{})

// TestForwarded: a gateway that is trusted says where its client is, in every form of RFC 7239, 4 and 6; nobody else is heard.
func TestForwarded(t *testing.T) {
	t.Parallel()
	edge := mesh.Identity{TrustDomain: "cluster.local", Namespace: "edge", ServiceAccount: "gate"}
	at := netip.MustParseAddrPort("10.0.0.9:4000")
	f := peer.Finder{Network: "", Namespace: "shop", TrustDomain: "cluster.local", Trusted: map[mesh.Identity]bool{edge: true}}
	for header, want := range map[string]string{
		"":                                  "",
		"for=192.0.2.1":                     "192.0.2.1:0",
		`for="192.0.2.1:47011"`:             "192.0.2.1:47011",
		`For="[2001:db8::17]:4711";proto=x`: "[2001:db8::17]:4711",
		`by=x; for="[2001:db8::17]"`:        "[2001:db8::17]:0",
		"for=192.0.2.1, for=198.51.100.1":   "192.0.2.1:0",
		`for="[::ffff:192.0.2.1]:80"`:       "192.0.2.1:80",
		"for=unknown":                       "",
		"for=_hidden":                       "",
		"host=cart":                         "",
		`for=10.0.0.9`:                      "", // itself
	} {
		c := peer.Client{ID: edge, Addr: at}
		f.Identify(&mesh.Snapshot{}, &c, hbone.Header{Forwarded: header})
		expect := peer.Client{ID: edge, Addr: at}
		if want != "" {
			expect = peer.Client{ID: edge, Addr: netip.MustParseAddrPort(want), Gateway: &peer.Gateway{ID: edge, Addr: at}}
		}
		if diff := cmp.Diff(expect, c, netips); diff != "" {
			t.Errorf("Forwarded: %s (-want +got):\n%s", header, diff)
		}
		other := peer.Client{ID: mesh.Identity{TrustDomain: "cluster.local", Namespace: "edge", ServiceAccount: "other"}, Addr: at}
		before := other
		f.Identify(&mesh.Snapshot{}, &other, hbone.Header{Forwarded: header})
		if diff := cmp.Diff(before, other, netips); diff != "" {
			t.Errorf("Forwarded: %s, from one that is not trusted (-want +got):\n%s", header, diff)
		}
	}
}

// TestBaggage: who is of another network describes itself, by names only.
func TestBaggage(t *testing.T) {
	t.Parallel()
	f := peer.Finder{Network: "here", Namespace: "shop", TrustDomain: "cluster.local"}
	for baggage, want := range map[string]*peer.Description{
		"k8s.cluster.name=far,k8s.namespace.name=ns,k8s.deployment.name=d,service.name=s,service.version=v1;p=1": {
			Cluster: "far", Namespace: "ns", Workload: "d", Service: "s", Revision: "v1",
		},
		" k8s.cronjob.name = c , service.name=\"": {Workload: "c"},
		"":                       nil,
		"x":                      nil,
		"k8s.namespace.name=a b": nil,
		"service.name=\"}":       nil,
		"k8s.pod.name=" + strings.Repeat("a", 300):                   nil,
		"k8s.pod.name=a%0A":                                          nil,
		"service.name=s," + strings.Repeat("k8s.node.name=n,", 1000): nil, // too long to be of a ztunnel
	} {
		c := peer.Client{Addr: netip.MustParseAddrPort("10.0.0.9:4000")}
		f.Identify(&mesh.Snapshot{}, &c, hbone.Header{Baggage: baggage, ForwardedNetwork: "there"})
		if diff := cmp.Diff(want, c.Told); diff != "" {
			t.Errorf("baggage %.100q (-want +got):\n%s", baggage, diff)
		}
		c.Told = nil
		f.Identify(&mesh.Snapshot{}, &c, hbone.Header{Baggage: baggage, ForwardedNetwork: "HERE"})
		if c.Told != nil {
			t.Errorf("baggage %.100q of a client of this network describes %+v, want nothing", baggage, c.Told)
		}
	}
}
