package daemon_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/daemon"
)

// pipe is a standard output that may be held: who writes waits, as at a pipe nobody reads.
type pipe struct {
	gate chan bool // full: writing waits
	mu   sync.Mutex
	b    bytes.Buffer
	n    int // writes
}

func newPipe() *pipe { return &pipe{gate: make(chan bool, 1)} }

func (p *pipe) stall() { p.gate <- true }
func (p *pipe) flow()  { <-p.gate }

func (p *pipe) Write(b []byte) (int, error) {
	p.gate <- true
	defer p.flow()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.n++
	return p.b.Write(b)
}

func (p *pipe) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.b.String()
}

func (p *pipe) writes() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.n
}

// line is line i, of n bytes.
func line(i, n int) []byte {
	s := fmt.Sprintf("%08d ", i)
	return []byte(s + strings.Repeat("x", n-len(s)-1) + "\n")
}

// TestStalledOutputStallsNobody: lines are taken while there is room, counted when there is none, and told of once it flows
// again, where they are missing.
func TestStalledOutputStallsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipe()
		s := daemon.NewSpool(p)
		env, err := daemon.NewEnv("prog", s, daemon.LogOptions{})
		if err != nil {
			t.Fatal(err)
		}
		p.stall()
		start := time.Now()
		const lines, size = 4000, 1 << 10
		for i := range lines {
			if _, err := env.Out.Write(line(i, size)); err != nil {
				t.Fatal(err)
			}
			if i == 10 {
				time.Sleep(time.Second) // the writer has those and waits
				start = start.Add(time.Second)
			}
		}
		env.Log.Info("there is room for what is told by the program itself")
		if took := time.Since(start); took != 0 {
			t.Errorf("%d lines took %s of those who wrote them", lines, took)
		}
		lost := s.Lost()
		if kept := lines - lost; kept < 500 || lost == 0 {
			t.Errorf("%d lines of %d are lost, want some, and the first 500 kept", lost, lines)
		}
		if got := metric(t, env, "mistnet_log_lines_lost_total"); got != float64(lost) {
			t.Errorf("the metric says %v lines are lost, want %d", got, lost)
		}
		p.flow()
		if !s.Flush(time.Second) {
			t.Error("what flows again cannot be flushed")
		}
		if _, err := env.Out.Write([]byte("later\n")); err != nil {
			t.Fatal(err)
		}
		if !s.Flush(time.Second) {
			t.Error("a line cannot be flushed")
		}
		var want strings.Builder
		for i := range lines - int(lost) {
			want.Write(line(i, size))
		}
		rest, ok := strings.CutPrefix(p.String(), want.String())
		if !ok {
			t.Fatalf("%d lines do not come first, whole and in order", lines-lost)
		}
		told := strings.Split(rest, "\n")
		if len(told) != 4 || !strings.Contains(told[0], "there is room") || !strings.HasSuffix(told[1], fmt.Sprintf("lines=%d", lost)) || told[2] != "later" {
			t.Errorf("behind them: %q, want that of the program, how many are lost, and what came later", told)
		}
		if n := s.Lost(); n != lost {
			t.Errorf("%d lines are lost in the end, want %d as before", n, lost)
		}
	})
}

// metric is the value of a counter without labels.
func metric(t *testing.T, env *daemon.Env, name string) float64 {
	t.Helper()
	families, err := env.Registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}

// TestLinesDoNotWaitLong: those of Out some, for others to come along; those of the log not at all.
func TestLinesDoNotWaitLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipe()
		env, err := daemon.NewEnv("prog", daemon.NewSpool(p), daemon.LogOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for round := range 3 {
			before := p.writes()
			for range 5 {
				_, _ = env.Out.Write([]byte("a line\n"))
			}
			synctest.Wait()
			if n := p.writes() - before; n != 0 {
				t.Errorf("round %d: %d writes at once, want the lines to be collected", round, n)
			}
			time.Sleep(time.Second / 2)
			synctest.Wait()
			if n, got := p.writes()-before, strings.Count(p.String(), "a line\n"); n != 1 || got != 5*(round+1) {
				t.Errorf("round %d: half a second later %d lines are there by %d writes, want %d, 5 of them by one", round, got, n, 5*(round+1))
			}
		}
		_, _ = env.Out.Write([]byte("before\n"))
		env.Log.Info("at once")
		synctest.Wait()
		if got := p.String(); !strings.Contains(got, "before\n") || !strings.HasSuffix(got, "at once\n") {
			t.Errorf("a line of the log is not written when it is there, behind those before it: %q", got)
		}
		// Many lines do not wait for the time to pass either.
		for i := range 200 {
			_, _ = env.Out.Write(line(i, 1<<10))
		}
		synctest.Wait()
		if n := strings.Count(p.String(), "xxx\n"); n == 0 {
			t.Error("of 200 KiB of lines none is written before its time")
		}
		time.Sleep(time.Second) // the last of them wait for theirs
	})
}

// TestFlushHasAnEnd, when the output has none.
func TestFlushHasAnEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipe()
		s := daemon.NewSpool(p)
		start := time.Now()
		if !s.Flush(time.Second) || time.Since(start) != 0 {
			t.Error("nothing cannot be flushed")
		}
		_, _ = s.Write([]byte("one\n"))
		if !s.Flush(time.Second) || time.Since(start) != 0 || p.String() != "one\n" {
			t.Errorf("after Flush, and %s, the output is %q", time.Since(start), p)
		}
		p.stall()
		_, _ = s.Write([]byte("two\n"))
		if s.Flush(time.Second) || time.Since(start) != time.Second {
			t.Errorf("Flush of a stalled output returns true, or not after a second but after %s", time.Since(start))
		}
		p.flow()
		if !s.Flush(time.Second) || p.String() != "one\ntwo\n" {
			t.Errorf("when it flows again, the output is %q", p)
		}
	})
}

// TestLinesOfManyAreWhole, each writer's in its order.
func TestLinesOfManyAreWhole(t *testing.T) {
	t.Parallel()
	p := newPipe()
	s := daemon.NewSpool(p)
	const writers, each = 8, 400
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for i := range each {
				_, _ = fmt.Fprintf(s, "%d %d %s.\n", w, i, strings.Repeat("y", i%97))
			}
		})
	}
	all.Wait()
	if !s.Flush(10*time.Second) || s.Lost() != 0 {
		t.Fatalf("%d lines are lost, or they cannot be flushed", s.Lost())
	}
	next := make([]int, writers)
	for l := range strings.Lines(p.String()) {
		var w, i int
		var tail string
		if _, err := fmt.Sscanf(l, "%d %d %s", &w, &i, &tail); err != nil || tail != strings.Repeat("y", i%97)+"." || next[w] != i {
			t.Fatalf("line %q of writer %d, want its line %d: %v", l, w, next[w], err)
		}
		next[w]++
	}
	if diff := cmp.Diff([]int{each, each, each, each, each, each, each, each}, next); diff != "" {
		t.Errorf("lines of each (-want +got):\n%s", diff)
	}
}

// fullDisk takes some bytes, then says why no more, then takes all.
type fullDisk struct {
	*pipe
	room int
}

func (d *fullDisk) Write(b []byte) (int, error) {
	if d.room < 0 || len(b) <= d.room {
		return d.pipe.Write(b)
	}
	n, _ := d.pipe.Write(b[:d.room])
	d.room = -1
	return n, errors.New("no space left on device")
}

// TestFailedWritesAreLost, but tear no line that is written later.
func TestFailedWritesAreLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &fullDisk{pipe: newPipe(), room: 7}
		s := daemon.NewSpool(d)
		for _, l := range []string{"one\n", "second\n", "three\n"} {
			_, _ = s.Write([]byte(l))
		}
		s.Flush(time.Second)
		_, _ = s.Write([]byte("four\n"))
		s.Flush(time.Second)
		if got := d.String(); got != "one\nsec\nfour\n" || s.Lost() != 2 {
			t.Errorf("the output is %q and %d lines are lost, want the torn one ended, and 2", got, s.Lost())
		}
	})
}

// TestSpoolAllocatesNothing for a line.
func TestSpoolAllocatesNothing(t *testing.T) {
	s := daemon.NewSpool(io.Discard)
	l := line(1, 400)
	for range 2000 { // buffers grow
		_, _ = s.Write(l)
	}
	if n := testing.AllocsPerRun(5000, func() { _, _ = s.Write(l) }); n > 0 {
		t.Errorf("a line: %v allocations, want none", n)
	}
	s.Flush(time.Second)
}

// BenchmarkSpool is what a line costs who writes it, of many.
func BenchmarkSpool(b *testing.B) {
	s := daemon.NewSpool(io.Discard)
	l := line(1, 400)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			_, _ = s.Write(l)
		}
	})
	b.ReportMetric(float64(s.Lost())/float64(b.N), "lost/op")
}

// TestLogGoesOnWhenStalled, whatever there is to tell.
func TestLogGoesOnWhenStalled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipe()
		s := daemon.NewSpool(p)
		env, err := daemon.NewEnv("prog", s, daemon.LogOptions{Format: "json"})
		if err != nil {
			t.Fatal(err)
		}
		p.stall()
		const entries = 20000
		for range entries {
			env.Log.Warn("connection failed", zap.String("error", strings.Repeat("z", 200)))
		}
		p.flow()
		s.Flush(time.Second)
		if got := strings.Count(p.String(), "connection failed"); s.Lost() == 0 || got != entries-int(s.Lost()) {
			t.Errorf("%d lines are there and %d lost of %d", got, s.Lost(), entries)
		}
	})
}
