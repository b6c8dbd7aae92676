package gatewayapi

import (
	"testing"

	"k8s.io/apimachinery/pkg/util/sets"
	"sigs.k8s.io/gateway-api/conformance"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/gateway-api/pkg/features"
)

// claimed are the optional features of the Gateway API that a mesh of ours has: whatever the suite asks of meshes. The status
// of our GatewayClasses lists the same (istiod/gateway).
func claimed() []features.FeatureName {
	return sets.List(features.SetsToNamesSet(features.MeshExtendedFeatures, features.HTTPRouteExtendedFeatures))
}

// TestMesh is upstream's suite for meshes, in the cluster that KUBECONFIG names. Where the mesh is installed and namespaces get
// their labels is up to the caller: see e2e/suite. Flags are the suite's own.
func TestMesh(t *testing.T) {
	o := conformance.DefaultOptions(t)
	o.ConformanceProfiles = []suite.ConformanceProfileName{suite.MeshHTTPConformanceProfileName, suite.MeshGRPCConformanceProfileName}
	o.SupportedFeatures = claimed()
	o.GatewayClassName, o.MeshName = "", ""
	conformance.RunConformanceWithOptions(t, o)
}
