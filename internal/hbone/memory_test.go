package hbone_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/memlimit"
)

// bound is a server whose connections share a budget, with clients that send what nobody reads.
type bound struct {
	*testing.T
	budget  *memlimit.Budget
	release chan struct{}
	srv     *hbone.Server
	peak    atomic.Int64
}

// newBound returns one whose budget is limit; 0: none.
func newBound(t *testing.T, limit int64) *bound {
	b := &bound{T: t, release: make(chan struct{})}
	if limit > 0 {
		b.budget = memlimit.New(limit)
		ctx, stop := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() { b.budget.Run(ctx, zap.NewNop()) })
		t.Cleanup(func() { stop(); running.Wait() })
	}
	b.srv = &hbone.Server{Memory: b.budget, Handle: stalls(b.release)}
	return b
}

// flood has clients, each with a connection of its own, write to streams until nothing more is taken. It returns what was taken.
func (b *bound) flood(to hbone.Target, pools []*hbone.Pool, streams int) int64 {
	b.Helper()
	var taken atomic.Int64
	var wg sync.WaitGroup
	piece := make([]byte, 256<<10)
	for _, p := range pools {
		for range streams {
			s, err := p.Open(b.Context(), to, "stall:80", hbone.Header{})
			if err != nil {
				continue // it was refused
			}
			wg.Go(func() {
				for {
					_ = s.SetWriteDeadline(time.Now().Add(1500 * time.Millisecond)) // for each: a slow machine takes as much
					n, err := s.Write(piece)
					taken.Add(int64(n))
					for held := b.budget.Held(); ; {
						if old := b.peak.Load(); held <= old || b.peak.CompareAndSwap(old, held) {
							break
						}
					}
					if err != nil {
						return
					}
				}
			})
		}
	}
	wg.Wait()
	return taken.Load()
}

// honest sends size bytes through an echo.
func (b *bound) honest(s *hbone.Stream, size int64) {
	b.Helper()
	_ = s.SetDeadline(time.Now().Add(20 * time.Second))
	go func() {
		_, _ = s.Write(make([]byte, size))
		_ = s.CloseWrite()
	}()
	if got, err := io.Copy(io.Discard, s); got != size || err != nil {
		b.Errorf("%d bytes of an honest stream came back, %v; want %d", got, err, size)
	}
}

func (b *bound) pools(n int) (all []*hbone.Pool) {
	for range n {
		all = append(all, newPool(b.T, nil))
	}
	return all
}

// TestTunnelsTogetherHoldNoMoreThanTheBudget: a dozen, each of which may hold as much as all may.
func TestTunnelsTogetherHoldNoMoreThanTheBudget(t *testing.T) {
	t.Parallel()
	const limit = 32 << 20
	for name, budget := range map[string]int64{"with none": 0, "with one": limit} {
		t.Run(name, func(t *testing.T) {
			b := newBound(t, budget)
			addr := serve(t, b.srv)
			defer close(b.release)
			there, late := open(t, newPool(t, nil), addr), newPool(t, nil)
			taken := b.flood(target(addr), b.pools(12), 8)
			if budget == 0 {
				if taken < 3*limit { // or the attack is none
					t.Fatalf("without a budget %d bytes were taken, want more", taken)
				}
				return
			}
			if held := b.budget.Held(); held > limit || held < limit/4 {
				t.Errorf("%d bytes are held, want some of %d", held, limit)
			}
			// On their way are a batch in and one out of each connection.
			if peak := b.peak.Load(); peak > limit+12<<20 {
				t.Errorf("%d bytes were held at once, want no more than about %d", peak, limit)
			}
			if n := b.budget.Ended(); n > 0 {
				t.Errorf("%d streams were ended, want flow control to do it all", n)
			}
			b.honest(there, 32<<20)
			b.honest(open(t, late, addr), 32<<20)
		})
	}
}

// TestWindowsGrantedWhenMemoryWasFree are used all at once, later: then what nobody reads is ended, and nobody else notices.
func TestWindowsGrantedWhenMemoryWasFree(t *testing.T) {
	t.Parallel()
	const limit = 64 << 20
	b := newBound(t, limit)
	addr := serve(t, b.srv)
	there := open(t, newPool(t, nil), addr)
	pools := b.pools(20)
	for _, p := range pools {
		b.honest(open(t, p, addr), 4<<20) // that it has a large window
	}
	taken := b.flood(target(addr), pools, 4)
	if b.budget.Ended() == 0 {
		t.Errorf("no stream was ended, though %d bytes were taken: the test tries nothing", taken)
	}
	if held := b.budget.Held(); held > limit {
		t.Errorf("%d bytes are held, want no more than %d", held, limit)
	}
	if peak := b.peak.Load(); peak > limit+limit/4 {
		t.Errorf("%d bytes were held at once, want about %d", peak, limit)
	}
	b.honest(there, 32<<20)
	close(b.release)
	for _, p := range pools {
		_ = p.Close()
	}
}

// TestEverythingIsGivenBack when connections end, in whatever state.
func TestEverythingIsGivenBack(t *testing.T) {
	t.Parallel()
	b := newBound(t, 32<<20)
	clients := memlimit.New(32 << 20)
	ctx, cancel := context.WithCancel(context.Background())
	ln := listen(t)
	b.srv.TLS = serverTLS()
	var served sync.WaitGroup
	served.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			served.Go(func() { _ = b.srv.ServeConn(ctx, c) })
		}
	})
	var pools []*hbone.Pool
	for range 4 {
		pools = append(pools, newPool(t, func(c *hbone.PoolConfig) { c.Memory = clients }))
	}
	to := target(addrOf(ln))
	b.flood(to, pools, 3)
	pools = append(pools, newPool(t, func(c *hbone.PoolConfig) { c.Memory = clients }))
	b.honest(open(t, pools[4], to.Addr), 1<<20)
	_ = pools[0].Close()
	cancel()
	close(b.release)
	_ = ln.Close()
	served.Wait()
	for _, p := range pools {
		_ = p.Close()
	}
	if b.budget.Held() != 0 || clients.Held() != 0 {
		t.Errorf("the server holds %d bytes, its clients %d, when all is over", b.budget.Held(), clients.Held())
	}
}

// TestConnectionsAreRefusedWhenMemoryIsShort, before anything is made of them.
func TestConnectionsAreRefusedWhenMemoryIsShort(t *testing.T) {
	t.Parallel()
	b := newBound(t, 32<<20)
	addr := serve(t, b.srv)
	defer close(b.release)
	there := open(t, newPool(t, nil), addr)
	b.budget.Charge(30 << 20)
	if s, err := newPool(t, nil).Open(t.Context(), target(addr), "10.0.0.1:80", hbone.Header{}); err == nil {
		t.Errorf("a connection was taken: %v", s)
	}
	if b.budget.Refused() == 0 {
		t.Error("no connection was refused")
	}
	b.honest(there, 1<<20)
	b.budget.Release(30 << 20)
	b.honest(open(t, newPool(t, nil), addr), 1<<20)
}

// TestABudgetDoesNotSlowAFastTransfer: how many round trips it takes is what windows make of it.
func TestABudgetDoesNotSlowAFastTransfer(t *testing.T) {
	const size, streams = 64 << 20, 8
	trips := func(budget *memlimit.Budget) (n, second int) {
		synctest.Test(t, func(t *testing.T) {
			srv := &hbone.Server{TLS: serverTLS(), Memory: budget, Handle: func(_ context.Context, r *hbone.Request) {
				if s, err := r.Accept(""); err == nil {
					_, _ = io.Copy(io.Discard, s)
				}
			}}
			near, far := memPipe()
			ctx, cancel := context.WithCancel(context.Background())
			var served sync.WaitGroup
			served.Go(func() { _ = srv.ServeConn(ctx, far) })
			tc := tls.Client(near, clientTLS())
			if err := tc.Handshake(); err != nil {
				t.Fatal(err)
			}
			w := newWire(t, tc)
			defer func() { near.Close(); cancel(); served.Wait(); w.busy.Wait() }()
			_, _ = io.WriteString(tc, http2.ClientPreface)
			_ = w.WriteSettings()
			w.listen()
			windows := map[uint32]int{0: 65535}
			hear := func() {
				for _, s := range w.take() {
					var id uint32
					var more int
					if k, _ := fmt.Sscanf(strings.TrimPrefix(s, "WINDOW_UPDATE "), "%d +%d", &id, &more); k == 2 {
						windows[id] += more
					}
				}
			}
			for i := range uint32(streams) {
				w.connect(2*i + 1)
				windows[2*i+1] = 4 << 20
			}
			hear()
			piece := make([]byte, 64<<10)
			for sent := 0; sent < size; n++ {
				for i := range uint32(streams) {
					for k := 1; k > 0; {
						id := 2*i + 1
						k = min(len(piece), windows[0], windows[id])
						if k > 0 {
							_ = w.WriteData(id, false, piece[:k])
						}
						windows[0] -= k
						windows[id] -= k
						sent += k
					}
				}
				hear()
				if n == 0 {
					second = windows[0]
				}
			}
		})
		return n, second
	}
	with, second := trips(memlimit.New(512 << 20))
	if second < 16<<20-memlimit.FirstWindow/2 {
		t.Errorf("after the first window was used there are %d bytes, want as many as without a budget", second)
	}
	// A window is given again when half of it is used, at the latest: that is the most there can be without a budget, and the
	// first window is one more. How many there are below that is for the scheduler.
	if most := size/(16<<20/2) + 1; with > most {
		t.Errorf("%d MiB take %d round trips, want no more than %d", size>>20, with, most)
	}
	if small, _ := trips(memlimit.New(8 << 20)); small <= 4*with {
		t.Error("a budget that is too small changes nothing: the test sees nothing")
	}
}
