package cli_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/cli/fakeapi"
)

type object = fakeapi.Object

// programs plays istiod: it programs every Gateway, or says why not.
func programs(reason string) func(string, object) {
	return func(kind string, o object) {
		if kind != "Gateway" {
			return
		}
		status := "False"
		if reason == "Programmed" {
			status = "True"
		}
		o["status"] = object{"conditions": []any{object{"type": "Accepted", "status": "True", "reason": "Accepted"},
			object{"type": "Programmed", "status": status, "reason": reason, "message": "as the test says"}}}
	}
}

func namespaceIn(api *fakeapi.Server, name string, labels object) {
	api.Put("/api/v1/namespaces/"+name, object{"apiVersion": "v1", "kind": "Namespace", "metadata": object{"name": name, "labels": labels}})
}

const shopGateway = "/apis/gateway.networking.k8s.io/v1/namespaces/shop/gateways/"

func TestWaypointGenerate(t *testing.T) {
	t.Parallel()
	const want = `apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  labels:
    istio.io/rev: canary
    istio.io/waypoint-for: all
  name: edge
  namespace: shop
spec:
  gatewayClassName: istio-waypoint
  listeners:
  - name: mesh
    port: 15008
    protocol: HBONE
`
	if status, out, errOut := mistctl(t, "waypoint", "generate", "-n", "shop", "--name", "edge", "--for", "all", "--revision", "canary"); status != 0 || out != want {
		t.Errorf("status %d, printed %s%s, want %s", status, out, errOut, want)
	}
	if _, out, _ := mistctl(t, "waypoint", "generate"); strings.Contains(out, "labels") || strings.Contains(out, "namespace") || !strings.Contains(out, "name: waypoint\n") {
		t.Errorf("without flags:\n%s", out)
	}
}

func TestWaypointsLife(t *testing.T) {
	t.Parallel()
	api := fakeapi.New(t)
	api.GatewayAPI, api.Stored = true, programs("Programmed")
	namespaceIn(api, "shop", object{"istio.io/dataplane-mode": "ambient"})
	namespaceIn(api, "plain", object{"kept": "yes"})
	api.Put(shopGateway+"ingress", object{"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
		"metadata": object{"name": "ingress", "namespace": "shop"}, "spec": object{"gatewayClassName": "istio"}})
	kubeconfig := api.Kubeconfig(t)
	for _, step := range []struct {
		args string
		want []string // parts of what is printed
		code int
	}{
		{"list -n shop", []string{"No waypoints found in namespace shop; -A looks in all.\n"}, 0},
		{"list", []string{"No waypoints found in namespace default;"}, 0},
		{"status", []string{"No waypoints found in namespace default;"}, 0},
		{"list -A", []string{"No waypoints found.\n"}, 0},
		{"apply -n shop edge", []string{"takes no arguments", "--name edge"}, 1},
		{"generate edge", []string{"takes no arguments", "--name edge"}, 1},
		{"status edge", []string{"takes no arguments"}, 1},
		{"apply -n shop --enroll-namespace --wait", []string{"✅ waypoint shop/waypoint applied", "is ready!", `✅ namespace shop labeled with "istio.io/use-waypoint: waypoint"`}, 0},
		{"apply -n shop --enroll-namespace", []string{"applied", "labeled"}, 0}, // the same again
		{"apply -n shop --enroll-namespace --name other", []string{"uses waypoint waypoint already", "--overwrite"}, 1},
		{"apply -n shop --enroll-namespace --name other --overwrite -r v1", []string{`"istio.io/use-waypoint: other"`}, 0},
		{"apply -n plain --enroll-namespace --for workload", []string{"⚠️  namespace plain is not in the mesh", "labeled"}, 0},
		{"apply -n nowhere", []string{"there is no namespace nowhere"}, 1},
		{"apply -n shop --for some", []string{`"some" is none of all, none, service, workload`}, 1},
		{"apply -n shop --name none", []string{"none is reserved"}, 1},
		{"list -n shop", []string{"NAME         REVISION     TRAFFIC TYPE     PROGRAMMED\nother        v1           service          True\nwaypoint     default      service          True\n"}, 0},
		{"list -A --name missing", []string{"No waypoints named missing found.\n"}, 0},
		{"status -n shop --name other", []string{"MESSAGE\nother "}, 0},
		{"list -A", []string{"NAMESPACE", "plain         waypoint     default      workload         True"}, 0},
		{"status -n shop", []string{"waypoint     True       Programmed     Programmed     as the test says"}, 0},
		{"delete -n shop", []string{"give the names of waypoints"}, 1},
		{"delete -n shop waypoint --all", []string{"not both"}, 1},
		{"delete -n shop ingress", []string{"there is no waypoint shop/ingress"}, 1},
		{"delete -n shop --revision v1", []string{"waypoint shop/other deleted"}, 0},
		{"delete -n shop waypoint missing", []string{"waypoint shop/waypoint deleted", "there is no waypoint shop/missing"}, 1},
		{"delete -n plain --all --name waypoint", []string{"not both"}, 1},
		{"delete -n plain --name waypoint", []string{"waypoint plain/waypoint deleted"}, 0},
		{"delete -n plain --all", nil, 0},
		{"list -A", []string{"No waypoints found."}, 0},
	} {
		code, out, errOut := mistctl(t, append(append([]string{"waypoint"}, strings.Fields(step.args)...), "--kubeconfig", kubeconfig)...)
		for _, want := range step.want {
			if !strings.Contains(out+errOut, want) || code != step.code {
				t.Errorf("%s: status %d, printed\n%s%s, want %d and %q", step.args, code, out, errOut, step.code, want)
			}
		}
	}
	if !slices.Contains(api.Paths(), shopGateway+"ingress") {
		t.Error("a Gateway that is no waypoint was removed")
	}
	if labels := api.Get("/api/v1/namespaces/plain")["metadata"].(object)["labels"].(object); labels["kept"] != "yes" || labels["istio.io/use-waypoint"] != "waypoint" {
		t.Errorf("labels of namespace plain = %v", labels)
	}
}

func TestWaypointsThatAreNotReady(t *testing.T) {
	t.Parallel()
	api := fakeapi.New(t)
	api.Stored = programs("AddressNotAssigned")
	kubeconfig := api.Kubeconfig(t)
	if _, _, errOut := mistctl(t, "waypoint", "apply", "--kubeconfig", kubeconfig); !strings.Contains(errOut, "install the definitions of the Gateway API") {
		t.Errorf("without the Gateway API: %s", errOut)
	}
	other := fakeapi.New(t)
	other.GatewayAPI, other.Stored = true, programs("AddressNotAssigned")
	kubeconfig = other.Kubeconfig(t)
	for _, args := range []string{"apply --wait --waypoint-timeout 10ms", "status --waypoint-timeout 10ms"} {
		code, out, errOut := mistctl(t, append(append([]string{"waypoint"}, strings.Fields(args)...), "--kubeconfig", kubeconfig)...)
		if code != 1 || !strings.Contains(errOut, "waypoint default/waypoint is not ready after 10ms: AddressNotAssigned: as the test says") {
			t.Errorf("%s: status %d, printed\n%s%s", args, code, out, errOut)
		}
	}
	if code, out, _ := mistctl(t, "waypoint", "status", "--wait=false", "--kubeconfig", kubeconfig); code != 0 || !strings.Contains(out, "AddressNotAssigned") {
		t.Errorf("status --wait=false: status %d, printed\n%s", code, out)
	}
}
