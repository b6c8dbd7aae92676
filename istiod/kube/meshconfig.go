package kube

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/mistnet/mistnet/istiod/gateway"
	"github.com/mistnet/mistnet/istiod/translate"
)

// meshConfig is the mesh's configuration, with what it says of the waypoints that Gateways become.
type meshConfig struct {
	*translate.MeshConfig // nil: there is none
	waypoints             gateway.Settings
}

// DeepCopyObject implements runtime.Object.
func (m *meshConfig) DeepCopyObject() runtime.Object { c := *m; return &c }

func (m *meshConfig) selectors() []labels.Selector {
	if m.MeshConfig == nil {
		return nil
	}
	return m.Selectors
}

func readMeshConfig(cm *corev1.ConfigMap) (m *meshConfig, err error) {
	m = new(meshConfig)
	if m.MeshConfig, err = translate.ReadMeshConfig(cm); err != nil {
		return nil, err
	}
	m.waypoints, err = gateway.NewSettings(m.PathNormalization, m.AccessLogFile, m.AccessLogEncoding, m.AccessLogFormat)
	return m, err
}

// trimMesh reads the mesh's ConfigMap: one that makes no sense counts as one that cannot be read.
func trimMesh(o runtime.Object) (runtime.Object, error) {
	switch o := o.(type) {
	case *meshConfig:
		return o, nil
	case *corev1.ConfigMap:
		m, err := readMeshConfig(o)
		if err != nil {
			return nil, fmt.Errorf("mesh configuration: %w", err)
		}
		return m, nil
	}
	return nil, unexpected(o)
}
