package report

import (
	"encoding/json"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/accesslog"
	"github.com/mistnet/mistnet/internal/meshtest"
)

// istiosDefault is the format Istio gives its proxies, in the language of formats.
const istiosDefault = `[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% ` +
	`%RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% "%UPSTREAM_TRANSPORT_FAILURE_REASON%" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% ` +
	`%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" "%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" ` +
	`%UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%` + "\n"

// withHeaders gives a record the headers that a format wants, as a session would have noted them.
func withHeaders(r *Record, f *accesslog.Format) *Record {
	known := map[string]string{
		":method": r.Method, ":path": r.Target, ":authority": r.Authority, "x-forwarded-for": r.ForwardedFor, "user-agent": r.UserAgent, "x-request-id": r.RequestID,
		"x-hostile": "a\nb\" \\\x00é\xff, and more",
	}
	if r.Answered {
		known["x-envoy-upstream-service-time"] = "7"
	}
	for _, h := range f.Headers {
		v := known[h.Name]
		if v == "" {
			v = known[h.Or]
		}
		r.Headers = append(r.Headers, v)
	}
	return r
}

// TestDefaultFormatIsIstios: written in the language of formats, Istio's format makes the lines that are made without it.
func TestDefaultFormatIsIstios(t *testing.T) {
	t.Parallel()
	f, err := accesslog.ParseText(istiosDefault)
	if err != nil {
		t.Fatal(err)
	}
	l := &accessLog{format: f}
	for name, r := range someRecords() {
		want := string(r.appendText(nil, 9*time.Millisecond))
		if diff := cmp.Diff(want, string(l.appendFormat(nil, withHeaders(r, f), 9*time.Millisecond))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestFormatOfText(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ record, format, want string }{
		{"well", "%START_TIME(%s)% %EMIT_TIME(%s.%3f)%", "1795379401 1795379401.014"},
		{"well", "%UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %UPSTREAM_REMOTE_PORT% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_REMOTE_PORT%",
			"10.2.0.1 8080 10.1.0.1 4000"},
		{"well", "%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_LOCAL_PORT% %HOSTNAME%", "10.96.0.1 80 gate-1"},
		{"well", "%DOWNSTREAM_PEER_URI_SAN% %UPSTREAM_REQUEST_ATTEMPT_COUNT% %GRPC_STATUS%", "spiffe://cluster.local/ns/web/sa/front 2 -"},
		{"well", "%RESPONSE_DURATION% %RESPONSE_TX_DURATION% %REQUEST_DURATION%", "8 1 -"},
		{"failed", "%RESPONSE_DURATION% %RESPONSE_TX_DURATION% %RESPONSE_FLAGS%", "- - UF,URX"},
		{"failed", "%UPSTREAM_TRANSPORT_FAILURE_REASON:8% %UPSTREAM_TRANSPORT_FAILURE_REASON%", "dial tcp dial tcp: refused"},
		{"grpc", "%GRPC_STATUS% %GRPC_STATUS(SNAKE_STRING)% %GRPC_STATUS(NUMBER)% %GRPC_STATUS_NUMBER%", "PermissionDenied PERMISSION_DENIED 7 7"},
		{"tcp", "%PROTOCOL% %RESPONSE_CODE% %REQ(A)% %RESP(A)% %UPSTREAM_HOST% %UPSTREAM_REMOTE_PORT% %ROUTE_NAME%", "- 0 - - - - -"},
		{"tcp", "%DOWNSTREAM_PEER_URI_SAN% %REQUESTED_SERVER_NAME%", "spiffe://cluster.local/ns/shop/sa/gate shop.example"},
		{"spaced", "%RESPONSE_CODE_DETAILS% %RESPONSE_CODE_DETAILS(ALLOW_WHITESPACES)%", "two_words two words"},
		{"well", "100%% %FILTER_STATE(upstream_peer:FIELD:name)%", "100% -"},
		{"well", "%REQ(X-HOSTILE)%|%REQ(X-HOSTILE):3%|%REQ(NONE?X-HOSTILE):1%", `a\x0ab\" \\\x00\xc3\xa9\xff, and more|a\x0ab|a`},
	} {
		recs := someRecords()
		recs["well"].Responded = 8 * time.Millisecond
		recs["grpc"], recs["spaced"] = someRecords()["well"], someRecords()["well"]
		recs["grpc"].GRPCStatus, recs["spaced"].Details = "7", "two words"
		f, err := accesslog.ParseText(c.format)
		if err != nil {
			t.Errorf("%s: %v", c.format, err)
			continue
		}
		l := &accessLog{format: f, host: "gate-1"}
		r := recs[c.record]
		if c.record != "tcp" {
			r = withHeaders(r, f)
		}
		if diff := cmp.Diff(c.want+"\n", string(l.appendFormat(nil, r, 9*time.Millisecond))); diff != "" {
			t.Errorf("%s of %s (-want +got):\n%s", c.format, c.record, diff)
		}
	}
}

func TestFormatOfJSON(t *testing.T) {
	t.Parallel()
	f, err := accesslog.ParseJSON(`{"start": "%START_TIME%", "code": "%RESPONSE_CODE%", "took": "%DURATION% ms", "who": "%DOWNSTREAM_PEER_URI_SAN%",
		"to": {"host": "%UPSTREAM_HOST%", "cluster": "%UPSTREAM_CLUSTER%", "port": "%UPSTREAM_REMOTE_PORT%"}, "hostile": "%REQ(X-HOSTILE)%",
		"in": "<%REQ(X-HOSTILE):4%>", "none": "%REQ(NONE)%", "nothing": ["%REQ(NONE)%.", "%CEL(1)%"], "fixed": 1.50, "flags": "%RESPONSE_FLAGS%"}`)
	if err != nil {
		t.Fatal(err)
	}
	l := &accessLog{format: f}
	got := string(l.appendFormat(nil, withHeaders(someRecords()["well"], f), 9*time.Millisecond))
	want := `{"start":"2026-11-22T20:30:01.005Z","code":200,"took":"9 ms","who":"spiffe://cluster.local/ns/web/sa/front",` +
		`"to":{"host":"10.2.0.1:8080","cluster":"inbound-vip|80|http|cart.shop.svc.cluster.local","port":8080},"hostile":"a\u000ab\" \\\u0000é` + "\ufffd" + `, and more",` +
		`"in":"<a\u000ab\">","none":null,"nothing":["-.",null],"fixed":1.50,"flags":null}` + "\n"
	if diff := cmp.Diff(want, got); diff != "" || !json.Valid([]byte(got)) {
		t.Errorf("a line (-want +got):\n%s", diff)
	}
}

// TestFormatAllocatesNothing, whichever it is.
func TestFormatAllocatesNothing(t *testing.T) {
	if meshtest.Race {
		t.Skip("the race detector makes pools forget")
	}
	for _, c := range []struct {
		parse  func(string) (*accesslog.Format, error)
		json   bool
		format string
	}{
		{accesslog.ParseText, false, istiosDefault + "%START_TIME(%s.%6f)% %DOWNSTREAM_PEER_URI_SAN% %GRPC_STATUS%"},
		{accesslog.ParseJSON, true, `{"a": "%REQ(:PATH)%", "b": "%UPSTREAM_HOST% %DURATION%", "c": "%EMIT_TIME%", "d": ["%BYTES_SENT%"]}`},
	} {
		f, err := c.parse(c.format)
		if err != nil {
			t.Fatal(err)
		}
		rep := New(Config{Out: io.Discard, JSON: c.json, Format: c.format}, zap.NewNop())
		r := withHeaders(someRecords()["well"], f)
		var cache Cache
		if n := testing.AllocsPerRun(200, func() { rep.Request(r, &cache, time.Now()) }); n > 0 {
			t.Errorf("%s: %v allocations, want none", c.format, n)
		}
	}
}

// FuzzFormatLine: whatever clients write, a line is one line, in which only the format's own bytes are not printable, and one of
// JSON is JSON.
func FuzzFormatLine(f *testing.F) {
	for _, s := range []string{"a\nb", "\"}\n{\"", "\xff\xe2\x80\xa8\u0085", "\\", "%REQ(A)%", strings.Repeat("\x00", 5000)} {
		f.Add(s)
	}
	text, err := accesslog.ParseText(istiosDefault + "%REQ(A):9% %UPSTREAM_TRANSPORT_FAILURE_REASON:3% %RESPONSE_CODE_DETAILS(ALLOW_WHITESPACES)% %REQUESTED_SERVER_NAME%")
	if err != nil {
		f.Fatal(err)
	}
	object, err := accesslog.ParseJSON(`{"a": "%REQ(A)%", "b": "x%REQ(A):9%y", "c": ["%REQUESTED_SERVER_NAME%", "%UPSTREAM_TRANSPORT_FAILURE_REASON:3%"], "d": "%RESPONSE_CODE_DETAILS%"}`)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r := someRecords()["well"]
		r.SNI, r.Failure, r.Details = s, s, s
		for _, format := range []*accesslog.Format{text, object} {
			r.Headers = make([]string, len(format.Headers))
			for i := range r.Headers {
				r.Headers[i] = s
			}
			l := &accessLog{format: format}
			line := string(l.appendFormat(nil, r, time.Second))
			body, ok := strings.CutSuffix(line, "\n")
			if format == text {
				body = strings.Replace(body, "\n", "", 1) // the format's own
			}
			if !ok || strings.ContainsFunc(body, func(r rune) bool { return r < ' ' || r == 0x7f }) {
				t.Fatalf("%q makes the line %q", s, line)
			}
			if format == object && !json.Valid([]byte(line)) {
				t.Fatalf("%q makes %q, which is no JSON", s, line)
			}
		}
	})
}
