package waypoint_test

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/waypoint"
)

// asked is an application that keeps what it was asked for, and answers everything with 200.
type asked struct {
	mu  sync.Mutex
	all []*http.Request
}

func (a *asked) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(a.all, r)
	fmt.Fprint(w, "ok")
}

// take returns the requests since the last call.
func (a *asked) take() []*http.Request {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := a.all
	a.all = nil
	return all
}

// raw sends text to a service and returns the statuses of what is answered to it.
func (l *lab) raw(authority, text string) (statuses []int) {
	l.t.Helper()
	s, err := l.open(l.t.Context(), authority)
	if err != nil {
		l.t.Fatal(err)
	}
	defer s.Close()
	_ = s.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(s, text); err != nil {
		l.t.Fatal(err)
	}
	_ = s.CloseWrite()
	for r := bufio.NewReader(s); ; {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return statuses
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		statuses = append(statuses, resp.StatusCode)
	}
}

// header publishes a policy that lets in what carries a header with such a value.
func (l *lab) header(name, header string, value mesh.StringMatch) {
	l.t.Helper()
	op := &mesh.Operation{Headers: []mesh.HeaderCondition{{Name: header, Values: []mesh.StringMatch{value}}}}
	body, err := wds.EncodePolicy(&mesh.Policy{
		Namespace: "shop", Name: name, Scope: mesh.ScopeWorkload,
		Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{Operation: op}}}}}},
	})
	if err != nil {
		l.t.Fatal(err)
	}
	l.publish(mesh.TypeAuthorization, xds.Resource{Name: "shop/" + name, Body: body})
}

// TestNothingIsSaidBehindConnect: an application that answers CONNECT like any other request would read the next one from where
// no policy is asked.
func TestNothingIsSaidBehindConnect(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	var app asked
	cart := l.service("cart", "10.9.0.1", mesh.AppHTTP1, app.start(t))
	l.known("cart")
	l.policy("no-admin", mesh.Deny, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "/admin"})
	l.guarded(cart, "shop/no-admin")
	l.becomes("guarded", "http://10.9.0.1/admin", http.StatusForbidden)
	app.take()
	got := l.raw("10.9.0.1:80", "CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\nGET /admin HTTP/1.1\r\nHost: a\r\n\r\n")
	if !slices.Equal(got, []int{http.StatusForbidden}) {
		t.Errorf("answers = %d, want 403 and the end", got)
	}
	for _, r := range app.take() {
		t.Errorf("the application is asked %s %s", r.Method, r.RequestURI)
	}
}

// TestPoliciesSeeWhatApplicationsSee: a header that does not go on lets nobody in.
func TestPoliciesSeeWhatApplicationsSee(t *testing.T) {
	t.Parallel()
	for header, attempts := range map[string][]string{
		"x-tenant":                {"X-Tenant: a\r\nConnection: x-tenant\r\n", "Connection: close, X-TENANT\r\nX-Tenant: a\r\nx-tenant: b\r\n"},
		"x-forwarded-client-cert": {"X-Forwarded-Client-Cert: URI=spiffe://cluster.local/ns/x/sa/admin\r\n"},
		"x-envoy-original-path":   {"X-Envoy-Original-Path: /public\r\n"},
	} {
		t.Run(header, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, nil)
			var app asked
			cart := l.service("cart", "10.9.0.1", mesh.AppHTTP1, app.start(t))
			l.known("cart")
			l.header("only", header, mesh.StringMatch{Kind: mesh.MatchPresence})
			l.guarded(cart, "shop/only")
			l.becomes("guarded", "http://10.9.0.1/", http.StatusForbidden)
			app.take() // what came before the policy
			if header == "x-tenant" {
				l.eventually("open to who has it", func() bool {
					return slices.Equal(l.raw("10.9.0.1:80", "GET / HTTP/1.1\r\nHost: a\r\nX-Tenant: a\r\nConnection: close\r\n\r\n"), []int{http.StatusOK})
				})
				app.take()
			}
			for _, fields := range attempts {
				if got := l.raw("10.9.0.1:80", "GET / HTTP/1.1\r\nHost: a\r\n"+fields+"\r\n"); !slices.Equal(got, []int{http.StatusForbidden}) {
					t.Errorf("%q: answers %d, want 403", fields, got)
				}
			}
			if n := len(app.take()); n > 0 {
				t.Errorf("%d requests reach the application", n)
			}
		})
	}
}

// TestTheHostIsWhatTheApplicationIsTold, not the field that a request in absolute form overrides (RFC 9112, 3.2.2).
func TestTheHostIsWhatTheApplicationIsTold(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	var app asked
	cart := l.service("cart", "10.9.0.1", mesh.AppHTTP1, app.start(t))
	l.known("cart")
	l.header("only", "host", mesh.StringMatch{Kind: mesh.MatchExact, Value: "public.example"})
	l.guarded(cart, "shop/only")
	l.becomes("guarded", "http://10.9.0.1/", http.StatusForbidden)
	app.take() // what came before the policy
	for target, want := range map[string]int{"/": 200, "http://public.example:80/": 200, "http://internal.example/": 403} {
		if got := l.raw("10.9.0.1:80", "GET "+target+" HTTP/1.1\r\nHost: public.example\r\n\r\n"); !slices.Equal(got, []int{want}) {
			t.Errorf("GET %s: answers %d, want %d", target, got, want)
		}
	}
	for _, r := range app.take() {
		if !strings.HasPrefix(r.Host, "public.example") {
			t.Errorf("the application is asked for %s", r.Host)
		}
	}
}

// TestClientsVouchForNothing: of headers that only a proxy may write, an application sees none of a client's, in whatever spelling
// it may read them.
func TestClientsVouchForNothing(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(c *waypoint.Config) { c.ClientCert = true })
	var app asked
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app.start(t))
	l.known("cart")
	l.get("http://10.9.0.1/")
	app.take()
	const forged = "forged"
	fields := "X-Envoy-External-Address: 203.0.113.9\r\nX_Tenant: mine\r\n"
	for _, name := range []string{
		"X-Forwarded-Client-Cert", "x_forwarded_client_cert", "X-FORWARDED_Client-Cert", "X_Envoy_Peer_Metadata", "X-Envoy-Retry-On", "X-Envoy-Max-Retries",
		"X-Envoy-Upstream-Rq-Timeout-Ms", "X-Envoy-Expected-Rq-Timeout-Ms", "X-Envoy-Original-Path", "X-Envoy-Attempt-Count", "X-Envoy-Internal",
	} {
		fields += name + ": " + forged + "\r\n"
	}
	if got := l.raw("10.9.0.1:80", "GET / HTTP/1.1\r\nHost: a\r\n"+fields+"\r\n"); !slices.Equal(got, []int{http.StatusOK}) {
		t.Fatalf("answers = %d, want 200", got)
	}
	all := app.take()
	if len(all) != 1 {
		t.Fatalf("the application is asked %d times, want once", len(all))
	}
	h := all[0].Header
	for name, values := range h {
		if slices.Contains(values, forged) {
			t.Errorf("the application sees %s: %q", name, values)
		}
	}
	for name, want := range map[string]string{
		"X-Envoy-External-Address": "203.0.113.9", "X_tenant": "mine", "X-Envoy-Attempt-Count": "1",
		"X-Forwarded-Client-Cert": "By=" + waypointID.String() + ";URI=" + clientID.String(),
	} {
		if got := strings.Join(h.Values(name), "|"); got != want {
			t.Errorf("%s at the application is %q, want %q", name, got, want)
		}
	}
}

// TestNobodyIsSentToTheWaypointItself: who writes endpoints cannot bring clients to its administration pages.
func TestNobodyIsSentToTheWaypointItself(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	for i, p := range []mesh.AppProtocol{mesh.AppHTTP1, mesh.AppHTTP2, mesh.AppTCP} {
		name := fmt.Sprintf("self-%d", i)
		l.service(name, fmt.Sprintf("10.9.0.%d", i+1), p, netip.MustParseAddrPort(l.ip+":15000"))
		l.known(name)
	}
	if resp, body := l.get("http://10.9.0.1/config_dump"); resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(body, "the waypoint itself") {
		t.Errorf("GET /config_dump by way of a service = %d %.80q, want 503", resp.StatusCode, body)
	}
	if resp, _ := l.get("http://10.9.0.2/config_dump"); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("GET /config_dump by HTTP/2 = %d, want 503", resp.StatusCode)
	}
	if s, err := l.open(t.Context(), "10.9.0.3:80"); err == nil {
		s.Close()
		t.Error("a connection to the administration pages is made")
	}
}

func (a *asked) start(t *testing.T) netip.AddrPort { return app(t, a.ServeHTTP) }

// TestNoPathHasAnEnd: what follows an escaped NUL, policies would see and an application that keeps text as C does would not. As Envoy
// does where it normalises paths, the waypoint refuses it.
func TestNoPathHasAnEnd(t *testing.T) {
	t.Parallel()
	for how, status := range map[string]int{"BASE": 400, "MERGE_SLASHES": 400, "DECODE_AND_MERGE_SLASHES": 400, "NONE": 200} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, func(c *waypoint.Config) { c.PathNormalization = how })
			l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "cart"))
			l.known("cart")
			for path, want := range map[string]int{"/admin%00": status, "/a/%00/b": status, "/%00../a": status, "/a%2500": 200, "/a?b=%00": 200} {
				if got := l.raw("10.9.0.1:80", "GET "+path+" HTTP/1.1\r\nHost: a\r\n\r\n"); !slices.Equal(got, []int{want}) {
					t.Errorf("GET %s: answers %d, want %d", path, got, want)
				}
			}
		})
	}
}

// TestARedirectLeadsToTheWeb, whatever scheme somebody before the waypoint says that the client used.
func TestARedirectLeadsToTheWeb(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "cart"))
	l.known("cart")
	l.routes(mesh.KindVirtualService, mesh.HTTPRule{Redirect: &mesh.Redirect{Status: 302, Path: mesh.PathEdit{Kind: mesh.ReplaceFull, Value: "/new"}}})
	for said, want := range map[string]string{
		"": "http", "http": "http", "https": "https", "HTTPS": "https", "javascript": "http", "https,http": "http", "https://evil/?": "http", "data": "http",
	} {
		fields := []string{}
		if said != "" {
			fields = append(fields, "x-forwarded-proto", said)
		}
		resp, _ := l.get("http://10.9.0.1/", fields...)
		if got := resp.Header.Get("Location"); got != want+"://10.9.0.1/new" {
			t.Errorf("x-forwarded-proto: %s: sent to %s, want %s://…", said, got, want)
		}
	}
}

// TestARewriteDoesNotClimb: what a rule's rewrite makes of a path is not judged again, so a client must not bring it to where the rule
// does not lead. A prefix without a slash at its end is enough for that.
func TestARewriteDoesNotClimb(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]mesh.PathEdit{
		"a prefix":      {Kind: mesh.ReplacePrefix, Value: "/files/"},
		"an expression": {Kind: mesh.ReplaceRegex, Regex: "/static", Value: "/files/"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, nil)
			var app asked
			l.service("cart", "10.9.0.1", mesh.AppHTTP1, app.start(t))
			l.known("cart")
			l.routes(mesh.KindVirtualService, mesh.HTTPRule{
				Matches: prefix("/static"), Rewrite: &mesh.Rewrite{Path: edit}, Backends: []mesh.Backend{to("cart", 1)},
			})
			for path, want := range map[string]string{
				"/static/a..b": "/files//a..b", "/static.css": "/files/.css", "/static...": "/files/...", "/static%2F..x": "/files/%2F..x",
				"/static../secret": "", "/static..": "", "/static./x": "", "/static%2e%2e/secret": "", `/static..\secret`: "", "/static.%2e/secret?x": "",
			} {
				status := http.StatusOK
				if want == "" {
					status = http.StatusBadRequest
				}
				if got := l.raw("10.9.0.1:80", "GET "+path+" HTTP/1.1\r\nHost: a\r\n\r\n"); !slices.Equal(got, []int{status}) {
					t.Errorf("GET %s: answers %d, want %d", path, got, status)
				}
				for _, r := range app.take() {
					if r.RequestURI != want {
						t.Errorf("GET %s: the application is asked for %s, want %q", path, r.RequestURI, want)
					}
				}
			}
		})
	}
}
