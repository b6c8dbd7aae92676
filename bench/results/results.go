// Package results writes down what a run of the bench came to: JSON for programs, Markdown for readers, a chart for a glance. It
// computes nothing.
package results

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// Better says which way a metric improves.
type Better string

// The two ways.
const (
	Higher Better = "higher"
	Lower  Better = "lower"
)

// Verdict is what an interval allows to be said.
type Verdict string

// The verdicts. Unclear is an interval that holds 1 and is wider than 5 % on a side of it.
const (
	Win     Verdict = "win"
	Tie     Verdict = "tie"
	Loss    Verdict = "loss"
	Unclear Verdict = "unclear"
)

// Row compares us with one contender in one metric of one workload.
type Row struct {
	Workload  string `json:"workload"`
	Contender string `json:"contender"`
	Metric    string `json:"metric"`
	// Ours and Theirs are medians over the blocks, in the metric's unit.
	Ours   float64 `json:"ours"`
	Theirs float64 `json:"theirs"`
	// Ratio is the median over blocks of ours ÷ theirs, Low and High its 95 % interval.
	Ratio    float64 `json:"ratio"`
	Low      float64 `json:"low"`
	High     float64 `json:"high"`
	Blocks   int     `json:"blocks"`
	Rejected int     `json:"rejected"`
	Better   Better  `json:"better"`
	Verdict  Verdict `json:"verdict"`
}

// Judge says what an interval of a ratio means.
func Judge(low, high float64, better Better) Verdict {
	switch {
	case low > 1 && better == Higher, high < 1 && better == Lower:
		return Win
	case low > 1 || high < 1:
		return Loss
	case low >= 0.95 && high <= 1.05:
		return Tie
	}
	return Unclear
}

// Level is one contender's own median in one metric. It is for orientation: only ratios of the same blocks compare.
type Level struct {
	Workload, Contender, Metric string
	Median                      float64
	Blocks                      int
	FailedPercent               float64 // connections that broke, of all
}

// Fact is a line on the circumstances of a run.
type Fact struct{ Name, Value string }

// Run is all there is to write down.
type Run struct {
	// Base is who the ratios are of; "ours" but for trials of the bench itself.
	Base   string
	Rows   []Row
	Levels []Level
	Facts  []Fact
	// Notes are what a reader must not miss: who was absent, how many blocks were rejected.
	Notes []string
}

// JSON is the rows as a list of objects.
func JSON(rows []Row) ([]byte, error) {
	if rows == nil {
		rows = []Row{}
	}
	text, err := json.MarshalIndent(rows, "", "  ")
	return append(text, '\n'), err
}

// Save writes name.json, name.md and name.svg into dir. Each file is replaced in one step.
func Save(dir, name string, r Run) error {
	text, err := JSON(r.Rows)
	if err != nil {
		return err
	}
	for ext, body := range map[string][]byte{"json": text, "md": []byte(Markdown(r)), "svg": []byte(SVG(r))} {
		if err := replace(filepath.Join(dir, name+"."+ext), body); err != nil {
			return fmt.Errorf("save results: %w", err)
		}
	}
	return nil
}

func replace(path string, body []byte) error {
	part := path + ".part"
	if err := os.WriteFile(part, body, 0o644); err != nil {
		return err
	}
	return os.Rename(part, path)
}
