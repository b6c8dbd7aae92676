package upstream

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/mesh"
)

// asking is a checker whose endpoints answer what a test says.
type asking struct {
	*Checker
	known   map[vitalsKey]*vitals
	mu      sync.Mutex
	all     map[vitalsKey]asked
	sick    map[string]bool // by name
	asked   map[string][]time.Duration
	most    int // under way at a time
	current int
	takes   time.Duration
	start   time.Time
	stop    func()
}

// newAsking asks n endpoints of a service, called e0 and so on.
func newAsking(t *testing.T, n int, how *mesh.HealthCheck) *asking {
	a := &asking{known: make(map[vitalsKey]*vitals), sick: make(map[string]bool), asked: make(map[string][]time.Duration), start: time.Now()}
	a.Checker = NewChecker(&Pool{}, netip.Addr{}, nil, zap.NewNop())
	a.Checker.ask = a.answer
	a.want = func() map[vitalsKey]asked {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.all
	}
	a.wants(n, how, 0)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); a.Run(ctx) }()
	a.stop = func() { cancel(); <-done }
	return a
}

// wants has n endpoints asked; generation is where they are.
func (a *asking) wants(n int, how *mesh.HealthCheck, generation uint16) {
	svc := &mesh.Service{Namespace: "shop", Hostname: "cart"}
	settings := &mesh.TrafficSettings{Health: how}
	all := make(map[vitalsKey]asked)
	for i := range n {
		name := fmt.Sprint("e", i)
		key := vitalsKey{"shop/cart", name, 80}
		if a.known[key] == nil {
			a.known[key] = new(vitals)
		}
		all[key] = asked{how: how, service: svc, vitals: a.known[key], to: Pick{Settings: settings, Workload: &mesh.Workload{Name: name, UID: name},
			endpoint: &endpoint{key: endpointKey{addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(generation), byte(i >> 8), byte(i)}), 80)}}}}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = all
}

func (a *asking) answer(ctx context.Context, k *asked) error {
	name := k.to.Workload.Name
	a.mu.Lock()
	a.asked[name] = append(a.asked[name], time.Since(a.start))
	a.current++
	a.most = max(a.most, a.current)
	sick, takes := a.sick[name], a.takes
	a.mu.Unlock()
	defer func() { a.mu.Lock(); a.current--; a.mu.Unlock() }()
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		return ctx.Err()
	}
	if sick {
		return errors.New("sick")
	}
	return nil
}

func (a *asking) set(name string, sick bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sick[name] = sick
}

// times is when an endpoint was asked.
func (a *asking) times(name string) []time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked[name]
}

// out reports whether the only endpoint is taken out, and whether its service's count agrees.
func (a *asking) out(t *testing.T) bool {
	t.Helper()
	synctest.Wait()
	for _, k := range a.checks {
		out := k.vitals.failing.Load()
		if n := a.up.failing.Load(); (n == 1) != out || a.of(k).failing != n {
			t.Errorf("out is %v, and %d endpoints count as failing, %d of the service", out, n, a.of(k).failing)
		}
		return out
	}
	t.Fatal("nobody is asked")
	return false
}

func how(interval, timeout time.Duration, unhealthy, healthy uint32) *mesh.HealthCheck {
	return &mesh.HealthCheck{Path: "/", Interval: interval, Timeout: timeout, Unhealthy: unhealthy, Healthy: healthy}
}

// TestThresholds follows one endpoint: three failures in a row take it out, two passes in a row take it back.
func TestThresholds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAsking(t, 1, how(10*time.Second, time.Second, 3, 2))
		defer a.stop()
		after := func(checks int) { // that many more
			for n := len(a.times("e0")); len(a.times("e0")) < n+checks; {
				time.Sleep(time.Second)
			}
		}
		after(1)
		a.set("e0", true)
		after(2)
		if a.out(t) {
			t.Error("it is out after two failures")
		}
		a.set("e0", false)
		after(1)
		a.set("e0", true)
		after(2)
		if a.out(t) {
			t.Error("it is out after failures with a pass between them")
		}
		after(1)
		if !a.out(t) {
			t.Error("it is not out after three failures")
		}
		a.set("e0", false)
		after(1)
		if !a.out(t) {
			t.Error("it is back after one pass")
		}
		after(1)
		if a.out(t) {
			t.Error("it is not back after two passes")
		}
	})
}

// TestIntervals: the first checks are spread over an interval, and the later ones do not fall into step.
func TestIntervals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAsking(t, 100, how(10*time.Second, time.Second, 1, 1))
		time.Sleep(60 * time.Second)
		a.stop()
		early := 0
		for name, times := range a.asked {
			if times[0] > 10*time.Second+checksEvery || len(times) < 5 || len(times) > 7 {
				t.Fatalf("%s was asked at %v", name, times)
			}
			if times[0] < 5*time.Second {
				early++
			}
			for i := range times[1:] {
				if gap := times[i+1] - times[i]; gap < 9*time.Second || gap > 11*time.Second {
					t.Fatalf("%s was asked %v after it had been, want 10 s, more or less", name, gap)
				}
			}
		}
		if len(a.asked) != 100 || early < 25 || early > 75 {
			t.Errorf("%d endpoints were asked, %d of them in the first half of the interval, want 100 and half", len(a.asked), early)
		}
	})
}

// TestChecksAreBounded: of thousands of slow endpoints only so many are asked at a time, and all get their turn.
func TestChecksAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAsking(t, 3000, how(10*time.Second, 500*time.Millisecond, 1, 1))
		a.mu.Lock()
		a.takes = time.Hour
		a.mu.Unlock()
		time.Sleep(40 * time.Second)
		a.stop()
		if a.most != maxChecks {
			t.Errorf("%d checks were under way at a time, want %d", a.most, maxChecks)
		}
		if len(a.asked) != 3000 {
			t.Errorf("%d of 3000 endpoints were asked within 40 s", len(a.asked))
		}
	})
}

// TestCheckerFollowsWhatItIsTold: who is no longer to be asked is forgotten, also in the middle of a check, and who is elsewhere now
// begins anew.
func TestCheckerFollowsWhatItIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAsking(t, 1, how(time.Second, time.Second, 1, 1))
		defer a.stop()
		a.set("e0", true)
		time.Sleep(3 * time.Second)
		if !a.out(t) {
			t.Fatal("it is not out")
		}
		before := len(a.times("e0"))
		a.set("e0", false)
		a.wants(1, how(time.Hour, time.Second, 1, 1), 0) // the same endpoint, asked in another way
		a.Look()
		time.Sleep(checksEvery)
		if !a.out(t) && len(a.times("e0")) == before { // what was due stays so, and may have been due just now
			t.Error("it is back before it was asked")
		}
		a.wants(1, how(time.Hour, time.Second, 1, 1), 1) // another endpoint
		a.Look()
		time.Sleep(checksEvery)
		if a.out(t) {
			t.Error("another endpoint pays for the first one's failures")
		}
		a.mu.Lock()
		a.takes = time.Hour
		a.mu.Unlock()
		a.set("e0", true)
		a.wants(1, how(time.Second, time.Second, 1, 1), 1)
		a.Look()
		time.Sleep(1500 * time.Millisecond)
		a.wants(0, nil, 0) // most likely while it is asked
		a.Look()
		time.Sleep(checksEvery)
		synctest.Wait()
		n := len(a.times("e0"))
		time.Sleep(time.Minute)
		if len(a.checks)+len(a.queue)+a.active != 0 || a.up.failing.Load() != 0 || len(a.times("e0")) != n {
			t.Errorf("%d checks are there, %d in the queue, %d under way, %d out, %d were made, want none",
				len(a.checks), len(a.queue), a.active, a.up.failing.Load(), len(a.times("e0"))-n)
		}
	})
}

// TestStoppedCheckerLeavesWhatItKnows: draining does not bring endpoints back that are out.
func TestStoppedCheckerLeavesWhatItKnows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAsking(t, 1, how(time.Second, time.Second, 1, 1))
		a.set("e0", true)
		time.Sleep(3 * time.Second)
		a.mu.Lock()
		a.takes = time.Hour // the next one is under way when it stops
		a.mu.Unlock()
		time.Sleep(1200 * time.Millisecond)
		a.stop()
		n := len(a.times("e0"))
		time.Sleep(time.Minute)
		if !a.out(t) || len(a.times("e0")) != n {
			t.Error("a checker that was stopped goes on, or forgets")
		}
	})
}
