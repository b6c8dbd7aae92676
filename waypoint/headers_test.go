package waypoint_test

import (
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint"
)

// TestHeadersOfAWaypoint: what it adds, replaces and takes away, both ways.
func TestHeadersOfAWaypoint(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(c *waypoint.Config) { c.PathNormalization = "MERGE_SLASHES" })
	seen := make(chan *http.Request, 8)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) {
		seen <- r
		w.Header().Set("X-Envoy-Peer-Metadata", "secret")
		w.Header().Set("X-Envoy-Peer-Metadata-Id", "secret")
		w.Header().Set("Server", "own")
		w.Header().Set("X-Own", "kept")
		w.Header().Set("Connection", "X-Hop")
		w.Header().Set("X-Hop", "dropped")
		time.Sleep(2 * time.Millisecond) // so that upstream time is one
	}))
	l.known("cart")
	l.routes(mesh.KindVirtualService,
		mesh.HTTPRule{
			Matches: []mesh.HTTPMatch{{Path: mesh.PathMatch{Kind: mesh.PathPrefix, Value: "/old"}}},
			Rewrite: &mesh.Rewrite{Path: mesh.PathEdit{Kind: mesh.ReplacePrefix, Value: "/new"}},
			Timeout: 7 * time.Second, Backends: []mesh.Backend{to("cart", 1)},
		},
		mesh.HTTPRule{Matches: prefix("/host"), Rewrite: &mesh.Rewrite{Authority: "else.example"}, Backends: []mesh.Backend{to("cart", 1)}},
		mesh.HTTPRule{Backends: []mesh.Backend{to("cart", 1)}})
	spoofed := []string{
		"X-Forwarded-Client-Cert", "URI=spiffe://forged", "X-Envoy-Peer-Metadata", "x", "X-Envoy-Peer-Metadata-Id", "x",
		"X-Envoy-Decorator-Operation", "x", "X-Envoy-Attempt-Count", "9", "Connection", "X-Mine", "X-Mine", "dropped",
	}
	for _, c := range []struct {
		name, path string
		headers    []string
		want       map[string]string // at the application; "": absent, "*": anything
		target     string
	}{
		{"plain", "/a", nil, map[string]string{
			"X-Request-Id": "*", "X-Forwarded-Proto": "http", "X-Envoy-Attempt-Count": "1", "X-Forwarded-For": "", "X-Forwarded-Host": "",
			"X-Envoy-Expected-Rq-Timeout-Ms": "", "X-Envoy-Original-Path": "", "X-Forwarded-Client-Cert": "",
		}, "/a"},
		{"what clients may say", "/a", []string{"X-Request-Id", "mine", "X-Forwarded-Proto", "https", "X-Forwarded-For", "203.0.113.1", "Traceparent", "00-1-2-01", "B3", "x-y-1"}, map[string]string{
			"X-Request-Id": "mine", "X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.1", "Traceparent": "00-1-2-01", "B3": "x-y-1",
		}, "/a"},
		{"what they may not", "/a", spoofed, map[string]string{
			"X-Forwarded-Client-Cert": "", "X-Envoy-Peer-Metadata": "", "X-Envoy-Peer-Metadata-Id": "", "X-Envoy-Decorator-Operation": "",
			"X-Envoy-Attempt-Count": "1", "X-Mine": "",
		}, "/a"},
		{"rewritten", "/old/x?q=1", nil, map[string]string{"X-Envoy-Original-Path": "/old/x?q=1", "X-Envoy-Expected-Rq-Timeout-Ms": "*"}, "/new/x?q=1"},
		{"normalised before it is matched", "//old/./x", nil, map[string]string{"X-Envoy-Original-Path": "/old/x"}, "/new/x"},
		{"an id that is none", "/a", []string{"X-Request-Id", ""}, map[string]string{"X-Request-Id": "*"}, "/a"},
		{"another host", "/host", []string{"X-Envoy-Original-Host", "mine"}, map[string]string{"X-Envoy-Original-Host": "10.9.0.1"}, "/host"},
		{"only normalised", "/b//c", nil, map[string]string{"X-Envoy-Original-Path": ""}, "/b/c"},
	} {
		resp, _ := l.get("http://10.9.0.1"+c.path, c.headers...)
		r := <-seen
		for name, want := range c.want {
			if got := r.Header.Get(name); want == "*" && got == "" || want != "*" && got != want {
				t.Errorf("%s: %s is %q at the application, want %q", c.name, name, got, want)
			}
		}
		if ms := r.Header.Get("X-Envoy-Expected-Rq-Timeout-Ms"); ms != "" {
			if n, err := strconv.Atoi(ms); err != nil || n < 1 || n > 7000 {
				t.Errorf("%s: x-envoy-expected-rq-timeout-ms is %q, want up to 7000", c.name, ms)
			}
		}
		if r.RequestURI != c.target {
			t.Errorf("%s: the application is asked for %s, want %s", c.name, r.RequestURI, c.target)
		}
		for name, want := range map[string]string{"Server": "istio-envoy", "X-Own": "kept", "X-Envoy-Peer-Metadata": "", "X-Envoy-Peer-Metadata-Id": "", "X-Hop": "", "X-Envoy-Overloaded": ""} {
			if got := resp.Header.Get(name); got != want {
				t.Errorf("%s: %s of the response is %q, want %q", c.name, name, got, want)
			}
		}
		if n, err := strconv.Atoi(resp.Header.Get("X-Envoy-Upstream-Service-Time")); err != nil || n < 1 {
			t.Errorf("%s: x-envoy-upstream-service-time is %q, want milliseconds", c.name, resp.Header.Get("X-Envoy-Upstream-Service-Time"))
		}
	}
}

// TestContinueIsAskedOfTheApplication: who waits for 100 Continue hears the application's, or its refusal before any body.
func TestContinueIsAskedOfTheApplication(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
		b, _ := io.ReadAll(r.Body)
		_, _ = io.WriteString(w, strings.ToUpper(string(b)))
	}))
	l.known("cart")
	for path, want := range map[string]string{
		"/yes": "HTTP/1.1 100 Continue|HTTP/1.1 200 OK", "/no": "HTTP/1.1 413 Request Entity Too Large",
	} {
		s, err := l.open(t.Context(), "10.9.0.1:80")
		if err != nil {
			t.Fatal(err)
		}
		_ = s.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = io.WriteString(s, "POST "+path+" HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: 5\r\n\r\n")
		var heard string
		var b [4096]byte
		for !strings.Contains(heard, "\r\n\r\n") {
			n, err := s.Read(b[:])
			if heard += string(b[:n]); err != nil {
				break
			}
		}
		if strings.HasPrefix(heard, "HTTP/1.1 100") {
			_, _ = io.WriteString(s, "hello")
		}
		rest, _ := io.ReadAll(s)
		heard += string(rest)
		var got []string
		for line := range strings.SplitSeq(heard, "\r\n") {
			if strings.HasPrefix(line, "HTTP/1.1 ") {
				got = append(got, line)
			}
		}
		if strings.Join(got, "|") != want || path == "/yes" && !strings.Contains(heard, "HELLO") {
			t.Errorf("%s: heard %q, want %s", path, heard, want)
		}
		s.Close()
	}
}

// TestHeadersWithOperators: what a rule wants to tell of a request stands in its headers, as Envoy would put it there.
func TestHeadersWithOperators(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	seen := make(chan *http.Request, 1)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) {
		seen <- r
		w.Header().Set("X-Version", "seven")
		w.WriteHeader(http.StatusAccepted)
	}))
	l.known("cart")
	format := func(name, value string) mesh.Header { return mesh.Header{Name: name, Value: value, Format: true} }
	l.routes(mesh.KindVirtualService, mesh.HTTPRule{
		Rewrite: &mesh.Rewrite{Path: mesh.PathEdit{Kind: mesh.ReplaceFull, Value: "/new"}, Authority: "elsewhere"},
		Headers: mesh.HeaderEdits{
			Request: mesh.HeaderOps{
				Set: []mesh.Header{
					format("x-client", "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"), format("x-to", "%DOWNSTREAM_LOCAL_ADDRESS%"),
					format("x-who", "<%DOWNSTREAM_PEER_URI_SAN%>"), format("x-path", "%REQ(:method)% %REQ(:AUTHORITY)%%REQ(:PATH):4% %PROTOCOL%"),
					format("x-user", "%REQ(x-nobody?X-Asked-By):3%"), format("x-absent", "%REQ(x-nobody)%%TRACE_ID%%RESPONSE_CODE_DETAILS%"),
					format("x-kept", "%REQ(x-nobody)%"), {Name: "x-first", Value: "one"}, {Name: "x-own"}, format("x-share", "50%% %RESP(x-version)%"),
				},
				Add: []mesh.Header{format("x-second", "%REQ(x-first)%, two")},
			},
			Response: mesh.HeaderOps{Set: []mesh.Header{
				format("x-asked", "%REQ(x-asked-by)% %REQ_WITHOUT_QUERY(:path)%"), format("x-was", "%RESPONSE_CODE% %RESP(x-version)% at %HOSTNAME%"),
				format("x-tries", "%UPSTREAM_REQUEST_ATTEMPT_COUNT%"), format("x-flags", "%RESPONSE_FLAGS%"),
			}},
		},
		Backends: []mesh.Backend{to("cart", 1)},
	})
	resp, _ := l.get("http://10.9.0.1/old/way?q=1", "X-Asked-By", "somebody", "X-Kept", "mine", "X-Own", "mine")
	r := <-seen
	for name, want := range map[string]string{
		"X-Client": "127.0.0.1", "X-To": "10.9.0.1:80", "X-Who": "<spiffe://cluster.local/ns/web/sa/front>", "X-Path": "GET 10.9.0.1/old HTTP/1.1",
		"X-User": "som", "X-Kept": "mine", "X-Own": "mine", "X-Share": "50% ", "X-Second": "one, two",
	} {
		if got := r.Header.Get(name); got != strings.TrimSpace(want) {
			t.Errorf("%s is %q at the application, want %q", name, got, want)
		}
	}
	if _, ok := r.Header["X-Absent"]; ok || r.RequestURI != "/new?q=1" || r.Host != "elsewhere" {
		t.Errorf("the application is asked for %s of %s with x-absent: %v, want /new?q=1 of elsewhere without", r.RequestURI, r.Host, ok)
	}
	for name, want := range map[string]string{"X-Asked": "somebody /old/way", "X-Was": "202 seven at gate-1", "X-Tries": "1", "X-Flags": ""} {
		if got := resp.Header.Get(name); got != want {
			t.Errorf("%s of the response is %q, want %q", name, got, want)
		}
	}
}

// TestHeadersOfOwnAnswers: what a rule says of its responses holds for those that the waypoint gives in its place, as with Envoy.
func TestHeadersOfOwnAnswers(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(http.ResponseWriter, *http.Request) {}))
	l.service("gone", "10.9.0.2", mesh.AppHTTP1)
	l.known("cart", "gone")
	at := func(path string, r mesh.HTTPRule) mesh.HTTPRule {
		r.Matches = []mesh.HTTPMatch{{Path: mesh.PathMatch{Kind: mesh.PathExact, Value: path}}}
		r.Headers.Response = mesh.HeaderOps{
			Set:    []mesh.Header{{Name: "content-type", Value: "application/json"}, {Name: "strict-transport-security", Value: "max-age=1"}, {Name: "x-path", Value: "%REQ(:path)%", Format: true}},
			Remove: []string{"location", "grpc-status"},
		}
		return r
	}
	backend := to("gone", 1)
	backend.Headers.Response.Add = []mesh.Header{{Name: "x-backend", Value: "gone"}}
	l.routes(mesh.KindVirtualService,
		at("/direct", mesh.HTTPRule{Direct: &mesh.DirectResponse{Status: 418, Body: []byte("tea")}}),
		at("/redirect", mesh.HTTPRule{Redirect: &mesh.Redirect{Status: 301, Authority: "other"}}),
		at("/fault", mesh.HTTPRule{Fault: &mesh.Fault{Abort: mesh.Abort{Percent: mesh.Fraction{Numerator: 1, Denominator: 1}, HTTPStatus: 500}}, Backends: []mesh.Backend{to("cart", 1)}}),
		at("/grpc", mesh.HTTPRule{Fault: &mesh.Fault{Abort: mesh.Abort{Percent: mesh.Fraction{Numerator: 1, Denominator: 1}, GRPCStatus: 10}}, Backends: []mesh.Backend{to("cart", 1)}}),
		at("/gone", mesh.HTTPRule{Backends: []mesh.Backend{backend}}),
	)
	for path, status := range map[string]int{"/direct": 418, "/redirect": 301, "/fault": 500, "/grpc": 200, "/gone": 503, "/none": 404} {
		var headers []string
		if path == "/grpc" {
			headers = []string{"Content-Type", "application/grpc"}
		}
		want := map[string]string{"Strict-Transport-Security": "max-age=1", "X-Path": path, "Server": "istio-envoy", "Location": "", "X-Backend": "", "Grpc-Status": "", "Content-Type": "application/json"}
		switch path {
		case "/none":
			want["Strict-Transport-Security"], want["X-Path"], want["Content-Type"] = "", "", ""
		case "/grpc":
			want["Grpc-Status"], want["Content-Type"] = "10", "application/grpc" // what says that the call failed cannot be taken away
		case "/gone":
			want["X-Backend"] = "gone"
		}
		resp, _ := l.get("http://10.9.0.1"+path, headers...)
		if resp.StatusCode != status {
			t.Errorf("%s: %d, want %d", path, resp.StatusCode, status)
		}
		for name, want := range want {
			if got := resp.Header.Get(name); got != want {
				t.Errorf("%s: %s of the response is %q, want %q", path, name, got, want)
			}
		}
	}
}

// TestHeadersInSeveralLines: whichever version of HTTP they come by, rules see lines as Envoy shows them to its own.
func TestHeadersInSeveralLines(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "cart"))
	l.known("cart")
	rule := func(status uint16, without bool, name, value string) mesh.HTTPRule {
		m := mesh.HTTPMatch{Headers: []mesh.NamedMatch{{Name: name, Match: mesh.StringMatch{Kind: mesh.MatchExact, Value: value}}}}
		if without {
			m.Headers, m.WithoutHeaders = []mesh.NamedMatch{{Name: name, Match: mesh.StringMatch{Kind: mesh.MatchPresence}}}, m.Headers
		}
		return mesh.HTTPRule{Matches: []mesh.HTTPMatch{m}, Direct: &mesh.DirectResponse{Status: status}}
	}
	l.routes(mesh.KindVirtualService, rule(201, false, "x-user", "ann"), rule(202, false, "x-user", "bob,ann"), rule(203, false, "via", "bob"),
		rule(204, false, "via", "ann,bob"), rule(205, false, "cookie", "b=2"), rule(206, false, "cookie", "a=1; b=2"),
		rule(207, true, "x-not", "ann"), mesh.HTTPRule{Direct: &mesh.DirectResponse{Status: 299}})
	for _, c := range []struct {
		name     string
		values   []string
		one, two int // by HTTP/1.1 and HTTP/2
	}{
		{"X-User", []string{"bob", "ann"}, 201, 201},
		{"X-User", []string{"ann", "bob"}, 201, 201},
		{"X-User", []string{"bob,ann"}, 202, 202},
		{"X-User", []string{"bob", "eve"}, 299, 299},
		{"Via", []string{"bob"}, 203, 203},
		{"Via", []string{"ann", "bob"}, 204, 204},
		{"Via", []string{"bob", "ann"}, 299, 299},
		{"Cookie", []string{"a=1", "b=2"}, 205, 206},
		{"Cookie", []string{"a=1; b=2"}, 206, 206},
		{"X-Not", []string{"eve", "bob"}, 207, 207},
		{"X-Not", []string{"eve", "ann"}, 299, 299},
		{"X-Not", []string{"eve,ann"}, 207, 207},
	} {
		for want, client := range map[*int]*http.Client{&c.one: l.client, &c.two: l.client2()} {
			req, err := http.NewRequestWithContext(t.Context(), "GET", cart+"/", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header[c.name] = c.values
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != *want {
				t.Errorf("%s: %s %q is answered %d, want %d", resp.Proto, c.name, c.values, resp.StatusCode, *want)
			}
		}
	}
}

// TestRulesLeaveTheConnectionAlone: what a rule says of headers between neighbours harms neither of them, and the policy for other origins
// has the last word about its own.
func TestRulesLeaveTheConnectionAlone(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "cart"))
	l.known("cart")
	ours := []mesh.Header{{Name: "connection", Value: "close"}, {Name: "te", Value: "trailers"}, {Name: "content-length", Value: "9"}, {Name: "x-ok", Value: "yes"}}
	both := mesh.HeaderEdits{Request: mesh.HeaderOps{Set: ours, Add: ours}, Response: mesh.HeaderOps{Set: ours, Add: ours}}
	l.routes(mesh.KindVirtualService,
		mesh.HTTPRule{Matches: prefix("/direct"), Headers: both, Direct: &mesh.DirectResponse{Status: 200, Body: []byte("cart /direct")}},
		mesh.HTTPRule{
			Matches: prefix("/cors"), CORS: &mesh.CORS{AllowOrigins: []mesh.StringMatch{{Kind: mesh.MatchExact, Value: "http://a"}}},
			Headers:  mesh.HeaderEdits{Response: mesh.HeaderOps{Set: []mesh.Header{{Name: "access-control-allow-origin", Value: "*"}, {Name: "x-ok", Value: "yes,yes"}}}},
			Backends: []mesh.Backend{to("cart", 1)},
		},
		mesh.HTTPRule{Headers: both, Backends: []mesh.Backend{to("cart", 1)}})
	for _, path := range []string{"/", "/direct", "/cors"} {
		resp, body := l.get("http://10.9.0.1"+path, "Origin", "http://a")
		if resp.StatusCode != 200 || body != "cart "+path || resp.Close || strings.Join(resp.Header.Values("X-Ok"), ",") != "yes,yes" {
			t.Errorf("GET %s = %d %q %v, want 200, the connection kept and what the rule sets otherwise", path, resp.StatusCode, body, resp.Header)
		}
		if got := resp.Header.Get("Access-Control-Allow-Origin"); path == "/cors" && got != "http://a" {
			t.Errorf("GET %s: origin %q may read it, want http://a", path, got)
		}
	}
}
