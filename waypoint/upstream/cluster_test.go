package upstream

import (
	"math"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/lb"
	"github.com/mistnet/mistnet/internal/mesh"
)

// hosts are members that are known since then.
func hosts(n int, since time.Time) *members {
	m := &members{set: &lb.Set{}}
	for range n {
		h := &host{since: since}
		h.Pick.host = h
		m.hosts = append(m.hosts, h)
	}
	return m
}

func TestWarmth(t *testing.T) {
	start := time.Unix(1000, 0)
	for name, tc := range map[string]struct {
		warmup mesh.Warmup
		after  time.Duration
		want   float64
	}{
		"at first, the least":         {mesh.Warmup{Duration: time.Minute}, 0, 0.1},
		"a least of one's own":        {mesh.Warmup{Duration: time.Minute, MinPercent: mesh.Fraction{Numerator: 30, Denominator: 100}}, 0, 0.3},
		"half-way":                    {mesh.Warmup{Duration: time.Minute}, 30 * time.Second, 0.5},
		"half-way, more aggressively": {mesh.Warmup{Duration: time.Minute, Aggression: 2}, 15 * time.Second, 0.5},
		"at the end":                  {mesh.Warmup{Duration: time.Minute}, time.Minute, 1},
	} {
		m := hosts(1, start)
		m.warmup = &tc.warmup
		m.now.Store(start.Add(tc.after).UnixNano())
		if got := m.Warmth(0); math.Abs(got-tc.want) > 0.001 {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}

// TestEjections follows one endpoint of ten: how long it is out, and when the others may be.
func TestEjections(t *testing.T) {
	now := time.Unix(1000, 0)
	two := uint32(2)
	d := &mesh.OutlierDetection{Consecutive5xx: &two, BaseEjection: 30 * time.Second, Interval: 10 * time.Second, MaxEjected: 20}
	c, m := &Cluster{}, hosts(10, now)
	fail := func(i, times int) time.Duration {
		for range times {
			c.observe(d, m, m.hosts[i], Result{Status: 500}, now)
		}
		return max(0, time.Unix(0, m.hosts[i].until.Load()).Sub(now))
	}
	m.now.Store(now.UnixNano())
	if !m.Calm() {
		t.Error("at first, something is amiss")
	}
	if got := fail(0, 1); got != 0 {
		t.Errorf("after one failure it is out for %v", got)
	}
	c.observe(d, m, m.hosts[0], Result{Status: 200}, now)
	if got := fail(0, 1); got != 0 {
		t.Errorf("after failures with a success between them it is out for %v", got)
	}
	if got := fail(0, 1); got != 30*time.Second || m.Calm() || !m.Out(0) {
		t.Errorf("after two in a row it is out for %v, want 30 s", got)
	}
	if got := fail(1, 2); got != 30*time.Second {
		t.Errorf("another one is out for %v, want 30 s: two of ten may be", got)
	}
	if got := fail(2, 5); got != 0 {
		t.Errorf("a third is out for %v, want not", got)
	}
	now = now.Add(30 * time.Second)
	m.now.Store(now.UnixNano())
	if m.Out(0) || !m.Calm() {
		t.Error("its time is over, and it is still out")
	}
	if got := fail(0, 2); got != 60*time.Second {
		t.Errorf("the second time it is out for %v, want 60 s", got)
	}
	now = now.Add(60*time.Second + 25*time.Second)
	if got := fail(0, 2); got != 30*time.Second {
		t.Errorf("after two intervals in peace it is out for %v, want 30 s again", got)
	}
}

func TestRateForgets(t *testing.T) {
	now := time.Unix(1000, 0)
	var r rate
	for range 10 {
		r.add(now, time.Minute)
	}
	for after, want := range map[time.Duration]float64{0: 10, 50 * time.Second: 10, 70 * time.Second: 0} {
		copied := r
		if got := copied.count(now.Add(after), time.Minute); got != want {
			t.Errorf("%v later %v of 10 count, want %v", after, got, want)
		}
	}
	if got := r.count(now.Add(30*time.Second), 5*time.Second); got != 0 {
		t.Errorf("within the last 5 s of 30 there were %v, want none", got)
	}
}
