package cni

import (
	"context"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// DefaultDaemonSet is the DaemonSet the agent belongs to.
const DefaultDaemonSet = "istio-cni-node"

// askOwner bounds the question whether the DaemonSet is still there, and askAgain is the pause between two attempts.
const (
	askOwner = 5 * time.Second
	askAgain = 500 * time.Millisecond
)

// owner is the DaemonSet the agent belongs to. An agent that is told to stop while the DaemonSet stays is being
// replaced; when the DaemonSet goes, so must everything the agent did to the node.
//
// It is watched as well as asked for: whoever uninstalls may take the agent's permissions away before its pod, but not
// a watch that is under way.
type owner struct {
	client          kubernetes.Interface
	namespace, name string
	log             *zap.Logger

	mu      sync.Mutex
	deleted bool // as the watch says
}

func (o *owner) factory(client kubernetes.Interface, failed cache.WatchErrorHandlerWithContext) (informers.SharedInformerFactory, error) {
	f := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(o.namespace),
		informers.WithTweakListOptions(func(l *metav1.ListOptions) {
			l.FieldSelector = fields.OneTermEqualSelector("metadata.name", o.name).String()
		}))
	put := func(v any) {
		if ds, ok := v.(*appsv1.DaemonSet); ok && ds.Name == o.name {
			o.set(ds.DeletionTimestamp != nil)
		}
	}
	informer := f.Apps().V1().DaemonSets().Informer()
	if err := informer.SetWatchErrorHandlerWithContext(failed); err != nil {
		return nil, fmt.Errorf("watch DaemonSet %s/%s: %w", o.namespace, o.name, err)
	}
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    put,
		UpdateFunc: func(_, v any) { put(v) },
		DeleteFunc: func(v any) {
			if ds, ok := last(v).(*appsv1.DaemonSet); ok && ds.Name == o.name {
				o.set(true)
			}
		},
	})
	if err != nil {
		return nil, fmt.Errorf("watch DaemonSet %s/%s: %w", o.namespace, o.name, err)
	}
	return f, nil
}

func (o *owner) set(deleted bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.deleted = deleted
}

// gone reports whether the DaemonSet is gone or going. It asks for a while. Whoever cannot know says no: a node that
// keeps what is of no use is mended by hand, one whose pods lost the mesh by mistake leaks.
func (o *owner) gone(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, askOwner)
	defer cancel()
	again := time.NewTicker(askAgain)
	defer again.Stop()
	for {
		ds, err := o.client.AppsV1().DaemonSets(o.namespace).Get(ctx, o.name, metav1.GetOptions{})
		switch {
		case err == nil:
			return ds.DeletionTimestamp != nil
		case apierrors.IsNotFound(err), o.watchedGo():
			return true
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			o.log.Warn("DaemonSet cannot be read: node is left as it is, for the next agent",
				zap.String("namespace", o.namespace), zap.String("name", o.name), zap.Error(err))
			return false
		}
	}
}

func (o *owner) watchedGo() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.deleted
}
