package gatewayapi

import (
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/gateway-api/conformance"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/gateway-api/pkg/features"
)

// class is the GatewayClass of waypoints.
const class = "istio-waypoint"

// claimed are the features of the Gateway API that the mesh says it has, in status.supportedFeatures of its class: what is
// said there is what upstream's suite looks at. Left to itself, the suite passes over what a class says of meshes.
func claimed(t *testing.T, o suite.ConformanceOptions) []features.FeatureName {
	t.Helper()
	var gc gatewayv1.GatewayClass
	if err := o.Client.Get(t.Context(), types.NamespacedName{Name: class}, &gc); err != nil {
		t.Fatal(err)
	}
	all := make([]features.FeatureName, 0, len(gc.Status.SupportedFeatures))
	for _, f := range gc.Status.SupportedFeatures {
		all = append(all, features.FeatureName(f.Name))
	}
	if !slices.Contains(all, features.SupportMesh) || !slices.IsSorted(all) {
		t.Fatalf("GatewayClass %s claims %v, want a sorted list with %s", class, all, features.SupportMesh)
	}
	return all
}

// TestMesh is upstream's suite for meshes, in the cluster that KUBECONFIG names. Where the mesh is installed and namespaces get
// their labels is up to the caller: see e2e/suite. Flags are the suite's own.
func TestMesh(t *testing.T) {
	o := conformance.DefaultOptions(t)
	o.ConformanceProfiles = []suite.ConformanceProfileName{suite.MeshHTTPConformanceProfileName, suite.MeshGRPCConformanceProfileName}
	o.SupportedFeatures = claimed(t, o)
	o.GatewayClassName, o.MeshName = "", ""
	conformance.RunConformanceWithOptions(t, o)
}
