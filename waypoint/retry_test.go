package waypoint_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

// TestRetriesThatDoNotHelp: the client gets what the last try brought, as it is, and the log says why there was no other.
func TestRetriesThatDoNotHelp(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	a := new(capricious)
	vanishing := a.listen(t, a.serve1)
	busy := app(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-From", "the application")
		if w.WriteHeader(503); r.URL.Path != "/again" {
			_, _ = io.WriteString(w, "busy")
		}
	})
	unavailable := app2(t, false, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Grpc-Status", "14")
		w.Header().Set("Grpc-Message", "busy")
	})
	l.service("vanishing", "10.9.0.2", mesh.AppHTTP1, vanishing)
	l.service("busy", "10.9.0.3", mesh.AppHTTP1, busy)
	l.service("spent", "10.9.0.4", mesh.AppHTTP1, busy)
	l.service("calls", "10.9.0.5", mesh.AppGRPC, unavailable)
	l.known("vanishing", "busy", "spent", "calls")
	budget := &mesh.TrafficPolicy{Namespace: "shop", Hostname: "spent.shop.svc.cluster.local", Settings: mesh.TrafficSettings{
		RetryBudget: &mesh.RetryBudget{Percent: mesh.Fraction{Denominator: 100}, MinRate: 1, MinRateInterval: time.Hour, Interval: time.Hour}}}
	body, err := wds.EncodeTrafficPolicy(budget)
	if err != nil {
		t.Fatal(err)
	}
	l.publish(mesh.TypeTrafficPolicy, xds.Resource{Name: budget.Key(), Body: body})
	l.eventually("budget known", func() bool { return strings.Contains(l.page(":15000/config_dump"), `"MinRate"`) })
	for _, name := range []string{"vanishing", "busy", "spent", "calls"} {
		rule := func(path string, on mesh.RetryOn) mesh.HTTPRule {
			return mesh.HTTPRule{Matches: []mesh.HTTPMatch{{Path: mesh.PathMatch{Kind: mesh.PathPrefix, Value: path}}},
				Retry: &mesh.Retry{Attempts: 2, On: on, Backoff: time.Millisecond}, Backends: []mesh.Backend{to(name, 1)}}
		}
		none := rule("/none", 0)
		none.Retry = &mesh.Retry{}
		l.routesOf(name, mesh.KindVirtualService, none, rule("/connect", mesh.RetryOnConnectFailure), rule("/", mesh.RetryOn5xx|mesh.RetryOnUnavailable))
	}
	const reset = "upstream connect error or disconnect/reset before headers. "
	many := strings.Split(strings.Repeat("vanish,", 20)+"answer", ",")
	for i, c := range []struct {
		name, host, path string
		next             []string
		status           int
		body, flags      string
		asks             int // -1: not counted
	}{
		{"a status that stays", "10.9.0.3", "/", nil, 503, "busy", "URX", -1},
		{"a status that stays, and has no body", "10.9.0.3", "/again", nil, 503, "", "URX", -1},
		{"a status that is not retried", "10.9.0.3", "/none", nil, 503, "busy", "-", -1},
		{"a status of others than are retried", "10.9.0.3", "/connect", nil, 503, "busy", "-", -1},
		{"a connection that ends", "10.9.0.2", "/", many, 503, reset + "reset reason: connection termination", "UC,URX", 3},
		{"a connection that ends, which is not retried", "10.9.0.2", "/none", many, 503, reset + "reset reason: connection termination", "UC", 1},
		{"a gRPC status that stays", "10.9.0.5", "/", nil, 200, "", "URX", -1},
		{"the only retry there is", "10.9.0.4", "/", nil, 503, "busy", "UO", -1},
		{"none left", "10.9.0.4", "/", nil, 503, "busy", "UO", -1},
	} {
		path := fmt.Sprint(c.path, "?", i)
		w := a.of(path, c.next)
		req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+c.host+path, strings.NewReader("some body"))
		if err != nil {
			t.Fatal(err)
		}
		resp, body := l.do(req)
		var logged struct {
			ResponseFlags string `json:"response_flags"`
			Path          string
		}
		l.eventually("logged", func() bool {
			for line := range strings.Lines(l.log.String()) {
				if strings.Contains(line, `"response_code"`) && json.Unmarshal([]byte(line), &logged) == nil && logged.Path == path {
					return true
				}
			}
			return false
		})
		if resp.StatusCode != c.status || body != c.body || logged.ResponseFlags != c.flags {
			t.Errorf("%s: %d %q, flags %s, want %d %q, %s", c.name, resp.StatusCode, body, logged.ResponseFlags, c.status, c.body, c.flags)
		}
		if n := int(w.asked.Load()); c.asks >= 0 && n != c.asks {
			t.Errorf("%s: asked %d times, want %d", c.name, n, c.asks)
		}
		if from := resp.Header.Get("X-From"); (c.body == "busy") != (from != "") && c.path != "/again" {
			t.Errorf("%s: the answer is from %q", c.name, from)
		}
	}
}
