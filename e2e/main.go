// Command e2e shows the mesh at work on a real Kubernetes cluster that it starts on this machine, and counts:
//
//	go run ./e2e [-nodes 2] [-proxy-mode nftables] [-dual-stack] [-run REGEXP] [-lab NAME [-installed]]
//
// It prints one line per test, everything about those that failed, and at the end "e2e: N passed, N failed". It needs root.
// The first run builds Kubernetes, which takes about ten minutes of two cores. Where time is short, as in CI, -build-within
// bounds that: when it takes longer, nothing is shown, and the exit status is 3.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mistnet/mistnet/e2e/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
	}
	switch {
	case errors.Is(err, errNoTime):
		os.Exit(3)
	case err != nil:
		os.Exit(1)
	}
}

var errNoTime = errors.New("building Kubernetes took longer than -build-within, so nothing was shown; what was built is kept")

func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("e2e", flag.ContinueOnError)
	nodes := flags.Int("nodes", 2, "how many nodes")
	proxy := flags.String("proxy-mode", "nftables", "kube-proxy's mode, nftables or iptables")
	dual := flags.Bool("dual-stack", false, "IPv6 besides IPv4")
	only := flags.String("run", "", "only tests that match")
	name := flags.String("lab", "", "use this lab, which runs and stays, instead of a new one")
	installed := flags.Bool("installed", false, "the mesh is installed there")
	within := flags.Duration("build-within", 0, "give up when building Kubernetes takes longer; 0: it may take what it takes")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	bins, err := build(ctx, *within, out)
	if err != nil {
		return err
	}
	packages := []string{"./e2e/suite"}
	if *name == "" {
		// The ground they stand on, and istiod against nothing but an API server: `make test` has none, and skips those.
		packages = append([]string{"./istiod/kube", "./e2e/lab"}, packages...)
	}
	// One after the other: each has a cluster of its own.
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json", "-count=1", "-p=1", "-timeout=80m", "-run=" + *only}, packages...)...)
	cmd.Env = append(os.Environ(), "MISTNET_E2E=1", "MISTNET_E2E_NODES="+strconv.Itoa(*nodes), "MISTNET_E2E_PROXY="+*proxy, "MISTNET_E2E_LAB="+*name,
		"KUBE_APISERVER_BIN="+filepath.Join(bins.Kube, "kube-apiserver"), "ETCD_BIN="+filepath.Join(bins.Etcd, "etcd"))
	for variable, set := range map[string]bool{"MISTNET_E2E_DUAL": *dual, "MISTNET_E2E_INSTALLED": *installed} {
		if set {
			cmd.Env = append(cmd.Env, variable+"=1")
		}
	}
	// In a group of their own, the tests end together and when they are told to, and what they leave is taken down.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.Stderr = os.Stderr
	events, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	var c count
	err = c.read(events, out)
	if e := cmd.Wait(); err == nil {
		err = e
	}
	if ctx.Err() != nil {
		fmt.Fprintln(out, "e2e: interrupted, taking down what the tests have started")
		return errors.Join(err, lab.Sweep(context.WithoutCancel(ctx), ""))
	}
	fmt.Fprintf(out, "e2e: %d passed, %d failed\n", c.passed, c.failed)
	if err == nil && c.passed == 0 {
		err = fmt.Errorf("no test ran")
	}
	return err
}

func build(ctx context.Context, within time.Duration, out io.Writer) (lab.Binaries, error) {
	if within > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, within, errNoTime)
		defer cancel()
	}
	bins, err := lab.Build(ctx, "", out)
	if err != nil && errors.Is(context.Cause(ctx), errNoTime) {
		return bins, errNoTime
	}
	return bins, err
}

// count is of tests that have none below them: those with subtests would count twice.
type count struct{ passed, failed int }

// read follows the events of go test -json (go doc test2json).
func (c *count) read(events io.Reader, out io.Writer) error {
	type test struct{ Package, Test string }
	said, parents := map[test]*strings.Builder{}, map[test]bool{}
	lines := bufio.NewReader(events)
	for {
		line, err := lines.ReadBytes('\n')
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		var e struct {
			Action, Output string
			Elapsed        float64
			test
		}
		if json.Unmarshal(line, &e) != nil {
			fmt.Fprintf(out, "%s", line) // not an event: a build that failed
			continue
		}
		switch e.Action {
		case "run":
			if i := strings.LastIndexByte(e.Test, '/'); i > 0 {
				parents[test{e.Package, e.Test[:i]}] = true
			}
		case "output", "build-output":
			if said[e.test] == nil {
				said[e.test] = &strings.Builder{}
			}
			said[e.test].WriteString(e.Output)
		case "pass", "fail", "skip":
			failed := e.Action == "fail"
			if failed && said[e.test] != nil {
				fmt.Fprint(out, said[e.test])
			}
			if e.Test == "" || parents[e.test] && !failed {
				continue
			}
			if failed {
				c.failed++
			} else if e.Action == "pass" {
				c.passed++
			}
			fmt.Fprintf(out, "%s %s (%.1fs)\n", e.Action, strings.ReplaceAll(e.Test, "_", " "), e.Elapsed)
		}
	}
}
