package kube

import (
	"context"
	"maps"
	"slices"
	"sync"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/kubernetes"
)

const (
	// RootConfigMap is the ConfigMap, in every namespace, by which proxies know istiod.
	RootConfigMap = "istio-ca-root-cert"
	rootKey       = "root-cert.pem"
	labelConfig   = "istio.io/config" // by which Istio's tools find what a control plane writes

	// fieldManager is who writes, as server-side apply records it.
	fieldManager = "mistnet-istiod"
)

// roots keeps the root certificates in every namespace as they should be.
type roots struct {
	client kubernetes.Interface
	owns   func(namespace string) bool // in the others one is only made when there is none
	log    *zap.Logger
	queue  keyQueue

	mu     sync.Mutex
	pem    string              // "": not known yet
	spaces map[string]struct{} // that are not about to go
	copies map[string]string   // what the ConfigMap of a namespace holds
}

func newRoots(client kubernetes.Interface, owns func(string) bool, log *zap.Logger) *roots {
	return &roots{client: client, owns: owns, log: log, spaces: make(map[string]struct{}), copies: make(map[string]string)}
}

func (r *roots) takeNamespace(name string, there bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if there {
		r.spaces[name] = struct{}{}
	} else {
		delete(r.spaces, name)
	}
	r.queue.add(name)
}

func (r *roots) takeCopies(changes []change) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range changes {
		if cm, ok := c.object.(*corev1.ConfigMap); ok {
			r.copies[c.name.Namespace] = cm.Data[rootKey]
		} else {
			delete(r.copies, c.name.Namespace)
		}
		r.queue.add(c.name.Namespace)
	}
}

// want sets what every namespace is to hold.
func (r *roots) want(pem string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if pem == r.pem {
		return
	}
	r.pem = pem
	for name := range r.spaces {
		r.queue.add(name)
	}
}

// choose looks again at every namespace: it may be owned now.
func (r *roots) choose() {
	for _, name := range r.all() {
		r.queue.add(name)
	}
}

// run writes until ctx is done: whoever calls it leads.
func (r *roots) run(ctx context.Context) {
	r.queue.work(ctx, r.log, r.all, r.write)
}

func (r *roots) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Collect(maps.Keys(r.spaces))
}

func (r *roots) write(ctx context.Context, namespace string) error {
	r.mu.Lock()
	pem := r.pem
	have, there := r.copies[namespace]
	_, live := r.spaces[namespace]
	r.mu.Unlock()
	if pem == "" || !live || there && (sameCertificates(have, pem) || !r.owns(namespace)) {
		return nil
	}
	cm := applycorev1.ConfigMap(RootConfigMap, namespace).
		WithLabels(map[string]string{labelConfig: "true"}).WithData(map[string]string{rootKey: pem})
	_, err := r.client.CoreV1().ConfigMaps(namespace).Apply(ctx, cm, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	switch {
	case apierrors.IsNotFound(err), apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return nil // the namespace goes
	case err == nil:
		r.log.Info("root certificate written", zap.String("namespace", namespace))
	}
	return err
}
