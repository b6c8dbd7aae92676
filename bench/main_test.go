package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/bench/results"
)

func TestPickContenders(t *testing.T) {
	for list, want := range map[string][]string{
		"":                    {"ours", "nginx", "haproxy", "envoy", "zt-rust"},
		"direct,haproxy,ours": {"haproxy", "ours"},
	} {
		picked, err := pickContenders(options{}.contenders(), list)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, p := range picked {
			names = append(names, p.Name())
		}
		if diff := cmp.Diff(want, names); diff != "" {
			t.Errorf("pickContenders(%q) (-want +got):\n%s", list, diff)
		}
	}
	if _, err := pickContenders(options{}.contenders(), "squid"); err == nil {
		t.Error("pickContenders(squid) succeeded")
	}
}

func TestOnlyAWholeRunIsPublished(t *testing.T) {
	whole := options{profile: "quick", base: "ours"}
	if whole.trial() {
		t.Error("a whole run is a trial")
	}
	for name, o := range map[string]options{
		"smoke": {profile: "smoke", base: "ours"}, "other base": {profile: "quick", base: "nginx"}, "shortened": {profile: "quick", base: "ours", budget: 1},
		"some contenders": {profile: "quick", base: "ours", only: "nginx"}, "some workloads": {profile: "quick", base: "ours", workloads: "rr-1"},
	} {
		if !o.trial() {
			t.Errorf("%s: not a trial", name)
		}
		o.out, o.docs = t.TempDir(), "a-document-that-must-not-be-opened.md"
		if err := save(o, results.Run{Base: o.base, Rows: []results.Row{{Workload: "rr-1"}}}); err == nil {
			t.Errorf("%s: its table went into the document", name)
		}
	}
}
