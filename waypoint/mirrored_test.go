package waypoint_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// TestABodyIsNotLostToItsCopy: a body that is here whole when the request is copied for a mirror, and too long to be read twice, goes
// where it was sent. The mirror goes without.
func TestABodyIsNotLostToItsCopy(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	var copied atomic.Int64
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n)
	}))
	l.service("shadow", "10.9.0.2", mesh.AppHTTP1, app(t, func(_ http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		copied.Add(n)
	}))
	l.known("cart", "shadow")
	all := mesh.Fraction{Numerator: 1, Denominator: 1}
	l.routes(mesh.KindVirtualService, mesh.HTTPRule{
		Backends: []mesh.Backend{to("cart", 1)},
		Mirrors:  []mesh.Mirror{{Ref: to("shadow", 1).Ref, Percent: all}},
		Fault:    &mesh.Fault{Delay: mesh.Delay{Percent: all, Fixed: 100 * time.Millisecond}}, // in which the whole body comes
	})
	two := l.client2()
	for _, size := range []int{10 << 10, 60 << 10, 70 << 10, 200 << 10, 1 << 20} {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		req, _ := http.NewRequestWithContext(ctx, "POST", "http://10.9.0.1/", strings.NewReader(strings.Repeat("x", size)))
		resp, err := two.Do(req)
		if err != nil {
			t.Errorf("a body of %d KiB: %v", size>>10, err)
			cancel()
			continue
		}
		got, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		cancel()
		if string(got) != fmt.Sprint(size) {
			t.Errorf("a body of %d bytes: the application was sent %s", size, got)
		}
	}
	l.eventually("short ones are copied", func() bool { return copied.Load() == 70<<10 })
}
