package demoapp

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// web serves HTTP until ctx is done. It answers with its name; /flaky fails every other time with 503, /slow takes slowness;
// /healthz fails from a request of /sick on until one of /well.
func web(ctx context.Context, name, addr string, out io.Writer) error {
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "listening on", ln.Addr())
	var flaky atomic.Uint64
	var sick atomic.Bool
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, name) })
	mux.HandleFunc("/flaky", func(w http.ResponseWriter, _ *http.Request) {
		if flaky.Add(1)%2 == 1 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		fmt.Fprintln(w, name)
	})
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if sick.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		fmt.Fprintln(w, name)
	})
	for page, isSick := range map[string]bool{"/sick": true, "/well": false} {
		mux.HandleFunc(page, func(w http.ResponseWriter, _ *http.Request) {
			sick.Store(isSick)
			fmt.Fprintln(w, name)
		})
	}
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(slowness):
		case <-r.Context().Done():
		}
		fmt.Fprintln(w, name)
	})
	s := &http.Server{Handler: mux, ReadHeaderTimeout: dialTimeout}
	unlink := context.AfterFunc(ctx, func() { s.Close() })
	defer unlink()
	if err := s.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// slowness is how long /slow takes.
const slowness = 3 * time.Second

// get sends n requests, at most parallel of them at a time, and prints how often each answer came: "COUNT STATUS BODY", the
// most frequent first; then how long the slowest took.
func get(ctx context.Context, url, n, parallel string, headers []string, out io.Writer) error {
	requests, err := strconv.Atoi(n)
	if err != nil || requests < 1 {
		return fmt.Errorf("%q: want a number of requests", n)
	}
	workers, err := strconv.Atoi(parallel)
	if err != nil || workers < 1 {
		return fmt.Errorf("%q: want how many requests to send at a time", parallel)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	for _, h := range headers {
		name, value, found := strings.Cut(h, ":")
		if !found {
			return fmt.Errorf("%q: want a header as NAME: VALUE", h)
		}
		req.Header.Add(name, strings.TrimSpace(value))
	}
	client := &http.Client{
		Transport:     &http.Transport{MaxIdleConnsPerHost: workers},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       2 * slowness,
	}
	defer client.CloseIdleConnections()
	t := tally{count: make(map[string]int)}
	var left atomic.Int64
	left.Store(int64(requests))
	var all sync.WaitGroup
	for range min(workers, requests) {
		all.Go(func() {
			for left.Add(-1) >= 0 {
				start := time.Now()
				t.add(answer(client, req), time.Since(start))
			}
		})
	}
	all.Wait()
	t.print(out)
	return nil
}

// answer sends one request and describes what came: the status and the first line of the body, or the error.
func answer(client *http.Client, req *http.Request) string {
	resp, err := client.Do(req.Clone(req.Context()))
	if err != nil {
		return "error " + err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return "error " + err.Error()
	}
	first, _, _ := strings.Cut(string(body), "\n")
	return strings.TrimSpace(strconv.Itoa(resp.StatusCode) + " " + first)
}

// tally counts answers.
type tally struct {
	mu      sync.Mutex
	count   map[string]int
	slowest time.Duration
}

func (t *tally) add(answer string, took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.count[answer]++
	t.slowest = max(t.slowest, took)
}

func (t *tally) print(out io.Writer) {
	answers := slices.SortedFunc(maps.Keys(t.count), func(a, b string) int {
		return cmp.Or(cmp.Compare(t.count[b], t.count[a]), cmp.Compare(a, b))
	})
	for _, a := range answers {
		fmt.Fprintln(out, t.count[a], a)
	}
	fmt.Fprintln(out, "slowest", t.slowest.Round(time.Millisecond))
}
