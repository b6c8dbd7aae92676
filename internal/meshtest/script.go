package meshtest

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite golden files and scripts with what the code says now")

// Update reports whether the test was run with -update. Only tests that import this package have that flag; they must
// not define it again.
func Update() bool { return *update }

// RunScripts runs every script that matches glob as a subtest. A script is a text file that tells one story in
// directives, apart by blank lines:
//
//	# A comment.
//	command word key=value
//	input, as many lines as it takes
//	----
//	the output expected
//
// start is called once per file and returns what executes one directive: its result is the output. -update writes that
// into the file instead of comparing: commit the difference only if you can explain it.
func RunScripts(t *testing.T, glob string, start func(t *testing.T) func(d *Directive) string) {
	t.Helper()
	files, err := filepath.Glob(glob)
	if err != nil || len(files) == 0 {
		t.Fatalf("no script matches %s (%v)", glob, err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), filepath.Ext(file))
		t.Run(name, func(t *testing.T) { runScript(t, file, start(t)) })
	}
}

func runScript(t *testing.T, file string, run func(d *Directive) string) {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	blocks, err := parseScript(string(text))
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	var rewritten strings.Builder
	for _, b := range blocks {
		rewritten.WriteString(b.head)
		if b.directive == nil {
			continue
		}
		d := b.directive
		d.t, d.pos = t, fmt.Sprintf("%s:%d", file, b.line)
		got := strings.TrimRight(run(d), "\n")
		d.checkRead()
		if strings.Contains(got, "\n\n") {
			t.Fatalf("%s: the output holds a blank line:\n%s", d.pos, got)
		}
		if got != "" {
			rewritten.WriteString(got + "\n")
		}
		if !*update && got != b.want {
			t.Errorf("%s: %s (-want +got):\n%s", d.pos, d.Command, cmp.Diff(b.want, got))
		}
	}
	if *update && rewritten.String() != string(text) {
		if err := os.WriteFile(file, []byte(rewritten.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// block is a piece of a script: text to keep, and perhaps a directive, whose expected output follows it.
type block struct {
	head      string // up to and with the ---- line
	line      int
	directive *Directive
	want      string
}

func parseScript(text string) ([]block, error) {
	var blocks []block
	lines := strings.SplitAfter(text, "\n")
	for i := 0; i < len(lines); {
		line := strings.TrimSpace(lines[i])
		if line == "" || strings.HasPrefix(line, "#") {
			blocks = append(blocks, block{head: lines[i]})
			i++
			continue
		}
		b := block{line: i + 1, directive: parseDirective(line)}
		b.head = lines[i]
		for i++; ; i++ {
			if i == len(lines) || lines[i] == "" || lines[i] == "\n" {
				return nil, fmt.Errorf("line %d: directive without ----", b.line)
			}
			b.head += lines[i]
			if strings.TrimSpace(lines[i]) == "----" {
				break
			}
			b.directive.Input += lines[i]
		}
		for i++; i < len(lines) && strings.TrimSpace(lines[i]) != ""; i++ {
			b.want += lines[i]
		}
		b.want = strings.TrimRight(b.want, "\n")
		blocks = append(blocks, b)
	}
	return blocks, nil
}

// Directive is one command of a script.
type Directive struct {
	Command string
	Input   string // the lines between the command and ----

	words []string // arguments without =
	keys  map[string]string
	read  map[string]bool // keys and words that mean something
	lines []*Directive
	t     *testing.T
	pos   string
}

func parseDirective(line string) *Directive {
	f := strings.Fields(line)
	d := &Directive{Command: f[0], keys: make(map[string]string), read: make(map[string]bool)}
	for _, word := range f[1:] {
		if k, v, ok := strings.Cut(word, "="); ok {
			d.keys[k] = v
			continue
		}
		d.words = append(d.words, word)
	}
	return d
}

// Lines parses every line of the input as a directive of its own.
func (d *Directive) Lines() []*Directive {
	var ds []*Directive
	for line := range strings.Lines(d.Input) {
		if strings.TrimSpace(line) == "" {
			continue
		}
		l := parseDirective(strings.TrimSpace(line))
		l.t, l.pos = d.t, d.pos
		ds = append(ds, l)
	}
	d.lines = ds
	return ds
}

// Get returns the value of key=, or "".
func (d *Directive) Get(key string) string {
	d.read[key] = true
	return d.keys[key]
}

// Has reports whether the directive has key= or the word key.
func (d *Directive) Has(key string) bool {
	d.read[key] = true
	if _, ok := d.keys[key]; ok {
		return true
	}
	return slices.Contains(d.words, key)
}

// Word returns the argument without = at position i, and fails the test when there are fewer.
func (d *Directive) Word(i int) string {
	if i >= len(d.words) {
		d.Fatalf("wants %d words", i+1)
	}
	d.read[d.words[i]] = true
	return d.words[i]
}

// List returns the value of key= split at commas.
func (d *Directive) List(key string) []string {
	v := d.Get(key)
	if v == "" {
		return nil
	}
	return strings.Split(v, ",")
}

// Fatalf fails the test and says at which directive.
func (d *Directive) Fatalf(format string, args ...any) {
	d.t.Helper()
	d.t.Fatalf("%s: %s: %s", d.pos, d.Command, fmt.Sprintf(format, args...))
}

// checkRead catches what is misspelt.
func (d *Directive) checkRead() {
	for _, w := range d.words {
		if !d.read[w] {
			d.Fatalf("%s means nothing to it", w)
		}
	}
	for k := range d.keys {
		if !d.read[k] {
			d.Fatalf("%s= means nothing to it", k)
		}
	}
	for _, l := range d.lines {
		l.checkRead()
	}
}
