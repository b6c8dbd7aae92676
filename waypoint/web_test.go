package waypoint_test

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"io"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mistnet/mistnet/internal/mesh"
)

// framed is a message as gRPC and gRPC-Web frame it.
func framed(flag byte, text string) string {
	return string(binary.BigEndian.AppendUint32([]byte{flag}, uint32(len(text)))) + text
}

// wrapped is a message with a text in it.
func wrapped(text string) string {
	b, _ := proto.Marshal(wrapperspb.String(text))
	return framed(0, string(b))
}

func base64Of(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

// webCart is what the tests call: it echoes, but for some methods.
func webCart(method string, s grpc.ServerStream) error {
	md, _ := metadata.FromIncomingContext(s.Context())
	if method == "/shop.Cart/Missing" {
		return status.Error(codes.NotFound, "no such thing: 100 %")
	}
	if method == "/shop.Cart/Slow" {
		<-s.Context().Done()
		return nil
	}
	s.SetTrailer(metadata.Pairs("x-seen", strings.Join(md["content-type"], ",")+" of "+strings.Join(md["grpc-accept-encoding"], ",")+"."))
	if err := echo("got ")(method, s); err != nil || method != "/shop.Cart/Fails" {
		return err
	}
	return status.Error(codes.Aborted, "after all")
}

const (
	webBinary = "application/grpc-web+proto"
	webText   = "application/grpc-web-text"
)

// webAnswer is what a client of gRPC-Web is told.
type webAnswer struct {
	status        int
	contentType   string
	grpc, message string // in the head
	body          string
}

// web sends a call and returns what is answered.
func (l *lab) web(c *http.Client, url, body string, headers ...string) webAnswer {
	l.t.Helper()
	req, err := http.NewRequestWithContext(l.t.Context(), "POST", url, strings.NewReader(body))
	if err != nil {
		l.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := c.Transport.RoundTrip(req)
	if err != nil {
		l.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		l.t.Fatalf("POST %s: %v", url, err)
	}
	if len(resp.Trailer) > 0 {
		l.t.Errorf("POST %s: trailers %v", url, resp.Trailer)
	}
	return webAnswer{resp.StatusCode, resp.Header.Get("Content-Type"), resp.Header.Get("Grpc-Status"), resp.Header.Get("Grpc-Message"), string(b)}
}

// TestGRPCWeb: calls as browsers make them reach a server of gRPC, and what it says comes back as they read it. The answers have
// the form of Envoy's, but for the policy's, which is text there.
func TestGRPCWeb(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	at, _ := grpcApp(t, webCart)
	cartService := l.service("cart", "10.9.0.1", mesh.AppGRPCWeb, at)
	l.service("empty", "10.9.0.2", mesh.AppGRPCWeb)
	l.service("page", "10.9.0.3", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, "<p>"+strings.Repeat("x", int(r.ContentLength)*1000))
	}))
	l.known("cart", "empty", "page")
	l.policy("no-admin", mesh.Deny, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "/admin."})
	l.guarded(cartService, "shop/no-admin")
	l.routes(mesh.KindVirtualService,
		mesh.HTTPRule{Matches: prefix("/fault.HTTP/"), Fault: &mesh.Fault{Abort: mesh.Abort{Percent: all, HTTPStatus: 418}}, Backends: []mesh.Backend{to("cart", 1)}},
		mesh.HTTPRule{Matches: prefix("/fault.GRPC/"), Fault: &mesh.Fault{Abort: mesh.Abort{Percent: all, GRPCStatus: 8}}, Backends: []mesh.Backend{to("cart", 1)}},
		mesh.HTTPRule{Matches: prefix("/direct/"), Direct: &mesh.DirectResponse{Status: 403, Body: []byte("no % no")}},
		mesh.HTTPRule{Matches: prefix("/moved/"), Redirect: &mesh.Redirect{Status: 301, Authority: "else.example"}},
		mesh.HTTPRule{Matches: prefix("/empty/"), Backends: []mesh.Backend{to("empty", 1)}},
		mesh.HTTPRule{Matches: prefix("/page/"), Retry: &mesh.Retry{}, Backends: []mesh.Backend{to("page", 1)}},
		mesh.HTTPRule{Matches: prefix("/shop.Cart/Slow"), Timeout: 100 * time.Millisecond, Backends: []mesh.Backend{to("cart", 1)}},
		mesh.HTTPRule{Matches: []mesh.HTTPMatch{{GRPC: true}}, Backends: []mesh.Backend{to("cart", 1)}})
	l.becomes("guarded", cart+"/admin.A/B", http.StatusForbidden)

	one := wrapped("one")
	end := func(status, message string) string {
		return framed(0x80, "grpc-status:"+status+"\r\ngrpc-message:"+message+"\r\nx-seen:application/grpc of identity.\r\n")
	}
	long := wrapped(strings.Repeat("0123456789abcdef", 40_000))
	longAnswer := wrapped("got " + strings.Repeat("0123456789abcdef", 40_000))
	ok, okText := webAnswer{status: 200, contentType: webBinary}, webAnswer{status: 200, contentType: webText + "+proto"}
	with := func(a webAnswer, body string) webAnswer { a.body = body; return a }
	head := func(status int, grpc, message string) webAnswer {
		return webAnswer{status, webBinary, grpc, message, ""}
	}
	for _, c := range []struct {
		name, path, contentType, accept, body string
		want                                  webAnswer
	}{
		{"a call", "/shop.Cart/Get", webBinary, "", one, with(ok, wrapped("got one")+end("0", ""))},
		{"without the format", "/shop.Cart/Get", "application/grpc-web", "*/*", one, with(ok, wrapped("got one")+end("0", ""))},
		{"two messages", "/shop.Cart/Get", webBinary, "", one + wrapped("two"), with(ok, wrapped("got one")+wrapped("got two")+end("0", ""))},
		{"a long one", "/shop.Cart/Get", webBinary, "", long, with(ok, longAnswer+end("0", ""))},
		{"a failure behind a message", "/shop.Cart/Fails", webBinary, "", one, with(ok, wrapped("got one")+end("10", "after all"))},
		{"a failure alone", "/shop.Cart/Missing", webBinary, "", one, head(200, "5", "no such thing: 100 %25")},
		{"text", "/shop.Cart/Get", webText, webText, base64Of(one), with(okText, base64Of(wrapped("got one"))+base64Of(end("0", "")))},
		{"text of the other name", "/shop.Cart/Get", webText + "+proto", webText + "+proto", base64Of(one), with(okText, base64Of(wrapped("got one"))+base64Of(end("0", "")))},
		{"text piece by piece", "/shop.Cart/Get", webText, webText, base64Of(one) + base64Of(wrapped("two")),
			with(okText, base64Of(wrapped("got one"))+base64Of(wrapped("got two"))+base64Of(end("0", "")))},
		{"a long text", "/shop.Cart/Get", webText, webText, base64Of(long), with(okText, base64Of(longAnswer)+base64Of(end("0", "")))},
		{"binary asked for by text", "/shop.Cart/Get", webText, "", base64Of(one), with(ok, wrapped("got one")+end("0", ""))},
		{"text asked for by binary", "/shop.Cart/Get", webBinary, webText, one, with(okText, base64Of(wrapped("got one"))+base64Of(end("0", "")))},
		{"a text that is none", "/shop.Cart/Get", webText, "", base64Of(one)[:9] + "!", head(400, "13", "Bad gRPC-web request, invalid base64 data.")},
		{"a text that is cut", "/shop.Cart/Get", webText, "", base64Of(one)[:9], head(400, "13", "Bad gRPC-web request, invalid base64 data.")},
		{"fault of HTTP", "/fault.HTTP/A", webBinary, "", one, head(418, "2", "fault filter abort")},
		{"fault of gRPC", "/fault.GRPC/A", webBinary, "", one, head(200, "8", "fault filter abort")},
		{"an answer of the rule's own", "/direct/A", webBinary, "", one, head(403, "7", "no %25 no")},
		{"a redirect", "/moved/A", webBinary, "", one, head(301, "", "")},
		{"nobody there", "/empty/A", webBinary, "", one, head(503, "14", "no healthy upstream")},
		{"too slow", "/shop.Cart/Slow", webBinary, "", one, head(504, "14", "upstream request timeout")},
		{"a policy", "/admin.A/B", webBinary, "", one, head(403, "7", "RBAC: access denied")},
		{"no rule: not translated", "/shop.Cart/Get", "application/grpc-web+json", "", one, webAnswer{404, "", "", "", ""}},
		{"no gRPC behind", "/page/A", webBinary, "", "x", head(503, "14", "<p>"+strings.Repeat("x", 1000))},
		{"a long page behind", "/page/A", webBinary, "", strings.Repeat("x", 100), head(503, "14", "<p>"+strings.Repeat("x", 16<<10-3))},
	} {
		for version, client := range map[string]*http.Client{"HTTP/1.1": l.client, "HTTP/2": l.client2()} {
			got := l.web(client, cart+c.path, c.body, "Content-Type", c.contentType, "Accept", c.accept)
			if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(webAnswer{})); diff != "" {
				t.Errorf("%s, by %s (-want +got):\n%.2000s", c.name, version, diff)
			}
		}
	}
	l.counted(`request_protocol="grpc"`, `response_code="200"`, `grpc_response_status="0"`, `destination_workload="cart"`)
	l.counted(`request_protocol="grpc"`, `response_code="403"`, `grpc_response_status="7"`)
	if got, err := call(t.Context(), l.grpc("10.9.0.1:80"), "/shop.Cart/Get", "one"); got != "got one" || err != nil {
		t.Errorf("a call of gRPC on the same port: %q, %v", got, err)
	}
}

// TestGRPCWebStreams: messages go both ways while the call lasts, and are counted as they pass.
func TestGRPCWebStreams(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	at, _ := grpcApp(t, echo(""))
	l.service("cart", "10.9.0.1", mesh.AppGRPCWeb, at)
	l.known("cart")
	sent := 0
	for version, client := range map[string]*http.Client{"HTTP/1.1": l.client, "HTTP/2": l.client2()} {
		r, w := io.Pipe()
		req, err := http.NewRequestWithContext(t.Context(), "POST", cart+"/shop.Cart/Get", r)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", webText)
		req.Header.Set("Accept", webText)
		answer := make(chan *http.Response, 1)
		go func() {
			resp, err := client.Do(req)
			if err != nil {
				t.Errorf("%s: %v", version, err)
			}
			answer <- resp
		}()
		var resp *http.Response
		for _, text := range []string{"a", "", "abc", strings.Repeat("x", 100_000)} {
			want := base64Of(wrapped(text))
			if _, err := io.WriteString(w, want); err != nil {
				t.Fatal(err)
			}
			if resp == nil {
				if resp = <-answer; resp == nil {
					return
				}
				defer resp.Body.Close()
			}
			got := make([]byte, len(want))
			if _, err := io.ReadFull(resp.Body, got); err != nil || string(got) != want {
				t.Fatalf("%s: answered %.100q, %v, want %.100q", version, got, err, want)
			}
			sent++
			l.messages("cart", sent, sent)
		}
		w.Close()
		rest, err := io.ReadAll(resp.Body)
		if want := base64Of(framed(0x80, "grpc-status:0\r\ngrpc-message:\r\n")); string(rest) != want || err != nil {
			t.Errorf("%s: the end is %q, %v, want %q", version, rest, err, want)
		}
	}
}

// TestGRPCWebIsTriedAgain: what is translated can be sent twice.
func TestGRPCWebIsTriedAgain(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	var tries atomic.Int64
	at, _ := grpcApp(t, func(m string, s grpc.ServerStream) error {
		if tries.Add(1)%2 == 1 {
			return status.Error(codes.Unavailable, "not now")
		}
		return echo("")(m, s)
	})
	l.service("cart", "10.9.0.1", mesh.AppGRPCWeb, at)
	l.known("cart")
	text := wrapped(strings.Repeat("x", 10_000))
	for _, client := range []*http.Client{l.client, l.client2()} {
		got := l.web(client, cart+"/a.B/C", base64Of(text), "Content-Type", webText, "Accept", webText)
		if want := base64Of(text); got.status != 200 || !strings.HasPrefix(got.body, want) {
			t.Errorf("answered %d %q, grpc-status %s", got.status, got.body[:min(len(got.body), 100)], got.grpc)
		}
	}
	if n := tries.Load(); n != 4 {
		t.Errorf("%d tries, want 4", n)
	}
}

// TestGRPCWebWhereItIsNotDeclared passes as any HTTP.
func TestGRPCWebWhereItIsNotDeclared(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	at := app2(t, true, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
		_, _ = io.Copy(w, r.Body)
	})
	l.service("cart", "10.9.0.1", mesh.AppGRPC, at)
	l.service("web", "10.9.0.2", mesh.AppGRPCWeb, at)
	l.known("cart", "web")
	for _, c := range []struct{ url, contentType string }{
		{cart, webText}, {cart, webBinary}, {"http://10.9.0.2", "text/plain"}, {"http://10.9.0.2", webBinary + "; charset=utf-8"},
	} {
		want := webAnswer{200, c.contentType, "", "", base64Of("x")}
		got := l.web(l.client, c.url+"/a.B/C", base64Of("x"), "Content-Type", c.contentType)
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(webAnswer{})); diff != "" {
			t.Errorf("%s of %s (-want +got):\n%s", c.contentType, c.url, diff)
		}
	}
}

// TestGRPCWebKeepsItsConnection: neither a body that is no text nor an answer of the waypoint's own costs a client its connection.
func TestGRPCWebKeepsItsConnection(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	at, _ := grpcApp(t, echo(""))
	l.service("cart", "10.9.0.1", mesh.AppGRPCWeb, at)
	l.known("cart")
	opened := 0
	for _, body := range []string{base64Of(wrapped("a")), "no base64!!!", base64Of(wrapped("b")), "YQ", base64Of(wrapped("c"))} {
		req, err := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
			GotConn: func(i httptrace.GotConnInfo) {
				if !i.Reused {
					opened++
				}
			},
		}), "POST", cart+"/a.B/C", bytes.NewReader([]byte(body)))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", webText)
		l.do(req)
	}
	if opened != 1 {
		t.Errorf("5 calls needed %d connections, want 1", opened)
	}
}
