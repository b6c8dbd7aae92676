package http1_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistnet/mistnet/waypoint/http1"
)

func TestDateIsOfTheSecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d http1.Date
		for _, after := range []time.Duration{0, 999 * time.Millisecond, time.Millisecond, 36 * time.Hour, time.Second} {
			time.Sleep(after)
			want := "x" + time.Now().UTC().Format("Mon, 02 Jan 2006 15:04:05 GMT")
			if got := string(d.Append([]byte("x"))); got != want {
				t.Errorf("after %v more: Append = %q, want %q", after, got, want)
			}
		}
	})
}
