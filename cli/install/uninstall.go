package install

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/mistnet/mistnet/cli/cluster"
	"github.com/mistnet/mistnet/istiod/gateway"
)

// removalOrder is how components leave: the agent first, which takes the redirection out of the pods while ztunnel still
// carries their connections; a pod that is redirected to nobody is cut off.
var removalOrder = []string{"cni", "ztunnel", "istiod", "base"}

// Names of what istiod makes while it runs.
const (
	rootConfigMap = "istio-ca-root-cert"
	caSecret      = "istio-ca-secret"
	redirection   = "ambient.istio.io/redirection"
)

// Uninstall removes what mistctl applied and what the mesh made while it ran. Purge also removes definitions, with all
// objects of their kinds, and the key of the certificate authority.
func (in *Installer) Uninstall(ctx context.Context, purge bool) error {
	if in.Poll == 0 {
		in.Poll = time.Second
	}
	inv, err := ReadInventory(ctx, in.Cluster)
	if err != nil {
		return err
	}
	if inv == nil && !purge {
		if found, err := OtherMeshes(ctx, in.Cluster); err == nil && len(found) > 0 {
			return fmt.Errorf("mistctl installed nothing in namespace %s, and leaves alone what it did not install: %s", in.Cluster.Namespace, strings.Join(found, ", "))
		}
		in.say("mistctl installed nothing in namespace %s: there is nothing to do", in.Cluster.Namespace)
		return nil
	}
	var refs []Ref
	if inv != nil {
		refs = inv.Objects
	}
	crds, err := in.ownCRDs(ctx, refs)
	if err != nil {
		return err
	}
	refs = slices.DeleteFunc(slices.Clone(refs), Ref.isCRD)
	if in.DryRun {
		if purge {
			refs = append(refs, crds...)
		}
		for _, r := range refs {
			in.say("delete     %s", r)
		}
		in.say("dry run: nothing was changed")
		return nil
	}
	unlocked, free := ctx, func() {}
	if _, err := in.Cluster.Kube.CoreV1().Namespaces().Get(ctx, in.Cluster.Namespace, metav1.GetOptions{}); err == nil {
		locked, l, err := takeLock(ctx, in.Cluster, "uninstalls")
		if err != nil {
			return err
		}
		defer l.release()
		ctx, free = locked, l.release
	}
	if err := in.remove(ctx, refs); err != nil {
		return causeOf(ctx, err)
	}
	if err := in.removeMade(ctx, purge); err != nil {
		return causeOf(ctx, err)
	}
	if err := in.removeWaypoints(ctx); err != nil {
		return causeOf(ctx, err)
	}
	if purge {
		for _, r := range crds {
			if err := in.delete(ctx, r, metav1.DeletePropagationForeground); err != nil {
				return causeOf(ctx, err)
			}
		}
		if err := in.gone(ctx, "definitions", crds); err != nil {
			return causeOf(ctx, err)
		}
		in.say("✓ %-10s %d removed", "crds", len(crds))
	}
	if err := in.Cluster.Kube.CoreV1().ConfigMaps(in.Cluster.Namespace).Delete(ctx, inventoryName, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return cluster.Explain(fmt.Errorf("remove the inventory: %w", err))
	}
	free() // the lock is in the namespace
	if err := in.removeNamespace(unlocked); err != nil {
		return causeOf(unlocked, err)
	}
	in.sayLeft(unlocked)
	in.say("✓ the mesh is uninstalled")
	return nil
}

// ownCRDs are the definitions mistctl made: those of the inventory, and those an earlier uninstall left.
func (in *Installer) ownCRDs(ctx context.Context, refs []Ref) ([]Ref, error) {
	kind := Ref{Component: "base", Group: "apiextensions.k8s.io", Version: "v1", Kind: "CustomResourceDefinition"}
	res, err := in.resource(kind)
	if err != nil {
		return nil, cluster.Explain(fmt.Errorf("find definitions: %w", err))
	}
	list, err := res.List(ctx, metav1.ListOptions{LabelSelector: LabelComponent})
	if err != nil {
		return nil, cluster.Explain(fmt.Errorf("find definitions: %w", err))
	}
	crds := slices.DeleteFunc(slices.Clone(refs), func(r Ref) bool { return !r.isCRD() })
	for _, u := range list.Items {
		r := kind
		r.Name = u.GetName()
		crds = union(crds, []Ref{r})
	}
	return crds, nil
}

// remove deletes objects: what would call a component first, then component after component, its programs before the
// permissions they need to clean up behind themselves.
func (in *Installer) remove(ctx context.Context, refs []Ref) error {
	if len(refs) == 0 {
		return nil
	}
	isHook := func(r Ref) bool { return strings.HasSuffix(r.Kind, "WebhookConfiguration") }
	runs := func(r Ref) bool { return r.Kind == "DaemonSet" || r.Kind == "Deployment" }
	for _, r := range refs {
		if isHook(r) {
			if err := in.delete(ctx, r, metav1.DeletePropagationBackground); err != nil {
				return err
			}
		}
	}
	for _, name := range removalOrder {
		var programs, rest []Ref
		for _, r := range refs {
			switch {
			case r.Component != name || isHook(r):
			case runs(r):
				programs = append(programs, r)
			default:
				rest = append(rest, r)
			}
		}
		if len(programs)+len(rest) == 0 {
			continue
		}
		for _, r := range programs {
			if err := in.delete(ctx, r, metav1.DeletePropagationForeground); err != nil {
				return err
			}
		}
		if err := in.gone(ctx, name, programs); err != nil {
			return err
		}
		for _, r := range slices.Backward(rest) {
			if err := in.delete(ctx, r, metav1.DeletePropagationBackground); err != nil {
				return err
			}
		}
		in.say("✓ %-10s %d objects removed", name, len(programs)+len(rest))
	}
	return nil
}

// delete removes one object, unless it is not ours any more.
func (in *Installer) delete(ctx context.Context, r Ref, how metav1.DeletionPropagation) error {
	live, err := in.live(ctx, r)
	if err != nil {
		return cluster.Explain(fmt.Errorf("read %s: %w", r, err))
	}
	if live == nil {
		return nil
	}
	if live.GetLabels()[LabelComponent] == "" {
		in.say("‼ %s is left: somebody replaced it", r)
		return nil
	}
	res, err := in.resource(r)
	if err != nil {
		return err
	}
	uid := live.GetUID()
	err = res.Delete(ctx, r.Name, metav1.DeleteOptions{PropagationPolicy: &how, Preconditions: &metav1.Preconditions{UID: &uid}})
	if err != nil && !apierrors.IsNotFound(err) {
		return cluster.Explain(fmt.Errorf("remove %s: %w", r, err))
	}
	return nil
}

// gone waits until none of the objects is there, nor what they own.
func (in *Installer) gone(ctx context.Context, what string, refs []Ref) error {
	return in.await(ctx, "removal of "+what, func(ctx context.Context) (progress, error) {
		p := progress{want: int32(len(refs)), word: "gone"}
		for _, r := range refs {
			live, err := in.live(ctx, r)
			if err != nil {
				return p, err
			}
			if live == nil || live.GetLabels()[LabelComponent] == "" {
				p.ready++
			}
		}
		p.done = p.ready == p.want
		return p, nil
	})
}

// removeMade deletes what istiod made.
func (in *Installer) removeMade(ctx context.Context, purge bool) error {
	core := in.Cluster.Kube.CoreV1()
	roots, err := core.ConfigMaps("").List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + rootConfigMap})
	if err != nil {
		return cluster.Explain(fmt.Errorf("find root certificates: %w", err))
	}
	for _, cm := range roots.Items {
		if cm.Name != rootConfigMap {
			continue
		}
		if err := core.ConfigMaps(cm.Namespace).Delete(ctx, cm.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return cluster.Explain(fmt.Errorf("remove the root certificate of namespace %s: %w", cm.Namespace, err))
		}
	}
	leases, err := in.Cluster.Kube.CoordinationV1().Leases(in.Cluster.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return cluster.Explain(fmt.Errorf("find leases: %w", err))
	}
	for _, l := range leases.Items {
		if l.Name == "istio-leader" || strings.HasPrefix(l.Name, "istio-leader-") {
			if err := in.Cluster.Kube.CoordinationV1().Leases(l.Namespace).Delete(ctx, l.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
				return cluster.Explain(fmt.Errorf("remove lease %s: %w", l.Name, err))
			}
		}
	}
	if !purge {
		return nil
	}
	if err := core.Secrets(in.Cluster.Namespace).Delete(ctx, caSecret, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return cluster.Explain(fmt.Errorf("remove the key of the certificate authority: %w", err))
	}
	return nil
}

// removeWaypoints deletes what istiod made of Gateways, and the classes it made. The Gateways are people's, and stay.
func (in *Installer) removeWaypoints(ctx context.Context) error {
	n := 0
	for _, kind := range []Ref{
		{Group: "gateway.networking.k8s.io", Version: "v1", Kind: "GatewayClass"},
		{Group: "autoscaling", Version: "v2", Kind: "HorizontalPodAutoscaler"}, {Group: "policy", Version: "v1", Kind: "PodDisruptionBudget"},
		{Group: "apps", Version: "v1", Kind: "Deployment"}, {Version: "v1", Kind: "Service"}, {Version: "v1", Kind: "ServiceAccount"},
	} {
		all, err := in.resource(kind)
		if meta.IsNoMatchError(err) {
			continue
		}
		if err != nil {
			return err
		}
		isClass, selector := kind.Kind == "GatewayClass", gateway.LabelManaged+"="+gateway.Managed
		if isClass {
			selector = ""
		}
		list, err := all.List(ctx, metav1.ListOptions{LabelSelector: selector})
		if err != nil {
			return cluster.Explain(fmt.Errorf("find what waypoints are made of: %w", err))
		}
		for _, u := range list.Items {
			description, _, _ := unstructured.NestedString(u.Object, "spec", "description") //nolint:errcheck // not a string: not ours
			if isClass && description != gateway.ClassDescription {
				continue
			}
			r := kind
			r.Namespace, r.Name = u.GetNamespace(), u.GetName()
			one, err := in.resource(r)
			if err != nil {
				return err
			}
			uid, how := u.GetUID(), metav1.DeletePropagationBackground
			err = one.Delete(ctx, r.Name, metav1.DeleteOptions{PropagationPolicy: &how, Preconditions: &metav1.Preconditions{UID: &uid}})
			if err != nil && !apierrors.IsNotFound(err) {
				return cluster.Explain(fmt.Errorf("remove %s: %w", r, err))
			}
			n++
		}
	}
	if n > 0 {
		in.say("✓ %-10s %d objects removed", "waypoints", n)
	}
	return nil
}

// removeNamespace deletes the control plane's namespace when mistctl made it and nothing of anybody is in it.
func (in *Installer) removeNamespace(ctx context.Context) error {
	core := in.Cluster.Kube.CoreV1()
	ns, err := core.Namespaces().Get(ctx, in.Cluster.Namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return cluster.Explain(fmt.Errorf("read namespace %s: %w", in.Cluster.Namespace, err))
	}
	if ns.Annotations[annotationCreated] == "" {
		return nil
	}
	left, err := in.inNamespace(ctx)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		in.say("‼ namespace %s stays: it holds %s", ns.Name, strings.Join(left, ", "))
		return nil
	}
	if err := core.Namespaces().Delete(ctx, ns.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &ns.UID}}); err != nil && !apierrors.IsNotFound(err) {
		return cluster.Explain(fmt.Errorf("remove namespace %s: %w", ns.Name, err))
	}
	return in.await(ctx, "removal of namespace "+ns.Name, func(ctx context.Context) (progress, error) {
		_, err := core.Namespaces().Get(ctx, ns.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return progress{done: true}, nil
		}
		return progress{want: 1, word: "gone"}, err
	})
}

// inNamespace lists what is in the control plane's namespace that Kubernetes and mistctl did not put there.
func (in *Installer) inNamespace(ctx context.Context) ([]string, error) {
	_, lists, err := in.Cluster.Kube.Discovery().ServerGroupsAndResources()
	if err != nil && len(lists) == 0 {
		return nil, cluster.Explain(fmt.Errorf("ask what the cluster serves: %w", err))
	}
	ordinary := map[string]bool{
		"ConfigMap kube-root-ca.crt": true, "ServiceAccount default": true, "Lease " + lockName: true, "ConfigMap " + rootConfigMap: true,
	}
	passing := map[string]bool{"Event": true, "EndpointSlice": true, "Endpoints": true, "PodMetrics": true, "ReplicaSet": true, "ControllerRevision": true}
	var left []string
	for _, l := range lists {
		for _, r := range l.APIResources {
			if !r.Namespaced || strings.Contains(r.Name, "/") || !slices.Contains(r.Verbs, "list") || passing[r.Kind] {
				continue
			}
			gv, version, _ := strings.Cut(l.GroupVersion, "/")
			if version == "" {
				gv, version = "", l.GroupVersion
			}
			res, err := in.resource(Ref{Group: gv, Version: version, Kind: r.Kind, Namespace: in.Cluster.Namespace})
			if meta.IsNoMatchError(err) {
				continue
			}
			if err != nil {
				return nil, err
			}
			objects, err := res.List(ctx, metav1.ListOptions{})
			if apierrors.IsNotFound(err) || apierrors.IsMethodNotSupported(err) {
				continue
			}
			if err != nil {
				return nil, cluster.Explain(fmt.Errorf("list %s in namespace %s: %w", r.Name, in.Cluster.Namespace, err))
			}
			for _, u := range objects.Items {
				name := r.Kind + " " + u.GetName()
				if !ordinary[name] && !slices.Contains(left, name) && u.GetDeletionTimestamp() == nil {
					left = append(left, name)
				}
			}
		}
	}
	slices.Sort(left)
	return left, nil
}

// sayLeft warns of pods that still are redirected: their node was away, or its agent died.
func (in *Installer) sayLeft(ctx context.Context) {
	pods, err := in.Cluster.Kube.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		in.say("‼ cannot see whether pods are still redirected: %v", err)
		return
	}
	for _, p := range pods.Items {
		if p.Annotations[redirection] != "" {
			in.say("‼ pod %s/%s on node %s is still marked as redirected: restart it if it has no network", p.Namespace, p.Name, p.Spec.NodeName)
		}
	}
}
