package cli_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/cli"
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
		{[]string{"GET", "card"}, 1, "mistctl: no service is called card\n"},
		{[]string{"GET", "cart", "-H", "x-user"}, 1, "mistctl: -H \"x-user\": want NAME: VALUE\n"},
	} {
		code, out := offline(t, shop, append([]string{"explain", "-f", "FILE"}, tt.args...)...)
		if code != tt.code || out != tt.want {
			t.Errorf("explain %q = %d %q, want %d %q", tt.args, code, out, tt.code, tt.want)
		}
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
	} {
		if code, out := offline(t, tt.yaml, "analyze", "FILE"); code != 1 || !strings.Contains(out, tt.want) {
			t.Errorf("analyze = %d %q, want 1 and %q", code, out, tt.want)
		}
	}
}
