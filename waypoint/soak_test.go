package waypoint_test

import (
	"bufio"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/waypoint"
)

func acceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// soak is what TestSoak keeps.
type soak struct {
	*lab
	t      *testing.T
	apps   *soakApps
	calls  *grpc.Server
	clear  string // address of announced connections
	judged []*mesh.Service
	until  time.Time
	next   atomic.Int64
	tally  sync.Map // what happened -> *atomic.Int64

	mu   sync.Mutex
	told map[string]bool // requests that were answered
}

func (s *soak) count(what string) {
	n, _ := s.tally.LoadOrStore(what, new(atomic.Int64))
	n.(*atomic.Int64).Add(1)
}

func (s *soak) id() string { return fmt.Sprintf("q%dx%x", s.next.Add(1), rand.Uint32()) }

// TestSoak is everything at once: clients and applications of all kinds and manners, and a configuration that changes all the time.
// Nobody may get what is another's; what nothing was done to must be answered; when all have gone nothing is left of them, every
// request is counted and logged, and a drain lets those end that are under way. It is for who looks for faults: what so many breaking
// connections do to honest requests is not told beforehand, so it runs only where MISTNET_SOAK says for how long, as 10s.
func TestSoak(t *testing.T) {
	text := os.Getenv("MISTNET_SOAK")
	if text == "" {
		t.Skip("MISTNET_SOAK does not say for how long")
	}
	long, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	goroutines, files := runtime.NumGoroutine(), openFiles(t)
	s := &soak{t: t, apps: newSoakApps(t), clear: loopback() + ":15088", told: map[string]bool{}}
	s.lab = newLab(t, func(c *waypoint.Config) { c.ProxyAddr, c.SniffTimeout, c.AccessLog = s.clear, 5*time.Second, true })
	s.services()
	s.until = time.Now().Add(long)
	s.storm()
	s.atRest()
	s.complete()
	s.drain()
	s.apps.close()
	s.calls.Stop()
	s.stopIstiod()
	s.eventually("no goroutine and no file is left", func() bool {
		return runtime.NumGoroutine() <= goroutines && openFiles(t) <= files
	})
	t.Logf("%d goroutines and %d files before, %d and %d after", goroutines, files, runtime.NumGoroutine(), openFiles(t))
	s.tally.Range(func(what, n any) bool { t.Logf("%-32v %d", what, n.(*atomic.Int64).Load()); return true })
}

func openFiles(t *testing.T) int {
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func (s *soak) services() {
	one, two := s.apps.serve(s.apps.one), s.apps.serve(s.apps.two)
	s.judged = append(s.judged, s.service("one", "10.9.0.1", mesh.AppHTTP1, one, s.apps.serve(s.apps.one)),
		s.service("two", "10.9.0.2", mesh.AppHTTP2, two, s.apps.serve(s.apps.two)))
	calls, srv := grpcApp(s.t, func(method string, g grpc.ServerStream) error {
		if strings.HasSuffix(method, "Never") {
			<-g.Context().Done()
			return status.Error(codes.Aborted, "too late")
		}
		return echo("")(method, g)
	})
	s.calls = srv
	s.service("calls", "10.9.0.3", mesh.AppGRPC, calls)
	s.service("bytes", "10.9.0.4", mesh.AppTCP, s.apps.serve(s.apps.echo))
	s.service("silent", "10.9.0.6", mesh.AppHTTP1, s.apps.serve(s.apps.silent))
	s.judged = append(s.judged, s.service("wild", "10.9.0.5", mesh.AppHTTP2, s.apps.serve(s.apps.two)),
		s.service("unknown", "10.9.0.7", mesh.AppUnknown, one))
	s.known("one", "two", "calls", "bytes", "wild", "silent", "unknown")
	s.policy("no", mesh.Deny, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "/denied"})
	for _, svc := range s.judged {
		s.guarded(svc, "shop/no")
		s.becomes("denied", "http://"+vips[svc.Name]+"/denied", http.StatusForbidden)
	}
}

// storm is the time when everybody is there.
func (s *soak) storm() {
	var work sync.WaitGroup
	each := func(n int, f func()) {
		for range n {
			work.Go(func() {
				for time.Now().Before(s.until) && !s.t.Failed() {
					f()
				}
			})
		}
	}
	h1, h2 := s.client, s.client2()
	each(4, func() { s.ask(h1, []string{"one", "two", "unknown", "wild"}[rand.IntN(4)]) })
	each(8, func() { s.ask(h2, []string{"one", "two", "two", "wild"}[rand.IntN(4)]) })
	each(2, s.pipelined)
	cc := s.grpc("10.9.0.3:80")
	each(3, func() { s.call(cc) })
	each(1, s.tcp)
	each(1, s.socket1)
	ws := s.transport2("10.9.0.1:80")
	each(1, func() { s.socket2(ws) })
	each(2, s.vandal1)
	each(2, s.vandal2)
	each(1, s.vanishing)
	each(1, s.slowly)
	work.Go(s.changes)
	work.Wait()
	h1.CloseIdleConnections()
	h2.CloseIdleConnections()
	cc.Close()
	//lint:ignore SA1019 net/http's own takes no header of the name :protocol
	ws.(*xhttp2.Transport).CloseIdleConnections()
}

var vips = map[string]string{"one": "10.9.0.1", "two": "10.9.0.2", "calls": "10.9.0.3", "bytes": "10.9.0.4", "wild": "10.9.0.5", "unknown": "10.9.0.7"}

// The moods of which the answer is known, and those that may fail, but never by another's answer.
var (
	fair = []string{"ok", "ok", "ok", "ok", "slow", "interim", "pieces", "close"}
	foul = []string{"cut", "reset", "503", "refused", "never", "early", "cancelled", "denied", "kill"}
)

// ask makes a request and judges the answer.
func (s *soak) ask(c *http.Client, service string) {
	m := mood{s.id(), fair[rand.IntN(len(fair))], rand.IntN(100)}
	strict := service != "wild"
	if rand.IntN(3) == 0 {
		m.what, strict = foul[rand.IntN(len(foul))], false
	}
	if m.what == "kill" {
		service = "wild"
	}
	if m.what == "denied" {
		m.id = "denied" + m.id
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	switch m.what {
	case "never", "cancelled":
		ctx, cancel = context.WithTimeout(ctx, time.Duration(rand.IntN(30))*time.Millisecond)
	}
	defer cancel()
	method, body := []string{"GET", "GET", "HEAD", "PUT", "POST"}[rand.IntN(5)], io.Reader(nil)
	if method == "PUT" || method == "POST" {
		m.lengthen()
		body = strings.NewReader(m.body())
		if rand.IntN(2) == 0 {
			body = struct{ io.Reader }{body} // of unknown length
		}
	}
	if m.what == "close" && method == "POST" && service != "two" {
		m.what = "ok" // it may meet a connection that is about to be closed, and must not be sent twice
	}
	req, _ := http.NewRequestWithContext(ctx, method, "http://"+vips[service]+m.target(), body)
	resp, err := c.Do(req)
	if err != nil {
		if strict {
			s.t.Errorf("%s %s of %s: %v", method, m.target(), service, err)
		}
		s.count("failed: " + m.what)
		return
	}
	text, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	s.judge(service, method, m, resp, string(text), err, strict)
}

func (s *soak) judge(service, method string, m mood, resp *http.Response, text string, err error, strict bool) {
	s.mu.Lock()
	s.told[m.id] = true
	s.mu.Unlock()
	what := fmt.Sprintf("%s %s of %s by %s", method, m.target(), service, resp.Proto)
	id, want := resp.Header.Get("X-Id"), m.text()
	if method == "HEAD" {
		want = ""
	}
	switch {
	case m.what == "denied":
		if resp.StatusCode != 403 || id != "" {
			s.t.Errorf("%s: %d, want 403", what, resp.StatusCode)
		}
	case id != "" && id != m.id, id != "" && err == nil && text != want, !strings.HasPrefix(want, text) && id != "":
		s.t.Errorf("%s: the answer is %q's, and says %.80q, %v", what, id, text, err)
	case id == "" && resp.StatusCode < 500:
		s.t.Errorf("%s: %s is nobody's answer, %q", what, resp.Status, text)
	case resp.StatusCode == 200 && err == nil:
		if end := resp.Trailer.Get("X-Id-End"); method != "HEAD" && end != m.id {
			s.t.Errorf("%s: the trailer is %q's", what, end)
		}
		s.count("well: " + m.what)
		return
	case strings.HasSuffix(text, "overflow"), resp.Header.Get("X-Envoy-Overloaded") != "":
	case method == "POST" && service != "two" && strings.Contains(text, "connection termination"): // net/http's HTTP/1.1 servers do so, too
	case m.n >= notKept && strings.Contains(text, "reset reason"): // it cannot be sent again: more had gone than is kept
		s.count("too long to be sent again")
	case strict:
		s.t.Errorf("%s: %s %q, %v", what, resp.Status, text, err)
	}
	s.count("ill: " + m.what)
}

// pipelined sends requests one behind the other, and expects the answers so.
func (s *soak) pipelined() {
	service := []string{"one", "two", "unknown"}[rand.IntN(3)]
	var conn net.Conn
	var err error
	if rand.IntN(2) == 0 && service == "one" {
		if conn, err = net.Dial("tcp", s.clear); err == nil {
			_, err = conn.Write(announcement("127.0.0.1:4711", "10.9.0.1:80", "\xd0spiffe://cluster.local/ns/web/sa/front"))
		}
	} else {
		conn, err = s.open(context.Background(), vips[service]+":80")
	}
	if err != nil {
		s.t.Error(err)
		return
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	r := bufio.NewReader(conn)
	for range 1 + rand.IntN(3) {
		all := make([]mood, 1+rand.IntN(8))
		methods := make([]string, len(all))
		var text strings.Builder
		for i := range all {
			all[i] = mood{s.id(), []string{"ok", "slow", "interim"}[rand.IntN(3)], rand.IntN(60)}
			if i%2 == 0 {
				methods[i] = "GET"
				fmt.Fprintf(&text, "GET %s HTTP/1.1\r\nHost: a\r\n\r\n", all[i].target())
			} else {
				methods[i] = "PUT"
				all[i].lengthen()
				fmt.Fprintf(&text, "PUT %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", all[i].target(), len(all[i].body()), all[i].body())
			}
		}
		cut := rand.IntN(text.Len())
		_, _ = io.WriteString(conn, text.String()[:cut])
		runtime.Gosched()
		_, _ = io.WriteString(conn, text.String()[cut:])
		for i, m := range all {
			resp, err := http.ReadResponse(r, nil)
			for err == nil && resp.StatusCode < 200 {
				resp, err = http.ReadResponse(r, nil)
			}
			if err != nil {
				s.t.Errorf("%s, pipelined: %v", m.target(), err)
				return
			}
			body, err := io.ReadAll(resp.Body)
			s.judge(service, methods[i], m, resp, string(body), err, true)
			if resp.Close && m.n >= notKept { // nor is its end waited for
				return
			}
		}
		if rand.IntN(3) == 0 {
			time.Sleep(120 * time.Millisecond) // long enough to be parked
		}
	}
}

// call makes a gRPC call of one kind or another.
func (s *soak) call(cc *grpc.ClientConn) {
	id := s.id()
	switch rand.IntN(4) {
	case 0:
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rand.IntN(20))*time.Millisecond)
		defer cancel()
		if out, err := call(ctx, cc, "/soak/Never", id); err == nil {
			s.t.Errorf("a call that is not answered returns %q", out)
		}
		s.count("gRPC, cancelled")
	case 1:
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		b, err := cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/soak/Both")
		for i := range 1 + rand.IntN(5) {
			var out wrapperspb.StringValue
			want := fmt.Sprint(id, "-", i)
			if err == nil {
				err = b.SendMsg(wrapperspb.String(want))
			}
			if err == nil {
				err = b.RecvMsg(&out)
			}
			if err != nil || out.GetValue() != want {
				s.t.Errorf("gRPC, both ways: %q, %v, want %q", out.GetValue(), err, want)
				return
			}
		}
		if rand.IntN(2) == 0 {
			return // cancelled
		}
		_ = b.CloseSend()
		if err := b.RecvMsg(new(wrapperspb.StringValue)); err != io.EOF {
			s.t.Errorf("gRPC, both ways: the end is %v", err)
		}
		s.count("gRPC, both ways")
	default:
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if out, err := call(ctx, cc, "/soak/Once", id); err != nil || out != id {
			s.t.Errorf("gRPC: %q, %v, want %q", out, err, id)
		}
		s.count("gRPC")
	}
}

// changes publishes another configuration every 50 ms.
func (s *soak) changes() {
	zero := time.Duration(0)
	soon := time.Millisecond
	settings := []mesh.TrafficSettings{
		{},
		{Pool: &mesh.ConnectionPool{MaxRequests: 2}},
		{Pool: &mesh.ConnectionPool{MaxConnections: 3}},
		{Pool: &mesh.ConnectionPool{MaxPerConnection: 2, HTTPIdleTimeout: &soon}, RetryBudget: &mesh.RetryBudget{MinConcurrency: 1}},
		{Pool: &mesh.ConnectionPool{MaxRetries: 1, MaxStreams: 3, HTTPIdleTimeout: &zero}},
		{Balancer: &mesh.Balancer{}},
	}
	rules := []mesh.HTTPRule{
		{},
		{Timeout: 10 * time.Second, Retry: &mesh.Retry{Attempts: 2, On: mesh.RetryOn5xx | mesh.RetryOnReset, Backoff: time.Millisecond}},
		{Mirrors: []mesh.Mirror{{Ref: to("silent", 1).Ref, Percent: all}}},
		{TryTimeout: 5 * time.Second, Retry: &mesh.Retry{Attempts: 1, On: mesh.RetryOnGatewayError}, Mirrors: []mesh.Mirror{{Ref: to("wild", 1).Ref, Percent: all}}},
	}
	for n := 0; time.Now().Before(s.until); n++ {
		for _, service := range []string{"one", "two"} {
			s.change(service, settings[rand.IntN(len(settings))], rules[rand.IntN(len(rules))])
		}
		s.policy("other", mesh.Deny, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: fmt.Sprint("/nobody", n)})
		keys := []string{"shop/no"}
		if n%2 == 0 {
			keys = append(keys, "shop/other")
		}
		for _, svc := range s.judged {
			s.guarded(svc, keys...)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// change publishes what is to be done with requests to a service.
func (s *soak) change(service string, settings mesh.TrafficSettings, rule mesh.HTTPRule) {
	p := &mesh.TrafficPolicy{Namespace: "shop", Hostname: service + ".shop.svc.cluster.local", Settings: settings}
	body, err := wds.EncodeTrafficPolicy(p)
	if err != nil {
		s.t.Error(err)
	}
	s.publish(mesh.TypeTrafficPolicy, xds.Resource{Name: p.Key(), Body: body})
	rule.Backends = []mesh.Backend{to(service, 1)}
	r := &mesh.Route{Kind: mesh.KindVirtualService, Namespace: "shop", Name: service, Protocol: mesh.RouteHTTP, HTTP: &rule,
		Created: time.Unix(1, 0).UTC(), Parents: []mesh.RouteParent{{Namespace: "shop", Hostname: p.Hostname}}}
	if body, err = wds.EncodeRoute(r); err != nil {
		s.t.Error(err)
	}
	s.publish(mesh.TypeRoute, xds.Resource{Name: r.Key(), Body: body})
}

// atRest waits until nothing is left of the clients that have gone.
func (s *soak) atRest() {
	var left string
	defer func() {
		if s.t.Failed() {
			s.t.Log(left)
			_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
		}
	}()
	s.eventually("all at rest", func() bool {
		var d struct {
			Clusters []struct {
				Service         string
				Active, Retries uint32
				Waiting         int
				Endpoints       []struct{ Active int64 }
			}
			HTTPConnections struct{ Serving, Parked int }
		}
		if json.Unmarshal([]byte(s.page(":15000/config_dump")), &d) != nil {
			return false
		}
		left = fmt.Sprintf("%+v", d)
		for _, c := range d.Clusters {
			if c.Active+c.Retries > 0 || c.Waiting > 0 {
				return false
			}
			for _, e := range c.Endpoints {
				if e.Active != 0 && c.Service != "shop/silent.shop.svc.cluster.local" && !strings.Contains(c.Service, "wild") { // those of mirrors are given 15 s
					return false
				}
			}
		}
		return d.HTTPConnections.Serving+d.HTTPConnections.Parked == 0
	})
}

// complete compares what was answered with what was logged and counted.
func (s *soak) complete() {
	logged := make(map[string]int)
	lines, counted := 0, 0
	s.eventually("as many requests counted as logged", func() bool {
		clear(logged)
		lines, counted = 0, 0
		for line := range strings.Lines(s.page(":15020/stats/prometheus")) {
			if strings.HasPrefix(line, "istio_requests_total{") {
				n, _ := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndexByte(line, ' '):]), 64)
				counted += int(n)
			}
		}
		for line := range strings.Lines(s.log.String()) {
			var r struct{ Path, Protocol string }
			if !strings.Contains(line, `"response_code"`) || json.Unmarshal([]byte(line), &r) != nil || r.Protocol == "" {
				continue
			}
			lines++
			logged[moodOf(r.Path).id]++
		}
		return lines == counted
	})
	for id := range s.told {
		if logged[id] == 0 { // more than once: its client has tried again by itself
			s.t.Errorf("request %s was answered, and is not logged", id)
		}
	}
	s.t.Logf("%d requests answered, %d counted and logged", len(s.told), lines)
}

// drain stops the waypoint while requests are under way: they are answered.
func (s *soak) drain() {
	const each = 10
	s.change("one", mesh.TrafficSettings{}, mesh.HTTPRule{})
	s.change("two", mesh.TrafficSettings{}, mesh.HTTPRule{})
	s.eventually("no bounds", func() bool {
		_, after, _ := strings.Cut(s.page(":15000/config_dump"), `"trafficPolicies"`)
		return !strings.Contains(after, `"MaxRetries"`)
	})
	var work sync.WaitGroup
	h2 := s.client2()
	for _, c := range []*http.Client{s.client, h2} {
		for _, service := range []string{"one", "two"} {
			for range each {
				work.Go(func() {
					m := mood{s.id(), "held", 5}
					resp, err := c.Get("http://" + vips[service] + m.target())
					if err != nil {
						s.t.Errorf("under way at the drain: %v", err)
						return
					}
					body, err := io.ReadAll(resp.Body)
					_ = resp.Body.Close()
					s.judge(service, "GET", m, resp, string(body), err, true)
				})
			}
		}
	}
	for range 4 * each {
		select {
		case <-s.apps.slow:
		case <-time.After(20 * time.Second):
			s.t.Error("requests do not reach their applications")
		}
	}
	s.stop()
	s.eventually("draining", func() bool { return s.page(":15021/healthz/ready") != "ready\n" })
	close(s.apps.go_)
	work.Wait()
	s.client.CloseIdleConnections()
	h2.CloseIdleConnections()
	_ = s.pool.Close()
	s.end()
}
