package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// ErrDrained is the cause with which the connections that outlive the grace period are cancelled.
var ErrDrained = errors.New("drain period ended")

// lastCall is how long a listener that is told to stop goes on accepting: connections the kernel has made already, or is in
// the middle of making, would be reset by closing it.
const lastCall = 50 * time.Millisecond

// Serve accepts connections until ctx is done, each on a goroutine of its own, serves those that wait at that moment, then
// stops accepting and waits. After grace the context given to handle is cancelled with ErrDrained; Serve returns when
// every handle has. It closes ln. Who closes ln first stops it at once.
//
// A connection that outlasts its handle is added to Scope by that handle; Serve waits for it, and the context lasts, until it is
// taken off.
//
// A failing accept (out of file descriptors, say) is retried with a growing pause. A panic in handle ends its
// connection, not the program.
func Serve(ctx context.Context, ln net.Listener, grace time.Duration, handle func(context.Context, net.Conn)) error {
	var conns sync.WaitGroup
	connCtx, cancel := context.WithCancelCause(context.WithValue(context.WithoutCancel(ctx), scopeKey{}, &conns))
	defer cancel(nil)
	unlink := context.AfterFunc(ctx, func() {
		if d, ok := ln.(interface{ SetDeadline(time.Time) error }); !ok || d.SetDeadline(time.Now().Add(lastCall)) != nil {
			ln.Close()
		}
	})
	defer unlink()
	defer ln.Close()

	err := accept(ctx, ln, func(c net.Conn) {
		conns.Go(func() {
			defer Recover(c)
			handle(connCtx, c)
		})
	})
	ln.Close()
	force := time.AfterFunc(grace, func() { cancel(ErrDrained) })
	defer force.Stop()
	conns.Wait()
	return err
}

// scopeKey is the key of Scope.
type scopeKey struct{}

// Scope is the connections that a Serve waits for, in the context that it gave to handle; nil in any other.
func Scope(ctx context.Context) *sync.WaitGroup {
	conns, _ := ctx.Value(scopeKey{}).(*sync.WaitGroup)
	return conns
}

func accept(ctx context.Context, ln net.Listener, start func(net.Conn)) error {
	pause := time.Duration(0)
	for {
		c, err := ln.Accept()
		if err == nil {
			pause = 0
			start(c)
			continue
		}
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("accept on %s: %w", ln.Addr(), err)
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// Recover is to be deferred by who serves a connection on a goroutine of his own: a panic ends the connection, not the program.
func Recover(c net.Conn) {
	r := recover()
	if r == nil {
		return
	}
	c.Close()
	fmt.Fprintf(os.Stderr, "panic while serving %s: %v\n%s", c.RemoteAddr(), r, debug.Stack())
}

// ServeHTTP serves h on ln until ctx is done.
func ServeHTTP(ctx context.Context, ln net.Listener, h http.Handler) error {
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute}
	unlink := context.AfterFunc(ctx, func() { srv.Close() })
	defer unlink()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Metrics answers with the registry's metrics, in text or OpenMetrics form as the caller accepts.
func Metrics(reg *prometheus.Registry) http.Handler {
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{EnableOpenMetrics: true})
}

// HandlePprof adds Go's profiles below /debug/pprof/.
func HandlePprof(mux *http.ServeMux) {
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
}
