package scenario

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/mistnet/mistnet/bench/load"
	"github.com/mistnet/mistnet/bench/peers"
	"github.com/mistnet/mistnet/bench/results"
)

// Config is one run of the bench.
type Config struct {
	Profile    Profile
	Workloads  []Workload
	Contenders []peers.Contender // without direct, which always takes part
	Env        *peers.Env
	Base       string // whose ratios are wanted
	Seed       uint64
	Self       string // path of this program, which also is the load's
	Out        io.Writer
}

// entrant is a contender that came up.
type entrant struct {
	name string
	site string // of an L7 contender, where a workload's traffic goes
	run  *peers.Running
}

// Run starts the contenders, runs blocks until every workload has enough or the budget is spent, and stops everything again. A
// contender that is absent or does not come up is left out with a note.
func Run(ctx context.Context, c Config) (_ results.Run, err error) {
	deadline := time.Now().Add(c.Profile.Budget)
	rng := rand.New(rand.NewPCG(c.Seed, 0))
	a := newAgents(c.Self, c.Env.Dir)
	defer func() { err = errors.Join(err, a.close()) }()
	out := results.Run{Base: c.Base}

	var up []entrant
	defer func() {
		for _, e := range up {
			if serr := e.run.Stop(); serr != nil {
				err = errors.Join(err, fmt.Errorf("stop %s: %w", e.name, serr))
			}
		}
	}()
	fresh, err := c.freshBlocks(ctx, a, rng)
	if err != nil {
		return out, err
	}
	for _, p := range append([]peers.Contender{peers.Direct{}}, c.Contenders...) {
		r, notes, err := c.start(ctx, a, p)
		for _, note := range notes {
			fmt.Fprintln(c.Out, note)
			out.Notes = append(out.Notes, note)
		}
		if err != nil {
			if ctx.Err() != nil || p.Name() == directName {
				return out, fmt.Errorf("start %s: %w", p.Name(), err)
			}
			note := fmt.Sprintf("SKIPPED %s: %v", p.Name(), err)
			fmt.Fprintln(c.Out, note)
			out.Notes = append(out.Notes, note)
			continue
		}
		fmt.Fprintf(c.Out, "up: %s (%s)\n", p.Name(), r.Version)
		up = append(up, entrant{p.Name(), "", r})
	}
	if err := c.pace(ctx, a, up, &out); err != nil {
		return out, err
	}

	blocks, err := c.blocks(ctx, a, up, rng, deadline)
	if err != nil {
		return out, err
	}
	for _, e := range up {
		out.Facts = append(out.Facts, results.Fact{Name: e.name, Value: e.run.Version + "; cipher: " + e.run.Cipher(ctx)})
	}
	for _, w := range c.Workloads {
		of, names := blocks[w.Name], namesOf(c.entrants(w, up))
		if w.Fresh {
			of, names = fresh[w.Name], c.measured(fresh[w.Name])
		}
		rows, levels, notes := Compare(w, of, c.Base, names, rng)
		out.Rows = append(out.Rows, rows...)
		out.Levels = append(out.Levels, levels...)
		out.Notes = append(out.Notes, append(blockNotes(w, of, names), notes...)...)
	}
	return out, nil
}

func namesOf(up []entrant) []string {
	names := make([]string, len(up))
	for i, e := range up {
		names[i] = e.name
	}
	return names
}

// start brings a contender up and waits for the first byte through it.
func (c Config) start(ctx context.Context, a *agents, p peers.Contender) (*peers.Running, []string, error) {
	r, err := p.Start(ctx, c.Env)
	if err != nil {
		return nil, nil, err
	}
	if err := a.serve(r); err != nil {
		return nil, nil, errors.Join(err, r.Stop())
	}
	notes, err := c.awaitAll(ctx, a, p.Name(), r)
	if err != nil {
		return nil, notes, errors.Join(err, r.Stop())
	}
	if r.Verify != nil {
		if err := r.Verify(ctx); err != nil {
			return nil, notes, errors.Join(err, r.Stop())
		}
	}
	return r, notes, nil
}

// blocks runs the workloads in turn, so that a disturbance of some seconds does not hit one of them alone.
func (c Config) blocks(ctx context.Context, a *agents, up []entrant, rng *rand.Rand, deadline time.Time) (map[string][]Block, error) {
	done := make(map[string][]Block)
	accepted := make(map[string]int)
	var longest time.Duration
	for {
		busy := false
		for _, w := range c.Workloads {
			part := c.entrants(w, up)
			if accepted[w.Name] >= c.Profile.Blocks || w.Fresh || len(part) < 2 || part[0].name != directName {
				continue // done, done elsewhere, or there is nothing to compare
			}
			if time.Until(deadline) < longest {
				fmt.Fprintln(c.Out, "the time is up")
				return done, nil
			}
			busy = true
			start := time.Now()
			b, err := c.block(ctx, a, w, part, rng)
			if err != nil {
				return done, err
			}
			longest = max(longest, time.Since(start))
			done[w.Name] = append(done[w.Name], b)
			verdict := "ok"
			if fault := b.Fault(w.Metrics[0]); fault != "" {
				verdict = "rejected: " + fault
			} else {
				accepted[w.Name]++
			}
			fmt.Fprintf(c.Out, "block %d of %s: %s; %s\n", len(done[w.Name]), w.Name, summary(w, b, part), verdict)
		}
		if !busy {
			return done, nil
		}
	}
}

// block runs one slice of every contender, direct first and last.
func (c Config) block(ctx context.Context, a *agents, w Workload, up []entrant, rng *rand.Rand) (Block, error) {
	b := Block{Workload: w.Name, Slices: make(map[string]load.Report)}
	order := w.Order
	order.Warm, order.Slice = c.Profile.Warm, c.Profile.Slice
	direct, others := up[0], append([]entrant(nil), up[1:]...)
	rng.Shuffle(len(others), func(i, j int) { others[i], others[j] = others[j], others[i] })
	var err error
	if b.Direct[0], err = a.do(ctx, direct.run, aim(order, direct.run, direct.site)); err != nil {
		return b, err
	}
	for _, e := range others {
		rep, err := a.do(ctx, e.run, aim(order, e.run, e.site))
		if err != nil {
			return b, fmt.Errorf("%s, %s: %w", w.Name, e.name, err)
		}
		if rep.Error == "" && rep.Ops > 0 && rep.Procs == 0 {
			rep.Error = "the proxies did no work: the traffic passes them by"
		}
		b.Slices[e.name] = rep
	}
	b.Direct[1], err = a.do(ctx, direct.run, aim(order, direct.run, direct.site))
	return b, err
}

// summary is the block's first metric for each contender.
func summary(w Workload, b Block, up []entrant) string {
	m := w.Metrics[0]
	text := m.Name
	for _, e := range up {
		if fault := SliceFault(b.Slices[e.name]); e.name != directName && fault != "" {
			text += fmt.Sprintf(" %s=(%s)", e.name, fault)
			continue
		}
		text += fmt.Sprintf(" %s=%.4g", e.name, b.read(m, e.name))
	}
	return text
}

// blockNotes counts what was thrown away, by reason, and the slices that a contender failed.
func blockNotes(w Workload, blocks []Block, names []string) []string {
	var notes []string
	rejected := 0
	for _, b := range blocks {
		if b.Fault(w.Metrics[0]) != "" {
			rejected++
		}
	}
	notes = append(notes, fmt.Sprintf("%s: %d blocks run, %d rejected for drift or steal", w.Name, len(blocks), rejected))
	for _, name := range names {
		failed, why := 0, ""
		for _, b := range blocks {
			if fault := SliceFault(b.Slices[name]); name != directName && fault != "" {
				failed, why = failed+1, fault
			}
		}
		if failed > 0 {
			notes = append(notes, fmt.Sprintf("%s: %s failed %d of %d slices, last: %s", w.Name, name, failed, len(blocks), why))
		}
	}
	return notes
}
