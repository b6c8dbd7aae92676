package install

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	k8syaml "k8s.io/apimachinery/pkg/util/yaml"
)

// Components are the charts of the mesh in the order in which they are installed: each works with those before it. The
// agent comes before ztunnel as in Istio's documents; pods are enrolled when both are there.
var Components = []string{"base", "istiod", "cni", "ztunnel"}

// Labels and names of what mistctl puts into a cluster.
const (
	LabelComponent = "install.mistnet.io/component" // on every object; its value is one of Components
	FieldManager   = "mistctl"
)

// Charts are the loaded charts of the components.
type Charts struct{ byName map[string]*chart.Chart }

// LoadCharts reads charts/<component> for every component from a file system.
func LoadCharts(files fs.FS) (*Charts, error) {
	c := &Charts{byName: make(map[string]*chart.Chart)}
	for _, name := range Components {
		ch, err := loadChart(files, path.Join("charts", name))
		if err != nil {
			return nil, fmt.Errorf("load chart %s: %w", name, err)
		}
		c.byName[name] = ch
	}
	return c, nil
}

func loadChart(files fs.FS, dir string) (*chart.Chart, error) {
	var buffered []*loader.BufferedFile
	err := fs.WalkDir(files, dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(files, name)
		if err != nil {
			return err
		}
		buffered = append(buffered, &loader.BufferedFile{Name: strings.TrimPrefix(name, dir+"/"), Data: b})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return loader.LoadFiles(buffered)
}

// Version is what the charts install when global.tag does not say otherwise.
func (c *Charts) Version() string { return c.byName["istiod"].Metadata.AppVersion }

// Target is what rendering must know of the cluster.
type Target struct {
	Namespace   string
	KubeVersion string   // "" for the one Helm assumes
	APIs        []string // group/version and group/version/Kind that are served, nil when not known
	Upgrade     bool
}

// Object is one thing to apply.
type Object struct {
	Component string
	*unstructured.Unstructured
}

// Key tells objects apart: group/Kind namespace/name.
func (o Object) Key() string { return refOf(o).String() }

// IsCRD reports whether the object defines a kind.
func (o Object) IsCRD() bool {
	return o.GroupVersionKind().Group == "apiextensions.k8s.io" && o.GetKind() == "CustomResourceDefinition"
}

// Render makes the objects of the settings, in the order in which they must be applied.
func (c *Charts) Render(s *Settings, t Target) ([]Object, error) {
	caps := *chartutil.DefaultCapabilities
	if t.KubeVersion != "" {
		v, err := chartutil.ParseKubeVersion(t.KubeVersion)
		if err != nil {
			return nil, fmt.Errorf("understand Kubernetes version %q: %w", t.KubeVersion, err)
		}
		caps.KubeVersion = *v
		if want := c.byName["base"].Metadata.KubeVersion; want != "" && !chartutil.IsCompatibleRange(want, v.Version) {
			return nil, fmt.Errorf("a cluster of Kubernetes %s is not supported, the mesh needs %s: upgrade the cluster, or use an older mesh", v.Version, strings.TrimSuffix(want, "-0"))
		}
	}
	if t.APIs != nil {
		caps.APIVersions = append(slices.Clone(chartutil.DefaultVersionSet), t.APIs...)
	}
	var all []Object
	for _, name := range s.Components {
		objects, err := render(c.byName[name], componentValues(s, name, t.Namespace), chartutil.ReleaseOptions{
			Name: name, Namespace: t.Namespace, Revision: 1, IsInstall: !t.Upgrade, IsUpgrade: t.Upgrade,
		}, &caps)
		if err != nil {
			return nil, fmt.Errorf("render chart %s: %w", name, err)
		}
		for _, u := range objects {
			labels := u.GetLabels()
			if labels == nil {
				labels = make(map[string]string)
			}
			labels[LabelComponent] = name
			u.SetLabels(labels)
			all = append(all, Object{name, u})
		}
	}
	slices.SortStableFunc(all, func(a, b Object) int { return stage(a) - stage(b) })
	return all, nil
}

// componentValues are a chart's: its own, the global ones, and where the control plane is when the user does not say.
func componentValues(s *Settings, name, namespace string) map[string]any {
	own, _ := s.Values[name].(map[string]any)
	vals := clone(own)
	mine, _ := vals["global"].(map[string]any)
	if mine == nil {
		mine = map[string]any{}
	}
	if global, ok := s.Values["global"].(map[string]any); ok {
		mine = chartutil.CoalesceTables(mine, clone(global))
	}
	vals["global"] = chartutil.CoalesceTables(mine, map[string]any{"istioNamespace": namespace})
	return vals
}

func render(ch *chart.Chart, vals map[string]any, release chartutil.ReleaseOptions, caps *chartutil.Capabilities) ([]*unstructured.Unstructured, error) {
	merged, err := chartutil.ToRenderValues(ch, vals, release, caps)
	if err != nil {
		return nil, err
	}
	files, err := engine.Render(ch, merged)
	if err != nil {
		return nil, err
	}
	var all []*unstructured.Unstructured
	for _, crd := range ch.CRDObjects() {
		objects, err := decode(crd.File.Data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", crd.Filename, err)
		}
		all = append(all, objects...)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if base := path.Base(name); strings.HasPrefix(base, "_") || strings.HasSuffix(base, ".txt") {
			continue
		}
		objects, err := decode([]byte(files[name]))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		for _, u := range objects {
			if strings.HasPrefix(u.GetAnnotations()["helm.sh/hook"], "test") {
				continue
			}
			if u.GetNamespace() == "" && !clusterScoped[u.GetKind()] {
				u.SetNamespace(release.Namespace)
			}
			all = append(all, u)
		}
	}
	return all, nil
}

func decode(data []byte) ([]*unstructured.Unstructured, error) {
	var all []*unstructured.Unstructured
	for d := k8syaml.NewYAMLOrJSONDecoder(bytes.NewReader(data), 4096); ; {
		u := &unstructured.Unstructured{}
		switch err := d.Decode(&u.Object); {
		case errors.Is(err, io.EOF):
			return all, nil
		case err != nil:
			return nil, err
		case len(u.Object) == 0: // only comments
		case u.GetKind() == "" || u.GetName() == "":
			return nil, fmt.Errorf("object %v has no kind or no name", u.Object)
		default:
			all = append(all, u)
		}
	}
}

// clusterScoped are the kinds of charts that live in no namespace. Asking the cluster would make rendering need one.
var clusterScoped = map[string]bool{
	"Namespace": true, "CustomResourceDefinition": true, "ClusterRole": true, "ClusterRoleBinding": true, "PriorityClass": true,
	"ValidatingWebhookConfiguration": true, "MutatingWebhookConfiguration": true, "ValidatingAdmissionPolicy": true,
	"ValidatingAdmissionPolicyBinding": true, "GatewayClass": true, "SecurityContextConstraints": true, "ClusterTrustBundle": true,
}

// kindOrder is how the objects of one component follow each other: who is referred to comes first.
var kindOrder = []string{
	"Namespace", "PriorityClass", "ResourceQuota", "NetworkPolicy", "SecurityContextConstraints", "ServiceAccount", "Secret",
	"ConfigMap", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "NetworkAttachmentDefinition", "Service",
	"PodDisruptionBudget", "Deployment", "DaemonSet", "HorizontalPodAutoscaler",
}

// stage puts definitions first, then components in their order, then kinds in theirs; kinds not listed come last.
func stage(o Object) int {
	if o.IsCRD() {
		return 0
	}
	kind := slices.Index(kindOrder, o.GetKind())
	if kind < 0 {
		kind = len(kindOrder)
	}
	return 1 + slices.Index(Components, o.Component)*(len(kindOrder)+1) + kind
}
