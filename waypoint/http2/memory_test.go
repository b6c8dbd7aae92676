package http2_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	xhttp2 "golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/memlimit"
	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/http2"
)

// sender is a client that sends all that it is allowed.
type sender struct {
	*wire
	windows map[uint32]int
	ended   int // streams that the server reset
}

// senders runs test with n clients, each with a connection of its own, of a server whose connections share a budget of limit bytes,
// or with 0 have none. In the end everything must have been given back.
func senders(t *testing.T, limit int64, n int, test func(t *testing.T, budget *memlimit.Budget, all []*sender)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var budget *memlimit.Budget
		if limit > 0 {
			budget = memlimit.New(limit)
		}
		sendTo(t, budget, n, func(t *testing.T, all []*sender) { test(t, budget, all) })
	})
}

func sendTo(t *testing.T, budget *memlimit.Budget, n int, test func(t *testing.T, all []*sender)) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	var served sync.WaitGroup
	if budget != nil {
		served.Go(func() { budget.Run(ctx, zap.NewNop()) })
	}
	var all []*sender
	for range n {
		near, far := memPipe()
		c := http2.NewServerConn(far, http2.Config{Memory: budget})
		served.Go(func() { _ = c.Serve(func() func(*http2.ServerStream) { return stall }) })
		s := &sender{wire: newWire(t, near), windows: map[uint32]int{0: 65535}}
		_, _ = io.WriteString(near, xhttp2.ClientPreface)
		_ = s.WriteSettings()
		s.listen()
		s.hear()
		all = append(all, s)
	}
	test(t, all)
	for _, s := range all {
		_ = s.conn.Close()
		s.busy.Wait()
	}
	stop()
	served.Wait()
	if held := budget.Held(); held != 0 {
		t.Errorf("%d bytes are held when all is over", held)
	}
}

// hear notes what came.
func (s *sender) hear() {
	for _, f := range s.take() {
		var id uint32
		var n int
		if k, _ := fmt.Sscanf(f, "WINDOW_UPDATE %d +%d", &id, &n); k == 2 {
			s.windows[id] += n
		}
		if strings.HasSuffix(f, "ENHANCE_YOUR_CALM") {
			s.ended++
		}
	}
}

// post opens streams, from the one of that number on.
func (s *sender) post(from uint32, streams int, path string) {
	for i := range uint32(streams) {
		id := from + 2*i
		s.headers(id, false, ":method", "POST", ":scheme", "http", ":authority", "cart", ":path", path)
		s.windows[id] = 256 << 10
	}
	s.hear()
}

// fill sends to these streams until no window is left, but no more than most, and returns how much that was and how often it had to
// wait.
func (s *sender) fill(from uint32, streams, most int) (sent, waits int) {
	piece := make([]byte, 16384)
	for {
		before := sent
		for i := range uint32(streams) {
			id := from + 2*i
			for sent < most {
				k := min(len(piece), s.windows[0], s.windows[id], most-sent)
				if k <= 0 {
					break
				}
				_ = s.WriteData(id, false, piece[:k])
				s.windows[0] -= k
				s.windows[id] -= k
				sent += k
			}
		}
		s.hear()
		if waits++; sent == before || sent == most {
			return sent, waits
		}
	}
}

// stall serves /stall until its client is gone without reading anything, and reads all that others send.
func stall(st *http2.ServerStream) {
	q, _ := st.Request()
	if q.Path == "/stall" {
		<-st.Done()
		return
	}
	for {
		if _, err := q.Body.Next(); err == io.EOF {
			_ = st.Reply(200, "", nil)
			return
		} else if err != nil {
			return
		}
	}
}

// honest sends a body, on the stream of that number, and expects to be answered.
func (s *sender) honest(id uint32, size int) {
	s.t.Helper()
	s.post(id, 1, "/")
	sent, _ := s.fill(id, 1, size)
	_ = s.WriteData(id, true, nil)
	got := s.take()
	if sent != size || len(got) == 0 || got[len(got)-1] != fmt.Sprintf("HEADERS %d 200 end", id) {
		s.t.Errorf("an honest request of %d bytes was allowed %d and answered %q", size, sent, got)
	}
}

// TestConnectionsTogetherHoldNoMoreThanTheBudget: a dozen, each of which may hold as much as all may.
func TestConnectionsTogetherHoldNoMoreThanTheBudget(t *testing.T) {
	const limit, attackers = 8 << 20, 12
	for name, bytes := range map[string]int64{"with none": 0, "with one": limit} {
		t.Run(name, func(t *testing.T) {
			senders(t, bytes, attackers+2, func(t *testing.T, budget *memlimit.Budget, all []*sender) {
				total := 0
				all[0].honest(1, 64<<10)
				for _, s := range all[2:] {
					s.post(1, 32, "/stall")
					n, _ := s.fill(1, 32, 1<<30)
					total += n
				}
				if budget == nil {
					if total < 10*limit { // or the attack is none
						t.Errorf("without a budget %d bytes were taken, want more", total)
					}
					return
				}
				if held := budget.Held(); held > limit || held < limit/4 {
					t.Errorf("%d bytes are held, want some of %d", held, limit)
				}
				if n := budget.Ended(); n > 0 {
					t.Errorf("%d streams were ended, want flow control to do it all", n)
				}
				all[0].honest(3, 4<<20)
				all[1].honest(1, 4<<20)
			})
		})
	}
}

// TestWindowsGrantedWhenMemoryWasFree are used all at once, later: then what nobody reads is ended, and nobody else notices.
func TestWindowsGrantedWhenMemoryWasFree(t *testing.T) {
	const limit = 16 << 20
	senders(t, limit, 14, func(t *testing.T, budget *memlimit.Budget, all []*sender) {
		for _, s := range all {
			s.honest(1, 256<<10) // that it has a large window
		}
		ended := 0
		for _, s := range all[2:] {
			s.post(3, 32, "/stall")
			s.fill(3, 32, 1<<30)
			time.Sleep(10 * time.Millisecond) // what was begun must be over
			if held := budget.Held(); held > limit {
				t.Errorf("%d bytes are held, want no more than %d", held, limit)
			}
		}
		for _, s := range all[2:] {
			s.hear()
			ended += s.ended
		}
		if ended == 0 || uint64(ended) != budget.Ended() {
			t.Errorf("clients saw %d streams end, of %d", ended, budget.Ended())
		}
		all[0].honest(3, 4<<20)
		all[1].honest(3, 4<<20)
	})
}

// TestResponsesThatNobodyReads are whole, and the streams they came on are over: they are let go all the same.
func TestResponsesThatNobodyReads(t *testing.T) {
	const limit, streams, size = 16 << 20, 8, 128 << 10
	synctest.Test(t, func(t *testing.T) {
		budget := memlimit.New(limit)
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { budget.Run(ctx, zap.NewNop()) })
		upstreamOf(t, http2.Config{Memory: budget}, func(t *testing.T, w *wire, c *http2.ClientConn) {
			var all []*http2.ClientStream
			for i := range uint32(streams) {
				all = append(all, begin(t, c, asked(t, getText)))
				w.take()
				w.headers(2*i+1, false, ":status", "200")
				for n := 0; n < size; n += 16384 {
					_ = w.WriteData(2*i+1, n+16384 == size, make([]byte, 16384))
				}
				synctest.Wait()
			}
			if held := budget.Held(); held < streams*size {
				t.Errorf("%d bytes are held, want at least %d", held, streams*size)
			}
			for i, st := range all {
				if i == streams/2 {
					budget.Charge(limit)
					synctest.Wait()
				}
				n, err := read(st)
				e, _ := errors.AsType[*http1.Error](err)
				if i < streams/2 && (err != nil || n != size) || i >= streams/2 && (e == nil || e.Reason != http1.Overload) {
					t.Errorf("response %d ended after %d bytes with %v", i, n, err)
				}
				st.Free()
			}
			if n := budget.Ended(); n != streams/2 {
				t.Errorf("%d streams were ended, want %d", n, streams/2)
			}
			budget.Release(limit)
		})
		stop()
		running.Wait()
		if held := budget.Held(); held != 0 {
			t.Errorf("%d bytes are held when all is over", held)
		}
	})
}

// read reads a response to its end.
func read(st *http2.ClientStream) (n int, err error) {
	p, err := st.ReadResponse()
	if err != nil {
		return 0, err
	}
	for {
		b, err := p.Body.Next()
		if n += len(b); err == io.EOF {
			return n, nil
		} else if err != nil {
			return n, err
		}
	}
}

// TestABudgetDoesNotSlowAFastTransfer: how often a client has to wait is what windows make of it.
func TestABudgetDoesNotSlowAFastTransfer(t *testing.T) {
	const size, streams = 32 << 20, 32
	waits := func(limit int64) (n int) {
		senders(t, limit, 1, func(t *testing.T, _ *memlimit.Budget, all []*sender) {
			all[0].post(1, streams, "/")
			var sent int
			if sent, n = all[0].fill(1, streams, size); sent != size {
				t.Errorf("%d bytes were allowed, want %d", sent, size)
			}
		})
		return n
	}
	without, with := waits(0), waits(512<<20)
	if with > without+2 { // one for the first window, one for where the last ends
		t.Errorf("%d MiB take %d waits, %d without a budget: want no more, but for the first window", size>>20, with, without)
	}
	if small := waits(4 << 20); small <= 2*with {
		t.Errorf("a budget that is too small changes nothing (%d waits): the test sees nothing", small)
	}
}

// TestNoStreamsAboveTheLimit: they are refused, so that they can be asked for elsewhere.
func TestNoStreamsAboveTheLimit(t *testing.T) {
	senders(t, 1<<20, 1, func(t *testing.T, budget *memlimit.Budget, all []*sender) {
		all[0].honest(1, 1000)
		budget.Charge(1 << 20)
		all[0].get(3)
		all[0].expect("RST_STREAM 3 REFUSED_STREAM")
		budget.Release(1 << 20)
		all[0].honest(5, 1000)
	})
}
