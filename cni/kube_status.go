package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/workqueue"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Waits between two attempts to write an announcement.
const (
	announceFirst = 50 * time.Millisecond
	announceLast  = 10 * time.Second
)

// podStatus announces pods in the annotation ambient.istio.io/redirection, through the status subresource of pods.
//
// That a pod joined is written in the background: a pod does not wait for the API server in order to start, as until
// it is announced its peers send it plaintext, which its ztunnel judges. That a pod leaves is waited for.
type podStatus struct {
	client  kubernetes.Interface
	catalog *catalog
	log     *zap.Logger
	queue   workqueue.TypedRateLimitingInterface[podKey]

	mu   sync.Mutex
	pods map[podKey]*announcement
}

// announcement is what is to be announced of one pod, and what was last.
type announcement struct {
	want    redirection
	forget  bool          // when written
	settled chan struct{} // closed and replaced after each attempt
	err     error         // of the last attempt

	written *redirection // nil: not by this process
	uid     types.UID    // of the object it was written to
}

func newPodStatus(client kubernetes.Interface, c *catalog, log *zap.Logger) *podStatus {
	limit := workqueue.NewTypedItemExponentialFailureRateLimiter[podKey](announceFirst, announceLast)
	return &podStatus{
		client: client, catalog: c, log: log, queue: workqueue.NewTypedRateLimitingQueue(limit),
		pods: make(map[podKey]*announcement),
	}
}

// run writes announcements until ctx is done.
func (s *podStatus) run(ctx context.Context) error {
	defer context.AfterFunc(ctx, s.queue.ShutDown)()
	const writers = 4 // the API server answers others while it makes one wait
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for {
				k, over := s.queue.Get()
				if over {
					return
				}
				s.attempt(ctx, k)
				s.queue.Done(k)
			}
		})
	}
	wg.Wait()
	return nil
}

func (s *podStatus) write(ctx context.Context, k podKey, _ []netip.Addr, r redirection) error {
	a, settled := s.set(k, r, false)
	if r != redirectionNone {
		return nil
	}
	for {
		s.mu.Lock()
		done := s.matches(k, a)
		err := a.err
		s.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-settled:
			s.mu.Lock()
			settled = a.settled
			s.mu.Unlock()
		case <-ctx.Done():
			if err == nil {
				err = ctx.Err()
			}
			return fmt.Errorf("withdraw announcement of pod %s: %w", k, err)
		}
	}
}

func (s *podStatus) remove(_ context.Context, k podKey) error {
	s.set(k, redirectionNone, true)
	return nil
}

func (s *podStatus) set(k podKey, r redirection, forget bool) (*announcement, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.pods[k]
	if a == nil {
		a = &announcement{settled: make(chan struct{})}
		s.pods[k] = a
	}
	a.want, a.forget = r, forget
	s.queue.Add(k)
	return a, a.settled
}

func (s *podStatus) last(k podKey) (redirection, []netip.Addr) {
	pod := s.catalog.pod(k)
	if pod == nil {
		return redirectionNone, nil
	}
	return redirection(pod.Annotations[mesh.AnnotationRedirection]), podIPs(pod)
}

// refresh writes again what others changed since.
func (s *podStatus) refresh() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, a := range s.pods {
		pod := s.catalog.pod(k)
		if pod == nil || a.written == nil || *a.written != a.want {
			continue
		}
		if redirection(pod.Annotations[mesh.AnnotationRedirection]) != a.want {
			a.written = nil
			s.queue.Add(k)
		}
	}
}

// matches reports whether the API server holds what is wanted. It is called with mu held.
func (s *podStatus) matches(k podKey, a *announcement) bool {
	pod := s.catalog.pod(k)
	if pod == nil {
		return s.catalog.isLoaded() // there is nothing to write it on
	}
	if a.forget && (pod.DeletionTimestamp != nil || isOver(pod)) {
		return true // it goes with its pod
	}
	if a.written != nil && a.uid == pod.UID {
		return *a.written == a.want
	}
	return redirection(pod.Annotations[mesh.AnnotationRedirection]) == a.want
}

// attempt writes what is wanted of one pod, and comes back to it later when that fails.
func (s *podStatus) attempt(ctx context.Context, k podKey) {
	s.mu.Lock()
	a := s.pods[k]
	if a == nil {
		s.mu.Unlock()
		return
	}
	want, done, pod := a.want, s.matches(k, a), s.catalog.pod(k)
	s.mu.Unlock()
	var err error
	switch {
	case done:
	case pod == nil:
		err = fmt.Errorf("pod %s is not known", k)
	default:
		err = s.patch(ctx, k, pod.UID, want)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	a.err = err
	if err == nil && !done {
		a.written, a.uid = &want, pod.UID
	}
	if err == nil && a.want == want && a.forget {
		delete(s.pods, k)
	}
	close(a.settled)
	a.settled = make(chan struct{})
	if err == nil {
		s.queue.Forget(k)
		return
	}
	if ctx.Err() == nil {
		s.log.Warn("pod not announced, trying again", zap.Stringer("pod", k), zap.String("redirection", string(want)),
			zap.Int("attempts", s.queue.NumRequeues(k)+1), zap.Error(err))
	}
	s.queue.AddRateLimited(k)
}

// patch writes the annotation, on the pod of that UID only. A pod that is gone needs none.
func (s *podStatus) patch(ctx context.Context, k podKey, uid types.UID, to redirection) error {
	var value any // null takes it away
	if to != redirectionNone {
		value = string(to)
	}
	body, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid":         uid, // another one is refused: it cannot be changed
		"annotations": map[string]any{mesh.AnnotationRedirection: value},
	}})
	if err != nil {
		return fmt.Errorf("encode announcement: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, stepWithin)
	defer cancel()
	_, err = s.client.CoreV1().Pods(k.Namespace).Patch(ctx, k.Name, types.MergePatchType, body, metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("patch status: %w", err)
	}
	return nil
}
