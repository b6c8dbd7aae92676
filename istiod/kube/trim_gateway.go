package kube

import (
	"bytes"
	"encoding/json"
	"maps"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

// annotationApplied is the whole object once more.
const annotationApplied = "kubectl.kubernetes.io/last-applied-configuration"

// trimGatewayAPI reads an object of the Gateway API. Nothing of its spec may be passed over: what a newer version of the
// API says there may be whom not to let in. Of its status counts what can be read.
func trimGatewayAPI[T any, P interface {
	*T
	metav1.Object
	runtime.Object
}](o runtime.Object) (runtime.Object, error) {
	if t, ok := o.(P); ok {
		return t, nil
	}
	u, ok := o.(*unstructured.Unstructured)
	if !ok {
		return nil, unexpected(o)
	}
	t := P(new(T))
	if text, err := json.Marshal(map[string]any{"status": u.Object["status"]}); err == nil {
		_ = json.Unmarshal(text, t) //nolint:errcheck // what of it cannot be read stays empty
	}
	text, err := json.Marshal(map[string]any{"spec": u.Object["spec"]})
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(t); err != nil {
		return nil, err
	}
	t.GetObjectKind().SetGroupVersionKind(u.GroupVersionKind())
	t.SetName(u.GetName())
	t.SetNamespace(u.GetNamespace())
	t.SetUID(u.GetUID())
	t.SetLabels(u.GetLabels())
	t.SetGeneration(u.GetGeneration())
	t.SetResourceVersion(u.GetResourceVersion())
	t.SetCreationTimestamp(u.GetCreationTimestamp())
	t.SetDeletionTimestamp(u.GetDeletionTimestamp())
	annotations := u.GetAnnotations()
	maps.DeleteFunc(annotations, func(key, _ string) bool { return key == annotationApplied })
	t.SetAnnotations(annotations)
	return t, nil
}
