package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/cni/plugin"
)

const (
	// addWithin is how long an ADD may take: a little less than the plugin waits, so that it learns why.
	addWithin = plugin.Timeout - 500*time.Millisecond
	// delWithin is less: DEL must not hold a pod's end up, and the worker goes on by itself.
	delWithin    = 2 * time.Second
	maxBodyBytes = 1 << 20
)

// listenPlugin makes the socket for plugins, for root alone, over the one an earlier agent left.
func listenPlugin(runDir string) (net.Listener, error) {
	path := filepath.Join(runDir, plugin.SocketName)
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: another agent answers there; stop it, or give this one its own run directory", path)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("listen on %s: the file is there and is no socket", path)
	}
	// The socket is made where nobody else may look, and moved when its mode is right.
	private, err := os.MkdirTemp(runDir, ".socket-*")
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	defer os.RemoveAll(private)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(private, "s"), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	ln.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(filepath.Join(private, "s"), 0o600), os.Rename(filepath.Join(private, "s"), path)); err != nil {
		ln.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return ln, nil
}

// pluginAPI answers the CNI plugin.
func (a *Agent) pluginAPI() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, fn func(ctx context.Context, r *http.Request) (code int, err error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			code, err := fn(r.Context(), r)
			a.metrics.request(code)
			if err != nil {
				a.log.Warn("plugin refused", zap.String("path", r.URL.Path), zap.Int("code", code), zap.Error(err))
				http.Error(w, err.Error(), code)
			}
		})
	}
	handle("POST "+plugin.PathAdd, a.cmdAdd)
	handle("POST "+plugin.PathDel, a.cmdDel)
	handle("POST "+plugin.PathCheck, a.cmdCheck)
	handle("POST "+plugin.PathGC, a.gc)
	handle("GET "+plugin.PathStatus, func(context.Context, *http.Request) (int, error) {
		// A ztunnel is not asked for: its own pod could then never start.
		if !a.catalog.isLoaded() {
			return http.StatusServiceUnavailable, errors.New("pods are not read yet")
		}
		return http.StatusOK, nil
	})
	return mux
}

func decode(r *http.Request, v any) error {
	if err := json.NewDecoder(http.MaxBytesReader(nil, r.Body, maxBodyBytes)).Decode(v); err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	return nil
}

// event reads a plugin.Event. Names that are no names of Kubernetes are refused: they become parts of file names.
func event(r *http.Request) (plugin.Event, error) {
	var ev plugin.Event
	if err := decode(r, &ev); err != nil {
		return ev, err
	}
	for field, v := range map[string]string{"PodName": ev.PodName, "PodNamespace": ev.PodNamespace} {
		if !isName(v) {
			return ev, fmt.Errorf("read request: %s %q is not a name", field, v)
		}
	}
	return ev, nil
}

// isName reports whether s is a DNS subdomain (RFC 1123, 2.1), the names Kubernetes gives to pods.
func isName(s string) bool {
	if s == "" || len(s) > 253 || s[0] == '.' || s[0] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '.') {
			return false
		}
	}
	return true
}

func (a *Agent) cmdAdd(ctx context.Context, r *http.Request) (int, error) {
	ev, err := event(r)
	if err != nil {
		return http.StatusBadRequest, err
	}
	if ev.Netns == "" {
		return http.StatusBadRequest, errors.New("read request: Netns is missing")
	}
	ctx, cancel := context.WithTimeout(ctx, addWithin)
	defer cancel()
	a.metrics.events.WithLabelValues(eventAdd).Inc()
	if err := a.rec.attach(ctx, ev); err != nil {
		return http.StatusServiceUnavailable, fmt.Errorf("add pod %s/%s: %w", ev.PodNamespace, ev.PodName, err)
	}
	return http.StatusOK, nil
}

func (a *Agent) cmdDel(ctx context.Context, r *http.Request) (int, error) {
	ev, err := event(r)
	if err != nil {
		return http.StatusBadRequest, err
	}
	ctx, cancel := context.WithTimeout(ctx, delWithin)
	defer cancel()
	a.metrics.events.WithLabelValues(eventDelete).Inc()
	a.rec.detach(ctx, podKey{ev.PodNamespace, ev.PodName}, ev.ContainerID)
	return http.StatusOK, nil
}

func (a *Agent) cmdCheck(_ context.Context, r *http.Request) (int, error) {
	ev, err := event(r)
	if err != nil {
		return http.StatusBadRequest, err
	}
	if err := a.rec.verify(ev); err != nil {
		return http.StatusConflict, fmt.Errorf("check pod %s/%s: %w", ev.PodNamespace, ev.PodName, err)
	}
	return http.StatusOK, nil
}

func (a *Agent) gc(_ context.Context, r *http.Request) (int, error) {
	var v plugin.Valid
	if err := decode(r, &v); err != nil {
		return http.StatusBadRequest, err
	}
	a.rec.keep(v.Attachments)
	return http.StatusOK, nil
}
