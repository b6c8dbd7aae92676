// Package scenario runs the bench: it orders slices of traffic through contenders in paired blocks, throws away blocks that the
// machine disturbed, and turns the rest into ratios.
//
// A block is every contender once, in random order, with the direct path first and last. Whatever drifts between blocks (clock
// speed, neighbours, caches) touches all contenders of a block alike and falls out of the ratio.
package scenario

import (
	"fmt"
	"time"

	"github.com/mistnet/mistnet/bench/load"
	"github.com/mistnet/mistnet/bench/results"
)

// Workload is a kind of traffic and what is read off it.
type Workload struct {
	Name  string
	Order load.Order // without Addr, PIDs and times
	// Metrics are what is read off a slice; the first is compared between the two direct slices of a block.
	Metrics []Metric
	// Site is which of an L7 contender's sites it goes to; "": an L4 workload.
	Site string
	// Also are further entrants: what the base does at another site, under another name.
	Also []Also
	// Half gives a Paced order half the rate that the slowest contender can do.
	Half bool
	// Fresh is measured once on each process, soon after its start, so contenders are started anew for each block. There is no
	// direct path in such blocks.
	Fresh bool
}

// Also is what the base does at another site.
type Also struct{ Name, Site string }

// Metric reads one number off a slice.
type Metric struct {
	Name   string
	Better results.Better
	// Added metrics are counted over the direct path's: what the proxies cost, kernel work for them included.
	Added bool
	// Proxies metrics mean nothing for the direct path.
	Proxies bool
	Value   func(load.Report) float64
}

func micros(d time.Duration) float64 { return float64(d) / 1e3 }

func gigabytes(r load.Report) float64 { return float64(r.Bytes) / 1e9 }

// perOp is the microseconds of CPU that one finished operation took.
func perOp(cpu func(load.Report) time.Duration) func(load.Report) float64 {
	return func(r load.Report) float64 { return micros(cpu(r)) / float64(r.Ops) }
}

func busy(r load.Report) time.Duration  { return r.Busy }
func procs(r load.Report) time.Duration { return r.Procs }

// Workloads are all that the bench knows, in the order of its tables.
func Workloads() []Workload {
	cpuPerOp := []Metric{
		{Name: "cpu_us", Better: results.Lower, Added: true, Value: perOp(busy)},
		{Name: "proxy_cpu_us", Better: results.Lower, Proxies: true, Value: perOp(procs)},
	}
	return []Workload{
		{Name: "bulk-1", Order: load.Order{Kind: load.Bulk}, Metrics: []Metric{
			{Name: "gb_per_s", Better: results.Higher, Value: func(r load.Report) float64 { return gigabytes(r) / r.Elapsed.Seconds() }},
			{Name: "cpu_s_per_gb", Better: results.Lower, Added: true, Value: func(r load.Report) float64 { return r.Busy.Seconds() / gigabytes(r) }},
			{Name: "proxy_cpu_s_per_gb", Better: results.Lower, Proxies: true, Value: func(r load.Report) float64 { return r.Procs.Seconds() / gigabytes(r) }},
		}},
		{Name: "rr-1", Order: load.Order{Kind: load.Echo, Size: 1024}, Metrics: append([]Metric{
			{Name: "p50_us", Better: results.Lower, Value: func(r load.Report) float64 { return micros(r.P50) }},
			{Name: "p99_us", Better: results.Lower, Value: func(r load.Report) float64 { return micros(r.P99) }},
		}, cpuPerOp...)},
		{Name: "crr-warm", Order: load.Order{Kind: load.Connect, Clients: 4}, Metrics: append([]Metric{
			{Name: "conn_per_s", Better: results.Higher, Value: func(r load.Report) float64 { return float64(r.Ops) / r.Elapsed.Seconds() }},
		}, cpuPerOp...)},
	}
}

// Profile is how much time a run takes.
type Profile struct {
	Name        string
	Warm, Slice time.Duration
	// Blocks is how many accepted blocks of each workload are wanted; Budget ends the run earlier.
	Blocks int
	Budget time.Duration
	// Fresh is how many blocks of a workload with fresh processes are run.
	Fresh int
}

// FindProfile returns the profile of that name for the L4 workloads.
func FindProfile(name string) (Profile, error) {
	return findProfile(name, []Profile{
		{Name: "smoke", Warm: 200 * time.Millisecond, Slice: 300 * time.Millisecond, Blocks: 2, Budget: time.Minute},
		{Name: "quick", Warm: 500 * time.Millisecond, Slice: 1300 * time.Millisecond, Blocks: 12, Budget: 5*time.Minute + 15*time.Second},
		{Name: "full", Warm: 500 * time.Millisecond, Slice: 3 * time.Second, Blocks: 20, Budget: 40 * time.Minute},
	})
}

// FindL7Profile returns the profile of that name for the L7 workloads, which are more and want shorter slices.
func FindL7Profile(name string) (Profile, error) {
	return findProfile(name, []Profile{
		{Name: "smoke", Warm: 100 * time.Millisecond, Slice: 200 * time.Millisecond, Blocks: 1, Budget: 90 * time.Second, Fresh: 1},
		{Name: "quick", Warm: 200 * time.Millisecond, Slice: 700 * time.Millisecond, Blocks: 12, Budget: 7*time.Minute + 45*time.Second, Fresh: fewestAllowed},
		{Name: "full", Warm: 500 * time.Millisecond, Slice: 2 * time.Second, Blocks: 20, Budget: time.Hour, Fresh: 8},
	})
}

func findProfile(name string, profiles []Profile) (Profile, error) {
	for _, p := range profiles {
		if p.Name == name {
			return p, nil
		}
	}
	return Profile{}, fmt.Errorf("unknown profile %q: want smoke, quick or full", name)
}
