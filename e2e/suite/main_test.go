package suite_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/e2e/lab"
)

// cluster is the one all tests run in, each in namespaces of its own; nil when none was asked for.
var cluster *lab.Lab

// setupTimeout bounds building, starting and installing together, on a machine that has built nothing yet.
const setupTimeout = 40 * time.Minute

func TestMain(m *testing.M) {
	if os.Getenv("MISTNET_E2E") == "" || os.Geteuid() != 0 && os.Getenv("CI") != "true" {
		os.Exit(m.Run()) // every test skips
	}
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "suite:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeout)
	defer cancel()
	defer func() {
		if ownBuild != "" {
			err = errors.Join(err, os.RemoveAll(ownBuild))
		}
	}()
	if name := os.Getenv("MISTNET_E2E_LAB"); name != "" {
		if cluster, err = lab.Open("", name); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, cluster.CloseHandle()) }()
	} else {
		cfg := lab.FromEnv()
		cfg.Progress = os.Stderr
		cluster, err = lab.Start(ctx, cfg)
		if err != nil {
			return 0, err
		}
		defer func() {
			err = errors.Join(err, cluster.Close())
			left, e := lab.Leftovers("", cluster.Name())
			if err = errors.Join(err, e); len(left) > 0 {
				err = errors.Join(err, fmt.Errorf("the lab left behind: %q", left))
			}
		}()
	}
	if os.Getenv("MISTNET_E2E_INSTALLED") == "" {
		if err := install(ctx, cluster); err != nil {
			return 0, fmt.Errorf("install the mesh: %w\n%s", err, state(ctx))
		}
	}
	if code = m.Run(); code != 0 {
		fmt.Fprintln(os.Stderr, state(ctx))
	}
	return code, nil
}

// install loads this tree's images and has this tree's mistctl install them.
func install(ctx context.Context, l *lab.Lab) error {
	dir, err := built()
	if err != nil {
		return err
	}
	if err := loadBuilt(ctx, l); err != nil {
		return err
	}
	cmd := l.Command(ctx, filepath.Join(dir, "mistctl"), "install", "--timeout", "5m")
	out, err := cmd.CombinedOutput()
	fmt.Fprintf(os.Stderr, "%s", out)
	return err
}

// built returns the directory of mistctl and the images' archives, made of this tree once. MISTNET_E2E_BUILT names one that
// is used instead and stays: for people who write tests.
var built = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("MISTNET_E2E_BUILT"); dir != "" {
		return dir, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeout)
	defer cancel()
	root, err := filepath.Abs("../..")
	if err != nil {
		return "", err
	}
	if ownBuild, err = os.MkdirTemp("", "mistnet-suite-"); err != nil {
		return "", err
	}
	for _, step := range [][]string{
		{"go", "-C", "tools", "run", "./image", "-arch", runtime.GOARCH, "-out", ownBuild},
		{"go", "build", "-buildvcs=false", "-o", filepath.Join(ownBuild, "mistctl"), "./cmd/mistctl"},
	} {
		cmd := exec.CommandContext(ctx, "nice", append([]string{"-n", "19"}, step...)...)
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%q: %w\n%s", step, err, out)
		}
	}
	return ownBuild, nil
})

// ownBuild is the directory that built made; "": none.
var ownBuild string

// loadBuilt loads this tree's images.
func loadBuilt(ctx context.Context, l *lab.Lab) error {
	dir, err := built()
	if err != nil {
		return err
	}
	archives, err := filepath.Glob(filepath.Join(dir, "*.tar"))
	if err != nil {
		return err
	}
	if len(archives) == 0 {
		return fmt.Errorf("there are no image archives in %s", dir)
	}
	return l.LoadImages(ctx, archives...)
}

// state is what one asks first when something failed.
func state(ctx context.Context) string {
	out, err := cluster.Kubectl(ctx, "get", "pods", "-A", "-o", "wide")
	for _, what := range [][]string{
		{"get", "events", "-n", "istio-system", "--field-selector=type!=Normal", "--sort-by=.lastTimestamp"},
		{"logs", "-n", "istio-system", "deployment/istiod", "--tail=20"},
		{"logs", "-n", "istio-system", "-l", "k8s-app=istio-cni-node", "--tail=20", "--prefix"},
		{"logs", "-n", "istio-system", "-l", "app=ztunnel", "--tail=20", "--prefix"},
	} {
		more, e := cluster.Kubectl(ctx, what...)
		out, err = out+"\n"+more, errors.Join(err, e)
	}
	if err != nil {
		out += "\n" + err.Error()
	}
	return out
}
