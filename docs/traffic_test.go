// Package docs_test holds the documentation to what it says.
package docs_test

import (
	"bufio"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/cli/explain"
)

// example is YAML of a page and the questions in the table below it.
type example struct {
	section string
	line    int
	yaml    string
	asks    []ask
}

type ask struct {
	line       int
	what, want string
}

// TestTrafficRulesDoWhatThePageSays reads every example of traffic.md on top of the first one, in which the services are,
// finds nothing to complain about, and asks what the table asks.
func TestTrafficRulesDoWhatThePageSays(t *testing.T) {
	t.Parallel()
	examples := read(t, "traffic.md")
	if len(examples) < 2 {
		t.Fatalf("the page has %d examples", len(examples))
	}
	base := examples[0]
	for _, e := range examples[1:] {
		t.Run(e.section, func(t *testing.T) {
			t.Parallel()
			if len(e.asks) == 0 {
				t.Errorf("traffic.md:%d: an example that nobody asks anything of", e.line)
			}
			dir := t.TempDir()
			for name, text := range map[string]string{"base.yaml": base.yaml, "example.yaml": e.yaml} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			m, err := explain.Read(t.Context(), dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range m.Problems() {
				t.Errorf("traffic.md:%d: %s: %s: %s", e.line, p.Object, p.Reason, p.What)
			}
			for _, a := range e.asks {
				_, what, err := m.Explain(question(a.what))
				if err != nil {
					t.Errorf("traffic.md:%d: %s: %v", a.line, a.what, err)
				} else if what != a.want {
					t.Errorf("traffic.md:%d: %s\n got %s\nwant %s", a.line, a.what, what, a.want)
				}
			}
		})
	}
}

// question reads METHOD URL [HEADER=VALUE]… [from=NAMESPACE] [sni=NAME].
func question(text string) explain.Question {
	words := strings.Fields(text)
	q := explain.Question{Method: words[0], URL: words[1], Headers: make(map[string]string)}
	for _, w := range words[2:] {
		name, value, _ := strings.Cut(w, "=")
		switch name {
		case "from":
			q.From = value
		case "sni":
			q.SNI = value
		default:
			q.Headers[name] = value
		}
	}
	return q
}

func read(t *testing.T, page string) (examples []example) {
	t.Helper()
	f, err := os.Open(page)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	section, inYAML, lines := "", false, bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		switch {
		case line == "```yaml":
			inYAML = true
			examples = append(examples, example{section: section, line: n + 1})
		case inYAML && line == "```":
			inYAML = false
		case inYAML:
			examples[len(examples)-1].yaml += line + "\n"
		case strings.HasPrefix(line, "## "):
			section = line[3:]
		case strings.HasPrefix(line, "| `"):
			what, want, found := strings.Cut(strings.Trim(line, "| "), "` | ")
			if !found || len(examples) == 0 {
				t.Fatalf("%s:%d: want | `question` | answer |", page, n)
			}
			e := &examples[len(examples)-1]
			e.asks = append(e.asks, ask{n, strings.TrimPrefix(what, "`"), want})
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return examples
}
