package translate_test

import (
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayxv1alpha1 "sigs.k8s.io/gateway-api/apisx/v1alpha1"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/yamldir"
	"github.com/mistnet/mistnet/istiod/translate"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// configs are those of files that are not for a mesh as it comes.
var configs = map[string]translate.Config{
	"meshdefaults.yaml": {VirtualServiceExportTo: []string{"."}, DestinationRuleExportTo: []string{"two"}, TryTimeout: time.Second,
		Retry: &mesh.Retry{Attempts: 7, On: mesh.RetryOnReset}},
}

// TestGolden translates every testdata/*.yaml and compares the nouns with the .golden file beside it.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no testdata: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			nouns := translate.All(configs[filepath.Base(file)].WithDefaults(), load(t, file))
			onWire(t, nouns)
			got := dump(nouns)
			golden := strings.TrimSuffix(file, ".yaml") + ".golden"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", golden, diff)
			}
		})
	}
}

// onWire checks that every noun survives the wire and every policy compiles.
func onWire(t *testing.T, n translate.Nouns) {
	t.Helper()
	for _, w := range n.Workloads {
		body, err := wds.EncodeWorkload(w)
		if err != nil {
			t.Errorf("encode: %v", err)
			continue
		}
		back, err := wds.DecodeAddress(body)
		if err != nil {
			t.Errorf("decode: %v", err)
			continue
		}
		if diff := cmp.Diff(w, back.Workload, sameAddrs); diff != "" {
			t.Errorf("workload %s changed on the wire:\n%s", w.UID, diff)
		}
	}
	for _, s := range n.Services {
		body, err := wds.EncodeService(s)
		if err != nil {
			t.Errorf("encode: %v", err)
			continue
		}
		back, err := wds.DecodeAddress(body)
		if diff := cmp.Diff(s, back.Service, sameAddrs); diff != "" || err != nil {
			t.Errorf("service %s changed on the wire: %v\n%s", s.Key(), err, diff)
		}
	}
	overTheWire(t, n.Routes, wds.EncodeRoute, wds.DecodeRoute)
	overTheWire(t, n.Traffic, wds.EncodeTrafficPolicy, wds.DecodeTrafficPolicy)
	for _, c := range n.Credentials {
		overTheWire(t, map[string]*mesh.Credential{c.Key(): &c.Credential}, wds.EncodeCredential, wds.DecodeCredential)
	}
	for _, p := range n.Policies {
		p = translate.Enforceable(p)
		body, err := wds.EncodePolicy(p)
		if err != nil {
			t.Errorf("encode: %v", err)
			continue
		}
		back, err := wds.DecodePolicy(body)
		if diff := cmp.Diff(p, back, sameAddrs, cmpopts.EquateEmpty()); diff != "" || err != nil {
			t.Errorf("policy %s changed on the wire: %v\n%s", p.Key(), err, diff)
		}
		if _, err := authz.Compile([]*mesh.Policy{p}); err != nil {
			t.Errorf("compile: %v", err)
		}
	}
}

// overTheWire encodes and decodes every noun of a map, and compares.
func overTheWire[V any](t *testing.T, nouns map[string]*V, encode func(*V) ([]byte, error), decode func([]byte) (*V, error)) {
	t.Helper()
	for key, noun := range nouns {
		body, err := encode(noun)
		if err != nil {
			t.Errorf("encode: %v", err)
			continue
		}
		back, err := decode(body)
		if diff := cmp.Diff(noun, back, sameAddrs, cmpopts.EquateEmpty()); diff != "" || err != nil {
			t.Errorf("%s changed on the wire: %v\n%s", key, err, diff)
		}
	}
}

// sameAddrs compares netip's values, which cmp must not look into.
var sameAddrs = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

// load reads a file into objects; the test fails on any that is refused.
func load(t *testing.T, file string) translate.Objects {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	objects, problems := yamldir.Parse(file, content)
	for _, p := range problems {
		t.Errorf("%s:%d: %s", p.File, p.Line, p.Reason)
	}
	return collect(objects)
}

func collect(objects []yamldir.Object) translate.Objects {
	o := translate.NewObjects()
	for _, obj := range objects {
		name := translate.Name{Namespace: obj.Key.Namespace, Name: obj.Key.Name}
		switch v := obj.Value.(type) {
		case *corev1.Namespace:
			o.Namespaces[name.Name] = v
		case *corev1.Node:
			o.Nodes[name.Name] = v
		case *corev1.Pod:
			o.Pods[name] = v
		case *corev1.Service:
			o.Services[name] = v
		case *discoveryv1.EndpointSlice:
			o.EndpointSlices[name] = v
		case *securityv1.AuthorizationPolicy:
			o.AuthorizationPolicies[name] = v
		case *securityv1.PeerAuthentication:
			o.PeerAuthentications[name] = v
		case *networkingv1.ServiceEntry:
			o.ServiceEntries[name] = v
		case *networkingv1.WorkloadEntry:
			o.WorkloadEntries[name] = v
		case *networkingv1.VirtualService:
			o.VirtualServices[name] = v
		case *networkingv1.DestinationRule:
			o.DestinationRules[name] = v
		case *gatewayv1.HTTPRoute:
			o.HTTPRoutes[name] = v
		case *gatewayv1.GRPCRoute:
			o.GRPCRoutes[name] = v
		case *gatewayv1.TCPRoute:
			o.TCPRoutes[name] = v
		case *gatewayv1.TLSRoute:
			o.TLSRoutes[name] = v
		case *gatewayv1.Gateway:
			o.Gateways[name] = v
		case *gatewayv1.GatewayClass:
			o.GatewayClasses[name.Name] = v
		case *gatewayv1.ReferenceGrant:
			o.ReferenceGrants[name] = v
		case *corev1.ConfigMap:
			o.ConfigMaps[name] = v
		case *corev1.Secret:
			o.Secrets[name] = translate.TrimSecret(v)
		case *gatewayv1.BackendTLSPolicy:
			o.BackendTLSPolicies[name] = v
		case *gatewayxv1alpha1.XBackendTrafficPolicy:
			o.BackendTrafficPolicies[name] = v
		}
	}
	return o
}

// dump writes nouns as text, leaving out what is zero.
func dump(n translate.Nouns) string {
	var b strings.Builder
	section(&b, "workload", n.Workloads)
	section(&b, "service", n.Services)
	section(&b, "policy", n.Policies)
	section(&b, "traffic", n.Traffic)
	section(&b, "credential", n.Credentials)
	section(&b, "route", n.Routes)
	section(&b, "status", n.Statuses)
	section(&b, "routestatus", n.RouteStatuses)
	section(&b, "conditions", n.Conditions)
	return b.String()
}

func section[V any](b *strings.Builder, what string, m map[string]*V) {
	for _, key := range slices.Sorted(maps.Keys(m)) {
		fmt.Fprintf(b, "%s %s\n", what, key)
		write(b, reflect.ValueOf(m[key]).Elem(), "  ")
	}
}

func write(b *strings.Builder, v reflect.Value, indent string) {
	for i := range v.NumField() {
		f, name := v.Field(i), v.Type().Field(i).Name
		if f.Kind() == reflect.Pointer && !f.IsNil() {
			if f = f.Elem(); f.IsZero() {
				fmt.Fprintf(b, "%s%s: zero\n", indent, name) // which is not nothing
				continue
			}
		}
		switch {
		case f.IsZero():
		case f.Type() == reflect.TypeFor[[]byte]():
			fmt.Fprintf(b, "%s%s: %q\n", indent, name, f.Bytes())
		case f.Type() == reflect.TypeFor[mesh.PrivateKey]():
			element(b, f, indent, name)
		case f.Kind() == reflect.Slice:
			for j := range f.Len() {
				element(b, f.Index(j), indent, fmt.Sprintf("%s[%d]", name, j))
			}
		default:
			element(b, f, indent, name)
		}
	}
}

func element(b *strings.Builder, v reflect.Value, indent, name string) {
	if s, ok := v.Interface().(fmt.Stringer); ok {
		fmt.Fprintf(b, "%s%s: %s\n", indent, name, s)
		return
	}
	if v.Kind() != reflect.Struct {
		fmt.Fprintf(b, "%s%s: %v\n", indent, name, v.Interface())
		return
	}
	fmt.Fprintf(b, "%s%s:\n", indent, name)
	write(b, v, indent+"  ")
}
