package kube_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mistnet/mistnet/istiod/gateway"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/kube"
)

// TestWaypointsWithARealAPIServer: with the permissions of testdata/rbac.yaml and no others, what is planned is accepted and
// goes where it is not wanted any more, a bad overlay is told, and what Istio wrote before becomes ours.
func TestWaypointsWithARealAPIServer(t *testing.T) {
	s := startAPIServer(t)
	kubeconfig := s.prepare()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api").Output()
	s.check(err)
	for _, kind := range []string{"gatewayclasses", "gateways"} {
		text, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "config", "crd", "standard", "gateway.networking.k8s.io_"+kind+".yaml"))
		s.check(err)
		s.apply(text, map[string]schema.GroupVersionResource{
			"CustomResourceDefinition": {Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}})
	}
	s.namespace("shop")
	gw := waypointGateway("shop", "waypoint", func(spec map[string]any) {
		spec["infrastructure"] = map[string]any{"parametersRef": map[string]any{"group": "", "kind": "ConfigMap", "name": "options"}}
	})
	s.create(gateways, gw)
	ctx := t.Context()
	options := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "options"}, Data: map[string]string{
		"horizontalPodAutoscaler": "spec: {maxReplicas: 3}", "podDisruptionBudget": "spec: {minAvailable: 1}"}}
	options, err = s.kube.CoreV1().ConfigMaps("shop").Create(ctx, options, metav1.CreateOptions{})
	s.check(err)
	// What Istio would have made: arguments and a volume that are not ours.
	theirs := `{apiVersion: apps/v1, kind: Deployment, metadata: {name: waypoint, namespace: shop, labels: {gateway.istio.io/managed: istio.io-mesh-controller}},
spec: {selector: {matchLabels: {gateway.networking.k8s.io/gateway-name: waypoint}}, template: {metadata: {labels: {gateway.networking.k8s.io/gateway-name: waypoint}},
spec: {containers: [{name: istio-proxy, image: "proxyv2:1", args: [proxy, waypoint], volumeMounts: [{name: istio-envoy, mountPath: /etc/istio/proxy}]}], volumes: [{name: istio-envoy, emptyDir: {}}]}}}}`
	_, err = s.dynamic.Resource(deployments).Namespace("shop").Patch(ctx, "waypoint", types.ApplyPatchType, []byte(theirs), metav1.PatchOptions{FieldManager: "istio.io/gateway-controller"})
	s.check(err)

	clients, err := kube.Connect(kubeconfig, "test")
	s.check(err)
	source := kube.New(kube.Config{Clients: clients, Identity: "a", Waypoints: gateway.Config{Image: "waypoint:1"}})
	running, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- source.Run(running, func([]index.Event) {}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	})

	s.await("the Deployment is ours", patience, func(ctx context.Context) error {
		d, err := s.kube.AppsV1().Deployments("shop").Get(ctx, "waypoint", metav1.GetOptions{})
		if err != nil {
			return err
		}
		pod := d.Spec.Template.Spec
		if c := pod.Containers[0]; len(pod.Containers) != 1 || c.Image != "waypoint:1" || len(c.Args) > 0 || len(c.VolumeMounts) != 2 || len(pod.Volumes) != 2 {
			return fmt.Errorf("pod %+v", pod)
		}
		return nil
	})
	s.await("it has an autoscaler and a budget", patience, func(ctx context.Context) error {
		_, a := s.kube.AutoscalingV2().HorizontalPodAutoscalers("shop").Get(ctx, "waypoint", metav1.GetOptions{})
		_, b := s.kube.PolicyV1().PodDisruptionBudgets("shop").Get(ctx, "waypoint", metav1.GetOptions{})
		_, c := s.kube.CoreV1().ServiceAccounts("shop").Get(ctx, "waypoint", metav1.GetOptions{})
		return errors.Join(a, b, c)
	})
	d, err := s.kube.AppsV1().Deployments("shop").Get(ctx, "waypoint", metav1.GetOptions{})
	s.check(err)
	d.Status.Replicas, d.Status.ReadyReplicas, d.Status.AvailableReplicas = 1, 1, 1
	_, err = s.kube.AppsV1().Deployments("shop").UpdateStatus(ctx, d, metav1.UpdateOptions{})
	s.check(err)
	s.conditionIs("Programmed", "True Programmed")
	s.conditionIs("Accepted", "True Accepted")
	for _, name := range []string{"istio-waypoint", "mistnet-waypoint"} {
		s.await(name+" is accepted", patience, func(ctx context.Context) error {
			u, err := s.dynamic.Resource(classes).Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if features, _, _ := unstructured.NestedSlice(u.Object, "status", "supportedFeatures"); len(features) < 10 || conditionIn(u, "Accepted") != "True Accepted" {
				return fmt.Errorf("status %v", u.Object["status"])
			}
			return nil
		})
	}

	// An image without a name is what only the API server finds fault with.
	options.Data = map[string]string{"deployment": `spec: {template: {spec: {containers: [{name: istio-proxy, image: ""}]}}}`}
	options, err = s.kube.CoreV1().ConfigMaps("shop").Update(ctx, options, metav1.UpdateOptions{})
	s.check(err)
	s.conditionIs("Accepted", "False InvalidParameters")
	s.conditionIs("Programmed", "True Programmed")
	options.Data = map[string]string{}
	_, err = s.kube.CoreV1().ConfigMaps("shop").Update(ctx, options, metav1.UpdateOptions{})
	s.check(err)
	s.conditionIs("Accepted", "True Accepted")
	s.await("autoscaler and budget are gone", patience, func(ctx context.Context) error {
		a, err := s.kube.AutoscalingV2().HorizontalPodAutoscalers("shop").List(ctx, metav1.ListOptions{})
		b, err2 := s.kube.PolicyV1().PodDisruptionBudgets("shop").List(ctx, metav1.ListOptions{})
		if err = errors.Join(err, err2); err == nil && len(a.Items)+len(b.Items) > 0 {
			err = fmt.Errorf("%d and %d are left", len(a.Items), len(b.Items))
		}
		return err
	})
}

// conditionIs waits until a condition of Gateway shop/waypoint is "STATUS REASON".
func (s *apiServer) conditionIs(which, want string) {
	s.t.Helper()
	s.await(which+" is "+want, patience, func(ctx context.Context) error {
		u, err := s.dynamic.Resource(gateways).Namespace("shop").Get(ctx, "waypoint", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if got := conditionIn(u, which); got != want {
			return fmt.Errorf("it is %s: %v", got, u.Object["status"])
		}
		return nil
	})
}
