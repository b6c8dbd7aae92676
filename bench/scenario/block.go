package scenario

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/mistnet/mistnet/bench/load"
	"github.com/mistnet/mistnet/bench/results"
)

// What a block may suffer and still count.
const (
	maxDrift   = 0.10 // difference of the two direct slices, relative to the smaller
	maxSteal   = 0.02 // share of the machine's time that the hypervisor gave to others
	maxFailed  = 0.10 // share of a slice's connections that broke
	directName = "direct"
	// fewestAllowed is how many blocks an interval of 95 % for a median needs: with five, the smallest and the largest hold the
	// true one in 94 of 100 cases (2 × ½⁵ miss it). With fewer undisturbed ones, disturbed ones are used too and the run says so.
	fewestAllowed = 5
)

// Block is one slice of every contender. Direct ran first and last.
type Block struct {
	Workload string
	Direct   [2]load.Report
	Fresh    bool                   // of fresh processes: Direct was not run
	Slices   map[string]load.Report // the contenders but direct
}

// Fault says why the block must not count, or "" when it may. A contender's own failure is no fault of the block.
func (b Block) Fault(first Metric) string {
	if b.Fresh {
		return ""
	}
	for _, d := range b.Direct {
		if f := SliceFault(d); f != "" {
			return "direct: " + f
		}
	}
	if drift := b.drift(first); drift > maxDrift {
		return fmt.Sprintf("the direct slices differ by %.0f %%", drift*100)
	}
	if steal := b.steal(); steal > maxSteal {
		return fmt.Sprintf("%.1f %% of the time was stolen", steal*100)
	}
	return ""
}

// disturbance is how far the block is from being undisturbed: up to 1 it may count. It looks at the direct path and the
// hypervisor only, never at a contender, so that choosing by it favours nobody.
func (b Block) disturbance(first Metric) float64 {
	if SliceFault(b.Direct[0]) != "" || SliceFault(b.Direct[1]) != "" {
		return math.Inf(1)
	}
	return max(b.drift(first)/maxDrift, b.steal()/maxSteal)
}

// drift is the difference of the two direct slices, relative to the smaller.
func (b Block) drift(first Metric) float64 {
	x, y := first.Value(b.Direct[0]), first.Value(b.Direct[1])
	return math.Abs(x-y) / min(x, y)
}

// steal is the share of the block's time that the hypervisor gave to others.
func (b Block) steal() float64 {
	var steal, total time.Duration
	add := func(r load.Report) { steal, total = steal+r.Steal, total+r.Elapsed*time.Duration(r.CPUs) }
	add(b.Direct[0])
	add(b.Direct[1])
	for _, r := range b.Slices {
		add(r)
	}
	if total == 0 {
		return 0
	}
	return float64(steal) / float64(total)
}

// choose returns the blocks that count. When fewer than fewestAllowed are undisturbed it falls back on the least disturbed
// half, and note says so.
func choose(w Workload, blocks []Block) (good []Block, note string) {
	for _, b := range blocks {
		if b.Fault(w.Metrics[0]) == "" {
			good = append(good, b)
		}
	}
	if len(good) >= fewestAllowed || len(good) == len(blocks) {
		return good, ""
	}
	undisturbed := len(good)
	good = slices.DeleteFunc(slices.Clone(blocks), func(b Block) bool { return math.IsInf(b.disturbance(w.Metrics[0]), 1) })
	slices.SortStableFunc(good, func(x, y Block) int {
		return cmp.Compare(x.disturbance(w.Metrics[0]), y.disturbance(w.Metrics[0]))
	})
	good = good[:min(len(good), max(fewestAllowed, (len(blocks)+1)/2))]
	return good, fmt.Sprintf("NOISY MACHINE, %s: only %d of %d blocks were undisturbed; the %d least disturbed are used, so trust this workload little",
		w.Name, undisturbed, len(blocks), len(good))
}

// SliceFault says why a slice is void, or "".
func SliceFault(r load.Report) string {
	switch {
	case r.Error != "":
		return r.Error
	case r.Ops == 0:
		return "nothing was done"
	case float64(r.Failed) > maxFailed*float64(r.Ops+r.Failed):
		return fmt.Sprintf("%d of %d connections broke", r.Failed, r.Ops+r.Failed)
	}
	return ""
}

// read is the metric of a contender in the block; NaN when the slice is void or the metric has no meaning for it.
func (b Block) read(m Metric, name string) float64 {
	floor := (m.Value(b.Direct[0]) + m.Value(b.Direct[1])) / 2
	if name == directName {
		if m.Added || m.Proxies {
			return math.NaN()
		}
		return floor
	}
	r, ok := b.Slices[name]
	if !ok || SliceFault(r) != "" {
		return math.NaN()
	}
	if m.Added {
		return m.Value(r) - floor
	}
	return m.Value(r)
}

// Compare turns the blocks of one workload into rows (base against each other name) and levels. A block in which a value is
// missing or not positive counts for the other comparisons only.
func Compare(w Workload, blocks []Block, base string, names []string, rng *rand.Rand) (rows []results.Row, levels []results.Level, notes []string) {
	good, note := choose(w, blocks)
	if note != "" {
		notes = append(notes, note)
	}
	rejected := len(blocks) - len(good)
	for _, m := range w.Metrics {
		for _, name := range names {
			var own []float64
			for _, b := range good {
				if v := b.read(m, name); !math.IsNaN(v) {
					own = append(own, v)
				}
			}
			if len(own) > 0 {
				levels = append(levels, results.Level{
					Workload: w.Name, Contender: name, Metric: m.Name, Median: Median(own), Blocks: len(own), FailedPercent: failedPercent(good, name),
				})
			}
			if name == base {
				continue
			}
			var ours, theirs []float64
			for _, b := range good {
				if o, t := b.read(m, base), b.read(m, name); o > 0 && t > 0 {
					ours, theirs = append(ours, o), append(theirs, t)
				}
			}
			if len(ours) == 0 {
				continue
			}
			e := Ratio(ours, theirs, rng)
			rows = append(rows, results.Row{
				Workload: w.Name, Contender: name, Metric: m.Name, Ours: Median(ours), Theirs: Median(theirs),
				Ratio: e.Ratio, Low: e.Low, High: e.High, Blocks: len(ours), Rejected: rejected, Better: m.Better, Verdict: verdict(e, len(ours), m.Better),
			})
		}
	}
	return rows, levels, notes
}

// verdict refuses to judge from fewer blocks than an interval can be drawn from.
func verdict(e Estimate, blocks int, better results.Better) results.Verdict {
	if blocks < fewestAllowed {
		return results.Unclear
	}
	return results.Judge(e.Low, e.High, better)
}

func failedPercent(blocks []Block, name string) float64 {
	var failed, all int64
	count := func(r load.Report) { failed, all = failed+r.Failed, all+r.Failed+r.Ops }
	for _, b := range blocks {
		if name == directName {
			count(b.Direct[0])
			count(b.Direct[1])
			continue
		}
		count(b.Slices[name])
	}
	if all == 0 {
		return 0
	}
	return 100 * float64(failed) / float64(all)
}
