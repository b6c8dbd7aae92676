package kube

import (
	"cmp"
	"encoding/pem"
	"fmt"
	"slices"
	"sync"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/mistnet/mistnet/istiod/translate"
)

// Labels by which several control planes share a cluster.
const (
	labelRevision = "istio.io/rev" // of an object or namespace: the revision, or tag, of the control plane that it is for
	labelTag      = "istio.io/tag" // of a Service in istiod's namespace, which makes a tag of its labelRevision

	defaultRevision = "default" // also the tag of what has no label
)

// revisions says which of several control planes speaks for what.
//
// As in Istio, a label on an object counts, or else that of its namespace, and names a revision or a tag. What has none is for the
// revision "default", or the one that has the tag "default". Tags are Services in istiod's namespace, as Istio's chart makes them
// (revisionTags); Istio's older ones, MutatingWebhookConfigurations, are not looked at.
type revisions struct {
	own       string // of this control plane
	namespace string // of istiod
	log       *zap.Logger

	mu     sync.Mutex
	spaces map[string]string         // what namespaces that have the label say
	tags   map[translate.Name]string // of this control plane, by Service
	others map[string]Problem        // what is left to others, by resource and name
}

func newRevisions(cfg Config) *revisions {
	return &revisions{own: cmp.Or(cfg.Revision, defaultRevision), namespace: cfg.Namespace, log: cfg.Log,
		spaces: make(map[string]string), tags: make(map[translate.Name]string), others: make(map[string]Problem)}
}

func (r *revisions) takeNamespaces(changes []change) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range changes {
		delete(r.spaces, c.name.Name)
		if ns, ok := c.object.(*corev1.Namespace); ok && ns.Labels[labelRevision] != "" {
			r.spaces[c.name.Name] = ns.Labels[labelRevision]
		}
	}
}

// takeServices reports whether this control plane has other tags than before.
func (r *revisions) takeServices(changes []change) (changed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range changes {
		if c.name.Namespace != r.namespace {
			continue
		}
		tag := ""
		if svc, ok := c.object.(*corev1.Service); ok && svc.Labels[labelRevision] == r.own {
			tag = svc.Labels[labelTag]
		}
		if tag == r.tags[c.name] {
			continue
		}
		changed = true
		if tag == "" {
			delete(r.tags, c.name)
		} else {
			r.tags[c.name] = tag
		}
		r.log.Info("revision tag", zap.String("service", c.name.Name), zap.String("tag", tag), zap.String("revision", r.own))
	}
	return changed
}

// mine reports whether this control plane speaks for an object, and if not, who does.
func (r *revisions) mine(namespace string, labels map[string]string) (mine bool, other string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	selected, said := labels[labelRevision]
	where := "its label " + labelRevision
	if !said {
		selected = r.spaces[namespace]
		where = "label " + labelRevision + " of its namespace"
	}
	if selected == "" {
		selected, where = defaultRevision, "no label "+labelRevision
	}
	if selected == r.own {
		return true, ""
	}
	for _, tag := range r.tags {
		if tag == selected {
			return true, ""
		}
	}
	return false, fmt.Sprintf("it is left to revision %s (%s): this istiod is revision %s", selected, where, r.own)
}

// leave notes that an object is somebody else's, and why; "" that it is not.
func (r *revisions) leave(resource string, n translate.Name, why string) {
	key := resource + " " + n.String()
	r.mu.Lock()
	before := r.others[key].Reason
	if why == "" {
		delete(r.others, key)
	} else {
		r.others[key] = Problem{Resource: resource, Name: n, Reason: why, InForce: true}
	}
	r.mu.Unlock()
	if why != before && why != "" {
		r.log.Info("object is another revision's", zap.String("resource", resource), zap.Stringer("object", n), zap.String("reason", why))
	}
}

func (r *revisions) problems() []Problem {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]Problem, 0, len(r.others))
	for _, p := range r.others {
		all = append(all, p)
	}
	return all
}

// configured takes objects of configuration that are for this control plane: as in Istio those that have no label of their own, or
// its revision's; neither their namespace nor tags count.
func (r *revisions) configured(resource string, take func([]change)) func([]change) {
	return func(changes []change) {
		meant := make([]change, len(changes))
		for i, c := range changes {
			why := ""
			if m, err := meta.Accessor(c.object); c.object != nil && err == nil {
				if rev, said := m.GetLabels()[labelRevision]; said && rev != r.own {
					why = fmt.Sprintf("it has no effect here: its label %s says %q, and this istiod is revision %s", labelRevision, rev, r.own)
					c.object = nil
				}
			}
			r.leave(resource, c.name, why)
			meant[i] = c
		}
		take(meant)
	}
}

// sameCertificates reports whether two lists of certificates in PEM hold the same, however they are written.
func sameCertificates(a, b string) bool {
	if a == b {
		return true
	}
	list := func(text string) (all []string) {
		for block, rest := pem.Decode([]byte(text)); block != nil; block, rest = pem.Decode(rest) {
			all = append(all, string(block.Bytes))
		}
		slices.Sort(all)
		return slices.Compact(all)
	}
	certs := list(a)
	return len(certs) > 0 && slices.Equal(certs, list(b))
}
