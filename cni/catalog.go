package cni

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/yamldir"
)

// podKey names a pod.
type podKey struct{ Namespace, Name string }

func (k podKey) String() string { return k.Namespace + "/" + k.Name }

// annotationMirror is on the object of a static pod: its value is the UID the runtime knows the pod by.
const annotationMirror = "kubernetes.io/config.mirror"

// catalog is what the user wants: the pods and namespaces of the watched directory, or of the API server.
type catalog struct {
	policy Policy
	// strict: every namespace has an object, so that one without is not known yet instead of having no labels.
	strict bool

	mu         sync.Mutex
	loaded     bool
	leaving    bool // no pod is to be in the mesh any longer
	pods       map[podKey]*corev1.Pod
	namespaces map[string]map[string]string // labels by name
	problems   []yamldir.Problem
	changed    chan struct{} // closed at the next change
}

func newCatalog(p Policy, strict bool) *catalog {
	return &catalog{
		policy: p, strict: strict, pods: make(map[podKey]*corev1.Pod), namespaces: make(map[string]map[string]string),
		changed: make(chan struct{}),
	}
}

// edit makes a change and wakes those who wait for one.
func (c *catalog) edit(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
	close(c.changed)
	c.changed = make(chan struct{})
}

// apply records a change of the directory and returns the pods it may concern: nil and true mean all of them.
func (c *catalog) apply(ch yamldir.Change) (touched []podKey, all bool) {
	c.edit(func() {
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
	})
	return touched, all
}

// put records a pod as the API server knows it, unless a newer state of it is known.
func (c *catalog) put(pod *corev1.Pod) {
	k := podKey{pod.Namespace, pod.Name}
	c.edit(func() {
		if have := c.pods[k]; have == nil || have.UID != pod.UID || !older(pod.ResourceVersion, have.ResourceVersion) {
			c.pods[k] = pod
		}
	})
}

// older reports whether resource version a is certainly before b: versions of one kind are numbers that grow.
func older(a, b string) bool {
	x, xerr := strconv.ParseUint(a, 10, 64)
	y, yerr := strconv.ParseUint(b, 10, 64)
	return xerr == nil && yerr == nil && x < y
}

// drop forgets a pod, unless a namesake with another UID took its place.
func (c *catalog) drop(k podKey, uid types.UID) {
	c.edit(func() {
		if have := c.pods[k]; have != nil && have.UID == uid {
			delete(c.pods, k)
		}
	})
}

// label records a namespace's labels and reports whether they differ in what counts.
func (c *catalog) label(namespace string, labels map[string]string) (changed bool) {
	c.edit(func() {
		have, known := c.namespaces[namespace]
		changed = !known || have[mesh.LabelDataplaneMode] != labels[mesh.LabelDataplaneMode]
		c.namespaces[namespace] = labels
	})
	return changed
}

// knows reports whether the namespace's labels are recorded.
func (c *catalog) knows(namespace string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.namespaces[namespace]
	return ok
}

func (c *catalog) dropNamespace(namespace string) { c.edit(func() { delete(c.namespaces, namespace) }) }

// complete says that everything there is has been recorded once.
func (c *catalog) complete() { c.edit(func() { c.loaded = true }) }

// leave makes every verdict one against the mesh.
func (c *catalog) leave() { c.edit(func() { c.leaving = true }) }

func (c *catalog) isLeaving() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.leaving
}

// pod returns a pod's object, or nil.
func (c *catalog) pod(k podKey) *corev1.Pod {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pods[k]
}

// all returns every pod's object.
func (c *catalog) all() []*corev1.Pod {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Values(c.pods))
}

// decide judges a pod. It refuses to, with the reason, when it cannot know: when the pod's object is missing or that of a
// namesake with another UID, or when its namespace may be in a document that cannot be read. Object is the UID of the
// pod's object.
func (c *catalog) decide(k podKey, uid string) (v Verdict, object string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaving {
		return Verdict{Why: "the mesh leaves this node"}, "", nil
	}
	if !c.loaded {
		return Verdict{}, "", errors.New("pods are not read yet")
	}
	pod := c.pods[k]
	switch {
	case pod == nil:
		return Verdict{}, "", fmt.Errorf("pod %s is not known (is it on this node, and does the agent see it?)", k)
	case uid != "" && pod.UID != "" && uid != string(pod.UID) && uid != pod.Annotations[annotationMirror]:
		return Verdict{}, "", fmt.Errorf("pod %s with UID %s is not known: the object has UID %s", k, uid, pod.UID)
	}
	labels, ok := c.namespaces[k.Namespace]
	if !ok && c.strict {
		return Verdict{}, "", fmt.Errorf("namespace %s is not known", k.Namespace)
	}
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
