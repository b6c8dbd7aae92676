package results

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
)

// Units are what metrics are called in tables.
var units = map[string]string{
	"gb_per_s":           "throughput, GB/s",
	"cpu_s_per_gb":       "added CPU, s/GB",
	"proxy_cpu_s_per_gb": "proxies' CPU, s/GB",
	"p50_us":             "p50, µs",
	"p99_us":             "p99, µs",
	"cpu_us":             "added CPU, µs",
	"proxy_cpu_us":       "proxies' CPU, µs",
	"conn_per_s":         "connections/s",
	"req_per_s":          "requests/s",
	"kb_per_conn":        "memory per connection, KiB",
}

// Unit is the readable name of a metric.
func Unit(metric string) string {
	if u, ok := units[metric]; ok {
		return u
	}
	return metric
}

// Markdown is the run as tables.
func Markdown(r Run) string {
	var b strings.Builder
	if len(r.Rows) == 0 {
		fmt.Fprintf(&b, "No ratios: %s did not run.\n", r.Base)
	} else {
		writeRatios(&b, r)
	}
	writeLevels(&b, r.Levels)
	if len(r.Notes) > 0 {
		b.WriteString("\nNotes of this run\n\n")
		for _, n := range r.Notes {
			fmt.Fprintf(&b, "- %s\n", n)
		}
	}
	if len(r.Facts) > 0 {
		b.WriteString("\n| circumstance | value |\n|---|---|\n")
		for _, f := range r.Facts {
			fmt.Fprintf(&b, "| %s | %s |\n", cell(f.Name), cell(f.Value))
		}
	}
	return b.String()
}

func writeRatios(b *strings.Builder, r Run) {
	fmt.Fprintf(b, "| workload | metric | against | %s | theirs | ratio | 95 %% interval | blocks (rejected) | verdict |\n", r.Base)
	b.WriteString("|---|---|---|---:|---:|---:|---|---:|---|\n")
	for _, w := range r.Rows {
		arrow := "↑"
		if w.Better == Lower {
			arrow = "↓"
		}
		fmt.Fprintf(b, "| %s | %s %s | %s | %s | %s | **%s** | %s – %s | %d (%d) | %s |\n", w.Workload, cell(Unit(w.Metric)), arrow, w.Contender,
			number(w.Ours), number(w.Theirs), number(w.Ratio), number(w.Low), number(w.High), w.Blocks, w.Rejected, w.Verdict)
	}
	b.WriteString("\n↑ more is better, ↓ less is better. The ratio is ours ÷ theirs, median over paired blocks.\n")
}

// writeLevels makes a table for each workload: contenders across, metrics down.
func writeLevels(b *strings.Builder, levels []Level) {
	workloads := distinct(levels, func(l Level) string { return l.Workload })
	for _, w := range workloads {
		of := slices.DeleteFunc(slices.Clone(levels), func(l Level) bool { return l.Workload != w })
		names := distinct(of, func(l Level) string { return l.Contender })
		fmt.Fprintf(b, "\n%s, medians (for orientation; only the ratios above are paired)\n\n| | %s |\n|---|%s\n", w, strings.Join(names, " | "), strings.Repeat("---:|", len(names)))
		for _, m := range distinct(of, func(l Level) string { return l.Metric }) {
			fmt.Fprintf(b, "| %s |", cell(Unit(m)))
			for _, name := range names {
				i := slices.IndexFunc(of, func(l Level) bool { return l.Contender == name && l.Metric == m })
				if i < 0 {
					b.WriteString(" – |")
					continue
				}
				fmt.Fprintf(b, " %s |", number(of[i].Median))
			}
			b.WriteString("\n")
		}
		if slices.ContainsFunc(of, func(l Level) bool { return l.FailedPercent > 0 }) {
			b.WriteString("| broken connections, % |")
			for _, name := range names {
				i := slices.IndexFunc(of, func(l Level) bool { return l.Contender == name })
				fmt.Fprintf(b, " %s |", number(of[i].FailedPercent))
			}
			b.WriteString("\n")
		}
	}
}

func distinct(levels []Level, key func(Level) string) []string {
	var keys []string
	for _, l := range levels {
		if k := key(l); !slices.Contains(keys, k) {
			keys = append(keys, k)
		}
	}
	return keys
}

// number prints three significant digits, without an exponent.
func number(v float64) string {
	if v == 0 || math.IsNaN(v) || math.IsInf(v, 0) {
		return fmt.Sprint(v)
	}
	digits := max(2-int(math.Floor(math.Log10(math.Abs(v)))), 0)
	return fmt.Sprintf("%.*f", digits, v)
}

func cell(s string) string { return strings.ReplaceAll(s, "|", "\\|") }

// marks are the lines between which a document holds the latest table of a section.
func marks(section string) (begin, end string) {
	return "<!-- " + section + ": begin, written by bench -docs -->", "<!-- " + section + ": end -->"
}

// Splice replaces what stands between the marks of a section in doc with table.
func Splice(doc []byte, section, table string) ([]byte, error) {
	begin, end := marks(section)
	head, rest, ok := bytes.Cut(doc, []byte(begin))
	if !ok {
		return nil, fmt.Errorf("no line %q in the document", begin)
	}
	_, foot, ok := bytes.Cut(rest, []byte(end))
	if !ok {
		return nil, fmt.Errorf("no line %q in the document", end)
	}
	return fmt.Appendf(nil, "%s%s\n\n%s\n%s%s", head, begin, strings.TrimSpace(table)+"\n", end, foot), nil
}

// UpdateDoc splices the run's tables into a section of the document at path.
func UpdateDoc(path, section string, r Run) error {
	doc, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	doc, err = Splice(doc, section, Markdown(r))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return replace(path, doc)
}
