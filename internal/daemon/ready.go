package daemon

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// Readiness is the set of tasks that must be done before the program can serve. It answers /healthz/ready.
type Readiness struct {
	mu      sync.Mutex
	pending map[string]bool
}

// NewReadiness returns a Readiness with nothing pending.
func NewReadiness() *Readiness { return &Readiness{pending: make(map[string]bool)} }

// Pending marks a task as not done.
func (r *Readiness) Pending(task string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pending[task] = true
}

// Done marks a task as done; it may become pending again.
func (r *Readiness) Done(task string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.pending, task)
}

// Waiting lists the tasks that are not done, sorted.
func (r *Readiness) Waiting() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Sorted(maps.Keys(r.pending))
}

// ServeHTTP answers 200 "ready", or 500 with what is missing.
func (r *Readiness) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	if waiting := r.Waiting(); len(waiting) > 0 {
		http.Error(w, "not ready, pending: "+strings.Join(waiting, ", "), http.StatusInternalServerError)
		return
	}
	fmt.Fprintln(w, "ready")
}
