package wds_test

import (
	"encoding/hex"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
)

// same compares nouns: netip values by ==, and no list with an empty one.
var same = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmpopts.EquateEmpty(),
}

func TestWorkloadsSurviveTheWire(t *testing.T) {
	t.Parallel()
	g := gen{rand.New(rand.NewPCG(1, 2))}
	for range 500 {
		want := g.workload()
		body, err := wds.EncodeWorkload(want)
		if err != nil {
			t.Fatalf("EncodeWorkload(%+v) = %v", want, err)
		}
		got, err := wds.DecodeAddress(body)
		if err != nil {
			t.Fatalf("DecodeAddress() = %v of %+v", err, want)
		}
		if diff := cmp.Diff(mesh.Address{Workload: want}, got, same); diff != "" {
			t.Fatalf("workload came back different (-want +got):\n%s", diff)
		}
		again, err := wds.EncodeWorkload(got.Workload)
		if err != nil || !slices.Equal(body, again) {
			t.Fatalf("EncodeWorkload of an equal workload gave other bytes (%v)", err)
		}
	}
}

func TestServicesSurviveTheWire(t *testing.T) {
	t.Parallel()
	g := gen{rand.New(rand.NewPCG(3, 4))}
	for range 500 {
		want := g.service()
		body, err := wds.EncodeService(want)
		if err != nil {
			t.Fatalf("EncodeService(%+v) = %v", want, err)
		}
		got, err := wds.DecodeAddress(body)
		if err != nil {
			t.Fatalf("DecodeAddress() = %v of %+v", err, want)
		}
		if diff := cmp.Diff(mesh.Address{Service: want}, got, same); diff != "" {
			t.Fatalf("service came back different (-want +got):\n%s", diff)
		}
	}
}

func TestPoliciesSurviveTheWire(t *testing.T) {
	t.Parallel()
	g := gen{rand.New(rand.NewPCG(5, 6))}
	for range 500 {
		want := g.policy()
		body, err := wds.EncodePolicy(want)
		if err != nil {
			t.Fatalf("EncodePolicy(%+v) = %v", want, err)
		}
		got, err := wds.DecodePolicy(body)
		if err != nil {
			t.Fatalf("DecodePolicy() = %v of %+v", err, want)
		}
		if diff := cmp.Diff(want, got, same); diff != "" {
			t.Fatalf("policy came back different (-want +got):\n%s", diff)
		}
	}
}

// The bytes below were laid out by hand from the field numbers and types of the messages. What is in a oneof comes after
// the fields beside it.
func TestGoldenBytes(t *testing.T) {
	t.Parallel()
	gateway := mesh.GatewayAddress{Namespace: "n", Hostname: "w", Port: 15008}
	for _, tc := range []struct {
		name string
		got  func() ([]byte, error)
		want string
	}{
		{
			name: "a workload of defaults is its uid",
			got: func() ([]byte, error) {
				return wds.EncodeWorkload(&mesh.Workload{
					UID: "u", TrustDomain: "cluster.local", ServiceAccount: "default", ClusterID: "Kubernetes",
					Healthy: true, Capacity: 1,
				})
			},
			want: "0a 04 a201 01 75",
		},
		{
			name: "a workload of everything else",
			got: func() ([]byte, error) {
				return wds.EncodeWorkload(&mesh.Workload{
					UID: "u", Name: "p", Namespace: "n", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
					Network: "x", Hostname: "h", TrustDomain: "t", ServiceAccount: "s",
					Protocol: mesh.ProtocolHBONE, NativeTunnel: true, AppTunnel: mesh.AppTunnel{Proxy: true, Port: 5},
					Waypoint: gateway, Node: "o", ClusterID: "c", Locality: mesh.Locality{Region: "r", Zone: "z", Subzone: "b"},
					HostNetwork: true, Capacity: 0, CanonicalName: "a", CanonicalRevision: "v", Kind: mesh.KindPod,
					OwnerName: "d", Policies: []string{"n/p"},
					Services: []mesh.ServicePorts{{Service: "n/h", Ports: []mesh.Port{
						{ServicePort: 80, TargetPort: 8080, App: mesh.AppHTTP2},
					}}},
				})
			},
			want: "0a 75" +
				"0a 01 70" + "12 01 6e" + "1a 04 0a000001" + "22 01 78" + "28 01" + "32 01 74" + "3a 01 73" +
				"42 0b 18 a075 0a 06 0a016e 120177" + "4a 01 6f" + "52 01 61" + "5a 01 76" + "60 02" + "6a 01 64" +
				"70 01" + "8201 03 6e2f70" + "8801 01" + "9201 01 63" + "a201 01 75" + "aa01 01 68" +
				"b201 10 0a 03 6e2f68 12 09 0a 07 08 50 10 903f 18 02" + "ba01 04 0801 1005" +
				"c201 09 0a0172 12017a 1a0162" + "c801 01" + "da01 00",
		},
		{
			name: "a service",
			got: func() ([]byte, error) {
				return wds.EncodeService(&mesh.Service{
					Name: "s", Namespace: "n", Hostname: "h",
					VIPs: []mesh.VIP{
						{Network: "x", Prefix: netip.MustParsePrefix("10.0.0.1/32")},
						{Prefix: netip.MustParsePrefix("10.1.0.0/16")},
					},
					Ports: []mesh.Port{{ServicePort: 80}},
					SANs:  []mesh.Identity{{TrustDomain: "t", Namespace: "n", ServiceAccount: "s"}},
					Waypoint: mesh.GatewayAddress{
						Addr: mesh.NetworkAddr{Network: "x", Addr: netip.MustParseAddr("10.0.0.2")}, Port: 1,
					},
					WeightedWaypoints: []mesh.WeightedGateway{{Gateway: gateway, Weight: 9}},
					LB: mesh.LoadBalancing{
						Mode: mesh.LBFailover, Preference: []mesh.LBScope{mesh.ScopeNetwork, mesh.ScopeRegion}, AllowUnready: true, Sticky: true,
					},
					Families: mesh.FamiliesDual, Canonical: true, IngressUseWaypoint: true, NamespaceOnly: true, Policies: []string{"n/p"},
				})
			},
			want: "12 e101" +
				"0a0173 12016e 1a0168" + "22 09 0a0178 12040a000001" + "22 08 12040a010000 1810" + "2a 02 0850" +
				"32 14 " + hex.EncodeToString([]byte("spiffe://t/ns/n/sa/s")) +
				"3a 0d 1801 1209 0a0178 12040a000002" + "42 08 0a020601 1002 1801" + "48 03" + "52 24 0a 22" + hex.EncodeToString([]byte("mistnet.io/session-affinity-client")) +
				"52 4f 0a 13" + hex.EncodeToString([]byte("mistnet.io/policies")) + "12 38" +
				"0a 2d" + hex.EncodeToString([]byte("type.googleapis.com/google.protobuf.ListValue")) + "12 07 0a 05 1a 03 6e2f70" +
				"58 01" + "60 01" +
				"6a 0f 0a0b 18a075 0a06 0a016e 120177 1009" + "70 01",
		},
		{
			name: "a policy",
			got: func() ([]byte, error) {
				return wds.EncodePolicy(&mesh.Policy{
					Namespace: "n", Name: "p", Scope: mesh.ScopeWorkload, Action: mesh.Deny, DryRun: true,
					Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{
						Namespaces:         []mesh.StringMatch{{Kind: mesh.MatchExact, Value: "a"}},
						NotNamespaces:      []mesh.StringMatch{{Kind: mesh.MatchPrefix, Value: "b"}},
						Principals:         []mesh.StringMatch{{Kind: mesh.MatchSuffix, Value: "c"}},
						NotPrincipals:      []mesh.StringMatch{{Kind: mesh.MatchPresence}},
						SourceIPs:          []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
						NotSourceIPs:       []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")},
						DestinationIPs:     []netip.Prefix{netip.MustParsePrefix("fd00::/8")},
						NotDestinationIPs:  []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32")},
						DestinationPorts:   []uint16{80, 8080},
						NotDestPorts:       []uint16{1},
						ServiceAccounts:    []mesh.ServiceAccount{{Namespace: "d", Name: "e"}},
						NotServiceAccounts: []mesh.ServiceAccount{{Name: "f"}},
					}}}}}},
				})
			},
			want: "0a0170 12016e 1802 2001" + "2a 5e 0a 5c 12 5a" +
				"0a03 0a0161" + "1203 120162" + "1a03 1a0163" + "2202 2200" + "2a08 0a040a000000 1008" +
				"3206 0a0400000000" + "3a14 0a10 fd000000000000000000000000000000 1008" + "4208 0a040a000001 1020" +
				"4a03 50 903f" + "5201 01" + "5a06 0a0164 120165" + "6203 120166" + "3001",
		},
		{
			name: "a policy for waypoints",
			got: func() ([]byte, error) {
				exact := func(v string) []mesh.StringMatch { return []mesh.StringMatch{{Kind: mesh.MatchExact, Value: v}} }
				return wds.EncodePolicy(&mesh.Policy{
					Namespace: "n", Name: "p", Scope: mesh.ScopeWorkload,
					Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{Operation: &mesh.Operation{
						Hosts: exact("a"), NotHosts: exact("b"), Methods: exact("c"), NotMethods: exact("d"),
						Paths: []mesh.StringMatch{{Kind: mesh.MatchTemplate, Value: "/{*}"}}, NotPaths: exact("f"),
						Headers: []mesh.HeaderCondition{{Name: "x", Values: exact("g"), NotValues: exact("h")}},
					}}}}}}},
				})
			},
			want: "0a0170 12016e 1802" + "2a 38 0a 36 12 34" + "ca3e 31" +
				"0a03 0a0161" + "1203 0a0162" + "1a03 0a0163" + "2203 0a0164" + "2a07 ca3e 04 2f7b2a7d" + "3203 0a0166" +
				"3a0d 0a0178 1203 0a0167 1a03 0a0168",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			got, err := tc.got()
			if err != nil {
				t.Fatal(err)
			}
			if want := strings.ReplaceAll(tc.want, " ", ""); hex.EncodeToString(got) != want {
				t.Errorf("encoded\n%x, want\n%s", got, want)
			}
		})
	}
}

func TestNounsThatCannotBeSentAreRefused(t *testing.T) {
	t.Parallel()
	_, err := wds.EncodeWorkload(&mesh.Workload{
		Addrs: []netip.Addr{{}}, Waypoint: mesh.GatewayAddress{Port: 1},
		Services: []mesh.ServicePorts{{Service: "a/b"}, {Service: "a/b"}},
	})
	wantFields(t, err, "uid", "addresses[0]", "waypoint", `services["a/b"]`)
	_, err = wds.EncodeService(&mesh.Service{
		VIPs: []mesh.VIP{{}}, Waypoint: mesh.GatewayAddress{Port: 1}, WeightedWaypoints: []mesh.WeightedGateway{{}},
	})
	wantFields(t, err, "hostname", "addresses[0]", "waypoint", "weighted_waypoints[0]")
	_, err = wds.EncodePolicy(&mesh.Policy{Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{
		Principals: []mesh.StringMatch{{}}, SourceIPs: []netip.Prefix{{}},
		Operation: &mesh.Operation{Methods: []mesh.StringMatch{{}}, Headers: []mesh.HeaderCondition{{Name: "x"}, {Name: "y", NotValues: []mesh.StringMatch{{}}}}},
	}}}}}}})
	wantFields(t, err, "name, namespace", "matches[0].principals[0]", "source_ips[0]", "matches[0].operation.methods[0]",
		"operation.headers[0]: without", "operation.headers[1].not_values[0]")
	_, err = wds.EncodePolicy(&mesh.Policy{Namespace: "n", Name: "p", Invalid: "because"})
	wantFields(t, err, "is invalid: because")
}

func TestAliases(t *testing.T) {
	t.Parallel()
	w := &mesh.Workload{Network: "x", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}}
	if diff := cmp.Diff([]string{"x/10.0.0.1", "x/fd00::1"}, wds.WorkloadAliases(w)); diff != "" {
		t.Errorf("WorkloadAliases (-want +got):\n%s", diff)
	}
	w.HostNetwork = true
	if got := wds.WorkloadAliases(w); len(got) != 0 {
		t.Errorf("WorkloadAliases of a host-network workload = %q, want none", got)
	}
	s := &mesh.Service{VIPs: []mesh.VIP{
		{Prefix: netip.MustParsePrefix("10.9.0.1/32")}, {Network: "x", Prefix: netip.MustParsePrefix("10.8.0.0/16")},
	}}
	if diff := cmp.Diff([]string{"/10.9.0.1", "x/10.8.0.0/16"}, wds.ServiceAliases(s)); diff != "" {
		t.Errorf("ServiceAliases (-want +got):\n%s", diff)
	}
}

func wantFields(t *testing.T, err error, fields ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want one about %q", fields)
		return
	}
	for _, f := range fields {
		if !strings.Contains(err.Error(), f) {
			t.Errorf("error %q does not name %q", err, f)
		}
	}
}

// gen makes random nouns that the wire can carry.
type gen struct{ *rand.Rand }

func (g gen) name() string  { return "n" + strconv.Itoa(g.IntN(50)) }
func (g gen) maybe() string { return []string{"", g.name()}[g.IntN(2)] }
func (g gen) flag() bool    { return g.IntN(2) == 0 }
func (g gen) app() mesh.AppProtocol {
	return []mesh.AppProtocol{mesh.AppUnknown, mesh.AppHTTP1, mesh.AppHTTP2, mesh.AppGRPC, mesh.AppTCP, mesh.AppTLS, mesh.AppGRPCWeb}[g.IntN(7)]
}
func (g gen) port() uint16 { return uint16(g.IntN(1 << 16)) }

func (g gen) or(byDefault string) string { return []string{byDefault, g.name()}[g.IntN(2)] }

func (g gen) addr() netip.Addr {
	var b [16]byte
	for i := range b {
		b[i] = byte(g.IntN(256))
	}
	if g.flag() {
		return netip.AddrFrom4([4]byte(b[:4]))
	}
	b[0] = 0xfd
	return netip.AddrFrom16(b)
}

func (g gen) prefix() netip.Prefix {
	a := g.addr()
	return netip.PrefixFrom(a, g.IntN(a.BitLen()+1)).Masked()
}

func some[T any](g gen, most int, one func() T) []T {
	list := make([]T, 0, most)
	for range g.IntN(most + 1) {
		list = append(list, one())
	}
	return list
}

func (g gen) gateway() mesh.GatewayAddress {
	switch g.IntN(3) {
	case 0:
		return mesh.GatewayAddress{Namespace: g.maybe(), Hostname: g.name(), Port: g.port()}
	case 1:
		return mesh.GatewayAddress{Addr: mesh.NetworkAddr{Network: g.maybe(), Addr: g.addr()}, Port: g.port()}
	}
	return mesh.GatewayAddress{}
}

func (g gen) ports() []mesh.Port {
	return some(g, 3, func() mesh.Port {
		return mesh.Port{ServicePort: g.port(), TargetPort: g.port(), App: g.app()}
	})
}

func (g gen) workload() *mesh.Workload {
	w := &mesh.Workload{
		UID: g.name(), Name: g.maybe(), Namespace: g.maybe(), Addrs: some(g, 3, g.addr), Network: g.maybe(),
		Hostname: g.maybe(), TrustDomain: g.or("cluster.local"), ServiceAccount: g.or("default"),
		ClusterID: g.or("Kubernetes"), Protocol: mesh.TunnelProtocol(g.IntN(2)), NativeTunnel: g.flag(),
		Waypoint: g.gateway(), NetworkGateway: g.gateway(), Node: g.maybe(),
		Locality:    mesh.Locality{Region: g.maybe(), Zone: g.maybe(), Subzone: g.maybe()},
		HostNetwork: g.flag(), Healthy: g.flag(), Capacity: g.Uint32N(3), CanonicalName: g.maybe(),
		CanonicalRevision: g.maybe(), Kind: mesh.WorkloadKind(g.IntN(4)), OwnerName: g.maybe(), Policies: some(g, 3, g.name),
		TargetPolicies: some(g, 2, g.name),
	}
	if g.flag() {
		w.AppTunnel = mesh.AppTunnel{Proxy: g.flag(), Port: g.port()}
	}
	for range g.IntN(4) {
		if w.Labels == nil {
			w.Labels = make(map[string]string)
		}
		w.Labels[g.name()] = g.maybe()
	}
	for _, key := range []string{"a/x", "b/y", "c/z"} {
		if g.flag() {
			w.Services = append(w.Services, mesh.ServicePorts{Service: key, Ports: g.ports()})
		}
	}
	return w
}

func (g gen) service() *mesh.Service {
	return &mesh.Service{
		Name: g.maybe(), Namespace: g.maybe(), Hostname: g.name(), Ports: g.ports(), Waypoint: g.gateway(),
		VIPs: some(g, 3, func() mesh.VIP { return mesh.VIP{Network: g.maybe(), Prefix: g.prefix()} }),
		SANs: some(g, 2, func() mesh.Identity {
			return mesh.Identity{TrustDomain: g.name(), Namespace: g.name(), ServiceAccount: g.name()}
		}),
		WeightedWaypoints: some(g, 2, func() mesh.WeightedGateway {
			return mesh.WeightedGateway{Gateway: mesh.GatewayAddress{Hostname: g.name(), Port: g.port()}, Weight: g.Uint32N(100)}
		}),
		Policies: some(g, 2, g.name), IngressUseWaypoint: g.flag(), Families: mesh.IPFamilies(g.IntN(4)), Canonical: g.flag(), NamespaceOnly: g.flag(),
		LB: mesh.LoadBalancing{
			Mode: mesh.LBMode(g.IntN(4)), AllowUnready: g.flag(), Sticky: g.flag(),
			Preference: some(g, 3, func() mesh.LBScope { return mesh.LBScope(g.IntN(7)) }),
		},
	}
}

// operation is nil when it asks for nothing.
func (g gen) operation(match func() mesh.StringMatch) *mesh.Operation {
	o := &mesh.Operation{
		Hosts: some(g, 2, match), NotHosts: some(g, 2, match), Methods: some(g, 2, match), NotMethods: some(g, 2, match),
		Paths: some(g, 2, match), NotPaths: some(g, 2, match),
		Headers: some(g, 2, func() mesh.HeaderCondition {
			h := mesh.HeaderCondition{Name: g.name(), Values: some(g, 2, match), NotValues: some(g, 2, match)}
			if len(h.Values)+len(h.NotValues) == 0 {
				h.Values = []mesh.StringMatch{match()}
			}
			return h
		}),
	}
	if o.IsZero() {
		return nil
	}
	return o
}

func (g gen) policy() *mesh.Policy {
	match := func() mesh.StringMatch {
		m := mesh.StringMatch{Kind: mesh.MatchExact + mesh.MatchKind(g.IntN(5))}
		if m.Kind != mesh.MatchPresence {
			m.Value = g.maybe()
		}
		return m
	}
	account := func() mesh.ServiceAccount { return mesh.ServiceAccount{Namespace: g.maybe(), Name: g.name()} }
	return &mesh.Policy{
		Namespace: g.name(), Name: g.name(), Scope: mesh.PolicyScope(g.IntN(3)), Action: mesh.PolicyAction(g.IntN(2)),
		DryRun: g.flag(),
		Groups: some(g, 2, func() mesh.Group {
			return mesh.Group{Clauses: some(g, 2, func() mesh.Clause {
				return mesh.Clause{Matches: some(g, 2, func() mesh.Match {
					return mesh.Match{
						Namespaces: some(g, 2, match), NotNamespaces: some(g, 2, match), Principals: some(g, 2, match),
						NotPrincipals: some(g, 2, match), SourceIPs: some(g, 2, g.prefix), NotSourceIPs: some(g, 2, g.prefix),
						DestinationIPs: some(g, 2, g.prefix), NotDestinationIPs: some(g, 2, g.prefix),
						DestinationPorts: some(g, 2, g.port), NotDestPorts: some(g, 2, g.port),
						ServiceAccounts: some(g, 2, account), NotServiceAccounts: some(g, 2, account), Operation: g.operation(match),
					}
				})}
			})}
		}),
	}
}
