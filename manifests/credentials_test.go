package manifests_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestNobodysSecretsAreReadUnlessAsked: the role by which istiod reads Secrets for waypoints is bound where it is asked for only.
func TestNobodysSecretsAreReadUnlessAsked(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		namespaces []any
		want       []string
	}{
		{nil, nil},
		{[]any{"shop", "egress", "shop"}, []string{"RoleBinding shop", "RoleBinding egress"}},
		{[]any{"shop", "*"}, []string{"ClusterRoleBinding "}},
	} {
		values := map[string]any{"waypoint": map[string]any{"credentialNamespaces": tt.namespaces}}
		if tt.namespaces == nil {
			values = nil
		}
		var got []string
		for _, o := range objects(t, mustRender(t, "istiod", values)) {
			role, _ := o.Object["roleRef"].(map[string]any)
			if role["name"] == "istiod-credentials-istio-system" {
				got = append(got, o.GetKind()+" "+o.GetNamespace())
			}
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("bindings for %v (-want +got):\n%s", tt.namespaces, diff)
		}
	}
}
