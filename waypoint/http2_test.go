package waypoint_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint"
)

// client2 speaks HTTP/2 with prior knowledge through the tunnel.
func (l *lab) client2() *http.Client {
	tr := &http.Transport{
		Protocols:   new(http.Protocols),
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) { return l.open(ctx, addr) },
	}
	tr.Protocols.SetUnencryptedHTTP2(true)
	l.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// app2 starts an application that speaks HTTP/2 with prior knowledge, and HTTP/1.1 if plain says so.
func app2(t *testing.T, plain bool, h http.HandlerFunc) netip.AddrPort {
	t.Helper()
	ln := listen(t, loopback()+":0")
	srv := &http.Server{Handler: h, Protocols: new(http.Protocols)}
	srv.Protocols.SetUnencryptedHTTP2(true)
	srv.Protocols.SetHTTP1(plain)
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(func() { srv.Close() })
	return addrPort(ln.Addr())
}

// version says how it was asked.
func version(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	w.Header().Set("Trailer", "X-End")
	w.Header().Set("X-Cookie", r.Header.Get("Cookie"))
	fmt.Fprintf(w, "%s %s %s%s %s", r.Proto, r.Method, r.Host, r.URL.RequestURI(), body)
	w.Header().Set("X-End", r.Trailer.Get("X-Sum"))
}

// TestVersionsOfHTTP: what a client speaks, what a port is declared as, and what reaches the application.
func TestVersionsOfHTTP(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(c *waypoint.Config) { c.SniffTimeout = 5 * time.Second })
	l.service("plain", "10.9.0.1", mesh.AppHTTP1, app2(t, true, version))
	l.service("two", "10.9.0.2", mesh.AppHTTP2, app2(t, true, version))
	l.service("grpc", "10.9.0.3", mesh.AppGRPC, app2(t, true, version))
	l.service("unknown", "10.9.0.4", mesh.AppUnknown, app2(t, true, version))
	l.service("upgrade", "10.9.0.5", mesh.AppHTTP1, app2(t, true, version))
	l.service("follow", "10.9.0.6", mesh.AppHTTP1, app2(t, true, version))
	l.service("followed", "10.9.0.7", mesh.AppHTTP2, app2(t, true, version))
	l.known("plain", "two", "grpc", "unknown", "upgrade", "follow", "followed")
	l.traffic("upgrade", mesh.TrafficSettings{Pool: &mesh.ConnectionPool{Upgrade: mesh.H2UpgradeAlways}})
	l.traffic("follow", mesh.TrafficSettings{Pool: &mesh.ConnectionPool{UseClientProtocol: true}})
	l.traffic("followed", mesh.TrafficSettings{Pool: &mesh.ConnectionPool{UseClientProtocol: true}})
	one, two := l.client, l.client2()
	for _, c := range []struct {
		service  string
		client   *http.Client
		upstream string
	}{
		{"10.9.0.1", one, "HTTP/1.1"}, {"10.9.0.1", two, "HTTP/1.1"},
		{"10.9.0.2", one, "HTTP/2.0"}, {"10.9.0.2", two, "HTTP/2.0"},
		{"10.9.0.3", one, "HTTP/2.0"}, {"10.9.0.3", two, "HTTP/2.0"},
		{"10.9.0.4", one, "HTTP/1.1"}, {"10.9.0.4", two, "HTTP/2.0"},
		{"10.9.0.5", one, "HTTP/2.0"}, {"10.9.0.5", two, "HTTP/2.0"},
		{"10.9.0.6", one, "HTTP/1.1"}, {"10.9.0.6", two, "HTTP/2.0"},
		{"10.9.0.7", one, "HTTP/1.1"}, {"10.9.0.7", two, "HTTP/2.0"},
	} {
		for _, body := range []string{"", "a body", strings.Repeat("0123456789abcdef", 64<<10)} {
			req, _ := http.NewRequestWithContext(t.Context(), "POST", "http://"+c.service+"/a%20b?c=d", io.MultiReader(strings.NewReader(body)))
			req.Trailer = http.Header{"X-Sum": {"42"}}
			req.Header.Add("Cookie", "a=b")
			req.Header.Add("Cookie", "c=d; e=f")
			req.Header.Set("Te", "trailers")
			l.client = c.client
			resp, got := l.do(req)
			l.client = one
			if want := fmt.Sprintf("%s POST %s/a%%20b?c=d %s", c.upstream, c.service, body); got != want || resp.StatusCode != 200 {
				t.Errorf("%s by %s, %d bytes: %d %.80q, want %.80q", c.service, resp.Proto, len(body), resp.StatusCode, got, want)
			}
			if got := resp.Trailer.Get("X-End"); got != "42" {
				t.Errorf("%s by %s, %d bytes: the trailer came back as %q, want 42", c.service, resp.Proto, len(body), got)
			}
			if got := resp.Header.Get("Server"); got != "istio-envoy" {
				t.Errorf("%s by %s: server is %q, want istio-envoy", c.service, resp.Proto, got)
			}
			if got := resp.Header.Get("X-Cookie"); c.client == two && got != "a=b; c=d; e=f" {
				t.Errorf("%s by %s: the cookie came as %q", c.service, resp.Proto, got)
			}
		}
	}
}

// TestHTTP2IsRoutedAndJudged: a client cannot go around rules and policies by speaking HTTP/2.
func TestHTTP2IsRoutedAndJudged(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(c *waypoint.Config) { c.SniffTimeout = 5 * time.Second })
	l.service("cart", "10.9.0.1", mesh.AppUnknown, app2(t, true, version))
	l.known("cart")
	l.routes(mesh.KindVirtualService,
		mesh.HTTPRule{Matches: prefix("/teapot"), Direct: &mesh.DirectResponse{Status: 418, Body: []byte("short and stout")}},
		mesh.HTTPRule{Matches: prefix("/new"), Rewrite: &mesh.Rewrite{Path: mesh.PathEdit{Kind: mesh.ReplaceFull, Value: "/old"}}, Backends: []mesh.Backend{to("cart", 1)}})
	l.client = l.client2()
	if resp, body := l.get(cart + "/teapot"); resp.StatusCode != 418 || body != "short and stout" {
		t.Errorf("/teapot = %d %q, want 418", resp.StatusCode, body)
	}
	if resp, body := l.get(cart + "/new?x"); resp.StatusCode != 200 || body != "HTTP/2.0 GET 10.9.0.1/old?x " {
		t.Errorf("/new = %d %q, want it rewritten", resp.StatusCode, body)
	}
	if resp, _ := l.get(cart + "/none"); resp.StatusCode != 404 {
		t.Errorf("/none = %d, want 404", resp.StatusCode)
	}
}
