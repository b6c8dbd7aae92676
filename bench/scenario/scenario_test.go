package scenario_test

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/bench/load"
	"github.com/mistnet/mistnet/bench/results"
	"github.com/mistnet/mistnet/bench/scenario"
)

func seeded() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		xs   []float64
		want float64
	}{{[]float64{3}, 3}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := scenario.Median(c.xs); got != c.want {
			t.Errorf("Median(%v) = %v, want %v", c.xs, got, c.want)
		}
	}
	if !math.IsNaN(scenario.Median(nil)) {
		t.Error("Median of nothing is a number")
	}
}

func TestRatioOfExactPairsHasNoWidth(t *testing.T) {
	got := scenario.Ratio([]float64{2, 4, 8}, []float64{1, 2, 4}, seeded())
	for _, v := range []float64{got.Ratio, got.Low, got.High} {
		if math.Abs(v-2) > 1e-9 {
			t.Errorf("Ratio = %+v, want 2 throughout", got)
		}
	}
}

// The interval must hold the true ratio in about 95 of 100 experiments, and must be narrow enough to be of use.
func TestRatioCoversTheTruth(t *testing.T) {
	const truth, experiments, blocks = 1.5, 60, 15
	rng := seeded()
	covered, width := 0, 0.0
	for range experiments {
		ours, theirs := make([]float64, blocks), make([]float64, blocks)
		for i := range ours {
			theirs[i] = math.Exp(rng.NormFloat64()) // blocks differ wildly; the pairs in them do not
			ours[i] = theirs[i] * truth * math.Exp(0.05*rng.NormFloat64())
		}
		e := scenario.Ratio(ours, theirs, rng)
		if e.Low <= truth && truth <= e.High {
			covered++
		}
		width += e.High - e.Low
	}
	if covered < experiments*88/100 {
		t.Errorf("the truth was inside %d of %d intervals, want about 95 %%", covered, experiments)
	}
	if mean := width / experiments; mean > 0.2 {
		t.Errorf("mean width of the interval = %.3f, want under 0.2", mean)
	}
}

func TestRatioIsRepeatable(t *testing.T) {
	ours, theirs := []float64{1, 2, 3, 4}, []float64{2, 2, 2, 2}
	if diff := cmp.Diff(scenario.Ratio(ours, theirs, seeded()), scenario.Ratio(ours, theirs, seeded())); diff != "" {
		t.Errorf("same seed, other estimate:\n%s", diff)
	}
}

// slice is a report of an upload at rate GB/s that kept the machine busy for cpu seconds per GB.
func slice(rate, cpu float64) load.Report {
	bytes := rate * 1e9
	return load.Report{
		Ops: 1, Bytes: int64(bytes), Elapsed: time.Second, CPUs: 2,
		Busy: time.Duration(cpu * rate * float64(time.Second)), Procs: time.Duration(cpu / 2 * rate * float64(time.Second)),
	}
}

func block(direct2, ours, nginx float64) scenario.Block {
	return scenario.Block{
		Workload: "bulk-1", Direct: [2]load.Report{slice(4, 0.25), slice(direct2, 0.25)},
		Slices: map[string]load.Report{"ours": slice(ours, 1.25), "nginx": slice(nginx, 2.25)},
	}
}

func bulk(t *testing.T) scenario.Workload {
	t.Helper()
	ws, err := scenario.Pick(scenario.Workloads(), "bulk-1")
	if err != nil {
		t.Fatal(err)
	}
	return ws[0]
}

func TestFaultOfABlock(t *testing.T) {
	stolen := block(4, 1, 1)
	s := stolen.Slices["nginx"]
	s.Steal = 200 * time.Millisecond // of 8 s
	stolen.Slices["nginx"] = s
	dead := block(4, 1, 1)
	dead.Direct[1] = load.Report{Error: "connection refused"}
	failed := block(4, 1, 1)
	failed.Slices["nginx"] = load.Report{Error: "connection refused"}
	for _, c := range []struct {
		name string
		b    scenario.Block
		want string // a part of the fault
	}{
		{"undisturbed", block(4.3, 1, 1), ""},
		{"direct drifts", block(5, 1, 1), "differ by 25 %"},
		{"time was stolen", stolen, "2.5 % of the time"},
		{"direct fails", dead, "connection refused"},
		{"a contender fails", failed, ""},
	} {
		got := c.b.Fault(bulk(t).Metrics[0])
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: Fault = %q, want %q", c.name, got, c.want)
		}
	}
}

func TestSliceFault(t *testing.T) {
	for _, c := range []struct {
		r    load.Report
		want string
	}{
		{load.Report{Ops: 98, Failed: 2}, ""},
		{load.Report{Ops: 80, Failed: 20}, "20 of 100 connections broke"},
		{load.Report{}, "nothing was done"},
		{load.Report{Ops: 9, Error: "reset"}, "reset"},
	} {
		if got := scenario.SliceFault(c.r); got != c.want {
			t.Errorf("SliceFault(%+v) = %q, want %q", c.r, got, c.want)
		}
	}
}

func TestCompareCountsOnlyUndisturbedBlocks(t *testing.T) {
	blocks := []scenario.Block{block(4, 0.9, 0.6), block(4.1, 1.2, 0.8), block(8, 9, 1), block(4, 0.6, 0.4), block(4, 1.5, 1), block(4, 0.9, 0.6)}
	rows, levels, notes := scenario.Compare(bulk(t), blocks, "ours", []string{"direct", "ours", "nginx"}, seeded())
	if len(notes) > 0 {
		t.Errorf("notes = %q, want none", notes)
	}
	i := find(rows, "nginx", "gb_per_s")
	if i < 0 {
		t.Fatalf("no row against nginx in %+v", rows)
	}
	got := rows[i]
	if math.Abs(got.Ratio-1.5) > 1e-6 || got.Blocks != 5 || got.Rejected != 1 || got.Verdict != results.Win {
		t.Errorf("row = %+v, want ratio 1.5 of 5 blocks, 1 rejected, win", got)
	}
	// Added CPU is over the direct path's 0.25 s/GB: (1.25 − 0.25) ÷ (2.25 − 0.25).
	i = find(rows, "nginx", "cpu_s_per_gb")
	if i < 0 || math.Abs(rows[i].Ratio-0.5) > 1e-6 || rows[i].Verdict != results.Win {
		t.Errorf("added CPU row = %+v, want ratio 0.5, win", rows[i])
	}
	if find(rows, "direct", "cpu_s_per_gb") >= 0 {
		t.Error("added CPU is compared with direct, which adds none")
	}
	if find(rows, "ours", "gb_per_s") >= 0 {
		t.Error("ours is compared with itself")
	}
	if len(levels) != 3+2+2 {
		t.Errorf("%d levels, want 7: %+v", len(levels), levels)
	}
}

func TestCompareOnANoisyMachineUsesTheLeastDisturbedHalfAndSaysSo(t *testing.T) {
	blocks := []scenario.Block{block(8, 9, 1), block(5, 1.2, 0.8), block(4.8, 0.9, 0.6), block(16, 9, 1), block(4.6, 0.6, 0.4), block(4, 0.9, 0.6), block(4.5, 0.9, 0.6)}
	rows, _, notes := scenario.Compare(bulk(t), blocks, "ours", []string{"direct", "ours", "nginx"}, seeded())
	if len(notes) != 1 || !strings.Contains(notes[0], "only 1 of 7 blocks were undisturbed; the 5 least disturbed") {
		t.Errorf("notes = %q, want a warning", notes)
	}
	if got := rows[find(rows, "nginx", "gb_per_s")]; math.Abs(got.Ratio-1.5) > 1e-6 || got.Blocks != 5 || got.Rejected != 2 {
		t.Errorf("row = %+v, want ratio 1.5 of the 5 quietest blocks", got)
	}
}

func TestCompareLeavesOutASliceThatFailed(t *testing.T) {
	broken := block(4, 1, 1)
	broken.Slices["nginx"] = load.Report{Error: "refused"}
	blocks := []scenario.Block{block(4, 0.9, 0.6), broken}
	rows, _, _ := scenario.Compare(bulk(t), blocks, "ours", []string{"direct", "ours", "nginx"}, seeded())
	if got := rows[find(rows, "nginx", "gb_per_s")]; got.Blocks != 1 || got.Verdict != results.Unclear {
		t.Errorf("row = %+v, want 1 block and no verdict", got)
	}
	if got := rows[find(rows, "direct", "gb_per_s")]; got.Blocks != 2 {
		t.Errorf("row against direct = %+v, want 2 blocks", got)
	}
}

func find(rows []results.Row, contender, metric string) int {
	for i, r := range rows {
		if r.Contender == contender && r.Metric == metric {
			return i
		}
	}
	return -1
}

func TestNamesThatAreUnknownAreRefused(t *testing.T) {
	if _, err := scenario.FindProfile("slow"); err == nil {
		t.Error("FindProfile(slow) succeeded")
	}
	if p, err := scenario.FindProfile("quick"); err != nil || p.Budget > 6*time.Minute {
		t.Errorf("FindProfile(quick) = %+v, %v, want a budget within 6 minutes", p, err)
	}
	if _, err := scenario.Pick(scenario.Workloads(), "bulk-1,nope"); err == nil {
		t.Error("Pick(nope) succeeded")
	}
}
