package kube

import (
	"context"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/client-go/util/workqueue"
)

// Lease is the name of the lease that the replica holds which writes. Those of each revision have one of their own: Lease is that of
// the default one, LeasePrefix and its name is that of another.
const (
	Lease       = "istio-leader"
	LeasePrefix = "mistnet-leader-"
)

func (c Config) lease() string {
	if c.Revision == "" || c.Revision == defaultRevision {
		return Lease
	}
	return LeasePrefix + c.Revision
}

const (
	leaseFor   = 15 * time.Second // others wait that long for one that fell silent
	renewBy    = 10 * time.Second // and it stops writing earlier than they start
	renewEvery = 2 * time.Second
)

// lead takes part in the election until ctx is done, and writes while this replica holds the lease.
func (s *Source) lead(ctx context.Context) error {
	lock := &resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: s.cfg.Namespace, Name: s.cfg.lease()},
		Client:     s.cfg.Clients.Kube.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: s.cfg.Identity},
	}
	for ctx.Err() == nil {
		elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
			Lock: lock, LeaseDuration: leaseFor, RenewDeadline: renewBy, RetryPeriod: renewEvery, ReleaseOnCancel: true, Name: s.cfg.lease(),
			Callbacks: leaderelection.LeaderCallbacks{
				OnStartedLeading: s.write,
				OnStoppedLeading: func() {},
				OnNewLeader: func(identity string) {
					s.log.Info("leader known", zap.String("leader", identity), zap.Bool("this", identity == s.cfg.Identity))
				},
			},
		})
		if err != nil {
			return err
		}
		elector.Run(ctx)
	}
	s.writing <- struct{}{} // what was being written is
	<-s.writing
	return nil
}

// write does what one replica only may do, until ctx is done.
func (s *Source) write(ctx context.Context) {
	select {
	case s.writing <- struct{}{}: // an earlier term may not have ended quite
		defer func() { <-s.writing }()
	case <-ctx.Done():
		return
	}
	s.setLeads(true)
	defer s.setLeads(false)
	var g errgroup.Group
	g.Go(func() error { s.roots.run(ctx); return nil })
	g.Go(func() error { s.told.run(ctx); return nil })
	g.Go(func() error { s.bound.run(ctx); return nil })
	g.Go(func() error { s.bound.hidden.run(ctx); return nil })
	g.Go(func() error { s.routes.run(ctx); return nil })
	g.Go(func() error { s.gateways.run(ctx); return nil })
	_ = g.Wait() // none fails
}

func (s *Source) setLeads(leads bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leads = leads
}

// Leads reports whether this replica is the one that writes.
func (s *Source) Leads() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leads
}

// keyQueue is keys to look at again: each by one worker at a time, those that fail again and again ever later.
type keyQueue struct {
	mu    sync.Mutex
	queue workqueue.TypedRateLimitingInterface[string] // nil while nobody works
}

// add has a key looked at, if anybody works.
func (q *keyQueue) add(key string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.queue != nil {
		q.queue.Add(key)
	}
}

// work looks at all keys there are, and then at those that are added, until ctx is done.
func (q *keyQueue) work(ctx context.Context, log *zap.Logger, all func() []string, do func(context.Context, string) error) {
	queue := workqueue.NewTypedRateLimitingQueue(
		workqueue.NewTypedItemExponentialFailureRateLimiter[string](100*time.Millisecond, time.Minute))
	q.mu.Lock()
	q.queue = queue
	q.mu.Unlock()
	for _, key := range all() {
		queue.Add(key)
	}
	stop := context.AfterFunc(ctx, queue.ShutDown)
	defer stop()
	const workers = 4 // calls under way at once
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for {
				key, quit := queue.Get()
				if quit {
					return
				}
				once, cancel := context.WithTimeout(ctx, callTimeout)
				err := do(once, key)
				cancel()
				switch {
				case err == nil, ctx.Err() != nil:
					queue.Forget(key)
				case apierrors.IsConflict(err): // somebody else wrote; what they did comes
					queue.AddRateLimited(key)
				default:
					log.Warn("write failed, trying again", zap.String("object", key), zap.Error(err))
					queue.AddRateLimited(key)
				}
				queue.Done(key)
			}
		})
	}
	wg.Wait()
	q.mu.Lock()
	q.queue = nil
	q.mu.Unlock()
}
