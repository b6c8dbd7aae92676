package accesslog_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/mistnet/mistnet/internal/accesslog"
)

func TestParseText(t *testing.T) {
	t.Parallel()
	type parts = []accesslog.Part
	lit := func(s string) accesslog.Part { return accesslog.Part{Op: accesslog.Literal, Text: s} }
	for name, c := range map[string]struct {
		format  string
		parts   parts
		headers []accesslog.Header
		never   []string
	}{
		"no operator":            {"hello\n", parts{lit("hello\n")}, nil, nil},
		"a line end is added":    {"%PROTOCOL%", parts{{Op: accesslog.Protocol}, lit("\n")}, nil, nil},
		"one is enough":          {"%PROTOCOL%\n", parts{{Op: accesslog.Protocol}, lit("\n")}, nil, nil},
		"several lines":          {"a\n%DURATION%\n\n", parts{lit("a\n"), {Op: accesslog.Duration}, lit("\n\n")}, nil, nil},
		"a percent sign":         {"100%% %BYTES_SENT%%%", parts{lit("100% "), {Op: accesslog.BytesSent}, lit("%\n")}, nil, nil},
		"several forms of one":   {"%UPSTREAM_CLUSTER%%UPSTREAM_CLUSTER_RAW%", parts{{Op: accesslog.UpstreamCluster}, {Op: accesslog.UpstreamCluster}, lit("\n")}, nil, nil},
		"status of gRPC, named":  {"%GRPC_STATUS%", parts{{Op: accesslog.GRPCStatus, Style: "CAMEL_STRING"}, lit("\n")}, nil, nil},
		"status of gRPC, asked":  {"%GRPC_STATUS(SNAKE_STRING)%", parts{{Op: accesslog.GRPCStatus, Style: "SNAKE_STRING"}, lit("\n")}, nil, nil},
		"status of gRPC, number": {"%GRPC_STATUS_NUMBER%", parts{{Op: accesslog.GRPCStatus, Style: "NUMBER"}, lit("\n")}, nil, nil},
		"a status as header":     {"%RESP(:STATUS)%", parts{{Op: accesslog.ResponseCode}, lit("\n")}, nil, nil},
		"headers, each once": {
			"%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %RESP(Server):5% %TRAILER(grpc-message)% %REQ(x-envoy-original-path?:path):7% %REQ_WITHOUT_QUERY(:PATH)% %REQ(A?)%",
			parts{
				{Op: accesslog.FromHeader}, lit(" "), {Op: accesslog.FromHeader, At: 1, Most: 5}, lit(" "), {Op: accesslog.FromHeader, At: 2}, lit(" "),
				{Op: accesslog.FromHeader, Most: 7}, lit(" "), {Op: accesslog.FromHeader, At: 3}, lit(" "), {Op: accesslog.FromHeader, At: 4}, lit("\n"),
			},
			[]accesslog.Header{
				{Of: accesslog.Request, Name: "x-envoy-original-path", Or: ":path"}, {Of: accesslog.Response, Name: "server"},
				{Of: accesslog.Trailer, Name: "grpc-message"}, {Of: accesslog.Request, Name: ":path", WithoutQuery: true}, {Of: accesslog.Request, Name: "a"},
			}, nil,
		},
		"what is not known here": {
			"%CEL(request.headers['x'].size() > 3)% %DYNAMIC_METADATA(a:b):3% %FILTER_STATE(upstream_peer:FIELD:name)% %CEL(1)%",
			parts{{Op: accesslog.Never}, lit(" "), {Op: accesslog.Never, Most: 3}, lit(" "), {Op: accesslog.Never}, lit(" "), {Op: accesslog.Never}, lit("\n")},
			nil, []string{"CEL", "DYNAMIC_METADATA", "FILTER_STATE"},
		},
	} {
		f, err := accesslog.ParseText(c.format)
		if err != nil {
			t.Errorf("%s: ParseText(%q) = %v", name, c.format, err)
			continue
		}
		want := &accesslog.Format{Parts: c.parts, Headers: c.headers, Never: c.never}
		for i := range f.Parts {
			if f.Parts[i].Op == accesslog.Never {
				f.Parts[i].Style = ""
			}
		}
		if diff := cmp.Diff(want, f, cmpopts.IgnoreUnexported(accesslog.Part{})); diff != "" {
			t.Errorf("%s: ParseText(%q) (-want +got):\n%s", name, c.format, diff)
		}
	}
}

func TestParseTextRefuses(t *testing.T) {
	t.Parallel()
	for format, want := range map[string]string{
		"%NO_SUCH% %REQ(A)% %NOR_THIS(a)%":     "%NO_SUCH% is no operator that is known\n%NOR_THIS% is no operator that is known",
		"100%":                                 `"%" begins no operator; a percent sign is written %%`,
		"a % b":                                `"% b" begins no operator; a percent sign is written %%`,
		"%REQ(A%":                              `"%REQ(A%" begins no operator; a percent sign is written %%`,
		"%REQ(A):x%":                           `"%REQ(A):x%" begins no operator; a percent sign is written %%`,
		"%REQ(A):0%":                           `"%REQ(A):0%" begins no operator; a percent sign is written %%`,
		"%REQ%":                                `%REQ()%: "" is no name of a header there`,
		"%REQ(?B)%":                            `%REQ(?B)%: "" is no name of a header there`,
		"%REQ(A B)%":                           `%REQ(A B)%: "a b" is no name of a header there`,
		"%REQ(A?B?C)%":                         `%REQ(A?B?C)%: "b?c" is no name of a header there`,
		"%REQ(:STATUS)%":                       `%REQ(:STATUS)%: ":status" is no name of a header there`,
		"%RESP(:PATH)%":                        `%RESP(:PATH)%: ":path" is no name of a header there`,
		"%DURATION:3%":                         "%DURATION% takes no length",
		"%DURATION(x)%":                        "%DURATION(x)%: want nothing in parentheses",
		"%GRPC_STATUS(LOUD)%":                  "%GRPC_STATUS(LOUD)%: want nothing in parentheses or CAMEL_STRING or SNAKE_STRING or NUMBER",
		"%START_TIME(%Q)%":                     `%START_TIME(%Q)%: "%Q" is no part of a time that is known`,
		"%START_TIME(%)%":                      `%START_TIME(%)%: "%" ends the format of a time`,
		"%START_TIME(\"%s\")%":                 `%START_TIME("%s")%: "\"" cannot be part of a time`,
		strings.Repeat("x", 16<<10+1):          "16385 bytes, want no more than 16384",
		strings.Repeat("%DURATION%", 101):      "101 operators, want no more than 100",
		strings.Repeat("%A%", 30) + "%PROTOC%": strings.TrimSuffix(strings.Repeat("%A% is no operator that is known\n", 10), "\n"),
	} {
		if f, err := accesslog.ParseText(format); err == nil || err.Error() != want {
			t.Errorf("ParseText(%.40q) = %v, %v, want error %q", format, f, err, want)
		}
	}
}

// written is a format with operators written by name.
func written(f *accesslog.Format) string {
	var b strings.Builder
	for _, p := range f.Parts {
		switch {
		case p.Op == accesslog.Literal:
			b.WriteString(p.Text)
		case p.Place == accesslog.AsJSON:
			b.WriteString("7")
		default:
			b.WriteString("<value>")
		}
	}
	return b.String()
}

func TestParseJSON(t *testing.T) {
	t.Parallel()
	for format, want := range map[string]string{
		`{}`: `{}`,
		`{"b": "%PROTOCOL%", "a": "%PROTOCOL% in %DURATION%", "c":"100%%"}`: `{"b":7,"a":"<value> in <value>","c":"100%"}`,
		` {"n": {"deep": ["%BYTES_SENT%", "x", 1.50, true, null, {}]}} `:    `{"n":{"deep":[7,"x",1.50,true,null,{}]}}`,
		`{"a\"b\n": "\"\\\u0001%PROTOCOL%\"<é>"}`:                           `{"a\"b\n":"\"\\\u0001<value>\"<é>"}`,
		`{"%PROTOCOL%": ""}`:                         `{"%PROTOCOL%":""}`,
		`{"cut": "%REQ(A):3%", "tail": "%REQ(A)%%"}`: "",
		`{"cut": "%REQ(A):3%", "two": "%REQ(A)%%%"}`: `{"cut":7,"two":"<value>%"}`,
	} {
		f, err := accesslog.ParseJSON(format)
		if want == "" {
			if err == nil {
				t.Errorf("ParseJSON(%s) = %s, want an error", format, written(f))
			}
			continue
		}
		if err != nil || written(f) != want+"\n" || !json.Valid([]byte(written(f))) {
			t.Errorf("ParseJSON(%s) = %v, want %s", format, err, want)
			if err == nil {
				t.Errorf("got %s", written(f))
			}
		}
	}
	for format, want := range map[string]string{
		"":                                "no JSON object: EOF",
		"%PROTOCOL%":                      "no JSON object: invalid character '%' looking for beginning of value",
		`["%PROTOCOL%"]`:                  "no JSON object: it begins with [",
		`{"a": "%NO_SUCH%"}`:              "%NO_SUCH% is no operator that is known",
		`{"a": 1} x`:                      "something follows the JSON object",
		`{"a": 1`:                         "malformed JSON",
		`{"a" 1}`:                         "malformed JSON",
		strings.Repeat(`{"a":`, 40) + "1": "JSON is nested more than 16 times",
	} {
		if f, err := accesslog.ParseJSON(format); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseJSON(%.60s) = %v, %v, want error %q", format, f, err, want)
		}
	}
}

func TestTimes(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 1, 2, 3, 4, 5, 6007008, time.FixedZone("", 3600))
	for args, want := range map[string]string{
		"":                             "2026-01-02T02:04:05.006Z",
		"(%Y/%m/%dT%H:%M:%S%z %s)":     "2026/01/02T02:04:05+0000 1767319445",
		"(%s.%3f %6f %9f %f %1f)":      "1767319445.006 006007 006007008 006007008 0",
		"(%F %T, %a %e %b %y; 100%% )": "2026-01-02 02:04:05, Fri  2 Jan 26; 100% ",
	} {
		f, err := accesslog.ParseText("%START_TIME" + args + "%")
		if err != nil {
			t.Errorf("START_TIME%s: %v", args, err)
			continue
		}
		if got := string(f.Parts[0].AppendTime(nil, at)); got != want {
			t.Errorf("START_TIME%s = %q, want %q", args, got, want)
		}
	}
}

// FuzzFormat: whatever is read can be written, what JSON is read is JSON when it is written, and every fault is found.
func FuzzFormat(f *testing.F) {
	for _, s := range []string{
		`[%START_TIME(%s.%3f)%] "%REQ(:METHOD)% %REQ(X?:PATH):20%" %%`, `{"a":["%DURATION%",{"b\u0000":"x%PROTOCOL%"}],"c":1e9}`, "%", "%REQ(", "%A(%)%)%", `{"a":"%"}`,
	} {
		f.Add(s)
	}
	at := time.Unix(1, 2)
	f.Fuzz(func(t *testing.T, s string) {
		for name, parse := range map[string]func(string) (*accesslog.Format, error){"text": accesslog.ParseText, "JSON": accesslog.ParseJSON} {
			format, err := parse(s)
			if (format == nil) != (err != nil) {
				t.Fatalf("%q is read as %v and is wrong for %v", s, format, err)
			}
			if err != nil {
				continue
			}
			for i := range format.Parts {
				p := &format.Parts[i]
				if p.Op == 0 || p.Op == accesslog.FromHeader && p.At >= len(format.Headers) || (p.Place == accesslog.InText) != (name == "text") && p.Op != accesslog.Literal {
					t.Fatalf("%q has part %+v", s, p)
				}
				for _, c := range p.AppendTime(nil, at) {
					if c < ' ' || c > '~' || c == '"' || c == '\\' {
						t.Fatalf("a time of %q has %q", s, c)
					}
				}
			}
			if line := written(format); !strings.HasSuffix(line, "\n") || name == "JSON" && !json.Valid([]byte(line)) {
				t.Fatalf("%q is written as %q", s, line)
			}
		}
	})
}

func TestParseHeader(t *testing.T) {
	t.Parallel()
	got, err := accesslog.ParseHeader(`50%% "of" %REQ(X-User):8%`)
	want := &accesslog.Format{
		Parts:   []accesslog.Part{{Op: accesslog.Literal, Text: `50% "of" `}, {Op: accesslog.FromHeader, Place: accesslog.InHeader, Most: 8}},
		Headers: []accesslog.Header{{Of: accesslog.Request, Name: "x-user"}},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(accesslog.Part{})); diff != "" || err != nil {
		t.Errorf("ParseHeader: %v (-want +got):\n%s", err, diff)
	}
	for _, bad := range []string{"100%", "%NONSENSE%", "%REQ%", "%REQ(a b)%", strings.Repeat("a", 5000), strings.Repeat("%PROTOCOL%", 101)} {
		if _, err := accesslog.ParseHeader(bad); err == nil {
			t.Errorf("ParseHeader(%.40q): no error", bad)
		}
	}
}
