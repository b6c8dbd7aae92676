package waypoint_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint"
)

// TestFormatOfTheMesh: what the mesh's format asks for is what went on, and came back, whatever HTTP it is spoken in.
func TestFormatOfTheMesh(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(c *waypoint.Config) {
		c.AccessLogEncoding, c.AccessLogFormat = "TEXT", `<%REQ(X-TEST)% %PROTOCOL% %RESPONSE_CODE% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %REQ_WITHOUT_QUERY(:PATH)% %REQ(:AUTHORITY)% `+
			`%REQ(NONE?:METHOD):2% server=%RESP(SERVER)% %RESP(X-HOW?X-WHY)% trailer=%TRAILER(X-END)% %RESP(:STATUS)% %HOSTNAME%>`
	})
	answer := func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Trailer", "X-End")
		w.Header().Set("X-How", "so \"so\"")
		w.Header().Set("X-Gone", "gone")
		_, _ = io.WriteString(w, r.URL.Path)
		w.Header().Set("X-End", "over")
	}
	l.service("one", "10.9.0.1", mesh.AppHTTP1, app(t, answer))
	l.service("two", "10.9.0.2", mesh.AppHTTP2, app2(t, false, answer))
	l.known("one", "two")
	for _, c := range []struct {
		name, url, want string
		client          *http.Client
	}{
		{"h1-h1", "http://10.9.0.1/a?q=1", `HTTP/1.1 200 /a?q=1 /a 10.9.0.1 GE server=istio-envoy so \"so\" trailer=over 200 gate-1`, l.client},
		{"h1-h2", "http://10.9.0.2/b", `HTTP/1.1 200 /b /b 10.9.0.2 GE server=istio-envoy so \"so\" trailer=over 200 gate-1`, l.client},
		{"h2-h1", "http://10.9.0.1/c", `HTTP/2 200 /c /c 10.9.0.1 GE server=istio-envoy so \"so\" trailer=over 200 gate-1`, l.client2()},
		{"h2-h2", "http://10.9.0.2/d", `HTTP/2 200 /d /d 10.9.0.2 GE server=istio-envoy so \"so\" trailer=over 200 gate-1`, l.client2()},
	} {
		for range 2 { // the second goes where the first has opened a connection
			req, err := http.NewRequestWithContext(t.Context(), "GET", c.url, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("X-Test", c.name)
			resp, err := c.client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		want := "<" + c.name + " " + c.want + ">\n"
		l.eventually(c.name, func() bool { return strings.Count(l.log.String(), "<"+c.name+" ") == 2 })
		if n := strings.Count(l.log.String(), want); n != 2 {
			t.Errorf("%s: %d lines %s, want 2; the log is\n%s", c.name, n, want, l.log)
		}
	}
}

// TestFormatSeesEdits: headers are logged as they go on, with what rules made of them; of an answer of the waypoint's own as it goes
// out; and no client writes a line of its own.
func TestFormatSeesEdits(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(c *waypoint.Config) {
		c.AccessLogFormat = `{"test": "%REQ(X-TEST)%", "code": "%RESPONSE_CODE%", "from": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "to": "%REQ(:PATH)%", "host": "%REQ(HOST)%",` +
			`"set": "%REQ(X-SET)%", "gone": "%REQ(X-GONE)%", "added": "%REQ(X-ADDED)%", "back": "%RESP(X-BACK)%", "hidden": "%RESP(X-HIDDEN)%", "location": "%RESP(LOCATION)%"}`
	})
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X-Hidden", "yes") }))
	l.known("cart")
	set := func(name, value string) []mesh.Header { return []mesh.Header{{Name: name, Value: value}} }
	l.routes(mesh.KindVirtualService,
		mesh.HTTPRule{Matches: prefix("/redirect"), Redirect: &mesh.Redirect{Status: 302, Path: mesh.PathEdit{Kind: mesh.ReplaceFull, Value: "/elsewhere"}}},
		mesh.HTTPRule{
			Rewrite: &mesh.Rewrite{Authority: "inner", Path: mesh.PathEdit{Kind: mesh.ReplaceFull, Value: "/new"}},
			Headers: mesh.HeaderEdits{
				Request:  mesh.HeaderOps{Set: set("x-set", "ours"), Add: set("x-added", "two"), Remove: []string{"x-gone"}},
				Response: mesh.HeaderOps{Set: set("x-back", "here"), Remove: []string{"x-hidden"}},
			},
			Backends: []mesh.Backend{to("cart", 1)},
		})
	for _, test := range []string{"edited", "\"}\t{\"forged\": \""} {
		l.get(cart+"/old?q=1", "X-Test", test, "X-Set", "theirs", "X-Gone", "no", "X-Added", "one", "X-Envoy-Original-Path", "/forged")
	}
	l.get(cart+"/redirect", "X-Test", "redirected")
	for _, want := range []string{
		`{"test":"edited","code":200,"from":"/old?q=1","to":"/new?q=1","host":"inner","set":"ours","gone":null,"added":"one,two","back":"here","hidden":null,"location":null}`,
		`{"test":"\"}\u0009{\"forged\": \"","code":200,"from":"/old?q=1",`,
		`{"test":"redirected","code":302,"from":"/redirect","to":"/redirect","host":"10.9.0.1","set":null,"gone":null,"added":null,"back":null,"hidden":null,` +
			`"location":"http://10.9.0.1/elsewhere"}`,
	} {
		l.eventually(want, func() bool { return strings.Contains(l.log.String(), "\n"+want) })
	}
}

// TestFormatThatCannotBeRead: the default stays, and the log says why.
func TestFormatThatCannotBeRead(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(c *waypoint.Config) { c.AccessLogFormat = `{"took": "%TOOK%"}` })
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "v0"))
	l.known("cart")
	l.get(cart + "/")
	l.eventually("a line as without it", func() bool { return strings.Contains(l.log.String(), `"route_name":"default"`) })
	if !strings.Contains(l.log.String(), "%TOOK% is no operator that is known") {
		t.Error("the log does not say what is wrong with the format")
	}
}
