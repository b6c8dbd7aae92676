package daemon

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"go.uber.org/zap"
)

// obey returns a context that ends with the first SIGINT or SIGTERM, and makes env.Hurry end with the second. After that,
// signals do what they do to any program. stop ends both.
func obey(env *Env) (ctx context.Context, stop func()) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	ctx, first := context.WithCancel(context.Background())
	hurry, second := context.WithCancel(context.Background())
	env.Hurry = hurry
	over := make(chan struct{})
	go func() {
		defer signal.Stop(signals)
		for _, told := range []struct {
			how    string
			cancel context.CancelFunc
		}{{"stopping", first}, {"stopping at once", second}} {
			select {
			case s := <-signals:
				env.Log.Info(told.how, zap.Stringer("signal", s))
				told.cancel()
			case <-over:
				return
			}
		}
	}()
	return ctx, func() { close(over); first(); second() }
}
