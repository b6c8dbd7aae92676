// Package waypoint writes, lists and removes the Gateways that istiod runs as waypoints, and enrols namespaces with them. It
// starts nothing by itself.
package waypoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"github.com/mistnet/mistnet/cli/cluster"
	"github.com/mistnet/mistnet/internal/mesh"
)

const (
	class      = "istio-waypoint" // which Istio's tools look for, and which both meshes run
	labelFor   = "istio.io/waypoint-for"
	labelUse   = "istio.io/use-waypoint"
	labelRev   = "istio.io/rev"
	manager    = "mistctl"
	lookEvery  = time.Second
	programmed = "Programmed"
)

// classes are those whose Gateways are waypoints of this mesh.
var classes = []string{class, "mistnet-waypoint"}

var gateways = schema.GroupVersionResource{Group: "gateway.networking.k8s.io", Version: "v1", Resource: "gateways"}

// Traffic are the kinds of traffic a waypoint can be for (label istio.io/waypoint-for).
var Traffic = []string{"all", "none", "service", "workload"}

// Gateway is what to write of a waypoint.
type Gateway struct {
	Name      string // "": waypoint
	Namespace string // "": it is not said
	For       string // one of Traffic; "": what the class says, or service
	Revision  string // label istio.io/rev; "": none
}

// object is the Gateway as it is applied.
func (g Gateway) object() (*unstructured.Unstructured, error) {
	if g.Name = cmp.Or(g.Name, "waypoint"); g.Name == "none" {
		return nil, errors.New("--name: none is reserved: as a value of " + labelUse + " it means no waypoint")
	}
	u := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": gateways.GroupVersion().String(), "kind": "Gateway", "metadata": map[string]any{"name": g.Name},
		"spec": map[string]any{"gatewayClassName": class,
			"listeners": []any{map[string]any{"name": "mesh", "port": int64(mesh.PortHBONE), "protocol": "HBONE"}}},
	}}
	if g.Namespace != "" {
		u.SetNamespace(g.Namespace)
	}
	labels := map[string]string{}
	if g.For != "" {
		if !slices.Contains(Traffic, g.For) {
			return nil, fmt.Errorf("--for: %q is none of %s", g.For, strings.Join(Traffic, ", "))
		}
		labels[labelFor] = g.For
	}
	if g.Revision != "" {
		labels[labelRev] = g.Revision
	}
	if len(labels) > 0 {
		u.SetLabels(labels)
	}
	return u, nil
}

// Generate prints the Gateway as YAML.
func (g Gateway) Generate(out io.Writer) error {
	u, err := g.object()
	if err != nil {
		return err
	}
	text, err := yaml.Marshal(u.Object)
	if err != nil {
		return err
	}
	_, err = out.Write(text)
	return err
}

// Waypoints works on the waypoints of one cluster.
type Waypoints struct {
	Cluster *cluster.Cluster
	Out     io.Writer
	Only    string // name of those that List and Status are about; "": all
}

// ApplyOptions say what to do besides applying a Gateway.
type ApplyOptions struct {
	Enroll    bool          // label the namespace, too
	Overwrite bool          // even if it uses another waypoint
	Wait      bool          // until the waypoint serves
	Timeout   time.Duration // of waiting
}

// Apply writes a Gateway, and has its namespace use it if that is asked for.
func (w *Waypoints) Apply(ctx context.Context, g Gateway, o ApplyOptions) error {
	u, err := g.object()
	if err != nil {
		return err
	}
	ns, err := w.Cluster.Kube.CoreV1().Namespaces().Get(ctx, g.Namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("there is no namespace %s", g.Namespace)
	}
	if err != nil {
		return cluster.Explain(err)
	}
	if o.Enroll {
		if have := ns.Labels[labelUse]; have != "" && have != u.GetName() && !o.Overwrite {
			return &cluster.Hint{Err: fmt.Errorf("namespace %s uses waypoint %s already", g.Namespace, have), Fix: "change that with --overwrite; nothing was applied"}
		}
		if ns.Labels[mesh.LabelDataplaneMode] != mesh.DataplaneModeAmbient {
			fmt.Fprintf(w.Out, "⚠️  namespace %s is not in the mesh; to put it there: kubectl label namespace %[1]s istio.io/dataplane-mode=ambient\n", g.Namespace)
		}
	}
	text, err := u.MarshalJSON()
	if err != nil {
		return err
	}
	_, err = w.Cluster.Dynamic.Resource(gateways).Namespace(g.Namespace).Patch(ctx, u.GetName(), types.ApplyPatchType, text, metav1.PatchOptions{FieldManager: manager})
	if err != nil {
		return explain(err)
	}
	fmt.Fprintf(w.Out, "✅ waypoint %s/%s applied\n", g.Namespace, u.GetName())
	if o.Wait {
		if err := w.await(ctx, g.Namespace, u.GetName(), o.Timeout); err != nil {
			return err
		}
		fmt.Fprintf(w.Out, "✅ waypoint %s/%s is ready!\n", g.Namespace, u.GetName())
	}
	if !o.Enroll {
		return nil
	}
	patch := fmt.Sprintf(`{"apiVersion":"v1","kind":"Namespace","metadata":{"name":%q,"labels":{%q:%q}}}`, g.Namespace, labelUse, u.GetName())
	force := true // what another set, --overwrite allowed to change
	if _, err := w.Cluster.Kube.CoreV1().Namespaces().Patch(ctx, g.Namespace, types.ApplyPatchType, []byte(patch), metav1.PatchOptions{FieldManager: manager, Force: &force}); err != nil {
		return cluster.Explain(fmt.Errorf("label namespace %s: %w", g.Namespace, err))
	}
	fmt.Fprintf(w.Out, "✅ namespace %s labeled with \"%s: %s\"\n", g.Namespace, labelUse, u.GetName())
	return nil
}

// explain tells what to do where the Gateway API is missing.
func explain(err error) error {
	if apierrors.IsNotFound(err) {
		return &cluster.Hint{Err: fmt.Errorf("the cluster does not serve Gateways: %w", err), Fix: "install the definitions of the Gateway API, https://gateway-api.sigs.k8s.io"}
	}
	return cluster.Explain(err)
}

// await waits until a Gateway is programmed, and tells why it is not when time is up.
func (w *Waypoints) await(ctx context.Context, namespace, name string, most time.Duration) error {
	deadline := time.After(most)
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		u, err := w.Cluster.Dynamic.Resource(gateways).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
		if err == nil && conditionOf(u).status == "True" {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-deadline:
			if err == nil {
				c := conditionOf(u)
				err = fmt.Errorf("%s: %s", cmp.Or(c.reason, "no status"), cmp.Or(c.message, "does istiod run, and the GatewayClass exist?"))
			}
			return fmt.Errorf("waypoint %s/%s is not ready after %s: %w", namespace, name, most, err)
		}
	}
}

// condition is what a Gateway says of being programmed, or of not being accepted.
type condition struct{ status, kind, reason, message string }

func conditionOf(u *unstructured.Unstructured) condition {
	all, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions") //nolint:errcheck // not a list: none
	found := condition{status: "False", kind: programmed}
	for _, v := range all {
		m, _ := v.(map[string]any)
		text := func(key string) string { s, _ := m[key].(string); return s }
		c := condition{text("status"), text("type"), text("reason"), text("message")}
		if c.kind == "Accepted" && c.status == "False" {
			return c // why it is not, in the first place
		}
		if c.kind == programmed {
			found = c
		}
	}
	return found
}

// list returns the waypoints of a namespace, or of all: "".
func (w *Waypoints) list(ctx context.Context, namespace, selector string) ([]unstructured.Unstructured, error) {
	all, err := w.Cluster.Dynamic.Resource(gateways).Namespace(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, explain(err)
	}
	ours := slices.DeleteFunc(all.Items, func(u unstructured.Unstructured) bool {
		name, _, _ := unstructured.NestedString(u.Object, "spec", "gatewayClassName") //nolint:errcheck // not text: not ours
		return !slices.Contains(classes, name)
	})
	slices.SortFunc(ours, func(a, b unstructured.Unstructured) int {
		return cmp.Or(cmp.Compare(a.GetNamespace(), b.GetNamespace()), cmp.Compare(a.GetName(), b.GetName()))
	})
	return ours, nil
}

// List prints the waypoints of a namespace, or of all: "".
func (w *Waypoints) List(ctx context.Context, namespace string) error {
	return w.table(ctx, namespace, []string{"NAME", "REVISION", "TRAFFIC TYPE", "PROGRAMMED"}, func(u *unstructured.Unstructured) ([]string, error) {
		labels := u.GetLabels()
		return []string{u.GetName(), cmp.Or(labels[labelRev], "default"), cmp.Or(labels[labelFor], "service"), conditionOf(u).status}, nil
	})
}

// Status prints how the waypoints of a namespace, or of all (""), do. With wait above 0 each has that long to become ready.
func (w *Waypoints) Status(ctx context.Context, namespace string, wait time.Duration) error {
	return w.table(ctx, namespace, []string{"NAME", "STATUS", "TYPE", "REASON", "MESSAGE"}, func(u *unstructured.Unstructured) ([]string, error) {
		var late error
		if wait > 0 {
			late = w.await(ctx, u.GetNamespace(), u.GetName(), wait)
			now, err := w.Cluster.Dynamic.Resource(gateways).Namespace(u.GetNamespace()).Get(ctx, u.GetName(), metav1.GetOptions{})
			if err != nil {
				return nil, explain(err)
			}
			u = now
		}
		c := conditionOf(u)
		return []string{u.GetName(), c.status, c.kind, c.reason, c.message}, late
	})
}

// table prints a line for each waypoint. Errors of lines come after the table.
func (w *Waypoints) table(ctx context.Context, namespace string, head []string, line func(*unstructured.Unstructured) ([]string, error)) error {
	all, err := w.list(ctx, namespace, "")
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(u unstructured.Unstructured) bool { return w.Only != "" && u.GetName() != w.Only })
	if len(all) == 0 {
		what, where := "waypoints", "."
		if w.Only != "" {
			what += " named " + w.Only
		}
		if namespace != "" {
			where = fmt.Sprintf(" in namespace %s; -A looks in all.", namespace)
		}
		fmt.Fprintf(w.Out, "No %s found%s\n", what, where)
		return nil
	}
	t := tabwriter.NewWriter(w.Out, 0, 8, 5, ' ', 0)
	where := func(u *unstructured.Unstructured, cells []string) []string {
		if namespace != "" {
			return cells
		}
		if u == nil {
			return append([]string{"NAMESPACE"}, cells...)
		}
		return append([]string{u.GetNamespace()}, cells...)
	}
	fmt.Fprintln(t, strings.Join(where(nil, head), "\t"))
	var errs []error
	for i := range all {
		cells, err := line(&all[i])
		errs = append(errs, err)
		if cells != nil {
			fmt.Fprintln(t, strings.Join(where(&all[i], cells), "\t"))
		}
	}
	return errors.Join(append(errs, t.Flush())...)
}

// Delete removes waypoints by name; without names all of a namespace, or those of a revision.
func (w *Waypoints) Delete(ctx context.Context, namespace string, names []string, revision string) error {
	selector := ""
	if revision != "" {
		selector = labelRev + "=" + revision
	}
	have, err := w.list(ctx, namespace, selector)
	if err != nil {
		return err
	}
	there := make([]string, len(have))
	for i, u := range have {
		there[i] = u.GetName()
	}
	if len(names) == 0 {
		names = there
	}
	var errs []error
	for _, name := range names {
		if !slices.Contains(there, name) { // or a Gateway that is no waypoint could be removed
			errs = append(errs, fmt.Errorf("there is no waypoint %s/%s", namespace, name))
			continue
		}
		if err := w.Cluster.Dynamic.Resource(gateways).Namespace(namespace).Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("delete waypoint %s/%s: %w", namespace, name, cluster.Explain(err)))
			continue
		}
		fmt.Fprintf(w.Out, "waypoint %s/%s deleted\n", namespace, name)
	}
	return errors.Join(errs...)
}
