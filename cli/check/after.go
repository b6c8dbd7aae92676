package check

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/cli/inspect"
	"github.com/mistnet/mistnet/cli/install"
)

const (
	labelMode       = "istio.io/dataplane-mode"
	redirection     = "ambient.istio.io/redirection"
	rootConfigMap   = "istio-ca-root-cert"
	istiodDebugPort = 15014
)

func (c *Checker) controlPlane(ctx context.Context) Group {
	g := Group{Title: "Control plane"}
	inv, err := install.ReadInventory(ctx, c.Cluster)
	switch {
	case err != nil:
		g.failed("read what mistctl installed", err)
	case inv == nil:
		g.doubt("run mistctl install, unless Helm installed it; -i names another namespace", "mistctl installed nothing in namespace %s", c.Cluster.Namespace)
	case !inv.Complete:
		g.bad("run the same mistctl install or upgrade again", "an installation of version %s was interrupted", inv.Version)
	case c.Version != "" && inv.Version != c.Version:
		g.doubt("run mistctl upgrade, or use the mistctl of that version", "version %s is installed, mistctl has %s", inv.Version, c.Version)
	default:
		g.good("version %s is installed completely", inv.Version)
	}
	d, err := c.Cluster.Kube.AppsV1().Deployments(c.Cluster.Namespace).Get(ctx, "istiod", metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		g.bad("run mistctl install", "there is no istiod in namespace %s", c.Cluster.Namespace)
		return g
	case err != nil:
		g.failed("read Deployment istiod", err)
		return g
	}
	want := int32(1)
	if d.Spec.Replicas != nil {
		want = *d.Spec.Replicas
	}
	c.count(ctx, &g, "istiod", "app=istiod", d.Status.AvailableReplicas, want)
	c.roots(ctx, &g)
	return g
}

// count says whether all pods of a program are ready, and why not.
func (c *Checker) count(ctx context.Context, g *Group, name, selector string, ready, want int32) {
	if ready >= want && want > 0 {
		g.good("%s: %d of %d pods ready", name, ready, want)
		return
	}
	hint := fmt.Sprintf("kubectl -n %s describe pods -l %s", c.Cluster.Namespace, selector)
	pods, err := c.Cluster.Kube.CoreV1().Pods(c.Cluster.Namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err == nil {
		if why := install.Trouble(pods.Items); why != "" {
			hint = why + "; " + hint
		}
	}
	g.bad(hint, "%s: %d of %d pods ready", name, ready, want)
}

func (c *Checker) roots(ctx context.Context, g *Group) {
	namespaces, err := c.Cluster.Kube.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		g.failed("list namespaces", err)
		return
	}
	list, err := c.Cluster.Kube.CoreV1().ConfigMaps("").List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + rootConfigMap})
	if err != nil {
		g.failed("read root certificates", err)
		return
	}
	roots := make(map[string][]string) // certificate → namespaces
	has := make(map[string]bool)
	for _, cm := range list.Items {
		pem := strings.TrimSpace(cm.Data["root-cert.pem"])
		has[cm.Namespace] = pem != ""
		if pem != "" {
			roots[pem] = append(roots[pem], cm.Namespace)
		}
	}
	var missing []string
	for _, ns := range namespaces.Items {
		if !has[ns.Name] && ns.DeletionTimestamp == nil {
			missing = append(missing, ns.Name)
		}
	}
	switch {
	case len(missing) > 0:
		g.bad("istiod writes it: is it running, and its discoverySelectors as wide as you think? kubectl logs deploy/istiod",
			"ConfigMap %s is missing in %s", rootConfigMap, some(missing))
	case len(roots) > 1:
		groups := slices.SortedFunc(maps.Values(roots), func(a, b []string) int { return cmp.Compare(len(a), len(b)) })
		g.bad("delete it there: istiod writes it anew", "ConfigMap %s differs in %s", rootConfigMap, some(groups[0]))
	default:
		g.good("every namespace has the same root certificate (%d)", len(namespaces.Items))
	}
}

func some(names []string) string {
	slices.Sort(names)
	if n := len(names) - 5; n > 0 {
		return strings.Join(names[:5], ", ") + fmt.Sprintf(" and %d more", n)
	}
	return strings.Join(names, ", ")
}

func (c *Checker) dataPlane(ctx context.Context) Group {
	g := Group{Title: "Data plane"}
	for name, selector := range map[string]string{"istio-cni-node": "k8s-app=istio-cni-node", "ztunnel": "app=ztunnel"} {
		d, err := c.Cluster.Kube.AppsV1().DaemonSets(c.Cluster.Namespace).Get(ctx, name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			g.bad("run mistctl install", "there is no DaemonSet %s in namespace %s", name, c.Cluster.Namespace)
			continue
		case err != nil:
			g.failed("read DaemonSet "+name, err)
			continue
		}
		c.count(ctx, &g, name, selector, d.Status.NumberAvailable, d.Status.DesiredNumberScheduled)
		if d.Status.UpdatedNumberScheduled < d.Status.DesiredNumberScheduled {
			g.doubt("an upgrade is under way, or stuck: kubectl -n "+c.Cluster.Namespace+" rollout status ds/"+name,
				"%s: %d of %d pods have the newest version", name, d.Status.UpdatedNumberScheduled, d.Status.DesiredNumberScheduled)
		}
	}
	slices.SortFunc(g.Lines, func(a, b Line) int { return cmp.Compare(a.Text, b.Text) })
	c.images(ctx, &g)
	c.connected(ctx, &g)
	return g
}

// images says whether the programs are of one version.
func (c *Checker) images(ctx context.Context, g *Group) {
	pods, err := c.Cluster.Kube.CoreV1().Pods(c.Cluster.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		g.failed("list pods", err)
		return
	}
	versions := make(map[string][]string)
	for _, p := range pods.Items {
		if !Component(p.Labels) {
			continue
		}
		for _, ct := range p.Spec.Containers {
			v := Tag(ct.Image)
			versions[v] = append(versions[v], p.Name)
		}
	}
	switch len(versions) {
	case 0:
	case 1:
		for v := range versions {
			g.good("all components are of version %s", v)
		}
	default:
		g.doubt("run mistctl upgrade, or wait until it is done", "components are of several versions: %s", strings.Join(slices.Sorted(maps.Keys(versions)), ", "))
	}
}

// Component reports whether labels are those of a pod of the mesh itself.
func Component(labels map[string]string) bool {
	return labels["app"] == "istiod" || labels["app"] == "ztunnel" || labels["k8s-app"] == "istio-cni-node"
}

// Tag is the version of an image's name.
func Tag(image string) string {
	image, _, _ = strings.Cut(image, "@")
	if i := strings.LastIndexByte(image, ':'); i > strings.LastIndexByte(image, '/') {
		return image[i+1:]
	}
	return "latest"
}

// connected says whether istiod has a connection from the ztunnel of every node, and what those refused.
func (c *Checker) connected(ctx context.Context, g *Group) {
	pods, err := c.Cluster.Kube.CoreV1().Pods(c.Cluster.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		g.failed("list pods", err)
		return
	}
	var clients []inspect.Client
	asked := false
	for _, p := range pods.Items {
		if p.Labels["app"] != "istiod" || p.Status.Phase != corev1.PodRunning {
			continue
		}
		b, err := c.page(ctx, p.Namespace, p.Name, istiodDebugPort, "/debug/xds")
		if err != nil {
			g.failed("ask "+p.Name+" for its clients", err)
			continue
		}
		these, err := inspect.ReadClients(b, p.Name)
		if err != nil {
			g.failed("ask "+p.Name+" for its clients", err)
			continue
		}
		asked = true
		clients = append(clients, these...)
	}
	if !asked {
		return
	}
	var lost []string
	n := 0
	for _, p := range pods.Items {
		if p.Labels["app"] != "ztunnel" || p.Status.Phase != corev1.PodRunning {
			continue
		}
		n++
		if !slices.ContainsFunc(clients, func(cl inspect.Client) bool { return strings.Contains(cl.Node, "~"+p.Name+"."+p.Namespace+"~") }) {
			lost = append(lost, p.Name+" on "+p.Spec.NodeName)
		}
	}
	if len(lost) > 0 {
		g.bad("look at its log: kubectl -n "+c.Cluster.Namespace+" logs POD; is a NetworkPolicy blocking port 15012?", "not connected to istiod: %s", some(lost))
	} else if n > 0 {
		g.good("every ztunnel is connected to istiod (%d)", n)
	}
	for _, cl := range clients {
		for _, t := range cl.Types {
			for name, why := range t.Rejected {
				g.doubt("mistctl proxy-status shows all of them", "%s refuses %s: %s", cl.Peer, name, why)
			}
		}
	}
}

func (c *Checker) enrolment(ctx context.Context) Group {
	g := Group{Title: "Pods"}
	namespaces, err := c.Cluster.Kube.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		g.failed("list namespaces", err)
		return g
	}
	pods, err := c.Cluster.Kube.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		g.failed("list pods", err)
		return g
	}
	mode := make(map[string]string)
	var labelled []string
	for _, ns := range namespaces.Items {
		mode[ns.Name] = ns.Labels[labelMode]
		if mode[ns.Name] == "ambient" {
			labelled = append(labelled, ns.Name)
		}
		if ns.Labels["istio-injection"] == "enabled" {
			g.doubt("label it "+labelMode+"=ambient instead", "namespace %s asks for sidecars, which this mesh does not have", ns.Name)
		}
	}
	if len(labelled) == 0 {
		g.doubt("kubectl label namespace NAME "+labelMode+"=ambient", "no namespace is in the mesh")
	} else {
		g.good("in the mesh: %s", some(labelled))
	}
	enrolled := 0
	var late []string
	for _, p := range pods.Items {
		if p.Annotations[redirection] == "enabled" {
			enrolled++
		} else if wanted(&p, mode[p.Namespace]) {
			late = append(late, fmt.Sprintf("%s/%s (%s)", p.Namespace, p.Name, cmp.Or(p.Annotations[redirection], "not yet")))
		}
	}
	if len(late) > 0 {
		g.bad("is the node agent ready on its node? kubectl -n "+c.Cluster.Namespace+" logs -l k8s-app=istio-cni-node", "not enrolled: %s", some(late))
	}
	if enrolled > 0 {
		g.good("%d pods are enrolled", enrolled)
	}
	return g
}

// wanted reports whether the pod should be in the mesh, of a namespace with this mode.
func wanted(p *corev1.Pod, mode string) bool {
	switch {
	case p.Spec.HostNetwork, p.Status.Phase != corev1.PodRunning, p.DeletionTimestamp != nil, p.Annotations["sidecar.istio.io/status"] != "":
		return false
	case p.Labels[labelMode] != "":
		return p.Labels[labelMode] == "ambient"
	}
	return mode == "ambient"
}
