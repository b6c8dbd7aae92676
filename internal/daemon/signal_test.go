package daemon

import (
	"bytes"
	"context"
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
