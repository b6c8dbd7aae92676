package gateway

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"
)

// Overlays change what is deployed: YAML by the key of an object, merged into it as kubectl patch --type=strategic does.
// They are the data of the ConfigMap that a Gateway names in spec.infrastructure.parametersRef.
type Overlays map[string]string

// The keys of overlays. An autoscaler and a disruption budget are made only where an overlay asks for them.
const (
	keyAccount    = "serviceAccount"
	keyDeployment = "deployment"
	keyService    = "service"
	keyAutoscaler = "horizontalPodAutoscaler"
	keyBudget     = "podDisruptionBudget"
)

var keys = []string{keyAccount, keyDeployment, keyService, keyAutoscaler, keyBudget}

// ParseDefaults reads what is merged into every waypoint's objects: YAML of class, key and object. The class "" is every one.
func ParseDefaults(text string) (map[string]Overlays, error) {
	var all map[string]map[string]json.RawMessage
	if err := yaml.UnmarshalStrict([]byte(text), &all); err != nil {
		return nil, err
	}
	defaults := make(map[string]Overlays, len(all))
	for class, overlays := range all {
		o := make(Overlays, len(overlays))
		for key, raw := range overlays {
			var text string
			if json.Unmarshal(raw, &text) != nil {
				text = string(raw) // an object, not text that is one
			}
			o[key] = text
		}
		if err := o.check(); err != nil {
			return nil, err
		}
		defaults[class] = o
	}
	return defaults, nil
}

func (o Overlays) check() error {
	for _, key := range slices.Sorted(maps.Keys(o)) {
		if !slices.Contains(keys, key) {
			return fmt.Errorf("key %q is none of %s", key, strings.Join(keys, ", "))
		}
	}
	return nil
}

// Parameters names the ConfigMap, in the Gateway's namespace, whose overlays are for it alone; "": none.
func Parameters(gw *gatewayv1.Gateway) (string, error) {
	if gw.Spec.Infrastructure == nil || gw.Spec.Infrastructure.ParametersRef == nil {
		return "", nil
	}
	ref := gw.Spec.Infrastructure.ParametersRef
	if ref.Kind != "ConfigMap" || ref.Group != "" {
		return "", fmt.Errorf("spec.infrastructure.parametersRef: kind %s of group %q is not supported, only ConfigMap of group \"\"", ref.Kind, ref.Group)
	}
	return ref.Name, nil
}

// overlaid merges overlays into an object of the type of like. It reports whether there were any.
func overlaid(object map[string]any, like any, key string, overlays []Overlays) (merged map[string]any, any bool, err error) {
	for _, o := range overlays {
		text, ok := o[key]
		if !ok {
			continue
		}
		any = true
		if object, err = merge(object, like, text); err != nil {
			return nil, any, fmt.Errorf("%s: %w", key, err)
		}
	}
	return object, any, nil
}

func merge(object map[string]any, like any, overlay string) (map[string]any, error) {
	patch, err := yaml.YAMLToJSONStrict([]byte(overlay))
	if err != nil {
		return nil, err
	}
	var fields map[string]any
	if err := json.Unmarshal(patch, &fields); err != nil {
		return nil, fmt.Errorf("it is not an object: %w", err)
	}
	if len(fields) == 0 {
		return object, nil
	}
	original, err := json.Marshal(object)
	if err != nil {
		return nil, err
	}
	text, err := strategicpatch.StrategicMergePatch(original, patch, like)
	if err != nil {
		return nil, err
	}
	var u unstructured.Unstructured
	if err := u.UnmarshalJSON(text); err != nil {
		return nil, err
	}
	was := unstructured.Unstructured{Object: object}
	for what, f := range map[string]func(*unstructured.Unstructured) string{
		"kind":                     func(u *unstructured.Unstructured) string { return u.GetAPIVersion() + " " + u.GetKind() },
		"metadata.name":            (*unstructured.Unstructured).GetName,
		"metadata.namespace":       (*unstructured.Unstructured).GetNamespace,
		"metadata.ownerReferences": func(u *unstructured.Unstructured) string { return fmt.Sprint(u.GetOwnerReferences()) },
		"metadata.resourceVersion": (*unstructured.Unstructured).GetResourceVersion,
		"metadata.uid":             func(u *unstructured.Unstructured) string { return string(u.GetUID()) },
		"metadata.managedFields":   func(u *unstructured.Unstructured) string { return fmt.Sprint(u.GetManagedFields()) },
		"metadata.finalizers":      func(u *unstructured.Unstructured) string { return fmt.Sprint(u.GetFinalizers()) },
		"label " + LabelName:       func(u *unstructured.Unstructured) string { return u.GetLabels()[LabelName] },
		"label " + LabelManaged:    func(u *unstructured.Unstructured) string { return u.GetLabels()[LabelManaged] },
		"spec.selector": func(u *unstructured.Unstructured) string {
			selector, _, _ := unstructured.NestedFieldNoCopy(u.Object, "spec", "selector") //nolint:errcheck // no spec: none
			return fmt.Sprint(selector)
		},
	} {
		if f(&was) != f(&u) {
			return nil, fmt.Errorf("%s cannot be changed", what)
		}
	}
	return u.Object, nil
}
