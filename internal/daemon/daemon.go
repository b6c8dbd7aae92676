// Package daemon is what every long-running program of ours has in common: flags with environment fall-backs, a
// logger, signals turned into cancellation, HTTP pages for administration, metrics and readiness, and the accept loop.
//
// It hides how a process is put together; of meshes it knows nothing but the ports where their programs tell of themselves.
package daemon

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Flags is the configuration of a program: it declares its flags, and checks them once parsed.
type Flags interface {
	// Register declares the flags on fs, with their defaults.
	Register(fs *FlagSet)
	// Validate reports every fault, each naming the flag and how to mend it.
	Validate() error
}

// Env is what Main gives a program to live in.
type Env struct {
	Name     string
	Log      *zap.Logger
	Out      io.Writer // where Log writes, for lines that have a format of their own; one Write is one line. Of Main's, none waits
	Level    zap.AtomicLevel
	Registry *prometheus.Registry
	Ready    *Readiness

	// Hurry ends when the program was told a second time to stop: what it still waits for is not worth the wait.
	Hurry context.Context
}

// NewEnv returns an environment that logs to out, for Main and for tests that run a program in-process. Lines of the log do not
// wait for others in a Spool, which tells there of those that are lost; to anything else, every line is written by who has it.
func NewEnv(name string, out io.Writer, o LogOptions) (*Env, error) {
	spool, spooled := out.(*Spool)
	prompt := io.Writer(promptLines{spool})
	if !spooled {
		out = zapcore.Lock(zapcore.AddSync(out))
		prompt = out
	}
	log, level, err := NewLogger(prompt, o)
	if err != nil {
		return nil, err
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collectors.NewGoCollector())
	if spooled {
		reg.MustRegister(spool.collector())
		spool.tell = func(lost uint64) {
			log.Warn("lines are lost that standard output did not take", zap.Uint64("lines", lost))
		}
	}
	return &Env{Name: name, Log: log, Out: out, Level: level, Registry: reg, Ready: NewReadiness(), Hurry: context.Background()}, nil
}

// lastLines is how long a program that ends waits for its output to take the last lines.
const lastLines = 2 * time.Second

// Main is the body of every main function: it parses os.Args and the environment, runs the program until it ends or
// SIGINT or SIGTERM arrives, and exits: 0 after a clean stop, 1 on failure, 2 on wrong usage. A second signal ends
// Env.Hurry, a third the program.
func Main(name string, cfg Flags, run func(context.Context, *Env) error) {
	os.Exit(start(name, os.Args[1:], os.Stderr, cfg, run))
}

func start(name string, args []string, errOut io.Writer, cfg Flags, run func(context.Context, *Env) error) int {
	fs := NewFlagSet(name)
	var logs LogOptions
	fs.StringVar(&logs.Level, "log-level", "info", "LOG_LEVEL", "debug, info, warn or error; or name=level,…")
	fs.StringVar(&logs.Format, "log-format", "plain", "LOG_FORMAT", "plain or json")
	version := fs.Bool("version", false, "print the version and exit")
	cfg.Register(fs)
	if err := fs.Parse(args, os.LookupEnv); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fs.Usage(errOut)
			return 0
		}
		fmt.Fprintf(errOut, "%s: %v\nrun %s -help for the list of flags\n", name, err, name)
		return 2
	}
	if *version {
		fmt.Fprintln(errOut, name, Version())
		return 0
	}
	if err := cfg.Validate(); err != nil {
		fmt.Fprintf(errOut, "%s: %v\n", name, err)
		return 2
	}
	out := NewSpool(os.Stdout)
	defer out.Flush(lastLines)
	env, err := NewEnv(name, out, logs)
	if err != nil {
		fmt.Fprintf(errOut, "%s: %v\n", name, err)
		return 2
	}
	ctx, stop := obey(env)
	defer stop()
	err = run(ctx, env)
	if err != nil && !(ctx.Err() != nil && errors.Is(err, context.Canceled)) {
		env.Log.Error("stopped", zap.Error(err))
		fmt.Fprintf(errOut, "%s: %v\n", name, err)
		return 1
	}
	env.Log.Info("stopped")
	return 0
}

// version is set by the linker (-X) in released programs and images.
var version string

// Version is what the linker was told, or the module version the binary was built from, or "devel".
func Version() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "devel"
}
