package cni

import (
	"context"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/mistnet/mistnet/internal/mesh"
)

// fetchEvery is the pause between two questions for a pod that is about to start.
const fetchEvery = 250 * time.Millisecond

// fetchedFor is how long a pod that was asked for is believed without the watch saying so.
const fetchedFor = time.Minute

// connect makes a client of the API server: the one kubeconfig names, or the cluster's own.
func connect(kubeconfig string) (kubernetes.Interface, error) {
	var cfg *rest.Config
	var err error
	if kubeconfig != "" {
		cfg, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	} else {
		cfg, err = rest.InClusterConfig()
	}
	if err != nil {
		return nil, fmt.Errorf("configure access to the API server: %w", err)
	}
	cfg.QPS, cfg.Burst = 50, 200 // a node that comes back starts all its pods at once
	cfg.UserAgent = "mistnet-cni-agent"
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("make client of the API server: %w", err)
	}
	return client, nil
}

// kubeSource fills the catalog with the node's pods and all namespaces from the API server. While that cannot be
// reached the catalog keeps what it last said.
type kubeSource struct {
	client  kubernetes.Interface
	node    string
	catalog *catalog
	log     *zap.Logger
	touched func(podKey) // a pod changed
	all     func()       // a namespace changed, or everything is known for the first time

	owner  *owner
	status *podStatus

	mu      sync.Mutex
	store   cache.Store // the watched pods; set before catalog.complete
	fetched map[podKey]fetched
}

// run watches until ctx is done.
func (s *kubeSource) run(ctx context.Context) error {
	pods := informers.NewSharedInformerFactoryWithOptions(s.client, 0, informers.WithTransform(trim),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", s.node).String()
		}))
	rest := informers.NewSharedInformerFactoryWithOptions(s.client, 0, informers.WithTransform(trim))
	var synced []cache.InformerSynced
	for _, w := range []struct {
		what     string
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandler
	}{
		{"pods", pods.Core().V1().Pods().Informer(), s.podHandler()},
		{"namespaces", rest.Core().V1().Namespaces().Informer(), s.namespaceHandler()},
	} {
		if err := w.informer.SetWatchErrorHandlerWithContext(s.watchFailed(w.what)); err != nil {
			return fmt.Errorf("watch %s: %w", w.what, err)
		}
		reg, err := w.informer.AddEventHandler(w.handler)
		if err != nil {
			return fmt.Errorf("watch %s: %w", w.what, err)
		}
		synced = append(synced, reg.HasSynced)
	}
	factories := []informers.SharedInformerFactory{pods, rest}
	f, err := s.owner.factory(s.client, s.watchFailed("daemonsets"))
	if err != nil {
		return err
	}
	factories = append(factories, f)
	for _, f := range factories {
		f.StartWithContext(ctx)
	}
	defer func() {
		for _, f := range factories {
			f.Shutdown()
		}
	}()
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return nil
	}
	s.mu.Lock()
	s.store = pods.Core().V1().Pods().Informer().GetStore()
	s.mu.Unlock()
	s.catalog.complete()
	s.log.Info("pods and namespaces known", zap.String("node", s.node), zap.Int("pods", len(s.catalog.all())))
	s.all()
	<-ctx.Done()
	return nil
}

// watchFailed says what the API server refuses. The informer tries again by itself.
func (s *kubeSource) watchFailed(what string) cache.WatchErrorHandlerWithContext {
	return func(ctx context.Context, r *cache.Reflector, err error) {
		switch {
		case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
			s.log.Error("permission to list and watch is missing", zap.String("resource", what), zap.Error(err))
		case apierrors.IsResourceExpired(err), apierrors.IsGone(err), ctx.Err() != nil:
		default:
			s.log.Warn("watch interrupted, going on with what is known", zap.String("resource", what), zap.Error(err))
		}
	}
}

func (s *kubeSource) podHandler() cache.ResourceEventHandler {
	put := func(o any) {
		if pod, ok := o.(*corev1.Pod); ok && pod.Spec.NodeName == s.node {
			s.catalog.put(pod)
			s.touched(podKey{pod.Namespace, pod.Name})
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    put,
		UpdateFunc: func(_, o any) { put(o) },
		DeleteFunc: func(o any) {
			if pod, ok := last(o).(*corev1.Pod); ok {
				s.catalog.drop(podKey{pod.Namespace, pod.Name}, pod.UID)
			}
		},
	}
}

func (s *kubeSource) namespaceHandler() cache.ResourceEventHandler {
	put := func(o any) {
		if ns, ok := o.(*corev1.Namespace); ok && s.catalog.label(ns.Name, ns.Labels) {
			s.all()
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    put,
		UpdateFunc: func(_, o any) { put(o) },
		DeleteFunc: func(o any) {
			if ns, ok := last(o).(*corev1.Namespace); ok {
				s.catalog.dropNamespace(ns.Name)
			}
		},
	}
}

// last is the object of a deletion, also of one the watch missed.
func last(o any) any {
	if missed, ok := o.(cache.DeletedFinalStateUnknown); ok {
		return missed.Obj
	}
	return o
}

// trim keeps of an object what the agent reads.
func trim(o any) (any, error) {
	switch v := o.(type) {
	case *corev1.Pod:
		return trimPod(v), nil
	case *corev1.Namespace:
		labels := map[string]string{}
		if mode, ok := v.Labels[mesh.LabelDataplaneMode]; ok {
			labels[mesh.LabelDataplaneMode] = mode
		}
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
			Name: v.Name, UID: v.UID, ResourceVersion: v.ResourceVersion, Labels: labels,
		}}, nil
	}
	return o, nil
}

func trimPod(v *corev1.Pod) *corev1.Pod {
	annotations := map[string]string{}
	for _, name := range []string{
		mesh.AnnotationRedirection, annotationMirror, annotationSidecar, annotationBypass, annotationDNS, annotationInterfaces,
	} {
		if value, ok := v.Annotations[name]; ok {
			annotations[name] = value
		}
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: v.Namespace, Name: v.Name, UID: v.UID, ResourceVersion: v.ResourceVersion,
			DeletionTimestamp: v.DeletionTimestamp, Labels: v.Labels, Annotations: annotations,
		},
		Spec: corev1.PodSpec{
			NodeName: v.Spec.NodeName, ServiceAccountName: v.Spec.ServiceAccountName, HostNetwork: v.Spec.HostNetwork,
		},
		Status: corev1.PodStatus{Phase: v.Status.Phase, PodIP: v.Status.PodIP, PodIPs: v.Status.PodIPs},
	}
}

// isOver reports whether a pod has ended for good.
func isOver(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// fetch asks for a pod that the watch has not brought yet, and for its namespace, until ctx is done or both are known.
// It returns the last answer that did not help.
func (s *kubeSource) fetch(ctx context.Context, k podKey, uid string) (last error) {
	pause := time.NewTicker(fetchEvery)
	defer pause.Stop()
	for {
		if _, _, err := s.catalog.decide(k, uid); err == nil {
			return nil
		}
		if err := s.ask(ctx, k); err != nil && (last == nil || ctx.Err() == nil) {
			last = err
		}
		select {
		case <-pause.C:
		case <-ctx.Done():
			return last
		}
	}
}

func (s *kubeSource) ask(ctx context.Context, k podKey) error {
	pod, err := s.client.CoreV1().Pods(k.Namespace).Get(ctx, k.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if pod.Spec.NodeName != s.node {
		return fmt.Errorf("pod is on node %q, not on %q", pod.Spec.NodeName, s.node)
	}
	if !s.catalog.knows(k.Namespace) {
		ns, err := s.client.CoreV1().Namespaces().Get(ctx, k.Namespace, metav1.GetOptions{})
		if err != nil {
			return err
		}
		s.catalog.label(ns.Name, ns.Labels)
	}
	s.mu.Lock()
	if s.fetched == nil {
		s.fetched = make(map[podKey]fetched)
	}
	s.fetched[k] = fetched{pod.UID, time.Now()}
	s.mu.Unlock()
	s.catalog.put(trimPod(pod))
	return nil
}

// fetched is a pod that was asked for before the watch brought it.
type fetched struct {
	uid types.UID
	at  time.Time
}

// prune forgets fetched pods that the watch does not bring: their deletion came before the answer.
func (s *kubeSource) prune() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.store == nil {
		return
	}
	for k, f := range s.fetched {
		_, watched, err := s.store.GetByKey(k.String())
		switch {
		case err == nil && watched:
			delete(s.fetched, k)
		case time.Since(f.at) > fetchedFor:
			delete(s.fetched, k)
			s.catalog.drop(k, f.uid)
		}
	}
}
