package kube

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// selection lets through what lies in namespaces that the mesh is to know (discoverySelectors), and keeps the rest for
// the moment they are chosen. It is a value of one goroutine at a time.
type selection struct {
	root      string            // namespace that is always known
	selectors []labels.Selector // none: every namespace is known
	spaces    map[string]labels.Set
	held      map[held]runtime.Object // objects of namespaces, known or not; empty without selectors
}

type held struct {
	kind index.Kind
	name translate.Name
}

func newSelection(root string) *selection {
	return &selection{root: root, spaces: make(map[string]labels.Set), held: make(map[held]runtime.Object)}
}

// known reports whether the mesh is to know a namespace.
func (s *selection) known(namespace string) bool {
	if len(s.selectors) == 0 || namespace == s.root || namespace == "" {
		return true
	}
	set, ok := s.spaces[namespace]
	if !ok {
		return false
	}
	for _, sel := range s.selectors {
		if sel.Matches(set) {
			return true
		}
	}
	return false
}

// pass returns the events of an object that changed.
func (s *selection) pass(kind index.Kind, name translate.Name, o runtime.Object) []index.Event {
	ev := index.Event{Kind: kind, Name: name, Object: o}
	if kind == index.Namespace {
		return append([]index.Event{ev}, s.space(name.Name, o)...)
	}
	if name.Namespace == "" {
		return []index.Event{ev}
	}
	if len(s.selectors) > 0 {
		s.keep(held{kind, name}, o)
	}
	if !s.known(name.Namespace) {
		ev.Object = nil // it may have been passed before there were selectors
	}
	return []index.Event{ev}
}

func (s *selection) keep(h held, o runtime.Object) {
	if o == nil {
		delete(s.held, h)
		return
	}
	s.held[h] = o
}

// space records a namespace and returns the events of what is in it, if it is known now and was not, or the reverse.
func (s *selection) space(name string, o runtime.Object) []index.Event {
	before := s.known(name)
	if ns, ok := o.(*corev1.Namespace); ok {
		s.spaces[name] = ns.Labels
	} else {
		delete(s.spaces, name)
	}
	if now := s.known(name); now != before {
		return s.flip(func(namespace string) bool { return namespace == name }, now)
	}
	return nil
}

// flip returns the events by which what is held of some namespaces comes, or goes.
func (s *selection) flip(in func(namespace string) bool, comes bool) []index.Event {
	var events []index.Event
	for h, o := range s.held {
		if !in(h.name.Namespace) {
			continue
		}
		ev := index.Event{Kind: h.kind, Name: h.name}
		if comes {
			ev.Object = o
		}
		events = append(events, ev)
	}
	return events
}

// choose changes the selectors and returns the events of what came and went. relist tells that objects must be read
// again, because they were not kept so far.
func (s *selection) choose(selectors []labels.Selector) (events []index.Event, relist bool) {
	relist = len(s.selectors) == 0 && len(selectors) > 0
	known := make(map[string]bool, len(s.spaces))
	for name := range s.spaces {
		known[name] = s.known(name)
	}
	s.selectors = selectors
	for _, comes := range []bool{false, true} {
		events = append(events, s.flip(func(namespace string) bool {
			return s.known(namespace) == comes && known[namespace] != comes
		}, comes)...)
	}
	if len(selectors) == 0 {
		clear(s.held)
	}
	return events, relist
}
