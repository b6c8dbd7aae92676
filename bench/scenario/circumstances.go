package scenario

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/mistnet/mistnet/bench/peers"
	"github.com/mistnet/mistnet/bench/results"
)

// Workers is how many threads each proxy may use: as many as there are processors, for every contender.
func Workers() int { return runtime.NumCPU() }

// Circumstances are the facts a reader needs to judge a run.
func Circumstances(ctx context.Context, p Profile, f *peers.Fabric, seed uint64) []results.Fact {
	kernel, err := peers.Output(ctx, "", "uname", "-r")
	if err != nil {
		kernel = err.Error()
	}
	gogc := os.Getenv("GOGC")
	if gogc == "" {
		gogc = "100 (default)"
	}
	return []results.Fact{
		{Name: "kernel", Value: kernel},
		{Name: "processors", Value: fmt.Sprintf("%d × %s", runtime.NumCPU(), cpuModel())},
		{Name: "congestion control", Value: f.Congestion + ", asserted in the pods' namespaces"},
		{Name: "MTU", Value: f.MTU},
		{Name: "workers of each proxy process", Value: fmt.Sprint(Workers())},
		{Name: "Go", Value: fmt.Sprintf("%s, GOMAXPROCS %d, GOGC %s", runtime.Version(), runtime.GOMAXPROCS(0), gogc)},
		{Name: "profile", Value: fmt.Sprintf("%s: %v warm-up, %v slice, at most %d blocks of each workload, seed %d", p.Name, p.Warm, p.Slice, p.Blocks, seed)},
	}
}

func cpuModel() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

// Pick returns the workloads named in list, which has commas between names; an empty list picks all.
func Pick(all []Workload, list string) ([]Workload, error) {
	if list == "" {
		return all, nil
	}
	var picked []Workload
	for name := range strings.SplitSeq(list, ",") {
		found := false
		for _, w := range all {
			if w.Name == name {
				picked, found = append(picked, w), true
			}
		}
		if !found {
			return nil, fmt.Errorf("no workload %q", name)
		}
	}
	return picked, nil
}
