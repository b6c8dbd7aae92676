package app_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/e2e/app"
)

// start runs the server on free ports and returns where it listens.
func start(t *testing.T) (web, echo string) {
	t.Helper()
	r, w := io.Pipe()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- app.Main(ctx, []string{"serve", "127.0.0.1:0", "127.0.0.1:0"}, w) }()
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("serve ended with %v", err)
		}
	})
	var name string
	if _, err := fmt.Sscanf(line, "%s serves HTTP on %s and echoes on %s", &name, &web, &echo); err != nil {
		t.Fatalf("serve says %q: %v", line, err)
	}
	return web, echo
}

func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var b strings.Builder
	err := app.Main(t.Context(), args, &b)
	return b.String(), err
}

func TestGetPrintsOneLinePerRequest(t *testing.T) {
	t.Parallel()
	web, _ := start(t)
	out, err := run(t, "get", "http://"+web+"/", "3")
	if err != nil || strings.Count(out, "200 ") != 3 || strings.Count(out, "sees=127.0.0.1") != 3 {
		t.Errorf("get = %q, %v", out, err)
	}
	if out, err := run(t, "get", "http://127.0.0.1:1/"); err == nil {
		t.Errorf("get from a closed port = %q, want an error", out)
	}
}

func TestPostTurnsProbes(t *testing.T) {
	t.Parallel()
	web, _ := start(t)
	for _, c := range []struct{ set, want string }{{"", "200"}, {"false", "503"}, {"true", "200"}} {
		if c.set != "" {
			if out, err := run(t, "post", "http://"+web+"/readyz", c.set); err != nil {
				t.Fatalf("post = %q, %v", out, err)
			}
		}
		if out, err := run(t, "get", "http://"+web+"/readyz"); err != nil || !strings.HasPrefix(out, c.want+" ") {
			t.Errorf("after %q the probe is %q, %v; want %s", c.set, out, err, c.want)
		}
		if out, _ := run(t, "get", "http://"+web+"/healthz"); !strings.HasPrefix(out, "200 ") {
			t.Errorf("after %q the other probe is %q", c.set, out)
		}
	}
}

// follow runs a command until a line satisfies stop, and returns all lines up to its end.
func follow(t *testing.T, stop func(line string) bool, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- app.Main(ctx, args, w); w.Close() }()
	var all strings.Builder
	for lines := bufio.NewScanner(r); lines.Scan(); {
		all.WriteString(lines.Text() + "\n")
		if stop(lines.Text()) {
			cancel()
		}
	}
	return all.String(), <-done
}

func TestHoldTicksOverOneConnection(t *testing.T) {
	t.Parallel()
	_, echo := start(t)
	out, err := follow(t, func(l string) bool { return l == "tick 5" }, "hold", echo, "1ms")
	if err != nil || strings.Count(out, "sees=127.0.0.1") != 1 || !strings.Contains(out, "tick 1\ntick 2\n") {
		t.Errorf("hold = %q, %v", out, err)
	}
}

func TestLoadCountsWhatFails(t *testing.T) {
	t.Parallel()
	web, _ := start(t)
	for path, want := range map[string]string{"/": "failed 0\n", "/healthz": "failed 0\n"} {
		out, err := follow(t, func(l string) bool { return strings.HasPrefix(l, "sent ") }, "load", "http://"+web+path, "1000")
		if err != nil || !strings.HasSuffix(out, want) {
			t.Errorf("load of %s = %q, %v", path, out, err)
		}
	}
	out, err := follow(t, func(l string) bool { return strings.Contains(l, "refused") }, "load", "http://127.0.0.1:1/", "100")
	if err != nil || strings.HasSuffix(out, "failed 0\n") {
		t.Errorf("load of a closed port = %q, %v", out, err)
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"what"}, {"get"}, {"load", "http://x/", "0"}, {"hold", "x", "never"}, {"wait", "long"}} {
		if _, err := run(t, args...); err == nil {
			t.Errorf("%q: want an error", args)
		}
	}
}

func TestUDPIsEchoed(t *testing.T) {
	t.Parallel()
	_, echo := start(t)
	if out, err := run(t, "udp", echo, "hello"); err != nil || !strings.Contains(out, "sees=127.0.0.1 got=hello") {
		t.Errorf("udp = %q, %v", out, err)
	}
}

func TestExitIsAnError(t *testing.T) {
	t.Parallel()
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- app.Main(t.Context(), []string{"serve", "127.0.0.1:0", "127.0.0.1:0"}, w) }()
	line, err := bufio.NewReader(r).ReadString('\n')
	var name, web string
	if _, e := fmt.Sscanf(line, "%s serves HTTP on %s ", &name, &web); err != nil || e != nil {
		t.Fatal(line, err, e)
	}
	_, _ = run(t, "post", "http://"+web+"/exit", "")
	if err := <-done; err == nil {
		t.Error("serve that was told to fail ended well")
	}
}
