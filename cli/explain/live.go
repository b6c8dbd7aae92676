package explain

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/mistnet/mistnet/cli/cluster"
	"github.com/mistnet/mistnet/internal/yamldir"
	"github.com/mistnet/mistnet/istiod/kube"
	"github.com/mistnet/mistnet/istiod/translate"
)

// pageSize is how many objects one answer of the API server holds at most.
const pageSize = 500

// ReadCluster reads what istiod reads of a cluster, and the YAML below paths as if it were applied to it now.
func ReadCluster(ctx context.Context, c *cluster.Cluster, paths ...string) (*Mesh, error) {
	return gathered(paths, func(dir string) (*Mesh, error) {
		written, err := keysBelow(dir)
		if err != nil {
			return nil, err
		}
		for _, kind := range watched() {
			if err := save(ctx, c, kind, dir, written); err != nil {
				return nil, cluster.Explain(fmt.Errorf("list every %s: %w", kind.Kind, err))
			}
		}
		for kind := range idleKinds { // who may not see them is told nothing of them
			group, name, _ := strings.Cut(kind, "/")
			if err := save(ctx, c, schema.GroupKind{Group: group, Kind: name}, dir, nil); err != nil && !apierrors.IsForbidden(err) {
				return nil, cluster.Explain(fmt.Errorf("list every %s: %w", name, err))
			}
		}
		return read(ctx, dir, metav1.Now(), translate.Config{NoStatus: true, NoSecrets: true}) // which nobody shall find on this disk
	})
}

// watched are the kinds that istiod reads, in order.
func watched() []schema.GroupKind {
	kinds := map[schema.GroupKind]bool{
		{Kind: "Namespace"}: true, {Kind: "Node"}: true, {Kind: "Pod"}: true, {Kind: "Service"}: true,
		{Group: "discovery.k8s.io", Kind: "EndpointSlice"}: true,
		{Kind: "ConfigMap"}: true, // for certificates that BackendTLSPolicies trust
	}
	for resource, kind := range kube.Custom() {
		kinds[schema.GroupKind{Group: resource.Group, Kind: kind.String()}] = true
	}
	return slices.SortedFunc(maps.Keys(kinds), func(a, b schema.GroupKind) int {
		return cmp.Or(cmp.Compare(a.Group, b.Group), cmp.Compare(a.Kind, b.Kind))
	})
}

// save writes every object of a kind to dir, but for those that are written there already. A kind that is not installed has none.
func save(ctx context.Context, c *cluster.Cluster, kind schema.GroupKind, dir string, written map[yamldir.Key]bool) error {
	m, err := c.Mapper.RESTMapping(kind)
	if meta.IsNoMatchError(err) {
		return nil
	}
	if err != nil {
		return err
	}
	o := metav1.ListOptions{Limit: pageSize}
	for page := 0; ; page++ {
		list, err := c.Dynamic.Resource(m.Resource).List(ctx, o)
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		list.Items = slices.DeleteFunc(list.Items, func(u unstructured.Unstructured) bool {
			return written[yamldir.Key{Kind: kind.Group + "/" + kind.Kind, Namespace: u.GetNamespace(), Name: u.GetName()}]
		})
		for i := range list.Items {
			list.Items[i].SetManagedFields(nil)
		}
		text, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": list.Items})
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s-%d.json", m.Resource.GroupResource(), page)), text, 0o600); err != nil {
			return err
		}
		if o.Continue = list.GetContinue(); o.Continue == "" {
			return nil
		}
	}
}

// keysBelow are the objects written in the files of dir.
func keysBelow(dir string) (map[yamldir.Key]bool, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	keys := make(map[yamldir.Key]bool)
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		objects, _ := yamldir.Parse(e.Name(), text)
		for _, o := range objects {
			keys[o.Key] = true
		}
	}
	return keys, nil
}
