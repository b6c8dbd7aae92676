package install

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/mistnet/mistnet/cli/cluster"
)

const (
	inventoryName = "mistnet-install" // ConfigMap
	inventoryKey  = "inventory.json"
	// annotationCreated is on a namespace that mistctl made and may take away.
	annotationCreated = "install.mistnet.io/created"
)

// Ref names one applied object.
type Ref struct {
	Component string `json:"component"`
	Group     string `json:"group,omitempty"`
	Version   string `json:"version"`
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
}

func refOf(o Object) Ref {
	gvk := o.GroupVersionKind()
	return Ref{o.Component, gvk.Group, gvk.Version, gvk.Kind, o.GetNamespace(), o.GetName()}
}

// String is Kind.group namespace/name, the same for all versions.
func (r Ref) String() string {
	s := r.Kind
	if r.Group != "" {
		s += "." + r.Group
	}
	if r.Namespace != "" {
		return s + " " + r.Namespace + "/" + r.Name
	}
	return s + " " + r.Name
}

func (r Ref) gvk() schema.GroupVersionKind {
	return schema.GroupVersionKind{Group: r.Group, Version: r.Version, Kind: r.Kind}
}

func (r Ref) isCRD() bool { return r.Kind == "CustomResourceDefinition" }

// Inventory is what was applied to a cluster. It is written before the first object and after the last, so that what an
// interrupted run left behind is known.
type Inventory struct {
	Version  string    `json:"version"` // of the mesh
	Complete bool      `json:"complete"`
	Settings *Settings `json:"settings"`
	Objects  []Ref     `json:"objects"`
}

// ReadInventory returns nil, without an error, when mistctl installed nothing.
func ReadInventory(ctx context.Context, c *cluster.Cluster) (*Inventory, error) {
	cm, err := c.Kube.CoreV1().ConfigMaps(c.Namespace).Get(ctx, inventoryName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, cluster.Explain(fmt.Errorf("read the inventory: %w", err))
	}
	inv := &Inventory{Settings: &Settings{}}
	if err := json.Unmarshal([]byte(cm.Data[inventoryKey]), inv); err != nil {
		return nil, fmt.Errorf("understand ConfigMap %s/%s: %w: if it was edited, delete it and run mistctl install --force", c.Namespace, inventoryName, err)
	}
	return inv, nil
}

func (inv *Inventory) write(ctx context.Context, c *cluster.Cluster) error {
	b, err := json.MarshalIndent(inv, "", " ")
	if err != nil {
		return err
	}
	cm := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: inventoryName, Namespace: c.Namespace, Labels: map[string]string{LabelComponent: "inventory"}},
		Data:       map[string]string{inventoryKey: string(b)},
	}
	maps := c.Kube.CoreV1().ConfigMaps(c.Namespace)
	_, err = maps.Update(ctx, cm, metav1.UpdateOptions{FieldManager: FieldManager})
	if apierrors.IsNotFound(err) {
		_, err = maps.Create(ctx, cm, metav1.CreateOptions{FieldManager: FieldManager})
	}
	if err != nil {
		return cluster.Explain(fmt.Errorf("write the inventory: %w", err))
	}
	return nil
}

// holds reports whether the object is in the inventory, in whatever version. A nil inventory holds nothing.
func (inv *Inventory) holds(r Ref) bool {
	return inv != nil && slices.ContainsFunc(inv.Objects, func(o Ref) bool { return o.String() == r.String() })
}

// union is both lists, each object once.
func union(a, b []Ref) []Ref {
	all := slices.Clone(a)
	for _, r := range b {
		if !slices.ContainsFunc(all, func(o Ref) bool { return o.String() == r.String() }) {
			all = append(all, r)
		}
	}
	return all
}

// without is the objects of a that are not in b.
func without(a, b []Ref) []Ref {
	return slices.DeleteFunc(slices.Clone(a), func(r Ref) bool {
		return slices.ContainsFunc(b, func(o Ref) bool { return o.String() == r.String() })
	})
}
