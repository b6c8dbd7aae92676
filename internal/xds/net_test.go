package xds_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/mistnet/mistnet/internal/xds"
)

// logged returns a logger and a channel that gets every line's message.
func logged() (*zap.Logger, <-chan string) {
	lines := make(chan string, 1000)
	core := zapcore.NewCore(zapcore.NewJSONEncoder(zapcore.EncoderConfig{}), zapcore.AddSync(discard{}), zap.DebugLevel)
	return zap.New(core, zap.Hooks(func(e zapcore.Entry) error {
		lines <- e.Message
		return nil
	})), lines
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }

func awaitLine(t *testing.T, lines <-chan string, want string) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		select {
		case got := <-lines:
			if got == want {
				return
			}
		case <-timeout:
			t.Fatalf("%q was never logged", want)
		}
	}
}

func awaitDisconnect(t *testing.T, p *proxy, want codes.Code) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		select {
		case err := <-p.disconnected:
			var s interface{ GRPCStatus() *status.Status }
			if errors.As(err, &s) && s.GRPCStatus().Code() == want {
				return
			}
			t.Logf("disconnected by %v", err)
		case <-timeout:
			t.Fatalf("the client was never disconnected with %v", want)
		}
	}
}

func TestStrangersAreRefused(t *testing.T) {
	t.Parallel()
	s := startServer(t, xds.ServerConfig{})
	s.Publish(address, resources(numbered(1)), nil)
	p := newProxy()
	cfg := p.config(s.addr)
	cfg.Token = func(context.Context) (string, error) { return "stolen", nil }
	p.start(t, cfg)
	awaitDisconnect(t, p, codes.Unauthenticated)
	if len(p.snapshot(address)) != 0 {
		t.Error("a stranger got resources")
	}
	q := newProxy()
	q.start(t, q.config(startServerAt(t, "127.0.0.1:0", xds.ServerConfig{}).addr)) // told nobody how to authenticate
	awaitDisconnect(t, q, codes.Unauthenticated)
}

func TestACallerWhoCannotBeJudgedNowMayTryAgain(t *testing.T) {
	t.Parallel()
	var judge atomic.Bool
	s := startServer(t, xds.ServerConfig{Authenticate: func(ctx context.Context) (string, error) {
		if !judge.Load() {
			return "", fmt.Errorf("%w: nobody answers", xds.ErrUnavailable)
		}
		return authenticate(ctx)
	}})
	bodies := numbered(1)
	s.Publish(address, resources(bodies), nil)
	p := newProxy()
	p.start(t, p.config(s.addr))
	awaitDisconnect(t, p, codes.Unavailable)
	judge.Store(true)
	p.await(t, address, bodies)
	if n := s.Totals()[address]; n.Sent == 0 || n.Nacked != 0 {
		t.Errorf("totals are %+v", n)
	}
}

func TestNodeMustBeTheCallers(t *testing.T) {
	t.Parallel()
	s := startServer(t, xds.ServerConfig{CheckNode: func(peer string, node *core.Node) error {
		return fmt.Errorf("%s is not %s", peer, node.GetId())
	}})
	awaitDisconnect(t, startProxy(t, s), codes.PermissionDenied)
}

func TestNothingIsSaidBeforeTheServerIsReady(t *testing.T) {
	t.Parallel()
	ready := make(chan struct{})
	s := startServer(t, xds.ServerConfig{Ready: ready})
	p := startProxy(t, s)
	s.Publish(address, resources(map[string]string{"a": "1"}), nil)
	s.Publish(address, resources(map[string]string{"b": "1"}), nil)
	close(ready)
	awaitClosed(t, "sync", p.Synced())
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, u := range p.updates {
		if u.TypeURL == address && len(u.Upserts) != 2 {
			t.Errorf("first addresses = %v, want both", u.Upserts)
		}
	}
}

func TestReconnectBringsOnlyTheDifference(t *testing.T) {
	t.Parallel()
	s := startServer(t, xds.ServerConfig{})
	bodies := numbered(100)
	s.Publish(address, resources(bodies), nil)
	p := startProxy(t, s)
	p.await(t, address, bodies)

	s.close()
	awaitDisconnect(t, p, codes.Unavailable)
	p.mu.Lock()
	p.updates = nil
	p.mu.Unlock()
	delete(bodies, "wl-0")
	bodies["wl-1"], bodies["new"] = "changed", "here"
	ready := make(chan struct{})
	s = startServerAt(t, s.addr, xds.ServerConfig{Authenticate: authenticate, Ready: ready})
	s.Publish(address, resources(bodies), nil)
	close(ready)
	p.await(t, address, bodies)

	p.mu.Lock()
	defer p.mu.Unlock()
	var upserts, removes []string
	for _, u := range p.updates {
		if u.First {
			t.Error("an update after a reconnect is called the first")
		}
		for _, r := range u.Upserts {
			upserts = append(upserts, r.Name)
		}
		removes = append(removes, u.Removes...)
	}
	slices.Sort(upserts)
	if diff := cmp.Diff([]string{"new", "wl-1"}, upserts); diff != "" {
		t.Errorf("upserts after the reconnect (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"wl-0"}, removes); diff != "" {
		t.Errorf("removes after the reconnect (-want +got):\n%s", diff)
	}
}

func TestOneBadResourceAmongMany(t *testing.T) {
	t.Parallel()
	s := startServer(t, xds.ServerConfig{})
	bodies := numbered(50)
	s.Publish(address, resources(bodies), nil)
	p := newProxy()
	p.refuse["wl-7"] = errors.New("odd")
	p.start(t, p.config(s.addr))
	without := maps.Clone(bodies)
	delete(without, "wl-7")
	p.await(t, address, without)

	// The answer to the first response is in before the second goes out.
	s.Publish(address, resources(map[string]string{"next": "1"}), nil)
	without["next"] = "1"
	p.await(t, address, without)
	if n := s.Totals()[address]; n.Sent < 2 || n.Nacked != 1 {
		t.Errorf("totals are %+v, want one refusal", n)
	}
	clients := s.Clients()
	if len(clients) != 1 || len(clients[0].Types) != 2 || !strings.HasPrefix(clients[0].Node, "ztunnel~") {
		t.Fatalf("Clients() = %+v, want one ztunnel with two types", clients)
	}
	got := clients[0].Types[1]
	if got.TypeURL != address || got.Nacked != 1 || got.Rejected["wl-7"] != "odd" || len(got.Rejected) != 1 || got.Sent != 2 {
		t.Errorf("status = %+v, want one NACK for wl-7 of two responses", got)
	}
	if v, ok := p.Versions(address)["wl-7"]; v != "" || !ok {
		t.Errorf("the client holds wl-7: %v, %q, want it without a version", ok, v)
	}

	// A good version of it clears the record.
	p.mu.Lock()
	delete(p.refuse, "wl-7")
	p.mu.Unlock()
	s.Publish(address, resources(map[string]string{"wl-7": "better"}), nil)
	without["wl-7"] = "better"
	p.await(t, address, without)
	if got := s.Clients()[0].Types[1].Rejected; len(got) != 0 {
		t.Errorf("rejected = %v after a good version, want none", got)
	}
}

func TestChangesCoalesceWhileAClientIsBusy(t *testing.T) {
	t.Parallel()
	s := startServer(t, xds.ServerConfig{})
	s.Publish(address, resources(map[string]string{"a": "0"}), nil)
	p := newProxy()
	p.hold = make(chan struct{})
	p.start(t, p.config(s.addr))
	p.hold <- struct{}{} // the policies
	p.hold <- struct{}{} // a
	p.await(t, address, map[string]string{"a": "0"})

	s.Publish(address, resources(map[string]string{"a": "first"}), nil) // in flight from here on, and not answered
	for i := range 1000 {
		s.Publish(address, resources(map[string]string{"a": fmt.Sprint(i), fmt.Sprintf("b%d", i%10): fmt.Sprint(i)}), nil)
	}
	s.Publish(address, nil, []string{"b0"})
	want := map[string]string{"a": "999"}
	for i := 991; i < 1000; i++ {
		want[fmt.Sprintf("b%d", i%10)] = fmt.Sprint(i)
	}
	p.mu.Lock()
	before := len(p.updates)
	p.mu.Unlock()
	close(p.hold)
	p.await(t, address, want)
	p.mu.Lock()
	defer p.mu.Unlock()
	// One may have left before the client was seen to be busy; what gathered behind it comes at once.
	if n := len(p.updates) - before; n > 3 {
		t.Errorf("1000 changes came as %d updates, want at most 3", n)
	}
}

func TestAClientThatNeverAnswersIsDisconnected(t *testing.T) {
	t.Parallel()
	log, lines := logged()
	s := startServer(t, xds.ServerConfig{AckTimeout: 50 * time.Millisecond, Log: log})
	s.Publish(address, resources(numbered(3)), nil)
	p := newProxy()
	p.hold = make(chan struct{})
	p.start(t, p.config(s.addr))
	awaitLine(t, lines, "slow client disconnected")
	close(p.hold)
	awaitDisconnect(t, p, codes.DeadlineExceeded)
	p.await(t, address, numbered(3)) // and it comes back
}

func TestStopTellsClientsToReconnect(t *testing.T) {
	t.Parallel()
	s := startServer(t, xds.ServerConfig{})
	p := startProxy(t, s)
	awaitClosed(t, "sync", p.Synced())
	s.Stop() // the listener stays: it is the stream that ends
	awaitDisconnect(t, p, codes.Unavailable)
	if n := len(s.Clients()); n != 0 {
		t.Errorf("%d clients after Stop, want none", n)
	}
}

func TestOnDemand(t *testing.T) {
	t.Parallel()
	s := startServer(t, xds.ServerConfig{})
	s.Publish(address, []xds.Resource{
		{Name: "pod", Body: []byte("p"), Aliases: []string{"net/10.0.0.1"}, Follows: []string{"shop/cart"}},
		{Name: "shop/cart", Body: []byte("s"), Aliases: []string{"net/10.9.0.1"}},
		{Name: "other", Body: []byte("o")},
	}, nil)
	p := newProxy()
	cfg := p.config(s.addr)
	cfg.Subscriptions = []xds.Subscription{{TypeURL: policy, Wildcard: true}, {TypeURL: address}}
	p.start(t, cfg)
	awaitClosed(t, "sync", p.Synced())
	resolve := func(name string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if err := p.Resolve(ctx, address, name); err != nil {
			t.Fatalf("Resolve(%q) = %v", name, err)
		}
	}
	resolve("net/10.0.0.99")
	p.await(t, address, nil)
	resolve("net/10.9.0.1")
	p.await(t, address, map[string]string{"shop/cart": "s", "pod": "p"})
	resolve("net/10.0.0.1")
	s.Publish(address, []xds.Resource{{Name: "late", Body: []byte("l"), Aliases: []string{"net/10.0.0.99"}}}, []string{"pod"})
	p.await(t, address, map[string]string{"shop/cart": "s", "late": "l"})

	if err := p.Resolve(t.Context(), "type.googleapis.com/nothing", "x"); err == nil {
		t.Error("Resolve of a type that is not subscribed to did not fail")
	}
	p.mu.Lock()
	p.refuse["other"] = errors.New("odd")
	p.mu.Unlock()
	if err := p.Resolve(t.Context(), address, "other"); err == nil || err.Error() != "odd" {
		t.Errorf("Resolve of a rejected resource = %v, want odd", err)
	}
	if err := p.Resolve(t.Context(), policy, "any"); err != nil {
		t.Errorf("Resolve of a synced wildcard type = %v, want nothing to wait for", err)
	}
	s.close()
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("tired"))
	if err := p.Resolve(ctx, address, "unasked"); err == nil || err.Error() != "tired" {
		t.Errorf("Resolve without a server = %v, want the context's cause", err)
	}
}

func TestATypeNobodyPublishesIsAnsweredAsEmpty(t *testing.T) {
	t.Parallel()
	log, lines := logged()
	s := startServer(t, xds.ServerConfig{Log: log})
	s.Publish(address, resources(numbered(2)), nil)
	const unknown = "type.googleapis.com/of.a.later.version"
	for range 2 {
		p := newProxy()
		cfg := p.config(s.addr)
		cfg.Subscriptions = append(cfg.Subscriptions, xds.Subscription{TypeURL: unknown, Wildcard: true})
		p.start(t, cfg)
		awaitClosed(t, "sync", p.Synced())
		p.await(t, address, numbered(2))
	}
	logged := 0
	for len(lines) > 0 {
		if <-lines == "client asked for a type that nobody publishes" {
			logged++
		}
	}
	if logged != 2 { // the policies are the other type nobody published here
		t.Errorf("logged %d times, want once for each of two types", logged)
	}
}

func TestABigFirstAnswerComesInPartsAndCountsAsAWhole(t *testing.T) {
	t.Parallel()
	s := startServer(t, xds.ServerConfig{})
	bodies := numbered(12_345)
	s.Publish(address, resources(bodies), nil)
	p := startProxy(t, s)
	awaitClosed(t, "sync", p.Synced())
	if diff := cmp.Diff(len(bodies), len(p.snapshot(address))); diff != "" {
		t.Errorf("resources when synced (-want +got):\n%s", diff)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	parts := 0
	for _, u := range p.updates {
		if u.TypeURL == address {
			parts++
			if len(u.Upserts) > 5000 {
				t.Errorf("%d resources in one update, want at most 5000", len(u.Upserts))
			}
		}
	}
	if parts != 3 {
		t.Errorf("%d updates, want 3", parts)
	}
}

// A client that does not know of partial answers, such as Istio's own ztunnel, would start on the first of them.
func TestAClientThatKnowsNoPartsGetsOneAnswer(t *testing.T) {
	t.Parallel()
	s := startServer(t, xds.ServerConfig{})
	s.Publish(address, resources(numbered(12_345)), nil)
	_, roots := certificate()
	conn, err := grpc.NewClient(s.addr, grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(roots, "127.0.0.1")),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(200<<20)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+testToken)
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: address}); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil || len(resp.GetResources()) != 12_345 || resp.GetTypeUrl() != address || resp.GetNonce() == "" {
		t.Fatalf("first answer: %d resources, %v, want all 12345", len(resp.GetResources()), err)
	}
	r := resp.GetResources()[0]
	if r.GetResource().GetTypeUrl() != address || r.GetVersion() != s.Versions(address)[r.GetName()] {
		t.Errorf("resource %v is not as it was published", r)
	}
}

func TestAfterRandomPublishesEveryClientEqualsTheServer(t *testing.T) {
	t.Parallel()
	s := startServer(t, xds.ServerConfig{})
	clients := []*proxy{startProxy(t, s), startProxy(t, s), startProxy(t, s)}
	r := rand.New(rand.NewPCG(7, 7))
	want := make(map[string]string)
	for i := range 3000 {
		name := fmt.Sprintf("n%d", r.IntN(200))
		if r.IntN(3) == 0 {
			delete(want, name)
			s.Publish(address, nil, []string{name})
			continue
		}
		want[name] = fmt.Sprint(i)
		s.Publish(address, resources(map[string]string{name: want[name]}), nil)
		if i == 1500 {
			clients = append(clients, startProxy(t, s))
		}
	}
	for _, p := range clients {
		p.await(t, address, want)
	}
	for _, p := range clients {
		wantSameVersions(t, s, p, want)
	}
}

func TestRunRefusesAConfigurationThatCannotWork(t *testing.T) {
	t.Parallel()
	p := newProxy()
	cfg := p.config("127.0.0.1:1")
	cfg.TLS = nil
	if err := xds.NewClient(cfg).Run(t.Context()); err == nil {
		t.Error("Run without TLS did not fail")
	}
}
