package waypoint_test

import (
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// TestTimeoutsRunFromWhenTheRequestHasCome: an upload may take longer than the timeouts of its rule, whatever versions of HTTP are
// spoken; once it has come the application has as long as they say, also for the rest of a response that it began before.
func TestTimeoutsRunFromWhenTheRequestHasCome(t *testing.T) {
	t.Parallel()
	const (
		long  = 2 * time.Second
		short = 100 * time.Millisecond
	)
	l := newLab(t, nil)
	var begun sync.Map // by their names, the channels of requests whose heads are to reach the application
	application := func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		if r.URL.Path == "/short/begun" {
			w.WriteHeader(200)
			_ = http.NewResponseController(w).Flush()
		}
		if ch, ok := begun.Load(r.Header.Get("X-Name")); ok {
			close(ch.(chan struct{}))
		}
		body, _ := io.ReadAll(r.Body)
		if r.URL.Path != "/long" && r.URL.Path != "/try" {
			<-r.Context().Done()
			return
		}
		_, _ = w.Write(body)
	}
	l.service("one", "10.9.0.1", mesh.AppHTTP1, app(t, application))
	l.service("two", "10.9.0.2", mesh.AppHTTP2, app2(t, false, application))
	l.known("one", "two")
	for _, name := range []string{"one", "two"} {
		b := []mesh.Backend{to(name, 1)}
		l.routesOf(name, mesh.KindVirtualService,
			mesh.HTTPRule{Matches: prefix("/long"), Timeout: long, Backends: b},
			mesh.HTTPRule{Matches: prefix("/try"), TryTimeout: long, Retry: &mesh.Retry{}, Backends: b},
			mesh.HTTPRule{Matches: prefix("/short"), Timeout: short, Backends: b},
			mesh.HTTPRule{Matches: prefix("/brief"), TryTimeout: short, Retry: &mesh.Retry{}, Backends: b})
	}
	for client, c := range map[string]*http.Client{"HTTP/1.1": l.client, "HTTP/2": l.client2()} {
		for _, vip := range []string{"10.9.0.1", "10.9.0.2"} {
			for path, status := range map[string]int{"/long": 200, "/try": 200, "/short": 504, "/brief": 504, "/short/begun": 200} {
				name := client + " to " + vip + path
				came := make(chan struct{})
				begun.Store(name, came)
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					body, rest := io.Pipe()
					go func() {
						_, _ = io.WriteString(rest, "a")
						<-came
						if status == 200 && path != "/short/begun" {
							<-time.After(long + long/4)
						}
						_, _ = io.WriteString(rest, "b")
						_ = rest.Close()
					}()
					req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+vip+path, body)
					if err != nil {
						t.Fatal(err)
					}
					req.Header.Set("X-Name", name)
					resp, err := c.Do(req)
					if err != nil {
						t.Fatal(err)
					}
					got, err := io.ReadAll(resp.Body)
					resp.Body.Close()
					switch {
					case resp.StatusCode != status:
						t.Errorf("answer is %d %q, want %d", resp.StatusCode, got, status)
					case path == "/short/begun" && err == nil:
						t.Error("a response that takes too long ends in order")
					case status == 200 && path != "/short/begun" && string(got) != "ab":
						t.Errorf("the application was sent %q, want ab", got)
					}
				})
			}
		}
	}
}

// TestFaultsAreNotTheApplicationsTime: what a rule delays a request by is no part of its timeout.
func TestFaultsAreNotTheApplicationsTime(t *testing.T) {
	t.Parallel()
	const timeout = 2 * time.Second
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "cart"))
	l.known("cart")
	l.routes(mesh.KindVirtualService, mesh.HTTPRule{
		Timeout: timeout, Fault: &mesh.Fault{Delay: mesh.Delay{Percent: all, Fixed: timeout + timeout/4}}, Backends: []mesh.Backend{to("cart", 1)},
	})
	if resp, body := l.get("http://10.9.0.1/x"); resp.StatusCode != 200 || body != "cart /x" {
		t.Errorf("a request that is delayed by more than its timeout = %d %q, want 200", resp.StatusCode, body)
	}
}
