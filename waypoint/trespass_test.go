package waypoint_test

import (
	"errors"
	"io"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

// rule publishes a rule of a namespace for the service cart.
func (l *lab) rule(r *mesh.Route) {
	l.t.Helper()
	r.Created, r.Parents = time.Unix(1, 0).UTC(), []mesh.RouteParent{{Namespace: "shop", Hostname: "cart.shop.svc.cluster.local"}}
	body, err := wds.EncodeRoute(r)
	if err != nil {
		l.t.Fatal(err)
	}
	l.publish(mesh.TypeRoute, xds.Resource{Name: r.Key(), Body: body})
}

// TestRulesOfStrangersLeadPastNoPolicy: who may write rules in some namespace brings nobody to a service of another one whose policies do not
// let him in, by way of a service whose policies do. This waypoint's identity is what its pods let in.
func TestRulesOfStrangersLeadPastNoPolicy(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, namespace string
		app             mesh.AppProtocol
		kind            mesh.RouteKind
		guarded         string
		want            int
	}{
		{"a rule of the service's own namespace", "shop", mesh.AppHTTP1, mesh.KindVirtualService, "bank", 200},
		{"another namespace's", "evil", mesh.AppHTTP1, mesh.KindVirtualService, "bank", 403},
		{"another namespace's, by HTTP/2", "evil", mesh.AppHTTP2, mesh.KindVirtualService, "bank", 403},
		{"another namespace's HTTPRoute", "evil", mesh.AppHTTP1, mesh.KindHTTPRoute, "bank", 403},
		{"another namespace's, to what is open", "evil", mesh.AppHTTP1, mesh.KindVirtualService, "", 200},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, nil)
			var copies atomic.Int64
			l.service("cart", "10.9.0.1", c.app, app2(t, true, version))
			bank := l.service("bank", "10.9.0.2", c.app, app2(t, true, func(_ http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/copied" {
					copies.Add(1)
				}
			}))
			l.known("cart", "bank")
			if c.guarded != "" {
				l.policy("closed", mesh.Deny, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "/"})
				l.guarded(bank, "shop/closed")
				l.becomes("guarded", "http://10.9.0.2/", http.StatusForbidden)
			}
			all := mesh.Fraction{Numerator: 1, Denominator: 1}
			l.rule(&mesh.Route{Kind: c.kind, Namespace: c.namespace, Name: "copy", Protocol: mesh.RouteHTTP, HTTP: &mesh.HTTPRule{
				Matches: prefix("/copied"), Backends: []mesh.Backend{to("cart", 1)}, Mirrors: []mesh.Mirror{{Ref: to("bank", 1).Ref, Percent: all}},
			}})
			l.rule(&mesh.Route{Kind: c.kind, Namespace: c.namespace, Name: "way", Protocol: mesh.RouteHTTP, Rule: 1, HTTP: &mesh.HTTPRule{
				Matches: prefix("/taken"), Backends: []mesh.Backend{to("bank", 1)},
			}})
			if c.app == mesh.AppHTTP2 {
				l.client = l.client2()
			}
			l.becomes("ruled", "http://10.9.0.1/other", http.StatusNotFound)
			l.eventually("both rules known", func() bool { return strings.Count(l.page(":15000/config_dump"), `"RuleName"`) >= 2 })
			for range 3 { // the first opens a connection
				if resp, body := l.get("http://10.9.0.1/taken"); resp.StatusCode != c.want {
					t.Errorf("a request that is led to the bank: %d %q, want %d", resp.StatusCode, body, c.want)
				}
			}
			if resp, _ := l.get("http://10.9.0.1/copied"); resp.StatusCode != http.StatusOK {
				t.Errorf("a request that is copied: %d, want 200", resp.StatusCode)
			}
			if c.want == http.StatusOK {
				l.eventually("copied", func() bool { return copies.Load() == 1 })
			} else if time.Sleep(20 * time.Millisecond); copies.Load() != 0 {
				t.Error("the bank was sent a copy")
			}
		})
	}
}

// TestARuleOfStrangersIsJudgedByWhatItAsksFor, not by what its client did.
func TestARuleOfStrangersIsJudgedByWhatItAsksFor(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "cart"))
	bank := l.service("bank", "10.9.0.2", mesh.AppHTTP1, named(t, "bank"))
	l.known("cart", "bank")
	l.policy("no-secrets", mesh.Deny, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "/secret"})
	l.guarded(bank, "shop/no-secrets")
	l.becomes("guarded", "http://10.9.0.2/secret", http.StatusForbidden)
	for i, path := range []string{"/secret", "/open"} {
		l.rule(&mesh.Route{Kind: mesh.KindVirtualService, Namespace: "evil", Name: "way", Protocol: mesh.RouteHTTP, Rule: uint32(i), HTTP: &mesh.HTTPRule{
			Matches: prefix("/x" + path), Backends: []mesh.Backend{to("bank", 1)},
			Rewrite: &mesh.Rewrite{Path: mesh.PathEdit{Kind: mesh.ReplaceFull, Value: path}},
		}})
	}
	l.becomes("ruled", "http://10.9.0.1/other", http.StatusNotFound)
	for path, want := range map[string]int{"/x/secret": 403, "/x/open": 200} {
		l.becomes("judged", "http://10.9.0.1"+path, want)
	}
}

// TestAStreamThatWasLedEnds when the policies of where it was led no longer let it in.
func TestAStreamThatWasLedEnds(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppTCP, named(t, "cart"))
	bank := l.service("bank", "10.9.0.2", mesh.AppTCP, named(t, "bank"))
	l.known("cart", "bank")
	l.policy("closed", mesh.Deny, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "/"})
	l.rule(&mesh.Route{Kind: mesh.KindVirtualService, Namespace: "evil", Name: "way", Protocol: mesh.RouteTCP,
		Stream: &mesh.StreamRule{Backends: []mesh.Backend{to("bank", 1)}}})
	l.eventually("led", func() bool {
		_, got := l.get("http://10.9.0.1/")
		l.client.CloseIdleConnections()
		return got == "bank /"
	})
	s, err := l.open(t.Context(), "10.9.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	l.guarded(bank, "shop/closed")
	_ = s.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := s.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection goes on: %v", err)
	}
}

// TestStreamsOfStrangersLeadPastNoPolicy: the same of connections that are not HTTP.
func TestStreamsOfStrangersLeadPastNoPolicy(t *testing.T) {
	t.Parallel()
	for namespace, open := range map[string]bool{"shop": true, "evil": false} {
		t.Run(namespace, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, nil)
			l.service("cart", "10.9.0.1", mesh.AppTCP, named(t, "cart"))
			bank := l.service("bank", "10.9.0.2", mesh.AppTCP, named(t, "bank"))
			l.known("cart", "bank")
			l.policy("closed", mesh.Deny, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "/"})
			l.guarded(bank, "shop/closed")
			l.eventually("guarded", func() bool {
				s, err := l.open(t.Context(), "10.9.0.2:80")
				if err == nil {
					s.Close()
				}
				return err != nil
			})
			l.rule(&mesh.Route{Kind: mesh.KindVirtualService, Namespace: namespace, Name: "way", Protocol: mesh.RouteTCP,
				Stream: &mesh.StreamRule{Backends: []mesh.Backend{to("bank", 1)}}})
			got := ""
			l.eventually("ruled", func() bool {
				s, err := l.open(t.Context(), "10.9.0.1:80")
				if err != nil {
					got = "refused"
					return true
				}
				defer s.Close()
				_ = s.SetDeadline(time.Now().Add(10 * time.Second))
				_, _ = io.WriteString(s, "GET / HTTP/1.0\r\n\r\n")
				all, _ := io.ReadAll(s)
				_, got, _ = strings.Cut(string(all), "\r\n\r\n")
				return got != "cart /"
			})
			if want := map[bool]string{true: "bank /", false: "refused"}[open]; got != want {
				t.Errorf("a connection that is led to the bank is %q, want %q", got, want)
			}
		})
	}
}
