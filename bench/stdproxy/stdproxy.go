// Package stdproxy is what the standard library gives for free: a reverse proxy of net/http and httputil, HTTP/1.1 and HTTP/2 without
// TLS, tuned as its documentation says. It is a contender of the bench, not a part of the mesh.
package stdproxy

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"sync"
	"time"
)

// copyBytes is the size of a buffer for bodies: what httputil allocates by itself for each.
const copyBytes = 32 << 10

// Main is the command line: it proxies to -to whatever comes to -http1 and -http2 until ctx is done.
func Main(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("stdproxy", flag.ContinueOnError)
	to := fs.String("to", "", "address and port of the server")
	one, two := fs.String("http1", "", "address to listen on for HTTP/1.1"), fs.String("http2", "", "address to listen on for HTTP/2")
	if err := fs.Parse(args); err != nil {
		return err
	}
	return Serve(ctx, *to, *one, *two)
}

// Serve proxies HTTP/1.1 that comes to the address one, and HTTP/2 without TLS that comes to two, in the same protocol until ctx is done.
func Serve(ctx context.Context, to, one, two string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	errs := make(chan error, 2) // one for each listener
	for addr, protocols := range map[string]*http.Protocols{one: only((*http.Protocols).SetHTTP1), two: only((*http.Protocols).SetUnencryptedHTTP2)} {
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
		if err != nil {
			return errors.Join(err, stopped(cancel, &wg))
		}
		srv := &http.Server{Handler: handler(to, protocols), Protocols: protocols, ReadHeaderTimeout: time.Minute}
		wg.Go(func() {
			defer cancel()
			if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
				errs <- fmt.Errorf("serve %s: %w", addr, err)
			}
		})
		context.AfterFunc(ctx, func() { _ = srv.Close() })
	}
	wg.Wait()
	close(errs)
	return <-errs
}

func stopped(cancel context.CancelFunc, wg *sync.WaitGroup) error {
	cancel()
	wg.Wait()
	return nil
}

func only(set func(*http.Protocols, bool)) *http.Protocols {
	p := new(http.Protocols)
	set(p, true)
	return p
}

func handler(to string, protocols *http.Protocols) http.Handler {
	p := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", to
			r.Out.Host = r.In.Host
		},
		Transport:  &http.Transport{Protocols: protocols, MaxIdleConnsPerHost: 1024, IdleConnTimeout: 10 * time.Minute, DisableCompression: true},
		BufferPool: &buffers{pool: sync.Pool{New: func() any { return new([copyBytes]byte) }}},
		ErrorLog:   log.Default(),
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A server that answers while the request is still coming has, without this, the rest of it taken away (net/http).
		_ = http.NewResponseController(w).EnableFullDuplex() // HTTP/2 has it, and need not be asked
		p.ServeHTTP(w, r)
	})
}

// buffers implements httputil.BufferPool.
type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte { return b.pool.Get().(*[copyBytes]byte)[:] }

func (b *buffers) Put(p []byte) { b.pool.Put((*[copyBytes]byte)(p)) }
