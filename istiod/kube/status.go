package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// ZtunnelAccepted is the type of the condition that says what node proxies make of an AuthorizationPolicy. It has
// Istio's name and reasons; its status is True when the policy is enforced, as written or more strictly.
const ZtunnelAccepted = "ZtunnelAccepted"

const reasonAccepted = "Accepted"

// condition is one of status.conditions (istio.io/api meta/v1alpha1 IstioCondition). Istio writes the generation as
// text, others as a number.
type condition struct {
	Type               string `json:"type"`
	Status             string `json:"status"`
	Reason             string `json:"reason,omitempty"`
	Message            string `json:"message,omitempty"`
	LastTransitionTime string `json:"lastTransitionTime,omitempty"`
	LastProbeTime      string `json:"lastProbeTime,omitempty"`
	ObservedGeneration int64  `json:"observedGeneration,omitempty"`
}

// conditionsOf reads what conditions it can.
func conditionsOf(object map[string]any) []condition {
	list, _, err := unstructured.NestedSlice(object, "status", "conditions")
	if err != nil {
		return nil
	}
	var all []condition
	for _, v := range list {
		m, ok := v.(map[string]any)
		if !ok {
			continue
		}
		text := func(key string) string { s, _ := m[key].(string); return s }
		c := condition{Type: text("type"), Status: text("status"), Reason: text("reason"), Message: text("message"),
			LastTransitionTime: text("lastTransitionTime"), LastProbeTime: text("lastProbeTime")}
		_, _ = fmt.Sscan(fmt.Sprint(m["observedGeneration"]), &c.ObservedGeneration) //nolint:errcheck // what is no number is not known
		all = append(all, c)
	}
	return all
}

// statuses keeps the condition of every AuthorizationPolicy as it should be.
type statuses struct {
	client dynamic.Interface
	cfg    translate.Config
	log    *zap.Logger
	speaks func(namespace string, labels map[string]string) bool // whether this control plane does, for an object
	queue  keyQueue

	mu       sync.Mutex
	policies map[string]*policy               // by namespace/name
	told     map[string]*translate.Conditions // what the mesh has of those with targets, by namespace/name
	heard    bool                             // of all of them at least once
}

func newStatuses(client dynamic.Interface, cfg translate.Config, speaks func(string, map[string]string) bool, log *zap.Logger) *statuses {
	return &statuses{client: client, cfg: cfg, speaks: speaks, log: log, policies: make(map[string]*policy), told: make(map[string]*translate.Conditions)}
}

// take takes a policy that changed; p is nil when it is gone.
func (s *statuses) take(n translate.Name, p *policy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p == nil {
		delete(s.policies, n.String())
		return
	}
	s.policies[n.String()] = p
	s.queue.add(n.String())
}

// tell takes what changed of what the mesh has of policies with targets.
func (s *statuses) tell(changes []index.Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.heard {
		s.heard = true
		for key := range s.policies {
			s.queue.add(key)
		}
	}
	for _, c := range changes {
		if key, ok := strings.CutPrefix(c.Key.Name, index.AuthorizationPolicy.String()+" "); ok && c.Key.Kind == index.NounConditions {
			keepNoun(s.told, key, c.Conditions)
			s.queue.add(key)
		}
	}
}

// keepNoun keeps what the mesh has of an object, nil for nothing.
func keepNoun[N any](m map[string]*N, key string, noun *N) {
	if noun == nil {
		delete(m, key)
		return
	}
	m[key] = noun
}

// choose looks again at the policies of every namespace, or at those of one: it may be known now.
func (s *statuses) choose(namespace string) {
	for _, key := range s.all() {
		if namespace == "" || strings.HasPrefix(key, namespace+"/") {
			s.queue.add(key)
		}
	}
}

func (s *statuses) run(ctx context.Context) { s.queue.work(ctx, s.log, s.all, s.write) }

func (s *statuses) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.policies))
}

func (s *statuses) problems() []Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Problem
	for _, p := range s.policies {
		if p.unknown != "" && s.speaks(p.Namespace, p.Labels) {
			all = append(all, Problem{Resource: "authorizationpolicies", Name: translate.Name{Namespace: p.Namespace, Name: p.Name},
				Reason: notUnderstoodMessage(p)})
		}
	}
	return all
}

func notUnderstoodMessage(p *policy) string {
	return "everything is denied where this policy holds, because this version of the mesh does not understand it: " + p.unknown
}

func (s *statuses) write(ctx context.Context, key string) error {
	s.mu.Lock()
	p, told, heard := s.policies[key], s.told[key], s.heard
	s.mu.Unlock()
	if p == nil || !s.speaks(p.Namespace, p.Labels) {
		return nil
	}
	own, want := []string{ZtunnelAccepted}, s.verdict(p)
	if heard {
		own = append(own, translate.ConditionWaypointAccepted)
	}
	if translate.TargetsWaypoint(&p.AuthorizationPolicy) {
		want = conditionsTold(told, p.Generation)
	}
	all, differs := merge(p.conditions, own, want, time.Now())
	if !differs {
		return nil
	}
	patch, err := json.Marshal(map[string]any{
		"apiVersion": "security.istio.io/v1", "kind": index.AuthorizationPolicy.String(),
		// The version: what others wrote meanwhile is not overwritten, but read and tried again.
		"metadata": map[string]any{"name": p.Name, "namespace": p.Namespace, "resourceVersion": p.ResourceVersion},
		"status":   map[string]any{"conditions": all},
	})
	if err != nil {
		return err
	}
	force := true
	_, err = s.client.Resource(schema.GroupVersionResource{Group: "security.istio.io", Version: "v1", Resource: "authorizationpolicies"}).
		Namespace(p.Namespace).
		Patch(ctx, p.Name, types.ApplyPatchType, patch, metav1.PatchOptions{FieldManager: fieldManager, Force: &force}, "status")
	if apierrors.IsNotFound(err) {
		return nil // it is gone
	}
	return err
}

// verdict is what node proxies make of a policy: nothing when it is not for them.
func (s *statuses) verdict(p *policy) []condition {
	if translate.TargetsWaypoint(&p.AuthorizationPolicy) {
		return nil
	}
	noun, status := translate.Policy(s.cfg, &p.AuthorizationPolicy)
	c := condition{Type: ZtunnelAccepted, Status: "True", Reason: reasonAccepted, Message: "attached to ztunnel", ObservedGeneration: p.Generation}
	if status != nil {
		c.Reason, c.Message = string(status.Reason), status.Message
	}
	if noun == nil || noun.Invalid != "" {
		c.Status = "False"
	}
	if p.unknown != "" {
		c.Message = notUnderstoodMessage(p)
	}
	return []condition{c}
}

// conditionsTold are those that the mesh has of an object of that generation; told may be nil.
func conditionsTold(told *translate.Conditions, generation int64) []condition {
	if told == nil {
		return nil
	}
	var all []condition
	for _, t := range told.List {
		c := condition{Type: t.Type, Status: "False", Reason: t.Reason, Message: t.Message, ObservedGeneration: generation}
		if t.Status {
			c.Status = "True"
		}
		all = append(all, c)
	}
	return all
}

// merge puts want in the place of those conditions that are of our own types. The others, which somebody else wrote, stay: in
// most kinds the list is one value to the API server.
func merge(have []condition, own []string, want []condition, now time.Time) (all []condition, differs bool) {
	all = []condition{}
	old := make(map[string]condition)
	for _, c := range have {
		if slices.Contains(own, c.Type) {
			old[c.Type] = c
		} else {
			all = append(all, c)
		}
	}
	differs = len(old) != len(want)
	for _, c := range want {
		was, had := old[c.Type]
		c.LastTransitionTime = now.UTC().Format(time.RFC3339)
		if had && was.Status == c.Status && was.LastTransitionTime != "" {
			c.LastTransitionTime = was.LastTransitionTime
		}
		differs = differs || !had || was != c
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b condition) int { return strings.Compare(a.Type, b.Type) })
	return all, differs
}
