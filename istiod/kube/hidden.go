package kube

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

const (
	hiddenPause = 5 * time.Second // between two looks, each at all routes of the mesh
	hiddenTold  = 5               // rules of one object that are named
)

// hidden finds what of VirtualServices no request ever reaches, since rules of others, or of the same, come first.
type hidden struct {
	find    func([]*mesh.Route) map[string][]string // Config.Hidden
	changed func(key string)                        // is called for every object of which another thing is found than before

	mu     sync.Mutex
	wake   chan struct{} // holds a token when routes are different
	routes map[string]*mesh.Route
	found  map[string]string // by bindableKey: what to say
}

func newHidden(find func([]*mesh.Route) map[string][]string, changed func(string)) *hidden {
	return &hidden{find: find, changed: changed, wake: make(chan struct{}, 1), routes: make(map[string]*mesh.Route), found: make(map[string]string)}
}

// tell takes what changed of the mesh's routes.
func (h *hidden) tell(changes []index.Change) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range changes {
		if c.Key.Kind != index.NounRoute {
			continue
		}
		keepNoun(h.routes, c.Key.Name, c.Route)
		select {
		case h.wake <- struct{}{}:
		default:
		}
	}
}

// of is what is to be said of an object; "" for nothing.
func (h *hidden) of(key string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.found[key]
}

func (h *hidden) run(ctx context.Context) {
	if h.find == nil {
		return
	}
	pause := time.NewTimer(hiddenPause)
	defer pause.Stop()
	for {
		h.look()
		pause.Reset(hiddenPause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			return
		}
		select {
		case <-h.wake:
		case <-ctx.Done():
			return
		}
	}
}

func (h *hidden) look() {
	h.mu.Lock()
	select {
	case <-h.wake: // what it was for is looked at now
	default:
	}
	routes := slices.Collect(maps.Values(h.routes))
	h.mu.Unlock()
	reasons := h.find(routes)
	rules := make(map[string][]string)
	for _, r := range slices.SortedFunc(slices.Values(routes), func(a, b *mesh.Route) int { return cmp.Compare(a.Rule, b.Rule) }) {
		if r.Kind != mesh.KindVirtualService {
			continue
		}
		key := bindableKey(index.VirtualService, translate.Name{Namespace: r.Namespace, Name: r.Name})
		for _, why := range reasons[r.Key()] {
			rules[key] = append(rules[key], fmt.Sprintf("%s rule %d: %s", r.Protocol, r.Rule, why))
		}
	}
	found := make(map[string]string, len(rules))
	for key, all := range rules {
		if more := len(all) - hiddenTold; more > 0 {
			all = append(all[:hiddenTold:hiddenTold], fmt.Sprintf("and %d more", more))
		}
		found[key] = strings.Join(all, "; ")
	}
	h.mu.Lock()
	before := h.found
	h.found = found
	h.mu.Unlock()
	for key := range before {
		if _, still := found[key]; !still {
			h.changed(key)
		}
	}
	for key, text := range found {
		if before[key] != text {
			h.changed(key)
		}
	}
}
