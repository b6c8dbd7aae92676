package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/cli/cluster"
)

const (
	lockName  = "mistctl" // Lease
	lockLease = 30 * time.Second
)

// lock lets one mistctl at a time change the mesh of a cluster. A mistctl that died holds it for lockLease.
type lock struct {
	c     *cluster.Cluster
	lease *coordinationv1.Lease
	stop  context.CancelFunc
	done  chan struct{}
	once  sync.Once
}

// takeLock returns a context that ends when the lock is lost.
func takeLock(ctx context.Context, c *cluster.Cluster, doing string) (context.Context, *lock, error) {
	leases := c.Kube.CoordinationV1().Leases(c.Namespace)
	who := me() + " " + doing
	seconds := int32(lockLease / time.Second)
	now := metav1.NowMicro()
	want := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: lockName, Namespace: c.Namespace, Labels: map[string]string{LabelComponent: "inventory"}},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: &who, LeaseDurationSeconds: &seconds, AcquireTime: &now, RenewTime: &now},
	}
	held, err := leases.Create(ctx, want, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		if held, err = leases.Get(ctx, lockName, metav1.GetOptions{}); err != nil {
			return nil, nil, cluster.Explain(fmt.Errorf("read the lock: %w", err))
		}
		if err := expired(held, now.Time); err != nil {
			return nil, nil, err
		}
		want.ResourceVersion = held.ResourceVersion // another one that finds it expired at the same time gets a conflict
		held, err = leases.Update(ctx, want, metav1.UpdateOptions{})
	}
	if apierrors.IsConflict(err) {
		return nil, nil, errors.New("another mistctl took the lock at this moment: run again when it is done")
	}
	if err != nil {
		return nil, nil, cluster.Explain(fmt.Errorf("take the lock: %w", err))
	}
	inner, cancel := context.WithCancelCause(ctx)
	l := &lock{c: c, lease: held, stop: func() { cancel(context.Canceled) }, done: make(chan struct{})}
	go l.renew(inner, cancel) // ends with release
	return inner, l, nil
}

func expired(held *coordinationv1.Lease, now time.Time) error {
	if held.Spec.RenewTime == nil || held.Spec.HolderIdentity == nil {
		return nil
	}
	left := held.Spec.RenewTime.Add(lockLease).Sub(now).Round(time.Second)
	if left <= 0 {
		return nil
	}
	return fmt.Errorf("another mistctl is at work on this mesh: %s, last seen alive %s ago; wait until it is done (if it died, the lock is free in %s)",
		*held.Spec.HolderIdentity, (lockLease - left), left)
}

func (l *lock) renew(ctx context.Context, lost context.CancelCauseFunc) {
	defer close(l.done)
	tick := time.NewTicker(lockLease / 3)
	defer tick.Stop()
	failures := 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := metav1.NowMicro()
		next := l.lease.DeepCopy()
		next.Spec.RenewTime = &now
		held, err := l.c.Kube.CoordinationV1().Leases(l.c.Namespace).Update(ctx, next, metav1.UpdateOptions{})
		switch {
		case err == nil:
			l.lease, failures = held, 0
		case apierrors.IsConflict(err), apierrors.IsNotFound(err):
			lost(errors.New("another mistctl took the lock, or it was deleted: nothing more was changed; run again"))
			return
		default:
			if failures++; failures == 2 { // a third would come when the lease is over
				lost(fmt.Errorf("keep the lock: %w", err))
				return
			}
		}
	}
}

// release gives the lock back, once. It works when the context that took it is over.
func (l *lock) release() { l.once.Do(l.giveBack) }

func (l *lock) giveBack() {
	l.stop()
	<-l.done
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	// What cannot be deleted expires. A lease that is another's by now has another resource version.
	_ = l.c.Kube.CoordinationV1().Leases(l.c.Namespace).Delete(ctx, lockName,
		metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &l.lease.UID, ResourceVersion: &l.lease.ResourceVersion}})
}

func me() string {
	name, host := "somebody", "somewhere"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if h, err := os.Hostname(); err == nil {
		host = h
	}
	return fmt.Sprintf("%s@%s pid %d", name, host, os.Getpid())
}
