package load_test

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/bench/load"
)

const procStat = `cpu  100 5 50 1000 20 3 7 40 9 0
cpu0 50 5 25 500 10 3 7 20 9 0
cpu1 50 0 25 500 10 0 0 20 0 0
intr 12345 0 0
ctxt 99
`

func TestParseSystem(t *testing.T) {
	got, err := load.ParseSystem(procStat)
	want := load.System{CPUs: 2, Idle: 10200 * time.Millisecond, Steal: 400 * time.Millisecond}
	if err != nil || got != want {
		t.Errorf("ParseSystem = %+v, %v, want %+v", got, err, want)
	}
	for _, bad := range []string{"", "cpu  1 2 3\ncpu0 1 2 3\n", "cpu  1 2 3 x 5 6 7 8 9\ncpu0 1\n", "intr 5\n"} {
		if _, err := load.ParseSystem(bad); err == nil {
			t.Errorf("ParseSystem(%q) succeeded", bad)
		}
	}
}

func TestParseProcess(t *testing.T) {
	const line = "4321 (a (b) c) S 17 4321 4321 0 -1 4194304 100 0 0 0 250 50 7 8 20 0 4 0 1234 1000 200\n"
	got, err := load.ParseProcess(line)
	want := load.Process{PID: 4321, Parent: 17, CPU: 3 * time.Second}
	if err != nil || got != want {
		t.Errorf("ParseProcess = %+v, %v, want %+v", got, err, want)
	}
	for _, bad := range []string{"", "12 sh S 1", "12 (sh) S 1 2 3", "x (sh) S 1 1 1 0 -1 0 0 0 0 0 1 1 0 0"} {
		if _, err := load.ParseProcess(bad); err == nil {
			t.Errorf("ParseProcess(%q) succeeded", bad)
		}
	}
}

func TestThisProcessIsInProc(t *testing.T) {
	text, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Skip("no /proc here")
	}
	p, err := load.ParseProcess(string(text))
	if err != nil || p.PID != os.Getpid() || p.Parent != os.Getppid() {
		t.Errorf("ParseProcess(/proc/self/stat) = %+v, %v, want pid %d of %d", p, err, os.Getpid(), os.Getppid())
	}
}

func TestFamilyHoldsDescendantsOnly(t *testing.T) {
	all := []load.Process{{1, 0, 100}, {10, 1, 5}, {11, 10, 6}, {12, 11, 7}, {20, 1, 50}, {21, 20, 60}}
	got := load.Family(all, []int{10, 11, 999})
	want := map[int]time.Duration{10: 5, 11: 6, 12: 7}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Family (-want +got):\n%s", diff)
	}
}

// serve runs a server on loopback for the test.
func serve(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- load.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return ln.Addr().String()
}

func TestEveryKindOfSlice(t *testing.T) {
	addr := serve(t)
	for _, o := range []load.Order{
		{Kind: load.Probe},
		{Kind: load.Bulk},
		{Kind: load.Echo, Size: 1024},
		{Kind: load.Connect, Clients: 4},
	} {
		o.Addr, o.Warm, o.Slice, o.PIDs = addr, 10*time.Millisecond, 100*time.Millisecond, []int{os.Getpid()}
		r := load.Run(t.Context(), o)
		if r.Error != "" || r.Ops < 1 {
			t.Errorf("%s: %+v, want operations and no error", o.Kind, r)
		}
		if o.Kind == load.Probe {
			continue
		}
		if r.Elapsed < o.Slice || r.CPUs < 1 {
			t.Errorf("%s: elapsed %v on %d processors, want at least %v", o.Kind, r.Elapsed, r.CPUs, o.Slice)
		}
		if o.Kind == load.Bulk && (r.Bytes == 0 || r.Bytes%(256<<10) != 0) {
			t.Errorf("bulk: %d bytes counted, want whole blocks", r.Bytes)
		}
		if o.Kind != load.Bulk && (r.P50 <= 0 || r.P99 < r.P50) {
			t.Errorf("%s: p50 %v, p99 %v", o.Kind, r.P50, r.P99)
		}
	}
}

func TestASliceThatCannotConnectSaysWhy(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	for _, kind := range []load.Kind{load.Probe, load.Bulk, load.Echo, load.Connect, "nonsense"} {
		r := load.Run(t.Context(), load.Order{Kind: kind, Addr: addr, Slice: time.Millisecond, Warm: time.Millisecond, Size: 1, Clients: 1})
		if r.Error == "" {
			t.Errorf("%s to a closed port: no error in %+v", kind, r)
		}
	}
}

func TestTheAgentAnswersOrdersUntilItsInputEnds(t *testing.T) {
	order, err := json.Marshal(load.Order{Kind: load.Probe, Addr: serve(t), Slice: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := load.Main(t.Context(), []string{"agent"}, strings.NewReader(string(order)+"\n"+string(order)), &out); err != nil {
		t.Fatal(err)
	}
	var r load.Report
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 {
		t.Fatalf("the agent wrote %q, want two lines", out.String())
	}
	if err := json.Unmarshal([]byte(lines[1]), &r); err != nil || r.Error != "" || r.Ops != 1 {
		t.Errorf("report = %+v, %v", r, err)
	}
}

func TestTheServerEndsWithItsInput(t *testing.T) {
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- load.Main(t.Context(), []string{"server", "-listen", "127.0.0.1:0"}, inR, outW)
	}()
	if line, err := bufio.NewReader(outR).ReadString('\n'); err != nil || strings.TrimSpace(line) != load.Ready {
		t.Fatalf("the server said %q, %v, want %q", line, err, load.Ready)
	}
	inW.Close()
	if err := <-done; err != nil {
		t.Errorf("server: %v", err)
	}
}
