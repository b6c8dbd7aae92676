package results_test

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/bench/results"
)

func sample() results.Run {
	return results.Run{
		Base: "ours",
		Rows: []results.Row{
			{Workload: "bulk-1", Contender: "nginx", Metric: "gb_per_s", Ours: 0.9, Theirs: 0.55, Ratio: 1.64, Low: 1.5, High: 1.8, Blocks: 9, Rejected: 1, Better: results.Higher, Verdict: results.Win},
			{Workload: "bulk-1", Contender: "a<b&c", Metric: "gb_per_s", Ours: 0.9, Theirs: 0.9, Ratio: 1, Low: 0.98, High: 1.02, Blocks: 9, Better: results.Higher, Verdict: results.Tie},
			{Workload: "rr-1", Contender: "direct", Metric: "p50_us", Ours: 250, Theirs: 36, Ratio: 6.9, Low: 6.5, High: 7.2, Blocks: 9, Better: results.Lower, Verdict: results.Loss},
		},
		Levels: []results.Level{
			{Workload: "bulk-1", Contender: "direct", Metric: "gb_per_s", Median: 4.5, Blocks: 9},
			{Workload: "bulk-1", Contender: "nginx", Metric: "gb_per_s", Median: 0.55, Blocks: 9, FailedPercent: 2},
			{Workload: "bulk-1", Contender: "nginx", Metric: "cpu_s_per_gb", Median: 2.23, Blocks: 9, FailedPercent: 2},
		},
		Facts: []results.Fact{{Name: "kernel", Value: "6|x"}},
		Notes: []string{"SKIPPED envoy: not here"},
	}
}

func TestJSONIsAListWithTheseFields(t *testing.T) {
	text, err := results.JSON(sample().Rows[:1])
	if err != nil {
		t.Fatal(err)
	}
	var got []map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	want := []map[string]any{{
		"workload": "bulk-1", "contender": "nginx", "metric": "gb_per_s", "ours": 0.9, "theirs": 0.55, "ratio": 1.64, "low": 1.5, "high": 1.8,
		"blocks": 9.0, "rejected": 1.0, "better": "higher", "verdict": "win",
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("JSON (-want +got):\n%s", diff)
	}
	if text, err = results.JSON(nil); err != nil || string(text) != "[]\n" {
		t.Errorf("JSON(nil) = %q, %v, want an empty list", text, err)
	}
}

func TestJudge(t *testing.T) {
	for _, c := range []struct {
		name      string
		low, high float64
		better    results.Better
		want      results.Verdict
	}{
		{"more and better", 1.2, 1.5, results.Higher, results.Win},
		{"more and worse", 1.2, 1.5, results.Lower, results.Loss},
		{"less and better", 0.5, 0.9, results.Lower, results.Win},
		{"less and worse", 0.5, 0.9, results.Higher, results.Loss},
		{"straddles 1 closely", 0.97, 1.04, results.Higher, results.Tie},
		{"straddles 1 widely", 0.97, 1.3, results.Higher, results.Unclear},
		{"close to 1 but above it", 1.01, 1.03, results.Higher, results.Win},
	} {
		if got := results.Judge(c.low, c.high, c.better); got != c.want {
			t.Errorf("%s: Judge(%v, %v, %s) = %s, want %s", c.name, c.low, c.high, c.better, got, c.want)
		}
	}
}

func TestSVGIsWellFormed(t *testing.T) {
	wild := sample()
	wild.Rows[0].High = math.Inf(1)
	wild.Rows[1].Low = 0
	for name, r := range map[string]results.Run{"sample": sample(), "no rows": {Base: "o<urs"}, "wild": wild} {
		svg := results.SVG(r)
		if strings.Contains(svg, "NaN") || strings.Contains(svg, "Inf") {
			t.Errorf("%s: a coordinate is not a number", name)
		}
		d := xml.NewDecoder(strings.NewReader(svg))
		shapes := 0
		for {
			tok, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if e, ok := tok.(xml.StartElement); ok && (e.Name.Local == "circle" || (e.Name.Local == "rect" && attr(e, "height") == "9")) {
				shapes++
			}
		}
		if want := max(len(r.Rows)-1, 0); shapes != want { // all but the row against direct
			t.Errorf("%s: %d points, want %d", name, shapes, want)
		}
	}
}

func attr(e xml.StartElement, name string) string {
	for _, a := range e.Attr {
		if a.Name.Local == name {
			return a.Value
		}
	}
	return ""
}

func TestMarkdown(t *testing.T) {
	got := results.Markdown(sample())
	for _, want := range []string{
		"| bulk-1 | throughput, GB/s ↑ | nginx | 0.900 | 0.550 | **1.64** | 1.50 – 1.80 | 9 (1) | win |\n",
		"| rr-1 | p50, µs ↓ | direct | 250 | 36.0 | **6.90** | 6.50 – 7.20 | 9 (0) | loss |\n",
		"| | direct | nginx |\n|---|---:|---:|\n| throughput, GB/s | 4.50 | 0.550 |\n| added CPU, s/GB | – | 2.23 |\n",
		"| broken connections, % | 0 | 2.00 |\n",
		"- SKIPPED envoy: not here\n",
		"| kernel | 6\\|x |\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("Markdown lacks %q; it is:\n%s", want, got)
		}
	}
	if got := results.Markdown(results.Run{Base: "ours"}); got != "No ratios: ours did not run.\n" {
		t.Errorf("Markdown of nothing = %q", got)
	}
}

func TestSpliceReplacesOnlyWhatIsBetweenTheMarks(t *testing.T) {
	const begin, end = "<!-- bench: begin, written by bench -docs -->", "<!-- bench: end -->"
	doc := "# Title\n" + begin + "\nold\n" + end + "\nfoot\n"
	want := "# Title\n" + begin + "\n\nnew\n\n" + end + "\nfoot\n"
	got, err := results.Splice([]byte(doc), "bench", "new\n")
	if err != nil || string(got) != want {
		t.Errorf("Splice = %q, %v, want %q", got, err, want)
	}
	again, err := results.Splice(got, "bench", "new\n")
	if err != nil || string(again) != want {
		t.Errorf("Splice twice = %q, %v, want no change", again, err)
	}
	if _, err := results.Splice([]byte("no marks"), "bench", "x"); err == nil {
		t.Error("Splice without marks succeeded")
	}
	if _, err := results.Splice([]byte(begin), "bench", "x"); err == nil {
		t.Error("Splice without the end mark succeeded")
	}
}
