package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/netlab"
)

const (
	manyRoutes   = 10_000
	routesInEach = 100 // VirtualService
)

// manyVirtualServices send /item/N to version 1 of api where N is even, else to version 2.
func manyVirtualServices() string {
	var b strings.Builder
	for n := range manyRoutes {
		if n%routesInEach == 0 {
			fmt.Fprintf(&b, "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: many-%05d, namespace: shop}\nspec:\n  hosts: [api]\n  http:\n", n)
		}
		fmt.Fprintf(&b, "  - {match: [{uri: {exact: /item/%d}}], route: [{destination: {host: api-v%d}}]}\n", n, 1+n%2)
	}
	return b.String()
}

// routeNow sends /now to a version of api.
func routeNow(version int) string {
	return fmt.Sprintf(`
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: now, namespace: shop}
spec:
  hosts: [api]
  http:
  - {match: [{uri: {exact: /now}}], route: [{destination: {host: api-v%d}}]}
`, version)
}

// caller makes requests to service api from a pod: through its ztunnel.
func (w *world) caller(from string) *http.Client {
	in := w.pods[from].Namespace
	return &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		MaxIdleConnsPerHost: 8,
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			to, err := netip.ParseAddrPort(addr)
			if err != nil {
				return nil, err
			}
			return in.Dial(ctx, linux.DialOptions{Remote: to, Timeout: 5 * time.Second})
		},
	}}
}

// answer is a response's status and body.
func answer(c *http.Client, url string) (string, error) {
	resp, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return fmt.Sprintf("%d %s", resp.StatusCode, strings.TrimSpace(string(body))), err
}

// TestManyRoutesUnderLoad: 10 000 routes, and one that changes again and again, from a file by istiod to the waypoint, while requests
// go through all of them. None fails, each change takes effect, and what the programs hold does not grow.
//
// MISTNET_ROUTES_FOR=60s has a change made every second for so long; otherwise there are a few, one as soon as the other has taken
// effect.
func TestManyRoutesUnderLoad(t *testing.T) {
	changes, every := 6, time.Duration(0)
	if text := os.Getenv("MISTNET_ROUTES_FOR"); text != "" {
		long, err := time.ParseDuration(text)
		must(t, "MISTNET_ROUTES_FOR", err)
		every = time.Second
		changes = int(long / every)
	}
	w := newTestWorld(t)
	const url = "http://" + apiVIP + ":80"
	probe := w.caller("shop/web")
	defer probe.CloseIdleConnections()
	sees := func(path, want string) func() error {
		return func() error {
			got, err := answer(probe, url+path)
			if err == nil && got != want {
				err = fmt.Errorf("%s is answered %q, want %q", path, got, want)
			}
			return err
		}
	}
	must(t, "write routes", errors.Join(
		w.writeText("many.yaml", manyVirtualServices()), w.writeText("now.yaml", routeNow(1))))
	soon(t, "all routes are known", func() error {
		for n := 0; n < manyRoutes; n += 99 { // one request alone, without a route, would be right half of the time
			if err := errors.Join(sees(fmt.Sprintf("/item/%d", n), []string{v1, v2}[n%2])(), sees("/now", v1)()); err != nil {
				return err
			}
		}
		return nil
	})

	load := w.load(t, url)
	var took []time.Duration
	var before, after [2]uint64
	tick := time.NewTicker(max(every, time.Nanosecond))
	defer tick.Stop()
	for i := range changes {
		if every > 0 {
			<-tick.C
		}
		start := time.Now()
		must(t, "change a route", w.writeText("now.yaml", routeNow(2-i%2)))
		_, err := eventually(t.Context(), 20*time.Second, sees("/now", []string{v2, v1}[i%2]))
		must(t, "the change takes effect", err)
		took = append(took, time.Since(start))
		if i == 1 {
			before = w.liveHeap(t)
		}
	}
	after = w.liveHeap(t)
	done, failed := load()
	if len(failed) > 0 {
		t.Errorf("%d of %d requests failed: %q", len(failed), done, failed[:min(len(failed), 5)])
	}
	if done < int64(changes) {
		t.Errorf("only %d requests went through: that is no load", done)
	}
	for i, program := range []string{"waypoint", "istiod"} {
		// A change in ten thousand makes everything of the waypoint's routes anew: one generation too many would double them.
		if after[i] > before[i]+before[i]/3+4<<20 {
			t.Errorf("%s holds %d KiB after %d changes, and held %d KiB after two", program, after[i]>>10, changes, before[i]>>10)
		}
	}
	slices.Sort(took)
	t.Logf("%d requests, %d failed; %d changes of %d routes in effect after: median %v, p90 %v, slowest %v; heap in KiB: waypoint %d then %d, istiod %d then %d; waypoint's peak RSS %s",
		done, len(failed), changes, manyRoutes+1, took[len(took)/2], took[len(took)*9/10], took[len(took)-1],
		before[0]>>10, after[0]>>10, before[1]>>10, after[1]>>10, w.peak("waypoint"))
}

// load sends requests through all of the many routes until stop is called, which tells how many there were, and what was wrong.
func (w *world) load(t *testing.T, url string) (stop func() (int64, []string)) {
	const clients = 4
	var done atomic.Int64
	var mu sync.Mutex
	var failed []string
	var all sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	c := w.caller("shop/web")
	for i := range clients {
		all.Go(func() {
			for n := i; ctx.Err() == nil; n = (n + 7) % manyRoutes {
				got, err := answer(c, fmt.Sprintf("%s/item/%d", url, n))
				done.Add(1)
				if want := []string{v1, v2}[n%2]; err != nil || got != want {
					mu.Lock()
					failed = append(failed, fmt.Sprintf("/item/%d: %s, %v, want %s", n, got, err, want))
					mu.Unlock()
				}
			}
		})
	}
	stop = func() (int64, []string) {
		cancel()
		all.Wait()
		c.CloseIdleConnections()
		return done.Load(), failed
	}
	t.Cleanup(func() { stop() })
	return stop
}

// liveHeap is how many bytes the waypoint and istiod hold after a collection.
func (w *world) liveHeap(t *testing.T) (live [2]uint64) {
	t.Helper()
	for i, at := range []struct {
		in   *netlab.Namespace
		port int
	}{{w.pods["shop/waypoint"].Namespace, mesh.PortAdmin}, {w.lab.ControlPlane.Namespace, mesh.PortIstiodMon}} {
		page, err := w.get(t.Context(), at.in, fmt.Sprintf("127.0.0.1:%d", at.port), "/debug/pprof/heap?gc=1&debug=1")
		must(t, "read the heap's profile", err)
		_, text, _ := strings.Cut(string(page), "\n# HeapAlloc = ")
		text, _, _ = strings.Cut(text, "\n")
		live[i], err = strconv.ParseUint(text, 10, 64)
		must(t, "read the heap's size", err)
	}
	return live
}

// peak is the most memory a program had at a time, as the kernel says (proc(5), VmHWM).
func (w *world) peak(name string) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.procs[name].Process.Pid))
	_, text, _ := strings.Cut(string(b), "\nVmHWM:")
	text, _, _ = strings.Cut(text, "\n")
	return strings.TrimSpace(text)
}
