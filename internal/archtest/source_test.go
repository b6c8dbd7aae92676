package archtest_test

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// generated is the line that says so (https://go.dev/s/generatedcode).
var generated = regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)

// source is one hand-written Go file.
type source struct {
	path string // in the tree
	text []byte
}

// sources are the Go files of the tree that no program wrote.
func sources(t *testing.T) []source {
	t.Helper()
	var files []source
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			if os.IsNotExist(err) {
				return nil // a temporary file that went
			}
			return err
		}
		name := e.Name()
		if e.IsDir() {
			if path != root && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "testdata" || name == "node_modules") {
				return fs.SkipDir
			}
			return nil
		}
		if filepath.Ext(name) != ".go" || strings.HasPrefix(name, ".") {
			return nil
		}
		text, err := os.ReadFile(path)
		if os.IsNotExist(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if generated.Match(text) {
			return nil
		}
		rel, err := filepath.Rel(root, path)
		files = append(files, source{filepath.ToSlash(rel), text})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 10 {
		t.Fatalf("found %d Go files: the test is blind", len(files))
	}
	return files
}

func TestFilesAreReadable(t *testing.T) {
	t.Parallel()
	const most, mostInMain = 600, 40
	for _, f := range sources(t) {
		lines := bytes.Count(f.text, []byte("\n"))
		if lines > most {
			t.Errorf("%s has %d lines, at most %d are readable: split it by idea", f.path, lines, most)
		}
		if under(f.path, "cmd") && filepath.Base(f.path) == "main.go" && lines > mostInMain {
			t.Errorf("%s has %d lines: a main of more than %d is a program that cannot be tested", f.path, lines, mostInMain)
		}
	}
}

// TestEveryPackageSaysWhatItIsFor leaves out packages of generated files alone, whose comment is their proto file's, and
// of tests alone.
func TestEveryPackageSaysWhatItIsFor(t *testing.T) {
	t.Parallel()
	documented, exists := make(map[string]bool), make(map[string]bool)
	for _, f := range sources(t) {
		if strings.HasSuffix(f.path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), f.path, f.text, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			continue // half written
		}
		dir := filepath.Dir(f.path)
		exists[dir] = true
		if file.Doc != nil && strings.TrimSpace(file.Doc.Text()) != "" {
			documented[dir] = true
		}
	}
	for dir := range exists {
		if !documented[dir] {
			t.Errorf("%s has no package comment: say what it is for, what it hides and what it does not do", dir)
		}
	}
}

// acts are what pure code must not ask of packages it may import for their types.
var acts = map[string]struct {
	names map[string]bool // nil: everything but except
	but   map[string]bool
	why   string
}{
	"time": {
		names: set("Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"),
		why:   "the time is handed to it",
	},
	"math/rand":                            {but: randTypes, why: "randomness is handed to it"},
	"math/rand/v2":                         {but: randTypes, why: "randomness is handed to it"},
	"k8s.io/apimachinery/pkg/apis/meta/v1": {names: set("Now", "NowMicro"), why: "the time is handed to it"},
	"fmt": {
		names: set("Print", "Printf", "Println", "Scan", "Scanf", "Scanln"), why: "it returns what it has to say",
	},
}

var randTypes = set("Rand", "Source", "New", "NewPCG", "PCG", "NewChaCha8", "ChaCha8", "Zipf", "NewZipf")

func set(names ...string) map[string]bool {
	m := make(map[string]bool)
	for _, n := range names {
		m[n] = true
	}
	return m
}

func TestPureCodeAsksForNothing(t *testing.T) {
	t.Parallel()
	for _, f := range sources(t) {
		at, _ := placeOf(filepath.ToSlash(filepath.Dir(f.path)))
		if !at.pure || strings.HasSuffix(f.path, "_test.go") {
			continue
		}
		for _, fault := range impurities(f) {
			t.Errorf("%s: %s", f.path, fault)
		}
	}
}

func TestImpuritiesAreSeen(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int{
		"package p; import \"time\"; var _ = time.Second":                                   0,
		"package p; import \"time\"; func f() { time.Now() }":                               1,
		"package p; import clock \"time\"; var _ = clock.Since":                             1,
		"package p; import . \"time\"":                                                      1,
		"package p; import \"math/rand/v2\"; func f(r *rand.Rand) int { return r.IntN(2) }": 0,
		"package p; import \"math/rand/v2\"; var _ = rand.IntN(2)":                          1,
		"package p; func f() { go f() }":                                                    1,
		"package p; func init() {}":                                                         1,
		"package p; type t struct{}; func (t) init() {}":                                    0,
	} {
		if got := impurities(source{"p.go", []byte(text)}); len(got) != want {
			t.Errorf("impurities of %q = %q, want %d", text, got, want)
		}
	}
}

// impurities lists what a file does that pure code does not.
func impurities(f source) (faults []string) {
	file, err := parser.ParseFile(token.NewFileSet(), f.path, f.text, parser.SkipObjectResolution)
	if err != nil {
		return nil // half written
	}
	imported := make(map[string]string) // name in this file → path
	for _, imp := range file.Imports {
		path := strings.Trim(imp.Path.Value, `"`)
		if _, ok := acts[path]; !ok {
			continue
		}
		name := strings.TrimSuffix(path, "/v2")
		name = name[strings.LastIndexByte(name, '/')+1:]
		if imp.Name != nil {
			name = imp.Name.Name
		}
		if name == "." {
			faults = append(faults, "imports "+path+" into its own names, where nobody sees what it asks")
		}
		imported[name] = path
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			faults = append(faults, "starts a goroutine: a decision is over when it returns")
		case *ast.FuncDecl:
			if n.Name.Name == "init" && n.Recv == nil {
				faults = append(faults, "has an init: it shares nothing that changes")
			}
		case *ast.SelectorExpr:
			x, ok := n.X.(*ast.Ident)
			if !ok {
				return true
			}
			act, ok := acts[imported[x.Name]]
			if ok && (act.names[n.Sel.Name] || act.names == nil && !act.but[n.Sel.Name]) {
				faults = append(faults, "uses "+x.Name+"."+n.Sel.Name+": "+act.why)
			}
		}
		return true
	})
	return faults
}

// TestNoInit: nothing happens because something was imported.
func TestNoInit(t *testing.T) {
	t.Parallel()
	for _, f := range sources(t) {
		if strings.HasSuffix(f.path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), f.path, f.text, parser.SkipObjectResolution)
		if err != nil {
			continue // half written
		}
		for _, d := range file.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Name.Name == "init" && fn.Recv == nil {
				t.Errorf("%s has an init function: nothing happens because something was imported", f.path)
			}
		}
	}
}
