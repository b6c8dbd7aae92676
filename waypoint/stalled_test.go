package waypoint_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/mesh"
)

// held is an output that whoever holds its lock stalls.
type held struct {
	sync.Mutex
	out io.Writer
}

func (h *held) Write(p []byte) (int, error) {
	h.Lock()
	defer h.Unlock()
	return h.out.Write(p)
}

// TestStalledLogStallsNothing: while nobody reads standard output requests are answered, and what istiod says is heard, which is
// logged too. All of it is told afterwards.
func TestStalledLogStallsNothing(t *testing.T) {
	t.Parallel()
	var stdout *held
	var spool *daemon.Spool
	l := newLabWriting(t, func(log io.Writer) io.Writer {
		stdout = &held{out: log}
		spool = daemon.NewSpool(stdout)
		return spool
	}, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.URL.Path) }))
	l.known("cart")
	l.get("http://10.9.0.1/before")
	stdout.Lock()
	const requests = 300
	for i := range requests {
		want := fmt.Sprintf("/stalled/%d", i)
		if resp, body := l.get("http://10.9.0.1" + want); resp.StatusCode != 200 || body != want {
			t.Fatalf("response is %d %q, want 200 %q", resp.StatusCode, body, want)
		}
	}
	l.service("later", "10.9.0.2", mesh.AppHTTP1, app(t, func(http.ResponseWriter, *http.Request) {}))
	l.known("later")
	if resp, _ := l.get("http://10.9.0.2/later"); resp.StatusCode != 200 {
		t.Errorf("a service that came while the log was stalled answers %d", resp.StatusCode)
	}
	if strings.Contains(l.log.String(), "/stalled/") {
		t.Error("the log did not stall")
	}
	stdout.Unlock()
	if !spool.Flush(10 * time.Second) {
		t.Fatal("the log cannot be flushed")
	}
	if got := strings.Count(l.log.String(), `"path":"/stalled/`); got != requests || spool.Lost() != 0 {
		t.Errorf("%d lines are there and %d lost, want %d and none", got, spool.Lost(), requests)
	}
	if metrics := l.page(":15020/stats/prometheus"); !strings.Contains(metrics, "mistnet_log_lines_lost_total 0") {
		t.Error("the metrics do not tell of lost lines")
	}
}
