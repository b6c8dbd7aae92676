package demoapp_test

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/cli/demoapp"
)

// start runs a server and returns its address and what stops it.
func start(t *testing.T) (string, func()) {
	t.Helper()
	return startAs(t, "serve")
}

func startAs(t *testing.T, command string) (string, func()) {
	t.Helper()
	r, w := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- demoapp.Main(ctx, []string{command, "web", "127.0.0.1:0"}, w) }()
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	stop := func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve = %v, want nil", err)
		}
	}
	return strings.TrimSpace(strings.TrimPrefix(line, "listening on ")), stop
}

func TestCallPrintsGreetingAndEcho(t *testing.T) {
	addr, stop := start(t)
	defer stop()
	var out bytes.Buffer
	if err := demoapp.Main(t.Context(), []string{"call", addr, "hello there"}, &out); err != nil {
		t.Fatal(err)
	}
	if want := "web sees 127.0.0.1\nhello there\n"; out.String() != want {
		t.Errorf("call printed %q, want %q", out.String(), want)
	}
}

func TestHoldTellsWhenItsConnectionEnds(t *testing.T) {
	addr, stop := start(t)
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := demoapp.Main(t.Context(), []string{"hold", addr, "1ms"}, w)
		w.Close()
		done <- err
	}()
	lines := bufio.NewScanner(r)
	for _, want := range []string{"web sees 127.0.0.1", "tick 1", "tick 2"} {
		if !lines.Scan() || lines.Text() != want {
			t.Fatalf("hold printed %q, want %q", lines.Text(), want)
		}
	}
	go stop()
	last := ""
	for lines.Scan() {
		last = lines.Text()
	}
	if !strings.HasPrefix(last, "closed:") {
		t.Errorf("hold ended with %q, want closed: and a reason", last)
	}
	if err := <-done; err != nil {
		t.Errorf("hold = %v, want nil", err)
	}
}

func TestWrongUsageSaysHow(t *testing.T) {
	if err := demoapp.Main(t.Context(), []string{"cal"}, io.Discard); err == nil || !strings.Contains(err.Error(), "usage:") {
		t.Errorf("error = %v, want the usage", err)
	}
}

func TestGetCountsAnswers(t *testing.T) {
	addr, stop := startAs(t, "web")
	defer stop()
	for _, tt := range []struct{ path, want string }{
		{"/", "40 200 web\n"},
		{"/flaky", "20 200 web\n20 503 web\n"},
		{"/healthz", "40 200 web\n"},
		{"/sick", "40 200 web\n"},
		{"/healthz", "40 503 web\n"},
		{"/well", "40 200 web\n"},
		{"/healthz", "40 200 web\n"},
	} {
		var out bytes.Buffer
		if err := demoapp.Main(t.Context(), []string{"get", "http://" + addr + tt.path, "40", "4", "x-user: me"}, &out); err != nil {
			t.Fatal(err)
		}
		got, slowest, found := strings.Cut(out.String(), "slowest ")
		if got != tt.want || !found {
			t.Errorf("get %s printed %q, want %q and the slowest", tt.path, out.String(), tt.want)
		}
		if _, err := time.ParseDuration(strings.TrimSpace(slowest)); err != nil {
			t.Error(err)
		}
	}
}
