package kube

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

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
	denyWithoutWaypoint        *bool    // nil: nothing is said
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
		// Mistnet is what Istio's MeshConfig has no field for.
		Mistnet struct {
			WaypointUnavailable string `json:"waypointUnavailable"` // deny or allow
		} `json:"mistnet"`
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
	switch v := some.Mistnet.WaypointUnavailable; strings.ToLower(v) {
	case "":
	case "deny", "allow":
		deny := strings.EqualFold(v, "deny")
		m.denyWithoutWaypoint = &deny
	default:
		return m, fmt.Errorf("mistnet.waypointUnavailable: %q is neither deny nor allow", v)
	}
	for _, known := range []string{"rootNamespace", "trustDomain", "discoverySelectors", "mistnet"} {
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
	if m.denyWithoutWaypoint != nil {
		cfg.DenyWithoutWaypoint = *m.denyWithoutWaypoint
	}
	return cfg
}

func (m meshConfig) tell(log *zap.Logger) {
	if len(m.ignored) > 0 {
		log.Info("mesh configuration has fields without effect here", zap.Strings("fields", m.ignored))
	}
}
