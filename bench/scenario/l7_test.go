package scenario_test

import (
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/bench/load"
	"github.com/mistnet/mistnet/bench/peers"
	"github.com/mistnet/mistnet/bench/results"
	"github.com/mistnet/mistnet/bench/scenario"
	"github.com/mistnet/mistnet/bench/stdproxy"
)

// TestMain lets the test's own program be the load's.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "load" {
		if err := load.Main(context.Background(), os.Args[2:], os.Stdin, os.Stdout); err != nil {
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func TestL7Workloads(t *testing.T) {
	var names []string
	for _, w := range scenario.L7Workloads() {
		if slices.Contains(names, w.Name) {
			t.Errorf("two workloads are called %s", w.Name)
		}
		names = append(names, w.Name)
		if w.Site == "" || len(w.Metrics) == 0 || w.Order.Conns == 0 {
			t.Errorf("%s: no site, metric or connection in %+v", w.Name, w)
		}
		for _, m := range w.Metrics {
			if results.Unit(m.Name) == m.Name {
				t.Errorf("%s: metric %s has no readable name", w.Name, m.Name)
			}
		}
	}
	if p, err := scenario.FindL7Profile("quick"); err != nil || p.Budget > 8*time.Minute {
		t.Errorf("FindL7Profile(quick) = %+v, %v, want a budget within 8 minutes", p, err)
	}
	if _, err := scenario.FindL7Profile("slow"); err == nil {
		t.Error("FindL7Profile(slow) succeeded")
	}
}

// proxied is a contender that runs in the test's own process.
type proxied struct {
	name  string
	sites []string
	t     *testing.T
}

func (p proxied) Name() string { return p.name }

func (p proxied) Start(ctx context.Context, env *peers.Env) (*peers.Running, error) {
	ctx, cancel := context.WithCancel(ctx)
	one, two := free(p.t), free(p.t)
	done := make(chan error, 1)
	go func() {
		done <- stdproxy.Serve(ctx, netip.AddrPortFrom(env.Server.Addr, env.EchoPort).String(), one.String(), two.String())
	}()
	r := &peers.Running{
		Listen: env.EchoPort, PIDs: []int{os.Getpid()}, Sites: make(map[string]peers.Site), Version: "test", Cipher: func(context.Context) string { return "none" },
		Stop: func() error { cancel(); return <-done },
	}
	for _, site := range p.sites {
		r.Sites[site] = peers.Site{Addr: one, Path: "/"}
		if site == "dead" {
			r.Sites[site] = peers.Site{Addr: free(p.t), Path: "/"}
		}
	}
	return r, nil
}

func free(t *testing.T) netip.AddrPort {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return netip.MustParseAddrPort(ln.Addr().String())
}

// TestRunAtL7: who has a site takes part in its workloads; one that does not answer is left out with a note; what the base does
// at another site stands beside; fresh processes are measured without a direct path.
func TestRunAtL7(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The same for all, so that no block is rejected on a busy machine.
	count := scenario.Metric{Name: "req_per_s", Better: results.Higher, Value: func(load.Report) float64 { return 1 }}
	memory := scenario.Metric{Name: "kb_per_conn", Better: results.Lower, Proxies: true, Value: func(r load.Report) float64 { return float64(r.Ops) }}
	order := load.Order{Kind: load.HTTP1, Conns: 2}
	var out strings.Builder
	got, err := scenario.Run(t.Context(), scenario.Config{
		Profile: scenario.Profile{Warm: 10 * time.Millisecond, Slice: 200 * time.Millisecond, Blocks: 1, Budget: time.Minute, Fresh: 1},
		Workloads: []scenario.Workload{
			{Name: "plain", Site: peers.SiteHTTP1, Order: order, Metrics: []scenario.Metric{count}},
			{Name: "paced", Site: peers.SiteHTTP1, Order: load.Order{Kind: load.Paced, Conns: 2}, Half: true, Metrics: []scenario.Metric{count}},
			{Name: "many", Site: peers.SiteRoutes, Order: order, Metrics: []scenario.Metric{count}, Also: []scenario.Also{{Name: "ours, one rule", Site: peers.SiteHTTP1}}},
			{Name: "dead", Site: "dead", Order: order, Metrics: []scenario.Metric{count}},
			{Name: "memory", Site: peers.SiteHTTP1, Order: load.Order{Kind: load.Idle, Conns: 50}, Fresh: true, Metrics: []scenario.Metric{memory}},
		},
		Contenders: []peers.Contender{
			proxied{"ours", []string{peers.SiteHTTP1, peers.SiteRoutes, "dead"}, t}, proxied{"theirs", []string{peers.SiteHTTP1}, t},
		},
		Env:  &peers.Env{Server: peers.Pod{Addr: netip.MustParseAddr("127.0.0.1")}, Dir: t.TempDir(), EchoPort: free(t).Port()},
		Base: "ours", Seed: 1, Self: self, Out: &out,
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	for _, want := range []struct {
		workload, contender string
		row                 bool
	}{
		{"plain", "theirs", true}, {"plain", "direct", true}, {"paced", "theirs", true}, {"memory", "theirs", true}, {"memory", "direct", false},
		{"many", "ours, one rule", true}, {"many", "theirs", false}, {"dead", "theirs", false}, {"dead", "ours", false},
	} {
		has := slices.ContainsFunc(got.Rows, func(r results.Row) bool { return r.Workload == want.workload && r.Contender == want.contender })
		if has != want.row {
			t.Errorf("a row of %s against %s: %v, want %v", want.workload, want.contender, has, want.row)
		}
	}
	notes := strings.Join(got.Notes, "\n")
	if !strings.Contains(notes, "SKIPPED ours in what needs its site dead") {
		t.Errorf("nothing is said of the site that does not answer:\n%s", notes)
	}
	if !slices.ContainsFunc(got.Facts, func(f results.Fact) bool { return f.Name == "paced" && strings.Contains(f.Value, "half of what") }) {
		t.Errorf("the rate is not told: %+v", got.Facts)
	}
}
