// Package api_test holds the wire APIs to Istio ambient's: names, numbers and bytes.
package api_test

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mistnet/mistnet/api/ca"
	"github.com/mistnet/mistnet/api/security"
	"github.com/mistnet/mistnet/api/workload"
	"github.com/mistnet/mistnet/api/zds"
)

// schema is each message and enumeration with its fields: number, name, type. It was written down from the protocol, not
// from the generated code. Fields from 1000 on are our own.
var schema = map[protoreflect.FileDescriptor]string{
	workload.File_workload_workload_proto: `
istio.workload.Address 1:workload:Workload/type 2:service:Service/type
istio.workload.Service 1:name:string 2:namespace:string 3:hostname:string 4:addresses:[]NetworkAddress 5:ports:[]Port 6:subject_alt_names:[]string 7:waypoint:GatewayAddress 8:load_balancing:LoadBalancing 9:ip_families:IPFamilies 10:extensions:[]Extension 11:canonical:bool 12:ingress_use_waypoint:bool 13:weighted_waypoints:[]WeightedWaypoint 14:visibility:Visibility
istio.workload.WeightedWaypoint 1:destination:GatewayAddress 2:weight:uint32
istio.workload.LoadBalancing 1:routing_preference:[]Scope 2:mode:Mode 3:health_policy:HealthPolicy
istio.workload.Workload 1:name:string 2:namespace:string 3:addresses:[]bytes 4:network:string 5:tunnel_protocol:TunnelProtocol 6:trust_domain:string 7:service_account:string 8:waypoint:GatewayAddress 9:node:string 10:canonical_name:string 11:canonical_revision:string 12:workload_type:WorkloadType 13:workload_name:string 14:native_tunnel:bool 16:authorization_policies:[]string 17:status:WorkloadStatus 18:cluster_id:string 19:network_gateway:GatewayAddress 20:uid:string 21:hostname:string 22:services:map<string,PortList> 23:application_tunnel:ApplicationTunnel 24:locality:Locality 25:network_mode:NetworkMode 26:extensions:[]Extension 27:capacity:UInt32Value
istio.workload.Locality 1:region:string 2:zone:string 3:subzone:string
istio.workload.PortList 1:ports:[]Port
istio.workload.Port 1:service_port:uint32 2:target_port:uint32 3:app_protocol:AppProtocol
istio.workload.ApplicationTunnel 1:protocol:Protocol 2:port:uint32
istio.workload.GatewayAddress 1:hostname:NamespacedHostname/destination 2:address:NetworkAddress/destination 3:hbone_mtls_port:uint32
istio.workload.NetworkAddress 1:network:string 2:address:bytes 3:length:uint32?
istio.workload.NamespacedHostname 1:namespace:string 2:hostname:string
istio.workload.Extension 1:name:string 2:config:Any
istio.workload.Visibility 0:PUBLIC 1:NAMESPACE
istio.workload.IPFamilies 0:AUTOMATIC 1:IPV4_ONLY 2:IPV6_ONLY 3:DUAL
istio.workload.LoadBalancing.Scope 0:UNSPECIFIED_SCOPE 1:REGION 2:ZONE 3:SUBZONE 4:NODE 5:CLUSTER 6:NETWORK
istio.workload.LoadBalancing.Mode 0:UNSPECIFIED_MODE 1:STRICT 2:FAILOVER 3:PASSTHROUGH
istio.workload.LoadBalancing.HealthPolicy 0:ONLY_HEALTHY 1:ALLOW_ALL
istio.workload.WorkloadStatus 0:HEALTHY 1:UNHEALTHY
istio.workload.WorkloadType 0:DEPLOYMENT 1:CRONJOB 2:POD 3:JOB
istio.workload.TunnelProtocol 0:NONE 1:HBONE 2:LEGACY_ISTIO_MTLS
istio.workload.NetworkMode 0:STANDARD 1:HOST_NETWORK
istio.workload.AppProtocol 0:UNKNOWN 1:HTTP11 2:HTTP2 3:GRPC 4:TCP 5:TLS
istio.workload.ApplicationTunnel.Protocol 0:NONE 1:PROXY
`,
	security.File_security_authorization_proto: `
istio.security.Authorization 1:name:string 2:namespace:string 3:scope:Scope 4:action:Action 5:groups:[]Group 6:dry_run:bool 7:extensions:[]Extension
istio.security.Group 1:rules:[]Rules
istio.security.Rules 2:matches:[]Match
istio.security.Match 1:namespaces:[]StringMatch 2:not_namespaces:[]StringMatch 3:principals:[]StringMatch 4:not_principals:[]StringMatch 5:source_ips:[]Address 6:not_source_ips:[]Address 7:destination_ips:[]Address 8:not_destination_ips:[]Address 9:destination_ports:[]uint32 10:not_destination_ports:[]uint32 11:service_accounts:[]ServiceAccountMatch 12:not_service_accounts:[]ServiceAccountMatch 13:extensions:[]Extension 1001:operation:Operation
istio.security.Operation 1:hosts:[]StringMatch 2:not_hosts:[]StringMatch 3:methods:[]StringMatch 4:not_methods:[]StringMatch 5:paths:[]StringMatch 6:not_paths:[]StringMatch 7:headers:[]HeaderMatch
istio.security.HeaderMatch 1:name:string 2:values:[]StringMatch 3:not_values:[]StringMatch
istio.security.Address 1:address:bytes 2:length:uint32
istio.security.ServiceAccountMatch 1:namespace:string 2:serviceAccount:string
istio.security.Empty
istio.security.StringMatch 1:exact:string/match_type 2:prefix:string/match_type 3:suffix:string/match_type 4:presence:Empty/match_type 1001:template:string/match_type
istio.security.Extension 1:name:string 2:config:Any
istio.security.Scope 0:GLOBAL 1:NAMESPACE 2:WORKLOAD_SELECTOR
istio.security.Action 0:ALLOW 1:DENY
`,
	zds.File_zds_zds_proto: `
istio.workload.zds.ZdsHello 1:version:Version
istio.workload.zds.WorkloadRequest 1:add:AddWorkload/payload 2:del:DelWorkload/payload 3:snapshot_sent:SnapshotSent/payload 5:keep:KeepWorkload/payload
istio.workload.zds.AddWorkload 1:uid:string 2:workload_info:WorkloadInfo
istio.workload.zds.WorkloadInfo 1:name:string 2:namespace:string 3:service_account:string
istio.workload.zds.KeepWorkload 1:uid:string
istio.workload.zds.DelWorkload 2:uid:string
istio.workload.zds.SnapshotSent
istio.workload.zds.WorkloadResponse 1:ack:Ack/payload
istio.workload.zds.Ack 1:error:string
istio.workload.zds.Version 0:NOT_USED 1:V1
`,
	ca.File_ca_ca_proto: `
istio.v1.auth.IstioCertificateRequest 1:csr:string 3:validity_duration:int64 4:metadata:Struct
istio.v1.auth.IstioCertificateResponse 1:cert_chain:[]string
istio.v1.auth.IstioCertificateService CreateCertificate(IstioCertificateRequest)IstioCertificateResponse
`,
}

func TestNamesAndNumbersAreTheProtocols(t *testing.T) {
	t.Parallel()
	for file, want := range schema {
		t.Run(file.Path(), func(t *testing.T) {
			t.Parallel()
			wanted := strings.Split(strings.TrimSpace(want), "\n")
			got := describe(file)
			slices.Sort(wanted)
			slices.Sort(got)
			if diff := cmp.Diff(wanted, got); diff != "" {
				t.Errorf("the generated code is another protocol (-want +got):\n%s", diff)
			}
		})
	}
}

func describe(file protoreflect.FileDescriptor) []string {
	var lines []string
	enums := func(list protoreflect.EnumDescriptors) {
		for i := range list.Len() {
			line := string(list.Get(i).FullName())
			for j := range list.Get(i).Values().Len() {
				v := list.Get(i).Values().Get(j)
				line += fmt.Sprintf(" %d:%s", v.Number(), v.Name())
			}
			lines = append(lines, line)
		}
	}
	enums(file.Enums())
	for i := range file.Messages().Len() {
		m := file.Messages().Get(i)
		line := string(m.FullName())
		for j := range m.Fields().Len() {
			line += " " + describeField(m.Fields().Get(j))
		}
		lines = append(lines, line)
		enums(m.Enums())
	}
	for i := range file.Services().Len() {
		s := file.Services().Get(i)
		line := string(s.FullName())
		for j := range s.Methods().Len() {
			m := s.Methods().Get(j)
			line += fmt.Sprintf(" %s(%s)%s", m.Name(), m.Input().Name(), m.Output().Name())
		}
		lines = append(lines, line)
	}
	return lines
}

func describeField(f protoreflect.FieldDescriptor) string {
	kind := func(f protoreflect.FieldDescriptor) string {
		switch {
		case f.Message() != nil:
			return string(f.Message().Name())
		case f.Enum() != nil:
			return string(f.Enum().Name())
		}
		return f.Kind().String()
	}
	text := fmt.Sprintf("%d:%s:", f.Number(), f.Name())
	switch {
	case f.IsMap():
		return text + "map<" + kind(f.MapKey()) + "," + kind(f.MapValue()) + ">"
	case f.IsList():
		return text + "[]" + kind(f)
	case f.HasOptionalKeyword():
		return text + kind(f) + "?"
	case f.ContainingOneof() != nil:
		return text + kind(f) + "/" + string(f.ContainingOneof().Name())
	}
	return text + kind(f)
}

func TestGoldenBytes(t *testing.T) {
	t.Parallel()
	extension := &anypb.Any{TypeUrl: "t", Value: []byte{9}}
	for _, tc := range []struct {
		m    proto.Message
		want string
	}{
		{&workload.Address{Type: &workload.Address_Workload{Workload: &workload.Workload{}}}, "0a00"},
		{&workload.Address{Type: &workload.Address_Service{Service: &workload.Service{}}}, "1200"},
		{&workload.Workload{
			Name: "a", Namespace: "b", Addresses: [][]byte{{1, 2, 3, 4}}, Network: "c", TunnelProtocol: 1, TrustDomain: "d",
			ServiceAccount: "e", Waypoint: &workload.GatewayAddress{}, Node: "f", CanonicalName: "g", CanonicalRevision: "h",
			WorkloadType: 2, WorkloadName: "i", NativeTunnel: true, AuthorizationPolicies: []string{"j"}, Status: 1,
			ClusterId: "k", NetworkGateway: &workload.GatewayAddress{}, Uid: "l", Hostname: "m",
			Services:          map[string]*workload.PortList{"n": {}},
			ApplicationTunnel: &workload.ApplicationTunnel{}, Locality: &workload.Locality{}, NetworkMode: 1,
			Extensions: []*workload.Extension{{}}, Capacity: wrapperspb.UInt32(2),
		}, "0a0161 120162 1a0401020304 220163 2801 320164 3a0165 4200 4a0166 520167 5a0168 6002 6a0169 7001 8201016a" +
			"8801 01 9201016b 9a0100 a201016c aa01016d b201050a016e1200 ba0100 c20100 c801 01 d20100 da01020802"},
		{&workload.Service{
			Name: "a", Namespace: "b", Hostname: "c", Addresses: []*workload.NetworkAddress{{}}, Ports: []*workload.Port{{}},
			SubjectAltNames: []string{"d"}, Waypoint: &workload.GatewayAddress{}, LoadBalancing: &workload.LoadBalancing{},
			IpFamilies: 3, Extensions: []*workload.Extension{{}}, Canonical: true, IngressUseWaypoint: true,
			WeightedWaypoints: []*workload.WeightedWaypoint{{}}, Visibility: 1,
		}, "0a0161 120162 1a0163 2200 2a00 320164 3a00 4200 4803 5200 5801 6001 6a00 7001"},
		{&workload.WeightedWaypoint{Destination: &workload.GatewayAddress{}, Weight: 300}, "0a00 10ac02"},
		{&workload.LoadBalancing{RoutingPreference: []workload.LoadBalancing_Scope{6, 1}, Mode: 2, HealthPolicy: 1}, "0a020601 1002 1801"},
		{&workload.Locality{Region: "r", Zone: "z", Subzone: "s"}, "0a0172 12017a 1a0173"},
		{&workload.PortList{Ports: []*workload.Port{{ServicePort: 80, TargetPort: 8080, AppProtocol: 3}}}, "0a07 0850 10903f 1803"},
		{&workload.ApplicationTunnel{Protocol: 1, Port: 15088}, "0801 10f075"},
		{&workload.GatewayAddress{
			Destination:   &workload.GatewayAddress_Hostname{Hostname: &workload.NamespacedHostname{Namespace: "n", Hostname: "h"}},
			HboneMtlsPort: 15008,
		}, "18a075 0a06 0a016e 120168"},
		{&workload.GatewayAddress{Destination: &workload.GatewayAddress_Address{Address: &workload.NetworkAddress{}}}, "1200"},
		{&workload.NetworkAddress{Network: "n", Address: []byte{10, 0, 0, 0}, Length: proto.Uint32(8)}, "0a016e 12040a000000 1808"},
		{&workload.NetworkAddress{Length: proto.Uint32(0)}, "1800"},
		{&workload.Extension{Name: "n", Config: extension}, "0a016e 1206 0a0174 120109"},

		{&security.Authorization{
			Name: "a", Namespace: "b", Scope: 2, Action: 1, Groups: []*security.Group{{}}, DryRun: true,
			Extensions: []*security.Extension{{}},
		}, "0a0161 120162 1802 2001 2a00 3001 3a00"},
		{&security.Group{Rules: []*security.Rules{{Matches: []*security.Match{{}}}}}, "0a02 1200"},
		{&security.Match{
			Namespaces: []*security.StringMatch{{}}, NotNamespaces: []*security.StringMatch{{}},
			Principals: []*security.StringMatch{{}}, NotPrincipals: []*security.StringMatch{{}},
			SourceIps: []*security.Address{{}}, NotSourceIps: []*security.Address{{}},
			DestinationIps: []*security.Address{{}}, NotDestinationIps: []*security.Address{{}},
			DestinationPorts: []uint32{80, 300}, NotDestinationPorts: []uint32{1},
			ServiceAccounts: []*security.ServiceAccountMatch{{}}, NotServiceAccounts: []*security.ServiceAccountMatch{{}},
			Extensions: []*security.Extension{{}},
		}, "0a00 1200 1a00 2200 2a00 3200 3a00 4200 4a03 50 ac02 520101 5a00 6200 6a00"},
		{&security.Address{Address: []byte{10, 0, 0, 0}, Length: 8}, "0a040a000000 1008"},
		{&security.ServiceAccountMatch{Namespace: "n", ServiceAccount: "s"}, "0a016e 120173"},
		{&security.Empty{}, ""},
		{&security.StringMatch{MatchType: &security.StringMatch_Exact{Exact: "x"}}, "0a0178"},
		{&security.StringMatch{MatchType: &security.StringMatch_Prefix{Prefix: "x"}}, "120178"},
		{&security.StringMatch{MatchType: &security.StringMatch_Suffix{Suffix: "x"}}, "1a0178"},
		{&security.StringMatch{MatchType: &security.StringMatch_Presence{Presence: &security.Empty{}}}, "2200"},
		{&security.Extension{Name: "n", Config: extension}, "0a016e 1206 0a0174 120109"},

		{&zds.ZdsHello{Version: zds.Version_V1}, "0801"},
		{&zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Add{Add: &zds.AddWorkload{
			Uid: "u", WorkloadInfo: &zds.WorkloadInfo{Name: "a", Namespace: "b", ServiceAccount: "c"},
		}}}, "0a0e 0a0175 1209 0a0161 120162 1a0163"},
		{&zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Del{Del: &zds.DelWorkload{Uid: "u"}}}, "1203 120175"},
		{&zds.WorkloadRequest{Payload: &zds.WorkloadRequest_SnapshotSent{SnapshotSent: &zds.SnapshotSent{}}}, "1a00"},
		{&zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Keep{Keep: &zds.KeepWorkload{Uid: "u"}}}, "2a03 0a0175"},
		{&zds.WorkloadResponse{Payload: &zds.WorkloadResponse_Ack{Ack: &zds.Ack{}}}, "0a00"},
		{&zds.WorkloadResponse{Payload: &zds.WorkloadResponse_Ack{Ack: &zds.Ack{Error: "no"}}}, "0a04 0a026e6f"},

		{&ca.IstioCertificateRequest{Csr: "p", ValidityDuration: 86400, Metadata: &structpb.Struct{
			Fields: map[string]*structpb.Value{"k": structpb.NewStringValue("v")},
		}}, "0a0170 1880a305 220a 0a08 0a016b 1203 1a0176"},
		{&ca.IstioCertificateResponse{CertChain: []string{"l", "r"}}, "0a016c 0a0172"},
	} {
		name := fmt.Sprintf("%s/%s", tc.m.ProtoReflect().Descriptor().FullName(), strings.ReplaceAll(tc.want, " ", ""))
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want := strings.ReplaceAll(tc.want, " ", "")
			got, err := proto.MarshalOptions{Deterministic: true}.Marshal(tc.m)
			if err != nil || hex.EncodeToString(got) != want {
				t.Fatalf("bytes %x, %v, want %s", got, err, want)
			}
			back := tc.m.ProtoReflect().New().Interface()
			if err := proto.Unmarshal(got, back); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.m, back, protocmp.Transform()); diff != "" {
				t.Errorf("came back different (-want +got):\n%s", diff)
			}
		})
	}
}

func TestTypeURLs(t *testing.T) {
	t.Parallel()
	for m, want := range map[proto.Message]string{
		&workload.Address{}:       "type.googleapis.com/istio.workload.Address",
		&security.Authorization{}: "type.googleapis.com/istio.security.Authorization",
	} {
		packed, err := anypb.New(m)
		if err != nil || packed.GetTypeUrl() != want {
			t.Errorf("type URL %q, %v, want %q", packed.GetTypeUrl(), err, want)
		}
	}
	if got, want := ca.IstioCertificateService_CreateCertificate_FullMethodName,
		"/istio.v1.auth.IstioCertificateService/CreateCertificate"; got != want {
		t.Errorf("method %q, want %q", got, want)
	}
}
