package cni

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	problems   []yamldir.Problem
	changed    chan struct{} // closed at the next change
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
	// A document that became readable, or unreadable, may be any namespace's.
	all = all || !c.loaded || len(c.problems)+len(ch.Problems) > 0
	c.problems = ch.Problems
	c.loaded = true
	close(c.changed)
	c.changed = make(chan struct{})
	return touched, all
}

// decide judges a pod. It refuses to, with the reason, when it cannot know: when the pod's object is missing or that of a
// namesake with another UID, or when its namespace may be in a document that cannot be read. Object is the UID of the
// pod's object.
func (c *catalog) decide(k podKey, uid string) (v Verdict, object string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.loaded {
		return Verdict{}, "", errors.New("pods are not read yet")
	}
	pod := c.pods[k]
	switch {
	case pod == nil:
		return Verdict{}, "", fmt.Errorf("pod %s is not known (is it in the directory the agent watches?)", k)
	case uid != "" && pod.UID != "" && uid != string(pod.UID) && uid != pod.Annotations[annotationMirror]:
		return Verdict{}, "", fmt.Errorf("pod %s with UID %s is not known: the object has UID %s", k, uid, pod.UID)
	}
	labels, ok := c.namespaces[k.Namespace]
	if !ok {
		if i := slices.IndexFunc(c.problems, func(p yamldir.Problem) bool {
			return p.Key.IsZero() || p.Key == yamldir.Key{Kind: "/Namespace", Name: k.Namespace}
		}); i >= 0 {
			p := c.problems[i]
			return Verdict{}, "", fmt.Errorf("namespace %s is not known, and may be what cannot be read in %s, line %d: %s",
				k.Namespace, p.File, p.Line, p.Reason)
		}
	}
	return c.policy.Decide(pod, labels), string(pod.UID), nil
}

// await waits until decide can, and returns the UID of the pod's object.
func (c *catalog) await(ctx context.Context, k podKey, uid string) (object string, err error) {
	for {
		c.mu.Lock()
		changed := c.changed
		c.mu.Unlock()
		_, object, err := c.decide(k, uid)
		if err == nil {
			return object, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", err
		}
	}
}

func (c *catalog) isLoaded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.loaded
}
