package install

import (
	"context"
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/cli/cluster"
)

// OtherMeshes finds control planes and node proxies of meshes that mistctl did not install.
func OtherMeshes(ctx context.Context, c *cluster.Cluster) ([]string, error) {
	var found []string
	deployments, err := c.Kube.AppsV1().Deployments("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, cluster.Explain(fmt.Errorf("look for another mesh: %w", err))
	}
	for _, d := range deployments.Items {
		switch {
		case d.Labels[LabelComponent] != "":
		case d.Labels["linkerd.io/control-plane-component"] == "destination":
			found = append(found, "Linkerd (Deployment "+d.Namespace+"/"+d.Name+")")
		case d.Labels["app"] == "istiod", d.Name == "istiod":
			found = append(found, whose(d.Annotations)+" (Deployment "+d.Namespace+"/"+d.Name+")")
		case d.Name == "consul-connect-injector", d.Labels["app"] == "kuma-control-plane":
			found = append(found, "a mesh (Deployment "+d.Namespace+"/"+d.Name+")")
		}
	}
	sets, err := c.Kube.AppsV1().DaemonSets("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, cluster.Explain(fmt.Errorf("look for another mesh: %w", err))
	}
	for _, d := range sets.Items {
		if d.Labels[LabelComponent] == "" && (d.Name == "ztunnel" || d.Labels["app"] == "ztunnel" || d.Name == "istio-cni-node") {
			found = append(found, whose(d.Annotations)+" (DaemonSet "+d.Namespace+"/"+d.Name+")")
		}
	}
	return found, nil
}

func whose(annotations map[string]string) string {
	if release := annotations["meta.helm.sh/release-name"]; release != "" {
		return "Helm release " + release
	}
	return "Istio"
}

func (in *Installer) otherMesh(ctx context.Context) error {
	if in.Force {
		return nil
	}
	found, err := OtherMeshes(ctx, in.Cluster)
	if err != nil || len(found) == 0 {
		return err
	}
	return fmt.Errorf("another mesh is installed: %s: uninstall it first, or install beside or over it with --force", strings.Join(found, ", "))
}
