package istiod_test

import (
	"context"
	"maps"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

// told is what a caller learns of traffic policies and credentials.
type told struct {
	mu    sync.Mutex
	names map[string]bool // type and name
	keys  map[string]string
}

func (o *told) has(name string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.names[name]
}

func (l *lab) listen(namespace, account string) *told {
	l.t.Helper()
	o := &told{names: make(map[string]bool), keys: make(map[string]string)}
	token := l.token("-service-account", namespace+"/"+account, "-node", "n1")
	c := xds.NewClient(xds.ClientConfig{
		Target: l.d.XDSAddr().String(), TLS: l.tls(), Token: func(context.Context) (string, error) { return token, nil },
		Node:          &core.Node{Id: "waypoint~10.0.0.1~x." + namespace + "~" + namespace + ".svc.cluster.local"},
		Subscriptions: []xds.Subscription{{TypeURL: mesh.TypeCredential, Wildcard: true}, {TypeURL: mesh.TypeTrafficPolicy, Wildcard: true}},
		Apply: func(_ context.Context, u xds.Update) []xds.Rejection {
			o.mu.Lock()
			defer o.mu.Unlock()
			for _, r := range u.Upserts {
				o.names[u.TypeURL+" "+r.Name] = true
				if c, err := wds.DecodeCredential(r.Body); u.TypeURL == mesh.TypeCredential && err == nil {
					o.keys[r.Name] = string(c.PrivateKey)
				}
			}
			for _, name := range u.Removes {
				delete(o.names, u.TypeURL+" "+name)
				delete(o.keys, name)
			}
			return nil
		},
	})
	ctx, cancel := context.WithCancel(l.t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	l.t.Cleanup(func() { cancel(); <-done })
	return o
}

// TestCredentialsGoToWaypointsOnly: of all callers, those of the namespace and the root's own among them, only the account of the
// waypoint is given what a DestinationRule names; no page shows it.
func TestCredentialsGoToWaypointsOnly(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	text, err := os.ReadFile("translate/testdata/credentials.yaml")
	if err != nil {
		t.Fatal(err)
	}
	l.write(l.dir, "credentials.yaml", string(text))
	l.start()
	const mutual, cert = mesh.TypeTrafficPolicy + " /shop/mutual.shop.svc.cluster.local", mesh.TypeCredential + " shop/tls"
	gate := l.listen("shop", "gate")
	strangers := map[string]*told{
		"another account": l.listen("shop", "liar"), "an alike one": l.listen("shop", "gate-2"), "a waypoint of another namespace": l.listen("other", "gate"),
		"the root namespace": l.listen("istio-system", "ztunnel"),
	}
	until(t, "the waypoint has it", func() bool { return gate.has(cert) && gate.has(mutual) })
	gate.mu.Lock()
	keys := maps.Clone(gate.keys)
	gate.mu.Unlock()
	if len(keys) != 4 || !strings.Contains(keys["shop/tls"], "PRIVATE KEY") || keys["shop/roots"] != "" {
		t.Errorf("the waypoint has %d credentials, want 4, one without a key", len(keys))
	}
	secret := strings.Split(keys["shop/tls"], "\n")[1]

	l.write(l.dir, "svc.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: end, namespace: shop}\nspec: {clusterIP: 10.96.9.9, ports: [{port: 80}]}\n---\n"+
		"apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: last, namespace: shop}\nspec: {host: end, subsets: [{name: a}]}\n")
	for who, o := range strangers { // and nothing later
		until(t, who+" is up to date", func() bool { return o.has(mutual) && o.has(mesh.TypeTrafficPolicy+" /shop/end.shop.svc.cluster.local") })
		o.mu.Lock()
		if len(o.keys) > 0 {
			t.Errorf("%s was given %d credentials", who, len(o.keys))
		}
		for name := range o.names {
			if strings.HasPrefix(name, mesh.TypeCredential) {
				t.Errorf("%s was told of %s", who, name)
			}
		}
		o.mu.Unlock()
	}
	for _, page := range []string{"/debug/nouns", "/debug/objects", "/debug/problems", "/debug/xds", "/metrics"} {
		if code, body := l.page(page); code != 200 || strings.Contains(body, secret) {
			t.Errorf("%s: %d, or it has the key", page, code)
		}
	}

	l.write(l.dir, "credentials.yaml", strings.ReplaceAll(string(text), "nodeName: n1, serviceAccountName: gate", "nodeName: n1, serviceAccountName: gate-2"))
	until(t, "who took the waypoint over has it", func() bool { return strangers["an alike one"].has(cert) && !gate.has(cert) })
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	end := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("never: %s", what)
		}
	}
}
