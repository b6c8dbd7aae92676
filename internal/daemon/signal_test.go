package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
)

// TestSignals sends this process the signals it would die of if nobody cared for them.
func TestSignals(t *testing.T) {
	var out bytes.Buffer
	env, err := NewEnv("prog", &out, LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := obey(env)
	defer stop()
	for _, step := range []struct {
		signal syscall.Signal
		ends   context.Context
		not    context.Context
	}{{syscall.SIGTERM, ctx, env.Hurry}, {syscall.SIGTERM, env.Hurry, nil}} {
		if err := syscall.Kill(syscall.Getpid(), step.signal); err != nil {
			t.Fatal(err)
		}
		<-step.ends.Done()
		if step.not != nil && step.not.Err() != nil {
			t.Error("one signal was taken for two")
		}
	}
	if got := out.String(); !strings.Contains(got, "stopping at once") {
		t.Errorf("log is %q", got)
	}
}

// noFlags is a configuration that has none.
type noFlags struct{}

func (noFlags) Register(*FlagSet) {}
func (noFlags) Validate() error   { return nil }

// TestLastLinesAreWritten, of a program that is told to stop and of one that fails, also those nobody waited for.
func TestLastLinesAreWritten(t *testing.T) {
	for name, c := range map[string]struct {
		run  func(context.Context) error
		code int
		last string
	}{
		"SIGTERM": {func(ctx context.Context) error {
			if err := syscall.Kill(syscall.Getpid(), syscall.SIGTERM); err != nil {
				return err
			}
			<-ctx.Done()
			return ctx.Err()
		}, 0, "stopped\n"},
		"failure": {func(context.Context) error { return errors.New("it broke") }, 1, "stopped\terror=\"it broke\"\n"},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		read := make(chan string)
		go func() {
			all, _ := io.ReadAll(r)
			read <- string(all)
		}()
		stdout := os.Stdout
		os.Stdout = w
		const lines = 3000
		code := start("prog", nil, io.Discard, noFlags{}, func(ctx context.Context, env *Env) error {
			err := c.run(ctx)
			for i := range lines {
				fmt.Fprintf(env.Out, "line %d\n", i)
			}
			return err
		})
		os.Stdout = stdout
		w.Close()
		got := <-read
		if n := strings.Count(got, "line "); code != c.code || n != lines || !strings.HasSuffix(got, c.last) {
			t.Errorf("%s: exit %d after %d lines, the last %q; want %d after %d, and %q", name, code, n, got[max(0, len(got)-80):], c.code, lines, c.last)
		}
	}
}
