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

// trustedPatience is how long the first delivery waits for what is referred to: without it services would be
// closed for a moment whenever istiod starts, and what cannot be read must not keep the mesh from being known.
const trustedPatience = 10 * time.Second

// trusted watches the ConfigMaps, or the Secrets, that others refer to, each by its name and as long as one does: what is in others
// is none of the mesh's business.
type trusted struct {
	start func(translate.Name) *feed // makes one that is not running
	take  func([]change)
	wake  chan struct{} // holds one token while there is something to do

	mu      sync.Mutex
	refer   map[referrer][]translate.Name
	running map[translate.Name]*reading
}

// referrer is who refers.
type referrer struct {
	kind index.Kind
	name translate.Name
}

type reading struct {
	feed *feed
	stop context.CancelFunc
	done chan struct{}
}

func (s *Source) newTrusted(kind index.Kind) *trusted {
	core := s.cfg.Clients.Kube.CoreV1()
	t := &trusted{take: s.taker(kind), wake: make(chan struct{}, 1),
		refer: make(map[referrer][]translate.Name), running: make(map[translate.Name]*reading)}
	t.start = func(n translate.Name) *feed {
		f := &feed{client: s.cfg.Clients.Kube, take: t.take}
		if by := "metadata.name=" + n.Name; kind == index.Secret {
			secrets := core.Secrets(n.Namespace)
			f.name, f.trim, f.versions = "secrets/"+n.String(), trimSecret, typed(secrets.List, secrets.Watch, by, "")
		} else {
			cms := core.ConfigMaps(n.Namespace)
			f.name, f.trim, f.versions = "configmaps/"+n.String(), trimTrusted, typed(cms.List, cms.Watch, by, "")
		}
		return f.init(s.log)
	}
	return t
}

// trimSecret leaves of a Secret what waypoints may be given.
func trimSecret(o runtime.Object) (runtime.Object, error) {
	s, ok := o.(*corev1.Secret)
	if !ok {
		return nil, unexpected(o)
	}
	return translate.TrimSecret(s), nil
}

// trimTrusted leaves of a ConfigMap what may be trusted.
func trimTrusted(o runtime.Object) (runtime.Object, error) {
	cm, ok := o.(*corev1.ConfigMap)
	if !ok {
		return nil, unexpected(o)
	}
	out := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: cm.Namespace, Name: cm.Name, ResourceVersion: cm.ResourceVersion}}
	for _, key := range translate.CredentialKeys() {
		if text, ok := cm.Data[key]; ok {
			if out.Data == nil {
				out.Data = make(map[string]string)
			}
			out.Data[key] = text
		}
	}
	return out, nil
}

// taker takes objects of a kind, which refer to what names says.
func (t *trusted) taker(kind index.Kind, names func(runtime.Object) []translate.Name) func([]change) {
	return func(changes []change) {
		t.mu.Lock()
		for _, c := range changes {
			who := referrer{kind, c.name}
			delete(t.refer, who)
			if c.object == nil {
				continue
			}
			if names := names(c.object); len(names) > 0 {
				t.refer[who] = names
			}
		}
		t.mu.Unlock()
		select {
		case t.wake <- struct{}{}:
		default:
		}
	}
}

func trustedByPolicy(o runtime.Object) []translate.Name {
	p, ok := o.(*gatewayv1.BackendTLSPolicy)
	if !ok {
		return nil
	}
	return translate.TrustedConfigMaps(p)
}

// byRule is what DestinationRules refer to.
func byRule(names func(*translate.DestinationRule) []translate.Name) func(runtime.Object) []translate.Name {
	return func(o runtime.Object) []translate.Name {
		if r, ok := o.(*rule); ok {
			o = r.Object
		}
		dr, ok := o.(*translate.DestinationRule)
		if !ok {
			return nil
		}
		return names(dr)
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
		case <-f.forbidden:
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
