package kube

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"

	"github.com/mistnet/mistnet/istiod/translate"
)

// meshConfig is what is honoured of Istio's MeshConfig (istio.io/api/mesh/v1alpha1).
type meshConfig struct {
	rootNamespace, trustDomain string
	selectors                  []labels.Selector
	ignored                    []string // other fields that are set
}

// readMeshConfig reads the key "mesh" of the ConfigMap; no ConfigMap says nothing.
func readMeshConfig(cm *corev1.ConfigMap) (m meshConfig, err error) {
	if cm == nil {
		return m, nil
	}
	var all map[string]any
	var some struct {
		RootNamespace string                 `json:"rootNamespace"`
		TrustDomain   string                 `json:"trustDomain"`
		Selectors     []metav1.LabelSelector `json:"discoverySelectors"`
	}
	text := []byte(cm.Data["mesh"])
	if err := errors.Join(yaml.Unmarshal(text, &all), yaml.Unmarshal(text, &some)); err != nil {
		return m, fmt.Errorf("key mesh: %w", err)
	}
	m.rootNamespace, m.trustDomain = some.RootNamespace, some.TrustDomain
	for i := range some.Selectors {
		sel, err := metav1.LabelSelectorAsSelector(&some.Selectors[i])
		if err != nil {
			return m, fmt.Errorf("discoverySelectors[%d]: %w", i, err)
		}
		m.selectors = append(m.selectors, sel)
	}
	for _, known := range []string{"rootNamespace", "trustDomain", "discoverySelectors"} {
		delete(all, known)
	}
	m.ignored = slices.Sorted(maps.Keys(all))
	return m, nil
}

// over is the configuration with what the mesh's own says instead.
func (m meshConfig) over(cfg translate.Config) translate.Config {
	if m.rootNamespace != "" {
		cfg.RootNamespace = m.rootNamespace
	}
	if m.trustDomain != "" {
		cfg.TrustDomain = m.trustDomain
	}
	return cfg
}

func (m meshConfig) tell(log *zap.Logger) {
	if len(m.ignored) > 0 {
		log.Info("mesh configuration has fields without effect here", zap.Strings("fields", m.ignored))
	}
}
