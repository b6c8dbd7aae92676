package check

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/cli/install"
)

// oldestMinor is the oldest Kubernetes 1.x the charts take; testedMinor the newest the suites ran on.
const (
	oldestMinor = 30
	testedMinor = 36
)

func (c *Checker) api() Group {
	g := Group{Title: "Kubernetes API"}
	v := c.Cluster.Version
	if v == nil {
		var err error
		if v, err = c.Cluster.Kube.Discovery().ServerVersion(); err != nil {
			g.failed("the API server answers", err)
			return g
		}
	}
	g.good("the API server answers")
	minor, err := strconv.Atoi(strings.TrimRight(v.Minor, "+"))
	switch {
	case err != nil || v.Major != "1":
		g.doubt("the mesh is made for Kubernetes 1."+strconv.Itoa(oldestMinor)+" and newer", "Kubernetes version %q is not understood", v.GitVersion)
	case minor < oldestMinor:
		g.bad(fmt.Sprintf("upgrade Kubernetes to 1.%d or newer", oldestMinor), "Kubernetes %s is too old", v.GitVersion)
	case minor > testedMinor:
		g.doubt(fmt.Sprintf("the newest version the mesh was tested with is 1.%d", testedMinor), "Kubernetes %s is newer than this mesh", v.GitVersion)
	default:
		g.good("Kubernetes %s is supported", v.GitVersion)
	}
	return g
}

// needs are what installing takes: what is applied, waited for, and listed for leftovers.
var needs = []struct{ group, resource, verbs, cluster string }{
	{"", "namespaces", "get,create,delete", "yes"},
	{"", "configmaps", "get,list,create,update,patch,delete", ""},
	{"", "serviceaccounts", "get,patch,delete", ""},
	{"", "services", "get,patch,delete", ""},
	{"", "pods", "list", "yes"},
	{"apps", "deployments", "get,list,patch,delete", ""},
	{"apps", "daemonsets", "get,list,patch,delete", ""},
	{"rbac.authorization.k8s.io", "clusterroles", "get,patch,delete,escalate,bind", "yes"},
	{"rbac.authorization.k8s.io", "clusterrolebindings", "get,patch,delete", "yes"},
	{"rbac.authorization.k8s.io", "roles", "get,patch,delete", ""},
	{"rbac.authorization.k8s.io", "rolebindings", "get,patch,delete", ""},
	{"apiextensions.k8s.io", "customresourcedefinitions", "get,list,patch", "yes"},
	{"coordination.k8s.io", "leases", "get,create,update,delete", ""},
}

func (c *Checker) permissions(ctx context.Context) Group {
	g := Group{Title: "Your permissions"}
	allowed := 0
	for _, n := range needs {
		var missing []string
		for verb := range strings.SplitSeq(n.verbs, ",") {
			namespace := c.Cluster.Namespace
			if n.cluster != "" {
				namespace = ""
			}
			r, err := c.Cluster.Kube.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{
				Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
					Namespace: namespace, Verb: verb, Group: n.group, Resource: n.resource,
				}},
			}, metav1.CreateOptions{})
			if err != nil {
				g.failed("ask for permissions", err)
				return g
			}
			if r.Status.Allowed {
				allowed++
			} else {
				missing = append(missing, verb)
			}
		}
		if len(missing) > 0 {
			where := "in namespace " + c.Cluster.Namespace
			if n.cluster != "" {
				where = "in the whole cluster"
			}
			name := strings.TrimSuffix(n.resource+"."+n.group, ".")
			g.bad("have a cluster administrator grant it, or install as one", "you may not %s %s %s", strings.Join(missing, ", "), name, where)
		}
	}
	if len(g.Lines) == 0 {
		g.good("you may do all that installing takes (%d permissions)", allowed)
	}
	return g
}

func (c *Checker) nodes(ctx context.Context) Group {
	g := Group{Title: "Nodes"}
	list, err := c.Cluster.Kube.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		g.failed("list nodes", err)
		return g
	}
	if len(list.Items) == 0 {
		g.bad("add a node", "the cluster has no nodes")
	}
	fine := 0
	for i := range list.Items {
		if c.node(&g, &list.Items[i]) {
			fine++
		}
	}
	if fine > 0 {
		g.good("%d of %d nodes have a kernel and an architecture that fit", fine, len(list.Items))
	}
	return g
}

// node adds what is wrong with a node and reports whether nothing is.
func (c *Checker) node(g *Group, n *corev1.Node) bool {
	info := n.Status.NodeInfo
	before := len(g.Lines)
	if os := info.OperatingSystem; os != "" && os != "linux" {
		g.doubt("pods on it stay outside the mesh", "node %s runs %s", n.Name, os)
		return false
	}
	if arch := info.Architecture; arch != "" && !slices.Contains([]string{"amd64", "arm64"}, arch) {
		g.bad("the images are made for amd64 and arm64", "node %s is of architecture %s", n.Name, arch)
	}
	major, ok := kernel(info.KernelVersion)
	switch {
	case !ok:
		g.doubt("Linux 4 or newer is needed", "kernel %q of node %s is not understood", info.KernelVersion, n.Name)
	case major < 4:
		g.bad("upgrade it: Kubernetes itself no longer supports it", "kernel %s of node %s is too old", info.KernelVersion, n.Name)
	case major < 5:
		g.doubt("the suites run on Linux 6: try it with a namespace that does not matter first", "kernel %s of node %s was not tried", info.KernelVersion, n.Name)
	}
	for _, cond := range n.Status.Conditions {
		if cond.Type == corev1.NodeReady && cond.Status != corev1.ConditionTrue {
			g.doubt("kubectl describe node "+n.Name, "node %s is not ready: %s", n.Name, cond.Reason)
		}
	}
	for _, taint := range n.Spec.Taints {
		if taint.Key == "cni.istio.io/not-ready" {
			g.doubt("it is removed when the node agent is ready there", "node %s still has the taint %s", n.Name, taint.Key)
		}
	}
	return len(g.Lines) == before
}

// kernel is the first number of a kernel's version.
func kernel(version string) (major int, ok bool) {
	first, _, dotted := strings.Cut(version, ".")
	major, err := strconv.Atoi(first)
	return major, dotted && err == nil
}

func (c *Checker) conflicts(ctx context.Context) Group {
	g := Group{Title: "Other meshes and what is there already"}
	found, err := install.OtherMeshes(ctx, c.Cluster)
	switch {
	case err != nil:
		g.failed("look for other meshes", err)
	case len(found) > 0:
		g.bad("uninstall it first, or install with --force", "there is %s", strings.Join(found, ", "))
	default:
		g.good("there is no other mesh")
	}
	inv, err := install.ReadInventory(ctx, c.Cluster)
	switch {
	case err != nil:
		g.failed("read what mistctl installed", err)
	case inv != nil && !inv.Complete:
		g.doubt("run mistctl install again, or mistctl uninstall", "an installation of version %s was interrupted", inv.Version)
	case inv != nil:
		g.doubt("run mistctl check without --pre, or mistctl upgrade", "version %s is installed", inv.Version)
	default:
		g.good("mistctl installed nothing here yet")
	}
	_, lists, err := c.Cluster.Kube.Discovery().ServerGroupsAndResources()
	if err != nil && len(lists) == 0 {
		g.failed("ask what the cluster serves", err)
		return g
	}
	gateway := slices.ContainsFunc(lists, func(l *metav1.APIResourceList) bool {
		return strings.HasPrefix(l.GroupVersion, "gateway.networking.k8s.io/")
	})
	if gateway {
		g.good("the Gateway API is installed")
	} else {
		g.doubt("without it the mesh works, but waypoints and gateways cannot be declared: install its CRDs from gateway-api.sigs.k8s.io", "the Gateway API is not installed")
	}
	return g
}
