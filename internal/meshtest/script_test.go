package meshtest_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
)

func TestRunScriptsTellsAStory(t *testing.T) {
	if meshtest.Update() {
		t.Skip("-update would rewrite the story")
	}
	dir := t.TempDir()
	const story = `# Numbers add up.

add 1 to=2
----
3

echo
one
two
----
one
two

# A directive without output.
nothing
----
`
	if err := os.WriteFile(filepath.Join(dir, "story.txt"), []byte(story), 0o600); err != nil {
		t.Fatal(err)
	}
	var told []string
	meshtest.RunScripts(t, filepath.Join(dir, "*.txt"), func(*testing.T) func(*meshtest.Directive) string {
		return func(d *meshtest.Directive) string {
			told = append(told, fmt.Sprintf("%s to=%s %d lines", d.Command, d.Get("to"), strings.Count(d.Input, "\n")))
			switch d.Command {
			case "add":
				told = append(told, "word "+d.Word(0))
				return "3\n"
			case "echo":
				return d.Input
			}
			return ""
		}
	})
	if diff := cmp.Diff([]string{"add to=2 0 lines", "word 1", "echo to= 2 lines", "nothing to= 0 lines"}, told); diff != "" {
		t.Errorf("directives (-want +got):\n%s", diff)
	}
}

func TestWorldReadsNouns(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const story = `workload shop/cart-1 addr=10.0.0.1,fd00::1 sa=cart node=n1 locality=r/z/s hbone unhealthy capacity=3 services=shop/cart.svc[80:8080;81:8181] waypoint=shop/wp.svc:15008 gateway=n2/[fd00::9]:15008
----

service shop/cart.svc vip=10.96.0.1,n2@10.97.0.0/16 ports=80:0 lb=failover:network,zone sans=td/ns/a/sa/b weighted=shop/wp.svc:15008*2 families=v4 canonical
----
`
	if err := os.WriteFile(filepath.Join(dir, "story.txt"), []byte(story), 0o600); err != nil {
		t.Fatal(err)
	}
	w := meshtest.NewWorld()
	meshtest.RunScripts(t, filepath.Join(dir, "*.txt"), func(*testing.T) func(*meshtest.Directive) string {
		return func(d *meshtest.Directive) string {
			if !w.Run(d) {
				d.Fatalf("not a noun")
			}
			return ""
		}
	})
	wantWorkload := &mesh.Workload{
		UID: "Kubernetes//Pod/shop/cart-1", Name: "cart-1", Namespace: "shop", TrustDomain: "cluster.local", ServiceAccount: "cart",
		Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}, Node: "n1", ClusterID: "Kubernetes",
		Locality: mesh.Locality{Region: "r", Zone: "z", Subzone: "s"}, Protocol: mesh.ProtocolHBONE, Capacity: 3,
		Waypoint:       mesh.GatewayAddress{Namespace: "shop", Hostname: "wp.svc", Port: 15008},
		NetworkGateway: mesh.GatewayAddress{Addr: mesh.NetworkAddr{Network: "n2", Addr: netip.MustParseAddr("fd00::9")}, Port: 15008},
		Services: []mesh.ServicePorts{{Service: "shop/cart.svc", Ports: []mesh.Port{
			{ServicePort: 80, TargetPort: 8080}, {ServicePort: 81, TargetPort: 8181},
		}}},
	}
	wantService := &mesh.Service{
		Name: "cart", Namespace: "shop", Hostname: "cart.svc", Canonical: true, Families: mesh.FamiliesIPv4,
		VIPs:  []mesh.VIP{{Prefix: netip.MustParsePrefix("10.96.0.1/32")}, {Network: "n2", Prefix: netip.MustParsePrefix("10.97.0.0/16")}},
		Ports: []mesh.Port{{ServicePort: 80}}, SANs: []mesh.Identity{{TrustDomain: "td", Namespace: "a", ServiceAccount: "b"}},
		LB: mesh.LoadBalancing{Mode: mesh.LBFailover, Preference: []mesh.LBScope{mesh.ScopeNetwork, mesh.ScopeZone}},
		WeightedWaypoints: []mesh.WeightedGateway{{
			Gateway: mesh.GatewayAddress{Namespace: "shop", Hostname: "wp.svc", Port: 15008}, Weight: 2,
		}},
	}
	same := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	prefix := cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
	if diff := cmp.Diff(wantWorkload, w.Snapshot.Pod("shop", "cart-1"), same); diff != "" {
		t.Errorf("workload (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(wantService, w.Snapshot.Service("shop/cart.svc"), same, prefix); diff != "" {
		t.Errorf("service (-want +got):\n%s", strings.TrimSpace(diff))
	}
}
