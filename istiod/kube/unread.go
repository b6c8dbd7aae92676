package kube

import (
	"cmp"
	"sync"

	"go.uber.org/zap"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/mistnet/mistnet/istiod/translate"
)

// unreadKind is a kind that says something to a mesh, and that this one does not honour yet. Such objects are listed and
// watched all the same, for their names: who wrote one should learn that it has no effect.
type unreadKind struct {
	group    apiGroup
	resource string
}

var (
	telemetryKinds  = apiGroup{"telemetry.istio.io", []string{"v1", "v1alpha1"}}
	extensionKinds  = apiGroup{"extensions.istio.io", []string{"v1alpha1"}}
	networkingAlpha = apiGroup{"networking.istio.io", []string{"v1alpha3"}}
	networkingBeta  = apiGroup{"networking.istio.io", []string{"v1beta1"}}
)

var unreadKinds = []unreadKind{
	{networkingKinds, "gateways"},
	{networkingKinds, "sidecars"},
	{networkingKinds, "workloadgroups"},
	{networkingAlpha, "envoyfilters"},
	{networkingBeta, "proxyconfigs"},
	{securityKinds, "requestauthentications"},
	{telemetryKinds, "telemetries"},
	{extensionKinds, "wasmplugins"},
}

// Unread are the kinds that are looked at without being honoured, in every version.
func Unread() []schema.GroupVersionResource {
	var all []schema.GroupVersionResource
	for _, k := range unreadKinds {
		all = append(all, k.group.resources(k.resource)...)
	}
	return all
}

// unread keeps the names of such objects.
type unread struct {
	log *zap.Logger

	mu   sync.Mutex
	have map[string]map[translate.Name]struct{} // by resource.group
}

// makeUnread are the feeds of these kinds. Nothing waits for them: whether they can be read changes nothing for the mesh.
func (s *Source) makeUnread() []*feed {
	feeds := make([]*feed, len(unreadKinds))
	for i, k := range unreadKinds {
		resource := k.resource + "." + k.group.name
		feeds[i] = (&feed{
			name: resource, client: s.cfg.Clients.Dynamic, versions: s.versions(k.group, k.resource), optional: true, slow: true,
			trim: trimAll, take: func(changes []change) { s.unread.take(resource, changes) },
		}).init(s.log)
	}
	return feeds
}

// seen stands for an object of which nothing is kept.
type seen struct {
	metav1.TypeMeta
	metav1.ObjectMeta
}

// DeepCopyObject implements runtime.Object.
func (o *seen) DeepCopyObject() runtime.Object { c := *o; return &c }

func trimAll(o runtime.Object) (runtime.Object, error) {
	if s, ok := o.(*seen); ok {
		return s, nil
	}
	u, ok := o.(*unstructured.Unstructured)
	if !ok {
		return nil, unexpected(o)
	}
	return &seen{ObjectMeta: metav1.ObjectMeta{Name: u.GetName(), Namespace: u.GetNamespace()}}, nil
}

func (n *unread) take(resource string, changes []change) {
	n.mu.Lock()
	defer n.mu.Unlock()
	before := len(n.have[resource])
	for _, c := range changes {
		if c.object != nil {
			if n.have[resource] == nil {
				n.have[resource] = make(map[translate.Name]struct{})
			}
			n.have[resource][c.name] = struct{}{}
		} else {
			delete(n.have[resource], c.name)
		}
	}
	if now := len(n.have[resource]); before == 0 && now > 0 {
		n.log.Warn("there are objects of a kind that is not honoured yet, they have no effect; /debug/problems names them",
			zap.String("resource", resource), zap.Int("objects", now))
	}
}

func (n *unread) problems(known func(namespace string) bool) []Problem {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []Problem
	for resource, names := range n.have {
		for name := range names {
			if known(name.Namespace) {
				all = append(all, Problem{Resource: resource, Name: name, Reason: "not honoured yet: it has no effect", InForce: true})
			}
		}
	}
	return all
}

func compareProblems(a, b Problem) int {
	return cmp.Or(cmp.Compare(a.Resource, b.Resource), cmp.Compare(a.Name.String(), b.Name.String()))
}
