package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"google.golang.org/protobuf/encoding/protojson"
	networkingapi "istio.io/api/networking/v1alpha3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/gateway"
	"github.com/mistnet/mistnet/istiod/translate"
)

// meshConfig is what is honoured of Istio's MeshConfig (istio.io/api/mesh/v1alpha1).
type meshConfig struct {
	rootNamespace, trustDomain string
	selectors                  []labels.Selector
	denyWithoutWaypoint        *bool // nil: nothing is said
	virtualServices            []string
	destinationRules           []string // exportTo of both, where they say nothing
	retry                      *mesh.Retry
	tryTimeout                 time.Duration
	waypoints                  gateway.Settings
	ignored                    []string // other fields that are set
}

// readMeshConfig reads the key "mesh" of the ConfigMap; no ConfigMap says nothing.
func readMeshConfig(cm *corev1.ConfigMap) (m meshConfig, err error) {
	if cm == nil {
		return m, nil
	}
	var all map[string]any
	var some struct {
		RootNamespace    string                 `json:"rootNamespace"`
		TrustDomain      string                 `json:"trustDomain"`
		Selectors        []metav1.LabelSelector `json:"discoverySelectors"`
		VirtualServices  []string               `json:"defaultVirtualServiceExportTo"`
		DestinationRules []string               `json:"defaultDestinationRuleExportTo"`
		Retry            json.RawMessage        `json:"defaultHttpRetryPolicy"`
		Path             struct {
			Normalization string `json:"normalization"`
		} `json:"pathNormalization"`
		AccessLogFile     *string `json:"accessLogFile"`
		AccessLogEncoding string  `json:"accessLogEncoding"`
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
	m.virtualServices, m.destinationRules = some.VirtualServices, some.DestinationRules
	for name, to := range map[string][]string{"defaultVirtualServiceExportTo": some.VirtualServices, "defaultDestinationRuleExportTo": some.DestinationRules} {
		if slices.Contains(to, "") {
			return m, fmt.Errorf("%s: an empty name: want *, . or a namespace", name)
		}
	}
	if len(some.Retry) > 0 {
		var r networkingapi.HTTPRetry
		if err := protojson.Unmarshal(some.Retry, &r); err != nil {
			return m, fmt.Errorf("defaultHttpRetryPolicy: %w", err)
		}
		if m.retry, m.tryTimeout, err = translate.DefaultRetry(&r); err != nil {
			return m, err
		}
	}
	if m.waypoints, err = gateway.NewSettings(some.Path.Normalization, some.AccessLogFile, some.AccessLogEncoding); err != nil {
		return m, err
	}
	for _, known := range []string{"rootNamespace", "trustDomain", "discoverySelectors", "mistnet", "defaultVirtualServiceExportTo",
		"defaultDestinationRuleExportTo", "defaultHttpRetryPolicy", "pathNormalization", "accessLogFile", "accessLogEncoding"} {
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
	cfg.VirtualServiceExportTo, cfg.DestinationRuleExportTo = m.virtualServices, m.destinationRules
	cfg.Retry, cfg.TryTimeout = m.retry, m.tryTimeout
	return cfg
}

// problem says which fields have no effect.
func (m meshConfig) problem(configMap translate.Name) []Problem {
	if len(m.ignored) == 0 {
		return nil
	}
	return []Problem{{Resource: "configmaps", Name: configMap, Reason: "fields of mesh without effect: " + strings.Join(m.ignored, ", "), InForce: true}}
}

func (m meshConfig) tell(log *zap.Logger) {
	if len(m.ignored) > 0 {
		log.Info("mesh configuration has fields without effect here", zap.Strings("fields", m.ignored))
	}
}
