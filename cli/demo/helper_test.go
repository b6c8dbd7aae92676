package demo

import (
	"errors"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/mistnet/mistnet/internal/netlab"
)

var builtBin = sync.OnceValues(func() (string, error) {
	abs, err := filepath.Abs("../../bin")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-trimpath", "-o", abs+"/", "./cmd/...")
	cmd.Dir = "../.."
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", errors.New(string(out))
	}
	return abs, nil
})

// testBin builds the programs as make build does, once, and returns their folder.
func testBin(t *testing.T) string {
	t.Helper()
	bin, err := builtBin()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

func podSpec(namespace, name string) netlab.PodSpec {
	return netlab.PodSpec{Namespace: namespace, Name: name, UID: name + "-uid"}
}
