package install_test

import (
	"testing"

	"github.com/mistnet/mistnet/cli/install"
	"github.com/mistnet/mistnet/manifests"
)

// TestStructuresOfKubernetes have keys that the charts' defaults do not name: they are taken, beside those that no structure has.
func TestStructuresOfKubernetes(t *testing.T) {
	t.Parallel()
	charts, err := install.LoadCharts(manifests.Files)
	if err != nil {
		t.Fatal(err)
	}
	for _, chart := range []string{"istiod", "cni", "ztunnel"} {
		for _, set := range []string{".resources.limits.memory=1Gi", ".resources.requests.ephemeral-storage=1Gi", ".nodeSelector.pool=infra"} {
			if _, err := charts.Settle(install.Input{Sets: []string{chart + set}}, nil); err != nil {
				t.Errorf("--set %s%s: %v", chart, set, err)
			}
		}
		_, err := charts.Settle(install.Input{Sets: []string{chart + ".resource.limits.memory=1Gi"}}, nil)
		wantError(t, err, `unknown value "`+chart+`.resource"`)
	}
}
