package install

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"github.com/mistnet/mistnet/cli/cluster"
)

// Installer changes the mesh of a cluster.
type Installer struct {
	Cluster *cluster.Cluster
	Charts  *Charts
	Out     io.Writer
	Timeout time.Duration // per thing that is waited for
	Poll    time.Duration // zero: one second
	DryRun  bool          // ask the API server, change nothing
	Force   bool          // take over objects that somebody else made, and install beside another mesh
}

func (in *Installer) say(format string, args ...any) { fmt.Fprintf(in.Out, format+"\n", args...) }

// Install applies the mesh. Run again, it completes or repairs what is there; another version is upgraded by Upgrade only.
func (in *Installer) Install(ctx context.Context, want Input) error {
	before, err := ReadInventory(ctx, in.Cluster)
	if err != nil {
		return err
	}
	settings, err := in.Charts.Settle(want, nil)
	if err != nil {
		return err
	}
	if before != nil && before.Complete && before.Version != in.version(settings) {
		return fmt.Errorf("the cluster has version %s, this is %s: run mistctl upgrade", before.Version, in.version(settings))
	}
	return in.run(ctx, settings, before, "installs")
}

// Upgrade applies this version with the values of the last installation and what the user adds to them.
func (in *Installer) Upgrade(ctx context.Context, want Input) error {
	before, err := ReadInventory(ctx, in.Cluster)
	if err != nil {
		return err
	}
	if before == nil {
		return fmt.Errorf("mistctl installed nothing in namespace %s: run mistctl install (a mesh that Helm installed is upgraded by helm)", in.Cluster.Namespace)
	}
	settings, err := in.Charts.Settle(want, before.Settings)
	if err != nil {
		return err
	}
	if v := in.version(settings); v != before.Version {
		in.say("upgrading %s to %s", before.Version, v)
	}
	return in.run(ctx, settings, before, "upgrades")
}

// version is what the settings install.
func (in *Installer) version(s *Settings) string {
	if tag, ok := lookup(s.Values, "global.tag").(string); ok && tag != "" {
		return tag
	}
	return in.Charts.Version()
}

func (in *Installer) run(ctx context.Context, s *Settings, before *Inventory, doing string) error {
	in.Poll = cmp.Or(in.Poll, time.Second)
	objects, err := in.render(s, before != nil)
	if err != nil {
		return err
	}
	if err := in.otherMesh(ctx); err != nil {
		return err
	}
	foreign, err := in.foreign(ctx, objects, before)
	if err != nil {
		return err
	}
	objects = slices.DeleteFunc(objects, func(o Object) bool { return foreign[o.Key()] })
	if in.DryRun {
		return in.preview(ctx, objects, before)
	}
	if err := in.ensureNamespace(ctx); err != nil {
		return err
	}
	ctx, l, err := takeLock(ctx, in.Cluster, doing)
	if err != nil {
		return err
	}
	defer l.release()
	inv := &Inventory{Version: in.version(s), Settings: s}
	for _, o := range objects {
		inv.Objects = append(inv.Objects, refOf(o))
	}
	keep, old := inv.Objects, []Ref(nil)
	if before != nil {
		old = without(before.Objects, keep)
		inv.Objects = union(keep, before.Objects)
	}
	if err := inv.write(ctx, in.Cluster); err != nil {
		return err
	}
	if err := in.applyAll(ctx, objects, len(foreign)); err != nil {
		return causeOf(ctx, err)
	}
	old = slices.DeleteFunc(old, Ref.isCRD) // objects of users may need them still
	if err := in.remove(ctx, old); err != nil {
		return causeOf(ctx, err)
	}
	inv.Objects, inv.Complete = keep, true
	if before != nil { // a definition that is no longer rendered is still ours to purge
		inv.Objects = union(keep, slices.DeleteFunc(slices.Clone(before.Objects), func(r Ref) bool { return !r.isCRD() }))
	}
	if err := inv.write(ctx, in.Cluster); err != nil {
		return causeOf(ctx, err)
	}
	in.say("✓ the mesh is ready: version %s, profile %s", inv.Version, s.Profile)
	return nil
}

func (in *Installer) render(s *Settings, upgrade bool) ([]Object, error) {
	t := Target{Namespace: in.Cluster.Namespace, Upgrade: upgrade}
	if in.Cluster.Version != nil {
		t.KubeVersion = in.Cluster.Version.GitVersion
	}
	groups, lists, err := in.Cluster.Kube.Discovery().ServerGroupsAndResources()
	if err != nil && len(groups) == 0 {
		return nil, cluster.Explain(fmt.Errorf("ask what the cluster serves: %w", err))
	}
	t.APIs = []string{}
	for _, l := range lists {
		t.APIs = append(t.APIs, l.GroupVersion)
		for _, r := range l.APIResources {
			t.APIs = append(t.APIs, l.GroupVersion+"/"+r.Kind)
		}
	}
	return in.Charts.Render(s, t)
}

// causeOf is why ctx ended when it did: then err is only how that was noticed.
func causeOf(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return errors.New("interrupted: run the same command again to complete it, or mistctl uninstall to undo it")
}

func (in *Installer) resource(r Ref) (dynamic.ResourceInterface, error) {
	m, err := in.Cluster.Mapper.RESTMapping(r.gvk().GroupKind(), r.Version)
	if meta.IsNoMatchError(err) {
		in.Cluster.Mapper.Reset()
		m, err = in.Cluster.Mapper.RESTMapping(r.gvk().GroupKind(), r.Version)
	}
	if err != nil {
		return nil, err
	}
	if m.Scope.Name() == meta.RESTScopeNameNamespace {
		return in.Cluster.Dynamic.Resource(m.Resource).Namespace(r.Namespace), nil
	}
	return in.Cluster.Dynamic.Resource(m.Resource), nil
}

// live is the object as it is in the cluster; nil when it is not, or its kind is not served yet.
func (in *Installer) live(ctx context.Context, r Ref) (*unstructured.Unstructured, error) {
	res, err := in.resource(r)
	if meta.IsNoMatchError(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	u, err := res.Get(ctx, r.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	return u, err
}

// foreign finds the objects that somebody else made: definitions and namespaces are left to whoever it was, anything
// else is refused before the first change.
func (in *Installer) foreign(ctx context.Context, objects []Object, before *Inventory) (map[string]bool, error) {
	left := make(map[string]bool)
	var refused []string
	for _, o := range objects {
		live, err := in.live(ctx, refOf(o))
		if err != nil {
			return nil, cluster.Explain(fmt.Errorf("read %s: %w", o.Key(), err))
		}
		if live == nil || live.GetLabels()[LabelComponent] != "" || before.holds(refOf(o)) {
			continue
		}
		switch {
		case o.IsCRD(), o.GetKind() == "Namespace":
			left[o.Key()] = true
		case !in.Force:
			name := o.Key()
			if release := live.GetAnnotations()["meta.helm.sh/release-name"]; release != "" {
				name += " (Helm release " + release + ")"
			}
			refused = append(refused, name)
		}
	}
	if len(refused) > 0 {
		more := ""
		if n := len(refused) - 3; n > 0 {
			more = fmt.Sprintf(" and %d more", n)
			refused = refused[:3]
		}
		return nil, fmt.Errorf("the cluster has objects of these names that mistctl did not make: %s%s: upgrade or remove them with the tool that made them, or take them over with --force",
			strings.Join(refused, ", "), more)
	}
	return left, nil
}

func (in *Installer) ensureNamespace(ctx context.Context) error {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: in.Cluster.Namespace, Annotations: map[string]string{annotationCreated: "true"},
	}}
	_, err := in.Cluster.Kube.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{FieldManager: FieldManager})
	switch {
	case apierrors.IsAlreadyExists(err):
		live, err := in.Cluster.Kube.CoreV1().Namespaces().Get(ctx, ns.Name, metav1.GetOptions{})
		if err == nil && live.DeletionTimestamp != nil {
			return fmt.Errorf("namespace %s is being deleted: run again when it is gone", ns.Name)
		}
		return nil
	case err != nil:
		return cluster.Explain(fmt.Errorf("create namespace %s: %w", ns.Name, err))
	}
	return nil
}

func (in *Installer) apply(ctx context.Context, o Object, dry bool) (*unstructured.Unstructured, error) {
	res, err := in.resource(refOf(o))
	if err != nil {
		return nil, cluster.Explain(fmt.Errorf("apply %s: %w", o.Key(), err))
	}
	body, err := json.Marshal(o.Object)
	if err != nil {
		return nil, err
	}
	force := true // what others own was refused before, as whole objects
	opts := metav1.PatchOptions{FieldManager: FieldManager, Force: &force}
	if dry {
		opts.DryRun = []string{metav1.DryRunAll}
	}
	u, err := res.Patch(ctx, o.GetName(), types.ApplyPatchType, body, opts)
	if err != nil {
		return nil, cluster.Explain(fmt.Errorf("apply %s: %w", o.Key(), err))
	}
	return u, nil
}

// applyAll applies definitions, then component after component, each when the one before it works.
func (in *Installer) applyAll(ctx context.Context, objects []Object, left int) error {
	crds, rest := split(objects, Object.IsCRD)
	for _, o := range crds {
		if _, err := in.apply(ctx, o, false); err != nil {
			return err
		}
	}
	if left > 0 {
		in.say("‼ %d definitions or namespaces were there already and are left as they are", left)
	}
	if len(crds) > 0 {
		if err := in.await(ctx, "definitions", func(ctx context.Context) (progress, error) { return in.established(ctx, crds) }); err != nil {
			return err
		}
		in.Cluster.Mapper.Reset()
		in.say("✓ %-10s %d applied", "crds", len(crds))
	}
	for _, name := range Components {
		var mine []Object
		mine, rest = split(rest, func(o Object) bool { return o.Component == name })
		if len(mine) == 0 {
			continue
		}
		start := time.Now()
		for _, o := range mine {
			if _, err := in.apply(ctx, o, false); err != nil {
				return err
			}
		}
		for _, o := range mine {
			err := in.await(ctx, name, func(ctx context.Context) (progress, error) { return in.rolledOut(ctx, refOf(o)) })
			if err != nil {
				return err
			}
		}
		in.say("✓ %-10s %d objects applied, ready after %s", name, len(mine), time.Since(start).Round(100*time.Millisecond))
	}
	return nil
}

func split(objects []Object, first func(Object) bool) (yes, no []Object) {
	for _, o := range objects {
		if first(o) {
			yes = append(yes, o)
		} else {
			no = append(no, o)
		}
	}
	return yes, no
}

// preview says what applying would do, as the API server sees it where it can.
func (in *Installer) preview(ctx context.Context, objects []Object, before *Inventory) error {
	for _, o := range objects {
		live, err := in.live(ctx, refOf(o))
		if err != nil {
			return cluster.Explain(fmt.Errorf("read %s: %w", o.Key(), err))
		}
		if live == nil {
			in.say("create     %s", o.Key())
			continue
		}
		after, err := in.apply(ctx, o, true)
		if err != nil {
			return err
		}
		if same(live, after) {
			in.say("unchanged  %s", o.Key())
		} else {
			in.say("configure  %s", o.Key())
		}
	}
	if before != nil {
		var now []Ref
		for _, o := range objects {
			now = append(now, refOf(o))
		}
		for _, r := range without(before.Objects, now) {
			if !r.isCRD() {
				in.say("delete     %s", r)
			}
		}
	}
	in.say("dry run: nothing was changed")
	return nil
}

// same compares what users write: not who wrote it, nor what the server counts.
func same(a, b *unstructured.Unstructured) bool {
	strip := func(u *unstructured.Unstructured) map[string]any {
		c := u.DeepCopy()
		for _, field := range []string{"managedFields", "resourceVersion", "generation"} {
			unstructured.RemoveNestedField(c.Object, "metadata", field)
		}
		delete(c.Object, "status")
		return c.Object
	}
	return equality.Semantic.DeepEqual(strip(a), strip(b))
}
