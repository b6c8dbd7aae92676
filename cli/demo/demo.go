// Package demo shows an ambient mesh at work on one Linux machine, without Kubernetes: two nodes, pods in and out of
// the mesh, and one checked line for each thing the mesh promises.
//
// Everything in it is the real program of the same name: istiod, the CNI plugin and agent, ztunnel. Only the nodes are
// network namespaces.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// Options say how to run the demo.
type Options struct {
	Bin  string // the folder of the programs
	Keep bool   // leave everything up until ctx is done
	Out  io.Writer
}

// Run runs the demo and returns an error when something it shows does not hold.
func Run(ctx context.Context, o Options) error {
	c := &checks{out: o.Out}
	start := time.Now()
	fmt.Fprintln(o.Out, "Mistnet demo: two nodes, one mesh, no Kubernetes")
	w, err := newWorld(ctx, o.Bin)
	if err != nil {
		if failed, ok := errors.AsType[*setupError](err); ok {
			fmt.Fprintf(o.Out, "\n%s", failed.tails)
		}
		return fmt.Errorf("set up the demo: %w", err)
	}
	defer w.stop()
	fmt.Fprintf(o.Out, "mesh up in %s: istiod, and on each of 2 nodes a CNI agent and a ztunnel\n", since(start))
	for _, act := range acts {
		fmt.Fprintf(o.Out, "\n%s\n", act.title)
		act.play(ctx, w, c)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	if o.Keep {
		w.explain(o.Out)
		<-ctx.Done()
	}
	fmt.Fprintln(o.Out, "\nafter teardown")
	c.check("no namespace, rule, process or file is left", func() (string, error) { return "", w.stop() })
	fmt.Fprintf(o.Out, "\ntook %s\ndemo: %d passed, %d failed\n", since(start), c.passed, c.failed)
	if c.failed > 0 {
		w.printLogs(o.Out)
		return fmt.Errorf("%d of %d checks failed", c.failed, c.passed+c.failed)
	}
	return nil
}

func since(t time.Time) string { return time.Since(t).Round(time.Millisecond).String() }

// checks counts what held and what did not.
type checks struct {
	out            io.Writer
	passed, failed int
}

// check runs one check and prints its line. f returns a detail worth showing.
func (c *checks) check(what string, f func() (string, error)) {
	detail, err := f()
	if err != nil {
		c.failed++
		fmt.Fprintf(c.out, "  FAIL  %s: %v\n", what, err)
		return
	}
	c.passed++
	if detail != "" {
		detail = "  [" + detail + "]"
	}
	fmt.Fprintf(c.out, "  ok    %s%s\n", what, detail)
}

// eventually tries f until it succeeds, and returns how long that took.
func eventually(ctx context.Context, limit time.Duration, f func() error) (time.Duration, error) {
	start := time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	var last error // of a try that was not cut short
	for {
		err := f()
		if err == nil {
			return time.Since(start), nil
		}
		if ctx.Err() == nil || last == nil {
			last = err
		}
		if time.Since(start) > limit {
			return limit, fmt.Errorf("not within %s: %w", limit, last)
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("%w: %w", ctx.Err(), last)
		case <-tick.C:
		}
	}
}

func millis(d time.Duration) string {
	if d < time.Millisecond {
		return "under 1 ms"
	}
	return fmt.Sprintf("%d ms", d.Milliseconds())
}
