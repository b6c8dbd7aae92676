package hbone_test

import (
	"context"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/hbone"
)

// TestAStreamSaysThatItsConnectionDrains, to who would begin something new on it, while it goes on.
func TestAStreamSaysThatItsConnectionDrains(t *testing.T) {
	for name, leave := range map[string]func(p *peers, w *wire){
		"GOAWAY":                  func(_ *peers, w *wire) { w.WriteGoAway(1<<31-1, http2.ErrCodeNo, nil) },
		"GOAWAY that refuses it":  func(_ *peers, w *wire) { w.WriteGoAway(0, http2.ErrCodeNo, nil) },
		"our own pool is emptied": func(p *peers, _ *wire) { p.pool.CloseTargets(func(hbone.Target) bool { return true }) },
	} {
		t.Run(name, func(t *testing.T) {
			fromClient(t, nil, func(t *testing.T, p *peers) {
				r := p.open()
				w := p.next()
				w.headers(1, false, ":status", "200")
				s := p.must(r)
				defer s.Close()
				if s.Draining() {
					t.Error("Draining() = true, want false: nobody has said so")
				}
				leave(p, w)
				synctest.Wait()
				if !s.Draining() {
					t.Error("Draining() = false, want true")
				}
			})
		})
	}
}

// TestAServersStreamSaysThatItsConnectionDrains likewise.
func TestAServersStreamSaysThatItsConnectionDrains(t *testing.T) {
	said := make(chan *hbone.Stream, 1)
	srv := &hbone.Server{Handle: func(ctx context.Context, r *hbone.Request) {
		s, err := r.Accept("")
		if err != nil {
			t.Error(err)
			return
		}
		said <- s
		<-ctx.Done()
	}}
	toServer(t, srv, func(t *testing.T, w *wire) {
		w.accepted(1)
		s := <-said
		if s.Draining() {
			t.Error("Draining() = true, want false: nobody has said so")
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- srv.Shutdown(ctx) }()
		synctest.Wait()
		if !s.Draining() {
			t.Error("Draining() = false, want true")
		}
		cancel()
		<-done
	})
}
