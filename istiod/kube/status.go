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
		_, _ = fmt.Sscan(fmt.Sprint(m["observedGeneration"]), &c.ObservedGeneration) //nolint:errcheck // not a number: not known
		all = append(all, c)
	}
	return all
}

// statuses keeps the condition of every AuthorizationPolicy as it should be.
type statuses struct {
	client dynamic.Interface
	cfg    translate.Config
	log    *zap.Logger
	known  func(namespace string) bool // whether the mesh is to know what is in it: another one may speak for the rest
	queue  keyQueue

	mu       sync.Mutex
	policies map[string]*policy // by namespace/name
}

func newStatuses(client dynamic.Interface, cfg translate.Config, known func(string) bool, log *zap.Logger) *statuses {
	return &statuses{client: client, cfg: cfg, known: known, log: log, policies: make(map[string]*policy)}
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
		if p.unknown != "" && s.known(p.Namespace) {
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
	p := s.policies[key]
	s.mu.Unlock()
	if p == nil || !s.known(p.Namespace) {
		return nil
	}
	want := s.verdict(p)
	all, differs := merge(p.conditions, want, time.Now())
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

// verdict is the condition a policy should have, or nil when it is not for node proxies.
func (s *statuses) verdict(p *policy) *condition {
	if translate.TargetsWaypoint(&p.AuthorizationPolicy) {
		return nil
	}
	noun, status := translate.Policy(s.cfg, &p.AuthorizationPolicy)
	c := &condition{Type: ZtunnelAccepted, Status: "True", Reason: reasonAccepted, Message: "attached to ztunnel", ObservedGeneration: p.Generation}
	if status != nil {
		c.Reason, c.Message = string(status.Reason), status.Message
	}
	if noun == nil || noun.Invalid != "" {
		c.Status = "False"
	}
	if p.unknown != "" {
		c.Message = notUnderstoodMessage(p)
	}
	return c
}

// merge puts want among the conditions that others wrote, which stay: the list is one value to the API server.
func merge(have []condition, want *condition, now time.Time) (all []condition, differs bool) {
	all = []condition{}
	var old *condition
	for _, c := range have {
		if c.Type == ZtunnelAccepted {
			old = &c
			continue
		}
		all = append(all, c)
	}
	if want == nil {
		return all, old != nil
	}
	c := *want
	c.LastTransitionTime = now.UTC().Format(time.RFC3339)
	if old != nil && old.Status == c.Status && old.LastTransitionTime != "" {
		c.LastTransitionTime = old.LastTransitionTime
	}
	all = append(all, c)
	slices.SortFunc(all, func(a, b condition) int { return strings.Compare(a.Type, b.Type) })
	return all, old == nil || *old != c
}
