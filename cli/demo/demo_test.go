package demo_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/mistnet/mistnet/cli/demo"
	"github.com/mistnet/mistnet/internal/meshtest"
)

// TestDemo runs the real programs end to end: every check of the demo must hold, here under the race detector too.
func TestDemo(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("CI must run as root")
		}
		t.Skip("needs root: it makes network namespaces")
	}
	bin := t.TempDir()
	args := []string{"build", "-o", bin + string(filepath.Separator)}
	if meshtest.Race {
		args = append(args, "-race")
	}
	for _, program := range []string{"istiod", "ztunnel", "waypoint", "cni-agent", "cni-plugin", "demo-app"} {
		args = append(args, "github.com/mistnet/mistnet/cmd/"+program)
	}
	if out, err := exec.CommandContext(t.Context(), "go", args...).CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	var out bytes.Buffer
	err := demo.Run(t.Context(), demo.Options{Bin: bin, Out: &out})
	t.Log(out.String())
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`\ndemo: [1-9][0-9]* passed, 0 failed\n$`).MatchString(out.String()) {
		t.Error("the demo's last line is not its result")
	}
}
