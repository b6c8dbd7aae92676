package yamldir_test

import (
	"slices"
	"strconv"
	"strings"
	"testing"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/yamldir"
)

// FuzzParse: whatever is in a file, every object that comes out has a name, a place and a value, and nothing panics.
func FuzzParse(f *testing.F) {
	f.Add(podYAML + "---\n" + policyYAML)
	f.Add("a: &a [*a]\n")
	f.Add("apiVersion: v1\nkind: Pod\nmetadata: &m\n  <<: *m\n  name: x\n")
	f.Add("apiVersion: v1\nkind: Pod\nmetadata: &m\n  <<: [*m, *m, *m]\n  x: {<<: [*m, *m]}\n")
	f.Add("apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: List, items: []}, 1, null]\n")
	f.Add("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: x}\nspec: {portLevelMtls: {8080: {mode: STRICT}, x: null}}\n")
	f.Add("--- {apiVersion: v1, kind: Service, metadata: {name: x}, spec: {ports: [{port: 1e9, targetPort: {}}]}}\n...\n---\n\t")
	f.Fuzz(func(t *testing.T, content string) {
		objects, problems := yamldir.Parse("f.yaml", []byte(content))
		for _, o := range objects {
			if o.Key.Name == "" || o.Key.Kind == "" || o.Line < 1 || o.Value == nil {
				t.Errorf("object %+v lacks something", o)
			}
		}
		for _, p := range problems {
			if p.Reason == "" || p.Line < 1 {
				t.Errorf("problem %+v lacks something", p)
			}
		}
	})
}

func TestAliasesAndMergedMappings(t *testing.T) {
	objects, problems := yamldir.Parse("f.yaml", []byte(`apiVersion: v1
kind: Pod
metadata:
  name: x
  labels: &labels {app: x, tier: front}
  annotations: {<<: *labels, app: y}
`))
	if len(problems) > 0 || len(objects) != 1 {
		t.Fatalf("Parse = %v, %v, want one object", objects, problems)
	}
	meta, ok := objects[0].Value.(interface{ GetAnnotations() map[string]string })
	if !ok || meta.GetAnnotations()["app"] != "y" || meta.GetAnnotations()["tier"] != "front" {
		t.Errorf("annotations = %v, want the merged ones below its own", meta.GetAnnotations())
	}
}

func TestBombIsRefused(t *testing.T) {
	var b strings.Builder
	b.WriteString("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n")
	for i := range 9 {
		n, m := string(rune('0'+i)), string(rune('1'+i))
		b.WriteString("a" + m + ": &a" + m + " [" + strings.Repeat("*a"+n+", ", 9) + "*a" + n + "]\n")
	}
	objects, problems := yamldir.Parse("f.yaml", []byte(b.String()))
	if len(objects) != 0 || len(problems) != 1 || !strings.Contains(problems[0].Reason, "too large") {
		t.Errorf("Parse = %v, %v, want it refused as too large", objects, problems)
	}
}

func TestLongList(t *testing.T) {
	var b strings.Builder
	b.WriteString("apiVersion: v1\nkind: PodList\nitems:\n")
	const pods = 9_000
	for i := range pods {
		b.WriteString("- {apiVersion: v1, kind: Pod, metadata: {name: p" + strings.Repeat("x", i%50) + "-" + strconv.Itoa(i) + "}, spec: {containers: [{name: a, image: b, ports: [{containerPort: 80}]}], nodeName: n, serviceAccountName: s}}\n")
	}
	objects, problems := yamldir.Parse("f.yaml", []byte(b.String()))
	if len(objects) != pods || len(problems) != 0 {
		t.Errorf("Parse = %d objects, %v, want %d", len(objects), problems, pods)
	}
}

// TestGatewayAPI: its kinds are decoded in every version, held to their fields, and what else it has is passed over.
func TestGatewayAPI(t *testing.T) {
	const text = `
apiVersion: gateway.networking.k8s.io/v1beta1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: web, port: 80}]
  rules: [{matches: [{path: {type: PathPrefix, value: /}}], timeouts: {request: 1s}, backendRefs: [{name: web, port: 80, weight: 3}]}]
---
apiVersion: gateway.networking.k8s.io/v1alpha2
kind: TLSRoute
metadata: {name: tls, namespace: shop}
spec: {hostnames: [a.example], rules: [{backendRefs: [{name: web, port: 443}]}]}
---
{apiVersion: gateway.networking.k8s.io/v1, kind: GatewayClass, metadata: {name: istio-waypoint}, spec: {controllerName: istio.io/mesh-controller}}
---
{apiVersion: gateway.networking.k8s.io/v1alpha2, kind: UDPRoute, metadata: {name: udp, namespace: shop}, spec: {rules: []}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: slip, namespace: shop}
spec: {rules: [{backendRefs: [{name: web, wieght: 3}]}]}
`
	objects, problems := yamldir.Parse("f.yaml", []byte(text))
	var got []string
	for _, o := range objects {
		got = append(got, o.Key.String())
	}
	if want := []string{"HTTPRoute shop/web", "TLSRoute shop/tls", "GatewayClass istio-waypoint"}; !slices.Equal(got, want) {
		t.Errorf("objects = %q, want %q", got, want)
	}
	if r := objects[0].Value.(*gatewayv1.HTTPRoute); *r.Spec.Rules[0].BackendRefs[0].Weight != 3 {
		t.Errorf("route was not decoded: %v", r)
	}
	if len(problems) != 1 || !strings.Contains(problems[0].Reason, `did you mean "weight"?`) {
		t.Errorf("problems = %v, want that of the misspelt weight", problems)
	}
}
