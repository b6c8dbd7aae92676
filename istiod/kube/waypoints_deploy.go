package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"

	"go.uber.org/zap"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/gateway"
)

// appliedForm is what was applied of an object, and what the API server made of it: as long as both are the same, applying it
// again changes nothing.
type appliedForm struct{ wanted, got uint64 }

// deploy applies what a Gateway becomes, removes what it is not any more, and tells what there is. An error is worth another
// try.
func (w *waypoints) deploy(ctx context.Context, gw *gatewayv1.Gateway) (gateway.Observed, error) {
	var o gateway.Observed
	plan, err := w.plan(ctx, gw, &o)
	if plan != nil && err == nil {
		err = w.carryOut(ctx, gw, plan)
		// What the API server refuses for what it is, is the fault of who wrote the overlay.
		if apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) {
			if name, bad := gateway.Parameters(gw); bad == nil && name != "" {
				o.Parameters, err = err, nil
			}
		}
		o.Failed = err
	}
	w.observe(gw, &o)
	return o, err
}

// plan is what to apply, or nil when the Gateway cannot be run as it is written: what runs of it goes on as it is.
func (w *waypoints) plan(ctx context.Context, gw *gatewayv1.Gateway, o *gateway.Observed) ([]*unstructured.Unstructured, error) {
	if !slices.ContainsFunc(gw.Spec.Listeners, gateway.Serves) {
		o.Waiting = "there is no listener to serve"
		return nil, nil
	}
	if len(gw.Spec.Addresses) > 0 && gw.Annotations[gateway.AnnotationType] != string(corev1.ServiceTypeLoadBalancer) {
		o.Addresses = errors.New("an IPAddress can only be given to a Service of type LoadBalancer")
		return nil, nil
	}
	if w.cfg.Image == "" {
		o.Waiting = "istiod does not know the image of waypoints (-waypoint-image)"
		return nil, nil
	}
	own, err := w.overlays(ctx, gw, o)
	if err != nil || o.Parameters != nil {
		return nil, err
	}
	cfg := w.cfg
	w.mu.Lock()
	cfg.Settings = w.settings
	w.mu.Unlock()
	plan, err := cfg.Plan(gw, own)
	if err != nil {
		o.Parameters = err
		return nil, nil //nolint:nilerr // it is told in the status
	}
	return plan, nil
}

// overlays reads the ConfigMap that a Gateway names.
func (w *waypoints) overlays(ctx context.Context, gw *gatewayv1.Gateway, o *gateway.Observed) (gateway.Overlays, error) {
	name, err := gateway.Parameters(gw)
	if err != nil || name == "" {
		o.Parameters = err
		return nil, nil //nolint:nilerr // it is told in the status
	}
	cm, err := w.clients.Kube.CoreV1().ConfigMaps(gw.Namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		o.Parameters = fmt.Errorf("spec.infrastructure.parametersRef: there is no ConfigMap %s", name)
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("read the parameters of the Gateway: %w", err)
	}
	return cm.Data, nil
}

// carryOut applies a plan and removes what is not part of it.
func (w *waypoints) carryOut(ctx context.Context, gw *gatewayv1.Gateway, plan []*unstructured.Unstructured) error {
	wanted := make(map[objectKey]bool)
	for _, u := range plan {
		r := resourceOf(u)
		key := objectKey{r.Resource, u.GetNamespace(), u.GetName()}
		wanted[key] = true
		if err := w.apply(ctx, gw, r, key, u); err != nil {
			return fmt.Errorf("%s %s: %w", u.GetKind(), u.GetName(), err)
		}
	}
	for _, u := range w.superfluous(gw, wanted) {
		uid := u.GetUID()
		err := w.clients.Dynamic.Resource(resourceOf(u)).Namespace(u.GetNamespace()).
			Delete(ctx, u.GetName(), metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("remove %s %s: %w", u.GetKind(), u.GetName(), err)
		}
		w.log.Info("removed what a gateway does not ask for any more", zap.String("gateway", gw.Namespace+"/"+gw.Name),
			zap.String("kind", u.GetKind()), zap.String("name", u.GetName()))
	}
	return nil
}

func resourceOf(u *unstructured.Unstructured) schema.GroupVersionResource {
	kinds := map[string]int{"ServiceAccount": 0, "Deployment": 1, "Service": 2, "HorizontalPodAutoscaler": 3, "PodDisruptionBudget": 4}
	return ownedKinds[kinds[u.GetKind()]]
}

// superfluous are the objects of a Gateway that it should not have.
func (w *waypoints) superfluous(gw *gatewayv1.Gateway, wanted map[objectKey]bool) []*unstructured.Unstructured {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []*unstructured.Unstructured
	for key, u := range w.objects {
		if key.namespace == gw.Namespace && !wanted[key] && u.GetDeletionTimestamp() == nil &&
			slices.ContainsFunc(u.GetOwnerReferences(), func(r metav1.OwnerReference) bool { return r.UID == gw.UID }) {
			all = append(all, u)
		}
	}
	return all
}

func (w *waypoints) apply(ctx context.Context, gw *gatewayv1.Gateway, r schema.GroupVersionResource, key objectKey, u *unstructured.Unstructured) error {
	text, err := json.Marshal(u.Object)
	if err != nil {
		return err
	}
	form := appliedForm{wanted: sum(text)}
	w.mu.Lock()
	have, last := w.objects[key], w.applied[key]
	w.mu.Unlock()
	client := w.clients.Dynamic.Resource(r).Namespace(key.namespace)
	if have == nil {
		// It may be there and somebody's who never heard of us.
		if have, err = client.Get(ctx, key.name, metav1.GetOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return err
		}
	}
	if have != nil {
		if have.GetLabels()[gateway.LabelManaged] == "" {
			if r.Resource == "serviceaccounts" {
				return nil // people make accounts for their waypoints; it has what they gave it
			}
			return errors.New("it exists and was not made for a Gateway: annotation " + gateway.AnnotationName + " gives the waypoint another name")
		}
		if other := w.otherOwner(gw, have); other != "" {
			return fmt.Errorf("it is Gateway %s's: annotation %s gives the waypoint another name", other, gateway.AnnotationName)
		}
		if form.wanted == last.wanted && fingerprint(have) == last.got {
			return nil
		}
	}
	force := true
	got, err := client.Patch(ctx, key.name, types.ApplyPatchType, text, metav1.PatchOptions{FieldManager: gateway.FieldManager, Force: &force})
	if err != nil {
		return err
	}
	form.got = fingerprint(got)
	w.mu.Lock()
	w.applied[key] = form
	w.mu.Unlock()
	w.log.Info("applied what a gateway asks for", zap.String("gateway", gw.Namespace+"/"+gw.Name), zap.String("kind", u.GetKind()), zap.String("name", key.name))
	return nil
}

// otherOwner is another Gateway, one that exists, that has an object; "": none.
func (w *waypoints) otherOwner(gw *gatewayv1.Gateway, u *unstructured.Unstructured) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, ref := range u.GetOwnerReferences() {
		if other := w.gateways[gw.Namespace+"/"+ref.Name]; ref.Kind == "Gateway" && other != nil && other.UID == ref.UID && other.UID != gw.UID {
			return ref.Name
		}
	}
	return ""
}

func sum(b []byte) uint64 {
	h := fnv.New64a()
	_, _ = h.Write(b) //nolint:errcheck // it never fails
	return h.Sum64()
}

// fingerprint is of what of an object people can spoil. The controller of Deployments counts in an annotation.
func fingerprint(u *unstructured.Unstructured) uint64 {
	annotations := u.GetAnnotations()
	delete(annotations, "deployment.kubernetes.io/revision")
	text, err := json.Marshal([]any{u.GetUID(), u.GetLabels(), annotations, u.GetOwnerReferences(), u.Object["spec"]})
	if err != nil {
		return 0
	}
	return sum(text)
}

// observe tells what there is of a Gateway that this mesh runs.
func (w *waypoints) observe(gw *gatewayv1.Gateway, o *gateway.Observed) {
	name := gateway.NamesOf(gw).Service
	w.mu.Lock()
	service, deployment := w.objects[objectKey{"services", gw.Namespace, name}], w.objects[objectKey{"deployments", gw.Namespace, name}]
	w.mu.Unlock()
	if service != nil {
		var s corev1.Service
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(service.Object, &s); err == nil {
			o.ClusterIPs, o.Hostnames = clusterIPs(&s), []string{w.cfg.Hostname(gw)}
		}
	}
	if deployment == nil {
		if o.Waiting == "" {
			o.Waiting = "Deployment " + name + " does not exist yet"
		}
		return
	}
	var d appsv1.Deployment
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(deployment.Object, &d); err != nil {
		o.Waiting = err.Error()
		return
	}
	o.Ready = d.Status.AvailableReplicas > 0
	if o.Ready {
		return
	}
	o.Waiting = "no pod of Deployment " + name + " is ready yet"
	for _, c := range d.Status.Conditions {
		if c.Type == appsv1.DeploymentReplicaFailure && c.Status == corev1.ConditionTrue || c.Type == appsv1.DeploymentProgressing && c.Status == corev1.ConditionFalse {
			o.Waiting += ": " + c.Message
		}
	}
}

func clusterIPs(s *corev1.Service) []string {
	return slices.DeleteFunc(slices.Clone(s.Spec.ClusterIPs), func(ip string) bool { return ip == "" || ip == corev1.ClusterIPNone })
}

// observeManual tells what there is of a Gateway whose Services somebody else makes.
func (w *waypoints) observeManual(ctx context.Context, gw *gatewayv1.Gateway) (o gateway.Observed, err error) {
	for _, a := range gw.Spec.Addresses {
		namespace, name, err := w.cfg.ServiceNamed(gw, gatewayv1.GatewaySpecAddress(a))
		if err != nil {
			o.Addresses = err
			return o, nil
		}
		full := name + "." + namespace + ".svc." + w.cfg.ClusterDomain
		s, err := w.clients.Kube.CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			o.Waiting = "there is no Service " + full
			return o, nil
		}
		if err != nil {
			return o, err
		}
		if !slices.ContainsFunc(s.Spec.Ports, func(p corev1.ServicePort) bool { return p.Port == mesh.PortHBONE }) {
			o.Waiting = fmt.Sprintf("Service %s has no port %d", full, mesh.PortHBONE)
			return o, nil
		}
		o.ClusterIPs, o.Hostnames = append(o.ClusterIPs, clusterIPs(s)...), append(o.Hostnames, full)
		if o.Ready, err = w.hasEndpoint(ctx, namespace, name); err != nil || !o.Ready {
			o.Waiting = "no pod of Service " + full + " is ready"
			return o, err
		}
	}
	return o, nil
}

func (w *waypoints) hasEndpoint(ctx context.Context, namespace, service string) (bool, error) {
	list, err := w.clients.Kube.DiscoveryV1().EndpointSlices(namespace).List(ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + service})
	if err != nil {
		return false, err
	}
	for _, s := range list.Items {
		if slices.ContainsFunc(s.Endpoints, func(e discoveryv1.Endpoint) bool { return e.Conditions.Ready == nil || *e.Conditions.Ready }) {
			return true, nil
		}
	}
	return false, nil
}
