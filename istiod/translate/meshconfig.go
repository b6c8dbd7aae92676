package translate

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	networkingapi "istio.io/api/networking/v1alpha3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	"github.com/mistnet/mistnet/internal/accesslog"
	"github.com/mistnet/mistnet/internal/mesh"
)

// MeshConfig is what is honoured of Istio's MeshConfig (istio.io/api/mesh/v1alpha1), as one ConfigMap says it.
type MeshConfig struct {
	metav1.TypeMeta
	metav1.ObjectMeta // of the ConfigMap

	// RootNamespace and TrustDomain are taken when istiod starts; "" says nothing.
	RootNamespace, TrustDomain string
	// Selectors pick the namespaces that the mesh is to know; none: all of them.
	Selectors []labels.Selector

	DenyWithoutWaypoint     *bool // as in Config; nil says nothing
	VirtualServiceExportTo  []string
	DestinationRuleExportTo []string
	Retry                   *mesh.Retry
	TryTimeout              time.Duration

	// What waypoints are to do (istiod/gateway.NewSettings reads it).
	PathNormalization string
	AccessLogFile     *string
	AccessLogEncoding string
	AccessLogFormat   string // "" also when it cannot be read: waypoints keep their default

	FormatFault string   // why accessLogFormat cannot be read
	NoValue     []string // operators in it that are always written as not set
	Ignored     []string // other fields that are set
}

// DeepCopyObject implements runtime.Object. What is inside is never changed.
func (m *MeshConfig) DeepCopyObject() runtime.Object { c := *m; return &c }

// ReadMeshConfig reads the key "mesh" of a ConfigMap. Its error names the field that makes no sense: nothing of the ConfigMap is to
// be taken then.
func ReadMeshConfig(cm *corev1.ConfigMap) (*MeshConfig, error) {
	m := &MeshConfig{ObjectMeta: metav1.ObjectMeta{Namespace: cm.Namespace, Name: cm.Name, ResourceVersion: cm.ResourceVersion}}
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
		AccessLogFormat   string  `json:"accessLogFormat"`
		// Mistnet is what Istio's MeshConfig has no field for.
		Mistnet struct {
			WaypointUnavailable string `json:"waypointUnavailable"` // deny or allow
		} `json:"mistnet"`
	}
	text := []byte(cm.Data["mesh"])
	if err := errors.Join(yaml.Unmarshal(text, &all), yaml.Unmarshal(text, &some)); err != nil {
		return nil, fmt.Errorf("key mesh: %w", err)
	}
	m.RootNamespace, m.TrustDomain = some.RootNamespace, some.TrustDomain
	for i := range some.Selectors {
		sel, err := metav1.LabelSelectorAsSelector(&some.Selectors[i])
		if err != nil {
			return nil, fmt.Errorf("discoverySelectors[%d]: %w", i, err)
		}
		m.Selectors = append(m.Selectors, sel)
	}
	switch v := some.Mistnet.WaypointUnavailable; strings.ToLower(v) {
	case "":
	case "deny", "allow":
		deny := strings.EqualFold(v, "deny")
		m.DenyWithoutWaypoint = &deny
	default:
		return nil, fmt.Errorf("mistnet.waypointUnavailable: %q is neither deny nor allow", v)
	}
	m.VirtualServiceExportTo, m.DestinationRuleExportTo = some.VirtualServices, some.DestinationRules
	for name, to := range map[string][]string{"defaultVirtualServiceExportTo": some.VirtualServices, "defaultDestinationRuleExportTo": some.DestinationRules} {
		if slices.Contains(to, "") {
			return nil, fmt.Errorf("%s: an empty name: want *, . or a namespace", name)
		}
	}
	if len(some.Retry) > 0 {
		var r networkingapi.HTTPRetry
		if err := protojson.Unmarshal(some.Retry, &r); err != nil {
			return nil, fmt.Errorf("defaultHttpRetryPolicy: %w", err)
		}
		var err error
		if m.Retry, m.TryTimeout, err = DefaultRetry(&r); err != nil {
			return nil, err
		}
	}
	m.PathNormalization, m.AccessLogFile, m.AccessLogEncoding = some.Path.Normalization, some.AccessLogFile, some.AccessLogEncoding
	m.readFormat(some.AccessLogFormat)
	for _, known := range []string{"rootNamespace", "trustDomain", "discoverySelectors", "mistnet", "defaultVirtualServiceExportTo",
		"defaultDestinationRuleExportTo", "defaultHttpRetryPolicy", "pathNormalization", "accessLogFile", "accessLogEncoding",
		"accessLogFormat"} {
		delete(all, known)
	}
	m.Ignored = slices.Sorted(maps.Keys(all))
	return m, nil
}

// readFormat reads accessLogFormat, which is of the encoding that m has. As in Istio, one that cannot be read is no reason to refuse
// the rest.
func (m *MeshConfig) readFormat(format string) {
	if format == "" {
		return
	}
	parse := accesslog.ParseText
	if strings.EqualFold(m.AccessLogEncoding, "JSON") {
		parse = accesslog.ParseJSON
	}
	f, err := parse(format)
	if err != nil {
		m.FormatFault = strings.ReplaceAll(err.Error(), "\n", ", ")
		return
	}
	m.AccessLogFormat, m.NoValue = format, f.Never
}

// WithMesh is the configuration with what the mesh's own says instead, of that which may change while istiod runs; nil says nothing.
func (c Config) WithMesh(m *MeshConfig) Config {
	if m == nil {
		return c
	}
	if m.DenyWithoutWaypoint != nil {
		c.DenyWithoutWaypoint = *m.DenyWithoutWaypoint
	}
	c.VirtualServiceExportTo, c.DestinationRuleExportTo = m.VirtualServiceExportTo, m.DestinationRuleExportTo
	c.Retry, c.TryTimeout = m.Retry, m.TryTimeout
	return c
}

// Status says which fields have no effect, or not yet, where this configuration holds.
func (m *MeshConfig) Status(cfg Config) *Status {
	if m == nil {
		return nil
	}
	f := faults{kind: "ConfigMap", namespace: m.Namespace, name: m.Name}
	for _, fixed := range []struct{ field, want, is string }{
		{"trustDomain", m.TrustDomain, cfg.TrustDomain}, {"rootNamespace", m.RootNamespace, cfg.RootNamespace},
	} {
		if fixed.want != "" && fixed.want != fixed.is && !cfg.NoStatus {
			f.add(Ignored, "%s: it is %s until istiod is started anew", fixed.field, fixed.is)
		}
	}
	if len(m.Ignored) > 0 {
		f.add(Unsupported, "fields of mesh without effect: %s", strings.Join(m.Ignored, ", "))
	}
	if m.FormatFault != "" {
		f.add(Ignored, "accessLogFormat: waypoints keep their default: %s", m.FormatFault)
	}
	if len(m.NoValue) > 0 {
		f.add(Unsupported, "accessLogFormat: waypoints know no value of %s, and write - or null", strings.Join(m.NoValue, ", "))
	}
	return f.status()
}
