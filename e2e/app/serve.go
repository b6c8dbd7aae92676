package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// addresses are where serve listens; without grpc it does not speak that.
type addresses struct{ web, echo, grpc string }

// probes are the pages that answer probes, each with the gRPC service that says the same.
var probes = map[string]string{"/healthz": "liveness", "/readyz": "readiness"}

var errTold = errors.New("told to fail")

// server is one that runs.
type server struct {
	name   string
	health *health.Server
	exit   chan struct{}
	conns  sync.WaitGroup
}

// serve runs all servers until one fails or ctx has ended and the time to drain with it.
func serve(ctx context.Context, at addresses, out io.Writer) error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	var drain time.Duration
	if text := os.Getenv("DRAIN"); text != "" {
		if drain, err = time.ParseDuration(text); err != nil {
			return fmt.Errorf("DRAIN: %w", err)
		}
	}
	s := &server{name: name, health: health.NewServer(), exit: make(chan struct{}, 1)} // one POST is enough
	echo, err := (&net.ListenConfig{}).Listen(ctx, "tcp", at.echo)
	if err != nil {
		return err
	}
	defer echo.Close()
	udp, err := (&net.ListenConfig{}).ListenPacket(ctx, "udp", echo.Addr().String())
	if err != nil {
		return err
	}
	defer udp.Close()
	web, err := (&net.ListenConfig{}).Listen(ctx, "tcp", at.web)
	if err != nil {
		return err
	}
	defer web.Close()
	said := fmt.Sprint(name, " serves HTTP on ", web.Addr(), " and echoes on ", echo.Addr())
	calls := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(calls, s.health)
	if at.grpc != "" {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", at.grpc)
		if err != nil {
			return err
		}
		said += fmt.Sprint(" and answers calls on ", l.Addr())
		s.conns.Go(func() { _ = calls.Serve(l) }) // until it is stopped
	}
	pages := &http.Server{Handler: s.pages(), ReadHeaderTimeout: requestTimeout}
	// From here on life ends the servers, not ctx.
	life, end := context.WithCancelCause(context.WithoutCancel(ctx))
	s.conns.Go(func() {
		select {
		case <-s.exit:
			end(errTold)
		case <-life.Done():
		case <-ctx.Done():
			select {
			case <-time.After(drain):
			case <-s.exit:
				end(errTold)
			case <-life.Done():
			}
			end(nil) // unless it has ended
		}
		calls.Stop()
		_, _ = echo.Close(), udp.Close()
		// Answers that are being written are written.
		bound, cancel := context.WithTimeout(context.WithoutCancel(life), requestTimeout)
		defer cancel()
		_ = pages.Shutdown(bound)
	})
	s.conns.Go(func() { answerDatagrams(udp, name) })
	s.conns.Go(func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return // closed
			}
			s.conns.Go(func() { greet(life, c, name) })
		}
	})
	fmt.Fprintln(out, said)
	err = pages.Serve(web)
	end(err)
	s.conns.Wait()
	if errors.Is(context.Cause(life), errTold) {
		return errTold
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// pages says whom it sees, and answers probes; a POST of "false" or "true" to a probe's page sets what that answers, and
// what the gRPC service of the same meaning does.
func (s *server) pages() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s node=%s sees=%s host=%s\n", s.name, os.Getenv("NODE"), hostOf(r.RemoteAddr), r.Host)
	})
	// It reads as long as its client does; the server's end does not wait for it.
	mux.Handle("/socket", websocket.Server{Handler: func(c *websocket.Conn) { _, _ = io.Copy(c, c) }})
	for page, service := range probes {
		s.health.SetServingStatus(service, grpc_health_v1.HealthCheckResponse_SERVING)
		var failing atomic.Bool
		mux.HandleFunc(page, func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost {
				body, _ := io.ReadAll(io.LimitReader(r.Body, 16))
				failing.Store(string(body) == "false")
				status := grpc_health_v1.HealthCheckResponse_SERVING
				if failing.Load() {
					status = grpc_health_v1.HealthCheckResponse_NOT_SERVING
				}
				s.health.SetServingStatus(service, status)
			} else if failing.Load() {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			fmt.Fprintln(w, !failing.Load())
		})
	}
	mux.HandleFunc("POST /exit", func(http.ResponseWriter, *http.Request) {
		select {
		case s.exit <- struct{}{}:
		default:
		}
	})
	return mux
}

// answerDatagrams says to each sender whom it sees, and what it got.
func answerDatagrams(c net.PacketConn, name string) {
	buf := make([]byte, 1500)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return // closed
		}
		_, _ = c.WriteTo(fmt.Appendf(nil, "%s sees=%s got=%s\n", name, hostOf(from.String()), buf[:n]), from)
	}
}

func greet(ctx context.Context, c net.Conn, name string) {
	defer c.Close()
	unlink := context.AfterFunc(ctx, func() { c.Close() })
	defer unlink()
	if _, err := fmt.Fprintf(c, "%s sees=%s\n", name, hostOf(c.RemoteAddr().String())); err == nil {
		_, _ = io.Copy(c, c)
	}
}

func hostOf(addr string) string {
	host, _, _ := net.SplitHostPort(addr)
	return strings.TrimPrefix(host, "::ffff:")
}
