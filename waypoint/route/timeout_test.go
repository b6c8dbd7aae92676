package route_test

import (
	"math"
	"testing"
	"time"

	"github.com/mistnet/mistnet/waypoint/route"
)

// TestAppendGRPCTimeout: what is written has at most eight digits, and is read as no less, and as no more than its unit makes it.
func TestAppendGRPCTimeout(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "1m", 0: "1m", 1: "1m", time.Millisecond: "1m", 1500 * time.Microsecond: "2m", time.Second: "1000m",
		99_999_999 * time.Millisecond: "99999999m", 100_000_000 * time.Millisecond: "100000S", 99_999_999 * time.Second: "99999999S",
		100_000_000 * time.Second: "1666667M", math.MaxInt64: "2562048H", 99_999_999 * time.Minute: "99999999M", 100_000_000 * time.Minute: "1666667H",
	} {
		got := string(route.AppendGRPCTimeout(nil, d))
		if got != want {
			t.Errorf("AppendGRPCTimeout(%v) = %s, want %s", d, got, want)
		}
		if back, ok := route.ParseGRPCTimeout(got); !ok || back < d || back-max(d, 0) > time.Hour {
			t.Errorf("%s is read as %v, %v, want about %v", got, back, ok, d)
		}
	}
}
