package archtest_test

import (
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/mistnet/mistnet"

// listed is what go list says of a package.
type listed struct {
	ImportPath, Dir, Name, Doc         string
	GoFiles, TestGoFiles, XTestGoFiles []string
	Imports, TestImports, XTestImports []string
	Deps                               []string
}

// path is the package's place in the tree; "." for its root.
func (p *listed) path() string { return inTree(p.ImportPath) }

// inTree is an import path from the root of our tree, or "" for somebody else's.
func inTree(importPath string) string {
	if importPath == module {
		return "."
	}
	rest, ok := strings.CutPrefix(importPath, module+"/")
	if !ok {
		return ""
	}
	return rest
}

// packages are those of the module. Others may be half written at the moment: what cannot be loaded is not judged.
var packages = sync.OnceValues(func() ([]*listed, error) {
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,Name,Doc,GoFiles,TestGoFiles,XTestGoFiles,Imports,TestImports,XTestImports,Deps", "./...")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		if e, ok := errors.AsType[*exec.ExitError](err); ok {
			err = errors.New(string(e.Stderr))
		}
		return nil, err
	}
	var ps []*listed
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := d.Decode(&p); err == io.EOF {
			return ps, nil
		} else if err != nil {
			return nil, err
		}
		ps = append(ps, &p)
	}
})

// root is the module's directory, seen from this one.
var root = filepath.Join("..", "..")

func load(t *testing.T) []*listed {
	t.Helper()
	ps, err := packages()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	if !slices.ContainsFunc(ps, func(p *listed) bool { return p.path() == "internal/mesh" }) {
		t.Fatal("go list does not know internal/mesh: the test is blind")
	}
	return ps
}

// under reports whether path is one of the trees or inside one.
func under(path string, trees ...string) bool {
	return slices.ContainsFunc(trees, func(tree string) bool { return path == tree || strings.HasPrefix(path, tree+"/") })
}

// place is where a tree of packages stands.
type place struct {
	tree  string
	layer int
	pure  bool
}

// The layers. A package imports only what stands on a lower one, or belongs to the same program.
const (
	nouns     = 10 // the vocabulary
	verdicts  = 15 // decisions and translations over nouns alone
	mechanics = 20 // I/O in which no policy is made
	joints    = 25 // mechanics put together, for more than one program
	decisions = 30 // what a program decides
	programs  = 40
	tops      = 50 // what puts programs together
	mains     = 60 // ten lines around one of the above
)

// places is the tree of docs/architecture.md; the longest entry that holds a package counts.
var places = []place{
	{"internal/mesh", nouns, true},
	{"api", nouns, false},
	{"internal/slab", nouns, false},
	{"internal/memlimit", nouns, false},
	{"internal/authz", verdicts, true},
	{"internal/lb", verdicts, true},
	{"internal/wds", verdicts, true},
	{"internal/accesslog", verdicts, true},
	{"internal/xds", mechanics, false},
	{"internal/identity", mechanics, false},
	{"internal/hbone", mechanics, false},
	{"internal/relay", mechanics, false},
	{"internal/proxyproto", mechanics, false},
	{"internal/linux", mechanics, false},
	{"internal/zds", mechanics, false},
	{"internal/daemon", mechanics, false},
	{"internal/yamldir", mechanics, false},
	{"internal/controlplane", joints, false},
	{"ztunnel/nexthop", decisions, true},
	{"ztunnel/dns/answer", decisions, true},
	{"waypoint/route", decisions, true},
	{"waypoint/http1", programs, false}, // engines, and the program's own
	{"waypoint/http2", programs, false},
	{"waypoint/parking", programs, false},
	{"waypoint/peer", programs, false},
	{"waypoint/grpcweb", programs, false},
	{"waypoint/report", programs, false},
	{"waypoint/upstream", programs, false},
	{"istiod/translate", decisions, true},
	{"istiod/index", decisions, true},
	{"istiod/gateway", decisions, true},
	{"cni/rules", decisions, true},
	{"cni/rules/apply", programs, false},
	{"ztunnel", programs, false},
	{"waypoint", programs, false},
	{"istiod", programs, false},
	{"cni", programs, false},
	{"cmd", mains, false},
	{"cli", tops, false},
	{"e2e", tops, false},
	{"bench", tops, false},
	{"docs", tops, false},       // tests only
	{"manifests", nouns, false}, // data
	{"tools", tops, false},
	{"cli/fakeapi", tops, false},           // tests only
	{"internal/meshtest", programs, false}, // tests only; see TestWhatIsForTestsStaysThere
	{"internal/netlab", programs, false},
	{"internal/archtest", programs, false},
}

func placeOf(path string) (place, bool) {
	var found place
	for _, p := range places {
		if under(path, p.tree) && len(p.tree) > len(found.tree) {
			found = p
		}
	}
	return found, found.tree != ""
}

// program is the first part of the path of a package on the layers of programs: packages of one program may know each
// other, whatever they decide.
func program(path string) string {
	first, _, _ := strings.Cut(path, "/")
	if first == "internal" || first == "api" {
		return ""
	}
	return first
}

func TestImportsPointDownward(t *testing.T) {
	t.Parallel()
	for _, p := range load(t) {
		from, ok := placeOf(p.path())
		if !ok {
			t.Errorf("%s stands nowhere: add it to the table in %s and to docs/architecture.md", p.path(), "internal/archtest")
			continue
		}
		for _, imp := range p.Imports {
			if why := forbidden(from, p.path(), inTree(imp)); why != "" {
				t.Errorf("%s imports %s: %s", p.path(), inTree(imp), why)
			}
		}
	}
}

// forbidden says why the package at path must not import the one at target, or "".
func forbidden(from place, path, target string) string {
	to, known := placeOf(target)
	switch {
	case target == "" || !known, to.tree == from.tree:
		return ""
	case under(target, "internal/archtest"), under(target, "internal/meshtest", "internal/netlab"):
		return "" // TestWhatIsForTestsStaysThere
	case under(path, "internal/meshtest", "internal/netlab"):
		if to.layer >= programs {
			return "what serves the tests of all programs belongs to none of them"
		}
		return ""
	case from.pure && !to.pure && !under(target, "api"):
		return "pure code imports only pure code, or its tests need a machine"
	case program(path) != "" && program(path) == program(target):
		if to.layer > from.layer && from.pure {
			return "a decision does not know the program that carries it out"
		}
		return ""
	case to.layer == programs && from.layer == programs:
		return "programs meet on the wire only, so that each can be replaced by Istio's"
	case to.layer >= from.layer:
		return "imports point downward: what both need belongs a layer below"
	case to.layer == decisions && from.layer == programs:
		return "a program's decisions are its own"
	}
	return ""
}

func TestForbiddenTellsEdgesApart(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		from, to string
		bad      bool
	}{
		{"ztunnel", "ztunnel/nexthop", false},
		{"ztunnel", "internal/hbone", false},
		{"cmd/ztunnel", "ztunnel", false},
		{"cmd/mistctl", "cli", false},
		{"cli", "cmd/mistctl", true},
		{"istiod/index", "istiod/translate", false},
		{"cni/rules/apply", "cni/rules", false},
		{"internal/wds", "api/workload", false},
		{"ztunnel", "istiod/ca", true},
		{"cni", "ztunnel", true},
		{"ztunnel", "waypoint/route", true},
		{"ztunnel/nexthop", "ztunnel", true},
		{"ztunnel/nexthop", "internal/hbone", true},
		{"cni/rules", "cni/rules/apply", true},
		{"internal/hbone", "internal/relay", true},
		{"internal/controlplane", "internal/xds", false},
		{"internal/xds", "internal/controlplane", true},
		{"internal/hbone", "ztunnel", true},
		{"internal/authz", "internal/lb", true},
		{"internal/mesh", "internal/wds", true},
		{"internal/netlab", "ztunnel", true},
		{"ztunnel", "cli/demo", true},
	} {
		from, _ := placeOf(c.from)
		if why := forbidden(from, c.from, c.to); (why != "") != c.bad {
			t.Errorf("%s imports %s: forbidden is %q, want forbidden: %v", c.from, c.to, why, c.bad)
		}
	}
}

// TestWhatIsForTestsStaysThere: a program never links test helpers.
func TestWhatIsForTestsStaysThere(t *testing.T) {
	t.Parallel()
	users := map[string][]string{
		"internal/archtest": nil,
		"cli/fakeapi":       nil,
		"internal/meshtest": {"internal/netlab", "bench", "e2e"},
		"internal/netlab":   {"bench", "e2e", "cli", "cmd/mistctl"},
	}
	for _, p := range load(t) {
		for _, imp := range p.Imports {
			for helper, by := range users {
				if under(inTree(imp), helper) && !under(p.path(), append(by, helper)...) {
					t.Errorf("%s imports %s outside its tests: programs do not carry test helpers", p.path(), helper)
				}
			}
		}
	}
}

// only is a module that a few packages hide from the rest.
type only struct {
	imports string // and what is under it
	by      []string
	why     string
	tests   bool // tests may use it anywhere
}

var onlys = []only{
	{"golang.org/x/net/http2", []string{"internal/hbone", "waypoint/http2", "bench"}, "HTTP/2 is hidden in our engines: x/net's changes with Go", true},
	{"github.com/quic-go/quic-go", []string{"internal/hbone", "waypoint", "bench"}, "QUIC carries tunnels in hbone and HTTP/3 in waypoint", true},
	{"github.com/vishvananda/netlink", []string{"internal/linux", "internal/netlab", "cni/rules"}, "the kernel is touched in three places", true},
	{"github.com/vishvananda/netns", []string{"internal/linux", "internal/netlab", "cni/rules"}, "the kernel is touched in three places", true},
	{"github.com/coreos/go-iptables", []string{"cni/rules"}, "rules are data until cni/rules applies them", true},
	{"golang.org/x/sys/unix", []string{"internal/linux", "internal/netlab", "cni/rules"}, "raw system calls are in three places", true},
	{"unsafe", []string{"internal/linux", "api"}, "unsafe code is read with the kernel's headers beside it", false},
	{"k8s.io/client-go", []string{"istiod/kube", "cni", "cli", "e2e"}, "informers are paid for in memory", true},
	{"k8s.io/api", []string{"istiod", "cni", "cli", "internal/yamldir", "e2e", "manifests"}, "the data plane knows nouns, not Kubernetes", true},
	{"istio.io", []string{"istiod", "cni", "cli", "internal/yamldir", "e2e", "manifests"}, "the data plane knows nouns, not Istio's objects", true},
	{"github.com/spf13/cobra", []string{"cli", "cmd/mistctl"}, "daemons take flags through internal/daemon", false},
}

func TestOnlyWhoMayImport(t *testing.T) {
	t.Parallel()
	for _, p := range load(t) {
		for _, o := range onlys {
			if under(p.path(), o.by...) {
				continue
			}
			imports := p.Imports
			if !o.tests {
				imports = slices.Concat(imports, p.TestImports, p.XTestImports)
			}
			for _, imp := range imports {
				if under(imp, o.imports) {
					t.Errorf("%s imports %s, which only %v may: %s", p.path(), imp, o.by, o.why)
				}
			}
		}
	}
}

// TestNeverLinked judges everything a program is made of, not only its own imports.
func TestNeverLinked(t *testing.T) {
	t.Parallel()
	bans := []struct {
		programs []string
		never    []string
		why      string
	}{
		{
			[]string{"ztunnel", "cmd/ztunnel", "waypoint", "cmd/waypoint"},
			[]string{"k8s.io/client-go", "k8s.io/api", "istio.io/client-go"},
			"its memory is paid on every node, and it learns all it must know over xDS",
		},
		{
			[]string{"cni/plugin", "cmd/cni-plugin"},
			[]string{"k8s.io/client-go", "k8s.io/api", "istio.io/client-go", "google.golang.org/grpc"},
			"every pod waits for it to start",
		},
		{
			[]string{"internal/mesh", "internal/authz", "internal/lb", "ztunnel/nexthop"},
			[]string{"google.golang.org/grpc", "go.uber.org/zap", "github.com/prometheus/client_golang"},
			"nouns and decisions are plain Go",
		},
	}
	for _, p := range load(t) {
		for _, b := range bans {
			if !slices.Contains(b.programs, p.path()) {
				continue
			}
			for _, dep := range p.Deps {
				if under(dep, b.never...) {
					t.Errorf("%s links %s: %s", p.path(), dep, b.why)
				}
			}
		}
	}
}

func TestPureCodeImportsNothingThatActs(t *testing.T) {
	t.Parallel()
	bans := []struct{ tree, why string }{
		{"context", "nothing in it waits"},
		{"net", "it neither dials nor listens; addresses are net/netip's"},
		{"os", "it sees no machine"},
		{"io", "values go in and come out whole"},
		{"sync", "it shares nothing that changes"},
		{"syscall", "it sees no machine"},
		{"log", "it returns why; the caller logs"},
		{"crypto/rand", "randomness is handed to it"},
		{"go.uber.org/zap", "it returns why; the caller logs"},
		{"google.golang.org/grpc", "it speaks to nobody"},
	}
	n := 0
	for _, p := range load(t) {
		if at, _ := placeOf(p.path()); !at.pure {
			continue
		}
		n++
		for _, imp := range p.Imports {
			for _, b := range bans {
				if under(imp, b.tree) && imp != "net/netip" {
					t.Errorf("%s is pure and imports %s: %s", p.path(), imp, b.why)
				}
			}
		}
	}
	if n < 5 {
		t.Errorf("only %d packages are pure: the test is blind", n)
	}
}

func TestPackageNames(t *testing.T) {
	t.Parallel()
	banned := []string{
		"util", "utils", "common", "helper", "helpers", "base", "types", "model", "models", "manager", "constants", "misc", "shared", "lib",
	}
	for _, p := range load(t) {
		if slices.Contains(banned, cmp.Or(p.Name, filepath.Base(p.ImportPath))) || slices.Contains(banned, filepath.Base(p.ImportPath)) {
			t.Errorf("%s: a package is named for what it gives", p.path())
		}
		if p.Name != "" && p.Name != "main" && p.path() != "." && p.Name != strings.ReplaceAll(filepath.Base(p.ImportPath), "-", "") {
			t.Errorf("%s calls itself %s: folder and package have one name", p.path(), p.Name)
		}
	}
}
