package hbone_test

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/hbone"
)

// stalls serves tunnels to stall, which it does not read until release is closed, and to anything else as an echo.
func stalls(release <-chan struct{}) func(context.Context, *hbone.Request) {
	return func(ctx context.Context, r *hbone.Request) {
		if r.Authority != "stall:80" {
			echo(ctx, r)
			return
		}
		if _, err := r.Accept(""); err == nil {
			<-release
		}
	}
}

// flood opens streams that nobody reads and writes to them until nothing more is taken. It returns them and how much was.
func flood(t *testing.T, p *hbone.Pool, to hbone.Target, streams int) (all []*hbone.Stream, taken int64) {
	t.Helper()
	var n atomic.Int64
	var wg sync.WaitGroup
	piece := make([]byte, 1<<20)
	for range streams {
		s, err := p.Open(t.Context(), to, "stall:80", hbone.Header{})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
		wg.Go(func() {
			for {
				_ = s.SetWriteDeadline(time.Now().Add(2 * time.Second)) // for each: a slow machine takes as much
				k, err := s.Write(piece)
				if n.Add(int64(k)); err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return all, n.Load()
}

// TestStreamsThatNobodyReadsLeaveTheOthersAlone when they have ended: what they held is allowed to the connection again.
func TestStreamsThatNobodyReadsLeaveTheOthersAlone(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(release chan struct{}, all []*hbone.Stream){
		"the server closes them": func(release chan struct{}, _ []*hbone.Stream) { close(release) },
		"the client resets them": func(release chan struct{}, all []*hbone.Stream) {
			for _, s := range all {
				_ = s.Reset()
			}
			close(release)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			release := make(chan struct{})
			srv := &hbone.Server{Handle: stalls(release)}
			addr, p := serve(t, srv), newPool(t, nil)
			other := open(t, p, addr)
			all, taken := flood(t, p, target(addr), 24)
			if taken < 64<<20 {
				t.Fatalf("only %d bytes were taken: nothing is withheld", taken)
			}
			end(release, all)
			const size = 8 << 20                                   // far more than what is left to the connection
			_ = other.SetDeadline(time.Now().Add(8 * time.Second)) // less than pings are apart
			go func() {
				_, _ = other.Write(make([]byte, size))
				_ = other.CloseWrite()
			}()
			if got, err := io.Copy(io.Discard, other); got != size || err != nil {
				t.Errorf("%d bytes of another stream came back, %v; want %d", got, err, size)
			}
		})
	}
}
