package kube

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/mistnet/mistnet/istiod/translate"
)

const (
	probeEvery   = 5 * time.Second // for a kind that the API server does not serve, yet
	probeSlowly  = time.Minute     // for one that is not urgent
	probesToLose = 3               // how often it must say so before objects of that kind count as gone
)

// change is one object that is new, different, or gone (nil).
type change struct {
	name   translate.Name
	object runtime.Object
}

// feed is one kind of object, listed and watched. It is an informer without a cache of its own: only names are kept
// here, the objects go to where they are needed.
type feed struct {
	name     string    // the resource, as in RBAC: "pods"
	client   any       // that versions use: tells whether watches can start with a list
	versions []version // of which the first that is served is taken
	optional bool      // a kind that the API server may not know
	slow     bool      // which need not be noticed at once
	selected bool      // its objects lie in namespaces that the mesh may not be to know
	trim     func(runtime.Object) (runtime.Object, error)
	take     func([]change) // one call at a time
	log      *zap.Logger

	have   map[translate.Name]struct{} // belongs to the goroutine that runs the feed
	synced chan struct{}               // closed with the first complete list
	once   sync.Once

	forbidden chan struct{} // closed when the API server has refused to tell
	refused   sync.Once

	mu     sync.Mutex
	status FeedStatus
	again  context.CancelCauseFunc // ends the list and watch under way
	bad    map[translate.Name]string
}

// version is how to read one version of a kind.
type version struct {
	name  string
	list  func(context.Context, metav1.ListOptions) (runtime.Object, error)
	watch func(context.Context, metav1.ListOptions) (watch.Interface, error)
}

// FeedStatus tells how reading one kind goes.
type FeedStatus struct {
	Resource string    `json:"resource"`
	Version  string    `json:"version,omitempty"` // that is read; "" while the kind is not served
	Synced   bool      `json:"synced"`            // a complete list was read
	Objects  int       `json:"objects"`
	Error    string    `json:"error,omitempty"` // of the last attempt; "" when it went well
	Since    time.Time `json:"since"`           // when that came to be
}

var (
	errAbsent = errors.New("the API server does not serve this kind")
	errAgain  = errors.New("the list is wanted again")
)

func typed[L runtime.Object](
	list func(context.Context, metav1.ListOptions) (L, error), watch func(context.Context, metav1.ListOptions) (watch.Interface, error),
	fields, labels string,
) []version {
	return []version{narrowed(version{
		name:  "v1",
		list:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return list(ctx, o) },
		watch: watch,
	}, fields, labels)}
}

// narrowed asks for what matches the selectors only.
func narrowed(v version, fields, labels string) version {
	return version{
		name: v.name,
		list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector, o.LabelSelector = fields, labels
			return v.list(ctx, o)
		},
		watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector, o.LabelSelector = fields, labels
			return v.watch(ctx, o)
		},
	}
}

func (f *feed) init(log *zap.Logger) *feed {
	f.log = log.With(zap.String("resource", f.name))
	f.have, f.synced = make(map[translate.Name]struct{}), make(chan struct{})
	f.forbidden = make(chan struct{})
	f.bad = make(map[translate.Name]string)
	f.status = FeedStatus{Resource: f.name, Since: time.Now()}
	return f
}

// run reads until ctx is done. It survives whatever the API server does.
func (f *feed) run(ctx context.Context) error {
	for missed := 0; ctx.Err() == nil; {
		err := f.read(ctx)
		if !errors.Is(err, errAbsent) {
			missed = 0
			continue // again
		}
		if missed++; missed == probesToLose || len(f.have) == 0 {
			f.gone()
		}
		select {
		case <-ctx.Done():
		case <-time.After(f.pause()):
		}
	}
	return nil
}

// pause is how long to wait before the API server is asked again whether it serves the kind.
func (f *feed) pause() time.Duration {
	every := probeEvery
	if f.slow {
		every = probeSlowly
	}
	return every/2 + rand.N(every/2)
}

// read lists and watches until ctx is done, the list is wanted again, or the kind is found not to be served.
func (f *feed) read(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	f.mu.Lock()
	f.again = cancel
	f.mu.Unlock()
	v := f.versions[0]
	if f.optional {
		var err error
		if v, err = f.served(ctx); err != nil {
			return err
		}
	}
	lw := cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := v.list(ctx, o)
			return list, f.note(v, err, cancel)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := v.watch(ctx, o)
			return w, f.note(v, err, cancel)
		},
	}, f.client)
	cache.NewReflectorWithOptions(lw, nil, (*feedStore)(f), cache.ReflectorOptions{Name: f.name, TypeDescription: f.name}).RunWithContext(ctx)
	return context.Cause(ctx)
}

// served finds the version that the API server serves: errAbsent when it serves none.
func (f *feed) served(ctx context.Context) (version, error) {
	for {
		var failed error
		for _, v := range f.versions {
			_, err := v.list(ctx, metav1.ListOptions{Limit: 1})
			if err == nil {
				return v, nil
			}
			if !apierrors.IsNotFound(err) {
				failed = err
			}
		}
		if failed == nil {
			return version{}, errAbsent
		}
		f.note(f.versions[0], failed, nil)
		select {
		case <-ctx.Done():
			return version{}, context.Cause(ctx)
		case <-time.After(f.pause()):
		}
	}
}

// note records how an attempt went, and ends the reading of a kind that is not served any more.
func (f *feed) note(v version, err error, cancel context.CancelCauseFunc) error {
	if f.optional && apierrors.IsNotFound(err) {
		cancel(errAbsent)
	}
	if apierrors.IsForbidden(err) {
		f.refused.Do(func() { close(f.forbidden) })
	}
	text := ""
	switch {
	case err == nil, errors.Is(err, context.Canceled):
	case apierrors.IsResourceExpired(err), apierrors.IsGone(err): // the way of the protocol to ask for a new list
	default:
		text = err.Error()
	}
	f.mu.Lock()
	before := f.status.Error
	f.status.Version = v.name
	if text != before {
		f.status.Error, f.status.Since = text, time.Now()
	}
	f.mu.Unlock()
	switch {
	case text == before:
	case text == "":
		f.log.Info("the API server answers again")
	case before == "":
		f.log.Warn("the API server cannot be read; what was read stays in force", zap.String("error", text))
	}
	return err
}

// gone says that there is nothing, because the kind is not served.
func (f *feed) gone() {
	if len(f.have) > 0 {
		f.log.Warn("the API server does not serve this kind any more, its objects are gone", zap.Int("objects", len(f.have)))
	}
	f.store(nil, nil)
	f.mu.Lock()
	f.status.Version, f.status.Error = "", ""
	f.mu.Unlock()
}

// relist reads everything again, for objects that were not kept.
func (f *feed) relist() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.again != nil {
		f.again(errAgain)
	}
}

// store takes the whole of what there is, and leaves be what is to stay.
func (f *feed) store(all []change, stay map[translate.Name]bool) {
	now := make(map[translate.Name]struct{}, len(all))
	for _, c := range all {
		now[c.name] = struct{}{}
	}
	for n := range f.have {
		if stay[n] {
			now[n] = struct{}{}
		}
		if _, ok := now[n]; !ok {
			all = append(all, change{name: n})
		}
	}
	f.have = now
	f.count(true)
	f.take(all)
	f.once.Do(func() { close(f.synced) })
}

func (f *feed) count(synced bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.status.Objects = len(f.have)
	f.status.Synced = f.status.Synced || synced
}

func (f *feed) current() FeedStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

// feedStore is where the reflector puts what it reads.
type feedStore feed

// Transformer implements cache.TransformingStore: objects are trimmed before they pile up.
func (s *feedStore) Transformer() cache.TransformFunc {
	return func(v any) (any, error) {
		o, ok := v.(runtime.Object)
		if !ok {
			return v, nil
		}
		return s.trimmed(o), nil
	}
}

// trimmed may be called with what it returned. What cannot be read comes back as unreadable: the others must go on.
func (s *feedStore) trimmed(o runtime.Object) runtime.Object {
	if _, bad := o.(*unreadable); bad {
		return o
	}
	t, err := s.trim(o)
	if err != nil {
		return &unreadable{ObjectMeta: metaOf(o), err: err}
	}
	return t
}

// unreadable stands for an object that could not be decoded.
type unreadable struct {
	metav1.TypeMeta
	metav1.ObjectMeta
	err error
}

// DeepCopyObject implements runtime.Object.
func (u *unreadable) DeepCopyObject() runtime.Object { c := *u; return &c }

func metaOf(o runtime.Object) (m metav1.ObjectMeta) {
	if a, err := meta.Accessor(o); err == nil {
		m.Name, m.Namespace = a.GetName(), a.GetNamespace()
	}
	return m
}

// refuse records an object that cannot be read, or that it can: err is nil.
func (f *feed) refuse(n translate.Name, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		delete(f.bad, n)
		return
	}
	if f.bad[n] != err.Error() {
		f.bad[n] = err.Error()
		f.log.Warn("object cannot be read; what was read of it before stays in force", zap.Stringer("object", n), zap.Error(err))
	}
}

func (f *feed) problems() []Problem {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []Problem
	for n, reason := range f.bad {
		all = append(all, Problem{Resource: f.name, Name: n, Reason: reason})
	}
	return all
}

func (s *feedStore) change(v any) (change, bool) {
	o, ok := v.(runtime.Object)
	if !ok {
		return change{}, false
	}
	m := metaOf(o)
	c := change{name: translate.Name{Namespace: m.Namespace, Name: m.Name}}
	o = s.trimmed(o)
	if u, bad := o.(*unreadable); bad {
		(*feed)(s).refuse(c.name, u.err)
		return c, false
	}
	(*feed)(s).refuse(c.name, nil)
	c.object = o
	return c, true
}

// Add implements cache.ReflectorStore.
func (s *feedStore) Add(v any) error {
	if c, ok := s.change(v); ok {
		s.have[c.name] = struct{}{}
		(*feed)(s).count(false)
		s.take([]change{c})
	}
	return nil
}

// Update implements cache.ReflectorStore.
func (s *feedStore) Update(v any) error { return s.Add(v) }

// Delete implements cache.ReflectorStore.
func (s *feedStore) Delete(v any) error {
	o, ok := v.(runtime.Object)
	if !ok {
		return fmt.Errorf("deleted object is a %T", v)
	}
	m := metaOf(o)
	name := translate.Name{Namespace: m.Namespace, Name: m.Name}
	delete(s.have, name)
	(*feed)(s).refuse(name, nil)
	(*feed)(s).count(false)
	s.take([]change{{name: name}})
	return nil
}

// Replace implements cache.ReflectorStore.
func (s *feedStore) Replace(list []any, _ string) error {
	all := make([]change, 0, len(list))
	stay := make(map[translate.Name]bool) // there, but not readable
	for _, v := range list {
		c, ok := s.change(v)
		if ok {
			all = append(all, c)
		} else if _, had := s.have[c.name]; had {
			stay[c.name] = true
		}
	}
	(*feed)(s).store(all, stay)
	return nil
}

// Resync implements cache.ReflectorStore.
func (s *feedStore) Resync() error { return nil }
