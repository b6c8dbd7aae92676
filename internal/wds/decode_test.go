package wds_test

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/api/security"
	"github.com/mistnet/mistnet/api/workload"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
)

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	body, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func workloadBytes(t testing.TB, w *workload.Workload) []byte {
	return marshal(t, &workload.Address{Type: &workload.Address_Workload{Workload: w}})
}

func serviceBytes(t testing.TB, s *workload.Service) []byte {
	return marshal(t, &workload.Address{Type: &workload.Address_Service{Service: s}})
}

func keys(t testing.TB, keys ...string) *anypb.Any {
	list := &structpb.ListValue{}
	for _, k := range keys {
		list.Values = append(list.Values, structpb.NewStringValue(k))
	}
	config, err := anypb.New(list)
	if err != nil {
		t.Fatal(err)
	}
	return config
}

func gatewayAt(address []byte, length *uint32, port uint32) *workload.GatewayAddress {
	return &workload.GatewayAddress{
		Destination:   &workload.GatewayAddress_Address{Address: &workload.NetworkAddress{Address: address, Length: length}},
		HboneMtlsPort: port,
	}
}

func TestBadAddressesAreRefusedByField(t *testing.T) {
	t.Parallel()
	ip := []byte{10, 0, 0, 1}
	ports := []*workload.Port{{ServicePort: 80, TargetPort: 65536}}
	for name, tc := range map[string]struct {
		body   []byte
		fields []string
	}{
		"not protobuf":  {[]byte{0xff}, []string{"decode address"}},
		"empty":         {nil, []string{"neither a workload nor a service"}},
		"without a uid": {workloadBytes(t, &workload.Workload{}), []string{"uid"}},
		"legacy mTLS": {
			workloadBytes(t, &workload.Workload{Uid: "u", TunnelProtocol: workload.TunnelProtocol_LEGACY_ISTIO_MTLS}),
			[]string{`"u"`, "tunnel_protocol: LEGACY_ISTIO_MTLS"},
		},
		"unknown enumerations of a workload": {
			workloadBytes(t, &workload.Workload{Uid: "u", TunnelProtocol: 9, NetworkMode: 9, Status: 9}),
			[]string{"tunnel_protocol: unknown value 9", "network_mode", "status"},
		},
		"addresses of a wrong length": {
			workloadBytes(t, &workload.Workload{Uid: "u", Addresses: [][]byte{ip, {1, 2, 3}, make([]byte, 17), {}}}),
			[]string{"addresses[1]: 3 bytes, want 4 or 16", "addresses[2]: 17", "addresses[3]: 0"},
		},
		"workload ports out of range": {
			workloadBytes(t, &workload.Workload{
				Uid: "u", Services: map[string]*workload.PortList{"n/h": {Ports: ports}},
				ApplicationTunnel: &workload.ApplicationTunnel{Port: 1 << 16}, Waypoint: gatewayAt(ip, nil, 70000),
			}),
			[]string{`services["n/h"].ports[0].target_port: 65536`, "application_tunnel: port", "waypoint: hbone_mtls_port: 70000"},
		},
		"an unknown application tunnel": {
			workloadBytes(t, &workload.Workload{Uid: "u", ApplicationTunnel: &workload.ApplicationTunnel{Protocol: 7}}),
			[]string{"application_tunnel: protocol"},
		},
		"gateways that lead nowhere": {
			workloadBytes(t, &workload.Workload{
				Uid: "u", Waypoint: &workload.GatewayAddress{}, NetworkGateway: gatewayAt([]byte{1}, nil, 1),
			}),
			[]string{"waypoint: no destination", "network_gateway: address: 1 bytes"},
		},
		"a waypoint with an empty hostname": {
			workloadBytes(t, &workload.Workload{Uid: "u", Waypoint: &workload.GatewayAddress{
				Destination: &workload.GatewayAddress_Hostname{Hostname: &workload.NamespacedHostname{}},
			}}),
			[]string{"waypoint: hostname: is empty"},
		},
		"a waypoint that is a range": {
			workloadBytes(t, &workload.Workload{Uid: "u", Waypoint: gatewayAt(ip, proto.Uint32(8), 1)}),
			[]string{"waypoint: address: 10.0.0.0/8 is a range"},
		},
		"a workload that is an endpoint of nothing": {
			workloadBytes(t, &workload.Workload{Uid: "u", Services: map[string]*workload.PortList{"": {}}}),
			[]string{"services: empty key"},
		},
		"a service in all ways wrong": {
			serviceBytes(t, &workload.Service{
				Addresses: []*workload.NetworkAddress{{Address: []byte{1}}, {Address: ip, Length: proto.Uint32(33)}},
				Ports:     []*workload.Port{{ServicePort: 65536}}, IpFamilies: 4, Visibility: 2,
				Waypoint: &workload.GatewayAddress{}, WeightedWaypoints: []*workload.WeightedWaypoint{{}},
				LoadBalancing: &workload.LoadBalancing{Mode: 4},
			}),
			[]string{
				"hostname", "addresses[0]: 1 bytes", "addresses[1]: length 33 of a 32-bit address",
				"ports[0].service_port: 65536", "ip_families", "visibility", "waypoint: no destination",
				"weighted_waypoints[0]: no destination", "load_balancing.mode",
			},
		},
		"an unknown scope": {
			serviceBytes(t, &workload.Service{Hostname: "h", LoadBalancing: &workload.LoadBalancing{
				RoutingPreference: []workload.LoadBalancing_Scope{1, 7},
			}}),
			[]string{"load_balancing.routing_preference[1]: unknown value 7"},
		},
		"policies that cannot be read": {
			serviceBytes(t, &workload.Service{Hostname: "h", Extensions: []*workload.Extension{{Name: "mistnet.io/policies"}}}),
			[]string{"extensions[mistnet.io/policies]"},
		},
		"a policy without a key": {
			serviceBytes(t, &workload.Service{Hostname: "h", Extensions: []*workload.Extension{{Name: "mistnet.io/policies", Config: keys(t, "")}}}),
			[]string{"extensions[mistnet.io/policies]: [0] is not a policy's key"},
		},
		"an unknown health policy": {
			serviceBytes(t, &workload.Service{Hostname: "h", LoadBalancing: &workload.LoadBalancing{HealthPolicy: 2}}),
			[]string{"load_balancing.health_policy"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, err := wds.DecodeAddress(tc.body)
			wantFields(t, err, tc.fields...)
			if !a.IsZero() {
				t.Errorf("DecodeAddress = %+v beside an error, want nothing", a)
			}
		})
	}
}

func TestWhatOnlyReportsIsLenient(t *testing.T) {
	t.Parallel()
	a, err := wds.DecodeAddress(workloadBytes(t, &workload.Workload{
		Uid: "u", WorkloadType: 9, Services: map[string]*workload.PortList{"n/h": {Ports: []*workload.Port{{AppProtocol: 9}}}},
	}))
	if err != nil || a.Workload.Kind != mesh.KindDeployment || a.Workload.Services[0].Ports[0].App != mesh.AppUnknown {
		t.Errorf("DecodeAddress = %+v, %v, want unknown kinds read as none", a.Workload, err)
	}
	a, err = wds.DecodeAddress(serviceBytes(t, &workload.Service{Hostname: "h", SubjectAltNames: []string{"who", "spiffe://t/ns/n/sa/s"}}))
	if err != nil || len(a.Service.SANs) != 1 || a.Service.SANs[0].ServiceAccount != "s" {
		t.Errorf("DecodeAddress = %+v, %v, want the one real identity", a.Service, err)
	}
}

func TestMappedAddressesBecomeIPv4(t *testing.T) {
	t.Parallel()
	mapped := []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1}
	a, err := wds.DecodeAddress(workloadBytes(t, &workload.Workload{Uid: "u", Addresses: [][]byte{mapped}}))
	if err != nil || a.Workload.Addrs[0].String() != "10.0.0.1" {
		t.Errorf("DecodeAddress = %v, %v, want 10.0.0.1", a.Workload.Addrs, err)
	}
	a, err = wds.DecodeAddress(serviceBytes(t, &workload.Service{Hostname: "h", Addresses: []*workload.NetworkAddress{
		{Address: mapped}, {Address: mapped, Length: proto.Uint32(104)},
	}}))
	if err != nil || a.Service.VIPs[0].Prefix.String() != "10.0.0.1/32" || a.Service.VIPs[1].Prefix.String() != "10.0.0.0/8" {
		t.Errorf("DecodeAddress = %v, %v, want 10.0.0.1/32 and 10.0.0.0/8", a.Service.VIPs, err)
	}
}

// authorization is a policy with one match.
func authorization(m *security.Match) *security.Authorization {
	return &security.Authorization{
		Namespace: "shop", Name: "p", Scope: security.Scope_NAMESPACE,
		Groups: []*security.Group{{Rules: []*security.Rules{{Matches: []*security.Match{m}}}}},
	}
}

func unknownField(m proto.Message) {
	m.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1))
}

func TestRulesThatCannotBeReadDeny(t *testing.T) {
	t.Parallel()
	newer := &security.Match{}
	unknownField(newer)
	newOperation := &security.Operation{Headers: []*security.HeaderMatch{{}}, Paths: []*security.StringMatch{{}}}
	unknownField(newOperation)
	const at = "groups[0].rules[0].matches[0]"
	for name, tc := range map[string]struct {
		match  *security.Match
		fields []string
	}{
		"a source of a wrong length": {
			&security.Match{SourceIps: []*security.Address{{Address: []byte{1, 2}, Length: 8}}},
			[]string{at + ".source_ips[0]: 2 bytes"},
		},
		"a prefix longer than its address": {
			&security.Match{NotDestinationIps: []*security.Address{{Address: []byte{10, 0, 0, 0}, Length: 33}}},
			[]string{at + ".not_destination_ips[0]: length 33 of a 32-bit address"},
		},
		"ports out of range": {
			&security.Match{DestinationPorts: []uint32{80, 65536}, NotDestinationPorts: []uint32{1 << 20}},
			[]string{at + ".destination_ports[1]: 65536", at + ".not_destination_ports[0]: 1048576"},
		},
		"strings without a match type": {
			&security.Match{
				Namespaces: []*security.StringMatch{{}}, NotNamespaces: []*security.StringMatch{{}},
				Principals: []*security.StringMatch{{}}, NotPrincipals: []*security.StringMatch{{}},
			},
			[]string{at + ".namespaces[0]", at + ".not_namespaces[0]", at + ".principals[0]", at + ".not_principals[0]"},
		},
		"an extension": {
			&security.Match{Extensions: []*security.Extension{{Name: "x"}}}, []string{at + `.extensions: "x"`},
		},
		"a condition of a later version": {newer, []string{at + ": holds a field"}},
		"an operation of a later version": {
			&security.Match{Operation: newOperation, DestinationPorts: []uint32{80}},
			[]string{at + ".operation: holds a field", at + ".operation.headers[0]: without a name", at + ".operation.paths[0]: no match type"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := wds.DecodePolicy(marshal(t, authorization(tc.match)))
			wantFields(t, err, tc.fields...)
			if p == nil || p.Invalid == "" || p.Key() != "shop/p" || p.Scope != mesh.ScopeNamespace || p.Groups != nil {
				t.Fatalf("DecodePolicy = %+v, want an invalid shop/p of namespace scope without rules", p)
			}
		})
	}
}

func TestPoliciesThatCannotBeNamedAreNil(t *testing.T) {
	t.Parallel()
	for name, body := range map[string][]byte{
		"no name":          marshal(t, &security.Authorization{Namespace: "n"}),
		"no namespace":     marshal(t, &security.Authorization{Name: "p"}),
		"an unknown scope": marshal(t, &security.Authorization{Name: "p", Namespace: "n", Scope: 3}),
		"garbage":          {0x0a, 0xff},
	} {
		if p, err := wds.DecodePolicy(body); p != nil || err == nil {
			t.Errorf("DecodePolicy(%s) = %+v, %v, want nil and an error", name, p, err)
		}
	}
	p, err := wds.DecodePolicy(marshal(t, &security.Authorization{Name: "p", Namespace: "n", Action: 2}))
	if err == nil || p == nil || p.Invalid == "" {
		t.Errorf("DecodePolicy(unknown action) = %+v, %v, want an invalid policy", p, err)
	}
}

func TestDelta(t *testing.T) {
	t.Parallel()
	good := func(scope mesh.PolicyScope) []byte {
		body, err := wds.EncodePolicy(&mesh.Policy{Namespace: "shop", Name: "p", Scope: scope, DryRun: true})
		if err != nil {
			t.Fatal(err)
		}
		return body
	}
	wl := func(uid, node string) []byte {
		return workloadBytes(t, &workload.Workload{Uid: uid, Node: node, Namespace: "n", Name: uid})
	}
	svc := serviceBytes(t, &workload.Service{Namespace: "n", Hostname: "h"})
	apply := func(s *mesh.Snapshot, typeURL string, upserts []wds.Named, removes ...string) (*mesh.Snapshot, map[string]error) {
		d, bad := wds.Delta(s, typeURL, upserts, removes)
		if s == nil {
			s = &mesh.Snapshot{}
		}
		return s.Apply(d), bad
	}
	garbage := []byte{0xff}

	s, bad := apply(nil, mesh.TypeAddress, []wds.Named{{"a", wl("a", "1")}, {"n/h", svc}, {"b", garbage}, {"c", wl("d", "1")}})
	if w, n, _ := s.Counts(); w != 1 || n != 1 || len(bad) != 2 || bad["b"] == nil || bad["c"] == nil {
		t.Fatalf("%d workloads, %d services, rejected %v, want 1, 1, b and c", w, n, bad)
	}
	s, bad = apply(s, mesh.TypeAddress, []wds.Named{{"a", garbage}, {"x", svc}})
	if s.Workload("a") == nil || s.Service("n/h") == nil || bad["a"] == nil || bad["x"] == nil {
		t.Fatalf("after a bad update of a: %v, want the last good one and both rejected", bad)
	}
	s, _ = apply(s, mesh.TypeAddress, []wds.Named{{"n/h", wl("n/h", "2")}}, "a", "unknown")
	if s.Workload("a") != nil || s.Service("n/h") != nil || s.Workload("n/h") == nil {
		t.Error("a is still there, or n/h is not the workload it became")
	}
	s, _ = apply(s, mesh.TypeAddress, []wds.Named{{"n/h", svc}})
	if s.Service("n/h") == nil || s.Workload("n/h") != nil {
		t.Error("n/h is not the service it became again")
	}
	s, _ = apply(s, mesh.TypeAddress, nil, "n/h")
	if w, n, _ := s.Counts(); w != 0 || n != 0 {
		t.Errorf("%d workloads and %d services left, want none", w, n)
	}

	body, err := wds.EncodeWorkload(&mesh.Workload{UID: "l", Labels: map[string]string{"app": "web"}})
	if err != nil {
		t.Fatal(err)
	}
	labelled, _ := wds.Delta(nil, mesh.TypeAddress, []wds.Named{{"l", body}}, nil)
	lean, _ := wds.DeltaL4(nil, mesh.TypeAddress, []wds.Named{{"l", body}}, nil)
	if labelled.Workloads[0].Labels["app"] != "web" || lean.Workloads[0].Labels != nil {
		t.Errorf("labels are %v and, at L4, %v; want app=web and none", labelled.Workloads[0].Labels, lean.Workloads[0].Labels)
	}
	for why, value := range map[string]*anypb.Any{"no value": nil, "no labels": mustAny(t, &structpb.Struct{}),
		"a number": mustAny(t, &structpb.Struct{Fields: map[string]*structpb.Value{"a": structpb.NewNumberValue(1)}})} {
		bad := workloadBytes(t, &workload.Workload{Uid: "l", Extensions: []*workload.Extension{{Name: "mistnet.io/labels", Config: value}}})
		if _, faults := wds.Delta(nil, mesh.TypeAddress, []wds.Named{{"l", bad}}, nil); faults["l"] == nil {
			t.Errorf("labels that are %s were not rejected", why)
		}
	}

	if _, bad := apply(nil, "type.googleapis.com/x", []wds.Named{{"a", nil}}); bad["a"] == nil {
		t.Error("a resource of an unknown type was not rejected")
	}

	s, bad = apply(s, mesh.TypeAuthorization, []wds.Named{{"shop/p", good(mesh.ScopeWorkload)}})
	if p := s.Policy("shop/p"); p == nil || p.Invalid != "" || len(bad) != 0 {
		t.Fatalf("policy = %+v, rejected %v, want it good", p, bad)
	}
	for _, tc := range []struct {
		why, name string
		body      []byte
		want      mesh.Policy
	}{
		{"the last good one's scope, enforced", "shop/p", garbage,
			mesh.Policy{Namespace: "shop", Name: "p", Scope: mesh.ScopeWorkload}},
		{"its namespace when nothing is known", "shop/q", garbage,
			mesh.Policy{Namespace: "shop", Name: "q", Scope: mesh.ScopeNamespace}},
		{"the mesh in the root namespace", "istio-system/q", garbage,
			mesh.Policy{Namespace: "istio-system", Name: "q", Scope: mesh.ScopeGlobal}},
		{"the mesh when no namespace is named", "q", garbage, mesh.Policy{Name: "q", Scope: mesh.ScopeGlobal}},
		{"its resource's name, not what it calls itself", "shop/r", good(mesh.ScopeGlobal),
			mesh.Policy{Namespace: "shop", Name: "r", Scope: mesh.ScopeNamespace}},
		{"the scope it states when only its rules are bad", "shop/p",
			marshal(t, authorization(&security.Match{DestinationPorts: []uint32{1 << 16}})),
			mesh.Policy{Namespace: "shop", Name: "p", Scope: mesh.ScopeNamespace}},
	} {
		next, bad := apply(s, mesh.TypeAuthorization, []wds.Named{{tc.name, tc.body}})
		if bad[tc.name] == nil {
			t.Errorf("%s: %q was not rejected", tc.why, tc.name)
			continue
		}
		tc.want.Invalid = bad[tc.name].Error()
		got := next.Policy(tc.want.Key())
		if got == nil {
			t.Errorf("%s: no policy denies", tc.why)
			continue
		}
		if diff := cmp.Diff(tc.want, *got, same); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.why, diff)
		}
		if after, _ := apply(next, mesh.TypeAuthorization, nil, tc.name); after.Policy(tc.want.Key()) != nil {
			t.Errorf("%s: it could not be removed again", tc.why)
		}
	}
}

func FuzzDecodeAddress(f *testing.F) {
	f.Add(workloadBytes(f, &workload.Workload{
		Uid: "u", Addresses: [][]byte{{1, 2, 3, 4}}, Services: map[string]*workload.PortList{"a/b": {Ports: []*workload.Port{{ServicePort: 1}}}},
	}))
	f.Add(serviceBytes(f, &workload.Service{Hostname: "h", Waypoint: gatewayAt([]byte{1, 2, 3, 4}, nil, 15008)}))
	f.Fuzz(func(t *testing.T, body []byte) {
		a, err := wds.DecodeAddress(body)
		if err != nil {
			return
		}
		// What was accepted can be sent on, and then reads the same.
		encode := func(a mesh.Address) ([]byte, error) {
			if a.Workload != nil {
				return wds.EncodeWorkload(a.Workload)
			}
			return wds.EncodeService(a.Service)
		}
		first, err := encode(a)
		if err != nil {
			t.Fatalf("accepted %+v cannot be encoded: %v", a, err)
		}
		b, err := wds.DecodeAddress(first)
		if err != nil {
			t.Fatalf("own encoding refused: %v", err)
		}
		second, err := encode(b)
		if err != nil || !bytes.Equal(first, second) {
			t.Fatalf("encoding is not stable (%v):\n%x\n%x", err, first, second)
		}
	})
}

func FuzzDecodePolicy(f *testing.F) {
	f.Add(marshal(f, authorization(&security.Match{
		SourceIps: []*security.Address{{Address: []byte{1, 2, 3, 4}, Length: 8}}, DestinationPorts: []uint32{80},
		Principals: []*security.StringMatch{{MatchType: &security.StringMatch_Exact{Exact: "x"}}},
	})))
	f.Fuzz(func(t *testing.T, body []byte) {
		p, err := wds.DecodePolicy(body)
		if err != nil {
			if p != nil && p.Invalid == "" {
				t.Fatalf("refused policy %+v would not deny", p)
			}
			return
		}
		first, err := wds.EncodePolicy(p)
		if err != nil {
			t.Fatalf("accepted %+v cannot be encoded: %v", p, err)
		}
		q, err := wds.DecodePolicy(first)
		if err != nil {
			t.Fatalf("own encoding refused: %v", err)
		}
		if diff := cmp.Diff(p, q, same); diff != "" {
			t.Fatalf("policy changed on the wire (-first +second):\n%s", diff)
		}
	})
}

func mustAny(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}
