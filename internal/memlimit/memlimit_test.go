package memlimit_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/mistnet/mistnet/internal/memlimit"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

// holder is a connection with streams of a size each.
type holder struct {
	name    string
	account *memlimit.Account

	mu      sync.Mutex
	streams []stream // what they hold
	late    bool     // lets go only when asked
	later   int
	log     *[]string
}

type stream struct{ size, age int }

func (h *holder) hold(sizes ...int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, n := range sizes {
		h.streams = append(h.streams, stream{size: n})
		h.account.Charge(n)
	}
}

func (h *holder) Age() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range h.streams {
		h.streams[i].age++
	}
}

func (h *holder) Shed(n int64, ages int) (streams int, bytes int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	slices.SortFunc(h.streams, func(a, b stream) int { return b.size - a.size })
	h.streams = slices.DeleteFunc(h.streams, func(s stream) bool {
		if s.age < ages || bytes >= n {
			return false
		}
		streams++
		bytes += int64(s.size)
		if h.late {
			h.later += s.size
		} else {
			h.account.Release(s.size)
		}
		*h.log = append(*h.log, fmt.Sprintf("%s %d MiB", h.name, s.size/mib))
		return true
	})
	return streams, bytes
}

func (h *holder) taken(i int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.streams[i].age = 0
}

func (h *holder) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 1} }

func TestWindow(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		own, others, most, want int
	}{
		"all is free":                           {0, 0, 16 * mib, 16 * mib},
		"an eighth of what is free":             {0, 448 * mib, 16 * mib, 8 * mib},
		"less what the connection holds":        {6 * mib, 442 * mib, 16 * mib, 2 * mib},
		"it holds its part":                     {8 * mib, 440 * mib, 16 * mib, 0},
		"it alone holds a ninth":                {57 * mib, 0, 16 * mib, 0},
		"nothing is free, and it holds little":  {mib - 1, 600 * mib, 16 * mib, 64 * kib},
		"nothing is free, and it holds enough":  {mib, 600 * mib, 16 * mib, 0},
		"little is free, and it holds nothing":  {0, 512*mib - 4*kib, 16 * mib, 64 * kib},
		"it needs less than the smallest":       {0, 600 * mib, 4 * kib, 4 * kib},
		"a first window, of which there is all": {0, 256 * mib, memlimit.FirstWindow, memlimit.FirstWindow},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := memlimit.New(512 * mib)
			a := b.Open(&holder{})
			defer a.Close()
			a.Charge(c.own)
			b.Charge(c.others)
			if got := a.Window(c.most); got != c.want {
				t.Errorf("Window(%d) = %d, want %d", c.most, got, c.want)
			}
		})
	}
}

// TestNoNumberOfConnectionsExhaustsIt: each takes all that it is allowed, again and again, and nothing is ever let go.
func TestNoNumberOfConnectionsExhaustsIt(t *testing.T) {
	t.Parallel()
	const limit = 512 * mib
	for _, n := range []int{1, 12, 40, 400} {
		b := memlimit.New(limit)
		all := make([]*memlimit.Account, n)
		for i := range all {
			all[i] = b.Open(&holder{})
		}
		r := rand.New(rand.NewPCG(1, uint64(n)))
		for range 200 * n {
			a := all[r.IntN(n)]
			a.Charge(a.Window(16 * mib))
		}
		// What everybody gets however short memory is, and each may have asked once when there was more.
		if got, most := b.Held(), int64(limit+n*(mib+64*kib)); got > most || n <= 12 && got > limit*3/4+limit/50 {
			t.Errorf("%d connections hold %d bytes, want no more than %d", n, got, most)
		}
		late := b.Open(&holder{})
		if got := late.Window(16 * mib); got < 64*kib {
			t.Errorf("beside %d connections that take all they can get, another may be sent %d bytes", n, got)
		}
	}
}

func TestAdmit(t *testing.T) {
	t.Parallel()
	b := memlimit.New(64 * mib)
	b.Charge(56 * mib)
	if !b.Admit(kib) {
		t.Error("a connection was refused with an eighth free")
	}
	if b.Admit(kib) || b.Held() != 56*mib+kib || b.Refused() != 1 {
		t.Errorf("with less free: admitted, or counted wrong (%d held, %d refused)", b.Held(), b.Refused())
	}
	if b.Full() {
		t.Error("Full below the limit")
	}
	b.Charge(8 * mib)
	if !b.Full() {
		t.Error("not Full above the limit")
	}
}

// TestNoBudget: whoever has none is not held back.
func TestNoBudget(t *testing.T) {
	t.Parallel()
	var b *memlimit.Budget
	a := b.Open(&holder{})
	b.Charge(1)
	a.Charge(1)
	if !b.Admit(1) || b.Full() || a.Window(5) != 5 || b.Held() != 0 || b.Limit() != 0 || b.Refused() != 0 || b.Ended() != 0 {
		t.Error("a budget that is none holds back")
	}
	a.Release(1)
	b.Release(1)
	a.Close()
}

// running runs test beside a budget of 64 MiB with two connections.
func running(t *testing.T, test func(b *memlimit.Budget, x, y *holder, ended func() []string)) *observer.ObservedLogs {
	core, logs := observer.New(zap.WarnLevel)
	synctest.Test(t, func(t *testing.T) {
		b := memlimit.New(64 * mib)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { b.Run(ctx, zap.New(core)); close(done) }()
		defer func() { stop(); <-done }()
		var log []string
		x, y := &holder{name: "x", log: &log}, &holder{name: "y", log: &log}
		for _, h := range []*holder{x, y} {
			h.account = b.Open(h)
			defer h.account.Close()
		}
		test(b, x, y, func() []string {
			synctest.Wait()
			got := log
			log = nil
			return got
		})
	})
	return logs
}

func TestStreamsThatAreStuckEndFirst(t *testing.T) {
	t.Parallel()
	logs := running(t, func(b *memlimit.Budget, x, y *holder, ended func() []string) {
		x.hold(20*mib, 2*mib)
		y.hold(18*mib, 9*mib) // 49 MiB of 64
		time.Sleep(9500 * time.Millisecond)
		if got := ended(); got != nil {
			t.Fatalf("after nine seconds %q were ended", got)
		}
		x.taken(0)
		y.taken(1)
		time.Sleep(time.Second)
		if diff := cmp.Diff([]string{"y 18 MiB"}, ended()); diff != "" {
			t.Fatalf("after ten seconds, of which something was taken of two (-want +got):\n%s", diff)
		}
		time.Sleep(time.Minute)
		if got := ended(); got != nil {
			t.Errorf("with memory enough %q were ended", got)
		}
		if b.Ended() != 1 {
			t.Errorf("Ended() = %d, want 1", b.Ended())
		}
	})
	if n := logs.Len(); n != 1 {
		t.Errorf("%d lines were logged, want 1", n)
	}
}

func TestAboveTheLimitStreamsEndAtOnce(t *testing.T) {
	t.Parallel()
	logs := running(t, func(b *memlimit.Budget, x, y *holder, ended func() []string) {
		x.hold(30*mib, 10*mib)
		time.Sleep(1500 * time.Millisecond)
		y.hold(9 * mib)
		time.Sleep(time.Second) // all is a second old
		y.hold(16 * mib)
		if diff := cmp.Diff([]string{"x 30 MiB"}, ended()); diff != "" {
			t.Errorf("what ends (-want +got):\n%s", diff)
		}
		if b.Full() {
			t.Error("still full")
		}
		for range 100 { // somebody asks for it again and again
			y.hold(32 * mib)
			time.Sleep(10 * time.Millisecond)
		}
		if b.Full() {
			t.Error("full in the end")
		}
	})
	if n := logs.Len(); n != 1 {
		t.Errorf("%d lines were logged, want 1 in ten seconds", n)
	}
}

// TestWhatIsLetGoLateIsNotAskedForTwice more often than it takes.
func TestWhatIsLetGoLateIsNotAskedForTwice(t *testing.T) {
	t.Parallel()
	running(t, func(b *memlimit.Budget, x, y *holder, ended func() []string) {
		x.late = true
		x.hold(20*mib, 20*mib)
		y.hold(10*mib, 10*mib)
		y.hold(5 * mib)
		synctest.Wait()
		x.account.Release(x.later)
		time.Sleep(100 * time.Millisecond)
		if diff := cmp.Diff([]string{"x 20 MiB"}, ended()); diff != "" {
			t.Errorf("what ends (-want +got):\n%s", diff)
		}
	})
}

// TestChargingCostsNoMemory, for it is done for every message.
func TestChargingCostsNoMemory(t *testing.T) {
	b := memlimit.New(mib)
	a := b.Open(&holder{})
	defer a.Close()
	if n := testing.AllocsPerRun(100, func() {
		a.Charge(2 * mib)
		a.Window(mib)
		a.Release(2 * mib)
	}); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}

func BenchmarkCharge(b *testing.B) {
	m := memlimit.New(1 << 40)
	b.RunParallel(func(pb *testing.PB) {
		a := m.Open(&holder{})
		defer a.Close()
		for pb.Next() {
			a.Charge(4096)
			a.Release(4096)
		}
	})
}
