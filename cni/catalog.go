package cni

import (
	"context"
	"fmt"
	"sync"

	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/internal/yamldir"
)

// podKey names a pod.
type podKey struct{ Namespace, Name string }

func (k podKey) String() string { return k.Namespace + "/" + k.Name }

// annotationMirror is on the object of a static pod: its value is the UID the runtime knows the pod by.
const annotationMirror = "kubernetes.io/config.mirror"

// catalog is what the user wants: the pods and namespaces of the watched directory.
type catalog struct {
	policy Policy

	mu         sync.Mutex
	loaded     bool
	pods       map[podKey]*corev1.Pod
	namespaces map[string]map[string]string // labels by name
	changed    chan struct{}                // closed at the next change
}

func newCatalog(p Policy) *catalog {
	return &catalog{
		policy: p, pods: make(map[podKey]*corev1.Pod), namespaces: make(map[string]map[string]string),
		changed: make(chan struct{}),
	}
}

// apply records a change of the directory and returns the pods it may concern: nil and true mean all of them.
func (c *catalog) apply(ch yamldir.Change) (touched []podKey, all bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, o := range ch.Upserts {
		switch v := o.Value.(type) {
		case *corev1.Namespace:
			c.namespaces[v.Name] = v.Labels
			all = true
		case *corev1.Pod:
			k := podKey{o.Key.Namespace, o.Key.Name}
			c.pods[k] = v
			touched = append(touched, k)
		}
	}
	for _, k := range ch.Deletes {
		switch k.Kind {
		case "/Namespace":
			delete(c.namespaces, k.Name)
			all = true
		case "/Pod":
			delete(c.pods, podKey{k.Namespace, k.Name})
		}
	}
	all = all || !c.loaded
	c.loaded = true
	close(c.changed)
	c.changed = make(chan struct{})
	return touched, all
}

// decide judges a pod. It does not know pods whose object is missing, or is that of a namesake with another UID.
func (c *catalog) decide(k podKey, uid string) (v Verdict, object string, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	pod := c.pods[k]
	if pod == nil || uid != "" && pod.UID != "" && uid != string(pod.UID) && uid != pod.Annotations[annotationMirror] {
		return Verdict{}, "", false
	}
	return c.policy.Decide(pod, c.namespaces[k.Namespace]), string(pod.UID), true
}

// await is decide that waits for the pod to become known.
func (c *catalog) await(ctx context.Context, k podKey, uid string) (object string, err error) {
	for {
		c.mu.Lock()
		changed, loaded := c.changed, c.loaded
		c.mu.Unlock()
		if _, object, known := c.decide(k, uid); known {
			return object, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if !loaded {
				return "", fmt.Errorf("pods are not read yet")
			}
			return "", fmt.Errorf("pod %s (uid %q) is not known (is it in the directory the agent watches?)", k, uid)
		}
	}
}

func (c *catalog) isLoaded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.loaded
}
