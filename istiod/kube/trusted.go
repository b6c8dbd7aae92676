package kube

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// trustedPatience is how long the first delivery waits for the ConfigMaps that are referred to: without them services would be
// closed for a moment whenever istiod starts, and one that cannot be read must not keep the mesh from being known.
const trustedPatience = 10 * time.Second

// trusted watches the ConfigMaps that BackendTLSPolicies refer to, each by its name and as long as one does: what other ConfigMaps
// say is none of the mesh's business.
type trusted struct {
	start func(translate.Name) *feed // makes one that is not running
	take  func([]change)
	wake  chan struct{} // holds one token while there is something to do

	mu      sync.Mutex
	refer   map[translate.Name][]translate.Name // ConfigMaps by policy
	running map[translate.Name]*reading
}

type reading struct {
	feed *feed
	stop context.CancelFunc
	done chan struct{}
}

func (s *Source) newTrusted() *trusted {
	core := s.cfg.Clients.Kube.CoreV1()
	t := &trusted{take: s.taker(index.ConfigMap), wake: make(chan struct{}, 1),
		refer: make(map[translate.Name][]translate.Name), running: make(map[translate.Name]*reading)}
	t.start = func(n translate.Name) *feed {
		cms := core.ConfigMaps(n.Namespace)
		f := &feed{name: "configmaps/" + n.String(), client: s.cfg.Clients.Kube, trim: trimTrusted, take: t.take,
			versions: typed(cms.List, cms.Watch, "metadata.name="+n.Name, "")}
		return f.init(s.log)
	}
	return t
}

// trimTrusted leaves of a ConfigMap what may be trusted.
func trimTrusted(o runtime.Object) (runtime.Object, error) {
	cm, ok := o.(*corev1.ConfigMap)
	if !ok {
		return nil, unexpected(o)
	}
	out := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: cm.Namespace, Name: cm.Name, ResourceVersion: cm.ResourceVersion}}
	if text, ok := cm.Data["ca.crt"]; ok {
		out.Data = map[string]string{"ca.crt": text}
	}
	return out, nil
}

// takePolicies takes BackendTLSPolicies.
func (t *trusted) takePolicies(changes []change) {
	t.mu.Lock()
	for _, c := range changes {
		delete(t.refer, c.name)
		if p, ok := c.object.(*gatewayv1.BackendTLSPolicy); ok {
			if names := translate.TrustedConfigMaps(p); len(names) > 0 {
				t.refer[c.name] = names
			}
		}
	}
	t.mu.Unlock()
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// settle starts and ends watches until those run that are wanted. It is called by one goroutine at a time.
func (t *trusted) settle(ctx context.Context) {
	t.mu.Lock()
	wanted := make(map[translate.Name]struct{})
	for _, names := range t.refer {
		for _, n := range names {
			wanted[n] = struct{}{}
		}
	}
	var over []*reading
	var gone []change
	for n, r := range t.running {
		if _, still := wanted[n]; !still {
			over, gone = append(over, r), append(gone, change{name: n})
			delete(t.running, n)
		}
	}
	for n := range wanted {
		if t.running[n] != nil {
			continue
		}
		once, stop := context.WithCancel(ctx)
		r := &reading{feed: t.start(n), stop: stop, done: make(chan struct{})}
		t.running[n] = r
		go func() { // ended by stop, waited for by end
			defer close(r.done)
			_ = r.feed.run(once) // it ends with its context only
		}()
	}
	t.mu.Unlock()
	for _, r := range over {
		r.stop()
		<-r.done
	}
	if len(gone) > 0 {
		t.take(gone)
	}
}

// synced waits until those that are wanted were read, but not for ever.
func (t *trusted) synced(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, trustedPatience)
	defer cancel()
	t.settle(context.WithoutCancel(ctx))
	for _, f := range t.feeds() {
		select {
		case <-f.synced:
		case <-ctx.Done():
			return
		}
	}
}

// run keeps the watches as they are wanted until ctx is done.
func (t *trusted) run(ctx context.Context) {
	defer t.end()
	for {
		select {
		case <-t.wake:
			t.settle(ctx)
		case <-ctx.Done():
			return
		}
	}
}

func (t *trusted) end() {
	t.mu.Lock()
	all := slices.Collect(maps.Values(t.running))
	clear(t.running)
	t.mu.Unlock()
	for _, r := range all {
		r.stop()
		<-r.done
	}
}

// feeds are those that run.
func (t *trusted) feeds() (all []*feed) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range t.running {
		all = append(all, r.feed)
	}
	return all
}
