package scenario

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/mistnet/mistnet/bench/load"
	"github.com/mistnet/mistnet/bench/peers"
	"github.com/mistnet/mistnet/bench/results"
)

// L7Workloads are what a waypoint is measured by, in the order of its tables.
func L7Workloads() []Workload {
	cpu := Metric{Name: "proxy_cpu_us", Better: results.Lower, Proxies: true, Value: perOp(procs)}
	added := Metric{Name: "cpu_us", Better: results.Lower, Added: true, Value: perOp(busy)}
	rate := Metric{Name: "req_per_s", Better: results.Higher, Value: func(r load.Report) float64 { return float64(r.Ops) / r.Elapsed.Seconds() }}
	requests := []Metric{rate, cpu, added}
	closed := func(kind load.Kind, conns, streams int) load.Order {
		return load.Order{Kind: kind, Conns: conns, Streams: streams, Body: map[load.Kind]int{load.GRPC: load.AnswerBytes}[kind]}
	}
	oneRule := []Also{{"ours, one rule", peers.SiteHTTP1}}
	return []Workload{
		{Name: "h1-rr", Site: peers.SiteHTTP1, Order: closed(load.HTTP1, 16, 0), Metrics: requests},
		{Name: "h1-rate", Site: peers.SiteHTTP1, Order: load.Order{Kind: load.Paced, Conns: 16}, Half: true, Metrics: []Metric{
			{Name: "p50_us", Better: results.Lower, Value: func(r load.Report) float64 { return micros(r.P50) }},
			{Name: "p99_us", Better: results.Lower, Value: func(r load.Report) float64 { return micros(r.P99) }},
			cpu,
		}},
		{Name: "hbone-in", Site: peers.SiteHBONE, Order: closed(load.HTTP1, 16, 0), Metrics: requests},
		{Name: "hbone-1conn-100streams", Site: peers.SiteHBONE, Order: closed(load.HTTP1, 100, 0), Metrics: requests},
		{Name: "h2-rr-16x1", Site: peers.SiteHTTP2, Order: closed(load.HTTP2, 16, 1), Metrics: requests},
		{Name: "h2-rr-1x32", Site: peers.SiteHTTP2, Order: closed(load.HTTP2, 1, 32), Metrics: requests},
		{Name: "grpc-rr-16x1", Site: peers.SiteHTTP2, Order: closed(load.GRPC, 16, 1), Metrics: requests},
		{Name: "grpc-rr-1x32", Site: peers.SiteHTTP2, Order: closed(load.GRPC, 1, 32), Metrics: requests},
		{Name: "route-1k", Site: peers.SiteRoutes, Order: closed(load.HTTP1, 16, 0), Metrics: []Metric{rate, cpu}, Also: oneRule},
		{Name: "authz-100", Site: peers.SitePolicies, Order: closed(load.HTTP1, 16, 0), Metrics: []Metric{rate, cpu}, Also: []Also{{"ours, one policy", peers.SiteHTTP1}}},
		{Name: "body-64k", Site: peers.SiteHTTP1, Order: load.Order{Kind: load.HTTP1, Conns: 8, Body: 64 << 10}, Metrics: []Metric{
			{Name: "gb_per_s", Better: results.Higher, Value: func(r load.Report) float64 { return gigabytes(r) / r.Elapsed.Seconds() }},
			{Name: "proxy_cpu_s_per_gb", Better: results.Lower, Proxies: true, Value: func(r load.Report) float64 { return r.Procs.Seconds() / gigabytes(r) }},
		}},
		{Name: "mem-8k", Site: peers.SiteHTTP1, Order: load.Order{Kind: load.Idle, Conns: 8000}, Fresh: true, Metrics: []Metric{
			{Name: "kb_per_conn", Better: results.Lower, Proxies: true, Value: func(r load.Report) float64 { return float64(r.Memory) / 1024 / float64(r.Ops) }},
		}},
	}
}

// entrants are who takes part in a workload: those that are up and have the site, and the base where else the workload says.
func (c Config) entrants(w Workload, up []entrant) []entrant {
	if w.Site == "" {
		return up
	}
	var part []entrant
	for _, e := range up {
		if _, ok := e.run.Sites[w.Site]; ok {
			part = append(part, entrant{e.name, w.Site, e.run})
		}
		for _, also := range w.Also {
			if _, ok := e.run.Sites[also.Site]; ok && e.name == c.Base {
				part = append(part, entrant{also.Name, also.Site, e.run})
			}
		}
	}
	return part
}

// siteWithin is how long a further site of a contender that is up has to answer.
const siteWithin = 3 * time.Second

// awaitAll waits until a contender carries traffic: at L7, on each site that the workloads need. A site that does not answer is
// taken from the contender with a note, if any other does.
func (c Config) awaitAll(ctx context.Context, a *agents, name string, r *peers.Running) (notes []string, err error) {
	if !slices.ContainsFunc(c.Workloads, func(w Workload) bool { return w.Site != "" }) {
		return nil, a.await(ctx, r, load.Order{Kind: load.Probe, Slice: time.Second}, readyWithin)
	}
	within, answered := readyWithin, false
	var last error
	for _, w := range c.Workloads {
		if _, ok := r.Sites[w.Site]; !ok {
			continue
		}
		probe := aim(w.Order, r, w.Site)
		probe.Once, probe.Conns, probe.Slice = true, 1, time.Second
		if probe.Kind == load.Paced || probe.Kind == load.Idle {
			probe.Kind = load.HTTP1
		}
		err := a.await(ctx, r, probe, within)
		if ctx.Err() != nil {
			return notes, err
		}
		if err != nil {
			last = err
			notes = append(notes, fmt.Sprintf("SKIPPED %s in what needs its site %s: %v", name, w.Site, err))
			delete(r.Sites, w.Site)
			continue
		}
		within, answered = siteWithin, true
	}
	if !answered {
		return notes, errors.Join(errors.New("none of its sites answers"), last)
	}
	return notes, nil
}

// pace finds out, for workloads that want half of it, how much the slowest contender can do.
func (c Config) pace(ctx context.Context, a *agents, up []entrant, out *results.Run) error {
	for i, w := range c.Workloads {
		if !w.Half {
			continue
		}
		least, who := math.Inf(1), ""
		for _, e := range c.entrants(w, up) {
			o := aim(w.Order, e.run, e.site)
			o.Kind, o.Warm, o.Slice = load.HTTP1, c.Profile.Warm, c.Profile.Slice
			r, err := a.do(ctx, e.run, o)
			if err != nil {
				return err
			}
			if rate := float64(r.Ops) / r.Elapsed.Seconds(); SliceFault(r) == "" && rate < least {
				least, who = rate, e.name
			}
		}
		if who == "" {
			return fmt.Errorf("%s: nobody can do anything", w.Name)
		}
		c.Workloads[i].Order.Rate = math.Round(least / 2)
		fact := results.Fact{Name: w.Name, Value: fmt.Sprintf("%.0f requests/s, half of what %s did at most", least/2, who)}
		fmt.Fprintln(c.Out, fact.Name+":", fact.Value)
		out.Facts = append(out.Facts, fact)
	}
	return nil
}

// freshBlocks runs the workloads that want fresh processes: in each block every contender is started, measured once and stopped.
func (c Config) freshBlocks(ctx context.Context, a *agents, rng *rand.Rand) (map[string][]Block, error) {
	done := make(map[string][]Block)
	absent := make(map[string]bool)
	for _, w := range c.Workloads {
		if !w.Fresh {
			continue
		}
		one := c
		one.Workloads = []Workload{w}
		for range c.Profile.Fresh {
			b := Block{Workload: w.Name, Fresh: true, Slices: make(map[string]load.Report)}
			for _, i := range rng.Perm(len(c.Contenders)) {
				p := c.Contenders[i]
				if absent[p.Name()] {
					continue
				}
				rep, err := one.freshSlice(ctx, a, w, p)
				if ctx.Err() != nil {
					return nil, err
				}
				if err != nil { // the run proper says so of those that do not come up
					absent[p.Name()] = true
					continue
				}
				if rep != nil {
					b.Slices[p.Name()] = *rep
				}
			}
			done[w.Name] = append(done[w.Name], b)
			fmt.Fprintf(c.Out, "block %d of %s: %s\n", len(done[w.Name]), w.Name, freshSummary(w, b))
		}
	}
	return done, nil
}

// freshSlice is nil when the contender has no such site.
func (c Config) freshSlice(ctx context.Context, a *agents, w Workload, p peers.Contender) (_ *load.Report, err error) {
	r, _, err := c.start(ctx, a, p)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Stop()) }()
	if _, ok := r.Sites[w.Site]; !ok {
		return nil, nil
	}
	order := aim(w.Order, r, w.Site)
	order.Slice = c.Profile.Slice
	rep, err := a.do(ctx, r, order)
	return &rep, err
}

func freshSummary(w Workload, b Block) string {
	text := w.Metrics[0].Name
	for name, r := range b.Slices {
		if fault := SliceFault(r); fault != "" {
			text += fmt.Sprintf(" %s=(%s)", name, fault)
			continue
		}
		text += fmt.Sprintf(" %s=%.4g", name, w.Metrics[0].Value(r))
	}
	return text
}

// measured are the contenders that have a slice in any of the blocks.
func (c Config) measured(blocks []Block) []string {
	var names []string
	for _, p := range c.Contenders {
		if slices.ContainsFunc(blocks, func(b Block) bool { _, ok := b.Slices[p.Name()]; return ok }) {
			names = append(names, p.Name())
		}
	}
	return names
}
