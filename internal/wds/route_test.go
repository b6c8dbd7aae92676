package wds_test

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mistnet/mistnet/api/route"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
)

var prefixes = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

// TestRoutesSurviveTheWire fills every field of the nouns, whichever they are, so that one that the codec forgets is seen.
func TestRoutesSurviveTheWire(t *testing.T) {
	t.Parallel()
	g := gen{rand.New(rand.NewPCG(5, 1))}
	seen := make(map[string]bool)
	for range 400 {
		r := new(mesh.Route)
		g.fill(reflect.ValueOf(r).Elem())
		note(seen, reflect.ValueOf(r).Elem(), "Route")
		body, err := wds.EncodeRoute(r)
		if err != nil {
			t.Fatal(err)
		}
		again, err := wds.EncodeRoute(r)
		if err != nil || !bytes.Equal(body, again) {
			t.Fatalf("equal routes give other bytes (%v)", err)
		}
		got, err := wds.DecodeRoute(body)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(r, got, prefixes); diff != "" {
			t.Fatalf("decoded route (-want +got):\n%s", diff)
		}
	}
	allSeen(t, seen, reflect.TypeFor[mesh.Route](), "Route")
}

func TestTrafficPoliciesSurviveTheWire(t *testing.T) {
	t.Parallel()
	g := gen{rand.New(rand.NewPCG(5, 2))}
	seen := make(map[string]bool)
	for range 400 {
		p := new(mesh.TrafficPolicy)
		g.fill(reflect.ValueOf(p).Elem())
		note(seen, reflect.ValueOf(p).Elem(), "TrafficPolicy")
		body, err := wds.EncodeTrafficPolicy(p)
		if err != nil {
			t.Fatal(err)
		}
		got, err := wds.DecodeTrafficPolicy(body)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(p, got, prefixes); diff != "" {
			t.Fatalf("decoded policy (-want +got):\n%s", diff)
		}
		again, err := wds.EncodeTrafficPolicy(got)
		if err != nil || !bytes.Equal(body, again) {
			t.Fatalf("equal policies give other bytes (%v)", err)
		}
	}
	allSeen(t, seen, reflect.TypeFor[mesh.TrafficPolicy](), "TrafficPolicy")
}

// note records the fields of v, and of what it holds, that are not zero.
func note(seen map[string]bool, v reflect.Value, at string) {
	if v.IsZero() {
		return
	}
	seen[at] = true
	switch v.Kind() {
	case reflect.Pointer:
		note(seen, v.Elem(), at)
	case reflect.Slice:
		for i := range v.Len() {
			note(seen, v.Index(i), at)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.IsExported() {
				note(seen, v.Field(i), at+"."+f.Name)
			}
		}
	}
}

// allSeen fails for every field of a type that was never anything but zero.
func allSeen(t *testing.T, seen map[string]bool, typ reflect.Type, at string) {
	t.Helper()
	if !seen[at] {
		t.Errorf("%s was never set: the test is blind", at)
	}
	switch typ.Kind() {
	case reflect.Pointer, reflect.Slice:
		allSeen(t, seen, typ.Elem(), at)
	case reflect.Struct:
		for i := range typ.NumField() {
			if f := typ.Field(i); f.IsExported() {
				allSeen(t, seen, f.Type, at+"."+f.Name)
			}
		}
	}
}

// fill makes a random value that the wire can carry.
func (g gen) fill(v reflect.Value) {
	switch x := v.Addr().Interface().(type) {
	case *netip.Prefix:
		*x = g.prefix()
		return
	case *time.Time:
		*x = time.Unix(int64(g.IntN(2e9)), 0).UTC()
		return
	case *time.Duration:
		*x = time.Duration(g.IntN(3)) * time.Duration(g.IntN(1e12))
		return
	case *mesh.RetryOn:
		*x = mesh.RetryOn(g.IntN(int(mesh.RetryOnAll) + 1))
		return
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(g.flag())
	case reflect.Uint8:
		v.SetUint(uint64(g.IntN(3))) // every enumeration has three values
	case reflect.Uint16:
		v.SetUint(uint64(200 + g.IntN(400))) // a status, a port
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(g.IntN(1000)))
	case reflect.Float64:
		v.SetFloat(g.Float64() * 10)
	case reflect.String:
		v.SetString(g.name())
	case reflect.Pointer:
		if g.IntN(3) > 0 {
			v.Set(reflect.New(v.Type().Elem()))
			g.fill(v.Elem())
		}
	case reflect.Map:
		if g.flag() {
			v.Set(reflect.MakeMap(v.Type()))
			val := reflect.New(v.Type().Elem()).Elem()
			g.fill(val)
			v.SetMapIndex(reflect.ValueOf(g.name()), val)
		}
	case reflect.Slice:
		if n := g.IntN(3); n > 0 {
			v.Set(reflect.MakeSlice(v.Type(), n, n))
			for i := range n {
				g.fill(v.Index(i))
			}
		}
	case reflect.Struct:
		for i := range v.NumField() {
			g.fill(v.Field(i))
		}
	}
	g.mend(v.Addr().Interface())
}

// mend makes what is inconsistent consistent.
func (g gen) mend(x any) {
	switch x := x.(type) {
	case *mesh.Route:
		x.Kind = mesh.RouteKind(1 + g.IntN(5))
		x.Protocol = []mesh.RouteProtocol{
			mesh.RouteProtocol(1 + g.IntN(3)), mesh.RouteHTTP, mesh.RouteHTTP, mesh.RouteTLS, mesh.RouteTCP,
		}[x.Kind-1]
		x.Parents = append(x.Parents, mesh.RouteParent{Namespace: "a", Hostname: "b"})
		if x.Protocol == mesh.RouteHTTP {
			if x.Stream = nil; x.HTTP == nil {
				x.HTTP = &mesh.HTTPRule{}
			}
			return
		}
		if x.HTTP = nil; x.Stream == nil {
			x.Stream = &mesh.StreamRule{}
		}
		for i := range x.Stream.Matches {
			x.Stream.Matches[i].SNI = append(x.Stream.Matches[i].SNI, "*.example.com")
		}
	case *mesh.StringMatch:
		x.Kind = mesh.MatchKind(1 + g.IntN(5))
		if x.Kind == mesh.MatchPresence {
			x.Value = ""
		}
	case *mesh.PathMatch:
		if x.Kind = mesh.PathKind(g.IntN(5)); x.Kind == mesh.PathAny {
			x.Value = ""
		}
	case *mesh.PathEdit:
		x.Kind = mesh.PathEditKind(g.IntN(4))
		if x.Kind != mesh.ReplaceRegex {
			x.Regex = ""
		}
		if x.Kind == mesh.KeepPath {
			x.Value = ""
		}
	case *mesh.Fraction:
		x.Denominator += x.Numerator
	case *mesh.Redirect:
		x.Status = []uint16{301, 302, 303, 307, 308}[g.IntN(5)]
	case *mesh.Abort:
		x.GRPCStatus %= 17
	case *mesh.SessionPersistence:
		if g.flag() {
			x.Header = ""
		} else {
			x.Cookie = ""
		}
		x.Absolute++
	case *mesh.TrafficPolicy:
		slices.SortFunc(x.Subsets, func(a, b mesh.Subset) int { return strings.Compare(a.Name, b.Name) })
		for i := range x.Subsets {
			x.Subsets[i].Name += strconv.Itoa(i)
		}
	case *[]mesh.PortSettings:
		for i := range *x {
			(*x)[i].Port = uint16(1000*i + 1)
		}
	case *mesh.ConsistentHash:
		x.TableSize = []uint64{0, 65537, 251}[g.IntN(3)]
		one := mesh.ConsistentHash{MinRingSize: x.MinRingSize, TableSize: x.TableSize}
		switch g.IntN(4) {
		case 0:
			one.Header = x.Header
		case 1:
			one.QueryParam = x.QueryParam
		case 2:
			one.SourceIP = true
		case 3:
			if one.Cookie = x.Cookie; x.Cookie == nil {
				one.Cookie = &mesh.HashCookie{Name: "c"}
			}
		}
		*x = one
	case *mesh.Balancer:
		if x.Algorithm = mesh.BalancerAlgorithm(g.IntN(4)); x.Hash != nil {
			x.Algorithm = mesh.BalancerRingHash + mesh.BalancerAlgorithm(g.IntN(2))
		}
	case *mesh.LocalityDistribute:
		x.To = map[string]uint32{"r1/*": 60, "r2/*": 40}
	case *mesh.LocalityBalance:
		if g.flag() {
			x.Distribute = nil
		} else {
			x.Failover, x.FailoverPriority = nil, nil
		}
	case *mesh.HealthCheck:
		x.Interval, x.Timeout = max(time.Second, x.Interval%(24*time.Hour)), time.Second
		x.Unhealthy, x.Healthy, x.Host = max(1, x.Unhealthy), max(1, x.Healthy), "health.example"
		switch x.Protocol %= 3; x.Protocol {
		case mesh.HealthHTTP:
			x.Path, x.Service = "/healthz?full", ""
		case mesh.HealthTCP:
			x.Path, x.Host, x.Service = "", "", ""
		case mesh.HealthGRPC:
			x.Path = ""
		}
	case *mesh.OutlierDetection:
		x.MaxEjected, x.MinHealthy = x.MaxEjected%101, x.MinHealthy%101
	}
}

func routeBytes(t testing.TB, edit func(*route.Route)) []byte {
	m := &route.Route{
		Kind: route.Kind_VIRTUAL_SERVICE, Namespace: "shop", Name: "cart", Protocol: route.Protocol_HTTP,
		Parents: []*route.Parent{{Namespace: "shop", Hostname: "cart"}},
		Action: &route.Route_Http{Http: &route.HTTPRule{
			Matches:  []*route.HTTPMatch{{}},
			Backends: []*route.Backend{{Ref: &route.BackendRef{Namespace: "shop", Hostname: "cart"}}},
		}},
	}
	edit(m)
	return marshal(t, m)
}

func TestBadRoutesAreRefusedByField(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		edit  func(m *route.Route, h *route.HTTPRule)
		field string
	}{
		"no kind":       {func(m *route.Route, _ *route.HTTPRule) { m.Kind = 0 }, "kind: unknown value 0"},
		"a future kind": {func(m *route.Route, _ *route.HTTPRule) { m.Kind = 77 }, "kind: unknown value 77"},
		"no name":       {func(m *route.Route, _ *route.HTTPRule) { m.Name = "" }, "name: is empty"},
		"a protocol that does not fit": {
			func(m *route.Route, _ *route.HTTPRule) { m.Protocol = route.Protocol_TCP }, "http: protocol is tcp",
		},
		"a kind that does not fit": {
			func(m *route.Route, _ *route.HTTPRule) { m.Kind = route.Kind_TCP_ROUTE }, "protocol: is http, and a TCPRoute is tcp",
		},
		"no parent":        {func(m *route.Route, _ *route.HTTPRule) { m.Parents = nil }, "parents: is empty"},
		"a parent's port":  {func(m *route.Route, _ *route.HTTPRule) { m.Parents[0].Port = 65536 }, "parents[0].port: 65536"},
		"no action":        {func(m *route.Route, _ *route.HTTPRule) { m.Action = nil }, "action: neither"},
		"half a second":    {func(m *route.Route, _ *route.HTTPRule) { m.Created = &timestamppb.Timestamp{Nanos: 5} }, "created"},
		"a bad path regex": {func(_ *route.Route, h *route.HTTPRule) { h.Matches[0].Path = pathRegex("(") }, "http.matches[0].path.regex: "},
		"a look-behind, which RE2 has not": {
			func(_ *route.Route, h *route.HTTPRule) { h.Matches[0].Path = pathRegex("(?<=a)b") }, "http.matches[0].path.regex: ",
		},
		"a header without a name": {
			func(_ *route.Route, h *route.HTTPRule) { h.Matches[0].Headers = []*route.NamedMatch{{}} },
			"http.matches[0].headers[0].match: no match type",
		},
		"weights that overflow": {
			func(_ *route.Route, h *route.HTTPRule) {
				h.Backends = append(h.Backends, proto.CloneOf(h.Backends[0]))
				h.Backends[0].Weight, h.Backends[1].Weight = 1<<31, 1<<31
			}, "http.backends: the weights add up to 4294967296",
		},
		"a backend that is nowhere": {
			func(_ *route.Route, h *route.HTTPRule) { h.Backends[0].Ref = nil }, "http.backends[0].ref: names no service",
		},
		"a redirect that is none": {
			func(_ *route.Route, h *route.HTTPRule) { h.Redirect = &route.Redirect{Status: 200} }, "http.redirect.status: 200",
		},
		"a direct response of 100": {
			func(_ *route.Route, h *route.HTTPRule) { h.Direct = &route.DirectResponse{Status: 100} }, "http.direct.status: 100",
		},
		"a negative timeout": {
			func(_ *route.Route, h *route.HTTPRule) { h.Timeout = durationpb.New(-1) }, "http.timeout",
		},
		"a timeout beyond all measure": {
			func(_ *route.Route, h *route.HTTPRule) { h.Timeout = &durationpb.Duration{Seconds: 1e11} }, "http.timeout",
		},
		"more than the whole": {
			func(_ *route.Route, h *route.HTTPRule) {
				h.Mirrors = []*route.Mirror{{Ref: h.Backends[0].Ref, Percent: &route.Fraction{Numerator: 2, Denominator: 1}}}
			}, "http.mirrors[0].percent: 2/1",
		},
		"an unknown reason to retry": {
			func(_ *route.Route, h *route.HTTPRule) { h.Retry = &route.Retry{On: []route.Retry_Condition{99}} }, "http.retry.on[0]: unknown value 99",
		},
		"a status to retry that is none": {
			func(_ *route.Route, h *route.HTTPRule) { h.Retry = &route.Retry{Codes: []uint32{5030}} }, "http.retry.codes[0]: 5030",
		},
		"a header that splits the response": {
			func(_ *route.Route, h *route.HTTPRule) {
				h.Headers = &route.HeaderEdits{Response: &route.HeaderOps{Set: []*route.Header{{Name: "x", Value: "a\r\nset-cookie: b"}}}}
			}, "http.headers.response.set[0].value: holds a control character",
		},
		"a gRPC status that is none": {
			func(_ *route.Route, h *route.HTTPRule) { h.Fault = &route.Fault{GrpcStatus: 17} }, "http.fault.grpc_status: 17",
		},
		"a field of the future": {
			func(_ *route.Route, h *route.HTTPRule) { unknownField(h.Matches[0]) }, "http.matches[0]: holds a field this version does not know",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := wds.DecodeRoute(routeBytes(t, func(m *route.Route) { tc.edit(m, m.GetHttp()) }))
			if got != nil {
				t.Errorf("a route that is refused is still %v", got)
			}
			wantFields(t, err, tc.field)
		})
	}
	if _, err := wds.DecodeRoute(routeBytes(t, func(*route.Route) {})); err != nil {
		t.Errorf("the route without a fault: %v", err)
	}
}

func pathRegex(expr string) *route.PathMatch {
	return &route.PathMatch{MatchType: &route.PathMatch_Regex{Regex: expr}}
}

func TestRoutesThatCannotBeSentAreRefused(t *testing.T) {
	t.Parallel()
	for name, r := range map[string]*mesh.Route{
		"nothing": {},
		"both":    {HTTP: &mesh.HTTPRule{}, Stream: &mesh.StreamRule{}},
		"neither": {Kind: mesh.KindTCPRoute, Protocol: mesh.RouteTCP, Namespace: "a", Name: "b"},
	} {
		if _, err := wds.EncodeRoute(r); err == nil {
			t.Errorf("EncodeRoute of %s: no error", name)
		}
	}
}

func TestBadTrafficPoliciesAreRefusedByField(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		settings *route.Settings
		field    string
	}{
		"a hash without a key": {
			&route.Settings{Balancer: &route.Balancer{Algorithm: route.Balancer_MAGLEV, Hash: &route.ConsistentHash{}}},
			"settings.balancer.hash.key: is empty",
		},
		"maglev without a hash": {
			&route.Settings{Balancer: &route.Balancer{Algorithm: route.Balancer_MAGLEV}}, "settings.balancer.hash: does not go with MAGLEV",
		},
		"a table that is no prime": {
			&route.Settings{Balancer: &route.Balancer{
				Algorithm: route.Balancer_MAGLEV, Hash: &route.ConsistentHash{TableSize: 65536, Key: &route.ConsistentHash_SourceIp{SourceIp: true}},
			}}, "settings.balancer.hash.table_size: 65536",
		},
		"parts that do not add up": {
			&route.Settings{Balancer: &route.Balancer{Locality: &route.LocalityBalance{
				Distribute: []*route.LocalityBalance_Distribute{{From: "a", To: map[string]uint32{"b": 99}}},
			}}}, "settings.balancer.locality.distribute[0].to: the parts add up to 99",
		},
		"an unknown TLS mode": {&route.Settings{Tls: &route.UpstreamTLS{Mode: 9}}, "settings.tls.mode: unknown value 9"},
		"mutual TLS without a certificate": {
			&route.Settings{Tls: &route.UpstreamTLS{Mode: route.UpstreamTLS_MUTUAL}}, "settings.tls.client_certificate",
		},
		"more than everybody ejected": {
			&route.Settings{Outliers: &route.OutlierDetection{MaxEjected: 101}}, "settings.outliers.max_ejected: 101",
		},
		"a negative timeout": {
			&route.Settings{Pool: &route.ConnectionPool{ConnectTimeout: durationpb.New(-1)}}, "settings.pool.connect_timeout",
		},
		"a health check without a path": {
			&route.Settings{Health: &route.HealthCheck{Interval: durationpb.New(10), Timeout: durationpb.New(1), Unhealthy: 1, Healthy: 1}},
			"settings.health: path",
		},
		"a health check all the time": {
			&route.Settings{Health: &route.HealthCheck{Path: "/", Timeout: durationpb.New(1), Unhealthy: 1, Healthy: 1}}, "settings.health: interval",
		},
		"a future health check": {&route.Settings{Health: &route.HealthCheck{Protocol: 9}}, "settings.health.protocol: unknown value 9"},
		"a tunnel to nowhere":   {&route.Settings{Tunnel: &route.ForwardTunnel{TargetHost: "a"}}, "settings.tunnel.target_port: is empty"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := wds.DecodeTrafficPolicy(marshal(t, &route.TrafficPolicy{Namespace: "a", Hostname: "b", Settings: tc.settings}))
			wantFields(t, err, tc.field)
		})
	}
	_, err := wds.DecodeTrafficPolicy(marshal(t, &route.TrafficPolicy{
		Subsets: []*route.Subset{{Name: "v2"}, {Name: "v1"}, {Name: "v1"}}, Ports: []*route.PortSettings{{Port: 0}},
	}))
	wantFields(t, err, "namespace: is empty", "hostname: is empty", "subsets[1].name", "subsets[2].name", "ports[0].port")
}

func FuzzDecodeRoute(f *testing.F) {
	g := gen{rand.New(rand.NewPCG(1, 2))}
	for range 5 {
		r, p := new(mesh.Route), new(mesh.TrafficPolicy)
		g.fill(reflect.ValueOf(r).Elem())
		g.fill(reflect.ValueOf(p).Elem())
		if body, err := wds.EncodeRoute(r); err == nil {
			f.Add(body)
		}
		if body, err := wds.EncodeTrafficPolicy(p); err == nil {
			f.Add(body)
		}
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		if r, err := wds.DecodeRoute(body); err == nil {
			again(t, r, wds.EncodeRoute, wds.DecodeRoute)
		}
		if p, err := wds.DecodeTrafficPolicy(body); err == nil {
			again(t, p, wds.EncodeTrafficPolicy, wds.DecodeTrafficPolicy)
		}
	})
}

// again holds that what was decoded can be sent on and is the same there.
func again[T any](t *testing.T, noun T, encode func(T) ([]byte, error), decode func([]byte) (T, error)) {
	t.Helper()
	body, err := encode(noun)
	if err != nil {
		t.Fatalf("what was decoded cannot be encoded: %v", err)
	}
	got, err := decode(body)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(noun, got, prefixes); diff != "" {
		t.Fatalf("decoded again (-want +got):\n%s", diff)
	}
}
