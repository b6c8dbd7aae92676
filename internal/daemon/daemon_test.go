package daemon_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/daemon"
)

func TestFlagsComeFromArgumentsThenEnvironment(t *testing.T) {
	env := func(vars map[string]string) func(string) (string, bool) {
		return func(k string) (string, bool) { v, ok := vars[k]; return v, ok }
	}
	tests := []struct {
		name string
		args []string
		env  map[string]string
		want string
		err  string
	}{
		{name: "default", want: "here"},
		{name: "environment", env: map[string]string{"PLACE": "env"}, want: "env"},
		{name: "argument wins", args: []string{"-place=arg"}, env: map[string]string{"PLACE": "env"}, want: "arg"},
		{name: "empty variable is no value", env: map[string]string{"PLACE": ""}, want: "here"},
		{name: "near miss", args: []string{"-plaec=x"}, err: "did you mean -place?"},
		{name: "stray word", args: []string{"x"}, err: `unexpected argument "x"`},
		{name: "bad variable names itself", env: map[string]string{"WAIT": "soon"}, err: `environment variable WAIT="soon"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			fs := daemon.NewFlagSet("prog")
			var place string
			var wait time.Duration
			fs.StringVar(&place, "place", "here", "PLACE", "where")
			fs.DurationVar(&wait, "wait", 0, "WAIT", "how long")
			err := fs.Parse(tt.args, env(tt.env))
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("Parse(%v) error = %v, want %q in it", tt.args, err, tt.err)
				}
				return
			}
			if err != nil || place != tt.want {
				t.Fatalf("Parse(%v) = %q, %v, want %q", tt.args, place, err, tt.want)
			}
		})
	}
}

func TestPlainLogLine(t *testing.T) {
	var out bytes.Buffer
	log, _, err := daemon.NewLogger(&out, daemon.LogOptions{Level: "info,noisy=error"})
	if err != nil {
		t.Fatal(err)
	}
	log.Named("access").With(zap.String("src.addr", "10.0.0.1:5")).Info("connection complete",
		zap.Int("bytes_sent", 7), zap.Skip(), zap.Error(errors.New("it said \"no\"")), zap.Duration("duration", 3*time.Millisecond))
	log.Named("noisy").Info("not wanted")
	log.Debug("not wanted")
	_, line, _ := strings.Cut(out.String(), "\t")
	want := "info\taccess\tconnection complete\tsrc.addr=\"10.0.0.1:5\" bytes_sent=7 error=\"it said \\\"no\\\"\" duration=\"3ms\"\n"
	if diff := cmp.Diff(want, line); diff != "" {
		t.Errorf("log line (-want +got):\n%s", diff)
	}
}

func TestUnknownLogSettingsAreRefused(t *testing.T) {
	for _, o := range []daemon.LogOptions{{Level: "loud"}, {Format: "xml"}, {Level: "info,x=loud"}} {
		if _, _, err := daemon.NewLogger(io.Discard, o); err == nil {
			t.Errorf("NewLogger(%+v) = nil error, want one", o)
		}
	}
}

func TestReadinessNamesWhatIsMissing(t *testing.T) {
	r := daemon.NewReadiness()
	r.Pending("proxy")
	r.Pending("dns proxy")
	w := httptest.NewRecorder()
	r.ServeHTTP(w, nil)
	if got := w.Body.String(); w.Code != 500 || got != "not ready, pending: dns proxy, proxy\n" {
		t.Errorf("pending: %d %q", w.Code, got)
	}
	r.Done("proxy")
	r.Done("dns proxy")
	w = httptest.NewRecorder()
	r.ServeHTTP(w, nil)
	if w.Code != 200 {
		t.Errorf("done: status %d, want 200", w.Code)
	}
}

func TestServeDrains(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	started, cause := make(chan bool, 1), make(chan error, 1)
	done := make(chan error, 1)
	go func() {
		done <- daemon.Serve(ctx, ln, time.Millisecond, func(ctx context.Context, c net.Conn) {
			defer c.Close()
			started <- true
			<-ctx.Done()
			cause <- context.Cause(ctx)
		})
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	<-started
	cancel()
	if got := <-cause; !errors.Is(got, daemon.ErrDrained) {
		t.Errorf("cause = %v, want ErrDrained", got)
	}
	if err := <-done; err != nil {
		t.Errorf("Serve = %v, want nil", err)
	}
	if _, err := net.Dial("tcp", ln.Addr().String()); err == nil {
		t.Error("the listener is still open after Serve returned")
	}
}

// TestServeWaitsForItsScope: a connection that outlasts its handle is waited for, and its context lasts until then.
func TestServeWaitsForItsScope(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := lateListener{give: make(chan net.Conn)}
		ctx, cancel := context.WithCancel(t.Context())
		var scope context.Context
		done := make(chan error, 1)
		go func() {
			done <- daemon.Serve(ctx, ln, time.Hour, func(ctx context.Context, _ net.Conn) {
				daemon.Scope(ctx).Add(1)
				scope = ctx
			})
		}()
		near, far := net.Pipe()
		defer near.Close()
		ln.give <- far
		synctest.Wait() // its handle has returned
		cancel()
		close(ln.give)
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("Serve = %v while its scope holds a connection", err)
		default:
		}
		if scope.Err() != nil {
			t.Errorf("the context of a connection that lasts: %v", scope.Err())
		}
		daemon.Scope(scope).Done()
		if err := <-done; err != nil {
			t.Errorf("Serve = %v", err)
		}
		if daemon.Scope(t.Context()) != nil {
			t.Error("a context of somebody else has a scope")
		}
	})
}

// lateListener hands out one connection, when it is told to.
type lateListener struct {
	net.Listener
	give chan net.Conn
}

func (l lateListener) Accept() (net.Conn, error) {
	c, ok := <-l.give
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (l lateListener) SetDeadline(time.Time) error { return nil }
func (l lateListener) Close() error                { return nil }

func TestServeTakesWhatWaitsWhenItIsToldToStop(t *testing.T) {
	ln := lateListener{give: make(chan net.Conn)}
	ctx, cancel := context.WithCancel(t.Context())
	done, served := make(chan error, 1), make(chan string, 1)
	go func() {
		done <- daemon.Serve(ctx, ln, time.Minute, func(_ context.Context, c net.Conn) {
			defer c.Close()
			b, _ := io.ReadAll(c)
			served <- string(b)
		})
	}()
	cancel()
	near, far := net.Pipe()
	ln.give <- far
	if _, err := io.WriteString(near, "in time"); err != nil {
		t.Fatal(err)
	}
	near.Close()
	if got := <-served; got != "in time" {
		t.Errorf("the connection that waited said %q", got)
	}
	close(ln.give)
	if err := <-done; err != nil {
		t.Errorf("Serve = %v, want nil", err)
	}
}

func TestAPanicEndsOneConnectionOnly(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go daemon.Serve(t.Context(), ln, 0, func(_ context.Context, c net.Conn) {
		b := make([]byte, 1)
		c.Read(b)
		if b[0] == '!' {
			panic("asked to")
		}
		c.Write(b)
		c.Close()
	})
	for _, tt := range []struct{ send, want string }{{"!", ""}, {"a", "a"}} {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, tt.send)
		got, _ := io.ReadAll(c)
		c.Close()
		if string(got) != tt.want {
			t.Errorf("after %q got %q, want %q", tt.send, got, tt.want)
		}
	}
}
