package waypoint_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/waypoint"
)

// as is an HTTP client whose tunnels are opened by id, from an address, with a header.
func (l *lab) as(id mesh.Identity, from string, h hbone.Header) *http.Client {
	svid := l.ca.SVID(id)
	pool := hbone.NewPool(hbone.PoolConfig{
		Dial: func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
			return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).DialContext(ctx, "tcp", addr.String())
		},
		TLS: func(_ context.Context, to hbone.Target) (*tls.Config, error) {
			return identity.ClientConfig(svid, to.Expect), nil
		},
	})
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, authority string) (net.Conn, error) {
		return pool.Open(ctx, hbone.Target{
			Local: id, Addr: netip.AddrPortFrom(netip.MustParseAddr(l.ip), mesh.PortHBONE), Expect: []mesh.Identity{waypointID},
		}, authority, h)
	}}}
	l.t.Cleanup(func() { c.CloseIdleConnections(); _ = pool.Close() })
	return c
}

func identityOf(namespace, account string) mesh.Identity {
	return mesh.Identity{TrustDomain: "cluster.local", Namespace: namespace, ServiceAccount: account}
}

// TestOnlyTrustedGatewaysSpeakForOthers: what a CONNECT says of the client counts by who says it.
func TestOnlyTrustedGatewaysSpeakForOthers(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(c *waypoint.Config) { c.ClientCert, c.TrustedGateways = true, []string{"edge/ingress"} })
	seen := app(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Header["X-Forwarded-Client-Cert"]) })
	cart := l.service("cart", "10.9.0.1", mesh.AppHTTP1, seen)
	gatewayLabel := map[string]string{"gateway.networking.k8s.io/gateway-name": "g"}
	pod := func(namespace, account, ip string, labels map[string]string) {
		l.workloads(&mesh.Workload{UID: "Kubernetes//Pod/" + namespace + "/" + account, Name: account, Namespace: namespace,
			Addrs: addrs(ip), ServiceAccount: account, Labels: labels})
	}
	user, own, far, edge, plain, root := loopback(), loopback(), loopback(), loopback(), loopback(), loopback()
	pod("web", "user", user, nil)
	pod("shop", "other-gate", own, gatewayLabel)
	pod("far", "gate", far, gatewayLabel)
	pod("edge", "ingress", edge, nil)
	pod("shop", "plain", plain, nil)
	pod("istio-system", "ingress", root, gatewayLabel)

	// Only web/user is let in, and shop/other-gate never.
	publish := func(name string, action mesh.PolicyAction, principal string) {
		t.Helper()
		body, err := wds.EncodePolicy(&mesh.Policy{
			Namespace: "shop", Name: name, Scope: mesh.ScopeWorkload, Action: action,
			Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{
				Principals: []mesh.StringMatch{{Kind: mesh.MatchExact, Value: principal}},
			}}}}}},
		})
		if err != nil {
			t.Fatal(err)
		}
		l.publish(mesh.TypeAuthorization, xds.Resource{Name: "shop/" + name, Body: body})
	}
	publish("user", mesh.Allow, "cluster.local/ns/web/sa/user")
	publish("not-plain", mesh.Deny, "cluster.local/ns/web/sa/front")
	l.guarded(cart, "shop/user", "shop/not-plain")
	l.known("cart")
	l.becomes("closed", "http://10.9.0.1/", http.StatusForbidden)

	forUser := hbone.Header{Forwarded: `for="` + user + `:1234";host=cart.shop.svc.cluster.local`}
	forFront := hbone.Header{Forwarded: `for="127.0.0.1:1234"`}
	forNobody := hbone.Header{Forwarded: `for="203.0.113.9:1234"`}
	const uri = "[By=spiffe://cluster.local/ns/shop/sa/gate;URI=spiffe://cluster.local/ns/%s]"
	for _, c := range []struct {
		why    string
		id     mesh.Identity
		from   string
		header hbone.Header
		status int
		names  string // whom the application is told of
	}{
		{"the client itself", identityOf("web", "user"), user, hbone.Header{}, 200, "web/sa/user"},
		{"it names somebody else", identityOf("web", "user"), user, forFront, 200, "web/sa/user"},
		{"a gateway of the waypoint's namespace", identityOf("shop", "other-gate"), own, forUser, 200, "web/sa/user"},
		{"the same, for nobody", identityOf("shop", "other-gate"), own, hbone.Header{}, 403, ""},
		{"the same, for somebody unknown", identityOf("shop", "other-gate"), own, forNobody, 403, ""},
		{"the same, for whom is denied", identityOf("shop", "other-gate"), own, forFront, 403, ""},
		{"another namespace's gateway", identityOf("far", "gate"), far, forUser, 403, ""},
		{"one that was named to be trusted", identityOf("edge", "ingress"), edge, forUser, 200, "web/sa/user"},
		{"the root namespace's", identityOf("istio-system", "ingress"), root, forUser, 200, "web/sa/user"},
		{"no gateway", identityOf("shop", "plain"), plain, forUser, 403, ""},
		{"no gateway, at a gateway's address", identityOf("shop", "plain"), own, forUser, 403, ""},
		{"the client, through what did not open the tunnel", identityOf("web", "user"), far, forUser, 200, "web/sa/user"},
		{"no address", identityOf("shop", "other-gate"), own, hbone.Header{Forwarded: "for=unknown"}, 403, ""},
		{"the first counts", identityOf("shop", "other-gate"), own,
			hbone.Header{Forwarded: `for="` + user + `:1";by=x, for="127.0.0.1:1"`}, 200, "web/sa/user"},
	} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://10.9.0.1/", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Forwarded-Client-Cert", "URI=spiffe://forged")
		resp, err := l.as(c.id, c.from, c.header).Do(req)
		if err != nil {
			t.Errorf("%s: %v", c.why, err)
			continue
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != c.status || c.names != "" && string(body) != fmt.Sprintf(uri, c.names) {
			t.Errorf("%s: %d %s, want %d, a certificate of %q", c.why, resp.StatusCode, body, c.status, c.names)
		}
	}
}
