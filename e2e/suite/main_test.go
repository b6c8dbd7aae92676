package suite_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
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
	root, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "mistnet-suite-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	for _, step := range [][]string{
		{"go", "-C", "tools", "run", "./image", "-arch", runtime.GOARCH, "-out", tmp},
		{"go", "build", "-buildvcs=false", "-o", filepath.Join(tmp, "mistctl"), "./cmd/mistctl"},
	} {
		cmd := exec.CommandContext(ctx, "nice", append([]string{"-n", "19"}, step...)...)
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%q: %w\n%s", step, err, out)
		}
	}
	archives, err := filepath.Glob(filepath.Join(tmp, "*.tar"))
	if err != nil {
		return err
	}
	if len(archives) == 0 {
		return errors.New("there are no image archives")
	}
	if err := l.LoadImages(ctx, archives...); err != nil {
		return err
	}
	cmd := l.Command(ctx, filepath.Join(tmp, "mistctl"), "install", "--timeout", "5m")
	out, err := cmd.CombinedOutput()
	fmt.Fprintf(os.Stderr, "%s", out)
	return err
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
