package waypoint_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/route"
)

// grpcApp starts a gRPC application whose every method is h.
func grpcApp(t *testing.T, h func(method string, s grpc.ServerStream) error) (netip.AddrPort, *grpc.Server) {
	t.Helper()
	ln := listen(t, loopback()+":0")
	srv := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(s)
		return h(method, s)
	}))
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(srv.Stop)
	return addrPort(ln.Addr()), srv
}

// echo answers each message with its name and the message.
func echo(name string) func(string, grpc.ServerStream) error {
	return func(_ string, s grpc.ServerStream) error {
		for {
			var m wrapperspb.StringValue
			if err := s.RecvMsg(&m); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			if err := s.SendMsg(wrapperspb.String(name + m.GetValue())); err != nil {
				return err
			}
		}
	}
}

// grpc opens a gRPC connection to a service's address through the tunnel.
func (l *lab) grpc(addr string) *grpc.ClientConn {
	l.t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return l.open(ctx, addr) }))
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { cc.Close() })
	return cc
}

func call(ctx context.Context, cc *grpc.ClientConn, method, text string) (string, error) {
	var out wrapperspb.StringValue
	err := cc.Invoke(ctx, method, wrapperspb.String(text), &out)
	return out.GetValue(), err
}

// counted waits until a request was counted with all of these labels.
func (l *lab) counted(labels ...string) {
	l.t.Helper()
	l.eventually("counted as "+strings.Join(labels, ","), func() bool {
	lines:
		for line := range strings.Lines(l.page(":15020/stats/prometheus")) {
			if !strings.HasPrefix(line, "istio_requests_total{") {
				continue
			}
			for _, label := range labels {
				if !strings.Contains(line, label) {
					continue lines
				}
			}
			return true
		}
		return false
	})
}

// TestGRPC: calls of one connection go to every endpoint, statuses are the application's, and both are counted.
func TestGRPC(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	fail := func(method string, s grpc.ServerStream) error {
		if method == "/shop.Cart/Get" {
			return echo("a ")(method, s)
		}
		return status.Error(codes.NotFound, "no such thing: 100 %")
	}
	a, _ := grpcApp(t, fail)
	b, _ := grpcApp(t, fail)
	l.service("cart", "10.9.0.1", mesh.AppGRPC, a, b)
	l.known("cart")
	cc := l.grpc("10.9.0.1:80")
	for range 20 {
		if got, err := call(t.Context(), cc, "/shop.Cart/Get", "one"); err != nil || got != "a one" {
			t.Fatalf("Get = %q, %v, want a one", got, err)
		}
	}
	l.counted(`request_protocol="grpc"`, `response_code="200"`, `grpc_response_status="0"`, `destination_workload="cart"`)
	if n := strings.Count(l.log.String(), a.String()) * strings.Count(l.log.String(), b.String()); n == 0 {
		t.Error("20 calls of one connection went to one endpoint of two")
	}
	_, err := call(t.Context(), cc, "/shop.Cart/Other", "x")
	if s := status.Convert(err); s.Code() != codes.NotFound || s.Message() != "no such thing: 100 %" {
		t.Errorf("Other = %v, want the application's status", err)
	}
	l.counted(`request_protocol="grpc"`, `response_code="200"`, `grpc_response_status="5"`)
}

// TestGRPCAnswersOfItsOwn: a client of gRPC is told in its own terms, by a head only.
func TestGRPCAnswersOfItsOwn(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	at, _ := grpcApp(t, func(_ string, s grpc.ServerStream) error { <-s.Context().Done(); return nil })
	l.service("cart", "10.9.0.1", mesh.AppGRPC, at)
	l.service("empty", "10.9.0.2", mesh.AppGRPC)
	gone := listen(t, loopback()+":0")
	l.service("gone", "10.9.0.3", mesh.AppGRPC, addrPort(gone.Addr()))
	gone.Close()
	l.known("cart", "empty", "gone")
	l.routes(mesh.KindVirtualService,
		mesh.HTTPRule{Matches: prefix("/a.Fault/"), Fault: &mesh.Fault{Abort: mesh.Abort{Percent: all, GRPCStatus: 8}}, Backends: []mesh.Backend{to("cart", 1)}},
		mesh.HTTPRule{Matches: prefix("/a.Status/"), Fault: &mesh.Fault{Abort: mesh.Abort{Percent: all, HTTPStatus: 401}}, Backends: []mesh.Backend{to("cart", 1)}},
		mesh.HTTPRule{Matches: prefix("/a.Empty/"), Backends: []mesh.Backend{to("empty", 1)}},
		mesh.HTTPRule{Matches: prefix("/a.Gone/"), Retry: &mesh.Retry{}, Backends: []mesh.Backend{to("gone", 1)}},
		mesh.HTTPRule{Matches: prefix("/a.Slow/"), Timeout: 50 * time.Millisecond, Backends: []mesh.Backend{to("cart", 1)}},
	)
	cc := l.grpc("10.9.0.1:80")
	for _, c := range []struct {
		service string
		code    codes.Code
		message string
		flags   string
	}{
		{"Fault", codes.ResourceExhausted, "fault filter abort", "FI"},
		{"Status", codes.Unauthenticated, "fault filter abort", "FI"},
		{"Empty", codes.Unavailable, "no healthy upstream", "UH"},
		{"Gone", codes.Unavailable, "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure", "UF"},
		{"Slow", codes.Unavailable, "upstream request timeout", "UT"},
		{"None", codes.Unimplemented, "", "NR"},
	} {
		_, err := call(t.Context(), cc, "/a."+c.service+"/Do", "x")
		if s := status.Convert(err); s.Code() != c.code || !strings.HasPrefix(s.Message(), c.message) {
			t.Errorf("%s: %v, want %s: %s", c.service, err, c.code, c.message)
		}
		l.counted(`request_protocol="grpc"`, `response_code="200"`, fmt.Sprintf(`grpc_response_status="%d"`, c.code), `response_flags="`+c.flags+`"`)
	}
}

// TestGRPCTimeout: the deadline that a client sends ends the call, also if the client does not.
func TestGRPCTimeout(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	gone := make(chan struct{}, 100)
	// It does not look at the time it is told to have: grpc-go would, and its answer could be as early as the waypoint's.
	at := app2(t, false, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done(); gone <- struct{}{} })
	l.service("cart", "10.9.0.1", mesh.AppGRPC, at)
	l.known("cart")
	l.routes(mesh.KindVirtualService, mesh.HTTPRule{Timeout: time.Hour, Backends: []mesh.Backend{to("cart", 1)}})
	l.client = l.client2()
	l.eventually("a call reaches the application and is ended there", func() bool { // on a busy machine its time may be over before
		req, _ := http.NewRequestWithContext(t.Context(), "POST", cart+"/a.B/C", strings.NewReader("\x00\x00\x00\x00\x00"))
		req.Header.Set("Content-Type", "application/grpc")
		req.Header.Set("Grpc-Timeout", "60m")
		req.Header.Set("Te", "trailers")
		resp, _ := l.do(req)
		if resp.StatusCode != 200 || resp.Header.Get("Grpc-Status") != "14" || resp.Header.Get("Grpc-Message") != "upstream request timeout" {
			t.Errorf("a call with a grpc-timeout = %d %v, want grpc-status 14", resp.StatusCode, resp.Header)
		}
		select {
		case <-gone:
			return true
		default:
			return false
		}
	})
}

// TestGRPCTimeoutIsToldOn: the application learns what is left, be it of the client's time, the rule's, or that of one try.
func TestGRPCTimeoutIsToldOn(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	told := make(chan string, 1)
	at := app2(t, false, func(w http.ResponseWriter, r *http.Request) {
		told <- r.Header.Get("Grpc-Timeout")
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Grpc-Status", "0")
	})
	l.service("cart", "10.9.0.1", mesh.AppGRPC, at)
	l.known("cart")
	l.routes(mesh.KindVirtualService,
		mesh.HTTPRule{Matches: prefix("/hour/"), Timeout: time.Hour, Backends: []mesh.Backend{to("cart", 1)}},
		mesh.HTTPRule{Matches: prefix("/try/"), Timeout: time.Hour, TryTimeout: time.Minute, Retry: &mesh.Retry{Attempts: 1}, Backends: []mesh.Backend{to("cart", 1)}},
		mesh.HTTPRule{Backends: []mesh.Backend{to("cart", 1)}})
	l.client = l.client2()
	for _, c := range []struct {
		path, asked string
		most        time.Duration // 0: nothing is told
	}{
		{"/none/x", "", 0}, {"/none/x", "nonsense", 0}, {"/none/x", "100S", 100 * time.Second}, {"/hour/x", "", time.Hour}, {"/hour/x", "100S", 100 * time.Second},
		{"/hour/x", "2H", time.Hour}, {"/try/x", "", time.Minute}, {"/try/x", "90S", time.Minute}, {"/try/x", "50S", 50 * time.Second},
	} {
		req, _ := http.NewRequestWithContext(t.Context(), "POST", cart+c.path, strings.NewReader("\x00\x00\x00\x00\x00"))
		req.Header.Set("Content-Type", "application/grpc")
		if c.asked != "" {
			req.Header.Set("Grpc-Timeout", c.asked)
		}
		l.do(req)
		got := <-told
		left, ok := route.ParseGRPCTimeout(got)
		if ok != (c.most > 0) || left > c.most || left < c.most-20*time.Second {
			t.Errorf("%s with %q: the application is told %q, want a little less than %v", c.path, c.asked, got, c.most)
		}
	}
}

// TestGRPCRetriesByStatus: each of the statuses that a rule may name is a reason, where it is named.
func TestGRPCRetriesByStatus(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	at, _ := grpcApp(t, func(m string, s grpc.ServerStream) error {
		md, _ := metadata.FromIncomingContext(s.Context())
		if md.Get("x-envoy-attempt-count")[0] == "1" {
			var code codes.Code
			_, _ = fmt.Sscanf(m, "/fail.%d/Do", &code)
			return status.Error(code, "")
		}
		return echo("again ")(m, s)
	})
	l.service("cart", "10.9.0.1", mesh.AppGRPC, at)
	l.known("cart")
	cases := map[codes.Code]mesh.RetryOn{
		codes.Canceled: mesh.RetryOnCancelled, codes.DeadlineExceeded: mesh.RetryOnDeadlineExceeded, codes.Internal: mesh.RetryOnInternal,
		codes.ResourceExhausted: mesh.RetryOnResourceExhausted, codes.Unavailable: mesh.RetryOnUnavailable,
	}
	var rules []mesh.HTTPRule
	for code, on := range cases {
		rules = append(rules, mesh.HTTPRule{Matches: prefix(fmt.Sprintf("/fail.%d/", code)), Retry: &mesh.Retry{Attempts: 1, On: on, Backoff: time.Millisecond},
			Backends: []mesh.Backend{to("cart", 1)}})
	}
	l.routes(mesh.KindVirtualService, append(rules, mesh.HTTPRule{Retry: &mesh.Retry{Attempts: 1, On: mesh.RetryOn5xx}, Backends: []mesh.Backend{to("cart", 1)}})...)
	cc := l.grpc("10.9.0.1:80")
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		got, err := call(t.Context(), cc, fmt.Sprintf("/fail.%d/Do", code), "x")
		if cases[code] != 0 {
			if err != nil || got != "again x" {
				t.Errorf("%v where it is a reason: %q, %v, want another try", code, got, err)
			}
			continue
		}
		if status.Code(err) != code {
			t.Errorf("%v where it is no reason: %q, %v, want the status", code, got, err)
		}
	}
}

// TestGRPCRetries: a call that the application says it cannot serve now is made again, elsewhere.
func TestGRPCRetries(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	var calls atomic.Int64
	at, _ := grpcApp(t, func(m string, s grpc.ServerStream) error {
		if calls.Add(1)%3 != 0 {
			return status.Error(codes.Unavailable, "not now")
		}
		md, _ := metadata.FromIncomingContext(s.Context())
		return echo(md.Get("x-envoy-attempt-count")[0]+" ")(m, s)
	})
	l.service("cart", "10.9.0.1", mesh.AppGRPC, at)
	l.known("cart")
	cc := l.grpc("10.9.0.1:80")
	for range 3 {
		if got, err := call(t.Context(), cc, "/a.B/C", strings.Repeat("x", 20_000)); err != nil || got != "3 "+strings.Repeat("x", 20_000) {
			t.Errorf("C = %.20q, %v, want it from the third try", got, err)
		}
	}
}

// TestGRPCStreams: a conversation goes both ways at once; who does not read holds up nobody else; who gives up is heard.
func TestGRPCStreams(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	gone := make(chan struct{})
	at, _ := grpcApp(t, func(method string, s grpc.ServerStream) error {
		if method != "/a.B/Flood" {
			return echo("")(method, s)
		}
		defer close(gone)
		for {
			if err := s.SendMsg(wrapperspb.String(strings.Repeat("x", 100_000))); err != nil {
				return err
			}
		}
	})
	l.service("cart", "10.9.0.1", mesh.AppGRPC, at)
	l.known("cart")
	cc := l.grpc("10.9.0.1:80")
	desc := &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	fctx, giveUp := context.WithCancel(t.Context())
	defer giveUp()
	flood, err := cc.NewStream(fctx, desc, "/a.B/Flood")
	if err != nil {
		t.Fatal(err)
	}
	if err := flood.RecvMsg(new(wrapperspb.StringValue)); err != nil { // and no more of it
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			s, err := cc.NewStream(t.Context(), desc, "/a.B/Echo")
			if err != nil {
				t.Error(err)
				return
			}
			for j := range 100 {
				want := fmt.Sprint(i, j, strings.Repeat("y", j*j))
				var got wrapperspb.StringValue
				if err := s.SendMsg(wrapperspb.String(want)); err != nil {
					t.Error(err)
					return
				}
				if err := s.RecvMsg(&got); err != nil || got.GetValue() != want {
					t.Errorf("stream %d, message %d: %.20q, %v", i, j, got.GetValue(), err)
					return
				}
			}
			_ = s.CloseSend()
			if err := s.RecvMsg(new(wrapperspb.StringValue)); err != io.EOF {
				t.Errorf("stream %d ended with %v, want EOF", i, err)
			}
		})
	}
	wg.Wait()
	giveUp()
	<-gone
	l.counted(`request_protocol="grpc"`, `response_flags="DC"`)
}

// TestARestartIsNoFailure: an application tells its connections to end; calls go on elsewhere without a failure.
func TestARestartIsNoFailure(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	a, srv := grpcApp(t, echo(""))
	b, _ := grpcApp(t, echo(""))
	l.service("cart", "10.9.0.1", mesh.AppGRPC, a, b)
	l.known("cart")
	cc := l.grpc("10.9.0.1:80")
	var wg sync.WaitGroup
	var calls atomic.Int64
	stop := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := call(t.Context(), cc, "/a.B/C", "x"); err != nil {
					t.Errorf("during the restart: %v", err)
					return
				}
				calls.Add(1)
			}
		})
	}
	l.eventually("calls under way", func() bool { return calls.Load() > 200 })
	srv.GracefulStop()
	l.eventually("calls went on", func() bool {
		n := calls.Load()
		l.eventually("more calls", func() bool { return calls.Load() > n+200 })
		return true
	})
	close(stop)
	wg.Wait()
}

// TestPoliciesHoldForGRPC: a method that no policy allows is not reached.
func TestPoliciesHoldForGRPC(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	at, _ := grpcApp(t, echo(""))
	svc := l.service("cart", "10.9.0.1", mesh.AppGRPC, at)
	l.known("cart")
	l.policy("get-only", mesh.Allow, mesh.StringMatch{Kind: mesh.MatchExact, Value: "/shop.Cart/Get"})
	l.guarded(svc, "shop/get-only")
	cc := l.grpc("10.9.0.1:80")
	l.eventually("the other method is denied", func() bool {
		_, err := call(t.Context(), cc, "/shop.Cart/Empty", "x")
		s := status.Convert(err)
		return s.Code() == codes.PermissionDenied && s.Message() == "RBAC: access denied"
	})
	l.eventually("the method is allowed", func() bool {
		got, err := call(t.Context(), cc, "/shop.Cart/Get", "x")
		return err == nil && got == "x"
	})
}

// TestOneWayStreamsOutliveTheDrain: those on which only one side still has something to say, too.
func TestOneWayStreamsOutliveTheDrain(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	next := make(chan string)
	at, _ := grpcApp(t, func(method string, s grpc.ServerStream) error {
		heard := ""
		for {
			var m wrapperspb.StringValue
			if err := s.RecvMsg(&m); err == io.EOF {
				break
			} else if err != nil {
				return err
			}
			heard += m.GetValue()
		}
		if method == "/a.B/Sum" {
			return s.SendMsg(wrapperspb.String(heard))
		}
		for text := range next {
			if err := s.SendMsg(wrapperspb.String(heard + text)); err != nil {
				return err
			}
		}
		return nil
	})
	l.service("cart", "10.9.0.1", mesh.AppGRPC, at)
	l.known("cart")
	cc := l.grpc("10.9.0.1:80")
	open := func(method string) grpc.ClientStream {
		s, err := cc.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	hear := func(s grpc.ClientStream, want string) {
		t.Helper()
		var got wrapperspb.StringValue
		if err := s.RecvMsg(&got); err != nil || got.GetValue() != want {
			t.Fatalf("heard %q, %v, want %q", got.GetValue(), err, want)
		}
	}
	say := func(s grpc.ClientStream, text string) {
		t.Helper()
		if err := s.SendMsg(wrapperspb.String(text)); err != nil {
			t.Fatal(err)
		}
	}
	ticks, sum := open("/a.B/Tick"), open("/a.B/Sum")
	say(ticks, "tick ")
	_ = ticks.CloseSend()
	next <- "1"
	hear(ticks, "tick 1")
	say(sum, "a")
	l.messages("cart", 2, 1) // the other has arrived, too
	l.stop()
	l.eventually("draining", func() bool { return strings.Contains(l.log.String(), `"draining"`) })
	next <- "2"
	hear(ticks, "tick 2")
	say(sum, "b")
	_ = sum.CloseSend()
	hear(sum, "ab")
	close(next)
	for _, s := range []grpc.ClientStream{ticks, sum} {
		if err := s.RecvMsg(new(wrapperspb.StringValue)); err != io.EOF {
			t.Errorf("a stream ended with %v, want EOF", err)
		}
	}
	l.end()
	if strings.Contains(l.log.String(), "cut at the end of the grace period") {
		t.Error("the waypoint did not end with its last stream")
	}
}

// TestStreamsOutliveTheDrain: a waypoint that stops tells its clients, and lets what is under way come to its end.
func TestStreamsOutliveTheDrain(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	at, _ := grpcApp(t, echo(""))
	l.service("cart", "10.9.0.1", mesh.AppGRPC, at)
	l.known("cart")
	s, err := l.grpc("10.9.0.1:80").NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/a.B/Echo")
	if err != nil {
		t.Fatal(err)
	}
	said := func(text string) {
		var got wrapperspb.StringValue
		if err := s.SendMsg(wrapperspb.String(text)); err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(&got); err != nil || got.GetValue() != text {
			t.Fatalf("said %q, heard %q, %v", text, got.GetValue(), err)
		}
	}
	said("before")
	l.stop()
	l.eventually("draining", func() bool { return strings.Contains(l.log.String(), `"draining"`) })
	said("meanwhile")
	_ = s.CloseSend()
	if err := s.RecvMsg(new(wrapperspb.StringValue)); err != io.EOF {
		t.Errorf("the stream ended with %v, want EOF", err)
	}
	l.end()
	if log := l.log.String(); strings.Contains(log, "cut at the end of the grace period") {
		t.Error("the waypoint did not end with its last stream")
	}
}
