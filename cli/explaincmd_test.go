package cli_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/cli"
	"github.com/mistnet/mistnet/cli/fakeapi"
)

const shop = `
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: cart, namespace: shop}
spec:
  hosts: [cart]
  http:
  - match: [{headers: {x-user: {exact: ann}}}]
    directResponse: {status: 200, body: {string: hello}}
  - directResponse: {status: 410}
`

// offline runs a command on a file, FILE, and returns its status and everything it said.
func offline(t *testing.T, yaml string, args ...string) (int, string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "mesh.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for i, a := range args {
		args[i] = strings.Replace(a, "FILE", file, 1)
	}
	code := cli.Main(t.Context(), args, &out, &out)
	return code, out.String()
}

func TestExplainNamesTheRuleAndWhatFollows(t *testing.T) {
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"GET", "http://cart.shop/x", "-H", "X-User: ann"}, 0, "rule: VirtualService/shop/cart/http/0\nanswer 200 \"hello\"\n"},
		{[]string{"GET", "cart"}, 0, "rule: VirtualService/shop/cart/http/1\nanswer 410 \"\"\n"},
		{[]string{"GET", "cart:81"}, 1, "mistctl: service shop/cart.shop.svc.cluster.local has no port 81\n"},
		{[]string{"cart"}, 1, "mistctl: want METHOD and URL, as in mistctl explain GET http://cart.shop/v2\n"},
		{[]string{"GET", "card"}, 1, "mistctl: no service is called card\n"},
		{[]string{"GET", "cart", "-H", "x-user"}, 1, "mistctl: -H \"x-user\": want NAME: VALUE\n"},
	} {
		code, out := offline(t, shop, append([]string{"explain", "-f", "FILE"}, tt.args...)...)
		if code != tt.code || out != tt.want {
			t.Errorf("explain %q = %d %q, want %d %q", tt.args, code, out, tt.code, tt.want)
		}
	}
}

// Files are called as they were on the command line, wherever they are, and two of almost one name are two.
func TestAnalyzeNamesFiles(t *testing.T) {
	dir := t.TempDir()
	for _, file := range []string{"a/b.yaml", "a_b.yaml", "a/work/c.yaml"} {
		path := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(shop), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(filepath.Join(dir, "a", "work"))
	var out bytes.Buffer
	code := cli.Main(t.Context(), []string{"analyze", "..", dir + "/a_b.yaml"}, &out, &out)
	want := ""
	for _, o := range []string{"../b.yaml:2 Service", "../b.yaml:7 VirtualService", "../work/c.yaml:2 Service", "../work/c.yaml:7 VirtualService"} {
		file, _, _ := strings.Cut(o, " ")
		_, line, _ := strings.Cut(file, ":")
		want += fmt.Sprintf("%s shop/cart: Refused: already defined in %s/a_b.yaml at line %s, which wins\n", o, dir, line)
	}
	want += "mistctl: 4 problems\n"
	if code != 1 || out.String() != want {
		t.Errorf("analyze = %d\n%s\nwant 1\n%s", code, out.String(), want)
	}
}

func TestAnalyzeTellsWhatDoesNotDoWhatItSays(t *testing.T) {
	if code, out := offline(t, shop, "analyze", "FILE"); code != 0 || out != "no problem found\n" {
		t.Errorf("analyze = %d %q, want nothing to complain about", code, out)
	}
	for _, tt := range []struct{ yaml, want string }{
		{strings.Replace(shop, "directResponse: {status: 410}", "retries: {attempts: 1}", 1), "VirtualService shop/cart: Invalid: "},
		{strings.Replace(shop, "hosts: [cart]", "hosts: [card]", 1), "VirtualService shop/cart: Ignored: "},
		{strings.Replace(shop, "[{headers: {x-user: {exact: ann}}}]", "[]", 1),
			"VirtualService shop/cart: hidden: http rule 1: VirtualService/shop/cart/http/0 comes first and takes all of it\n"},
		{strings.Replace(shop, "hosts: [cart]", "host: [cart]", 1), "mesh.yaml:"},
		{strings.Replace(shop, "directResponse: {status: 410}", "route: [{destination: {host: cart, subset: v9}}]", 1),
			"VirtualService shop/cart: SubsetNotFound: http rule 1: no DestinationRule says what subset v9 of cart.shop.svc.cluster.local is"},
		{shop + "---\n{apiVersion: networking.istio.io/v1alpha3, kind: EnvoyFilter, metadata: {name: limit, namespace: shop}, spec: {}}\n",
			"mesh.yaml:17 EnvoyFilter shop/limit: Ignored: has no effect: "},
		{shop + "---\n{apiVersion: security.istio.io/v1, kind: RequestAuthentication, metadata: {name: jwt}, spec: {}}\n",
			" RequestAuthentication default/jwt: Ignored: has no effect: "},
	} {
		if code, out := offline(t, tt.yaml, "analyze", "FILE"); code != 1 || !strings.Contains(out, tt.want) {
			t.Errorf("analyze = %d %q, want 1 and %q", code, out, tt.want)
		}
	}
}

// What Istio's ingress would serve is named, and what is for other controllers is not.
func TestAnalyzeTellsOfTheEdge(t *testing.T) {
	const edge = shop + `---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: front, namespace: shop}
spec: {gatewayClassName: CLASS, listeners: [{name: http, port: 80, protocol: HTTP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart, namespace: shop}
spec: {parentRefs: [{name: PARENT}], rules: [{backendRefs: [{name: cart, port: 80}]}]}
`
	for _, tt := range []struct {
		class, parent string
		code          int
		want          string
	}{
		{"istio", "front", 1, "Gateway shop/front: Ignored: has no effect: Gateways of class istio are not served yet, only waypoints are; " +
			"leave it to another controller\nHTTPRoute shop/cart: Ignored: parentRefs[0]: has no effect: Gateway shop/front is of class istio, " +
			"which is not served yet; rules of the mesh have a Service as parent\nmistctl: 2 problems\n"},
		{"nginx", "front", 0, "no problem found\n"},
		{"nginx", "back", 1, "HTTPRoute shop/cart: ParentNotFound: parentRefs[0]: there is no Gateway shop/back; " +
			"rules of the mesh have a Service as parent\nmistctl: 1 problem\n"},
	} {
		code, out := offline(t, strings.NewReplacer("CLASS", tt.class, "PARENT", tt.parent).Replace(edge), "analyze", "FILE")
		if code != tt.code || out != tt.want {
			t.Errorf("analyze of a Gateway of class %s = %d\n%s\nwant %d\n%s", tt.class, code, out, tt.code, tt.want)
		}
	}
	// A wildcard that everybody else has taken is told apart from one that stands for nothing.
	star := shop + "---\n{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: star, namespace: shop}, " +
		"spec: {hosts: ['*'], http: [{directResponse: {status: 200}}]}}\n"
	if _, out := offline(t, star, "analyze", "FILE"); !strings.Contains(out, "hosts[0]: of the services that * covers none is left") {
		t.Errorf("analyze of a wildcard with nothing left = %q", out)
	}
}

// A policy for pods that are behind a waypoint never sees who calls them.
func TestAnalyzeTellsOfCallersThatAreNotSeen(t *testing.T) {
	const mesh = `
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gate, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop, labels: {istio.io/use-waypoint: gate}}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: cart-1, namespace: shop, labels: {app: cart}}
spec: {serviceAccountName: cart, nodeName: n1, containers: [{name: app}]}
status: {phase: Running, podIP: 10.244.1.2, podIPs: [{ip: 10.244.1.2}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-web, namespace: shop}
spec: {selector: {matchLabels: {app: cart}}, action: DENY, rules: [{from: [{source: SOURCE}]}]}
`
	for _, tt := range []struct {
		source, yaml string
		warned       bool
	}{
		{`{principals: [cluster.local/ns/shop/sa/web]}`, mesh, true},
		{`{namespaces: [lab]}`, mesh, true},
		{`{serviceAccounts: [shop/web]}`, mesh, true},
		{`{principals: [cluster.local/ns/shop/sa/gate]}`, mesh, false},
		{`{serviceAccounts: [web, gate]}`, mesh, false},
		{`{namespaces: [shop]}`, mesh, false},
		{`{principals: ["cluster.local/ns/shop/*"]}`, mesh, false},
		{`{notPrincipals: ["*"]}`, mesh, false},
		{`{ipBlocks: [192.0.2.1]}`, mesh, false},
		{`{principals: [cluster.local/ns/shop/sa/web]}`, strings.Replace(mesh, "istio.io/use-waypoint: gate", "app: cart", 1), false},
		{`{principals: [cluster.local/ns/shop/sa/web]}`,
			strings.Replace(mesh, "selector: {matchLabels: {app: cart}}", `targetRefs: [{group: "", kind: Service, name: cart}]`, 1), false},
	} {
		code, out := offline(t, strings.Replace(tt.yaml, "SOURCE", tt.source, 1), "analyze", "FILE")
		want := "no problem found\n"
		if tt.warned {
			want = "AuthorizationPolicy shop/no-web: BehindWaypoint: none of its sources is waypoint shop/gate, and whoever calls Service shop/cart " +
				"comes as that one: name the Service by targetRefs, instead of selector, to have the waypoint judge its callers\nmistctl: 1 problem\n"
		}
		if out != want {
			t.Errorf("analyze with source %s = %d\n%s\nwant\n%s", tt.source, code, out, want)
		}
	}
}

// TestAnalyzeAndExplainACluster asks about what an API server has, and what a file would change in it.
func TestAnalyzeAndExplainACluster(t *testing.T) {
	t.Parallel()
	api := fakeapi.New(t)
	config := api.Kubeconfig(t)
	const born = "2026-01-02T03:04:05Z"
	api.Put("/api/v1/namespaces/shop/services/cart", object{"apiVersion": "v1", "kind": "Service",
		"metadata": object{"name": "cart", "namespace": "shop", "creationTimestamp": born},
		"spec":     object{"clusterIP": "10.96.0.1", "ports": []any{object{"name": "http", "port": 80}}}})
	rule := func(status int) []any { return []any{object{"directResponse": object{"status": status}}} }
	api.Put("/apis/networking.istio.io/v1/namespaces/shop/virtualservices/cart", object{"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
		"metadata": object{"name": "cart", "namespace": "shop", "creationTimestamp": born},
		"spec":     object{"hosts": []any{"cart"}, "http": rule(410)}})
	api.Put("/apis/networking.istio.io/v1/namespaces/lab/virtualservices/lost", object{"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
		"metadata": object{"name": "lost", "namespace": "lab", "creationTimestamp": born},
		"spec":     object{"hosts": []any{"nobody"}, "http": rule(410)}})

	api.Put("/apis/networking.istio.io/v1alpha3/namespaces/lab/envoyfilters/limit", object{"apiVersion": "networking.istio.io/v1alpha3",
		"kind": "EnvoyFilter", "metadata": object{"name": "limit", "namespace": "lab"}, "spec": object{}})

	dir := t.TempDir()
	later, instead := filepath.Join(dir, "later.yaml"), filepath.Join(dir, "instead.yaml")
	const vs = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: %s, namespace: shop}\n" +
		"spec: {hosts: [cart], http: [{directResponse: {status: 200}}]}\n"
	for file, name := range map[string]string{later: "later", instead: "cart"} {
		if err := os.WriteFile(file, fmt.Appendf(nil, vs, name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"analyze"}, 1, "VirtualService lab/lost: Ignored: "},
		{[]string{"analyze"}, 1, "EnvoyFilter lab/limit: Ignored: has no effect: "},
		{[]string{"analyze", "-n", "shop"}, 0, "no problem found\n"},
		{[]string{"analyze", "--live", "-n", "shop", later}, 1, "VirtualService shop/later: hidden: http rule 0: VirtualService/shop/cart/http/0 comes first and takes all of it\n"},
		{[]string{"explain", "GET", "cart.shop"}, 0, "rule: VirtualService/shop/cart/http/0\nanswer 410 \"\"\n"},
		{[]string{"explain", "GET", "cart.shop", "--live", "-f", later}, 0, "rule: VirtualService/shop/cart/http/0\nanswer 410 \"\"\n"},
		{[]string{"explain", "GET", "cart.shop", "--live", "-f", instead}, 0, "rule: VirtualService/shop/cart/http/0\nanswer 200 \"\"\n"},
		{[]string{"explain", "GET", "cart.shop", "-f", later}, 1, ""},
	} {
		code, out, errOut := mistctl(t, append(tt.args, "--kubeconfig", config)...)
		if code != tt.code || !strings.Contains(out, tt.want) {
			t.Errorf("%q = %d %q %q, want %d and %q", tt.args, code, out, errOut, tt.code, tt.want)
		}
	}
	api.Deny = func(_, plural string) bool { return plural == "virtualservices" }
	if code, _, errOut := mistctl(t, "analyze", "--kubeconfig", config); code != 1 || !strings.Contains(errOut, "VirtualService") {
		t.Errorf("without leave to list: %d %q", code, errOut)
	}
}
