package files

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/mistnet/mistnet/internal/yamldir"
	"github.com/mistnet/mistnet/istiod/translate"
)

// meshConfig holds back a ConfigMap of the mesh's configuration that makes no sense, as if its document were broken: what it said
// before stays in force, and outlives istiod.
type meshConfig struct {
	key     yamldir.Key
	problem *yamldir.Problem // with the ConfigMap as it is written now; nil: none
}

// check is the change without a ConfigMap that makes no sense, and with the problem instead.
func (m *meshConfig) check(c yamldir.Change) yamldir.Change {
	if slices.Contains(c.Deletes, m.key) {
		m.problem = nil
	}
	if i := slices.IndexFunc(c.Upserts, func(o yamldir.Object) bool { return o.Key == m.key }); i >= 0 {
		o := c.Upserts[i]
		m.problem = nil
		if cm, ok := o.Value.(*corev1.ConfigMap); ok {
			if _, err := translate.ReadMeshConfig(cm); err != nil {
				m.problem = &yamldir.Problem{File: o.File, Line: o.Line, Key: o.Key, Reason: err.Error()}
				c.Upserts = slices.Delete(slices.Clone(c.Upserts), i, i+1)
			}
		}
	}
	if m.problem != nil {
		c.Problems = append(slices.Clone(c.Problems), *m.problem)
	}
	return c
}

// read is the ConfigMap as the index takes it; nil when it is gone.
func (m *meshConfig) read(value runtime.Object) runtime.Object {
	cm, ok := value.(*corev1.ConfigMap)
	if !ok {
		return nil
	}
	read, err := translate.ReadMeshConfig(cm)
	if err != nil {
		return nil // check has seen it
	}
	return read
}
